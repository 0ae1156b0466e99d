"""The training loop: it learns in any precision, and goes on from a file with the same bits."""

from __future__ import annotations

import builtins
import dataclasses
import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.models import (
    BERT,
    GPT,
    BERTConfig,
    Forecaster,
    ForecasterConfig,
    GPTConfig,
    RecurrentLM,
    RecurrentLMConfig,
    Seq2Seq,
    Seq2SeqConfig,
    Training,
)
from seqkernels.testing import threads

GPT_CONFIG = GPTConfig(23, 16, 16, 2, 2, dropout=0.1, positions="alibi")
LM_CONFIG = RecurrentLMConfig(23, 16, cell="gru", dropout=0.1)
PAIRS_CONFIG = Seq2SeqConfig(23, 8, 12)
CONFIGS: dict[str, Any] = {
    "gpt": GPT_CONFIG,
    "recurrent": LM_CONFIG,
    "seq2seq": PAIRS_CONFIG,
    "bert": BERTConfig(23, 16, 16, 1, 2, dropout=0.1),
    "forecaster": ForecasterConfig(23, cell="lstm"),
}
MODELS = {
    GPTConfig: GPT,
    RecurrentLMConfig: RecurrentLM,
    Seq2SeqConfig: Seq2Seq,
    BERTConfig: BERT,
    ForecasterConfig: Forecaster,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def batches(generator: torch.Generator) -> Tensor:
    """Pieces of the alphabet."""
    return (torch.randint(23, (4, 1), generator=generator) + torch.arange(12)) % 23


def loss_of(model: Any, batch: Tensor) -> Tensor:
    if isinstance(model, Forecaster):
        series = torch.nn.functional.one_hot(batch, 23).float()
        return (model(series[:, :-1])[:, :, 0] - series[:, 1:]).square().sum(-1).mean()
    sources = (batch, torch.full((4,), 12)) if isinstance(model, Seq2Seq) else ()
    logits = model(*sources, batch[:, :-1])
    logits = logits[0] if isinstance(model, RecurrentLM) else logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def make(config: Any, layers: ModuleType = seqkernels.nn, seed: int = 0, **options: Any) -> Training:
    torch.manual_seed(seed)
    model = MODELS[type(config)](config, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(step / 20)) / 2)
    return Training(model, optimizer, loss_of, batches, schedule=schedule, clip=1.0, seed=seed, **options)


def bits(training: Training) -> list[Any]:
    """Everything that tells two trainings apart."""
    weights = [x.clone() for x in training.model.state_dict().values()]
    moments = [x.clone() for part in training.optimizer.state.values() for x in part.values()]
    rates = [group["lr"] for group in training.optimizer.param_groups]
    return [*weights, *moments, torch.tensor(rates), torch.tensor(training.losses), training.generator.get_state()]


@pytest.mark.parametrize("layers", [torch.nn, seqkernels.nn], ids=lambda layers: layers.__name__)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gpt", None),
        ("gpt", torch.bfloat16),
        ("recurrent", torch.float16),
        ("seq2seq", torch.bfloat16),
        ("bert", torch.bfloat16),
        ("forecaster", torch.bfloat16),
    ],
)
def test_a_training_that_goes_on_is_one_that_never_stopped(
    name: str, dtype: torch.dtype | None, layers: ModuleType, tmp_path: Path
) -> None:
    path, config = tmp_path / "training.pt", CONFIGS[name]
    whole = make(config, layers, dtype=dtype)
    whole.run(9)
    first = make(config, layers, dtype=dtype)
    assert first.run(4) == whole.losses[:4]
    first.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["training.pt"]
    second = make(config, layers, seed=7, dtype=dtype)
    second.run(2)
    second.resume(path)
    assert second.steps == 4
    assert second.run(5) == whole.losses[4:]
    for mine, its in zip(bits(second), bits(whole), strict=True):
        assert torch.equal(mine, its)
    assert second.scaler.state_dict() == whole.scaler.state_dict()


