// The place of simd.h where a thread has one element: the same names, of scalars.
#pragma once

#include <cmath>

#include "core/portable.h"

namespace seqkernels {
namespace {

template <class T>
using Vec = T;

template <class To, class From>
SEQKERNELS_FN To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SEQKERNELS_FN float widen(float x) { return x; }
SEQKERNELS_FN float widen(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
SEQKERNELS_FN float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude << 13));
  return bits_as<float>(bits_as<std::uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f) | sign);
#endif
}

// 1 over the square root.
SEQKERNELS_FN float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

// Rounded to the nearest, ties to even.
template <class S>
SEQKERNELS_FN S narrow(float x);
template <>
SEQKERNELS_FN float narrow<float>(float x) {
  return x;
}
template <>
SEQKERNELS_FN BFloat16 narrow<BFloat16>(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
SEQKERNELS_FN Float16 narrow<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const std::uint32_t bits = bits_as<std::uint32_t>(x), sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  std::uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (a < 0x38800000u) {
    h = bits_as<std::uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000u;
  } else {
    h = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(h | sign)};
#endif
}

SEQKERNELS_FN float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);  // two roundings, no branches; b is at least 1 here, and an infinite one gives 0 below 2^126
#else
  return a / b;
#endif
}

template <class T>
SEQKERNELS_FN T sigmoid(T x) {
  return quotient(T(1), T(1) + expf(-x));
}

template <class T>
SEQKERNELS_FN T tanh(T x) {
  const T a = fabsf(x), square = x * x;
  // Below 0.55 the quotient would lose what 1 takes away: there x (1 + x^2 p(x^2)), whose error is 1e-9.
  T p = T(-0.00628247291);
  p = p * square + T(0.0210777581);
  p = p * square + T(-0.0538538579);
  p = p * square + T(0.133326017);
  p = p * square + T(-0.33333318);
  const T near_zero = x + x * square * p;
  const T far = copysignf(T(1) - quotient(T(2), expf(a + a) + T(1)), x);
  return a < T(0.55) ? near_zero : far;
}

template <class T>
SEQKERNELS_FN T relu(T x) {
  return x < T(0) ? T(0) : x;
}

// Philox4x32-10 as in random.h: number n of the sequence of `key`, in [0, 1).
SEQKERNELS_FN float uniform(std::uint64_t n, std::uint64_t key) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(n), c1 = static_cast<std::uint32_t>(n >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;
}

}  // namespace
}  // namespace seqkernels
