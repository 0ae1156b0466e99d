"""Parts of a sequence, one for each process of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Orders of the parts, and how many chunks of the sequence each process has in them.
BALANCES = {"zigzag": 2, "contiguous": 1}


def place(group: ProcessGroup | None) -> tuple[int, int]:
    """Number of this process in `group`, and the number of processes.

    Raises:
        RuntimeError: there are no process groups yet.
        ValueError: this process is not in `group`.
        TypeError: `group` is something else.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed.init_process_group to have been called before")
    given: Any = group
    if given == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected one that this process belongs to")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a ProcessGroup (of a mesh its get_group()) or None, got {type(group).__name__}"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def check_alike(group: ProcessGroup | None, **given: object) -> None:
    """See that all processes give the same, where ``TORCH_DISTRIBUTED_DEBUG`` is ``DETAIL``, as torch's own calls do.

    Args:
        group: the processes.
        given: what they give, by its name; of tensors the shapes and dtypes, and whether there will be a backward pass.

    Raises:
        ValueError: something differs; every process raises it.
    """
    debug: Any = dist
    if debug.get_debug_level() != debug.DebugLevel.DETAIL:
        return
    every: list[Any] = [None] * place(group)[1]
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    given |= {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    given["requires_grad"] = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    dist.all_gather_object(every, given, group)
    for name, mine in given.items():
        for number, theirs in enumerate(every):
            if theirs[name] != mine:
                raise ValueError(
                    f"{name}: expected the same on all processes of the group, got {_shown(mine)} here and"
                    f" {_shown(theirs[name])} on process {number}"
                )


def _shown(x: object) -> str:
    return f"{x[1]} of shape {x[0]}" if isinstance(x, tuple) else repr(x)


def check_balance(balance: str) -> None:
    """Raise a ValueError for what is none of `BALANCES`."""
    if balance not in BALANCES:
        raise ValueError(f"balance: expected one of {', '.join(map(repr, BALANCES))}, got {balance!r}")


def _check_dimension(x: Tensor, dim: int) -> None:
    """Raise where `x` has no dimension `dim`, or they are no tensor and no number."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if not isinstance(dim, SupportsIndex):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        allowed = f"from {-x.dim()} to {x.dim() - 1}" if x.dim() else "none, x having no dimension"
        raise IndexError(f"dim: expected {allowed}, got {dim}")


def chunks_of(rank: int, world: int, balance: str) -> tuple[int, ...]:
    """The chunks of process `rank` of `world`, by their numbers in the sequence."""
    return (rank,) if balance == "contiguous" else (rank, 2 * world - 1 - rank)


def shard_sequence(x: Tensor, dim: int, group: ProcessGroup | None = None, *, balance: str = "zigzag") -> Tensor:
    """This process's part of a sequence that every process has whole.

    With W processes and ``balance="zigzag"`` the sequence is cut into 2W chunks, and process r has chunks r and
    2W-1-r: under a causal mask the early one reads little and the late one much, together as much as anywhere
    (Brandon et al., "Striped Attention", 2023, balances likewise, token by token). With ``"contiguous"`` process r has
    the r-th of W parts.

    Whatever belongs to positions is cut the same way: tokens, targets, ``torch.arange`` for position embeddings.

    Args:
        x: any dtype, the same on all processes.
        dim: of the sequence.
        group: the processes; all by default.
        balance: ``"zigzag"`` or ``"contiguous"``.

    Returns:
        The part, in the order of the sequence; a view of `x` with ``"contiguous"``. No message is sent, backward
        neither: the gradient of `x` on each process is that of its own part, 0 elsewhere, and their sum over the
        processes that of all.

    Raises:
        ValueError: the length is not a multiple of the number of chunks; `balance` is none, or `group` another's.
        IndexError: `x` has no dimension `dim`.
        TypeError: `x` is no tensor, or `dim` no integer.

    Example:
        >>> tokens = shard_sequence(tokens, 1)  # (B, N) -> (B, N / W)
    """
    check_balance(balance)
    _check_dimension(x, dim)
    rank, world = place(group)
    count, length = world * BALANCES[balance], x.shape[dim]
    if length % count:
        raise ValueError(
            f"x: expected a length in dimension {dim} that is a multiple of {count}, {BALANCES[balance]} for each of"
            f" {world} processes, got {length}; pad it"
        )
    size = length // count
    parts = [x.narrow(dim, chunk * size, size) for chunk in chunks_of(rank, world, balance)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def unshard_sequence(x: Tensor, dim: int, group: ProcessGroup | None = None, *, balance: str = "zigzag") -> Tensor:
    """The whole sequence from the parts of all processes: the inverse of `shard_sequence`.

    Differentiable once: the gradient of `x` is that of the sum of what all processes compute from the result, for
    which their gradients are added up. Where each process computes the same loss from it, divide the loss by their
    number. Every process has to take part, in the backward pass too.

    Args:
        x: this process's part, of the same shape and dtype on all processes; with ``TORCH_DISTRIBUTED_DEBUG=DETAIL``
            that is looked at.
        dim: of the sequence.
        group: the processes; all by default.
        balance: as in `shard_sequence`.

    Returns:
        The sequence, on every process.

    Raises:
        ValueError: the length is not a multiple of the number of chunks of a process; `balance` is none, or `group`
            another's; parts that are not alike.
        IndexError: `x` has no dimension `dim`.
        TypeError: `x` is no tensor, or `dim` no integer.
    """
    check_balance(balance)
    _check_dimension(x, dim)
    place(group)
    if x.shape[dim] % BALANCES[balance]:
        raise ValueError(f"x: expected an even length in dimension {dim} with balance 'zigzag', got {x.shape[dim]}")
    check_alike(group, x=x, dim=dim % x.dim(), balance=balance)
    found: Tensor = _Unshard.apply(x, dim, group, balance)
    return found


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup | None, balance: str) -> Tensor:
        ctx.dim, ctx.group, ctx.balance = dim, group, balance
        _, world = place(group)
        # (W, ...), filled by every process with its part.
        gathered = x.new_empty((world, *x.shape))
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
        count = BALANCES[balance]
        chunks: list[Any] = [None] * (world * count)
        for rank in range(world):
            for number, chunk in zip(chunks_of(rank, world, balance), gathered[rank].chunk(count, dim), strict=True):
                chunks[number] = chunk
        return torch.cat(chunks, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("unshard_sequence")
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return shard_sequence(grad, ctx.dim, ctx.group, balance=ctx.balance), None, None, None


def refuse_second_order(name: str) -> None:
    """Raise where a graph of the gradients is asked for, which `name` does not have.

    Raises:
        NotImplementedError: gradients are recorded in this backward pass.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: gradients of gradients are not there, expected create_graph=False")
