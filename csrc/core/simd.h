// The only vector wrapper: GCC/Clang vector extensions of the width the instruction set has, so one source serves
// x86-64-v2, v3, v4 and any other architecture. Everything is in an anonymous namespace because this header is
// compiled with different instruction sets into one library: a shared symbol would be picked by the linker from
// any of them. For the same reason the kernels use no templates of the standard library.
//
// Error of the functions in ulp of the result, held by tests/native/test_simd.py: exp 1.1, tanh 2, sigmoid 2.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "core/types.h"

namespace seqkernels {
namespace {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = std::int32_t;
  typedef float Vec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES), aligned(4), may_alias));
  typedef std::int32_t IntVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));
  static constexpr int kCount = SEQKERNELS_VECTOR_BYTES / 4;
};

template <>
struct Lanes<double> {
  using Int = std::int64_t;
  typedef double Vec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES), aligned(8), may_alias));
  typedef std::int64_t IntVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));
  static constexpr int kCount = SEQKERNELS_VECTOR_BYTES / 8;
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using IntVec = typename Lanes<T>::IntVec;
template <class T>
constexpr int kLanes = Lanes<T>::kCount;

// The type a kernel computes in for elements stored as S.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Float16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class I>
inline I min_of(I a, I b) {
  return a < b ? a : b;
}
template <class I>
inline I max_of(I a, I b) {
  return a > b ? a : b;
}
inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
inline Vec<T> load_full(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}
template <class T>
inline void store_full(T* p, Vec<T> x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = x;
}

typedef std::uint16_t HalfVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES / 2)));
typedef std::uint32_t WordVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));

inline Vec<float> widen(HalfVec h, BFloat16) { return bit_cast<Vec<float>>(__builtin_convertvector(h, WordVec) << 16); }

inline HalfVec narrow(Vec<float> x, BFloat16) {
  WordVec u = bit_cast<WordVec>(x);
  const WordVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const WordVec quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, HalfVec);
}

inline Vec<float> widen(HalfVec h, Float16) {
#if defined(__F16C__) && SEQKERNELS_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(h)));
#elif defined(__F16C__) && SEQKERNELS_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h)));
#else
  const WordVec w = __builtin_convertvector(h, WordVec);
  const WordVec sign = (w & 0x8000u) << 16;
  // The product with 2^112 moves the exponent bias and makes subnormal numbers normal.
  const WordVec magnitude = bit_cast<WordVec>(bit_cast<Vec<float>>((w & 0x7fffu) << 13) * 0x1p112f);
  const WordVec special = magnitude | 0x7f800000u;
  return bit_cast<Vec<float>>(((w & 0x7c00u) == 0x7c00u ? special : magnitude) | sign);
#endif
}

inline HalfVec narrow(Vec<float> x, Float16) {
#if defined(__F16C__) && SEQKERNELS_VECTOR_BYTES == 64
  return bit_cast<HalfVec>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && SEQKERNELS_VECTOR_BYTES == 32
  return bit_cast<HalfVec>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const WordVec u = bit_cast<WordVec>(x);
  const WordVec sign = (u >> 16) & 0x8000u;
  const WordVec a = u & 0x7fffffffu;
  const WordVec normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 1/2 lets the addition round a subnormal result at its last bit.
  const WordVec subnormal = bit_cast<WordVec>(bit_cast<Vec<float>>(a) + 0.5f) - 0x3f000000u;
  WordVec h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? WordVec{} + 0x7c00u : h;
  h = a > 0x7f800000u ? WordVec{} + 0x7e00u : h;
  return __builtin_convertvector(h | sign, HalfVec);
#endif
}

template <class S>
inline Vec<Compute<S>> load(const S* p) {
  if constexpr (sizeof(S) == 2) {
    HalfVec h;
    std::memcpy(&h, p, sizeof(h));
    return widen(h, S{});
  } else {
    return load_full(p);
  }
}

template <class S>
inline void store(S* p, Vec<Compute<S>> x) {
  if constexpr (sizeof(S) == 2) {
    const HalfVec h = narrow(x, S{});
    std::memcpy(p, &h, sizeof(h));
  } else {
    store_full(p, x);
  }
}

// The first `count` lanes; the others are 0.
template <class S>
inline Vec<Compute<S>> load(const S* p, std::int64_t count) {
  if (count >= kLanes<Compute<S>>) return load(p);
#if defined(__AVX512F__)
  const auto lanes = static_cast<std::uint32_t>((1u << count) - 1);
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p));
  if constexpr (sizeof(S) == 8) return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p));
