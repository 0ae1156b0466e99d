"""Models of Hugging Face transformers with their own attention and with ``attn_implementation="seqkernels"``.

Small models with random weights: Llama (grouped heads), Mistral (window), Gemma 2 (softcap, window), gpt-oss (sinks,
window), BERT (bidirectional) and T5 (position bias), on padded batches; both are timed by turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from seqkernels.integrations.transformers import register

VOCABULARY = 1000
DECODER = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def decoder(name: str, size: int, **more: Any) -> Any:
    """A causal language model with a key head for every four query heads."""
    heads = {"num_attention_heads": size // 64, "num_key_value_heads": size // 256, "head_dim": 64}
    config = getattr(transformers, f"{name}Config")
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "max_position_embeddings": 4096}
    return getattr(transformers, f"{name}ForCausalLM")(config(**DECODER, **sizes, **heads, **more))


def bert(size: int) -> Any:
    """An encoder, which reads in both directions."""
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2}
    heads = {"num_attention_heads": size // 64, "max_position_embeddings": 4096}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **sizes, **heads))


def t5(size: int) -> Any:
    """An encoder and a decoder with learned biases of distances; a ReLU at 0 would turn rounding into differences."""
    sizes = {"d_model": size, "d_kv": 64, "d_ff": 2 * size, "num_layers": 2, "num_heads": size // 64}
    more = {"vocab_size": VOCABULARY, "eos_token_id": None, "feed_forward_proj": "gated-gelu"}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **more, decoder_start_token_id=0))


#: How to make each model of a size with a window, and what transformers runs it with by default.
MODELS: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "Llama": (lambda size, window: decoder("Llama", size), "sdpa"),
    "Mistral": (lambda size, window: decoder("Mistral", size, sliding_window=window), "sdpa"),
    "Gemma 2": (lambda size, window: decoder("Gemma2", size, sliding_window=window), "eager"),
    "gpt-oss": (lambda size, window: decoder("GptOss", size, sliding_window=window, num_local_experts=4), "eager"),
    "BERT": (lambda size, window: bert(size), "sdpa"),
    "T5": (lambda size, window: t5(size), "sdpa"),
}


def make_pair(name: str, size: int, window: int) -> tuple[Any, Any]:
    """A model with its own attention, and its copy with ours."""
    torch.manual_seed(0)
    make, own = MODELS[name]
    theirs = make(size, window).eval()
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation(own)
    ours.set_attn_implementation("seqkernels")
    return theirs, ours


def make_batch(name: str, rows: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of `length` down to half of it, padded (to the left for what generates); where logits count."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(length, length / 2, rows).long()[:, None]
    mask = (torch.arange(length) < lengths) if name in ("BERT", "T5") else torch.arange(length) >= length - lengths
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator) * mask
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if name == "T5":
        batch["decoder_input_ids"] = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(mask)
    return batch, mask


def forward(model: Any, batch: dict[str, Tensor], real: Tensor) -> Tensor:
    """Logits where they count, without gradients."""
    with torch.no_grad():
        return model(**batch).logits[real]


def backward(model: Any, batch: dict[str, Tensor], real: Tensor) -> Tensor:
    """The gradient of the embedding."""
    model.zero_grad()
    model(**batch).logits[real].square().mean().backward()
    return model.get_input_embeddings().weight.grad


def generate(model: Any, batch: dict[str, Tensor], steps: int) -> Tensor:
    """Greedy generation; the logits of each step."""
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**prompt, max_new_tokens=steps, **options).logits)


def compare(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], rounds: int) -> tuple[float, float, float, float]:
    """Median seconds of both by turns, the median of their ratios, and the largest relative difference of results."""
    expected = theirs()
    gap = ((expected - ours()).abs().max() / expected.abs().max()).item()
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            (theirs, ours)[i]()
            samples[i].append(time.perf_counter() - begin)
    ratio = statistics.median(a / b for a, b in zip(*samples, strict=True))
    return statistics.median(samples[0]), statistics.median(samples[1]), ratio, gap


def main(arguments: list[str] | None = None) -> None:
    """Compare all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest row (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, one round: does it run")
    options = parser.parse_args(arguments)
    for name, value in (("length", options.length), ("rounds", options.rounds)):
        if value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    small, full = (256, 2, 24, 4, 1), (512, 4, options.length, 64, options.rounds)
    size, rows, length, steps, rounds = small if options.quick else full
    register()
    transformers.logging.set_verbosity_error()
    print(f"{rows} rows of up to {length} tokens, {size} features, {torch.get_num_threads()} threads, float32")
    print(f"{'':25}{'their own':>14}{'ms':>9}{'seqkernels ms':>15}{'ratio':>8}{'difference':>12}")
    for name in tqdm(MODELS, unit="model"):
        pair, inputs = make_pair(name, size, length // 4), make_batch(name, rows, length)
        work: dict[str, Callable[[Any], Tensor]] = {
            "forward": lambda model, inputs=inputs: forward(model, *inputs),
            "with gradients": lambda model, inputs=inputs: backward(model, *inputs),
        }
        if name != "BERT":
            work["generate"] = lambda model, inputs=inputs: generate(model, inputs[0], steps)
        for what, run in work.items():
            calls = [lambda model=model, run=run: run(model) for model in pair]
            theirs, ours, ratio, gap = compare(*calls, rounds)
            columns = f"{theirs * 1e3:>9.1f}{ours * 1e3:>15.1f}{ratio:>8.2f}{gap:>12.1e}"
            tqdm.write(f"{name:10}{what:15}{MODELS[name][1]:>14}{columns}")


if __name__ == "__main__":
    main()
