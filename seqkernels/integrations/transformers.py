"""``attn_implementation="seqkernels"`` for models of Hugging Face transformers.

`register` adds an attention function and a mask function of that name. The attention function reads grouped heads
without repeating them and runs windows, softcap, sinks and position biases inside the kernel. The mask function returns
what ``sdpa`` has, except for several queries at once: there it returns a `Mask`, which holds the rule of the mask and
becomes an (M, N) matrix only if somebody looks at it.

B batch, Hq query heads, Hk key/value heads, M queries, N keys, D head size, Dv value size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError(f"models of transformers need it: {error}; pip install 'seqkernels[transformers]'") from error

from .. import backends
from ..cells import accumulate_dtype
from ..ops.attention import attend
from ..ops.attention_check import check
from ..scores import UNBOUNDED, Scores

NAME = "seqkernels"

#: Arguments that models hand through to every attention function and that say nothing about its result.
_OF_NO_CONCERN = frozenset(
    {
        "cache_position",
        "deterministic",
        "hidden_states",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)


def register() -> None:
    """Let models be made with ``attn_implementation="seqkernels"``, or switched by ``set_attn_implementation``.

    Call it before; calling it again changes nothing. Both of transformers' interfaces get the name, `attention` and
    `make_mask`: without a mask function transformers would silently hand over no mask at all.

    Example:
        >>> seqkernels.integrations.transformers.register()
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="seqkernels")
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


class Rule(NamedTuple):
    """A mask without its (M, N) matrix.

    Query i may read key j if ``i + offset - left <= j <= i + offset + right``, if `padding` is true there, and if both
    are in the same document.

    Attributes:
        left: keys before its own that a query reads; -1 for all.
        right: keys behind its own that a query reads; -1 for all.
        offset: which key is that of the first query.
        padding: (B, N) bool, ``False`` on padding.
        lengths: (B,) int32, if `padding` is at the end only.
        documents: (B, M) integers, the same for all tokens of a document, documents behind one another.
    """

    left: int
    right: int
    offset: int
    padding: Tensor | None
    lengths: Tensor | None
    documents: Tensor | None


