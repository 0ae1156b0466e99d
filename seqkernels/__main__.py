"""The command line: what is installed, built and chosen, models in numbers, and GPU kernels compiled or tuned."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, explore
from .backends.cuda import extension as cuda
from .backends.native.extension import extension, load_error
from .cells import DTYPES

#: One call for each operation and device that `collect` asks every implementation about.
CALLS = tuple(
    backends.Call(op, device, torch.float32, kind)
    for op, kind in (("recurrence", "lstm"), ("attention", ""), ("rotary", ""))
    for device in ("cpu", "cuda")
)

#: That Triton kernels are compiled for.
ARCHITECTURES = "sm_80,sm_90,sm_100"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _native() -> dict[str, Any]:
    reason = load_error()
    if reason is not None:
        return {"unavailable": reason}
    module = extension()
    return {
        "instruction_sets": list(module.isas()),
        "instruction_set": module.isa(),
        "build": dict(module.build_info()),
    }


def _cuda() -> dict[str, Any]:
    reason = cuda.load_error()
    if reason is not None:
        return {"unavailable": reason}
    return {"build": dict(cuda.extension().build_info()), "device": cuda.device_error()}


def _gpus() -> list[str]:
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return found


def _backends() -> dict[str, dict[str, dict[str, str | None]]]:
    found: dict[str, dict[str, dict[str, str | None]]] = {}
    for call in CALLS:
        reasons = {name: backends.why_not_by_itself(name, call) for name in backends.order(call)}
        if call.device == "cuda" and not torch.cuda.is_available():
            reasons = {name: reason or "there is no CUDA device" for name, reason in reasons.items()}
        found.setdefault(call.op, {})[call.device] = reasons
    return found


def collect() -> dict[str, Any]:
    """What `info` reports.

    Returns:
        ``versions`` by package (``None`` where not installed), ``platform``, ``cpu``, ``threads``, ``gpus`` (names and
        architectures of the CUDA devices), ``native`` (the compiled module: instruction sets this processor can run,
        the one chosen, how it was built, or why it is unavailable), ``cuda`` (the compiled module of CUDA kernels: how
        it was built, and under ``device`` why it cannot run here or ``None``; or why it is unavailable) and
        ``backends``: for each operation, device type and implementation ``None`` or the reason why not.
    """
    return {
        "versions": {
            "seqkernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: _version(name) for name in ("numba", "triton")},
        },
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "native": _native(),
        "cuda": _cuda(),
        "backends": _backends(),
    }


def render(info: dict[str, Any]) -> str:
    """What `collect` returns, as text."""
    native = info["native"]
    rows = [(name, version or "not installed") for name, version in info["versions"].items()]
    rows += [("platform", info["platform"]), ("cpu", info["cpu"]), ("threads", info["threads"])]
    rows += [("gpu", name) for name in info["gpus"] or ["none"]]
    if "unavailable" in native:
        rows.append(("compiled module", native["unavailable"]))
    else:
        rows.append(("instruction sets", ", ".join(native["instruction_sets"])))
        rows.append(("chosen", native["instruction_set"]))
        rows += [(f"build: {name.replace('_', ' ')}", value or "none") for name, value in native["build"].items()]
    if "unavailable" in info["cuda"]:
        rows.append(("CUDA module", info["cuda"]["unavailable"]))
    else:
        rows.append(("CUDA module", info["cuda"]["device"] or "has a device"))
        rows += [(f"CUDA build: {name}", value) for name, value in info["cuda"]["build"].items()]
    for op, devices in info["backends"].items():
        for device, reasons in devices.items():
            rows += [(f"{op} on {device}: {name}", reason or "available") for name, reason in reasons.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: words after ``python -m seqkernels``; those of the process by default.
    """
    parser = argparse.ArgumentParser("python -m seqkernels", description="Compiled kernels for sequence models.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, instruction sets, and each backend: available or why not")
    info.add_argument("--json", action="store_true", help="as JSON, the same content")
    info.add_argument(
        "--check", action="store_true", help="also run every implementation on small cases, and say what is wrong"
    )
    ahead = commands.add_parser(
        "compile",
        help="compile every Triton kernel as it is shipped, without a GPU, and hold it to the reviewed budget",
    )
    ahead.add_argument("--cuda", action="store_true", help="of the built module of CUDA kernels instead")
    ahead.add_argument("--arch", help=f"architectures, with commas (default {ARCHITECTURES}, of the module all it has)")
    ahead.add_argument("--only", default="", help="only kernels whose description has this in it")
    ahead.add_argument("--json", action="store_true", help="as JSON, in the form of the budget")
    tune = commands.add_parser(
        "tune", help="measure tiles of the Triton kernels on a CUDA device, and keep those faster than the shipped ones"
    )
    tune.add_argument("--device", help="the CUDA device (default: the current one)")
    tune.add_argument("--only", default="", help="only rows of the tables whose names have this in them")
    tune.add_argument("--minutes", type=float, help="begin no row after so many (default: measure all)")
    _add_explore(commands)
    options = parser.parse_args(arguments)
    if options.command == "explore":
        raise SystemExit(_explore(options))
    if options.command == "tune":
        raise SystemExit(_tune(options.device, options.only, options.minutes))
    if options.command == "compile":
        architectures = options.arch.split(",") if options.arch else None
        if options.cuda:
            raise SystemExit(_compiled(architectures, options.only, options.json))
        raise SystemExit(_compile(architectures or ARCHITECTURES.split(","), options.only, options.json))
    found = collect()
    if options.check:
        raise SystemExit(_check(found, options.json))
    print(json.dumps(found, indent=2) if options.json else render(found))


