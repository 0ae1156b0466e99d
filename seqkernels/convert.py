"""Swap the layers of a model for their seqkernels twins in place, and back.

A swap assigns the module's ``__class__`` and touches nothing else: module, parameters, buffers, hooks, flags and
every reference to them stay the same objects, so optimizers built before keep working, a module used in two places
stays shared, and the model itself may be such a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import Module
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize

from . import nn
from .precision import check_precision

_TWINS: dict[type[Module], type[Module]] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
    torch.nn.TransformerDecoder: nn.TransformerDecoder,
    torch.nn.Transformer: nn.Transformer,
}
_KINDS = (
    RNNBase,
    RNNCellBase,
    torch.nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerDecoder,
    torch.nn.Transformer,
)


class Swap(NamedTuple):
    """A module that was swapped: its name in the model, and its types before and after."""

    name: str
    before: str
    after: str


class Left(NamedTuple):
    """A recurrent, attention or transformer module that was left as it is: its name in the model, its type, and why."""

    name: str
    type: str
    reason: str


@dataclass
class Report:
    """What `convert` or `revert` did to a model.

    Attributes:
        swapped: modules that changed type, in the order of ``model.named_modules()``.
        left: recurrent, attention and transformer modules of other types, and why each stayed.
        notes: what to know about the model as it is now.
        dry_run: whether nothing was changed, and `swapped` is what would be.
    """

    swapped: list[Swap] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def __str__(self) -> str:
        lines = [f"{'would swap' if self.dry_run else 'swapped'} {len(self.swapped)}, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {before} -> {after}" for name, before, after in self.swapped]
        lines += [f"  {name or '(the model)'}: {kind} left: {reason}" for name, kind, reason in self.left]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


#: Options of recurrent layers that have no counterpart in ``torch.nn``.
_OPTIONS = ("zoneout", "recurrent_dropout", "layer_norm", "peephole", "learn_reset_state")


def _type_name(cls: type) -> str:
    package = "torch.nn" if cls in _TWINS else "seqkernels.nn" if cls in _TWINS.values() else cls.__module__
    return f"{package}.{cls.__qualname__}"


def _why_left(module: Module, cls: type[Module], twins: dict[type[Module], type[Module]]) -> str | None:
    if cls not in twins:
        base = next((known for known in cls.__mro__ if known in twins), None)
        return "a type without a twin" if base is None else f"a subclass of {_type_name(base)}"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    options = [name for name in _OPTIONS if getattr(module, name, False)]
    return f"torch.nn has no {', '.join(options)}" if options and twins[cls] in _TWINS else None


def _assign_class(module: Module, cls: type[Module]) -> None:
    """Give `module` the type `cls`, below the type that parametrizations derive for each module they are put on."""
    derived = type(module)
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(derived).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(derived.__name__, (cls,), own)
    else:
        module.__class__ = cls
    if isinstance(module, RNNBase):
        # torch's layers keep a list of their weights, ours look them up: neither may find the other's.
        vars(module).pop("_flat_weights", None)
        module._init_flat_weights()


def _swap(model: Module, twins: dict[type[Module], type[Module]], dry_run: bool) -> Report:
    if not isinstance(model, Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected a Module, got {what}")
    report = Report(dry_run=dry_run)
    known = {*twins, *twins.values()}
    for name, module in model.named_modules():
        cls = parametrize.type_before_parametrizations(module)
        nearest = next((base for base in cls.__mro__ if base in known), None)
        if not isinstance(module, _KINDS) or nearest in twins.values():
            continue
        reason = _why_left(module, cls, twins)
        if reason is not None:
            report.left.append(Left(name, _type_name(cls), reason))
            continue
        report.swapped.append(Swap(name, _type_name(cls), _type_name(twins[cls])))
        if not dry_run:
            _assign_class(module, twins[cls])
    return report


def convert(model: Module, *, dry_run: bool = False, precision: str | None = None) -> Report:
    """Swap the exact ``torch.nn`` layers of a model for their `seqkernels.nn` twins, in place.

    RNN, LSTM, GRU, their cells, MultiheadAttention, Transformer and its layers and stacks of layers are swapped, with
    parametrizations too; subclasses and modules whose ``forward`` was replaced are left, since their code may differ,
    but what is inside them is swapped. Calling it again changes nothing more.

    Programs that choose by the types of ``torch.nn`` pass over the swapped layers: of a converted model
    ``torch.ao.quantization.quantize_dynamic`` quantizes the linear layers and leaves recurrent ones as they are, with a
    warning from each; a ``qconfig`` for them is refused. Call `revert` first; `seqkernels.integrations.opacus` does for
    Opacus what its types ask for.

    Args:
        model: any module, also such a layer itself.
        dry_run: only report. Default: ``False``.
        precision: of products of float32 matrices on GPUs, see `seqkernels.precision`, of every RNN, LSTM, GRU and
            MultiheadAttention of seqkernels that the model then has; ``None``, the default, leaves it: new ones have
            ``"ieee"``.

    Returns:
        A `Report`; print it.

    Raises:
        ValueError: `precision` is none.
        TypeError: `model` is no module.

    Example:
        >>> print(seqkernels.convert(torch.nn.Sequential(torch.nn.LSTM(8, 16))))
        swapped 1, left 0
          0: torch.nn.LSTM -> seqkernels.nn.LSTM
    """
    if precision is not None:
        check_precision(precision)
    report = _swap(model, _TWINS, dry_run)
    if precision is not None and not dry_run:
        for module in model.modules():
            if isinstance(module, nn.RNN | nn.LSTM | nn.GRU | nn.MultiheadAttention):
                module.precision = precision
    changed = {swap.name for swap in report.swapped}
    report.notes += [
        f"{name or '(the model)'}: in eval mode without gradients this {type(module).__name__} may take torch's fused"
        " path, which never calls self_attn; torch.backends.mha.set_fastpath_enabled(False) turns that off"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.TransformerEncoderLayer)
        and not isinstance(module, nn.TransformerEncoderLayer)
        and name not in changed
        and (f"{name}.self_attn" if name else "self_attn") in changed
    ]
    return report


def revert(model: Module) -> Report:
    """Swap the exact `seqkernels.nn` layers of a model for their ``torch.nn`` twins, in place.

    This undoes `convert` exactly, and serves to hand a model on to a program without seqkernels: a layer that was
    built from `seqkernels.nn` is swapped as well, unless it has an option that ``torch.nn`` lacks.

    Args:
        model: any module, also such a layer itself.

    Returns:
        A `Report`; ``torch.nn`` layers are not listed in it.

    Raises:
        TypeError: `model` is no module.
    """
    report = _swap(model, {ours: theirs for theirs, ours in _TWINS.items()}, False)
    for swap in report.swapped:
        for name in ("precision", "qconfig"):
            vars(model.get_submodule(swap.name)).pop(name, None)
    return report
