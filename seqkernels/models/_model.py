"""What the models share: a configuration, whose layers to use, and one file that holds both and the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import numbers
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from .. import nn as seqkernels_nn

if TYPE_CHECKING:
    from typing_extensions import Self

Attention = Callable[..., Tensor]
#: The state of a recurrent layer, (L, B, H): h, or h and c of an LSTM.
State = Tensor | tuple[Tensor, ...]
CELLS = ("rnn", "lstm", "gru")
_ATTENTION: dict[str, Attention] = {
    "torch.nn": nn.functional.scaled_dot_product_attention,
    "seqkernels.nn": functional.scaled_dot_product_attention,
}


def attention_of(layers: ModuleType) -> Attention:
    """``scaled_dot_product_attention`` of ``torch.nn`` or of ``seqkernels.nn``.

    Raises:
        ValueError: `layers` is neither.
    """
    name = getattr(layers, "__name__", repr(layers))
    if name not in _ATTENTION:
        raise ValueError(f"layers: expected torch.nn or seqkernels.nn, got {name}")
    return _ATTENTION[name]


def check_tensor(x: Any, name: str) -> None:
    """Raise unless `x` is a tensor.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")


def check_tokens(tokens: Tensor, name: str = "tokens") -> None:
    """Raise unless `tokens` are (B, M) of int64 or int32.

    Raises:
        ValueError: they have not two dimensions.
        TypeError: they are no tensor, or not integers.
    """
    check_tensor(tokens, name)
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected (B, M), got {tuple(tokens.shape)}")
    check_integers(tokens, name)


def check_integers(x: Tensor, name: str) -> None:
    """Raise unless `x` is a tensor of int64 or int32.

    Raises:
        TypeError: it is not.
    """
    check_tensor(x, name)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int64 or int32, got {x.dtype}")


def integer(value: Any, name: str) -> int:
    """`value`, of Python, of NumPy or symbolic, as an int.

    Raises:
        TypeError: it is no integer, or a boolean.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def number(value: Any, name: str) -> float:
    """`value`, of Python, of NumPy or symbolic, as a float.

    Raises:
        TypeError: it is no number, or a boolean.
    """
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_ints(config: Any, *names: str) -> None:
    """Raise unless attributes are integers, of Python alone: a file holds a configuration as JSON.

    Raises:
        TypeError: one is not, or a boolean.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")


def check_sizes(config: Any, *names: str) -> None:
    """Raise unless attributes are positive integers.

    Raises:
        TypeError: one is no integer.
        ValueError: one is not positive.
    """
    check_ints(config, *names)
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a positive number, got {getattr(config, name)}")


def check_dropout(dropout: float) -> None:
    """Raise unless `dropout` is a probability below 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout: expected a number, got {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise unless an attribute is one of `choices`.

    Raises:
        TypeError: it is no string.
        ValueError: it is another one.
    """
    value = getattr(config, name)
    text = f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}"
    if not isinstance(value, str):
        raise TypeError(text)
    if value not in choices:
        raise ValueError(text)


def rows_of(state: State, rows: Tensor) -> State:
    """Rows of the batch of a recurrent state, in the order of the indices (int64)."""
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return tuple(part.index_select(1, rows) for part in state)


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write to. It becomes `path` where all goes well, and else there is nothing of it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Model(nn.Module):
    """Base of the models: written once, told whose layers to use, saved and loaded as one safetensors file.

    Parameters are created in the same order whatever the layers, so that the same seed gives the same weights, and
    their names are the same, so that a ``state_dict`` and a file move both ways.

    Args:
        config: an instance of the class's ``Config``.
        layers: ``seqkernels.nn`` or ``torch.nn``: whose layers, and whose attention, to use.

    Attributes:
        Config: the dataclass that holds the sizes of such a model.
        config: the sizes of this one.

    Raises:
        TypeError: `config` is of another class.
        ValueError: `layers` is neither.
    """

    Config: ClassVar[type[Any]]
    config: Any

    def __init__(self, config: Any, layers: ModuleType = seqkernels_nn) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"config: expected a {self.Config.__name__}, got {type(config).__name__}")
        attention_of(layers)
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any, layers: ModuleType = seqkernels_nn) -> Self:
        """A model with new weights.

        Args:
            config: a `Config`, or a mapping with its fields, as from a JSON file.
            layers: as of the class.

        Raises:
            ValueError: a field is unknown or missing; or the configuration says what else.
        """
        return cls(cls._config_of(config) if isinstance(config, Mapping) else config, layers)

    @classmethod
    def _config_of(cls, mapping: Any) -> Any:
        if not isinstance(mapping, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(mapping).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls.Config)}
        unknown = sorted(map(str, set(mapping) - set(fields)))
        if unknown:
            raise ValueError(f"config: expected fields among {', '.join(fields)}, got {', '.join(unknown)}")
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if needed - set(mapping):
            raise ValueError(f"config: {', '.join(sorted(needed - set(mapping)))} is missing")
        return cls.Config(**mapping)

    def save(self, path: str | Path) -> None:
        """Write weights and configuration as one safetensors file, whose metadata name the model and its sizes.

        The file is complete or not there: it is written beside its place and then moved.

        Args:
            path: of the file; its folder has to be there.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file, _, _ = _safetensors()
        metadata = {"model": type(self).__name__, "config": json.dumps(dataclasses.asdict(self.config))}
        with whole(path) as partial:
            save_file({name: x.detach().contiguous() for name, x in self.state_dict().items()}, str(partial), metadata)

    @classmethod
    def load(cls, path: str | Path, layers: ModuleType = seqkernels_nn, device: torch.device | str = "cpu") -> Self:
        """The model that `save` wrote, with either kind of layers.

        Args:
            path: of the file.
            layers: as of the class.
            device: where its parameters shall be. Default: the CPU.

        Returns:
            A model in training mode, with the dtypes of the file.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the file has no such model, or is none of safetensors.
            RuntimeError: its weights are not those of its configuration; or there is no such device.
        """
        _, open_file, unreadable = _safetensors()
        attention_of(layers)
        expected, device = f"path: expected a file of a {cls.__name__}, got", torch.device(device)
        try:
            opened = open_file(str(path), framework="pt", device=str(device))
        except unreadable as error:
            raise ValueError(f"{expected} {path}, which is no safetensors file: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if "model" not in metadata or "config" not in metadata:
                raise ValueError(f"{expected} {path}, whose metadata name no model")
            if metadata["model"] != cls.__name__:
                raise ValueError(f"{expected} {path}, one of a {metadata['model']}")
            try:
                config = cls._config_of(json.loads(metadata["config"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{expected} {path}, whose configuration is none: {error}") from error
            # Copies: the file's own memory is mapped, one block for all, and not aligned as torch aligns tensors.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        # The weights that it begins with are drawn for nothing.
        with torch.random.fork_rng(devices=[]):
            model = cls(config, layers).to(device)
        model.load_state_dict(weights, assign=True)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                # Into one block, as cuDNN wants it.
                module.flatten_parameters()
        return model


def _safetensors() -> tuple[Any, Any, Any]:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("files of models need safetensors: pip install 'seqkernels[examples]'") from error
    return save_file, safe_open, SafetensorError
