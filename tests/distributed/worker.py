"""What each process of a `World` runs: functions of files of tests, one after the other.

Run by its path with ``connection``, ``rank``, ``world`` and ``store`` as globals, since in a new process the tests are
no package.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

#: A process that waits for a message longer than this has an error.
PATIENCE = timedelta(seconds=60)


def _load(path: str) -> ModuleType:
    name = f"jobs_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def serve(connection: Connection, rank: int, world: int, store: str) -> None:
    """Call what arrives, as (path, name, arguments), and answer with ``None`` or the text of the error."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Of options that numba has not, in an installation without the compiled module.
    warnings.filterwarnings("ignore", ".*on the slow reference implementation")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE)
    while True:
        try:
            path, name, arguments = connection.recv()
        except EOFError:
            break
        answer = None
        try:
            getattr(_load(path), name)(*arguments)
        except BaseException:
            answer = f"process {rank} of {world}\n{traceback.format_exc()}"
        try:
            connection.send(answer)
        except BrokenPipeError:
            break  # another one had an error before
    dist.destroy_process_group()


if __name__ == "worker":
    serve(connection, rank, world, store)  # type: ignore[name-defined]  # noqa: F821
