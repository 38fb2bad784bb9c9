"""Figures as JSON, and names of columns, classes and models as names of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash


def write_figures(figures: Any, path: Path) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(without_nan(figures), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Return figures as JSON knows them: what is not a number is null.

    Example:
        >>> without_nan({"auc": float("nan"), "n": np.int64(3)})
        {'auc': None, 'n': 3}
    """
    if isinstance(value, dict):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def file_name(name: str) -> str:
    """Return a column's name as part of a file name; a hash tells apart names that would be too long or alike."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return plain if plain == name and len(plain) <= 60 else f"{plain[:60]}_{xxhash.xxh3_64_hexdigest(name.encode())[:6]}"
