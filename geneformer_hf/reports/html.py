"""One HTML file that needs nothing beside it: figures, baselines, pictures, split, settings."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class HeadSection:
    """What the report says of one head."""

    name: str
    verdict: str
    comparison: Sequence[Mapping[str, Any]]
    """Rows: the model first, then its baselines."""
    rows: Sequence[Mapping[str, Any]] = ()
    rows_title: str = ""
    pictures: Sequence[Path] = ()


@dataclass(frozen=True)
class Report:
    """A report of a fine-tuned model."""

    title: str
    subtitle: str
    heads: Sequence[HeadSection]
    split_lines: Sequence[str]
    settings: str
    balance: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Path] = field(default_factory=tuple)


def write_report(report: Report, path: Path) -> None:
    """Write a report; pictures are put into the file."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files(__package__) / TEMPLATE).read_text(encoding="utf-8"))
    heads = [
        {**vars(head), "comparison": _shown_rows(head.comparison), "rows": _shown_rows(head.rows), "pictures": _embedded(head.pictures)}
        for head in report.heads
    ]
    values = vars(report) | {"heads": heads, "pictures": _embedded(report.pictures), "balance": _shown_rows(report.balance)}
    path.write_text(template.render(values), encoding="utf-8")


def _embedded(pictures: Sequence[Path]) -> list[dict[str, str]]:
    found = [picture for picture in pictures if picture.is_file()]
    return [{"data": base64.b64encode(picture.read_bytes()).decode(), "alt": picture.stem.replace("_", " ")} for picture in found]


def _shown_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{str(name).replace("_", " "): shown(value) for name, value in row.items()} for row in rows]


def shown(value: Any) -> str:
    """Return a value for people.

    Example:
        >>> shown(0.91234), shown(12345), shown(float("nan")), shown("B cell")
        ('0.912', '12,345', '', 'B cell')
    """
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
