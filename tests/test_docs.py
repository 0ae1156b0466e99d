"""The documentation is true: its Python runs, its links lead somewhere, its code maps name what is there."""

import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from seqkernels.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples")),
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


#: What excerpts of longer programs stand on.
CONTEXT = {
    "docs/gpu.md": 'import torch; device = "cuda" if torch.cuda.is_available() else "cpu"  # where it is emulated',
    "examples/README.md": """
import torch, transformers, seqkernels
from types import SimpleNamespace
torch.manual_seed(0)
lstm, x, starts = seqkernels.nn.LSTM(3, 4), torch.randn(5, 2, 3), (torch.rand(5, 2) < 0.5).float()
hx = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
def one_call(): ...
class Model(torch.nn.Module):
    set_attn_implementation = staticmethod({"seqkernels"}.remove)
model = Model()
model.policy = torch.nn.Sequential(torch.nn.LSTM(3, 4))
""",
}


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    return [match for match in FENCE.finditer(page.read_text()) if match[1] == language]


# torch's own, in torch.compile and torch.onnx
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, pure: bool) -> None:
    name = name_of(page)
    if name == "docs/gpu.md" and pure and not torch.cuda.is_available():
        pytest.skip("kernels of GPUs, or their emulation, are not installed")
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "example"}
    exec(CONTEXT.get(name, ""), namespace)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if pure:
            # Options that only the compiled module and the reference have.
            warnings.filterwarnings("ignore", ".*on the slow reference implementation")
        for block in blocks(page, "python"):
            # Empty lines in front make the line numbers of a traceback those of the page.
            above = text[: block.start(2)].count("\n")
            exec(compile("\n" * above + block[2], str(page), "exec"), namespace)


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            assert language in ("python", "sh", "text", "math"), f"{name_of(page)}: {language!r} in front of {block!r}"


def assert_options_of(program: Path, words: list[str]) -> None:
    """Each option of a command is one that the program's text names."""
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in program.read_text(), f"{program.name} has no option {word}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=name_of)
def test_commands_are_there(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a command names exists; those that take seconds only say what they would do."""
    for block in blocks(page, "sh"):
        for line in filter(None, block[2].splitlines()):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            elif words[:2] == ["pip", "install"]:
                assert (ROOT / "pyproject.toml").exists(), line
                extras = re.findall(r"\[(.*)\]", words[-1])
                for extra in filter(None, ",".join(extras).split(",")):
                    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), line
            else:
                assert Path(words[0]).name == "python", line
                if words[1] == "-m":
                    module, arguments = words[2], words[3:]
                    beside = (ROOT / module.replace(".", "/")).with_suffix(".py")
                    assert module in ("pytest", "seqkernels") or beside.is_file(), line
                    if module == "seqkernels":
                        with pytest.raises(SystemExit, match=r"^0$"):
                            main([arguments[0], "--help"])
                        known = capsys.readouterr().out
                        assert all(word in known for word in arguments if word.startswith("--")), line
                    elif beside.is_file():
                        assert_options_of(beside, arguments)
                else:
                    assert (ROOT / words[1]).is_file(), line
                    assert_options_of(ROOT / words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_code_maps_name_what_is_there(page: str) -> None:
    rows = re.findall(r"^\| Path \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) == 1
    paths = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in rows[0].splitlines()))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), f"{path} does not exist"


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in LINK.findall(prose(page))}
    listed = {
        ROOT / "docs" / path for path in re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    }
    for page in PAGES:
        reached = page in linked | listed or page.parent in linked
        assert reached or page.name == "README.md", f"no page links to {name_of(page)}"


def test_measured_table_is_marked_for_the_generator() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results:begin -->") == text.count("<!-- results:end -->") == 1
    assert text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")


def test_mathematics_is_well_formed() -> None:
    for page in PAGES:
        inline = re.sub(r"`[^`]*`", "", prose(page))
        assert inline.count("$") % 2 == 0, f"{name_of(page)}: an odd number of $"
        for formula in re.findall(r"\$([^$]+)\$", inline):
            # Between single $, Markdown takes a backslash before punctuation away; and a line break ends the formula.
            assert not re.search(r"\\[^a-zA-Z]|\n", formula), f"{name_of(page)}: {formula!r}"
        for language, block in FENCE.findall(page.read_text()):
            if language == "math":
                assert block.count("{") == block.count("}"), f"{name_of(page)}: {block}"


def test_public_names_are_in_the_guide() -> None:
    import seqkernels

    guide = (ROOT / "docs" / "guide.md").read_text()
    layers = [name for name in seqkernels.nn.__all__ if hasattr(torch.nn, name)]
    for name in [*layers, "convert", "revert", "explain", "use_backend", "BackendError", "warmup"]:
        assert f"`{name}`" in guide or f"{name}(" in guide, f"{name} is not in docs/guide.md"
