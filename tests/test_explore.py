"""``python -m seqkernels explore``."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import seqkernels
from seqkernels import __main__ as cli
from seqkernels import explore

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("matplotlib")

TEXTS = ("a b c", "b a a b", "x")


def assert_rounded(found, wanted):
    """Within some roundings of the largest number, or of 1 where all are smaller: sums are of a few products."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    allowed = 8 * torch.finfo(wanted.dtype).eps * max(1.0, wanted.abs().max().item())
    assert (found - wanted).abs().max().item() <= allowed


def transcribed(text, dtype, embedding=2, hidden=2, seed=42):
    """The mathematics in plain torch, with the layout of draws of the notebook that the command grew from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        numbers = {}
        for token in text.split():
            numbers.setdefault(token, len(numbers))
        matrix = torch.randn(len(numbers), embedding)
        w_input, w_memory = torch.randn(embedding, hidden), torch.randn(hidden, hidden)
        w_lstm = torch.randn(embedding + hidden, 4 * hidden)
        w_query, w_key, w_value = (torch.randn(embedding, embedding) for _ in range(3))
    matrix, w_input, w_memory, w_lstm, w_query, w_key, w_value = (
        w.to(dtype) for w in (matrix, w_input, w_memory, w_lstm, w_query, w_key, w_value)
    )
    x = torch.stack([matrix[numbers[token]] for token in text.split()])
    rnn, h = [], torch.zeros(hidden, dtype=dtype)
    for row in x:
        parts = {"input": row, "state_before": h}
        parts |= {"input_contribution": row @ w_input, "memory_contribution": h @ w_memory}
        h = torch.tanh(parts["input_contribution"] + parts["memory_contribution"])
        rnn.append(parts | {"state": h})
    lstm, h, c = [], torch.zeros(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    for row in x:
        i, f, g, o = (torch.cat([row, h]) @ w_lstm).chunk(4)
        parts = {"state_before": h, "cell_before": c, "candidate": torch.tanh(g)}
        parts |= {"input_gate": torch.sigmoid(i), "forget_gate": torch.sigmoid(f), "output_gate": torch.sigmoid(o)}
        parts |= {"kept_part": parts["forget_gate"] * c, "new_part": parts["input_gate"] * parts["candidate"]}
        c = parts["kept_part"] + parts["new_part"]
        h = parts["output_gate"] * torch.tanh(c)
        lstm.append(parts | {"cell": c, "state": h})
    q, k, v = x @ w_query, x @ w_key, x @ w_value
    scores = q @ k.T / embedding**0.5
    weights = torch.softmax(scores, -1)
    attention = {"queries": q, "keys": k, "values": v, "scores": scores, "weights": weights, "output": weights @ v}
    return {"rnn": rnn, "lstm": lstm, "attention": [attention | {"lse": torch.logsumexp(scores, -1)}]}


def flat(found):
    """Values by model, step and name."""
    steps = {section.model: section.steps or (section.whole,) for section in found.sections}
    return {
        (model, t, name): quantity.values
        for model, quantities in steps.items()
        for t, step in enumerate(quantities)
        for name, quantity in step.items()
    }


def expected(*args, **sizes):
    found = transcribed(*args, **sizes).items()
    return {(m, t, name): x for m, steps in found for t, step in enumerate(steps) for name, x in step.items()}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_are_those_of_the_mathematics(text, dtype):
    for sizes in ({}, {"embedding": 3, "hidden": 5, "seed": 7}) if dtype == torch.float64 else ({},):
        found = flat(explore.explore(text, dtype=dtype, **sizes))
        for name, wanted in expected(text, torch.float64, **sizes).items():
            assert found[name].dtype == dtype
            # One rounding of the largest number, of those below 1 of the numbers up to 1 that they are made of; in
            # float64, where the transcription has errors too, and of sums of more products, a few.
            allowed = 1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps
            error = (found[name].double() - wanted).abs().max().item()
            assert error <= allowed * max(wanted.abs().max().item(), 1.0), name


def test_one_name_is_no_sequence_of_names():
    with pytest.raises(TypeError, match="models: expected a sequence of names, got the text 'rnn'"):
        explore.explore("a b", models="rnn")


def test_numbers_of_the_notebook():
    """As it prints them, of its own seed and text."""
    found = flat(explore.explore("a b c"))
    for name, wanted in {
        ("rnn", 2, "state"): "[-0.9068,  0.1196]",
        ("lstm", 2, "forget_gate"): "[0.9465, 0.5548]",
        ("lstm", 2, "cell"): "[0.5010, 0.3202]",
        ("lstm", 2, "state"): "[0.2778, 0.0413]",
    }.items():
        assert explore.numbers(found[name]) == [wanted]
        assert repr(found[name]) == f"tensor({wanted})"
    weights = ["[0.2899, 0.2954, 0.4148]", "[0.2864, 0.2924, 0.4212]", "[0.4283, 0.4076, 0.1641]"]
    assert explore.numbers(found["attention", 0, "weights"]) == weights
    for name, values in expected("a b c", torch.float32).items():
        assert explore.numbers(found[name]) == explore.numbers(values), name


@pytest.mark.parametrize("text", TEXTS)
def test_gru(text):
    found = explore.explore(text, models=["gru"], hidden=3, dtype=torch.float64)
    w_input, w_memory = found.parameters["gru_input"], found.parameters["gru_memory"]
    h = torch.zeros(1, 3, dtype=torch.float64)
    for step, token in zip(found.sections[0].steps, found.tokens, strict=True):
        x = found.parameters["embedding"][found.vocabulary[token]]
        value = {name: quantity.values for name, quantity in step.items()}
        r, z, n = (value[name] for name in ("reset_gate", "update_gate", "candidate"))
        of_x, of_h = value["input_contribution"].chunk(3), value["memory_contribution"].chunk(3)
        for gate, wanted in ((r, of_x[0] + of_h[0]), (z, of_x[1] + of_h[1])):
            assert_rounded(gate, wanted.sigmoid())
        assert_rounded(n, (of_x[2] + r * of_h[2]).tanh())
        h = torch.gru_cell(x[None], h, w_input.T, w_memory.T)
        for state in (value["state"], value["kept_part"] + value["new_part"]):
            assert_rounded(state, h[0])


def test_causal():
    whole = explore.explore("a b c b", models=["attention"], is_causal=True, dtype=torch.float64).sections[0].whole
    q, k, v = (whole[name].values[None, None] for name in ("queries", "keys", "values"))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0]
    assert_rounded(whole["output"].values, wanted)
    later = torch.ones(4, 4).triu(1).bool()
    assert torch.equal(whole["scores"].values == -torch.inf, later)
    assert torch.equal(whole["weights"].values == 0, later)
    assert_rounded((whole["scores"].values - whole["lse"].values[:, None]).exp(), whole["weights"].values)


def test_where_numbers_are_from():
    found = explore.explore("a b")
    kernel = {
        "rnn": {"state"},
        "lstm": {"input_gate", "forget_gate", "candidate", "output_gate", "cell", "state"},
        "gru": {"reset_gate", "update_gate", "candidate", "state"},
        "attention": {"lse", "weights", "output"},
    }
    for section in found.sections:
        step = section.steps[0] if section.steps else section.whole
        assert {name for name, quantity in step.items() if quantity.source == "kernel"} == kernel[section.model]
    assert found.sections[0].steps[1]["state_before"].source == "kernel"


def test_says_what_ran():
    with seqkernels.use_backend("reference"):
        found = explore.explore("a b", models=["lstm", "attention"])
    recurrence, (attention, weights) = (section.ran for section in found.sections)
    assert recurrence == ("lstm recurrence of torch.float32 on cpu -> reference",)
    assert attention == "attention of torch.float32 on cpu -> reference"
    assert weights == "attention of torch.float32 on cpu with weights -> reference"


def test_weights_depend_on_the_seed_alone():
    few = explore.explore("b a", models=["gru"], dtype=torch.float64).parameters
    for name, x in explore.explore("x y").parameters.items():
        assert torch.equal(few[name], x.double())
    other = explore.explore("x y", seed=43).parameters
    assert not torch.equal(other["lstm"], explore.explore("x y").parameters["lstm"])
    assert explore.explore("y x y").vocabulary == {"y": 0, "x": 1}


def test_json(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", "a b c", "--json", "--causal", "--dtype", "float64", "--hidden", "3"])
    assert stop.value.code == 0
    read = json.loads(capsys.readouterr().out)
    found = explore.explore("a b c", is_causal=True, dtype=torch.float64, hidden=3)
    assert read["tokens"] == ["a", "b", "c"]
    assert (read["vocabulary"], read["seed"], read["dtype"]) == ({"a": 0, "b": 1, "c": 2}, 42, "float64")
    assert read["parameters"]["lstm"] == found.parameters["lstm"].tolist()
    for (model, t, name), values in flat(found).items():
        content = read["models"][model]
        content = (content["steps"][t] if content["steps"] else content)[name]["values"]
        if name == "scores":
            assert content[0][1:] == [None, None]
            content = [[-torch.inf if x is None else x for x in row] for row in content]
        assert content == values.tolist()


@pytest.mark.parametrize("width", [48, 80, 160])
def test_tables_fit(width):
    """Every number is in the text, and no line is too wide, in a pipe too."""
    found = explore.explore("a [b] :smile: a", hidden=7)
    file = io.StringIO()
    explore.show(found, rich_console.Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert text.startswith("a [b] :smile: a ")
    assert text.count("[b]") > 1
    printed = set(re.findall(r"-?\d+\.\d{4}", text))
    for name, values in flat(found).items():
        assert {f"{value:.4f}" for value in values.flatten().tolist()} <= printed, name


def test_text(capsys):
    with pytest.raises(SystemExit):
        cli.main(["explore", "a b", "--only", "lstm"])
    text = capsys.readouterr().out
    assert "LSTM" in text
    assert "Self-attention" not in text
    assert "-> " in text
    assert max(map(len, text.splitlines())) <= 80


def test_gates_in_words():
    step = explore.explore("a", models=["lstm"]).sections[0].steps[0]
    assert step["forget_gate"].meaning.endswith("here 56%, 66% open")
    step = explore.explore("a", models=["lstm"], hidden=9).sections[0].steps[0]
    low, high = (f"{100 * x:.0f}%" for x in step["forget_gate"].values.aminmax())
    assert step["forget_gate"].meaning.endswith(f"here from {low} to {high} open")


def test_picture(tmp_path, monkeypatch):
    from matplotlib import colormaps, image

    monkeypatch.setattr("seqkernels.explore.output._CELLS_WITH_NUMBERS", 0)
    found = explore.explore("a b", models=["lstm", "attention"], is_causal=True)
    explore.picture(found, str(tmp_path / "a.png"))
    picture = torch.from_numpy(image.imread(tmp_path / "a.png"))
    shares = [found.sections[1].whole["weights"].values[1, 0], found.sections[0].steps[1]["forget_gate"].values[0]]
    for share in shares:
        colour = torch.tensor(colormaps["viridis"](share.item())[:3])
        near = (picture[:, :, :3] - colour).abs().amax(-1) < 0.01
        assert near.sum() > 200


def test_tokens_of_a_picture_are_no_formulas(tmp_path):
    explore.picture(explore.explore(r"$\frac$ $_$", models=["attention"]), str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["  "], "text: expected tokens with spaces between them, got '  '"),
        (["a", "--hidden", "0"], "hidden: expected from 1 to 512, got 0"),
        (["a", "--embedding", "513"], "embedding: expected from 1 to 512, got 513"),
        (["a", "--seed", "-1"], "seed: expected from 0 to 2**63 - 1, got -1"),
        (["a", "--device", "nowhere"], "nowhere"),
        (["a", "--only", "rnn", "--png", "/dev/null/a.png"], "/dev/null/a.png"),
        (["a", "--only", "rnn", "--png", ""], "No such file or directory: ''"),
    ],
)
def test_errors(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", *words])
    assert stop.value.code == 1
    told = capsys.readouterr()
    assert told.err.startswith("explore: ")
    assert message in told.err
    assert not told.out


def test_errors_of_the_function():
    with pytest.raises(ValueError, match="models: expected some of"):
        explore.explore("a", models=[])
    with pytest.raises(ValueError, match="models: 'bert' is not one of 'rnn', 'lstm', 'gru', 'attention'"):
        explore.explore("a", models=["bert"])
    with pytest.raises(TypeError, match="dtype: expected one of"):
        explore.explore("a", dtype=torch.int64)


@pytest.mark.parametrize(
    "device", ["hpu", "meta", "mps", "nonsense", "xpu", *([] if torch.cuda.is_available() else ["cuda:0"])]
)
def test_devices_that_are_not_there_are_named(device):
    with pytest.raises(ValueError, match=f"^device: expected one that torch can use here, got '{device}': .+"):
        explore.explore("a", device=device)


@pytest.mark.parametrize(("module", "words"), [("rich.console", []), ("matplotlib.figure", ["--png", "a.png"])])
def test_what_is_missing_is_named(module, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["explore", "a", *words])
    assert stop.value.code == 1
    assert "pip install 'seqkernels[examples]'" in capsys.readouterr().err