#endif
  S part[kLanes<Compute<S>>] = {};
  for (std::int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

template <class S>
inline void store(S* p, Vec<Compute<S>> x, std::int64_t count) {
  if (count >= kLanes<Compute<S>>) return store(p, x);
#if defined(__AVX512F__)
  const auto lanes = static_cast<std::uint32_t>((1u << count) - 1);
  if constexpr (sizeof(S) == 4) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), bit_cast<__m512>(x));
  } else if constexpr (sizeof(S) == 8) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), bit_cast<__m512d>(x));
  }
#endif
  S part[kLanes<Compute<S>>];
  store(part, x);
  for (std::int64_t i = 0; i < count; ++i) p[i] = part[i];
}

template <class S>
inline Compute<S> load_one(const S* p) {
  return load(p, 1)[0];
}
template <>
inline float load_one<float>(const float* p) {
  return *p;
}
template <>
inline double load_one<double>(const double* p) {
  return *p;
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f, kMax = 88.3762589f, kMin = -87.3365479f, kTanhMax = 20.0f;
  static constexpr float kMaxReciprocal = 87.3f;  // 1 + e^x has a normal reciprocal
  static constexpr int kMantissa = 23;
};
template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 1.4426950408889634074, kLn2Hi = 6.93145751953125e-1;
  static constexpr double kLn2Lo = 1.42860682030941723212e-6, kRound = 6755399441055744.0;
  static constexpr double kMax = 709.4361393, kMin = -708.3964185, kTanhMax = 44.0;
  static constexpr double kMaxReciprocal = 708.3;
  static constexpr int kMantissa = 52;
};

// e^r - 1 = r + r^2 (1/2 + r/6 + ...) for |r| <= ln(2)/2, relative error below half an ulp.
inline Vec<float> expm1_reduced(Vec<float> r) {
  Vec<float> p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  return p * r * r + r;
}
inline Vec<double> expm1_reduced(Vec<double> r) {
  Vec<double> p = r * (1.0 / 6227020800) + (1.0 / 479001600);
  p = p * r + (1.0 / 39916800);
  p = p * r + (1.0 / 3628800);
  p = p * r + (1.0 / 362880);
  p = p * r + (1.0 / 40320);
  p = p * r + (1.0 / 5040);
  p = p * r + (1.0 / 720);
  p = p * r + (1.0 / 120);
  p = p * r + (1.0 / 24);
  p = p * r + (1.0 / 6);
  p = p * r + 0.5;
  return p * r * r + r;
}

// Writes x = n ln 2 + r; returns e^r - 1 and sets scale = 2^n. x must lie in [kMin, kMax].
template <class T>
inline Vec<T> exp_parts(Vec<T> x, Vec<T>& scale) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::kLog2e + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2Hi) - n * C::kLn2Lo;
  const IntVec<T> one = bit_cast<IntVec<T>>(splat(T(1)));
  scale = bit_cast<Vec<T>>((bit_cast<IntVec<T>>(shifted) << C::kMantissa) + one);
  return expm1_reduced(r);
}

// x, or a bound where x is beyond it; NaN stays NaN.
template <class T>
inline Vec<T> at_least(T low, Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm512_max_ps(_mm512_set1_ps(low), bit_cast<__m512>(x)));
#endif
  return x < low ? splat(low) : x;
}
template <class T>
inline Vec<T> at_most(T high, Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x)));
#endif
  return x > high ? splat(high) : x;
}

// e^x; 0 below the smallest normal result, inf above the largest, NaN for NaN.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> scale;
  const Vec<T> p = exp_parts<T>(at_most<T>(C::kMax, at_least<T>(C::kMin, x)), scale);
  Vec<T> y = scale * p + scale;
  y = x < C::kMin ? Vec<T>{} : y;
  return x > C::kMax ? splat(T(__builtin_inf())) : y;
}

// a * b + c, and c - a * b, rounded once where `estimate_reciprocal` is an estimate. Compilers contract the operators
// to the same, but not at every level of optimisation, and the correction of an estimate is worth nothing without it.
template <class T>
inline Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  }
#endif
  return a * b + c;
}
template <class T>
inline Vec<T> multiply_subtract(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vec<T>>(_mm512_fnmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  }
#endif
  return c - a * b;
}

// 1 / x to 14 bits or better.
template <class T>
inline Vec<T> estimate_reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
#endif
  return T(1) / x;
}

