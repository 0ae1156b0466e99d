"""The functions of the flash-attn package (2.7 and 2.8), so that code written for it runs here, on a CPU too.

Names, order of arguments, defaults, layouts and semantics are those of ``flash_attn.flash_attn_interface`` (Dao,
"FlashAttention-2", 2023; https://github.com/Dao-AILab/flash-attention); `flash_attn_with_kvcache` is in
`seqkernels._flash.kvcache`. In shapes, ``nheads`` is a multiple of ``nheads_k``: query head h reads key head
``h // (nheads // nheads_k)``. Different here:

* float32 and float64 are allowed beside float16 and bfloat16, head sizes from 1 to 512, values of another head size
  than keys, inputs with any strides, and softcap together with dropout.
* Rows that may read no key have output 0, as there, and ``softmax_lse`` -inf, where flash-attn writes +inf.
* ``softmax_lse`` is what flash-attn documents, and differentiable. There, ALiBi together with ``causal`` shifts it.
* Results never depend on the number of threads or on chance, so ``deterministic`` changes nothing. Dropout drops
  other weights than flash-attn does under the same seed.
* Wrong arguments raise an error that names them; values of tensors on the CPU are checked too, unless compiled.
"""

from __future__ import annotations

from .functions import flash_attn_func as flash_attn_func
from .functions import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .functions import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .functions import flash_attn_varlen_func as flash_attn_varlen_func
from .functions import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .functions import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from .kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
