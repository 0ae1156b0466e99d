// Philox4x32-10, the counter-based generator of zoneout and dropout (Salmon, Moraes, Dror & Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011): the n-th number is a function of the key and of n alone, so that the backward
// pass, any thread and any implementation draw the same.
#pragma once

#include "core/simd.h"

namespace seqkernels {
namespace {

// Words of 32 bits in lanes of 64; the upper halves hold rubbish until the end.
typedef std::uint64_t WideVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES)));
typedef float NarrowVec __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES / 2)));

// Products of the lower halves.
inline WideVec wide_product(WideVec x, std::uint32_t factor) {
#if defined(__AVX512F__) && SEQKERNELS_VECTOR_BYTES == 64
  return bit_cast<WideVec>(_mm512_mul_epu32(bit_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__) && SEQKERNELS_VECTOR_BYTES == 32
  return bit_cast<WideVec>(_mm256_mul_epu32(bit_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#else
  return (x & 0xffffffffu) * std::uint64_t{factor};
#endif
}

// The four words at the counters (n, 0), in the lower halves.
inline void philox(WideVec n, std::uint64_t key, WideVec* words) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  WideVec c0 = n, c1 = n >> 32, c2{}, c3{};
  for (int round = 0; round < 10; ++round) {
    const WideVec p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ std::uint64_t{k0};
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ std::uint64_t{k1};
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}
inline WideVec philox(WideVec n, std::uint64_t key) {
  WideVec words[4];
  philox(n, key, words);
  return words[0] & 0xffffffffu;
}

inline WideVec wide_lanes() {
  WideVec lane;
  for (int i = 0; i < kLanes<double>; ++i) lane[i] = i;
  return lane;
}

// The words at counters n to n + 15: word w of counter n + i is words[16 w + i].
inline void philox_block(std::uint64_t n, std::uint64_t key, std::uint32_t* words) {
  typedef std::uint32_t Narrow __attribute__((vector_size(SEQKERNELS_VECTOR_BYTES / 2)));
  const WideVec lane = wide_lanes();
  for (int i = 0; i < 16; i += kLanes<double>) {
    WideVec each[4];
    philox(lane + (n + static_cast<std::uint64_t>(i)), key, each);
    for (int w = 0; w < 4; ++w) {
      const Narrow part = __builtin_convertvector(each[w], Narrow);
      std::memcpy(words + 16 * w + i, &part, sizeof(part));
    }
  }
}

// Numbers n, n + 1, ... of the sequence of `key`, in [0, 1), multiples of 2^-24.
template <class T>
inline Vec<T> uniform(std::int64_t n, std::uint64_t key) {
  constexpr int kLanesOfPart = kLanes<double>;
  const WideVec lane = wide_lanes();
  Vec<T> result{};
  for (int part = 0; part < kLanes<T> / kLanesOfPart; ++part) {
    const WideVec word = philox(lane + static_cast<std::uint64_t>(n + part * kLanesOfPart), key) >> 8;
    // 2^52 + word, whose mantissa is the word.
    const Vec<double> x = (bit_cast<Vec<double>>(word | 0x4330000000000000u) - 0x1p52) * 0x1p-24;
    if constexpr (sizeof(T) == sizeof(double)) {
      result = x;
    } else {
      const NarrowVec narrow = __builtin_convertvector(x, NarrowVec);
      std::memcpy(reinterpret_cast<char*>(&result) + part * sizeof(narrow), &narrow, sizeof(narrow));
    }
  }
  return result;
}

}  // namespace
}  // namespace seqkernels
