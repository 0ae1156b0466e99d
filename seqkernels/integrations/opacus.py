"""Differentially private training: layers of seqkernels for Opacus, in two ways.

`sample_gradients` keeps the layers: the fused kernels run for one sample at a time, and what they give is where
Opacus' optimizer looks for it.

`register` lets Opacus put in its own. Opacus takes the gradients of each sample from hooks on layers. A hook on a
recurrent layer sees no gradient of its final states, nor one on attention its masks, so that Opacus has layers of its
own for ``torch.nn``'s and puts them in by type; it has to be told which of them stand for those of `seqkernels.nn`;
without it Opacus fails at the backward pass of such a layer. They are made of plain linear layers and loops, and no
faster than they are for ``torch.nn``.

Where gradients of each sample are wanted by themselves, ``torch.func.vmap(torch.func.grad(loss))`` needs no Opacus.

Source: Abadi et al., "Deep Learning with Differential Privacy", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

try:
    from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention  # type: ignore[import-untyped]
    from opacus.validators.errors import (  # type: ignore[import-untyped]
        NotYetSupportedModuleError,
        ShouldReplaceModuleError,
        UnsupportedModuleError,
    )
    from opacus.validators.utils import register_module_fixer, register_module_validator  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"private training needs Opacus: {error}; pip install 'seqkernels[opacus]'") from error

from .. import nn

_RECURRENT: dict[type[Module], type[Module]] = {nn.RNN: DPRNN, nn.LSTM: DPLSTM, nn.GRU: DPGRU}
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
#: What layers of seqkernels may have, and those of Opacus have not.
_OPTIONS = ("proj_size", "zoneout", "recurrent_dropout", "layer_norm", "peephole", "learn_reset_state")


def register() -> None:
    """Let ``ModuleValidator.fix`` put Opacus' layers, with the same weights, in place of those of `seqkernels.nn`.

    That is RNN, LSTM, GRU and MultiheadAttention; ``validate`` names them, and those that ``fix`` leaves: cells, layers
    with options that Opacus lacks, and attention with ``batch_first``, since `DPMultiheadAttention` of Opacus 1.6 then
    gives other results than torch's layer. Calling it again changes nothing.

    Example:
        >>> seqkernels.integrations.opacus.register()
        >>> model = opacus.GradSampleModule(opacus.validators.ModuleValidator.fix(model))
    """
    layers = [*_RECURRENT, nn.MultiheadAttention]
    register_module_validator([*layers, *_CELLS])(validate)
    register_module_fixer(layers)(fix)


def sample_gradients(model: Module, loss: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """Gradients of each sample by the model's own layers, in ``grad_sample`` of each parameter that requires one.

    Args:
        model: any module; of ``opacus.GradSampleModule`` that in ``grad_sample_mode="no_op"``.
        loss: of a batch of one sample: ``loss(model, *samples)`` is one number.
        batch: tensors whose first dimension are the B samples.

    Returns:
        The losses (B,), without gradient. Parameters have (B, ...) in ``grad_sample``, which replaces what was there;
        one that the loss does not reach has zeros. Their ``grad`` stays what it is.

    Raises:
        ValueError: there is no batch, or its parts have different numbers of samples, or a loss is not one number.

    Example:
        >>> wrapped = opacus.grad_sample.GradSampleModuleNoOp(model)
        >>> optimizer = opacus.optimizers.DPOptimizer(
        ...     optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=32, loss_reduction="sum"
        ... )
        >>> losses = sample_gradients(wrapped, loss, inputs, targets)
        >>> optimizer.step()
    """
    sizes = {len(part) for part in batch}
    if len(sizes) != 1:
        raise ValueError(f"batch: expected tensors with one number of samples, got {sorted(sizes) or 'none'}")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = [weight.new_zeros(len(batch[0]), *weight.shape) for weight in weights]
    losses = []
    for number in range(len(batch[0])):
        value = loss(model, *(part[number : number + 1] for part in batch))
        if value.dim() != 0:
            raise ValueError(f"loss: expected one number, got {tuple(value.shape)}")
        losses.append(value.detach())
        for grads, grad in zip(found, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
            if grad is not None:
                grads[number] = grad
    for weight, grads in zip(weights, found, strict=True):
        weight.grad_sample = grads  # type: ignore[attr-defined]
    return torch.stack(losses) if losses else batch[0].new_zeros(0, dtype=torch.get_default_dtype())


def _lacking(module: Module) -> list[str]:
    attends = isinstance(module, nn.MultiheadAttention)
    return [name for name in (("batch_first",) if attends else _OPTIONS) if getattr(module, name, False)]


def validate(module: Module) -> list[UnsupportedModuleError]:
    """Why Opacus cannot train a layer of seqkernels as it is."""
    name, lacking = f"seqkernels.nn.{type(module).__name__}", _lacking(module)
    if isinstance(module, _CELLS):
        return [NotYetSupportedModuleError(f"{name}: Opacus has hooks for its own cells only; use sample_gradients")]
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
    weight = next(module.parameters())
    made.to(weight.device, weight.dtype).load_state_dict(module.state_dict())
    trained = {name: weight.requires_grad for name, weight in module.named_parameters()}
    for name, weight in made.named_parameters():
        weight.requires_grad_(trained[_origin(name, trained)])
    return made.train(module.training)


def _origin(name: str, names: Collection[str]) -> str:
    """Which of the weights of a layer of seqkernels a weight of Opacus' layer is, or is part of."""
    if name in names:
        return name
    layer, _, kind = name.partition(".")
    if layer.startswith("seq_bias_"):
        return layer.removeprefix("seq_")
    packed = f"in_proj_{kind}"
    return packed if packed in names else f"{layer[0]}_proj_{kind}"
