"""The examples in docstrings, which the API pages show, run and print what they say."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import seqkernels

PACKAGE = Path(seqkernels.__file__).parent

#: What stands before the examples of each docstring, in its reader's program.
PROGRAMS = {
    "_attend.attention": """
        from seqkernels.functional import attention
        q, k, v = torch.randn(3, 2, 4, 300, 16)
        lengths = torch.tensor([300, 170])
        """,
    "backends.explain": "",
    "backends.use_backend": "layer, x = seqkernels.nn.GRU(3, 4), torch.randn(5, 2, 3)",
    "convert.convert": "",
    "distributed.ring.ring_attention": """
        from seqkernels.distributed import ring_attention, shard_sequence
        q, k, v = torch.randn(3, 2, 4, 6, 8)
        """,
    "distributed.sequence.shard_sequence": """
        from seqkernels.distributed import shard_sequence
        tokens = torch.arange(12).view(2, 6)
        """,
    "distributed.sharding.register_sharding": """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
        mesh, x = init_device_mesh("cpu", (1,)), torch.randn(4, 3, 64)
        """,
    "integrations.onnx.export": """
        import seqkernels.integrations.onnx
        x = torch.randn(5, 2, 8)
        """,
    "integrations.opacus.register": """
        import opacus
        import seqkernels.integrations.opacus
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), seqkernels.nn.GRU(3, 4))
        """,
    "integrations.opacus.sample_gradients": """
        import opacus
        from seqkernels.integrations.opacus import sample_gradients
        model = torch.nn.Linear(3, 1)
        inputs, targets = torch.randn(32, 3), torch.randn(32, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        def loss(model, inputs, targets):
            return (model(inputs) - targets).square().mean()
        """,
    "integrations.tokenizers.train_tokenizer": """
        from seqkernels.integrations.tokenizers import train_tokenizer
        lines = ["a text", "some more text"]
        """,
    "integrations.transformers.register": """
        import seqkernels.integrations.transformers
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        """,
    "models.bert.BERT": """
        import torch.nn.functional as F
        from seqkernels.models import BERT, BERTConfig, mask_tokens
        model = BERT(BERTConfig(50, 16, 8, 1, 2))
        tokens, lengths = torch.randint(5, 50, (8, 16)), torch.arange(9, 17)
        """,
    "nn.alignment.AdditiveAttention": """
        states, query, lengths = torch.randn(2, 3, 1024), torch.randn(2, 1, 512), torch.tensor([3, 1])
        """,
    "nn.attention.MultiheadAttention": "x, padding = torch.randn(2, 5, 64), torch.zeros(2, 5, dtype=torch.bool)",
    "nn.positional.RotaryEmbedding": "q, k = torch.randn(2, 1, 2, 5, 64)",
    "nn.transformer.TransformerEncoder": "",
    "nn.transformer.TransformerEncoderLayer": """
        x, padding = torch.randn(2, 5, 512), torch.zeros(2, 5, dtype=torch.bool)
        """,
    "warmup.warmup": "",
}


def documented() -> dict[str, str]:
    """The docstrings with examples, by where they are in the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ">>>" in (ast.get_docstring(node) or ""):
                found[f"{module}.{node.name}"] = ast.get_docstring(node) or ""
    return found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_each_docstring_with_examples_has_a_program() -> None:
    assert set(documented()) == set(PROGRAMS)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # of the exporter
@pytest.mark.parametrize("name", PROGRAMS)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(f"seqkernels.{name.rpartition('.')[0]}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = {"torch": torch, "seqkernels": seqkernels}
    said: list[str] = []
    with alone() if name.startswith("distributed") else contextlib.nullcontext():
        exec(textwrap.dedent(PROGRAMS[name]), space)
        examples = doctest.DocTestParser().get_doctest(documented()[name], space, name, None, 0)
        # Results that are not shown are not compared, nor are times.
        for example in examples.examples:
            example.want = re.sub(r"\d+\.\d\d s\b", "... s", example.want)
            if not example.want and isinstance(ast.parse(example.source).body[-1], ast.Expr):
                example.source = f"_ = {example.source}"
        found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert found.failed == 0, "".join(said)
    assert found.attempted == len(examples.examples) > 0