class Mask(Tensor):
    """A (B, 1, M, N) bool mask of which only the rule exists: whatever operation reads it makes the matrix.

    Once made, the matrix is kept, and it alone counts from then on, since somebody may have changed it in place. A
    compiled region of a model that runs eagerly otherwise breaks its graph at attention when it is handed one.

    Args:
        rule: what it says.
        shape: (B, 1, M, N).
        device: of the matrix.
        make: makes the matrix.
    """

    rule: Rule
    dense: Tensor | None
    _make: Callable[[], Any]

    @staticmethod
    def __new__(cls, rule: Rule, shape: tuple[int, ...], device: torch.device, make: Callable[[], Any]) -> Mask:
        """A mask of no matrix yet."""
        self: Mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.rule, self.dense, self._make = rule, None, make
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation, on the matrix instead."""
        args, kwargs = tree_map_only(Mask, Mask.matrix, (args, kwargs or {}))
        return func(*args, **kwargs)

    def matrix(self) -> Tensor:
        """(B, 1, M, N) bool, an ordinary tensor."""
        if self.dense is None:
            self.dense = self._make()
        return self.dense

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.matrix().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.matrix().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """The matrix as an array."""
        return self.matrix().numpy(force=force)

    def tolist(self) -> Any:
        """The matrix as lists."""
        return self.matrix().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Mask({self.rule}, shape={tuple(self.shape)})"


def _made_by(function: Any, factory: Any) -> dict[str, Any] | None:
    """The variables that `function` has from `factory`, if that made it."""
    if not isinstance(function, FunctionType) or function.__code__ not in factory.__code__.co_consts:
        return None
    return dict(zip(function.__code__.co_freevars, (x.cell_contents for x in function.__closure__ or ()), strict=True))


def _bounds(function: Any) -> tuple[int, int] | None:
    """How far before and behind its own key a query reads, if a mask function of transformers says just that."""
    if function is masking_utils.causal_mask_function:
        return UNBOUNDED, 0
    if function is masking_utils.bidirectional_mask_function:
        return UNBOUNDED, UNBOUNDED
    found = _made_by(function, masking_utils.sliding_window_overlay)
    if found is not None:
        return found["sliding_window"] - 1, UNBOUNDED
    found = _made_by(function, masking_utils.sliding_window_bidirectional_overlay)
    if found is not None:
        return found["sliding_window"], found["sliding_window"]
    found = _made_by(function, masking_utils.and_masks)
    if found is None:
        return None
    sides: list[tuple[int, int]] = []
    for part in found["mask_functions"]:
        bounds = _bounds(part)
        if bounds is None:
            return None
        sides.append(bounds)
    left, right = (min((x for x in side if x != UNBOUNDED), default=UNBOUNDED) for side in zip(*sides, strict=True))
    return left, right


def _documents(function: Any) -> tuple[Tensor | None, Any]:
    """The numbers of the documents of a packed batch, and the mask function inside of each; ``None`` of no such."""
    parts = (_made_by(function, masking_utils.and_masks) or {}).get("mask_functions", ())
    if len(parts) != 2:
        return None, function
    packed = _made_by(parts[0], masking_utils.packed_sequence_mask_function)
    inner = _made_by(parts[1], masking_utils.remap_positions_for_packed_sequence)
    if packed is None or inner is None:
        return None, function
    return packed["packed_sequence_mask"], inner["mask_function"]


def _agrees(function: Any, rule: Rule, q_length: int, kv_length: int, q_offset: int, kv_offset: int) -> bool:
    """Whether the first and the last query read what the rule says; `function` is not ours, and may change."""
    zero = torch.zeros((1, 1), dtype=torch.int64)
    i = torch.tensor([[0], [q_length - 1]])
    j = torch.arange(kv_length)[None]
    behind = j - i - rule.offset
    expected = (behind >= -rule.left if rule.left != UNBOUNDED else behind == behind) & (
        behind <= rule.right if rule.right != UNBOUNDED else behind == behind
    )
    return bool((function(zero, zero, i + q_offset, j + kv_offset) == expected).all())


def _rule(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    function: Any,
    attention_mask: Tensor | None,
) -> Rule | None:
    documents, function = _documents(function)
    bounds = _bounds(function)
    if bounds is None:
        return None
    rule = Rule(*bounds, int(q_offset) - kv_offset, None, None, documents)
    if not _agrees(function, rule, q_length, kv_length, int(q_offset), kv_offset):
        return None
    if documents is not None:
        alike = rule.offset == 0 and q_length == kv_length and attention_mask is None
        return rule if alike and documents.shape == (batch_size, q_length) else None
    bounded = bounds != (UNBOUNDED, UNBOUNDED)
    if bounded and rule.offset != 0 and (rule.right != 0 or not 0 < rule.offset <= kv_length - q_length):
        return None
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return rule
    padding = padding[:, kv_offset : kv_offset + kv_length]
    if padding.shape != (batch_size, kv_length) or padding.dtype != torch.bool:
        return None
    # Keys behind the last query do not matter; a static cache has them before they are filled.
    read = padding[:, : min(kv_length, q_length + rule.offset)] if rule.right == 0 else padding
    lengths = read.sum(1, dtype=torch.int32)
    if bool((lengths == read.shape[1]).all()):
        return rule
    at_end = bool((read == (torch.arange(read.shape[1], device=padding.device) < lengths[:, None])).all())
    return rule._replace(padding=padding, lengths=lengths if at_end else None)


def _is_plain(rule: Rule, keys: int) -> bool:
    """Whether a rule is that of causal attention from the top left, or of full attention."""
    unbounded = rule.left == UNBOUNDED or rule.left >= keys - 1
    aligned = rule.right == UNBOUNDED or (rule.right == 0 and rule.offset == 0)
    return unbounded and aligned and rule.padding is None and rule.documents is None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function: as ``transformers.masking_utils.sdpa_mask``, but a `Mask` where that makes (M, N) matrices.

    A `Mask` stands for causal masks, windows, padding and packed documents, with or without keys in a cache. Chunked,
    blockwise and users' own mask functions give a matrix, so does a graph that is being traced.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N.
        q_offset: position of the first query, an int or a () tensor.
        kv_offset: position of the first key.
        mask_function: of batch, head, query and key position.
        attention_mask: (B, positions so far) bool, ``False`` on padding.
        **kwargs: of ``sdpa_mask``.

    Returns:
        (B, 1, M, N) bool, ``True`` where a key is read; ``None`` where `attention` knows what to do without.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    plain = functools.partial(masking_utils.sdpa_mask, *sizes)
    # One query has a short mask already; q_offset is a tensor with static caches.
    traced = torch.compiler.is_compiling() or any(is_tracing(x) for x in sizes if isinstance(x, Tensor))
    if traced or q_length == 1 or kwargs.get("use_vmap", False):
        return plain(**kwargs)
    rule = _rule(*sizes)
    if rule is None:
        return plain(**kwargs)
    skip = ("allow_is_causal_skip", True) if rule.right == 0 else ("allow_is_bidirectional_skip", False)
    if kwargs.get(*skip) and _is_plain(rule, kv_length):
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    device = torch.device(kwargs.get("device", "cpu"))
    return Mask(rule, (batch_size, 1, q_length, kv_length), device, functools.partial(plain, **kwargs))


@functools.lru_cache(maxsize=256)
def _compiled(call: backends.Call) -> bool:
    """Whether an implementation other than the slow reference runs a call."""
    return any(backends.why_not(name, call) is None for name in backends.order(call) if name != "reference")


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores

    def is_compiled(self) -> bool:
        """Whether an implementation runs it that is not slow, or the one that was insisted on."""
        q, k, _, scores = self
        call = backends.Call("attention", q.device.type, q.dtype, "", scores.features(q, k))
        if backends.unobserved() or backends.explained():
            return _compiled(call)
        try:
            backends.select(call)
        except backends.BackendError:
            return False
        return True


def _keys(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    """The keys from `begin` to `end` of a bias (..., N)."""
    return x if x is None or x.shape[-1] == 1 else x[..., begin:end]


def _by_rule(rule: Rule, inputs: _Inputs) -> list[_Inputs]:
    """The ways to run a `Rule` without its matrix, the best first."""
    q, k, v, scores = inputs
    if rule.documents is not None:
        return _by_documents(rule, rule.documents, inputs)
    queries, begin, end = q.shape[2], 0, k.shape[2]
    if rule.right == 0:
        end = min(end, queries + rule.offset)
        if rule.left != UNBOUNDED:
            begin = max(0, rule.offset - rule.left)
    if (begin, end) != (0, k.shape[2]):
        k, v = k[:, :, begin:end], v[:, :, begin:end]
        scores = scores._replace(bias=_keys(scores.bias, begin, end))
    # Without the keys behind those of the last query, the diagonal ends in the corner.
    scores = scores._replace(left=rule.left, right=rule.right, bottom_right=rule.right == 0 and rule.offset > 0)
    if rule.padding is None:
        return [_Inputs(q, k, v, scores)]
    padded = _Inputs(q, k, v, scores._replace(mask=rule.padding[:, None, None, begin:end]))
    if rule.lengths is None or scores.bottom_right:
        return [padded]
    return [_Inputs(q, k, v, scores._replace(key_lengths=rule.lengths.clamp(max=end))), padded]


def _by_documents(rule: Rule, documents: Tensor, inputs: _Inputs) -> list[_Inputs]:
    if inputs.scores.bias is not None:
        return []
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    total = torch.tensor([documents.numel()], device=documents.device)
    cu_seqlens = torch.cat((starts.flatten().nonzero().flatten(), total)).int()
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in inputs[:3])
    scores = inputs.scores._replace(left=rule.left, right=rule.right)
    return [_Inputs(q, k, v, _with_documents(scores, cu_seqlens, cu_seqlens, longest, longest))]


def _with_documents(scores: Scores, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> Scores:
    return scores._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k)


def _without_mask(inputs: _Inputs, is_causal: bool, sliding_window: int | None, kwargs: dict[str, Any]) -> _Inputs:
    """What no mask means: causal from the top left if there are several queries, or the documents of `kwargs`."""
    q, k, v, scores = inputs
    if sliding_window is None and not kwargs and (not is_causal or q.shape[2] == 1):
        return inputs
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    packed = cu_q is not None or cu_k is not None
    if packed:
        if cu_q is None or cu_k is None:
            raise ValueError("cu_seq_lens_q, cu_seq_lens_k: expected both or neither")
        if q.shape[0] != 1 or scores.bias is not None:
            raise ValueError("cu_seq_lens_q: expected one batch entry and no position_bias with documents")
        longest = [int((x[1:] - x[:-1]).max()) for x in (cu_q, cu_k)]
        scores = _with_documents(scores, cu_q.int(), cu_k.int(), *longest)
    causal = is_causal and q.shape[2] > 1
    window = sliding_window is not None and sliding_window < k.shape[2]
    scores = scores._replace(
        left=sliding_window - 1 if sliding_window is not None and window else UNBOUNDED,
        right=0 if causal else sliding_window - 1 if sliding_window is not None and window else UNBOUNDED,
        # One query is the last one; documents are aligned as in flash-attn.
        bottom_right=(window and q.shape[2] == 1) or (packed and (causal or window)),
    )
    return _Inputs(q, k, v, scores)


def _refuse(cache: Any, attention_mask: Any, sliding_window: Any, kwargs: dict[str, Any]) -> None:
    if cache is not None:
        raise ValueError(f"cache: seqkernels has no attention for the paged cache of transformers, got {type(cache)}")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: seqkernels does not store attention weights; use 'eager' to see them")
    for name, value in kwargs.items():
        known = name in _OF_NO_CONCERN or name in ("cu_seq_lens_q", "cu_seq_lens_k", "output_attentions")
        if not known and value is not None:
            raise ValueError(f"{name}: seqkernels does not know what this argument asks of attention; use 'sdpa'")
    if isinstance(sliding_window, float | str) or (sliding_window is not None and sliding_window < 1):
        raise ValueError(f"sliding_window: expected at least 1 key or None, got {sliding_window!r}")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a Tensor or None, got {type(attention_mask).__name__}")
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise TypeError(f"attention_mask: expected torch.bool or floating point, got {attention_mask.dtype}")
    if attention_mask.dim() != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions (B, 1, M, N), got {tuple(attention_mask.shape)}")
    asked = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None
    if asked and isinstance(attention_mask, Mask) and attention_mask.rule.documents is None:
        raise ValueError("cu_seq_lens_q: expected no attention_mask beside it, or position_ids that restart as well")


def _lower(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as torch's autocast hands them to attention; batches of 1 are expanded to those of the others."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.shape[0] != k.shape[0]:
        batch = max(q.shape[0], k.shape[0])
        q, k, v = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (q, k, v))
    return q, k, v


def _add(bias: Tensor | None, mask: Tensor, q: Tensor) -> Tensor:
    """A mask that is added to the scores, together with the position bias."""
    mask = mask if mask.dtype == q.dtype else mask.to(accumulate_dtype(q.dtype))
    return mask if bias is None else mask + bias


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that models of transformers call.

    A mask says all about which keys are read; then neither `is_causal` nor `sliding_window` nor ``cu_seq_lens_q`` is
    looked at, since it was made from them. Without one, several queries are causal as `is_causal` says, aligned top
    left, and a window ends at the query; one query reads all keys of the window that ends at the last key. Rows
    without a key give 0.

    Args:
        module: of the model; its ``training`` decides about dropout, its ``is_causal`` where `is_causal` is ``None``.
        query: (B, Hq, M, D), float32, float64, bfloat16 or float16, D from 1 to 512.
        key: (B, Hk, N, D), Hq a multiple of Hk; heads are not repeated.
        value: (B, Hk, N, Dv).
        attention_mask: broadcastable to (B, Hq, M, N): bool, ``True`` where a key is read, or added to the scores.
        dropout: probability to drop a weight, in training; masks are drawn by torch's generator, others than torch's.
        scaling: factor on ``query key^T``; 1/sqrt(D) by default.
        is_causal: see above.
        sliding_window: keys that a query reads, its own included; in attention that is not causal on either side.
        softcap: ``softcap tanh(scores / softcap)``; ``None`` or 0 for none.
        s_aux: (Hq,), the score of one more key, whose value is 0.
        position_bias: broadcastable to (B, Hq, M, N), added to the scores; has a gradient.
        cache: must be ``None``.
        **kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (documents + 1,) of a batch of one row that has no mask;
            arguments that do not concern attention; nothing else.

    Returns:
        (B, M, Hq, Dv), contiguous, and ``None`` in place of the weights.

    Raises:
        ValueError, TypeError: an argument breaks the contract or asks for what is not there; the message names it.
    """
    _refuse(cache, attention_mask, sliding_window, kwargs)
    batch, queries = query.shape[0], query.shape[2]
    q, k, v = _lower(query, key, value)
    scores = Scores(q.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap=softcap or 0.0)
    if position_bias is not None:
        dtypes = (q.dtype, accumulate_dtype(q.dtype))
        scores = scores._replace(bias=position_bias if position_bias.dtype in dtypes else position_bias.to(q.dtype))
    if s_aux is not None:
        scores = scores._replace(sink=s_aux.to(accumulate_dtype(q.dtype)))
    if dropout > 0.0 and module.training:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64).to(q.device)
        scores = scores._replace(dropout_p=dropout, seed=seed)
    inputs = _Inputs(q, k, v, scores)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        inputs = _without_mask(inputs, bool(causal), sliding_window, kwargs)
    elif isinstance(attention_mask, Mask) and attention_mask.dense is None:
        inputs = _choose(attention_mask, inputs)
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask.matrix() if isinstance(attention_mask, Mask) else attention_mask
        inputs = inputs._replace(scores=scores._replace(mask=mask))
    else:
        inputs = inputs._replace(scores=scores._replace(bias=_add(scores.bias, attention_mask, q)))
    check(*inputs)
    out = attend(*inputs)[0].transpose(1, 2)
    if out.shape[1] != queries:
        out = out.view(batch, queries, *out.shape[2:])
    return out.contiguous(), None


def _choose(mask: Mask, inputs: _Inputs) -> _Inputs:
    """The first way to run a mask that a compiled implementation has, else the first."""
    ways = _by_rule(mask.rule, inputs)
    for way in ways:
        if way.is_compiled():
            return way
    dense = inputs._replace(scores=inputs.scores._replace(mask=mask))
    if ways and not dense.is_compiled():
        return ways[0]
    return inputs._replace(scores=inputs.scores._replace(mask=mask.matrix()))
