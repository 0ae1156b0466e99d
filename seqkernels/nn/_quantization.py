"""What quantization of torch gets to hear from layers that it cannot quantize."""

from __future__ import annotations

import warnings
from typing import Any


class Refusal:
    """``qconfig`` of a layer, which ``torch.ao.quantization`` gives each module that it prepares.

    ``None``, what modules get that shall stay as they are, and that types get which nobody asked for, is taken with a
    warning; anything else is an error.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        """``None`` where it was set; else there is no such attribute, and a parent's configuration counts."""
        if module is None:
            return self
        if "qconfig" in vars(module):
            return vars(module)["qconfig"]
        raise AttributeError(f"{type(module).__name__} has no qconfig")

    def __set__(self, module: Any, value: Any) -> None:
        """Take ``None``.

        Raises:
            TypeError: for all else.
        """
        name = f"seqkernels.nn.{type(module).__name__}"
        if value is not None:
            raise TypeError(
                f"qconfig: expected None, got {value}: {name} cannot be quantized; call seqkernels.revert(model) first"
                " to quantize torch's layers, or set qconfig = None on this one"
            )
        warnings.warn(f"{name} is not quantized, it stays in floating point; revert() gives torch's", stacklevel=3)
        vars(module)["qconfig"] = None

    def __delete__(self, module: Any) -> None:
        """Forget it."""
        vars(module).pop("qconfig", None)
