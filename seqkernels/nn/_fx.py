"""Layers in graphs of ``torch.fx``: one call of a module each, as those of ``torch.nn`` are to its tracer."""

from __future__ import annotations

from typing import Any

from torch.fx import Proxy
from torch.nn import Module


def call(input: Proxy, module: Module, *given: Any, **options: Any) -> Any:
    """What stands for the result of a module in the graph that `input` is traced into.

    Args:
        input: says which tracer is at work.
        module: the layer, one of those in the model that is traced.
        given: its arguments.
        options: its keyword arguments; those that are ``None`` or ``False`` are left out.
    """
    named = {name: value for name, value in options.items() if value is not None and value is not False}
    path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", path, given, named)
