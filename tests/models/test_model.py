"""What models share: configurations from mappings, and files that hold weights and sizes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

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
    mask_tokens,
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
    with pytest.raises(ValueError, match=r"path: expected a file of a GPT, got .*safetensors, one of a Seq2Seq"):
        GPT.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers: expected torch\.nn or seqkernels\.nn"):
        Seq2Seq.load(tmp_path / "model.safetensors", torch)
    with pytest.raises(RuntimeError, match=r"device type .*: nothing"):
        Seq2Seq.load(tmp_path / "model.safetensors", device="nothing")
    with pytest.raises(FileNotFoundError):
        GPT.load(tmp_path / "none.safetensors")


def header(metadata: dict[str, str] | None) -> bytes:
    """A safetensors file of no tensors."""
    text = json.dumps({} if metadata is None else {"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is no safetensors file"),
        (b"weights of a model", "which is no safetensors file"),
        (None, "whose metadata name no model"),
        ({}, "whose metadata name no model"),
        ({"config": "{}"}, "whose metadata name no model"),
        ({"model": ""}, "whose metadata name no model"),
        ({"model": "LSTM", "config": "{}"}, "one of a LSTM"),
        ({"model": "", "config": "{"}, "whose configuration is none: Expecting property name"),
        ({"model": "", "config": "[7]"}, "whose configuration is none: config: expected a mapping, got list"),
        ({"model": "", "config": '{"3": 3}'}, "whose configuration is none: config: expected fields among .*, got 3"),
        ({"model": "", "config": '{"dropout": 2}'}, "whose configuration is none: .*"),
        ({"model": "", "config": '{"dropout": "2", "vocab_size": 9}'}, "whose configuration is none: .*"),
    ],
)
def test_files_of_nothing_are_refused(kind: type[Model], content: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    if isinstance(content, dict) and content.get("model") == "":
        content = {**content, "model": kind.__name__}
    path = tmp_path / "model.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else header(content))
    expected = f"path: expected a file of a {kind.__name__}, got {re.escape(str(path))}, {message}"
    with pytest.raises(ValueError, match=f"^{expected}"):
        kind.load(path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_are_mappings_too(kind: type[Model]) -> None:
    fields = dataclasses.asdict(CONFIGS[kind])
    assert kind.from_config(fields).config == kind.from_config(CONFIGS[kind]).config == CONFIGS[kind]
    with pytest.raises(ValueError, match=f"config: expected fields among {', '.join(fields)}, got sizes"):
        kind.from_config({**fields, "sizes": 3})
    if "vocab_size" in fields:
        with pytest.raises(ValueError, match="config: vocab_size is missing"):
            kind.from_config({})
    with pytest.raises(ValueError, match=r"config: expected fields among .*, got 3, sizes"):
        kind.from_config({**fields, "sizes": 3, 3: 3})
    with pytest.raises(TypeError, match=r"config: expected a \w+Config, got list"):
        kind.from_config([3])
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_fields_of_other_types_are_named(kind: type[Model]) -> None:
    for field in dataclasses.fields(CONFIGS[kind]):
        optional = "None" in str(field.type)
        others: list[Any] = [["lstm"], {}, {"lstm"}, b"lstm", 1j, numpy.array([1, 2]), torch.ones(2)]
        others += [3 if field.type == "str" else "3", *([] if optional else [None])]
        for other in others:
            with pytest.raises(TypeError, match=f"^{field.name}: expected .*, got {re.escape(repr(other))}$"):
                dataclasses.replace(CONFIGS[kind], **{field.name: other})


def test_what_is_no_tensor_is_named() -> None:
    models = {kind: kind(config).eval() for kind, config in CONFIGS.items()}
    tokens, lengths = torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2])
    text, series = [[1, 2, 3]], [[[0.5]]]
    bert, gpt, lm, pairs = models[BERT], models[GPT], models[RecurrentLM], models[Seq2Seq]
    forecaster = models[Forecaster]
    for name, calls in {
        "tokens": [
            *(lambda model=model: model(text) for model in (bert, gpt, lm)),
            *(lambda model=model: model.generate(text, 1) for model in (gpt, lm)),
            *(lambda call=call: call(text) for call in (bert.encode, bert.classify)),
            lambda: mask_tokens(text, bert.config),
        ],
        "segments": [lambda: bert(tokens, lengths, text)],
        "lengths": [
            lambda: bert(tokens, [3, 2]),
            *(lambda call=call: call(tokens, [3, 2], tokens) for call in (pairs, pairs.align)),
            lambda: pairs.translate(tokens, [3, 2]),
        ],
        "source": [
            *(lambda call=call: call(text, lengths, tokens) for call in (pairs, pairs.align)),
            lambda: pairs.translate(text, lengths),
            lambda: pairs.generate(text, lengths, 1),
            lambda: pairs.encode(text, lengths),
        ],
        "target": [lambda call=call: call(tokens, lengths, text) for call in (pairs, pairs.align)],
        "start": [lambda: pairs.translate(tokens, lengths, [1, 1])],
        "x": [lambda: forecaster(series), lambda: forecaster.read(series), lambda: forecaster.forecast(series, 1)],
    }.items():
        for call in calls:
            with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got list$"):
                call()


def test_other_numbers_of_calls_are_named() -> None:
    tokens, lengths = torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2])
    gpt, lm, pairs = (kind(CONFIGS[kind]).eval() for kind in (GPT, RecurrentLM, Seq2Seq))
    forecaster = Forecaster(CONFIGS[Forecaster])
    for call, message in (
        (lambda: gpt.generate(tokens, 2.0), r"steps: expected an integer, got 2\.0"),
        (lambda: gpt.generate(tokens, 2, eos=1.5), r"eos: expected an integer, got 1\.5"),
        (lambda: lm.generate(tokens, True), "steps: expected an integer, got True"),
        (lambda: pairs.generate(tokens, lengths, 2.0), r"steps: expected an integer, got 2\.0"),
        (lambda: pairs.translate(tokens, lengths, max_length=2.5), r"max_length: expected an integer, got 2\.5"),
        (lambda: pairs.translate(tokens, lengths, beams=2.0), r"beams: expected an integer, got 2\.0"),
        (lambda: pairs(tokens, lengths, tokens, "1"), "teacher_forcing: expected a number, got '1'"),
        (lambda: forecaster.forecast(torch.ones(1, 2, 1), 1.5), r"steps: expected an integer, got 1\.5"),
        (lambda: mask_tokens(tokens, CONFIGS[BERT], probability="1"), "probability: expected a number, got '1'"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            call()
    assert gpt.generate(tokens, numpy.int64(2), eos=numpy.int32(1)).shape == (2, 5)
    assert forecaster.forecast(torch.ones(1, 2, 1), numpy.int64(2)).shape == (1, 2, 1)