@pytest.mark.parametrize("layers", [torch.nn, seqkernels.nn], ids=lambda layers: layers.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_in_bfloat16(name: str, layers: ModuleType) -> None:
    losses = make(CONFIGS[name], layers, dtype=torch.bfloat16).run(40)
    assert len(losses) == 40
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_other_layers_go_on_too(tmp_path: Path) -> None:
    theirs, ours = make(LM_CONFIG, torch.nn), make(LM_CONFIG, seqkernels.nn, seed=1)
    theirs.run(3)
    theirs.save(tmp_path / "training.pt")
    ours.resume(tmp_path / "training.pt")
    for mine, its in zip(bits(ours), bits(theirs), strict=True):
        assert torch.equal(mine, its)


def test_the_bar_counts_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.update(disable=False, file=io.StringIO())
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    training = make(LM_CONFIG)
    training.run(25)
    (bar,) = bars
    assert bar.total == bar.n == 25
    assert "loss=" in bar.postfix
    training.run(2, progress=False)
    assert len(bars) == 1


def test_clipping_schedules_and_overflows() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    sizes = iter([3.0, 1e38, 3.0])

    def loss(model: torch.nn.Linear, batch: float) -> Tensor:
        return model.weight.sum() * batch

    training = Training(
        model, optimizer, loss, lambda generator: next(sizes), schedule=schedule, dtype=torch.float16, clip=0.25
    )
    seen = [model.weight.item()]
    for _ in range(3):
        training.run(1, progress=False)
        seen.append(model.weight.item())
    # The gradient is clipped to 0.25, and where it overflows there is no step, nor one of the schedule.
    assert seen[0] - seen[1] == pytest.approx(0.25, rel=1e-5)
    assert seen[2] == seen[1]
    assert seen[2] - seen[3] == pytest.approx(0.125, rel=1e-5)
    assert training.scaler.get_scale() == 2.0**15


def other(**options: Any) -> Callable[[], Training]:
    config = options.pop("config", LM_CONFIG)
    return lambda: make(config, **options)


@pytest.mark.parametrize(
    ("make_other", "message"),
    [
        (other(config=GPT_CONFIG), "model 'GPT' instead of 'RecurrentLM'"),
        (other(config=RecurrentLMConfig(23, 16, cell="gru")), "config.dropout 0.0 instead of 0.1"),
        (other(config=RecurrentLMConfig(23, 16, 8, cell="gru", dropout=0.1)), "config.hidden_size 8 instead of None"),
        (other(dtype=torch.bfloat16), "dtype 'torch.bfloat16' instead of 'None'"),
    ],
)
def test_files_of_other_trainings_are_refused(make_other: Callable[[], Training], message: str, tmp_path: Path) -> None:
    make_other().save(tmp_path / "training.pt")
    training = make(LM_CONFIG)
    training.run(1)
    before = bits(training)
    with pytest.raises(ValueError, match=f"^path: expected a training like this one, got one with .*{message}"):
        training.resume(tmp_path / "training.pt")
    for mine, its in zip(bits(training), before, strict=True):
        assert torch.equal(mine, its)


class Noted(torch.nn.Module):
    """A model with statistics, state of its own kind, and a configuration that is no plain data."""

    @dataclasses.dataclass
    class Config:
        where: Path = Path("here")
        unknown: float = math.nan

    def __init__(self) -> None:
        super().__init__()
        self.config, self.notes = self.Config(), {"seen": 0}
        self.norm, self.out = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)

    def get_extra_state(self) -> dict[str, int]:
        return self.notes

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.notes = state

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def noted(stop: list[bool], parts: int = 2) -> Training:
    torch.manual_seed(0)
    model = Noted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(parts)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, constant, list(range(2, parts + 1)))

    def loss(model: Noted, x: Tensor) -> Tensor:
        value = model(x).square().mean()
        if stop and stop.pop():
            raise KeyboardInterrupt
        return value

    return Training(model, optimizer, loss, lambda generator: torch.randn(4, 2, generator=generator), schedule=schedule)


