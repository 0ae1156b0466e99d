"""Positions for attention: rotary embeddings, ALiBi, and encodings that are added to the input."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cells import DTYPES, accumulate_dtype
from ..ops.rotary import rotate

_SCALINGS = (None, "linear", "dynamic", "yarn")
_FIRST_ROWS = 64


def _check_encoding_input(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {DTYPES}, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name}: expected shape (..., L, size), got {tuple(x.shape)}")


def _check_size(name: str, size: int, even: bool = False) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{name}: expected an int, got {size!r}")
    if size < 1 or (even and size % 2 != 0):
        raise ValueError(f"{name}: expected a positive{' even' if even else ''} number, got {size}")


def _check_places(positions: Tensor | None, offset: int, x: Tensor, length: int) -> None:
    """Raise unless `positions` are integers of shape (L,), or with leading dimensions of `x`, and go with `offset`."""
    if positions is None:
        if isinstance(offset, float | str | None):
            raise TypeError(f"offset: expected an int, got {offset!r}")
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        return
    if isinstance(offset, int) and offset != 0:
        raise ValueError(f"offset: only without positions, got {offset}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: expected a Tensor, got {type(positions).__name__}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected torch.int32 or torch.int64, got {positions.dtype}")
    if positions.device != x.device:
        raise ValueError(f"positions: expected on {x.device}, got {positions.device}")
    batch = positions.shape[:-1]
    full = (*x.shape[: len(batch)], length)
    fits = len(full) == positions.dim() and positions.dim() < x.dim() and positions.shape[-1] == length
    if not fits or any(have not in (1, want) for have, want in zip(batch, full, strict=False)):
        raise ValueError(
            f"positions: expected shape ({length},), or that behind leading dimensions as in {tuple(x.shape)} or 1,"
            f" got {tuple(positions.shape)}"
        )


class _Tables(nn.Module):
    """Tables of one row per position, computed in float64, kept rounded once for each device and dtype, grown by
    doubling. They are no part of the state: not in ``state_dict``, pickles and copies, and not cast by ``half()``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tables": {}}

    def _compute(self, positions: Tensor, length: Tensor | int | None) -> tuple[Tensor, ...]:
        """Float64 tables with the shape of `positions` (float64) and one more dimension.

        `length` is that of the sequence, which is asked for only where `_depends_on_length`.
        """
        raise NotImplementedError

    def _depends_on_length(self, length: int) -> bool:
        return False

    @torch.no_grad()
    def _rows(self, start: int, end: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Rows of the positions `start` to `end`."""
        # A compiled graph computes them: a table that grows between calls would be compiled for again and again.
        if torch.compiler.is_compiling() or self._depends_on_length(end):
            positions = torch.arange(start, end, device=device, dtype=torch.float64)
            return tuple(x.to(dtype) for x in self._compute(positions, end))
        found = self._tables.get((device, dtype))
        if found is None or found[0].shape[0] < end:
            size = max(_FIRST_ROWS, end, 2 * found[0].shape[0] if found is not None else 0)
            # An inference tensor could not be used in training later.
            with torch.inference_mode(False):
                positions = torch.arange(size, device=device, dtype=torch.float64)
                found = tuple(x.to(dtype) for x in self._compute(positions, None))
            if type(found[0]) is Tensor:
                self._tables[device, dtype] = found
        return tuple(x[start:end] for x in found)

    @torch.no_grad()
    def _rows_of(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Rows of the given positions."""
        length = positions.max() + 1 if positions.numel() else None
        return tuple(x.to(dtype) for x in self._compute(positions.double(), length))


class RotaryEmbedding(_Tables):
    """Rotary position embeddings: pairs of elements of queries and keys are turned by angles that grow with position.

    Pair i of position t is turned by ``t * inv_freq[i]``, ``inv_freq[i] = base ** (-2 i / dim)``, so that products of
    queries and keys depend on the distance of their positions. Sequences longer than those trained on are served by
    one of three scalings, with the formulas of Hugging Face transformers:

    * ``"linear"`` (Chen et al. 2023): every frequency is divided by `factor`.
    * ``"dynamic"`` (NTK-aware): for a length N beyond `original_max_position` P the base becomes
      ``base * (factor * N / P - (factor - 1)) ** (dim / (dim - 2))``. It depends on the length of this call alone
      (the largest position plus one), never on the calls before.
    * ``"yarn"`` (Peng et al. 2024): frequencies that turn more than `beta_fast` times within P stay, those that turn
      less than `beta_slow` times are divided by `factor`, with a ramp between; the result is multiplied by
      `attention_factor`.

    Tables are computed in float64 and kept in float32 (for float64 inputs float64) whatever the dtype of the model;
    16-bit inputs are turned in float32 and rounded once. Transformers computes angles in float32, which are off by up
    to 4e-3 at position 100,000. The tables follow the device of the inputs, grow as needed and are not in the
    ``state_dict``; the layer has no parameters.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        dim: how many elements of a head are turned, even; others behind them stay (partial rotary embedding).
        base: of the frequencies. Default: 10000.
        interleaved: pairs are neighbours (GPT-J, RoFormer) instead of element i and ``i + dim / 2`` (GPT-NeoX, Llama).
            Default: ``False``.
        scaling: ``None``, ``"linear"``, ``"dynamic"`` or ``"yarn"``.
        factor: how much longer sequences may become, at least 1; needed with a scaling.
        original_max_position: P, the length trained on; needed for ``"dynamic"`` and ``"yarn"``.
        beta_fast: of ``"yarn"``. Default: 32.
        beta_slow: of ``"yarn"``. Default: 1.
        attention_factor: of ``"yarn"``; ``0.1 ln(factor) + 1`` by default.
        truncate: of ``"yarn"``: the ends of the ramp are whole numbers. Default: ``True``.

    Raises:
        ValueError: names the argument, what it was and what is allowed.

    Example:
        >>> rope = seqkernels.nn.RotaryEmbedding(64)
        >>> q, k = rope(q, k)  # (B, H, L, 64) each
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: str | None = None,
        factor: float | None = None,
        original_max_position: int | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
    ) -> None:
        super().__init__()
        _check_size("dim", dim, even=True)
        if not 1 < base < math.inf:
            raise ValueError(f"base: expected a number above 1, got {base}")
        if scaling not in _SCALINGS:
            raise ValueError(f"scaling: expected one of {', '.join(map(repr, _SCALINGS))}, got {scaling!r}")
        if (factor is None) != (scaling is None) or (factor is not None and not 1 <= factor < math.inf):
            raise ValueError(f"factor: expected a number of at least 1 with a scaling and None without, got {factor}")
        if (original_max_position is None) == (scaling in ("dynamic", "yarn")):
            raise ValueError(
                "original_max_position: expected a positive number with scaling='dynamic' or 'yarn' and None else,"
                f" got {original_max_position}"
            )
        if original_max_position is not None:
            _check_size("original_max_position", original_max_position)
        if scaling == "dynamic" and dim == 2:
            raise ValueError("dim: expected more than 2 with scaling='dynamic', got 2")
        if not math.inf > beta_fast:
            raise ValueError(f"beta_fast: expected a number, got {beta_fast}")
        if not beta_fast > beta_slow > 0:
            raise ValueError(f"beta_slow: expected a positive number below beta_fast {beta_fast}, got {beta_slow}")
        if attention_factor is not None and (scaling != "yarn" or not 0 < attention_factor < math.inf):
            raise ValueError(f"attention_factor: expected a positive number with 'yarn', got {attention_factor}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self.scaling = scaling
        self.factor = factor
        self.original_max_position = original_max_position
        self.beta_fast = beta_fast
        self.beta_slow = beta_slow
        self.truncate = truncate
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0 if scaling == "yarn" and factor is not None else 1.0
        self.attention_factor = attention_factor

    def forward(
        self, q: Tensor, k: Tensor | None = None, positions: Tensor | None = None, offset: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn queries, and keys of the same positions.

        Args:
            q: (..., L, D), D at least ``dim``; float32, float64, bfloat16 or float16; any strides.
            k: (..., L, D') or ``None``; other sizes and leading dimensions than those of `q` are fine.
            positions: (L,), or (B, L) where B is the first dimension of `q` and `k` (any number of such leading
                dimensions), int32 or int64; ``offset``, ``offset + 1``, ... by default. The largest is not read back
                from the device.
            offset: the first position, for queries behind a cache; only without `positions`. Default: 0.

        Returns:
            `q` turned, or the pair of `q` and `k`, of their shapes and dtypes. Differentiable any number of times.

        Raises:
            ValueError, TypeError: the message names the argument, what it was and what is allowed.
        """
        self._check("q", q)
        length = q.shape[-2]
        _check_places(positions, offset, q, length)
        if k is not None:
            self._check("k", k)
            if k.shape[-2] != length or k.device != q.device or k.dtype != q.dtype:
                raise ValueError(
                    f"k: expected (..., {length}, D) of {q.dtype} on {q.device} as q, got {tuple(k.shape)} of {k.dtype}"
                    f" on {k.device}"
                )
            _check_places(positions, offset, k, length)
        dtype = accumulate_dtype(q.dtype)
        if positions is None:
            cos, sin = self._rows(offset, offset + length, q.device, dtype)
        else:
            cos, sin = self._rows_of(positions, dtype)
        return self._turn(q, cos, sin) if k is None else (self._turn(q, cos, sin), self._turn(k, cos, sin))

    def tables(
        self, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions 0 to ``length - 1``, as flash-attn's functions take them.

        Args:
            length: L; the scaling ``"dynamic"`` is that of a sequence of this length.
            dtype: of the tables. Default: float32.
            device: of the tables; torch's default device if ``None``.

        Returns:
            Cosines and sines, (L, dim / 2) each, times ``attention_factor``.
        """
        if length < 0:
            raise ValueError(f"length: expected at least 0, got {length}")
        positions = torch.arange(length, device=device, dtype=torch.float64)
        cos, sin = (x.to(dtype) for x in self._compute(positions, length))
        return cos, sin

    def extra_repr(self) -> str:
        """Settings, for the printed form."""
        text = f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}"
        return text if self.scaling is None else f"{text}, scaling={self.scaling!r}, factor={self.factor:g}"

    def _check(self, name: str, x: Any) -> None:
        _check_encoding_input(name, x)
        if x.shape[-1] < self.dim:
            raise ValueError(f"{name}: expected at least {self.dim} elements in the last dimension, got {x.shape[-1]}")

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.dim() > 2:
            shape = (*cos.shape[:-2], *(1,) * (x.dim() - cos.dim()), *cos.shape[-2:])
            cos, sin = cos.view(shape), sin.view(shape)
        return rotate(x, cos, sin, self.interleaved)

    def _depends_on_length(self, length: int) -> bool:
        return self.scaling == "dynamic" and length > (self.original_max_position or 0)

    def _compute(self, positions: Tensor, length: Tensor | int | None) -> tuple[Tensor, ...]:
        angles = positions.unsqueeze(-1) * self._frequencies(positions.device, length)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _frequencies(self, device: torch.device, length: Tensor | int | None) -> Tensor:
        """(dim / 2,) float64."""
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim
        if self.factor is None:
            return self.base**-exponents
        if self.scaling == "linear":
            return self.base**-exponents / self.factor
        trained = self.original_max_position or 0
        if self.scaling == "yarn":
            return self._yarn(self.base**-exponents, trained)
        if length is None or (not isinstance(length, Tensor) and length <= trained):
            return self.base**-exponents
        longer = length.clamp(min=trained).double() / trained if isinstance(length, Tensor) else length / trained
        growth = (self.factor * longer - (self.factor - 1)) ** (self.dim / (self.dim - 2))
        return (self.base * growth) ** -exponents

    def _yarn(self, frequencies: Tensor, trained: int) -> Tensor:
        """Whole frequencies before the ramp, divided ones behind it."""

        def place(turns: float) -> float:
            """Which pair turns so many times within the length trained on."""
            return self.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        high = high + 0.001 if low == high else high
        pairs = torch.arange(self.dim // 2, device=frequencies.device, dtype=torch.float64)
        divided = ((pairs - low) / (high - low)).clamp(0, 1)
        return frequencies * (1 - divided) + frequencies / (self.factor or 1.0) * divided


class ALiBi(nn.Module):
    """Slopes of linear biases: query i and key j of head h get ``-slopes[h] * |i - j|`` added to their score.

    The kernels compute the bias themselves: ``seqkernels.functional.attention(q, k, v, alibi_slopes=alibi.slopes)``.
    With a power of two heads, head h of H has the slope ``2 ** (-8 (h + 1) / H)``; with others, the slopes of the
    next smaller power of two P come first, then every other one of those of 2 P, as in the paper's code.

    Source: Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation", 2022.

    Args:
        num_heads: H.
        device: of the slopes.

    Attributes:
        slopes: (H,) float32, a buffer that ``half()`` and the like do not cast, not in the ``state_dict``.

    Raises:
        ValueError: `num_heads` is not positive.
        TypeError: it is not an int.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        _check_size("num_heads", num_heads)
        self.num_heads = num_heads
        slopes = torch.tensor(_slopes(num_heads), dtype=torch.float32, device=device)
        self.register_buffer("slopes", slopes, persistent=False)

    def reset_parameters(self) -> None:
        """Compute the slopes anew, where they are, or on torch's default device where that is none."""
        device = None if self.slopes.is_meta else self.slopes.device
        self.slopes = torch.tensor(_slopes(self.num_heads), dtype=torch.float32, device=device)

    def bias(self, queries: int, keys: int, bottom_right: bool = False) -> Tensor:
        """The bias as a matrix, for looking at and for other implementations of attention.

        Args:
            queries: M.
            keys: N.
            bottom_right: distances are counted from a diagonal that ends at the last query and key (the queries are
                the last of the keys) instead of beginning at the first ones. Default: ``False``.

        Returns:
            (H, M, N) float32.
        """
        for name, length in (("queries", queries), ("keys", keys)):
            if length < 0:
                raise ValueError(f"{name}: expected at least 0, got {length}")
        device = self.slopes.device
        diagonal = keys - queries if bottom_right else 0
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in (queries, keys))
        return -self.slopes[:, None, None] * (rows[:, None] + diagonal - columns).abs()

    def extra_repr(self) -> str:
        """Number of heads, for the printed form."""
        return str(self.num_heads)

    def _apply(self, fn: Any, recurse: bool = True) -> ALiBi:
        before = self.slopes
        super()._apply(fn, recurse)
        if self.slopes is not before and not self.slopes.is_meta:
            # A cast has rounded them, or ``to_empty`` left them as they happened to be.
            self.reset_parameters()
        return self


def _slopes(heads: int) -> list[float]:
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes if power == heads else slopes + _slopes(2 * power)[::2][: heads - power]


def _length_dim(x: Tensor, batch_first: bool) -> int:
    return -2 if batch_first or x.dim() == 2 else 0


def _added(x: Tensor, rows: Tensor, length_dim: int, batched: bool) -> Tensor:
    """`x` plus `rows` (L, size), or (B, ..., L, size) where `batched`, rounded once."""
    if batched:
        rows = rows.view(*rows.shape[:-2], *(1,) * (x.dim() - rows.dim()), *rows.shape[-2:])
    elif length_dim == 0:
        rows = rows.view(rows.shape[0], *(1,) * (x.dim() - 2), rows.shape[1])
    return (x + rows).to(x.dtype)


class SinusoidalEncoding(_Tables):
    """Adds sines and cosines of the position to the input.

    Element 2 i of position t is ``sin(t / base ** (2 i / dim))`` and element ``2 i + 1`` its cosine. The table is
    computed in float64, kept in float32 (float64 for float64 inputs), grows as needed and is not in the
    ``state_dict``; the layer has no parameters.

    Source: Vaswani et al., "Attention Is All You Need", 2017.

    Args:
        dim: size of the input; may be odd.
        base: Default: 10000.
        batch_first: the input is (B, L, dim) instead of (L, B, dim). Default: ``True``.

    Raises:
        ValueError: names the argument, what it was and what is allowed.
    """

    def __init__(self, dim: int, base: float = 10000.0, batch_first: bool = True) -> None:
        super().__init__()
        _check_size("dim", dim)
        if not base > 0:
            raise ValueError(f"base: expected a positive number, got {base}")
        self.dim = dim
        self.base = base
        self.batch_first = batch_first

    def forward(self, x: Tensor, positions: Tensor | None = None, offset: int = 0) -> Tensor:
        """The input with the encoding added.

        Args:
            x: (..., L, dim), without `batch_first` (L, ..., dim).
            positions: (L,), or with `batch_first` also (B, L), int32 or int64; ``offset``, ``offset + 1``, ... by
                default.
            offset: the first position; only without `positions`. Default: 0.

        Returns:
            Shape and dtype of `x`; 16-bit sums are rounded once.

        Raises:
            ValueError, TypeError: the message names the argument, what it was and what is allowed.
        """
        length_dim = _check_encoded(x, self.dim, positions, offset, self.batch_first)
        dtype = accumulate_dtype(x.dtype)
        if positions is None:
            (rows,) = self._rows(offset, offset + x.shape[length_dim], x.device, dtype)
        else:
            (rows,) = self._rows_of(positions, dtype)
        return _added(x, rows, length_dim, positions is not None and positions.dim() > 1)

    def extra_repr(self) -> str:
        """Settings, for the printed form."""
        return f"{self.dim}, base={self.base:g}, batch_first={self.batch_first}"

    def _compute(self, positions: Tensor, length: Tensor | int | None) -> tuple[Tensor, ...]:
        exponents = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float64) / self.dim
        angles = positions.unsqueeze(-1) * self.base**-exponents
        return (torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., : self.dim],)


