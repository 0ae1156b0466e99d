#include <string>

#include "core/kernels.h"
#include "python/positional.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

bool truth(py::handle object) {
  const int found = PyObject_IsTrue(object.ptr());
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int i = 0; i < x.rank(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

// The leading dimensions of `tensor` as the last of three: their strides, 0 where one is broadcast.
void align(const Tensor& tensor, std::int64_t* strides) {
  const int leading = tensor.rank() - 1;
  for (int i = 0; i < leading; ++i) strides[3 - leading + i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
}

void check_angles(const Tensor& angles, const char* name, const Tensor& x, DType dtype, std::int64_t pairs) {
  angles.expect(compute_dtype(dtype)).expect_last_contiguous();
  const int behind = x.rank() - angles.rank();
  bool fits =
      angles.rank() > 0 && behind >= 0 && angles.size(angles.rank() - 1) == pairs && 2 * pairs <= x.size(x.rank() - 1);
  for (int i = 0; fits && i + 1 < angles.rank(); ++i)
    fits = angles.size(i) == 1 || angles.size(i) == x.size(behind + i);
  if (!fits) {
    fail_argument(name,
                  "shape (..., P) with P at most half of the last dimension of x " + shape_text(x) +
                      ", the same of cos and sin, and each other dimension 1 or as in x",
                  shape_text(angles));
  }
}

// x, cos, sin, interleaved, inverse, out, threads
void rotary(PyObject* const* args) {
  const Tensor x(args[0], "x"), cos(args[1], "cos"), sin(args[2], "sin"), out(args[5], "out");
  Rotary p{};
  p.dtype = x.expect_last_contiguous().dtype();
  if (x.rank() == 0) fail_argument("x", "at least 1 dimension", "0");
  p.size = x.size(x.rank() - 1);
  p.pairs = cos.rank() == 0 ? 0 : cos.size(cos.rank() - 1);
  check_angles(cos, "cos", x, p.dtype, p.pairs);
  check_angles(sin, "sin", x, p.dtype, p.pairs);
  bool same = out.rank() == x.rank();
  for (int i = 0; same && i < x.rank(); ++i) same = out.size(i) == x.size(i);
  if (!same) fail_argument("out", "shape " + shape_text(x) + " as x", shape_text(out));
  out.expect(p.dtype).expect_last_contiguous();
  const int leading = x.rank() - 1;
  for (int i = 0; i < 3; ++i) p.sizes[i] = i < 3 - leading ? 1 : x.size(i - (3 - leading));
  p.interleaved = truth(args[3]);
  p.inverse = truth(args[4]);
  p.threads = check_threads(thread_count(args[6]));
  p.x.data = x.data();
  p.out.data = out.data();
  align(x, p.x.stride);
  align(out, p.out.stride);
  if (p.pairs != 0) {
    p.cos.data = cos.data();
    p.sin.data = sin.data();
    align(cos, p.cos.stride);
    align(sin, p.sin.stride);
  }
  constexpr std::int64_t kShort = 65536;  // elements
  call(kernels().rotary, p, p.sizes[0] * p.sizes[1] * p.sizes[2] * p.size < kShort);
}

}  // namespace

void bind_rotary(py::module_& m) {
  define<&rotary, 7>(m, "rotary",
                     "rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool, "
                     "out: torch.Tensor, threads: int, /) -> None\n\n"
                     "Turn pairs of elements of x (..., D) by the angles of cos and sin (..., P) into out, or back.");
}

}  // namespace seqkernels
