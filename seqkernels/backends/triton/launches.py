"""Launches whose way through Triton, which takes longer than many a kernel, is gone once.

Triton looks at every argument of a launch to find the program that was compiled for its likes. Where a caller knows
that nothing which matters for that has changed, a `Launch` goes to the program at once; and a new `Launch` finds its
program by fewer things than Triton looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Programs by all that they were compiled for, up to so many.
_programs: dict[Any, Any] = {}
_MOST_PROGRAMS = 4096


def likes(x: Any) -> Any:
    """What an argument has in common with those for which Triton has the same program, or more than that."""
    if x is None:
        return None
    kind = type(x)
    if kind is int:
        # One that is 1 is compiled in, a multiple of 16 is known to be one, and beyond 32 bits it is of another type.
        seen = 1 if x == 1 else 0 if x & 15 else 16
        return seen if -(2**31) <= x < 2**31 else seen + 32
    if kind is float:
        return float
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, tuple):
        return tuple([likes(y) for y in x])
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, tuple(x.block_shape)
    return kind, x


class Launch:
    """A kernel with its grid, constants and options, for arguments of one kind.

    All calls must have arguments of which Triton thinks the same: dtypes, ``None`` in the same places, the same
    alignment of pointers, and equal numbers but for those that the kernel is not specialized for. So a `Launch` lives
    as long as the call that makes it, or in a mapping whose keys have all of that in them.

    Args:
        kernel: whose constants are its last parameters.
        grid: programs along each axis.
        constants: of the kernel, by name.
        options: of the launch, ``num_warps`` and the like.
    """

    __slots__ = ("_constants", "_grid", "_kernel", "_options", "_run", "_values")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._constants, self._options = dict(constants), dict(options or {})
        self._values: tuple[Any, ...] = ()
        self._run: Callable[..., object] | None = None

    def __call__(self, *args: Any) -> None:
        """Launches it, on the current device and stream.

        Args:
            *args: those of the kernel before its constants.
        """
        if self._run is not None:
            self._run(*args, *self._values)
            return
        if triton.knobs.runtime.interpret:
            # It has no programs.
            self._kernel[self._grid](*args, **self._constants, **self._options)
            return
        self._values = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
        key = self._key(args)
        program, grid = _programs.get(key), (*self._grid, 1, 1)[:3]
        if program is None:
            program = self._kernel[self._grid](*args, **self._constants, **self._options)
            if len(_programs) >= _MOST_PROGRAMS:
                _programs.clear()
            _programs[key] = program
        else:
            program[grid](*args, *self._values)
        self._run = program[grid]

    def _key(self, args: tuple[Any, ...]) -> Any:
        device = triton.runtime.driver.active.get_current_device()
        kinds = [
            likes(x) & 32 if parameter.do_not_specialize and type(x) is int else likes(x)
            for parameter, x in zip(self._kernel.params, args, strict=False)
        ]
        return (self._kernel, device, self._values, *self._options.items(), *kinds)
