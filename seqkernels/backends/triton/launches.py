"""Launches whose way through Triton, which takes longer than many a kernel, is gone once.

Triton looks at every argument of a launch to find the program that was compiled for its likes. Where a caller knows
that nothing which matters for that has changed, a `Launch` goes to the program at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import triton


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
        program = self._kernel[self._grid](*args, **self._constants, **self._options)
        # The interpreter has none.
        if program is not None and not triton.knobs.runtime.interpret:
            self._values = tuple(self._constants[name] for name in self._kernel.arg_names[len(args) :])
            self._run = program[(*self._grid, 1, 1)[:3]]
