// From torch tensors to kernel arguments, the same for the CPU and for CUDA.
//
// A Backend gives   static int64_t tiles(hidden, element_size)   how many parts of H the forward's partial sums have
//                   static void forward(const Forward<T>&, device), backward(const Backward<T>&, device)
// The schemas are defined in Python (cc_ds/ops/library.py), with the fake and the autograd implementations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <vector>

#include "gate.h"

namespace cc_ds {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: STD_TORCH_CHECK(false, "gated_fuse: only float16, bfloat16, float32 and float64 are supported");
  }
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

// The kernels read along H with unit stride.
inline Tensor unit_stride(const Tensor& x) {
  return x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
const T* pointer(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_pointer(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T, class Element>
Rows<Element> rows_of(Element* data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// Contiguous copies, where they were needed, live as long as this.
struct GateTensors {
  Tensor english, weight, noise, anchors;
  std::optional<Tensor> mask;

  GateTensors(const Tensor& english, const Tensor& weight, const Tensor& noise, const Tensor& anchors,
              const std::optional<Tensor>& mask)
      : english(unit_stride(english)),
        weight(unit_stride(weight)),
        noise(torch::stable::contiguous(noise)),
        anchors(torch::stable::contiguous(anchors)) {
    if (mask) this->mask = torch::stable::contiguous(*mask);
    const ScalarType dtype = english.scalar_type();
    STD_TORCH_CHECK(weight.scalar_type() == dtype && noise.scalar_type() == accumulate_dtype(dtype) &&
                        anchors.scalar_type() == ScalarType::Long && (!mask || mask->scalar_type() == ScalarType::Bool),
                    "gated_fuse: dtypes do not fit together; call cc_ds.ops.gated_fuse, which converts them");
  }

  template <class T>
  void fill(Gate<T>& gate, int64_t positions, double temperature, bool hard) const {
    gate.layers = english.size(0);
    gate.batch = english.size(1);
    gate.positions = positions;
    gate.hidden = english.size(2);
    gate.english = pointer<T>(english);
    gate.english_stride_l = english.stride(0);
    gate.english_stride_b = english.stride(1);
    gate.weight = pointer<T>(weight);
    gate.weight_stride_l = weight.stride(0);
    gate.noise = pointer<Accumulate<T>>(noise);
    gate.anchors = pointer<int64_t>(anchors);
    gate.mask = mask ? pointer<bool>(*mask) : nullptr;
    gate.temperature = static_cast<Accumulate<T>>(temperature);
    gate.hard = hard;
  }
};

// cc_ds::gated_fuse_: adds in place, returns choice (B, L), logits (B, L), decision (B, H).
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> gated_fuse_(Tensor ffn_output, Tensor english, Tensor embedding, Tensor weight,
                                               Tensor noise, Tensor anchors, std::optional<Tensor> mask,
                                               double temperature, bool hard) {
  const GateTensors tensors(english, weight, noise, anchors, mask);
  const Tensor embedding_rows = unit_stride(embedding);
  const ScalarType dtype = english.scalar_type(), wide = accumulate_dtype(dtype);
  STD_TORCH_CHECK(ffn_output.scalar_type() == dtype && embedding.scalar_type() == dtype,
                  "gated_fuse: dtypes do not fit together; call cc_ds.ops.gated_fuse, which converts them");
  const int64_t layers = english.size(0), batch = english.size(1), hidden = english.size(2);
  const Tensor choice = empty(english, {batch, layers}, wide), logits = empty(english, {batch, layers}, wide);
  const Tensor decision = empty(english, {batch, hidden}, wide);
  if (batch > 0) {
    dispatch(dtype, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulate<T>;
      const Tensor partial = empty(english, {Backend::tiles(hidden, sizeof(T)), batch, layers}, wide);
      Forward<T> f;
      tensors.fill(f, ffn_output.size(1), temperature, hard);
      f.ffn_output = rows_of<T>(mutable_pointer<T>(ffn_output), ffn_output);
      f.embedding = pointer<T>(embedding_rows);
      f.embedding_stride_b = embedding_rows.stride(0);
      f.partial = mutable_pointer<A>(partial);
      f.choice = mutable_pointer<A>(choice);
      f.logits = mutable_pointer<A>(logits);
      f.decision = mutable_pointer<A>(decision);
      Backend::forward(f, english.get_device_index());
    });
  }
  return {choice, logits, decision};
}

// cc_ds::gated_fuse_backward: gradients of english (L, B, H; empty unless needed), embedding (B, H) and weight (L, H).
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> gated_fuse_backward(
    std::optional<Tensor> grad_fused, std::optional<Tensor> grad_logits, Tensor english, Tensor weight, Tensor decision,
    Tensor logits, Tensor noise, Tensor choice, Tensor anchors, std::optional<Tensor> mask, double temperature,
    bool hard, bool need_english) {
  const GateTensors tensors(english, weight, noise, anchors, mask);
  const ScalarType dtype = english.scalar_type(), wide = accumulate_dtype(dtype);
  const int64_t layers = english.size(0), batch = english.size(1), hidden = english.size(2);
  const Tensor grad_english =
      empty(english, need_english ? std::vector<int64_t>{layers, batch, hidden} : std::vector<int64_t>{0}, dtype);
  const Tensor grad_embedding = empty(english, {batch, hidden}, dtype);
  const Tensor grad_weight = empty(english, {layers, hidden}, dtype);
  const Tensor grad_gate = empty(english, {batch, layers}, wide);
  STD_TORCH_CHECK(!grad_fused || grad_fused->scalar_type() == dtype, "gated_fuse: the gradient has another dtype");
  STD_TORCH_CHECK(!grad_logits || grad_logits->scalar_type() == wide, "gated_fuse: the gradient has another dtype");
  std::optional<Tensor> grad_logits_rows;
  if (grad_logits) grad_logits_rows = torch::stable::contiguous(*grad_logits);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    Backward<T> g;
    tensors.fill(g, grad_fused ? grad_fused->size(1) : 0, temperature, hard);
    g.grad_fused = grad_fused ? rows_of<T>(pointer<T>(*grad_fused), *grad_fused) : Rows<const T>{nullptr, 0, 0, 0};
    g.grad_logits = grad_logits_rows ? pointer<A>(*grad_logits_rows) : nullptr;
    g.decision = pointer<A>(decision);
    g.logits = pointer<A>(logits);
    g.choice = pointer<A>(choice);
    g.grad_gate = mutable_pointer<A>(grad_gate);
    g.grad_english = need_english ? mutable_pointer<T>(grad_english) : nullptr;
    g.grad_embedding = mutable_pointer<T>(grad_embedding);
    g.grad_weight = mutable_pointer<T>(grad_weight);
    Backend::backward(g, english.get_device_index());
  });
  return {grad_english, grad_embedding, grad_weight};
}

}  // namespace cc_ds
