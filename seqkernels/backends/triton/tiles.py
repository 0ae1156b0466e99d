"""A user's own tiles: rows that `tune` measured on a device, which are taken in place of those that are shipped.

They lie in a file for each kind of device beside Triton's cache, in ``~/.triton/seqkernels``; ``TRITON_HOME`` moves
both. A process reads it once, where `ignore` does not keep it from that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton

from ..._version import __version__

#: Of the file; another one is ignored.
FORMAT = 1

#: Names of dtypes in the names of rows.
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

#: What is chosen of a tile of attention, and of one of a sequence of a recurrence, in the order of its numbers.
ATTENTION = ("rows", "keys", "warps", "stages")
RECURRENCE = ("rows", "columns", "depth", "ahead", "warps")

Tile = tuple[int, ...]
Rows = dict[str, Tile]


def _kind(dtype: torch.dtype, precision: str) -> str:
    return TYPES[dtype] if precision == "ieee" else precision


def attention_row(kernel: str, dtype: torch.dtype, size: int, precision: str = "ieee") -> str:
    """The name of a row: ``"forward of many terms bf16 D=128"``.

    Args:
        kernel: a row of the tables of `configs`.
        dtype: of q, k and v.
        size: the larger one of D and Dv; what counts is which of 64, 128, 256 or 512 it is not larger than.
        precision: of products of float32 matrices.
    """
    return f"{kernel} {_kind(dtype, precision)} D={max(64, 1 << (size - 1).bit_length())}"


def recurrence_row(kernel: str, cell: str, dtype: torch.dtype, hidden: int, precision: str = "ieee") -> str:
    """The name of a row: ``"recurrence_forward lstm bf16 H=256"``.

    Args:
        kernel: ``"forward"`` or ``"backward"``.
        cell: a key of `seqkernels.cells.CELLS`.
        dtype: of the input.
        hidden: H, rounded up to a power of 2.
        precision: of products of float32 matrices.
    """
    return f"recurrence_{kernel} {cell} {_kind(dtype, precision)} H={max(16, 1 << (hidden - 1).bit_length())}"


def _length(row: str) -> int:
    return len(RECURRENCE if row.startswith("recurrence_") else ATTENTION)


def device_name(device: torch.device) -> str:
    """Name and compute capability of a CUDA device; ``"interpreter"`` for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def folder() -> Path:
    """Where the files are."""
    return Path(triton.knobs.cache.home_dir, ".triton", "seqkernels")


def path_of(name: str) -> Path:
    """The file of the devices with a name, whether it is there or not."""
    return folder() / f"triton-{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.json"


def _why_not(found: object) -> str | None:
    """What is wrong with the content of a file, if something is."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"it does not have format {FORMAT} of the table"
    if found.get("triton") != triton.__version__:
        return f"it was measured with triton {found.get('triton')}, and this is {triton.__version__}"
    rows = found.get("rows")
    if not isinstance(rows, dict):
        return "it has no rows"
    for row, tile in rows.items():
        numbers = isinstance(tile, list) and all(type(n) is int and n >= 0 for n in tile)
        if not numbers or len(tile) != _length(row):
            return f"its row {row!r} is {tile!r}, not {_length(row)} integers"
    return None


def read(path: Path) -> Rows:
    """The rows of a file; none where there is no file, or where it is ignored, which is warned of."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why: str | None = f"it cannot be read: {error}"
    else:
        why = _why_not(found)
    if why is not None:
        warnings.warn(
            f"seqkernels ignores the tiles in {path}: {why}; python -m seqkernels tune measures them anew", stacklevel=2
        )
        return {}
    return {row: tuple(tile) for row, tile in found["rows"].items()}


def write(path: Path, device: str, rows: Mapping[str, Tile]) -> None:
    """Replaces a file, at once for those who read it.

    Args:
        path: of the file; its folder is made where there is none.
        device: the name of the device.
        rows: all that shall be in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT, "seqkernels": __version__, "triton": triton.__version__, "device": device}
    lines = ",\n".join(f"  {json.dumps(row)}: {json.dumps(list(rows[row]))}" for row in sorted(rows))
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": {{\n{lines}\n }}\n}}\n'
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


_own: dict[torch.device, Rows] = {}
_ignored = False
_changes = 0


def _rows_of(device: torch.device) -> Rows:
    rows = _own.get(device)
    if rows is None:
        rows = _own[device] = {} if _ignored else read(path_of(device_name(device)))
    return rows


def changes() -> int:
    """How often tiles may have become others in this process: what was made of them before is out of date."""
    return _changes


def own(device: torch.device | None, name: Callable[..., str], *key: object) -> Tile | None:
    """The user's tile of a row, if there is one.

    Args:
        device: of the call; ``None`` for the tiles that are shipped.
        name: `attention_row` or `recurrence_row`.
        key: its arguments.
    """
    rows = None if device is None else _rows_of(device)
    # Most users have none, and then names cost nothing.
    return rows.get(name(*key)) if rows else None


def forget() -> None:
    """Lets the next call read the files anew."""
    global _changes
    _own.clear()
    _changes += 1


def ignore(ignored: bool = True) -> None:
    """Lets this process take the tiles that are shipped alone, as benchmarks and tests do.

    Args:
        ignored: ``False`` to have the user's own ones again.
    """
    global _ignored
    _ignored = ignored
    forget()


@contextlib.contextmanager
def trying(device: torch.device, row: str, tile: Tile | None) -> Iterator[None]:
    """Calls inside the block take a tile for a row.

    Args:
        device: of the calls.
        row: its name.
        tile: what to take; ``None`` for what is shipped.
    """
    global _changes
    rows = _rows_of(device)
    before = rows.pop(row, None)
    if tile is not None:
        rows[row] = tile
    _changes += 1
    try:
        yield
    finally:
        _changes += 1
        rows.pop(row, None)
        if before is not None:
            rows[row] = before
