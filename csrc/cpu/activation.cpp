// The elementwise functions by themselves, for the tests of their error.
#include "core/kernels.h"
#include "core/simd.h"

namespace seqkernels {
namespace {

template <class T>
void activation(const char* name, std::int64_t count, const T* x, T* y) {
  for (std::int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load(x + i, count - i);
    const Vec<T> result = name[0] == 'e' ? exp<T>(v) : name[0] == 's' ? sigmoid<T>(v) : tanh<T>(v);
    store(y + i, result, count - i);
  }
}

}  // namespace

// exp, sigmoid or tanh of `count` numbers.
void SEQKERNELS_ENTRY(activation)(const char* name, std::int64_t count, const void* x, void* y, DType dtype) {
  if (dtype == DType::kFloat64) {
    activation(name, count, static_cast<const double*>(x), static_cast<double*>(y));
  } else {
    activation(name, count, static_cast<const float*>(x), static_cast<float*>(y));
  }
}

}  // namespace seqkernels
