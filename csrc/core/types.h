// Element types and the arithmetic every kernel needs; nothing here depends on an instruction set.
#pragma once

#include <cstdint>

namespace seqkernels {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline std::int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Storage of 16-bit numbers; the arithmetic is float32.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// A number known when compiling, as an argument.
template <int kCount>
struct Count {
  static constexpr int kValue = kCount;
};

}  // namespace seqkernels
