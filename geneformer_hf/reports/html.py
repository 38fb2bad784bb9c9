"""One HTML file that needs nothing beside it: sections of words, tables and pictures, for wide and narrow screens."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Table:
    """Rows of one set of columns."""

    rows: Sequence[Mapping[str, Any]]
    title: str = ""
    n_marked: int = 0
    """First rows that are set off from the others: the models, before their baselines."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order; what is empty is left out."""

    title: str
    verdict: str = ""
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Path] = ()
    further: Sequence[Table] = ()
    """Tables below the pictures."""
    points: Sequence[str] = ()
    settings: str = ""


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def write_page(page: Page, path: Path) -> None:
    """Write a report; pictures are put into the file."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files(__package__) / TEMPLATE).read_text(encoding="utf-8"))
    sections = [vars(section) | {"pictures": _embedded(section.pictures)} for section in page.sections]
    path.write_text(template.render(title=page.title, subtitle=page.subtitle, sections=sections, shown=shown), encoding="utf-8")


def _embedded(pictures: Sequence[Path]) -> list[dict[str, str]]:
    found = [picture for picture in pictures if picture.is_file()]
    return [{"data": base64.b64encode(picture.read_bytes()).decode(), "alt": picture.stem.replace("_", " ")} for picture in found]


def shown(value: Any) -> str:
    """Return a value for people.

    Example:
        >>> shown(0.91234), shown(12345), shown(float("nan")), shown("B cell")
        ('0.912', '12,345', '', 'B cell')
    """
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