def test_statistics_and_configurations_of_any_kind(tmp_path: Path) -> None:
    whole, training = noted([]), noted([True])
    whole.run(4, progress=False)
    with pytest.raises(KeyboardInterrupt):
        training.run(1, progress=False)
    assert training.model.norm.num_batches_tracked == 0
    training.run(2, progress=False)
    training.save(tmp_path / "training.pt")
    other = noted([])
    other.resume(tmp_path / "training.pt")
    other.run(2, progress=False)
    assert other.losses == whole.losses
    assert torch.equal(other.model.norm.running_var, whole.model.norm.running_var)
    more = noted([], parts=3)
    before = more.model.out.weight.clone()
    with pytest.raises(ValueError, match=r"schedule 'SequentialLR\(ConstantLR, ConstantLR\)' instead of"):
        more.resume(tmp_path / "training.pt")
    assert torch.equal(more.model.out.weight, before)
    torch.save(training.model.out, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"path: expected a file that Training\.save wrote"):
        more.resume(tmp_path / "module.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("text", "text")
    with pytest.raises(ValueError, match=r"path: expected a file that Training\.save wrote"):
        more.resume(tmp_path / "other.zip")
    with pytest.raises(ValueError, match="optimizer: expected one whose step needs no closure, got LBFGS"):
        Training(more.model, torch.optim.LBFGS(more.model.parameters()), more.loss, more.batches)


def test_files_of_other_optimizers_and_things_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    Training(model, optimizer, loss_of, batches).save(tmp_path / "training.pt")
    other = Training(model, torch.optim.Adam(model.parameters()), loss_of, batches)
    with pytest.raises(ValueError, match="optimizer 'SGD' instead of 'Adam'"):
        other.resume(tmp_path / "training.pt")
    wider = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight 'torch.float32 \(2, 2\)' instead of 'torch.float32 \(2, 3\)'"):
        Training(wider, torch.optim.SGD(wider.parameters()), loss_of, batches).resume(tmp_path / "training.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"path: expected a file that Training\.save wrote"):
        other.resume(tmp_path / "weights.pt")
    for text in (b"", b"weights", torch.arange(99).numpy().tobytes()):
        (tmp_path / "weights.pt").write_bytes(text)
        with pytest.raises(ValueError, match=r"path: expected a file that Training\.save wrote"):
            other.resume(tmp_path / "weights.pt")
    torch.save({"training": 3}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"path: expected a file that Training\.save wrote"):
        other.resume(tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError):
        other.resume(tmp_path / "none.pt")


def test_files_of_another_order_of_parameters_are_refused(tmp_path: Path) -> None:
    """Momenta of equal shapes would change places."""

    def training(names: list[str]) -> Training:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], momentum=0.5)
        return Training(model, optimizer, lambda model, x: model(x).square().sum(), lambda _: torch.ones(1, 2))

    first = training(["0.weight", "1.weight"])
    first.run(2, progress=False)
    first.save(tmp_path / "training.pt")
    other = training(["1.weight", "0.weight"])
    said = "parameters 1.weight, 0.weight in this order, got one with 0.weight, 1.weight"
    with pytest.raises(ValueError, match=f"^path: expected an optimizer with the {said}$"):
        other.resume(tmp_path / "training.pt")
    training(["0.weight", "1.weight"]).resume(tmp_path / "training.pt")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for save in (make(GPT_CONFIG).save, make(GPT_CONFIG).model.save):
        with pytest.raises(OSError, match="folder"):
            save(tmp_path / "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_of_other_groups_of_parameters_are_refused(dtype: torch.dtype | None, tmp_path: Path) -> None:
    def training(*groups: slice) -> Training:
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD([{"params": parameters[group]} for group in groups], momentum=0.5)
        return Training(
            model, optimizer, lambda model, x: model(x).square().sum(), lambda _: torch.ones(1, 2), dtype=dtype
        )

    path = tmp_path / "training.pt"
    first = training(slice(3), slice(3, 4))
    first.run(2, progress=False)
    first.save(path)
    for groups, sizes in (((slice(4),), [4]), ((slice(2), slice(2, 4)), [2, 2])):
        other = training(*groups)
        other.run(1, progress=False)
        before = bits(other)
        message = f"path: expected a training like this one, got one with param_groups [3, 1] instead of {sizes}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            other.resume(path)
        for mine, its in zip(bits(other), before, strict=True):
            assert torch.equal(mine, its)
    same = training(slice(3), slice(3, 4))
    same.resume(path)
    assert same.losses == first.losses


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make(LM_CONFIG)
    training.save(tmp_path / "training.pt")
    before = (tmp_path / "training.pt").read_bytes()

    def stop(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(OSError, match="no space"):
        training.save(tmp_path / "training.pt")
    assert (tmp_path / "training.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["batches", "loss", "clipping"])
def test_a_step_that_was_stopped_is_taken_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, training = (make(LM_CONFIG, dtype=torch.float16) for _ in range(2))
    whole.run(6, progress=False)
    torch.manual_seed(0)
    RecurrentLM(LM_CONFIG)  # the numbers that `make` has drawn from torch's generator
    training.run(3, progress=False)
    places = {
        "batches": (training, "batches"),
        "loss": (training, "loss"),
        "clipping": (torch.nn.utils, "clip_grad_norm_"),
    }
    place, name = places[where]
    original = getattr(place, name)

    def stop(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop)
        with pytest.raises(KeyboardInterrupt):
            training.run(2, progress=False)
    assert training.steps == 3
    training.run(3, progress=False)
    for mine, its in zip(bits(training), bits(whole), strict=True):
        assert torch.equal(mine, its)


def test_losses_are_there_after_an_error() -> None:
    training = make(LM_CONFIG)

    def some(generator: torch.Generator) -> Tensor:
        if generator.initial_seed() and len(seen) == 3:
            raise RuntimeError("the end")
        seen.append(1)
        return batches(generator)

    seen: list[int] = []
    training.batches = some
    training.generator.manual_seed(1)
    with pytest.raises(RuntimeError, match="the end"):
        training.run(9)
    assert training.steps == 3


def test_the_bar_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    training = make(LM_CONFIG)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'seqkernels\[examples\]', or progress=False"):
        training.run(1)
    assert len(training.run(1, progress=False)) == 1


def test_bad_arguments() -> None:
    model = torch.nn.Linear(2, 2)
    arguments = model, torch.optim.SGD(model.parameters()), lambda model, batch: model(batch), lambda _: torch.ones(2)
    with pytest.raises(ValueError, match=r"dtype: expected None, .* got torch\.float32"):
        Training(*arguments, dtype=torch.float32)
    with pytest.raises(ValueError, match="clip: expected a positive number, got 0"):
        Training(*arguments, clip=0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(arguments[1])
    with pytest.raises(ValueError, match="schedule: expected one that needs no metric, got ReduceLROnPlateau"):
        Training(*arguments, schedule=plateau)
    another = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1)
    with pytest.raises(ValueError, match="schedule: expected one of this optimizer, got one of another"):
        Training(*arguments, schedule=another)
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        Training(*arguments).run(-1)
    with pytest.raises(ValueError, match=r"loss: expected one number, got \(2,\)"):
        Training(*arguments).run(1)
    for value, kind in ((None, "NoneType"), (0.5, "float")):
        training = Training(*arguments[:2], lambda model, batch, value=value: value, arguments[3])
        with pytest.raises(TypeError, match=f"loss: expected a Tensor, got {kind}"):
            training.run(1)
        assert training.steps == 0
    with pytest.raises(ValueError, match="model: expected one with parameters, got a ReLU without"):
        Training(torch.nn.ReLU(), *arguments[1:])
    with pytest.raises(TypeError, match="model: expected a Module, got function"):
        Training(loss_of, *arguments[1:])
    with pytest.raises(TypeError, match="clip: expected a number, got '1'"):
        Training(*arguments, clip="1")
    with pytest.raises(TypeError, match=r"steps: expected an integer, got 2\.0"):
        Training(*arguments).run(2.0)
