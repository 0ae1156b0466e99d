#include "core/kernels.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

struct Shape {
  std::int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  DType dtype;
};

Shape check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, const Tensor& bias) {
  Shape s{};
  s.dtype = q.expect({kAny, kAny, kAny, kAny}).expect_last_contiguous().dtype();
  s.batch = q.size(0);
  s.heads = q.size(1);
  s.queries = q.size(2);
  s.head_size = q.size(3);
  k.expect({s.batch, kAny, kAny, s.head_size}).expect(s.dtype).expect_last_contiguous();
  s.kv_heads = k.size(1);
  s.keys = k.size(2);
  if (s.kv_heads == 0 || s.heads % s.kv_heads != 0) {
    fail_argument("k", "a number of heads that divides the " + std::to_string(s.heads) + " of q",
                  std::to_string(s.kv_heads));
  }
  v.expect({s.batch, s.kv_heads, s.keys, kAny}).expect(s.dtype).expect_last_contiguous();
  s.value_size = v.size(3);
  mask.expect({s.batch, s.heads, s.queries, s.keys}).expect_code(dlpack::kBool, 8, "bool");
  bias.expect({s.batch, s.heads, s.queries, s.keys}).expect(s.dtype);
  return s;
}

template <class Params>
void fill(Params& p, const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
          const Tensor& bias, double scale, bool is_causal, int threads) {
  p.batch = s.batch;
  p.heads = s.heads;
  p.kv_heads = s.kv_heads;
  p.queries = s.queries;
  p.keys = s.keys;
  p.head_size = s.head_size;
  p.value_size = s.value_size;
  p.dtype = s.dtype;
  p.scale = scale;
  p.is_causal = is_causal;
  p.threads = check_threads(threads);
  p.q = q.strided();
  p.k = k.strided();
  p.v = v.strided();
  p.mask = mask.strided();
  p.bias = bias.strided();
}

void attention_forward(py::handle q_, py::handle k_, py::handle v_, py::handle mask_, py::handle bias_, double scale,
                       bool is_causal, py::handle out_, py::handle lse_, int threads) {
  const Tensor q(q_, "q"), k(k_, "k"), v(v_, "v"), mask(mask_, "mask", true), bias(bias_, "bias", true);
  const Tensor out(out_, "out"), lse(lse_, "lse");
  const Shape s = check_inputs(q, k, v, mask, bias);
  out.expect({s.batch, s.heads, s.queries, s.value_size}).expect(s.dtype).expect_last_contiguous();
  lse.expect({s.batch, s.heads, s.queries}).expect(compute_dtype(s.dtype)).expect_contiguous();
  AttentionForward p{};
  fill(p, s, q, k, v, mask, bias, scale, is_causal, threads);
  p.out = out.strided_out();
  p.lse = lse.data();
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.attention_forward(p);
}

void attention_backward(py::handle grad_out_, py::handle q_, py::handle k_, py::handle v_, py::handle mask_,
                        py::handle bias_, py::handle lse_, py::handle delta_, double scale, bool is_causal,
                        py::handle grad_q_, py::handle grad_k_, py::handle grad_v_, py::handle grad_bias_,
                        int threads) {
  const Tensor grad_out(grad_out_, "grad_out"), q(q_, "q"), k(k_, "k"), v(v_, "v"), lse(lse_, "lse");
  const Tensor mask(mask_, "mask", true), bias(bias_, "bias", true), delta(delta_, "delta");
  const Tensor grad_q(grad_q_, "grad_q"), grad_k(grad_k_, "grad_k"), grad_v(grad_v_, "grad_v");
  const Tensor grad_bias(grad_bias_, "grad_bias", true);
  const Shape s = check_inputs(q, k, v, mask, bias);
  const DType compute = compute_dtype(s.dtype);
  grad_out.expect({s.batch, s.heads, s.queries, s.value_size}).expect(s.dtype).expect_last_contiguous();
  lse.expect({s.batch, s.heads, s.queries}).expect(compute).expect_contiguous();
  delta.expect({s.batch, s.heads, s.queries}).expect(compute).expect_contiguous();
  grad_q.expect({s.batch, s.heads, s.queries, s.head_size}).expect(s.dtype).expect_last_contiguous();
  grad_k.expect({s.batch, s.kv_heads, s.keys, s.head_size}).expect(s.dtype).expect_last_contiguous();
  grad_v.expect({s.batch, s.kv_heads, s.keys, s.value_size}).expect(s.dtype).expect_last_contiguous();
  grad_bias.expect({kAny, kAny, kAny, kAny}).expect(compute).expect_contiguous();
  AttentionBackward p{};
  fill(p, s, q, k, v, mask, bias, scale, is_causal, threads);
  p.grad_out = grad_out.strided();
  p.lse = lse.data();
  p.delta = delta.data();
  p.grad_q = grad_q.strided_out();
  p.grad_k = grad_k.strided_out();
  p.grad_v = grad_v.strided_out();
  if (grad_bias) {
    const std::int64_t full[4] = {s.batch, s.heads, s.queries, s.keys};
    p.grad_bias = grad_bias.data();
    p.grad_bias_size = 1;
    for (int i = 3; i >= 0; --i) {
      if (grad_bias.size(i) != full[i] && grad_bias.size(i) != 1) {
        fail_argument("grad_bias", "a shape that broadcasts to that of the scores", std::to_string(grad_bias.size(i)));
      }
      p.grad_bias_stride[i] = grad_bias.size(i) == 1 ? 0 : p.grad_bias_size;
      p.grad_bias_size *= grad_bias.size(i);
    }
  }
  const Kernels& table = kernels();
  py::gil_scoped_release release;
  table.attention_backward(p);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"),
        py::arg("bias"), py::arg("scale"), py::arg("is_causal"), py::arg("out"), py::arg("lse"), py::arg("threads"),
        "Attention into out and lse. mask and bias are expanded to (B, Hq, M, N).");
  m.def("attention_backward", &attention_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("mask"), py::arg("bias"), py::arg("lse"), py::arg("delta"), py::arg("scale"), py::arg("is_causal"),
        py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_bias"), py::arg("threads"),
        "Back-propagate through attention into grad_q, grad_k, grad_v and, unless None, grad_bias (zero on entry).");
}

}  // namespace seqkernels