class LearnedEncoding(nn.Module):
    """Adds a learned vector per position to the input, as BERT and GPT-2 do.

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning", 2017.

    Args:
        max_length: how many positions there are.
        dim: size of the input.
        batch_first: the input is (B, L, dim) instead of (L, B, dim). Default: ``True``.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        weight: (max_length, dim), drawn with a standard deviation of 0.02.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        max_length: int,
        dim: int,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_size("max_length", max_length)
        _check_size("dim", dim)
        self.max_length = max_length
        self.dim = dim
        self.batch_first = batch_first
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor | None = None, offset: int = 0) -> Tensor:
        """The input with the encoding added. Arguments, result and errors as of `SinusoidalEncoding`.

        Raises:
            ValueError: also where the positions after `offset` end behind ``max_length``.
            IndexError: `positions` (on the CPU) holds others than 0 to ``max_length - 1``.
        """
        length_dim = _check_encoded(x, self.dim, positions, offset, self.batch_first)
        if positions is None:
            end = offset + x.shape[length_dim]
            if end > self.max_length:
                raise ValueError(f"x: expected at most {self.max_length} positions, got {end} (offset {offset})")
            rows = self.weight[offset:end]
        else:
            rows = F.embedding(positions, self.weight)
        return _added(x, rows, length_dim, positions is not None and positions.dim() > 1)

    def extra_repr(self) -> str:
        """Settings, for the printed form."""
        return f"{self.max_length}, {self.dim}, batch_first={self.batch_first}"


def _check_encoded(x: Any, dim: int, positions: Tensor | None, offset: int, batch_first: bool) -> int:
    """Raise for a wrong argument; the dimension of `x` that is its length."""
    _check_encoding_input("x", x)
    if x.shape[-1] != dim:
        raise ValueError(f"x: expected {dim} elements in the last dimension, got {tuple(x.shape)}")
    length_dim = _length_dim(x, batch_first)
    if positions is not None and isinstance(positions, Tensor) and not batch_first and positions.dim() > 1:
        raise ValueError(f"positions: expected one dimension without batch_first, got {tuple(positions.shape)}")
    _check_places(positions, offset, x, x.shape[length_dim])
    return length_dim
