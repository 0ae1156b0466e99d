"""What the ops do with ``DTensor``.

Rows of the batch do not know of one another, nor do heads: with tensors that are split there, each process runs the op
on its part, and gradients of what all parts share are sums over the processes, which ``DTensor`` calls ``Partial``.
What is split otherwise is put together first.

The rules are ``torch.library.register_torch_dispatch``'s and not ``torch.distributed.tensor``'s ``register_sharding``,
because that does not know ops that return lists of tensors or take ``None`` among tensors
(https://github.com/pytorch/pytorch/pull/191488).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from ..cells import Weights
from ..scores import Scores

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


class _Dims(NamedTuple):
    """The dimension of a tensor that is split, by what it is split into; ``None`` where every process has all of it."""

    batch: int | None = None
    heads: int | None = None


_WHOLE = _Dims()
#: In place of a dimension: each process has an addend of the whole.
_ADDEND = -1

Spread = _Dims | Sequence[_Dims]


class _Plan(NamedTuple):
    """How an op may be split.

    Attributes:
        inputs: of the op's leading arguments.
        outputs: of the tensors that it returns, but for empty ones.
        guides: tensors and their dimensions: what one of them is split into decides for all.
        sizes: what may be split, and how many of it there are.
        even: whether each process has to have as many heads.
    """

    inputs: Sequence[Spread]
    outputs: Sequence[_Dims]
    guides: Sequence[tuple[Tensor, _Dims]]
    sizes: _Dims


_STEPS = _Dims(batch=1)  # (T, B, ...) and (S, B, H)
_STATES = _Dims(batch=2)  # (S, T+1, B, H)
_SUM_OF_ROWS = _Dims(batch=_ADDEND)


def _weights(weights: Sequence[Tensor | None]) -> list[_Dims]:
    of_rows = Weights._fields.index("recurrent_mask")
    return [_Dims(batch=0) if k % len(Weights._fields) == of_rows else _WHOLE for k in range(len(weights))]


def _rows(weights: Sequence[Tensor | None], count: int) -> _Dims:
    """The batch, which is not split where zoneout is drawn by the place of a row in it."""
    drawn = weights[Weights._fields.index("seed") :: len(Weights._fields)]
    return _WHOLE if any(x is not None for x in drawn) else _Dims(batch=count)


def _recurrence_forward(
    input: Tensor,
    weights: Any,
    state0: Tensor,
    control: Any,
    cell: str,
    reverse: bool,
    save: bool,
    every: int = 0,
    *_: Any,
) -> _Plan:
    inputs = (_STEPS, _weights(weights), _STEPS, _STEPS)
    outputs = (_STATES, _STEPS, _STATES if every else _STEPS)
    return _Plan(inputs, outputs, [(input, _STEPS), (state0, _STEPS)], _rows(weights, input.shape[1]))


def _recurrence_backward(
    grads: Any,
    input: Tensor,
    weights: Any,
    states: Tensor,
    reserve: Tensor,
    control: Any,
    cell: str,
    reverse: bool,
    needs: Any,
    every: int = 0,
    *_: Any,
) -> _Plan:
    inputs = ([_STEPS] * len(grads), _STEPS, _weights(weights), _STATES, _STATES if every else _STEPS, _STEPS)
    outputs = [_STEPS, _STEPS, *[_SUM_OF_ROWS] * len(weights)]
    return _Plan(inputs, outputs, [(input, _STEPS), (states, _STATES)], _rows(weights, input.shape[1]))


def _recurrences_forward(input: Tensor, weights: Any, state0: Any, controls: Any, masks: Any, *_: Any) -> _Plan:
    each = [_STEPS] * len(state0)
    outputs = [_STATES, _STEPS, _STEPS] * len(state0)
    guides = [(x, _STEPS) for x in (input, *state0)]
    return _Plan((_STEPS, _weights(weights), each, each, each), outputs, guides, _rows(weights, input.shape[1]))


def _recurrences_backward(
    grads: Any, input: Tensor, weights: Any, states: Any, reserves: Any, controls: Any, masks: Any, *_: Any
) -> _Plan:
    each = [_STEPS] * len(states)
    inputs = ([_STEPS] * len(grads), _STEPS, _weights(weights), [_STATES] * len(states), each, each, each)
    outputs = [_STEPS, *[_STEPS, *[_SUM_OF_ROWS] * len(Weights._fields)] * len(states)]
    guides = [(input, _STEPS), *((x, _STATES) for x in states)]
    return _Plan(inputs, outputs, guides, _rows(weights, input.shape[1]))


_HEADS = _Dims(batch=0, heads=1)  # (B, H, L, ...)


def _broadcast(x: Tensor | None, missing: int | None) -> _Dims:
    """Of a mask or bias (B, Hq, M, N), in which dimensions may be 1."""
    return _WHOLE if x is None else _Dims(*(dim if x.shape[dim] > 1 else missing for dim in (0, 1)))


def _scores(packed: Sequence[Any]) -> tuple[list[_Dims], Scores]:
    """Dimensions of the packed tensors, and what they are."""
    scores = Scores.unpack(*packed)
    slopes = scores.alibi_slopes
    known = (
        (scores.mask, _broadcast(scores.mask, None)),
        (scores.bias, _broadcast(scores.bias, None)),
        (scores.key_lengths, _Dims(batch=0)),
        (slopes, _Dims(heads=0) if slopes is None or slopes.dim() == 1 else _HEADS),
        (scores.sink, _Dims(heads=0)),
    )
    return [next((dims for y, dims in known if x is y and x is not None), _WHOLE) for x in packed[0]], scores


def _sizes(q: Tensor, k: Tensor, scores: Scores) -> _Dims:
    """What may be split: nothing under dropout, which is drawn by place; not the batch of documents and pages."""
    if scores.seed is not None:
        return _WHOLE
    rows = scores.cu_seqlens_q is None and scores.block_table is None
    return _Dims(q.shape[0] if rows else None, k.shape[1])


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *packed: Any) -> _Plan:
    tensors, scores = _scores(packed)
    guides = [(x, _HEADS) for x in (q, k, v)]
    return _Plan((_HEADS, _HEADS, _HEADS, tensors), (_HEADS, _HEADS), guides, _sizes(q, k, scores))


def _attention_backward(grads: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> _Plan:
    tensors, scores = _scores(rest[:3])
    inputs = ([_HEADS] * len(grads), *(_HEADS,) * 5, tensors)
    outputs = (_HEADS, _HEADS, _HEADS, _broadcast(scores.bias, _ADDEND))
    return _Plan(inputs, outputs, [(x, _HEADS) for x in (q, k, v, lse)], _sizes(q, k, scores))


def _weights_sizes(q: Tensor, k: Tensor, scores: Scores, average: bool) -> _Dims:
    found = _sizes(q, k, scores)
    return found._replace(heads=None) if average else found


def _attention_weights(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> _Plan:
    (tensors, scores), average = _scores(rest[:3]), rest[3]
    guides = [(x, _HEADS) for x in (q, k, lse)]
    return _Plan((*(_HEADS,) * 3, tensors), (_HEADS,), guides, _weights_sizes(q, k, scores, average))


def _attention_weights_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> _Plan:
    (tensors, scores), average = _scores(rest[:3]), rest[3]
    outputs = (_HEADS, _HEADS, _broadcast(scores.bias, _ADDEND), _Dims(batch=_ADDEND, heads=0))
    guides = [(x, _HEADS) for x in (q, k)]
    return _Plan((*(_HEADS,) * 3, tensors), outputs, guides, _weights_sizes(q, k, scores, average))


def _choose(plan: _Plan, mesh: DeviceMesh) -> list[str | None]:
    """For each dimension of the mesh what is split along it."""
    from torch.distributed.tensor import Shard

    chosen: list[str | None] = []
    for number in range(mesh.ndim):
        found: str | None = None
        for x, dims in plan.guides:
            placement = x.placements[number] if _is_dtensor(x) else None
            for name, dim, size in zip(_Dims._fields, dims, plan.sizes, strict=True):
                if found is None and type(placement) is Shard and placement.dim == dim and size is not None:
                    found = name
        if found == "heads":
            # Each process has whole groups of query heads with their key head.
            ways = [mesh.size(other) for other, name in enumerate([*chosen, found]) if name == "heads"]
            heads = plan.sizes.heads
            found = None if heads is None or heads % math.prod(ways) else found
        chosen.append(found)
    return chosen


def _placements(dims: _Dims, chosen: Sequence[str | None]) -> list[Placement]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    found: list[Placement] = []
    for name in chosen:
        dim = None if name is None else getattr(dims, name)
        found.append(Replicate() if dim is None else Partial() if dim == _ADDEND else Shard(dim))
    return found


def _is_dtensor(x: object) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _local(x: Any, dims: Spread, chosen: Sequence[str | None], mesh: DeviceMesh) -> Any:
    """This process's part of an argument; of a plain tensor each has the whole."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(dims, _Dims):
        return [_local(part, of_part, chosen, mesh) for part, of_part in zip(x, dims, strict=True)]
    if not isinstance(x, Tensor):
        return x
    if not _is_dtensor(x):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(placements=_placements(dims, chosen)).to_local()


