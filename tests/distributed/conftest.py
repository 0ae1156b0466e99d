"""Groups of processes that live as long as the tests do, and run functions of theirs."""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
#: Imported once for all processes; what DTensor imports when it is first used, too.
PRELOADED = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "seqkernels.testing",
]
#: Longer than the processes wait for one another.
SECONDS = 100


class World:
    """Processes joined by gloo, started when first used, and once more after an error."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder, self.starts = size, folder, 0
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []

    def run(self, job: Callable[..., None], *arguments: object) -> None:
        """Call `job`, of the top level of a file of tests, in each process, and raise what it raises in any."""
        __tracebackhide__ = True
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((job.__code__.co_filename, job.__name__, arguments))
        waiting = list(self.connections)
        while waiting:
            ready = wait(waiting, SECONDS)
            errors = [f"no answer within {SECONDS} s"] if not ready else []
            for connection in ready:
                assert isinstance(connection, Connection)
                waiting.remove(connection)
                try:
                    errors.append(connection.recv())
                except EOFError:
                    errors.append("a process ended")
            if any(errors):
                # The others wait for it.
                self.stop()
                pytest.fail("\n".join(filter(None, errors)), pytrace=False)

    def stop(self) -> None:
        """End the processes, those that wait for another one by force."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.starts += 1
        store = self.folder / f"store{self.size}.{self.starts}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            given = {"connection": theirs, "rank": rank, "world": self.size, "store": str(store)}
            process = context.Process(target=runpy.run_path, args=(str(WORKER), given, "worker"), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)


def _world(size: int, folder: Path) -> Iterator[World]:
    world = World(size, folder)
    yield world
    world.stop()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two processes."""
    yield from _world(2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Four processes."""
    yield from _world(4, tmp_path_factory.mktemp("four"))
