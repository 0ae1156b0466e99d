"""What models share: configurations from mappings, and files that hold weights and sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
    with pytest.raises(ValueError, match=r"layers: expected torch\.nn or seqkernels\.nn, got torch"):
        kind(CONFIGS[kind], torch)