// 1 / (1 + e^-x). The estimate of the quotient is corrected by what it leaves of 1, which is free of the rounding of
// the sum.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> scale;
  const Vec<T> p = exp_parts<T>(at_most<T>(C::kMaxReciprocal, at_least<T>(C::kMin, -x)), scale);
  const Vec<T> e = scale * p + scale;
  const Vec<T> y = estimate_reciprocal<T>(e + T(1));
  return multiply_add<T>(y, multiply_subtract<T>(y, e, T(1) - y), y);
}

// Through m = e^(-2|x|) - 1 as -m / (m + 2), which keeps small arguments exact to rounding; m in two parts, the
// quotient as in sigmoid.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  using C = ExpConstants<T>;
  const IntVec<T> sign_bit = bit_cast<IntVec<T>>(splat(T(-0.0)));
  const Vec<T> negative = bit_cast<Vec<T>>(bit_cast<IntVec<T>>(x) | sign_bit);
  Vec<T> scale;
  const Vec<T> p = exp_parts<T>(T(2) * at_least<T>(-C::kTanhMax, negative), scale);
  const Vec<T> m = scale * p + (scale - T(1));
  const Vec<T> rest = scale * p + ((scale - T(1)) - m);
  const Vec<T> inverse = estimate_reciprocal<T>(m + T(2));
  const Vec<T> y = m * inverse;
  const Vec<T> left = multiply_subtract<T>(y, m, m - T(2) * y) + (rest - y * rest);
  const IntVec<T> magnitude = bit_cast<IntVec<T>>(multiply_add<T>(left, inverse, y)) & ~sign_bit;
  return bit_cast<Vec<T>>(magnitude | (bit_cast<IntVec<T>>(x) & sign_bit));
}

template <class T>
inline Vec<T> relu(Vec<T> x) {
  return x < T(0) ? Vec<T>{} : x;
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T, int kStep, bool kSecond, int... kIndex>
inline Vec<T> mix_indexed(Vec<T> x, Vec<T> y, std::integer_sequence<int, kIndex...>) {
  constexpr int n = kLanes<T>, kLane = 16 / static_cast<int>(sizeof(T));
  constexpr auto from = [](int i) {
    if (kStep >= kLane) return i / kLane * 2 * kLane + i % kLane + (kSecond ? kLane : 0);
    const int unit = i % kLane / kStep;
    return i / kLane * kLane + unit / 2 * kStep + i % kStep + unit % 2 * n + (kSecond ? kLane / 2 : 0);
  };
  return __builtin_shufflevector(x, y, from(kIndex)...);
}

// Half the numbers of x and y. Below 16 bytes: the first or second half of each 16 bytes, x and y by turns in units of
// kStep numbers, which is what processors do fastest; else every other 16 bytes of x, then of y.
template <class T, int kStep, bool kSecond>
inline Vec<T> mix(Vec<T> x, Vec<T> y) {
  return mix_indexed<T, kStep, kSecond>(x, y, std::make_integer_sequence<int, kLanes<T>>());
}

// Transposes kLanes x kLanes elements: row i of the result is column i of the rows.
template <class T, int kStep = 1>
inline void transpose(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
  Vec<T> other[n];
#pragma GCC unroll 8
  for (int i = 0; i < n / 2; ++i) {
    other[i] = mix<T, kStep, false>(rows[2 * i], rows[2 * i + 1]);
    other[i + n / 2] = mix<T, kStep, true>(rows[2 * i], rows[2 * i + 1]);
  }
  if constexpr (2 * kStep < n) {
    transpose<T, 2 * kStep>(other);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    // Columns 1 and 2 of each 16 bytes come out in the other order.
    const bool swapped = kStep == 1 && sizeof(T) == 4 && (i % 4 == 1 || i % 4 == 2);
    rows[i] = other[swapped ? i ^ 3 : i];
  }
}

// The sums of kLanes vectors, as one vector.
template <class T, int kStep = 1>
__attribute__((always_inline)) inline Vec<T> reduce_each(Vec<T>* x) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 8
  for (int i = 0; i < n / (2 * kStep); ++i) {
    x[i] = mix<T, kStep, false>(x[2 * i], x[2 * i + 1]) + mix<T, kStep, true>(x[2 * i], x[2 * i + 1]);
  }
  if constexpr (2 * kStep < n) {
    return reduce_each<T, 2 * kStep>(x);
  } else {
    return x[0];
  }
}

}  // namespace
}  // namespace seqkernels
