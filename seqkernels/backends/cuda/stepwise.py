"""The loop over time by a product and a pass over the elements in each step, for what no chip has room for.

The product is torch's, the pass a compiled kernel (``csrc/core/stepwise.h``). Launches cost more than either does where
sizes are small, so `LENGTH` steps are captured in a CUDA graph, whose replay is one launch. A graph holds addresses:
what differs between calls (their tensors, their length, the step that they are at) is behind one that does not, and
weights are copied to a place of their own, so that all calls of a form share a graph. What is left of a call, steps
fewer than `LENGTH`, is launched one by one, and so is all of a call whose stream is being captured by its user.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ...cells import CELLS
from .._through_time import Gradients, Loop
from .persistent import Part, job_of

#: Steps of a graph, two launches each; even, since launches of a call take turns.
LENGTH = 16
#: How many graphs a device keeps, and bytes of their memory.
MOST_GRAPHS, MOST_BYTES = 8, 1 << 29

T = TypeVar("T")

#: Something to do whose arguments are all known: a launch.
Operation = Callable[[], Any]

_STORAGE = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "exact"}


class Form(NamedTuple):
    """What calls have in common that can share a graph."""

    cell: str
    dtype: torch.dtype
    backward: bool
    batch: int
    hidden: int
    tf32: bool

    @classmethod
    def of(cls, loop: Loop, backward: bool) -> Form:
        """The form of a call."""
        dtype = loop.weight_hh.dtype
        tf32 = dtype == torch.float32 and loop.precision == "tf32"
        return cls(loop.cell, dtype, backward, loop.batch, loop.hidden, tf32)


class Memory:
    """What the launches of a form work on, beside the tensors of a call.

    Attributes:
        operand: (B, H) forward and (B, G*H) backward: what is multiplied by the weights.
        product: (B, G*H) and (B, H), float32: what comes out.
        steps: the launches of the compiled module.
    """

    def __init__(self, kernels: ModuleType, form: Form, device: torch.device) -> None:
        gates = CELLS[form.cell].gates * form.hidden
        columns, made = (gates, form.hidden) if form.backward else (form.hidden, gates)
        self._backward = form.backward
        self._space = torch.empty(kernels.SPACE_BYTES, dtype=torch.uint8, device=device)
        self.operand = torch.empty((form.batch, columns), dtype=form.dtype, device=device)
        self.product = torch.empty((form.batch, made), dtype=torch.float32, device=device)
        self.steps = kernels.Steps(
            form.cell,
            _STORAGE[form.dtype],
            form.backward,
            form.hidden,
            form.batch,
            self._space,
            self.operand,
            self.product,
        )

    def multiply(self, weight_hh: Tensor) -> Operation:
        """The product of a step."""
        factor = weight_hh if self._backward else weight_hh.t()
        return functools.partial(_product_into, self.operand, factor, self.product)

    def operations(self, weight_hh: Tensor, begin: int, end: int) -> list[Operation]:
        """Steps [begin, end) of a call, counted in the order of the loop."""
        multiply = self.multiply(weight_hh)
        found: list[Operation] = []
        for step in range(begin, end):
            own = functools.partial(self.steps.step, step % 2)
            found += (own, multiply) if self._backward else (multiply, own)
        return found


def _product_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`_through_time.product`, into `out`."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


class Recorder(Protocol):
    """Records launches, and knows when they are done."""

    def allocate(self, make: Callable[[], T]) -> T:
        """What `make` returns, whose memory lives as long as what is recorded."""

    def record(self, operations: Sequence[Operation], product: Operation) -> Operation:
        """What does all `operations`, as often as it is called; `product` is one of them."""

    def enter(self) -> None:
        """Has what is launched now wait for what was launched before `leave` was called."""

    def leave(self) -> None:
        """See `enter`."""

    def drain(self) -> None:
        """Waits until all is done that was launched before `leave`, and forgets what was recorded."""


class Tape:
    """A `Recorder` of the emulator: the operations themselves."""

    def allocate(self, make: Callable[[], T]) -> T:
        """As `Recorder.allocate`."""
        return _elsewhere(make)

    def record(self, operations: Sequence[Operation], product: Operation) -> Operation:
        """As `Recorder.record`."""
        kept = list(operations)

        def replay() -> None:
            for operation in kept:
                operation()

        return replay

    def enter(self) -> None:
        """As `Recorder.enter`: nothing, since what is launched is done."""

    def leave(self) -> None:
        """As `Recorder.leave`: nothing, since what is launched is done."""

    def drain(self) -> None:
        """As `Recorder.drain`: nothing, since what is launched is done."""


class Capture:
    """A `Recorder` of a device: a CUDA graph, captured on a stream that no other living graph was captured on.

    torch gives a product a workspace that belongs to the stream. Graphs of one stream would share it, work on it at
    once, and lose it with the first of them that goes (pytorch/pytorch#193402); so would users of one of torch's own
    streams, which it deals out in turns. The first product on the stream is in the capture, which has its workspace in
    the graph's memory: nobody else gets that when torch is told to forget all workspaces.

    A thread of its own allocates and captures: that of the caller may be one whose memory goes to a pool that is used
    again behind our back (``torch.compile`` with its own graphs, `torch.cuda.use_mem_pool`).
    """

    _free: ClassVar[dict[int, list[torch.cuda.ExternalStream]]] = {}
    _lock = threading.Lock()

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        self._device = device.index
        with self._lock:
            free = self._free.setdefault(self._device, [])
            self._stream = free.pop() if free else torch.cuda.ExternalStream(kernels.make_stream(self._device), device)
        self._graph = torch.cuda.CUDAGraph()
        self._done: torch.cuda.Event | None = None

    def allocate(self, make: Callable[[], T]) -> T:
        """As `Recorder.allocate`, from memory of the graph's stream, which earlier users have left."""

        def on_stream() -> T:
            with torch.cuda.stream(self._stream):
                return make()

        return _elsewhere(on_stream)

    def record(self, operations: Sequence[Operation], product: Operation) -> Operation:
        """As `Recorder.record`."""
        product()  # loads what must not be loaded in a capture
        _elsewhere(functools.partial(self._capture, operations))
        return self._graph.replay

    def _capture(self, operations: Sequence[Operation]) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.current_blas_handle()  # a thread's first one is not to be made in a capture either
            with torch.cuda.stream(self._stream):
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    _do(operations)
                finally:
                    self._graph.capture_end()

    def enter(self) -> None:
        """As `Recorder.enter`."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def leave(self) -> None:
        """As `Recorder.leave`."""
        if self._done is None:
            self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        """As `Recorder.drain`."""
        if self._done is not None:
            self._done.synchronize()
        self._graph.reset()
        with self._lock:
            self._free[self._device].append(self._stream)


class Graph:
    """`length` steps of a form, ready to be replayed; their memory belongs to them."""

    def __init__(self, kernels: ModuleType, recorder: Recorder, form: Form, like: Tensor, length: int) -> None:
        self.memory, self.weight_hh = recorder.allocate(
            lambda: (
                Memory(kernels, form, like.device),
                torch.empty(like.shape, dtype=like.dtype, device=like.device),
            )
        )
        self.recorder = recorder
        self.bytes = sum(x.nbytes for x in (self.memory.operand, self.memory.product, self.weight_hh))
        operations = self.memory.operations(self.weight_hh, 0, length)
        self.replay = recorder.record(operations, self.memory.multiply(self.weight_hh))


class Graphs:
    """The graphs of a device, those used last.

    A graph's memory serves one call at a time: threads take turns in launching, and a stream waits for the one that
    used the graph before.

    Args:
        kernels: the compiled module.
        make_recorder: gives a recorder for each graph.
        length: of each, even.
        most: how many are kept.
        most_bytes: of their memory in all; the graph at hand may have more.
    """

    def __init__(
        self,
        kernels: ModuleType,
        make_recorder: Callable[[], Recorder],
        length: int = LENGTH,
        most: int = MOST_GRAPHS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.kernels = kernels
        self.length = length
        self._make_recorder = make_recorder
        self._most, self._most_bytes = most, most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Form, Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, form: Form) -> bool:
        return form in self._kept

    @contextlib.contextmanager
    def taken(self, form: Form, weight_hh: Tensor) -> Iterator[Graph]:
        """The graph of a form with these weights, for the launches of one call inside the block."""
        with self._lock:
            found = self._kept.get(form)
            if found is None:
                found = Graph(self.kernels, self._make_recorder(), form, weight_hh, self.length)
                self._kept[form] = found
                self._let_go()
            self._kept.move_to_end(form)
            found.recorder.enter()
            try:
                found.weight_hh.copy_(weight_hh)
                yield found
            finally:
                found.recorder.leave()

    def _let_go(self) -> None:
        while len(self._kept) > 1 and (
            len(self._kept) > self._most or sum(graph.bytes for graph in self._kept.values()) > self._most_bytes
        ):
            _, oldest = self._kept.popitem(last=False)
            oldest.recorder.drain()


class Stepwise:
    """A `seqkernels.backends._through_time.Path` of products and passes.

    Args:
        graphs: of the device of the calls; ``None`` for launches one by one.
    """

    def __init__(self, kernels: ModuleType, graphs: Graphs | None) -> None:
        self._kernels = kernels
        self._graphs = graphs

    def _run(self, loop: Loop, backward: bool, count: int, begin: Callable[[Any], None]) -> None:
        form = Form.of(loop, backward)
        weight = loop.weight_hh
        if self._graphs is None or count < self._graphs.length or _is_captured(weight):
            memory = Memory(self._kernels, form, weight.device)
            begin(memory.steps)
            _do(memory.operations(weight, 0, count))
            return _end(memory, backward, count)
        with self._graphs.taken(form, weight) as graph:
            begin(graph.memory.steps)
            whole = count // self._graphs.length
            for _ in range(whole):
                graph.replay()
            _do(graph.memory.operations(graph.weight_hh, whole * self._graphs.length, count))
            _end(graph.memory, backward, count)

    def forward(
        self, loop: Loop, carry: Tensor, states: Tensor, reserve: Tensor | None, begin: int, end: int, base: int
    ) -> None:
        """As `Path.forward`."""
        job = job_of(Part(loop, carry, states, reserve, begin, end, base))
        self._run(loop, False, end - begin, lambda steps: steps.begin_forward(job))

    def backward(
        self,
        loop: Loop,
        grads: Gradients,
        carry: Tensor,
        states: Tensor,
        reserve: Tensor,
        begin: int,
        end: int,
        base: int,
    ) -> None:
        """As `Path.backward`."""
        job = job_of(Part(loop, carry, states, reserve, begin, end, base, grads))
        self._run(loop, True, end - begin, lambda steps: steps.begin_backward(job))


def _elsewhere(make: Callable[[], T]) -> T:
    """What `make` returns, called in a thread that has none of this one's modes: inference, pools of memory."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(make).result()


def _do(operations: Sequence[Operation]) -> None:
    for operation in operations:
        operation()


def _end(memory: Memory, backward: bool, count: int) -> None:
    """What the product of the last step back sends on."""
    if backward:
        memory.steps.step(count % 2)


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def graphs_of(kernels: ModuleType, device: torch.device) -> Graphs:
    """The graphs of a device; of the emulator for the processor."""
    if device.type == "cuda":
        return Graphs(kernels, functools.partial(Capture, kernels, device))
    return Graphs(kernels, Tape)
