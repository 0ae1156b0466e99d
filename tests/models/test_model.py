"""What models share: configurations from mappings, and files that hold weights and sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

import seqkernels
from seqkernels.models import (
    BERT,
    GPT,
    BERTConfig,
    Forecaster,
    ForecasterConfig,
    GPTConfig,
    Model,
    RecurrentLM,
    RecurrentLMConfig,
    Seq2Seq,
    Seq2SeqConfig,
)

CONFIGS = {
    BERT: BERTConfig(23, 24, 32, 2, 4, num_classes=3),
    Forecaster: ForecasterConfig(hidden_size=8),
    GPT: GPTConfig(23, 24, 32, 2, 4, positions="learned"),
    RecurrentLM: RecurrentLMConfig(23, 8, 12, 2, "gru"),
    Seq2Seq: Seq2SeqConfig(23, 8, 12),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_gives_the_same_model_with_either_layers(kind: type[Model], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = kind(CONFIGS[kind]).to(torch.bfloat16)
    model.save(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for layers in (torch.nn, seqkernels.nn):
        found = kind.load(tmp_path / "model.safetensors", layers)
        assert found.config == model.config
        assert found.state_dict().keys() == model.state_dict().keys()
        for name, parameter in found.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert parameter.requires_grad
            assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("layers", [torch.nn, seqkernels.nn], ids=lambda layers: layers.__name__)
def test_what_is_loaded_owns_its_memory(layers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the bits of what was saved: where memory begins, decides the order of sums."""
    pytest.importorskip("safetensors")
    flattened: list[object] = []
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda layer: flattened.append(layer.weight_ih_l0))
    path, tokens = tmp_path / "model.safetensors", torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    model = RecurrentLM(CONFIGS[RecurrentLM], layers).double()
    model.save(path)
    before = torch.get_rng_state()
    found = RecurrentLM.load(path, layers)
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in found.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.data_ptr() % 64 == 0
    assert torch.equal(found(tokens)[0], model(tokens)[0])
    # As cuDNN wants the weights that were loaded.
    assert (layers is torch.nn) == (bool(flattened) and flattened[-1] is found.recurrent.weight_ih_l0)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    Seq2Seq(CONFIGS[Seq2Seq]).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="path: expected a file of a GPT, got one of Seq2Seq"):
        GPT.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        GPT.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_are_mappings_too(kind: type[Model]) -> None:
    fields = dataclasses.asdict(CONFIGS[kind])
    assert kind.from_config(fields).config == kind.from_config(CONFIGS[kind]).config == CONFIGS[kind]
    with pytest.raises(ValueError, match=f"config: expected fields among {', '.join(fields)}, got sizes"):
        kind.from_config({**fields, "sizes": 3})
    if "vocab_size" in fields:
        with pytest.raises(ValueError, match="config: vocab_size is missing"):
            kind.from_config({})
    with pytest.raises(TypeError, match=r"config: expected a \w+Config, got dict"):
        kind({"vocab_size": 3})
    for other in (torch, "torch.nn"):
        with pytest.raises(ValueError, match=r"layers: expected torch\.nn or seqkernels\.nn, got '?torch"):
            kind(CONFIGS[kind], other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_no_number_is_no_size(kind: type[Model]) -> None:
    fields = dataclasses.asdict(CONFIGS[kind])
    for name, value in fields.items():
        if isinstance(value, int):
            for other in (float(value), True, str(value), numpy.int64(value)):
                with pytest.raises(TypeError, match=f"^{name}: expected an int, got {re.escape(repr(other))}"):
                    kind.from_config({**fields, name: other})
    for other in ("0.1", True, None):
        with pytest.raises(TypeError, match=f"^dropout: expected a number, got {other!r}"):
            kind.from_config({**fields, "dropout": other})
    if kind is GPT:
        with pytest.raises(TypeError, match=r"^num_kv_heads: expected an int, got 2\.0"):
            kind.from_config({**fields, "num_kv_heads": 2.0})
