"""The import rule of ``docs/design.md`` and the rules of the house, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqkernels
from seqkernels.backends import Call

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(seqkernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
needs_sources = pytest.mark.skipif(not CSRC, reason="the C++ sources are not beside the tests")

# Lower may not import higher; the same number may not import one another, except inside one package.
LAYERS = {
    "_version": 0,
    "cells": 0,
    "precision": 0,
    "scores": 1,
    "_sequences": 1,
    "backends": 2,
    "_options": 3,
    "ops": 3,
    "_attend": 4,
    "_attention": 4,
    "_flash": 4,
    "_recurrent": 4,
    "functional": 5,
    "distributed": 6,
    "nn": 6,
    "explore": 7,
    "models": 7,
    "integrations": 7,
    "convert": 7,
    "warmup": 7,
    "__init__": 8,
    "testing": 9,
    "__main__": 10,
}
# Beside the folders of the backends: what several of them are built on. Only backends may import it.
SHARED_BY_BACKENDS = {"_through_time": {"cells", "precision"}}
# "Near 500 lines", with a margin.
MAX_LINES = 550
ALWAYS = {"torch", "numpy", "seqkernels", "typing_extensions"} | set(sys.stdlib_module_names)


def _name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def _imports(path: Path):
    """Names of the modules that a file imports, as tuples; those inside the package begin with ``seqkernels``."""
    package = ("seqkernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                inside = base[:1] == ("seqkernels",) and _is_module((*base, alias.name))
                yield (*base, alias.name) if inside else base


def _is_module(name: tuple[str, ...]) -> bool:
    path = PACKAGE.joinpath(*name[1:])
    return path.is_dir() or path.with_suffix(".py").exists() or name[-1] in ("_C", "_C_cuda")


def _ids(paths):
    return [str(path.relative_to(PACKAGE)) for path in paths]


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_import_rule(path):
    name = _name(path)
    for imported in _imports(path):
        if imported[0] != "seqkernels" or len(imported) == 1 or imported[1] in ("_C", "_C_cuda"):
            continue
        target = imported[1]
        if target == name[0]:
            continue
        assert target in LAYERS, f"{target}: give it a place in LAYERS"
        assert LAYERS[target] < LAYERS[name[0]], f"{'.'.join(name)} imports {'.'.join(imported)}"


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_backends_know_only_the_registry_and_the_cells(path):
    name = _name(path)
    if name[0] != "backends":
        # Others reach an implementation through the registry; the exceptions need that very one.
        reached = {i[2] for i in _imports(path) if i[:2] == ("seqkernels", "backends") and i[2:]}
        allowed = {"ops": {"reference"}, "testing": {"reference", "native"}, "__main__": {"native", "cuda", "triton"}}
        assert reached <= allowed.get(name[0], set())
        return
    for imported in _imports(path):
        if imported[0] != "seqkernels":
            continue
        inside = imported[1:3]
        if len(name) == 1:
            assert inside[:1] == ("cells",), f"the registry imports {'.'.join(imported)}"
        elif name[1] in SHARED_BY_BACKENDS:
            assert imported[1] in SHARED_BY_BACKENDS[name[1]], f"imports {'.'.join(imported)}"
        elif inside in (("_C",), ("_C_cuda",)):
            assert name == ("backends", "native" if inside == ("_C",) else "cuda", "extension")
        else:
            known = ((module,) for module in ("_version", "cells", "precision", "scores", "backends"))
            beside = (("backends", module) for module in (name[1], *SHARED_BY_BACKENDS))
            assert inside in (*known, *beside), f"imports {'.'.join(imported)}"


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_optional_libraries_stay_in_their_place(path):
    name = _name(path)
    allowed = {
        ("backends", "numba"): {"numba", "llvmlite"},
        ("backends", "triton"): {"triton", "tqdm"},
    }.get(name[:2], set())
    allowed |= {"explore": {"matplotlib", "rich"}, "models": {"safetensors", "tqdm"}, "warmup": {"tqdm"}}.get(
        name[0], set()
    )
    if name[0] == "integrations":
        allowed = {name[-1]}
    assert {imported[0] for imported in _imports(path)} <= ALWAYS | allowed


def test_cells_are_a_leaf():
    assert {imported[0] for imported in _imports(PACKAGE / "cells.py")} <= {"__future__", "typing", "torch"}


def test_import_loads_no_optional_library():
    code = (
        "import sys, torch; before = set(sys.modules); import seqkernels;"
        "print([m for m in ('triton', 'numba', 'matplotlib', 'transformers', 'torch._dynamo', 'seqkernels.testing',"
        " 'seqkernels._C_cuda') if m in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_house_rules(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES, "split it"
    assert not re.search(r"os\.environ|\bgetenv\b|\bputenv\b", text), "no environment variable changes results"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), "an error is swallowed"
            assert node.type is not None, "a bare except"


def _public(tree: ast.Module):
    """Public functions, classes and methods of a module."""
    pending: list[ast.AST] = [tree]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    pending.append(node)


@pytest.mark.parametrize("path", MODULES, ids=_ids(MODULES))
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert path.name == "_version.py" or ast.get_docstring(tree), "the module"
    for node in _public(tree):
        overload = any("overload" in ast.unparse(d) or "setter" in ast.unparse(d) for d in node.decorator_list)
        inherits = isinstance(node, ast.FunctionDef) and node.name in ("forward", "extra_repr") and node.col_offset
        assert overload or inherits or ast.get_docstring(node), node.name


def test_backends_have_the_same_shape():
    for folder in sorted(p for p in (PACKAGE / "backends").iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert folder.name in seqkernels.backends.NAMES
        package = seqkernels.backends.backend(folder.name)
        for op in ("recurrence", "attention"):
            if not (folder / f"{op}.py").exists():
                calls = [Call(op, device, torch.float32, "lstm") for device in ("cpu", "cuda")]
                assert all(package.unsupported(call) for call in calls), f"{folder.name}/{op}.py"
                continue
            tree = ast.parse((folder / f"{op}.py").read_text())
            # Made of what backends share, or defined.
            made = [name for node in tree.body if isinstance(node, ast.Assign) for name in node.targets]
            defined = {node.name for node in _public(tree)} | {x.id for x in made if isinstance(x, ast.Name)}
            assert {f"{op}_forward", f"{op}_backward"} <= defined


def test_no_test_is_commented_out():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*#\s*@?pytest\.", path.read_text(), re.MULTILINE), path


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@needs_sources
def test_includes():
    outside = re.compile(r"^(torch|ATen|c10|caffe2)/")
    python = re.compile(r"^(Python\.h|pybind11/|python/)")
    cuda = re.compile(r"^(cuda(?!/)|cublas|cooperative_groups|mma\.h)")
    for path in CSRC:
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for include in _includes(path):
            where = f"{path.relative_to(ROOT)} includes {include}"
            assert not outside.search(include), where
            assert folder == "python" or not python.search(include), where
            assert folder == "cuda" or not cuda.search(include), where
            assert folder != "core" or not include.startswith(("cpu/", "cuda/")), where
            assert folder != "cpu" or not include.startswith("cuda/"), where
            assert folder != "cuda" or not include.startswith("cpu/"), where


@needs_sources
def test_house_rules_of_the_kernels():
    for path in CSRC:
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_LINES, f"{path.name}: split it"
        assert not re.search(r"\bgetenv\b", text), path
    build = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    assert "-march=native" not in build
    assert "-std=" not in build
