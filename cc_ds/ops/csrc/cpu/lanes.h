// Eight lanes of float or double, and how element types are read into them and written from them.
// Included inside the namespace of one instruction set (kernels.h); the compiler splits a lane vector where the
// machine's registers are narrower.

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));

constexpr int kLanes = 8;

template <class A>
struct LanesOf {
  using type = Float8;
};
template <>
struct LanesOf<double> {
  using type = Double8;
};
template <class A>
using Lanes = typename LanesOf<A>::type;

#define CC_ALWAYS_INLINE __attribute__((always_inline))
#define CC_INLINE static inline CC_ALWAYS_INLINE

template <class To, class From>
CC_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
CC_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

CC_INLINE Float8 load(const float* p) { return load_bits<Float8>(p); }
CC_INLINE Double8 load(const double* p) { return load_bits<Double8>(p); }
CC_INLINE Float8 load(const c10::BFloat16* p) {
#if defined(CC_AVX2)  // gcc does not find the one instruction
  const Bits32 bits = reinterpret<Bits32>(_mm256_cvtepu16_epi32(load_bits<__m128i>(p)));
#else
  const Bits32 bits = __builtin_convertvector(load_bits<Bits16>(p), Bits32);
#endif
  return reinterpret<Float8>(bits << 16);
}
CC_INLINE Float8 load(const c10::Half* p) {
#if defined(CC_AVX2)
  return reinterpret<Float8>(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#else
  Float8 v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

CC_INLINE void store(float* p, Float8 v) { __builtin_memcpy(p, &v, sizeof v); }
CC_INLINE void store(double* p, Double8 v) { __builtin_memcpy(p, &v, sizeof v); }
CC_INLINE void store(c10::BFloat16* p, Float8 v) {
  const Bits32 bits = reinterpret<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Bits32 nan = reinterpret<Bits32>(v != v);
  const Bits16 out = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), Bits16);
  __builtin_memcpy(p, &out, sizeof out);
}
CC_INLINE void store(c10::Half* p, Float8 v) {
#if defined(CC_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = v[i];
#endif
}

// The first `count` of eight lanes; the others are zero.
template <class T>
CC_INLINE Lanes<Accumulate<T>> load_some(const T* p, int64_t count) {
  Lanes<Accumulate<T>> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = static_cast<Accumulate<T>>(p[i]);
  return v;
}

template <class T>
CC_INLINE void store_some(T* p, Lanes<Accumulate<T>> v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(v[i]);
}

// f(offset, reader, writer) for every group of eight up to `count`; the last may be partial.
template <class F>
CC_INLINE void for_lanes(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    f(
        i, [](auto* p) CC_ALWAYS_INLINE { return load(p); },
        [](auto* p, auto v) CC_ALWAYS_INLINE { store(p, v); });
  }
  if (i < count) {
    const int64_t left = count - i;
    f(
        i, [left](auto* p) CC_ALWAYS_INLINE { return load_some(p, left); },
        [left](auto* p, auto v) CC_ALWAYS_INLINE { store_some(p, v, left); });
  }
}

template <class V>
CC_INLINE auto sum_lanes(V v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
