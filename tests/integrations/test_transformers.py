"""Models of Hugging Face transformers with ``attn_implementation="seqkernels"``, against their own implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels.testing import assert_within_budget

transformers = pytest.importorskip("transformers")

Results = dict[str, Tensor]
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
T5_SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}


def small(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more))

    return make


def bert() -> Any:
    heads = {n: x for n, x in SIZES.items() if n not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**heads, **dropout))


def t5() -> Any:
    more = {"decoder_start_token_id": 0, "eos_token_id": None, "dropout_rate": 0.0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZES, **more))


#: The model, and what transformers itself runs it with.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (small("Llama"), "sdpa"),
    "mistral": (small("Mistral", sliding_window=5), "sdpa"),
    "gemma2": (small("Gemma2", sliding_window=5, head_dim=8, attn_logit_softcapping=0.5), "eager"),
    "gpt_oss": (small("GptOss", sliding_window=5, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "eager"),
    "bert": (bert, "sdpa"),
    "t5": (t5, "sdpa"),
}
DECODERS = [name for name in MODELS if name != "bert"]


def load(name: str, implementation: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = MODELS[name][0]().to(dtype).eval()
    # Larger than models begin with, so that attention prefers something.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    if name == "gpt_oss":
        # The products of all experts in one call have no float64.
        model.set_experts_implementation("eager")
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def tokens(padding: str, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, missing in enumerate((4, 0, 7)[:rows]):
        mask[row, :missing] = 0
    if padding == "right":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a model, and (B, M), which of its outputs count."""
    batch = tokens(padding)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if name == "t5":
        batch["decoder_input_ids"] = tokens("none", length=8)["input_ids"]
        real = torch.ones(3, 8, dtype=torch.bool)
    return batch, real