def _check(info: dict[str, Any], as_json: bool) -> int:
    """``python -m seqkernels info --check``; 1 where something is wrong."""
    from .testing import doctor
    from .testing.selftest import selftest

    if as_json:
        found = doctor.diagnose(selftest())
        print(json.dumps({**info, "check": doctor.as_dict(found)}, indent=2))
        return 0 if found.healthy else 1
    print(render(info), "", sep="\n")
    rows = []
    if backends.backend("numba").unavailable() is None:
        print("numba compiles its kernels where its cache has none: half a minute then, once", flush=True)
    for row in selftest():
        print(doctor.render(row), flush=True)
        rows.append(row)
    found = doctor.diagnose(rows)
    print("", *(f"{'!!' if advice.broken else '--'} {advice.text}" for advice in found.advice), sep="\n")
    print(found.verdict)
    return 0 if found.healthy else 1


def _add_explore(commands: Any) -> None:
    parser = commands.add_parser(
        "explore",
        help="every number of an RNN, an LSTM, a GRU and self-attention with random weights over a few tokens",
    )
    parser.add_argument("text", help="tokens with spaces between them, for example 'a b c'")
    parser.add_argument("--only", choices=explore.MODELS, help="one of the models (default: all)")
    parser.add_argument("--embedding", type=int, default=2, help="size of the vectors of tokens (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=2, help="size of the states (default %(default)s)")
    parser.add_argument("--causal", action="store_true", help="attention reads no later tokens")
    parser.add_argument("--seed", type=int, default=42, help="of the weights (default %(default)s)")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON, every number in full")
    parser.add_argument("--png", metavar="PATH", help="also draw gates, states and attention weights into this file")


def _explore(options: argparse.Namespace) -> int:
    """``python -m seqkernels explore``; 1 where there is nothing to show or no way to."""
    try:
        found = explore.explore(
            options.text,
            seed=options.seed,
            embedding=options.embedding,
            hidden=options.hidden,
            models=[options.only] if options.only else explore.MODELS,
            dtype=getattr(torch, options.dtype),
            is_causal=options.causal,
            device=options.device,
        )
        if options.png is not None:
            explore.picture(found, options.png)
        if options.json:
            print(explore.as_json(found))
        else:
            explore.show(found)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"explore: {error}", file=sys.stderr)
        return 1
    return 0


def _compile(architectures: list[str], only: str, as_json: bool) -> int:
    """``python -m seqkernels compile``; 1 where a kernel needs more than it may, or nothing was compiled."""
    try:
        from .backends.triton import ahead

        found = ahead.compile_all(architectures, only)
    except ImportError as error:
        print(f"compile: {error}; pip install 'seqkernels[triton]' has what it needs", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 1
    print(ahead.as_json(found) if as_json else ahead.render(found))
    return _judged(ahead.breaches(found), only, bool(found))


def _compiled(architectures: list[str] | None, only: str, as_json: bool) -> int:
    """``python -m seqkernels compile --cuda``; 1 as above."""
    from .backends.cuda import budget

    try:
        found = budget.read(cuda.extension().__file__ or "", architectures, only)
    except (ImportError, FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"compile: {error}", file=sys.stderr)
        return 1
    print(budget.as_json(found) if as_json else budget.render(found))
    limits = budget.allowed()
    unused = [] if only or architectures else budget.unused(found, limits)
    return _judged(budget.breaches(found, limits) + unused, only, bool(found))


def _judged(breaches: list[str], only: str, any_kernel: bool) -> int:
    for breach in breaches:
        print(f"compile: {breach}", file=sys.stderr)
    if not any_kernel:
        print(f"compile: no kernel has {only!r} in its description", file=sys.stderr)
    return 0 if any_kernel and not breaches else 1


def _tune(device: str | None, only: str, minutes: float | None) -> int:
    """``python -m seqkernels tune``; 1 where nothing could be measured."""
    try:
        from .backends.triton import tune

        table, said = tune.main(device, only, minutes)
    except ImportError as error:
        print(f"tune: {error}; pip install 'seqkernels[triton]' has what it needs", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    print(table)
    for line in said:
        print(line)
    return 0


if __name__ == "__main__":
    main()
