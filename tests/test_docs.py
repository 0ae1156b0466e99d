"""The documentation is true: its Python runs, its links lead somewhere, its code maps name what is there."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/attention-layers.md"])
def test_python_blocks_run(page: str, pure: bool) -> None:
    text = (ROOT / page).read_text()
    blocks = [match for match in FENCE.finditer(text) if match[1] == "python"]
    assert blocks
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "example"}
    with warnings.catch_warnings():
        if pure:
            # Options that only the compiled module and the reference have.
            warnings.filterwarnings("ignore", ".*on the slow reference implementation")
        for block in blocks:
            # Empty lines in front make the line numbers of a traceback those of the page.
            above = text[: block.start(2)].count("\n")
            exec(compile("\n" * above + block[2], str(ROOT / page), "exec"), namespace)


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
    for page in PAGES:
        reached = page in linked or page.parent in linked
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
