#include <algorithm>
#include <cmath>
#include <limits>

#include "core/kernels.h"
#include "python/positional.h"
#include "python/tensor.h"

namespace seqkernels {
namespace {

// The fields of seqkernels.scores.Scores, in its order.
enum Field {
  kScale,
  kMask,
  kBias,
  kLeft,
  kRight,
  kBottomRight,
  kKeyLengths,
  kCuSeqlensQ,
  kCuSeqlensK,
  kMaxSeqlenQ,
  kMaxSeqlenK,
  kAlibiSlopes,
  kSoftcap,
  kSink,
  kDropout,
  kSeed,
  kBlockTable,
  kPrecision,  // which products on processors have no choice of
  kFields
};

double number(const py::tuple& scores, Field field) { return py::cast<double>(scores[field]); }
std::int64_t integer(const py::tuple& scores, Field field) { return py::cast<std::int64_t>(scores[field]); }

// The tensors of a call beside q, k and v; they keep what the parameters point to.
struct Extras {
  Tensor mask, bias, key_lengths, cu_seqlens_q, cu_seqlens_k, slopes, sink, seed, block_table;

  explicit Extras(const py::tuple& s)
      : mask(s[kMask], "mask", true),
        bias(s[kBias], "bias", true),
        key_lengths(s[kKeyLengths], "key_lengths", true),
        cu_seqlens_q(s[kCuSeqlensQ], "cu_seqlens_q", true),
        cu_seqlens_k(s[kCuSeqlensK], "cu_seqlens_k", true),
        slopes(s[kAlibiSlopes], "alibi_slopes", true),
        sink(s[kSink], "sink", true),
        seed(s[kSeed], "seed", true),
        block_table(s[kBlockTable], "block_table", true) {}
};

py::tuple check_fields(py::handle scores) {
  if (!py::isinstance<py::tuple>(scores) || py::len(scores) != kFields) {
    throw py::type_error("scores: expected a seqkernels.scores.Scores, got " +
                         py::cast<std::string>(py::str(py::type::of(scores))));
  }
  return py::reinterpret_borrow<py::tuple>(scores);
}

// Of dimensions that are each 1 or as in the scores, with strides of 0 where they are 1.
Strided broadcast(const Tensor& x, const AttentionScores& p, const char* name) {
  Strided result = x.strided();
  const std::int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  if (!x) return result;
  x.expect({kAny, kAny, kAny, kAny});
  for (int i = 0; i < 4; ++i) {
    if (x.size(i) != 1 && x.size(i) != full[i]) {
      fail_argument(name, "dimension " + std::to_string(i) + " of size 1 or " + std::to_string(full[i]),
                    std::to_string(x.size(i)));
    }
    if (x.size(i) == 1) result.stride[i] = 0;
  }
  return result;
}

const std::int32_t* integers(const Tensor& x, std::int64_t size) {
  x.expect({size}).expect_code(dlpack::kInt, 32, "int32").expect_contiguous();
  return static_cast<const std::int32_t*>(x.data());
}

// Where documents begin: inside of the tensor, in order.
const std::int32_t* document_starts(const Tensor& x, std::int64_t size, std::int64_t total, const char* name) {
  const std::int32_t* starts = integers(x, size);
  for (std::int64_t i = 0; i < size; ++i) {
    if (starts[i] < (i == 0 ? 0 : starts[i - 1]) || starts[i] > total) {
      fail_argument(name, "values from 0 to " + std::to_string(total) + " that do not decrease",
                    std::to_string(starts[i]) + " at " + std::to_string(i));
    }
  }
  return starts;
}

// Pages of each entry, of as many keys as it has: they are read without another look.
void check_pages(const AttentionScores& p, std::int64_t blocks, std::int64_t pages) {
  for (std::int64_t b = 0; b < p.batch; ++b) {
    std::int64_t keys = p.keys;
    if (p.cu_seqlens_k != nullptr) keys = std::min<std::int64_t>(keys, p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
    if (p.key_lengths != nullptr) keys = std::min<std::int64_t>(keys, p.key_lengths[b]);
    if (keys > blocks * p.page_size) {
      fail_argument("block_table", "pages for " + std::to_string(keys) + " keys",
                    std::to_string(blocks) + " of " + std::to_string(p.page_size));
    }
    for (std::int64_t i = 0; i * p.page_size < keys; ++i) {
      const std::int32_t page = p.block_table[b * p.block_stride + i];
      if (page < 0 || page >= pages) {
        fail_argument("block_table", "pages from 0 to " + std::to_string(pages - 1) + " up to each length",
                      std::to_string(page));
      }
    }
  }
}

void refuse_pages(const Extras& x) {
  if (x.block_table) fail_argument("block_table", "None, as pages have the forward pass alone", "a tensor");
}

void fill(AttentionScores& p, const Tensor& q, const Tensor& k, const Tensor* v, const Extras& x, const py::tuple& s,
          int threads) {
  p.dtype = q.expect({kAny, kAny, kAny, kAny}).expect_last_contiguous().dtype();
  const std::int64_t entries = q.size(0), total = q.size(2);
  p.batch = entries;
  p.heads = q.size(1);
  p.queries = total;
  p.head_size = q.size(3);
  const bool paged = static_cast<bool>(x.block_table);
  k.expect({paged ? kAny : entries, kAny, kAny, p.head_size}).expect(p.dtype).expect_last_contiguous();
  p.kv_heads = k.size(1);
  p.keys = k.size(2);
  if (p.kv_heads == 0 || p.heads % p.kv_heads != 0) {
    fail_argument("k", "a number of heads that divides the " + std::to_string(p.heads) + " of q",
                  std::to_string(p.kv_heads));
  }
  p.q = q.strided();
  p.k = k.strided();
  p.value_size = 1;
  if (v != nullptr) {
    v->expect({k.size(0), p.kv_heads, p.keys, kAny}).expect(p.dtype).expect_last_contiguous();
    p.value_size = v->size(3);
    p.v = v->strided();
  }
  if (paged) {
    p.page_size = p.keys;
    p.keys = x.block_table.expect({kAny, kAny}).size(1) * p.page_size;
  }
  p.lse_stride[0] = p.heads * total;
  p.lse_stride[1] = total;
  if (static_cast<bool>(x.cu_seqlens_q) != static_cast<bool>(x.cu_seqlens_k)) {
    fail_argument("cu_seqlens_k", "both cu_seqlens or neither", "one");
  }
  if (x.cu_seqlens_q) {
    if (entries != 1) fail_argument("q", "one batch entry with cu_seqlens_q", std::to_string(entries));
    const std::int64_t starts = x.cu_seqlens_q.expect({kAny}).size(0);
    if (starts < 1) fail_argument("cu_seqlens_q", "at least one value", "none");
    p.cu_seqlens_q = document_starts(x.cu_seqlens_q, starts, total, "cu_seqlens_q");
    const std::int64_t rows = paged ? std::numeric_limits<std::int32_t>::max() : p.keys;
    p.cu_seqlens_k = document_starts(x.cu_seqlens_k, starts, rows, "cu_seqlens_k");
    p.batch = starts - 1;
    p.queries = integer(s, kMaxSeqlenQ);
    p.keys = integer(s, kMaxSeqlenK);
    p.q.stride[0] = p.lse_stride[0] = 0;
    if (!paged) p.k.stride[0] = p.v.stride[0] = 0;
  }
  p.threads = check_threads(threads);
  p.scale = number(s, kScale);
  p.softcap = number(s, kSoftcap);
  p.left = integer(s, kLeft);
  p.right = integer(s, kRight);
  p.bottom_right = py::cast<bool>(s[kBottomRight]);
  x.mask.expect_code(dlpack::kBool, 8, "bool");
  p.mask = broadcast(x.mask, p, "mask");
  p.bias = broadcast(x.bias, p, "bias");
  p.bias_dtype = p.dtype;
  if (x.bias && x.bias.dtype() != p.dtype) p.bias_dtype = x.bias.expect(compute_dtype(p.dtype)).dtype();
  if (x.key_lengths) p.key_lengths = integers(x.key_lengths, p.batch);
  if (paged) {
    x.block_table.expect({p.batch, kAny}).expect_code(dlpack::kInt, 32, "int32").expect_last_contiguous();
    p.block_table = static_cast<const std::int32_t*>(x.block_table.data());
    p.block_stride = x.block_table.stride(0);
    check_pages(p, x.block_table.size(1), k.size(0));
  }
  if (x.slopes) {
    x.slopes.expect(DType::kFloat32);
    const int last = x.slopes.rank() - 1;
    if (last == 1) {
      x.slopes.expect({p.batch, p.heads});
    } else {
      x.slopes.expect({p.heads});
    }
    p.slopes = static_cast<const float*>(x.slopes.data());
    p.slope_stride[0] = last == 1 ? x.slopes.stride(0) : 0;
    p.slope_stride[1] = x.slopes.stride(last);
  }
  if (x.sink) p.sink = x.sink.expect({p.heads}).expect(compute_dtype(p.dtype)).expect_contiguous().data();
  p.dropout = number(s, kDropout);
  if (p.dropout > 0.0) {
    const double threshold = std::ceil(p.dropout * 4294967296.0);
    p.threshold = threshold < 4294967296.0 ? static_cast<std::uint64_t>(threshold) : std::uint64_t{1} << 32;
    if (!x.seed) fail_argument("seed", "a tensor, with dropout", "None");
    x.seed.expect({}).expect_code(dlpack::kInt, 64, "int64");
    p.seed = static_cast<std::uint64_t>(*static_cast<const std::int64_t*>(x.seed.data()));
  }
}

// What belongs to the queries as they lie in memory.
void check_rows(const Tensor& x, const Tensor& q, std::int64_t size) {
  x.expect({q.size(0), q.size(1), q.size(2), size}).expect(q.dtype()).expect_last_contiguous();
}
void check_lse(const Tensor& x, const Tensor& q) {
  x.expect({q.size(0), q.size(1), q.size(2)}).expect(compute_dtype(q.dtype())).expect_contiguous();
}
Strided of_rows(const Tensor& x, const AttentionScores& p) {
  Strided result = x.strided();
  if (p.cu_seqlens_q != nullptr) result.stride[0] = 0;
  return result;
}
StridedOut written(const Tensor& x, const AttentionScores& p) {
  StridedOut result = x.strided_out();
  if (p.cu_seqlens_q != nullptr) result.stride[0] = 0;
  return result;
}

bool brief(const AttentionScores& p) {
  constexpr std::int64_t kShort = 32768;  // scores times head sizes
  const std::int64_t rows = p.batch * p.heads * p.queries;
  return rows < kShort && rows * p.keys * (p.head_size + p.value_size) < kShort;
}

// q, k, v, scores, out, lse, threads
void attention_forward(PyObject* const* args) {
  const Tensor q(args[0], "q"), k(args[1], "k"), v(args[2], "v"), out(args[4], "out"), lse(args[5], "lse", true);
  const py::tuple scores = check_fields(args[3]);
  const Extras extras(scores);
  AttentionForward p{};
  fill(p, q, k, &v, extras, scores, thread_count(args[6]));
  check_rows(out, q, p.value_size);
  check_lse(lse, q);
  p.out = written(out, p);
  p.lse = lse.data();
  call(kernels().attention_forward, p, brief(p));
}

// grad_out, grad_lse, q, k, v, out, lse, scores, grad_q, grad_k, grad_v, grad_bias, threads
void attention_backward(PyObject* const* args) {
  const Tensor grad_out(args[0], "grad_out"), grad_lse(args[1], "grad_lse", true), q(args[2], "q"), k(args[3], "k");
  const Tensor v(args[4], "v"), out(args[5], "out"), lse(args[6], "lse"), grad_bias(args[11], "grad_bias", true);
  const Tensor grad_q(args[8], "grad_q", true), grad_k(args[9], "grad_k", true), grad_v(args[10], "grad_v", true);
  const py::tuple scores = check_fields(args[7]);
  const Extras extras(scores);
  refuse_pages(extras);
  AttentionBackward p{};
  fill(p, q, k, &v, extras, scores, thread_count(args[12]));
  check_rows(grad_out, q, p.value_size);
  check_rows(out, q, p.value_size);
  check_lse(lse, q);
  check_lse(grad_lse, q);
  check_rows(grad_q, q, p.head_size);
  grad_k.expect({k.size(0), k.size(1), k.size(2), p.head_size}).expect(p.dtype).expect_last_contiguous();
  grad_v.expect({k.size(0), k.size(1), k.size(2), p.value_size}).expect(p.dtype).expect_last_contiguous();
  grad_bias.expect({kAny, kAny, kAny, kAny}).expect(compute_dtype(p.dtype)).expect_contiguous();
  p.grad_out = of_rows(grad_out, p);
  p.out = of_rows(out, p);
  p.lse = lse.data();
  p.grad_lse = grad_lse.data();
  p.grad_q = written(grad_q, p);
  p.grad_k = written(grad_k, p);
  p.grad_v = written(grad_v, p);
  if (grad_bias) {
    const Strided shape = broadcast(grad_bias, p, "grad_bias");
    p.grad_bias = grad_bias.data();
    p.grad_bias_size = 1;
    for (int i = 3; i >= 0; --i) {
      p.grad_bias_stride[i] = shape.stride[i] == 0 ? 0 : p.grad_bias_size;
      p.grad_bias_size *= grad_bias.size(i);
    }
  }
  call(kernels().attention_backward, p, brief(p));
}

void attention_weights(Argument q_, Argument k_, Argument lse_, py::handle scores_, Argument weights_, int threads) {
  const Tensor q(q_, "q"), k(k_, "k"), lse(lse_, "lse"), weights(weights_, "weights");
  const py::tuple scores = check_fields(scores_);
  const Extras extras(scores);
  refuse_pages(extras);
  AttentionWeights p{};
  fill(p, q, k, nullptr, extras, scores, threads);
  check_lse(lse, q);
  p.lse = lse.data();
  p.average = weights.rank() == 3;
  if (p.average) {
    weights.expect({p.batch, p.queries, p.keys});
  } else {
    weights.expect({p.batch, p.heads, p.queries, p.keys});
  }
  p.weights = weights.expect(compute_dtype(p.dtype)).expect_contiguous().data();
  call(kernels().attention_weights, p, brief(p));
}

}  // namespace

void bind_attention(py::module_& m) {
  define<&attention_forward, 7>(
      m, "attention_forward",
      "attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: tuple, out: torch.Tensor, "
      "lse: torch.Tensor | None, threads: int, /) -> None\n\n"
      "Attention into out and, unless None, lse. scores: a seqkernels.scores.Scores. Rows of no document are left as "
      "they are.");
  define<&attention_backward, 13>(
      m, "attention_backward",
      "attention_backward(grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, "
      "v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scores: tuple, grad_q: torch.Tensor | None, "
      "grad_k: torch.Tensor | None, grad_v: torch.Tensor | None, grad_bias: torch.Tensor | None, "
      "threads: int, /) -> None\n\n"
      "Back-propagate through attention into those of grad_q, grad_k, grad_v and grad_bias (zero on entry) that are "
      "not None.");
  m.def("attention_weights", &attention_weights, py::arg("q"), py::arg("k"), py::arg("lse"), py::arg("scores"),
        py::arg("weights"), py::arg("threads"),
        "The weights after dropout (B, Hq, M, N), or their mean over the heads (B, M, N).");
}

}  // namespace seqkernels