def results(model: Any, batch: dict[str, Tensor], real: Tensor) -> Results:
    """Logits where they count, and the gradients of all parameters."""
    logits = model(**batch).logits[real]
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(grad.to(logits.dtype))
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def judge(actual: Results, oracle: Results, baseline: Results) -> None:
    """The logits, and all gradients together: in small ones torch is too often exact by luck."""
    assert actual.keys() == oracle.keys() == baseline.keys()
    assert_within_budget(actual["logits"], oracle["logits"], baseline["logits"], "logits")
    scales = {n: 2 ** x.abs().max().clamp(min=1e-30).log2().ceil() for n, x in oracle.items() if n != "logits"}
    together = [
        torch.cat([(found[n] / scale.to(found[n].dtype)).flatten() for n, scale in scales.items()])
        for found in (actual, oracle, baseline)
    ]
    assert_within_budget(*together, "gradients")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, padding: str, training: bool) -> None:
    batch, real = inputs_of(name, padding)
    found = []
    for implementation, dtype in (
        ("seqkernels", torch.float32),
        ("dense", torch.float64),
        (MODELS[name][1], torch.float32),
    ):
        found.append(results(load(name, implementation, dtype).train(training), batch, real))
    judge(*found)


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and logits (steps, B, V) of greedy generation."""
    found = model.generate(
        **batch, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, padding: str, cache: str | None) -> None:
    batch = tokens(padding)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    found = [
        generate(load(name, implementation, dtype), batch, **options)
        for implementation, dtype in (
            ("seqkernels", torch.float32),
            ("dense", torch.float64),
            (MODELS[name][1], torch.float32),
        )
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert_within_budget(*(logits for _, logits in found), "logits")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_prompt_in_pieces(name: str) -> None:
    """Several queries at once behind keys of the cache, with padding before them."""
    batch = tokens("left")
    found = []
    for implementation, dtype in (
        ("seqkernels", torch.float32),
        ("dense", torch.float64),
        (MODELS[name][1], torch.float32),
    ):
        model = load(name, implementation, dtype)
        cache = transformers.DynamicCache(config=model.config)
        logits = []
        for begin, end in ((0, 5), (5, 8), (8, 12)):
            part = {"input_ids": batch["input_ids"][:, begin:end], "attention_mask": batch["attention_mask"][:, :end]}
            logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
        found.append(torch.cat(logits, 1)[batch["attention_mask"].bool()].detach())
    assert_within_budget(*found, "logits")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_documents(name: str, rows: int) -> None:
    ids = tokens("none", rows)["input_ids"]
    starts = [(0, 5, 6), (0,), (0, 2, 9)][:rows]
    positions = torch.tensor([[i - max(x for x in row if x <= i) for i in range(12)] for row in starts])
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    real = torch.ones(rows, 12, dtype=torch.bool)
    found = []
    for implementation, dtype in (("seqkernels", torch.float32), ("dense", torch.float64), ("sdpa", torch.float32)):
        found.append(results(load(name, implementation, dtype), batch, real))
    judge(*found)


def test_models_that_ask_for_weights_are_told() -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        load("llama", "seqkernels")(**tokens("none"), output_attentions=True)


def test_bfloat16_and_autocast() -> None:
    batch, real = inputs_of("llama", "left")
    oracle = load("llama", "dense", torch.float64)(**batch).logits[real]
    halves = [load("llama", name, torch.bfloat16)(**batch).logits[real] for name in ("seqkernels", "sdpa")]
    assert_within_budget(halves[0], oracle, halves[1], "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        lowered = [load("llama", name)(**batch).logits[real] for name in ("seqkernels", "sdpa")]
    assert lowered[0].dtype == lowered[1].dtype
    assert_within_budget(lowered[0], oracle, lowered[1], "autocast")


def test_gradient_checkpointing() -> None:
    batch, real = inputs_of("mistral", "left")
    found = []
    for again in (False, True):
        model = load("mistral", "seqkernels").train()
        if again:
            model.activation_checkpointing_enable()
        found.append(results(model, batch, real))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole_graph() -> None:
    torch._dynamo.reset()
    batch, real = inputs_of("llama", "left")
    model = load("llama", "seqkernels")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**batch, use_cache=False).logits[real]
    oracle, baseline = (
        load("llama", name, dtype)(**batch).logits[real]
        for name, dtype in (("dense", torch.float64), ("sdpa", torch.float32))
    )
    assert_within_budget(found, oracle, baseline, "logits")


def test_models_run_the_kernels() -> None:
    explanation = seqkernels.explain(load("llama", "seqkernels"), **tokens("left"))
    calls = [entry.call for entry in explanation.entries if not isinstance(entry, str)]
    assert len(calls) == 2
    assert all("grouped" in call.features for call in calls)


def test_switched_back_and_forth() -> None:
    model = load("llama", "sdpa")
    batch, real = inputs_of("llama", "left")
    before = model(**batch).logits[real]
    model.set_attn_implementation("seqkernels")
    between = model(**batch).logits[real]
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch).logits[real], before)
    assert_within_budget(between, load("llama", "dense", torch.float64)(**batch).logits[real], before, "logits")
    made = transformers.LlamaForCausalLM._from_config(model.config, attn_implementation="seqkernels")
    assert made.config._attn_implementation == "seqkernels"


def test_models_of_several_parts() -> None:
    """Each part of a model has its own implementation."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    batch = tokens("left", rows=1)
    batch["input_ids"][0, 5:8] = 60
    batch["input_ids"][0, 8:] %= 60
    batch["input_ids"][0, 8] = 60
    batch["pixel_values"] = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    found = []
    for names in ({"text_config": "seqkernels", "vision_config": "sdpa"}, "seqkernels", "dense", "sdpa"):
        model.to(torch.float64 if names == "dense" else torch.float32).set_attn_implementation(names)
        pixels = batch["pixel_values"].to(model.dtype)
        found.append(model(**{**batch, "pixel_values": pixels}).logits[:, 4:].detach())
        if isinstance(names, dict):
            assert model.config.text_config._attn_implementation == "seqkernels"
            assert model.config.vision_config._attn_implementation == "sdpa"
    assert_within_budget(found[0], found[2], found[3], "the text alone")
    assert_within_budget(found[1], found[2], found[3], "both")
