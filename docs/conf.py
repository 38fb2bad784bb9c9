"""The site of the documentation, by Sphinx: `make docs` builds it into site/, with warnings as errors.

Pages lie in docs/ and link to what lies beside it as in the repository; the README is the first page, and cards, change log and examples are
written into docs/_beside for the build.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import geneformer_hf

ROOT, BESIDE = Path(__file__).parents[1], Path(__file__).parent / "_beside"

project, author, version = "geneformer_hf", "the authors of geneformer_hf", geneformer_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", "geneformer_hf"
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["_build", "_beside/first_page.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Backticks in our docstrings are code, as in transformers'.
default_role = "code"
autodoc_typehints, autodoc_member_order, autodoc_class_signature = "none", "bysource", "mixed"
autodoc_default_options = {"members": True, "undoc-members": False, "inherited-members": False, "show-inheritance": False}

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Source|Attributes)(?: \([^)]*\))?:[ ]?(.*)$")
ITEM = re.compile(r"^([\w, *.]+?)( \([^:]*\))?:(?=\s|$)(.*)$")
TO_BESIDE = re.compile(r"\]\(\.\./((?:model_cards|examples|CHANGELOG|CONTRIBUTING)[^)#]*)")


def setup(app: Any) -> None:
    """Make the pages that lie outside docs/, and read docstrings as they are written here."""
    write_beside()
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: lines.__setitem__(slice(None), as_rst(lines)))
    app.connect("source-read", point_beside)


def write_beside() -> None:
    """Copy what the site takes from beside docs/."""
    shutil.rmtree(BESIDE, ignore_errors=True)
    (BESIDE / "model_cards").mkdir(parents=True)
    for path in sorted((ROOT / "model_cards").glob("*.md")):
        # Folders of the repository are no pages.
        text = re.sub(r"\[([^\]]*)\]\(\.\./geneformer_hf[^)]*\)", r"\1", path.read_text(encoding="utf-8"))
        (BESIDE / "model_cards" / path.name).write_text(text, encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copyfile(ROOT / name, BESIDE / name)
    examples = [f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8').strip()}\n```\n" for path in sorted((ROOT / "examples").glob("*.py"))]
    (BESIDE / "examples.md").write_text("# Examples\n\nEach is one idea, and run by the tests.\n\n" + "\n".join(examples), encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[(`benchmarks`)\]\(benchmarks\)", r"\1", text).replace("](docs/", "](").replace("](examples)", "](_beside/examples.md)")
    text = re.sub(r"\]\((model_cards/|CHANGELOG)", r"](_beside/\1", text)
    (BESIDE / "first_page.md").write_text(text, encoding="utf-8")


def point_beside(app: Any, name: str, source: list[str]) -> None:
    """Turn links of pages to what lies beside docs/ into links to its copies."""
    if not name.startswith("_beside"):
        pages = {"examples": "examples.md", "model_cards": "model_cards/README.md"}
        source[0] = TO_BESIDE.sub(
            lambda found: f"](_beside/{pages.get(found.group(1).split('/')[0] if not found.group(1).endswith('.md') else '', found.group(1))}", source[0]
        )
        return
    source[0] = source[0].replace("](../docs/", "](../../").replace("](docs/", "](../")
    source[0] = re.sub(r"\]\((?:\.\./)*examples/?[^)]*\)", "](/_beside/examples.md)", source[0]) if "examples.md" not in name else source[0]


def as_rst(lines: list[str]) -> list[str]:
    """Return a docstring in transformers' grammar as reStructuredText: sections become lists, examples stay what they are."""
    out: list[str] = []
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        found = SECTION.match(line)
        if found is None:
            out.append(line)
            continue
        block: list[str] = []
        while rest and (not rest[0].strip() or rest[0].startswith((" ", "\t"))):
            block.append(rest.pop(0))
        body = textwrap.dedent("\n".join(block)).strip("\n")
        out += ["", f"**{found.group(1)}**", "", *_section(found.group(1), found.group(2), body), ""]
    return out


def _section(name: str, rest: str, body: str) -> list[str]:
    if name == "Example":
        return body.splitlines()
    if name not in ("Args", "Attributes"):
        return [" ".join([rest, *body.split()]).strip()]
    items: list[list[str]] = []
    for line in body.splitlines():
        if line and not line.startswith(" "):
            items.append([line])
        elif items and line.strip():
            items[-1].append(line.strip())
    shown = []
    for item in items:
        found = ITEM.match(item[0])
        head = item[0] if found is None else f"**{found.group(1).strip()}**{found.group(2) or ''}:{found.group(3)}"
        shown.append("- " + " ".join([head, *item[1:]]).replace("**kwargs", r"\*\*kwargs"))
    return shown
