# ruff: noqa: N999
"""The compiled CUDA kernels of seqkernels.

As pybind11-stubgen makes it, with integers and tuples in short; ``tests/test_stubs.py`` holds it to the module.
"""

import typing

import torch

class Plan:
    """How a recurrence is laid out over blocks."""
    @property
    def backward(self) -> bool: ...
    @property
    def batches(self) -> int: ...
    @property
    def blocks(self) -> int:
        """Of a team."""
    @property
    def column_warps(self) -> int: ...
    @property
    def columns(self) -> int:
        """Of tiles, of a warp."""
    @property
    def exchange_bytes(self) -> int:
        """Bytes of memory that blocks exchange through."""
    @property
    def flags(self) -> int:
        """Their number."""
    @property
    def norms(self) -> int:
        """Layer norms in a step."""
    @property
    def row_warps(self) -> int: ...
    @property
    def rows(self) -> int:
        """Rows of the batch of a team."""
    @property
    def shared_memory(self) -> int:
        """Bytes of a block."""
    @property
    def slices(self) -> int:
        """Teams."""
    @property
    def stages(self) -> int:
        """Steps whose operands are on their way or in use."""
    @property
    def tail_tiles(self) -> int:
        """Tiles of a warp that are in shared memory."""
    @property
    def tall(self) -> bool:
        """Whether warps hold 8 by 4 tiles in place of 4 by 8."""
    @property
    def tier(self) -> str: ...
    @property
    def tile_rows_of_warp(self) -> int:
        """In each batch."""
    @property
    def units(self) -> int:
        """Hidden units of a block."""

class Steps:
    """The launches of a recurrence that has one for each step."""
    def __init__(
        self,
        cell: str,
        product: str,
        backward: bool,
        hidden: int,
        batch: int,
        space: torch.Tensor,
        operand: torch.Tensor,
        product_tensor: torch.Tensor,
    ) -> None:
        """Memory: space (SPACE_BYTES) uint8; operand (B, H) and product_tensor (B, G*H) float32, or in a backward
        pass (B, G*H) and (B, H). They have to outlive this.
        """
    def begin_backward(self, job: tuple[typing.Any, ...]) -> None:
        """Before the steps of a call: a job of recurrence_backward."""
    def begin_forward(self, job: tuple[typing.Any, ...]) -> None:
        """Before the steps of a call: a job of recurrence_forward, whose first h goes into the operand."""
    def step(self, turn: int) -> None:
        """The pass of a step, after its product (forward), or before it; back there is one more at the end. Their
        turns are 0, 1, 0, ...
        """

def build_info() -> dict[str, str]:
    """How this module was compiled."""

def device(number: int) -> dict[str, int]:
    """What plans depend on, of a device."""

def device_error() -> str | None:
    """Why there is no device for these kernels, in CUDA's words; None where there is."""

def make_stream(device: int) -> int:
    """A new stream of a device, which lives as long as the process."""

def plan(
    tier: str,
    cell: str,
    product: str,
    backward: bool,
    hidden: int,
    batch: int,
    units: int,
    rows: int,
    norm_h: bool = False,
    norm_c: bool = False,
) -> Plan:
    """The plan of a call with given sizes, on no device yet."""

def recurrence_backward(plan: Plan, *args: typing.Any) -> None:
    """A launch of jobs, of each of which back through step `first` and those before it in the loop: into of_x,
    of_u, of_product, sums and carry.
    """

def recurrence_forward(plan: Plan, *args: typing.Any) -> None:
    """A launch of jobs, of each of which step `first` and those that follow it: into states, reserve unless None,
    and carry.
    """

def work(first: torch.Tensor, second: torch.Tensor | None = None) -> tuple[int, int]:
    """The number of the device and the stream that kernels of a call with these tensors are launched on."""

MOST_JOBS: int
SPACE_BYTES: int