def _refuse_plain(op: Any, plan: _Plan, args: Any) -> None:
    """Constants that every process makes for itself may be plain, others would have gradients of no kind."""
    for x in _flat(args):
        guide = any(x is y for y, _ in plan.guides)
        if isinstance(x, Tensor) and not _is_dtensor(x) and (guide or x.requires_grad):
            raise TypeError(
                f"{op}: expected DTensors alone, where one is among the tensors, but for constants beside the inputs;"
                f" got a plain Tensor {tuple(x.shape)}"
            )


def _global(x: Tensor, dims: _Dims, chosen: Sequence[str | None], batch: int | None, mesh: DeviceMesh) -> DTensor:
    """The tensor of which `x` is this process's part; `batch` is the size of that of all."""
    from torch.distributed.tensor import DTensor

    if x.dim() == 1 and x.shape[0] == 0:
        dims = _WHOLE  # what nobody asked for
    shape = list(x.shape)
    for number, name in enumerate(chosen):
        dim = None if name is None else getattr(dims, name)
        if dim is not None and dim != _ADDEND:
            shape[dim] = shape[dim] * mesh.size(number) if batch is None or name == "heads" else batch
    # In memory in the order of the part.
    stride, step = [0] * x.dim(), 1
    for dim in sorted(range(x.dim()), key=lambda dim: (x.stride(dim), -dim)):
        stride[dim] = step
        step *= max(shape[dim], 1)
    return DTensor.from_local(
        x, mesh, _placements(dims, chosen), run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def _flat(x: Any) -> list[Any]:
    return [part for some in x for part in _flat(some)] if isinstance(x, list | tuple) else [x]


def _dispatch(plan_of: Callable[..., _Plan], cls: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run `op` on this process's parts of the arguments."""
    meshes = {x.device_mesh for x in _flat(args) if _is_dtensor(x)}
    if len(meshes) > 1:
        raise ValueError(f"{op}: expected DTensors on one mesh, got {len(meshes)}")
    mesh = meshes.pop()
    plan = plan_of(*args)
    _refuse_plain(op, plan, args)
    chosen = _choose(plan, mesh)
    with enable_reentrant_dispatch(), torch.no_grad():
        leading = len(plan.inputs)
        local = [_local(x, dims, chosen, mesh) for x, dims in zip(args[:leading], plan.inputs, strict=True)]
        found = op(*local, *args[leading:], **kwargs)
        several = isinstance(found, list | tuple)
        parts = [
            _global(x, dims, chosen, plan.sizes.batch, mesh)
            for x, dims in zip(found if several else [found], plan.outputs, strict=True)
        ]
    return type(found)(parts) if several else parts[0]


_PLANS: dict[str, Callable[..., _Plan]] = {
    "recurrence_forward": _recurrence_forward,
    "recurrence_backward": _recurrence_backward,
    "recurrences_forward": _recurrences_forward,
    "recurrences_backward": _recurrences_backward,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_weights": _attention_weights,
    "attention_weights_backward": _attention_weights_backward,
}
_library = torch.library.Library("seqkernels", "FRAGMENT")


@functools.cache
def register_sharding() -> None:
    """Let the functions and layers of this package take ``DTensor``. Calls after the first do nothing.

    Recurrences are split over the batch, attention over the batch and the heads, where a number of key heads that the
    processes divide lets whole groups of heads stay together; other placements are redistributed to whole tensors
    first. Gradients of weights under a split batch are ``Partial``, until something asks for them. Zoneout and
    attention's dropout are drawn by the place in the whole, so calls with a seed are not split: each process computes
    all of it. Rotary embeddings are plain operations on a ``DTensor``.

    It needs nothing from ``torch.distributed`` before a ``DTensor`` comes, and may be called at any time.

    Raises:
        TypeError: from a call whose inputs or parameters are ``DTensor`` in part and plain in part.
        ValueError: from a call whose tensors are on several meshes.

    Example:
        >>> seqkernels.distributed.register_sharding()
        >>> x = distribute_tensor(x, mesh, [Shard(0)])  # (B, T, I)
        >>> output, _ = distribute_module(seqkernels.nn.LSTM(64, 64, batch_first=True), mesh)(x)
    """
    from torch.distributed.tensor import DTensor

    for name, plan_of in _PLANS.items():
        rule = functools.partial(_dispatch, plan_of)
        torch.library.register_torch_dispatch(f"seqkernels::{name}", DTensor, rule, lib=_library)
