// Runs the CUDA kernels on cases from a file (sanitized.py writes it) and compares with what is expected there.
// Every tensor has its own allocation of its exact size, and outputs start as NaN. Exit status 1: a result is wrong.
#include "shim.h"

#include <fstream>
#include <map>
#include <string>

#include <torch/headeronly/util/BFloat16.h>

#include "cuda/kernels.h"

namespace {

using namespace cc_ds;

std::ifstream file;

template <class V>
V read() {
  V value;
  file.read(reinterpret_cast<char*>(&value), sizeof value);
  if (!file) shim::die("the file of cases ends too early");
  return value;
}

std::string read_text() {
  std::string text(read<int64_t>(), ' ');
  file.read(text.data(), text.size());
  return text;
}

// The elements of one tensor, `misalignment` bytes after a multiple of 16.
struct Tensor {
  shim::Memory memory;
  unsigned char* data = nullptr;
  std::vector<int64_t> strides;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

std::map<std::string, Tensor> read_tensors() {
  std::map<std::string, Tensor> tensors;
  for (int64_t count = read<int64_t>(); count > 0; --count) {
    Tensor& tensor = tensors[read_text()];
    for (int64_t dims = read<int64_t>(); dims > 0; --dims) tensor.strides.push_back(read<int64_t>());
    const int64_t misalignment = read<int64_t>(), bytes = read<int64_t>();
    tensor.memory = shim::poisoned(misalignment + bytes);
    tensor.data = tensor.memory.get() + misalignment;
    file.read(reinterpret_cast<char*>(tensor.data), bytes);
  }
  return tensors;
}

struct Checker {
  std::string name;
  double relative, absolute;
  bool right = true;

  template <class T>
  void equal(const char* what, double value, T expected) {
    if (std::abs(value - expected) <= absolute + relative * std::abs(expected)) return;
    if (right) std::fprintf(stderr, "WRONG %s: %s is %g, not %g\n", name.c_str(), what, value, static_cast<double>(expected));
    right = false;
  }
  template <class T>
  void equal(const char* what, const T* values, const Tensor& expected, int64_t count) {
    for (int64_t i = 0; i < count; ++i) equal(what, static_cast<double>(values[i]), expected.as<double>()[i]);
  }
};

template <class T>
bool run_case(const std::string& name, bool hard) {
  using A = Accumulate<T>;
  const auto L = read<int64_t>(), B = read<int64_t>(), positions = read<int64_t>(), H = read<int64_t>();
  const auto temperature = read<double>(), relative = read<double>(), absolute = read<double>();
  const std::map<std::string, Tensor> in = read_tensors();
  Checker check{name, relative, absolute};
  const auto output = [](int64_t count, size_t size) { return shim::poisoned(count * size); };

  const auto fill = [&](Gate<T>& gate) {
    gate.layers = L, gate.batch = B, gate.positions = positions, gate.hidden = H;
    const Tensor &english = in.at("english"), &weight = in.at("weight");
    gate.english = english.as<T>(), gate.english_stride_l = english.strides[0], gate.english_stride_b = english.strides[1];
    gate.weight = weight.as<T>(), gate.weight_stride_l = weight.strides[0];
    gate.noise = in.at("noise").as<A>();
    gate.anchors = in.at("anchors").as<int64_t>();
    gate.mask = in.count("mask") ? in.at("mask").as<bool>() : nullptr;
    gate.temperature = static_cast<A>(temperature);
    gate.hard = hard;
  };

  const auto choice = output(B * L, sizeof(A)), logits = output(B * L, sizeof(A)), decision = output(B * H, sizeof(A));
  const auto partial = output(cuda::tiles(H, sizeof(T)) * B * L, sizeof(A));
  const auto as_wide = [](const shim::Memory& memory) { return reinterpret_cast<A*>(memory.get()); };
  const Tensor& ffn_output = in.at("ffn_output");
  Forward<T> f;
  fill(f);
  f.ffn_output = {ffn_output.as<T>(), ffn_output.strides[0], ffn_output.strides[1], ffn_output.strides[2]};
  f.embedding = in.at("embedding").as<T>();
  f.embedding_stride_b = in.at("embedding").strides[0];
  f.partial = as_wide(partial), f.choice = as_wide(choice), f.logits = as_wide(logits), f.decision = as_wide(decision);
  if (cuda::forward<T>(f, nullptr) != cudaSuccess) shim::die("the launch was refused");
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < positions; ++t) {
      for (int64_t h = 0; h < H; ++h) {
        check.equal("fused", static_cast<double>(f.ffn_output.at(b, t)[h * f.ffn_output.stride_h]),
                    in.at("expected fused").as<double>()[(b * positions + t) * H + h]);
      }
    }
  }
  check.equal("choice", f.choice, in.at("expected choice"), B * L);
  check.equal("logits", f.logits, in.at("expected logits"), B * L);

  const auto grad_gate = output(B * L, sizeof(A)), grad_english = output(L * B * H, sizeof(T));
  const auto grad_embedding = output(B * H, sizeof(T)), grad_weight = output(L * H, sizeof(T));
  const auto as_narrow = [](const shim::Memory& memory) { return reinterpret_cast<T*>(memory.get()); };
  const Tensor& grad_fused = in.at("grad_fused");
  Backward<T> g;
  fill(g);
  g.grad_fused = {grad_fused.as<T>(), grad_fused.strides[0], grad_fused.strides[1], grad_fused.strides[2]};
  g.grad_logits = in.at("grad_logits").as<A>();
  g.decision = f.decision, g.logits = f.logits, g.choice = f.choice, g.grad_gate = as_wide(grad_gate);
  g.grad_english = as_narrow(grad_english), g.grad_embedding = as_narrow(grad_embedding);
  g.grad_weight = as_narrow(grad_weight);
  if (cuda::backward<T>(g, nullptr) != cudaSuccess) shim::die("the launch was refused");
  check.equal("gradient of english", g.grad_english, in.at("expected grad_english"), L * B * H);
  check.equal("gradient of embedding", g.grad_embedding, in.at("expected grad_embedding"), B * H);
  check.equal("gradient of weight", g.grad_weight, in.at("expected grad_weight"), L * H);
  return check.right;
}

}  // namespace

int main(int, char** arguments) {
  file.open(arguments[1], std::ios::binary);
  bool right = true;
  for (auto cases = read<int64_t>(); cases > 0; --cases) {
    const std::string name = read_text(), dtype = read_text();
    const bool hard = read<int64_t>() != 0;
    right &= dtype == "float32" ? run_case<float>(name, hard) : run_case<c10::BFloat16>(name, hard);
  }
  return right ? 0 : 1;
}
