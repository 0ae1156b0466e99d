"""Differentially private training: layers of seqkernels for Opacus.

Opacus takes the gradients of each sample from hooks on layers. A hook on a recurrent layer sees no gradient of its
final states, nor one on attention its masks, so that Opacus has layers of its own for ``torch.nn``'s and puts them in
by type. `register` tells it which of them stand for those of `seqkernels.nn`; without it Opacus fails at the backward
pass of such a layer. They are made of plain linear layers and loops, and no faster than they are for ``torch.nn``.

Where gradients of each sample are wanted by themselves, ``torch.func.vmap(torch.func.grad(loss))`` needs no Opacus.
"""

from __future__ import annotations

from typing import Any

from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention  # type: ignore[import-untyped]
from opacus.validators.errors import (  # type: ignore[import-untyped]
    NotYetSupportedModuleError,
    ShouldReplaceModuleError,
    UnsupportedModuleError,
)
from opacus.validators.utils import register_module_fixer, register_module_validator  # type: ignore[import-untyped]
from torch.nn import Module

from .. import nn

_RECURRENT: dict[type[Module], type[Module]] = {nn.RNN: DPRNN, nn.LSTM: DPLSTM, nn.GRU: DPGRU}
_ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
#: What layers of seqkernels may have, and those of Opacus have not.
_OPTIONS = ("proj_size", "zoneout", "recurrent_dropout", "layer_norm", "peephole", "learn_reset_state")


def register() -> None:
    """Let ``ModuleValidator.fix`` put Opacus' layers, with the same weights, in place of those of `seqkernels.nn`.

    That is RNN, LSTM, GRU and MultiheadAttention; ``validate`` names them, and those that ``fix`` leaves: layers with
    options that Opacus lacks, and attention with ``batch_first``, since `DPMultiheadAttention` of Opacus 1.6 then gives
    other results than torch's layer. Calling it again changes nothing.

    Example:
        >>> seqkernels.integrations.opacus.register()
        >>> model = opacus.GradSampleModule(opacus.validators.ModuleValidator.fix(model))
    """
    layers = [*_RECURRENT, nn.MultiheadAttention]
    register_module_validator(layers)(validate)
    register_module_fixer(layers)(fix)


def _lacking(module: Module) -> list[str]:
    attends = isinstance(module, nn.MultiheadAttention)
    return [name for name in (("batch_first",) if attends else _OPTIONS) if getattr(module, name, False)]


def validate(module: Module) -> list[UnsupportedModuleError]:
    """Why Opacus cannot train a layer of seqkernels as it is."""
    name, lacking = f"seqkernels.nn.{type(module).__name__}", _lacking(module)
    if lacking:
        return [NotYetSupportedModuleError(f"{name}: Opacus has no right layer with {', '.join(lacking)}")]
    return [ShouldReplaceModuleError(f"{name}: Opacus has hooks for its own layers only; call ModuleValidator.fix")]


def fix(module: Any, **_: Any) -> Module:
    """Opacus' layer with the weights of one of seqkernels, which is returned itself where there is none."""
    if _lacking(module):
        return module
    made: Any
    if isinstance(module, nn.MultiheadAttention):
        made = DPMultiheadAttention(
            module.embed_dim,
            module.num_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
        )
    else:
        options = {name: getattr(module, name) for name in _ARGUMENTS}
        if isinstance(module, nn.RNN):
            options["nonlinearity"] = module.nonlinearity
        made = _RECURRENT[type(module)](**options)
    made.load_state_dict(module.state_dict())
    return made.train(module.training)
