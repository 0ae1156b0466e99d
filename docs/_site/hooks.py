"""What makes a site of the pages: those of the root, links of the site, formulas as MathML, pictures of results.

Links in the pages lead from file to file of the repository, as a reader of the sources follows them. Of those, the ones
to pages and pictures become links of the site, and the others, to sources, plain text.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Pages outside of docs/, by their names on the site.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "examples.md": "examples/README.md",
    "measuring.md": "benchmarks/README.md",
}
DECISIONS = "docs/decisions"
#: Pictures of the results whose tables a page has: the page, and the line in front of which each stands.
PICTURES = {
    "epyc-zen4-2-threads": ("benchmarks.md", "<!-- epyc-zen4-2-threads: "),
    "epyc-zen4-1-thread": ("benchmarks.md", "<!-- epyc-zen4-1-thread: "),
    "errors": ("errors.md", "## Attention\n"),
}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, the list of decisions and the pictures of results."""
    for name, path in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    files.append(File.generated(config, "decisions/index.md", content=_decisions()))
    for name in PICTURES:
        files.append(File.generated(config, f"images/{name}.png", content=_picture(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links of the site."""
    for name, (where, line) in PICTURES.items():
        if where == page.file.src_uri:
            if markdown.count(line) != 1:
                raise PluginError(f"docs/{where} has {markdown.count(line)} lines {line!r}, not one")
            markdown = markdown.replace(
                line, f"![{name}: what the tables say, as a picture](images/{name}.png)\n\n{line}"
            )
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    places = {path: name for name, path in OUTSIDE.items()} | {DECISIONS: "decisions/index.md"}

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:", link) or link.startswith("#"):
            return match[0]
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = places.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if target.startswith("docs/images/"):
            place = target.removeprefix("docs/")
        if place is None or files.get_file_from_path(place) is None:
            if not (ROOT / target).exists():
                raise PluginError(f"{source}: {link} leads nowhere")
            return text if text.startswith("`") else f"{text} (`{target}`)"
        relative = posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    parts = FENCE.split(BLOCK.sub(lambda match: _mathml(match[1], "block"), markdown))
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas in the text as MathML, which browsers draw by themselves."""
    return INLINE.sub(lambda match: _mathml(html.unescape(match[1]), "inline"), content)


def _mathml(formula: str, display: str) -> str:
    return latex2mathml.converter.convert(formula.strip(), display=display)


def _decisions() -> str:
    rows = []
    for path in sorted((ROOT / DECISIONS).glob("*.md")):
        title = path.read_text().partition("\n")[0].lstrip("# ")
        rows.append(f"- [{title}]({path.name})")
    return "# Decisions\n\nWhy things are as they are, with the measurements behind them.\n\n" + "\n".join(rows) + "\n"


def _picture(name: str) -> bytes:
    sys.path.insert(0, str(ROOT))
    from benchmarks import errors, report

    data: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        if name == "errors":
            errors.plot(data, path)
        else:
            report.plot(report.entries(data), report.machine(data), path)
        return path.read_bytes()
