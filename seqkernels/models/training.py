"""A small training loop that can stop at any step and go on as if it had not. What needs more is Lightning's job."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._model import check_tensor, integer, number, whole

_DTYPES = (None, torch.bfloat16, torch.float16)
#: Losses are read back from the device so many steps at a time.
_READ_EVERY = 20


class Training:
    """The training of a model, step by step, of which a file holds all that is needed to go on with the same bits.

    Args:
        model: of any class, with parameters on the device that it shall train on.
        optimizer: of its parameters.
        loss: of a batch: ``loss(model, batch)`` is one number, which is minimised.
        batches: draws a batch: ``batches(generator)``. All that is random about it has to come from the generator, a
            CPU's, and nothing may be remembered between two calls, or a training that goes on sees other batches.
        schedule: of learning rates of the same optimizer, stepped after each step of it, and told nothing then (which
            ``ReduceLROnPlateau`` needs); none by default.
        dtype: of autocast, in which ``loss`` runs: bfloat16, or float16 with a scaled loss; none by default.
        clip: bound of the norm of all gradients together; none by default.
        seed: of the generator of batches. Dropout draws from torch's own generators, which are not seeded here.

    Attributes:
        losses: of each step so far, as floats.
        generator: of the batches.

    Raises:
        ValueError: the message names the argument, what it was and what is allowed.
        TypeError: likewise, of an argument of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Tensor],
        batches: Callable[[torch.Generator], Any],
        *,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        dtype: torch.dtype | None = None,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {dtype}")
        if clip is not None and not number(clip, "clip") > 0:
            raise ValueError(f"clip: expected a positive number, got {clip}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a Module, got {type(model).__name__}")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(f"model: expected one with parameters, got a {type(model).__name__} without")
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("schedule: expected one that needs no metric, got ReduceLROnPlateau")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer: expected one whose step needs no closure, got LBFGS")
        # Not the optimizers themselves: one that wraps another shares its groups.
        if schedule is not None and schedule.optimizer.param_groups is not optimizer.param_groups:
            raise ValueError("schedule: expected one of this optimizer, got one of another")
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.loss, self.batches = loss, batches
        self.dtype, self.clip = dtype, clip
        self.device = parameter.device
        self.generator = torch.Generator().manual_seed(seed)
        self.scaler = self._new_scaler()
        self.losses: list[float] = []

    @property
    def steps(self) -> int:
        """How many have been taken."""
        return len(self.losses)

    def run(self, steps: int, progress: bool = True) -> list[float]:
        """Take so many steps more, with the model in training mode.

        Where an error or an interrupt stops one before the optimizer's step, it is as if that step had not begun: the
        next run draws the same batch and drops the same. Within the optimizer's step, part of it may have been done.

        Args:
            steps: how many.
            progress: show a bar where the output is a terminal.

        Returns:
            Their losses.

        Raises:
            ImportError: tqdm is not installed, and the bar is wanted.
            ValueError: `steps` is negative, or the loss not one number.
            TypeError: `steps` is no integer, or the loss no tensor.
        """
        steps = integer(steps, "steps")
        if steps < 0:
            raise ValueError(f"steps: expected at least 0, got {steps}")
        begin = self.steps
        self.model.train()
        with _bar(steps, progress) as bar:
            waiting: list[Tensor] = []
            try:
                for _ in range(steps):
                    waiting.append(self._step())
                    if len(waiting) == _READ_EVERY:
                        self._read(waiting)
                    if bar is not None:
                        recent = self.losses[-_READ_EVERY:]
                        bar.set_postfix({"loss": sum(recent) / len(recent)} if recent else {}, refresh=False)
                        bar.update()
            finally:
                self._read(waiting)
        return self.losses[begin:]

    def _step(self) -> Tensor:
        with self._undone():
            batch = self.batches(self.generator)
            self.optimizer.zero_grad()
            lower = contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
            with lower:
                loss = self.loss(self.model, batch)
            check_tensor(loss, "loss")
            if loss.dim() != 0:
                raise ValueError(f"loss: expected one number, got {tuple(loss.shape)}")
            self.scaler.scale(loss).backward()
            if self.clip is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # A smaller scale says that gradients overflowed and the optimizer took no step.
        if self.schedule is not None and self.scaler.get_scale() >= scale:
            self.schedule.step()
        return loss.detach()

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Put generators, buffers and scaler back where an error ends this."""
        random = self._random()
        buffers = [x.clone() for x in self.model.buffers()]
        try:
            yield
        except BaseException:
            self._set_random(random)
            with torch.no_grad():
                for x, before in zip(self.model.buffers(), buffers, strict=True):
                    x.copy_(before)
            # A scaler that has unscaled gradients does not do so again before a step.
            scaler = self._new_scaler()
            scaler.load_state_dict(self.scaler.state_dict())
            self.scaler = scaler
            raise

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def _random(self) -> dict[str, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"batches": self.generator.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}

    def _set_random(self, random: dict[str, Any]) -> None:
        self.generator.set_state(random["batches"])
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def _read(self, waiting: list[Tensor]) -> None:
        if waiting:
            self.losses += torch.stack(waiting).tolist()
            waiting.clear()

    def save(self, path: str | Path) -> None:
        """Write all that `resume` needs. The file is complete or not there: it is written beside its place, then moved.

        Args:
            path: of the file; its folder has to be there.
        """
        state = {
            "training": self._identity(),
            "parameters": self._parameters(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self._random(),
            "losses": self.losses,
        }
        with whole(path) as partial:
            torch.save(state, partial)

    def resume(self, path: str | Path) -> None:
        """Go on where a training was when it was saved, on any device; on the same one, with the same bits.

        Torch's own generators are set too, that of the CPU and that of the model's GPU.

        Args:
            path: of the file.

        Raises:
            ValueError: `save` did not write it, or for another model, configuration, optimizer, schedule or dtype,
                or for an optimizer with other groups of parameters, or in another order; nothing has changed then.
        """
        with open(path, "rb") as file:
            # What torch.load says of other files names no argument.
            known = zipfile.is_zipfile(file)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True) if known else None
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"path: expected a file that Training.save wrote, got another: {error}") from error
        if not isinstance(state, dict) or not isinstance(state.get("training"), dict):
            raise ValueError("path: expected a file that Training.save wrote, got another")
        theirs = {**state["training"], "param_groups": _sizes(state.get("optimizer", {}))}
        ours = {**self._identity(), "param_groups": _sizes(self.optimizer.state_dict())}
        others = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if others:
            # Those of a configuration are text that was quoted where it was made.
            said = {name: str if name.startswith("config.") else repr for name in others}
            texts = [
                f"{name} {said[name](theirs.get(name))} instead of {said[name](ours.get(name))}" for name in others[:3]
            ]
            raise ValueError(f"path: expected a training like this one, got one with {', '.join(texts)}")
        order, of_file = self._parameters(), state.get("parameters")
        if of_file != order:
            raise ValueError(
                f"path: expected an optimizer with the parameters {', '.join(order)} in this order, got one with"
                f" {', '.join(map(str, of_file or ['others']))}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self._set_random(state["random"])
        self.losses = state["losses"]

    def _parameters(self) -> list[str]:
        """The names of what the optimizer has, in its order; empty ones of what is not the model's."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return [names.get(id(weight), "") for group in self.optimizer.param_groups for weight in group["params"]]

    def _identity(self) -> dict[str, Any]:
        """What has to be equal in the training that is saved and the one that goes on."""
        config = getattr(self.model, "config", None)
        fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {}
        return {
            "model": type(self.model).__name__,
            "optimizer": type(self.optimizer).__name__,
            "schedule": None if self.schedule is None else _names(self.schedule),
            "dtype": str(self.dtype),
            # As text: a file may hold whatever a configuration does.
            **{f"config.{name}": repr(value) for name, value in fields.items()},
            **{
                name: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                for name, x in self.model.state_dict().items()
            },
        }


def _names(schedule: Any) -> str:
    """Its class, and those of the schedules that it is made of."""
    parts = ", ".join(map(_names, getattr(schedule, "_schedulers", ())))
    return type(schedule).__name__ + (f"({parts})" if parts else "")


def _sizes(optimizer: dict[str, Any]) -> list[int]:
    """How many parameters each group of an optimizer's ``state_dict`` has."""
    return [len(group["params"]) for group in optimizer.get("param_groups", [])]


def _bar(steps: int, progress: bool) -> contextlib.AbstractContextManager[Any]:
    if not progress:
        return contextlib.nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the bar needs tqdm: pip install 'seqkernels[examples]', or progress=False") from error
    return tqdm(total=steps, unit="step", disable=None)
