"""The stubs of the compiled modules say what the modules have."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

import seqkernels

PACKAGE = Path(seqkernels.__file__).parent
# What pybind11 calls types, and the stubs in short. It says more of integers, other things in each version.
SHORT = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsInt": "int",
    "tuple": "tuple[typing.Any, ...]",
    "type": "type[typing.Any]",
}


def signature(definition, of_module="", member=False):
    """Names, types, defaults and kinds of arguments, and what is returned."""
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args):
        if argument.annotation is not None:
            text = ast.unparse(argument.annotation)
            argument.annotation = ast.parse(SHORT.get(text, text), mode="eval").body
    if member:
        arguments.args[0] = ast.arg("self")  # which pybind11 gives a type, and only in some places its name
    if arguments.vararg is not None:
        arguments.vararg.annotation = None
    text = f"({ast.unparse(arguments)}) -> {ast.unparse(definition.returns)}"
    return text.replace(f"{of_module}.", "") if of_module else text


def of_stub(body, prefix=""):
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found |= {node.name: "class"} | of_stub(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = signature(node, member=bool(prefix))
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = ast.unparse(node.annotation)
    return found


def of_module(names, module, prefix=""):
    found = {}
    for name, value in names.items():
        if (name.startswith("__") and not (prefix and name == "__init__")) or name.startswith("_pybind11"):
            continue
        function = value.fget if isinstance(value, property) else value
        if isinstance(value, type):
            found |= {name: "class"} | of_module(vars(value), module, f"{name}.")
        elif not callable(function):
            found[name] = type(value).__name__
        elif ") -> " in (line := (function.__doc__ or "").strip().partition("\n")[0]):
            # Python's own __init__, of a class that nobody makes, says no signature.
            (definition,) = ast.parse(f"def {name}{line[line.index('(') :]}: ...").body
            found[prefix + name] = signature(definition, module, bool(prefix))
    return found


@pytest.fixture(params=["_C", "_C_cuda"])
def both(request, pure):
    name = f"seqkernels.{request.param}"
    body = ast.parse((PACKAGE / f"{request.param}.pyi").read_text()).body
    if importlib.util.find_spec(name) is None:
        assert pure or request.param == "_C_cuda", "the compiled module is not there"
        pytest.skip(f"there is no {name} to compare with")
    return of_stub(body), of_module(vars(importlib.import_module(name)), name)


def test_names_and_signatures(both):
    stub, module = both
    assert stub.keys() == module.keys()
    for name, text in module.items():
        assert stub[name] == text, name


def test_tensors_have_their_type(both):
    stub, _ = both
    typed = [text for text in stub.values() if "torch.Tensor" in text]
    assert len(typed) > (8 if "rotary" in stub else 1)
    for name, text in stub.items():
        for argument in ("x", "q", "states", "weight_hh", "operand", "first"):
            if f"({argument}:" in text or f", {argument}:" in text:
                assert f"{argument}: torch.Tensor" in text or name == "set_plain_types", name


def test_the_emulator_has_what_the_stub_of_its_module_has():
    """They share their bindings, and the Python code calls either."""
    if importlib.util.find_spec("seqkernels._emulator") is None:
        pytest.skip("the emulator was not built")
    emulator = of_module(vars(importlib.import_module("seqkernels._emulator")), "seqkernels._emulator")
    stub = of_stub(ast.parse((PACKAGE / "_C_cuda.pyi").read_text()).body)
    for name, text in emulator.items():
        assert stub[name] == text, name
