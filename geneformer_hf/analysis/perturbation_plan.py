"""What a perturbation run will do, before it does it: cells, variants, rows, time and room on the disk; and what tells it from another."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError, SettingError
from .perturbations import DELETE, INHIBIT, OVEREXPRESS, Change, EveryGene, Screen
from .readouts import GENE, PROBABILITY

logger = logging.getLogger(__name__)

SHOWN = 20
VARIANTS_PER_PART = 5000
ROWS_PER_PART = 2_000_000
"""A part is held in memory before it is written."""
BYTES_PER_ROW = 12
"""Of a finished table, compressed: 4 of gene readouts to 9 of few values were measured."""


@dataclass(frozen=True)
class PerturbationPlan:
    """A run: which cells, how many variants of them, how long it takes."""

    rows: np.ndarray
    """int64 of shape `(n,)`: the cells that are perturbed, sorted."""
    n_variants_n: np.ndarray
    """int64 of shape `(n,)`: variants of each, at most: a gene that is at the top already is not moved there."""
    n_genes_n: np.ndarray
    """int64 of shape `(n,)`."""
    values_per_variant: int
    """Rows of the table for one variant, without those of its genes."""
    reads_genes: bool
    identity: dict[str, Any]
    """What the result depends on."""
    estimates: bool = False
    """Whether each gene is estimated as well."""
    never: tuple[str, ...] = ()
    """Perturbations that can be made in none of the cells."""
    seconds: float | None = None
    """Estimated from a few variants of a cell of middle length."""

    @property
    def n_variants(self) -> int:
        """Variants of all cells."""
        return int(self.n_variants_n.sum())

    @property
    def n_rows_n(self) -> np.ndarray:
        """Rows of each cell, at most, int64 of shape `(n,)`."""
        return self.n_variants_n * (self.values_per_variant + (self.n_genes_n - 1 if self.reads_genes else 0)) + (self.n_genes_n if self.estimates else 0)

    @property
    def n_rows(self) -> int:
        """Rows of the table, at most."""
        return int(self.n_rows_n.sum())

    @property
    def n_tokens(self) -> int:
        """Tokens of all variants: what the model is run over."""
        return int((self.n_variants_n * self.n_genes_n).sum())

    def describe(self) -> str:
        """Say it in a few lines."""
        lines = [
            f"{len(self.rows):,} cells of {int(self.n_genes_n.min()):,} to {int(self.n_genes_n.max()):,} genes",
            f"{self.n_variants:,} variants to run, {self.n_tokens:,} tokens",
            f"{self.n_rows:,} values",
        ]
        if self.estimates:
            lines.insert(1, f"{int(self.n_genes_n.sum()):,} genes estimated")
        if self.never:
            some = ", ".join(self.never[:SHOWN]) + (", …" if len(self.never) > SHOWN else "")
            lines.append(f"{len(self.never):,} of the perturbations can be made in none of the cells: {some}")
        if self.seconds is not None:
            lines.append(f"about {_duration(self.seconds)} on this machine")
        return "; ".join(lines)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the cells in parts that are written by themselves, always the same ones."""
        bounds = np.cumsum(self.n_variants_n) // VARIANTS_PER_PART + np.cumsum(self.n_rows_n) // ROWS_PER_PART
        for group in np.split(self.rows, np.flatnonzero(np.diff(bounds)) + 1):
            if len(group):
                yield group

    def require_room(self, folder: Path) -> None:
        """Raise if the disk cannot hold the table.

        Raises:
            OutputError
        """
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        # Parts and the table that is made of them lie side by side for a while.
        needed, free = 2 * self.n_rows * BYTES_PER_ROW, shutil.disk_usage(existing).free
        if needed > free:
            msg = (
                f"The table will have {self.n_rows:,} rows, about {needed / 1e9:,.1f} GB with its parts, and {existing} has {free / 1e9:,.1f} GB left. "
                "Choose another output, fewer cells or genes, or the readout cell."
            )
            raise OutputError(msg)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def count_genes(genes: np.ndarray, wanted: EveryGene, *, whole: bool = True) -> int:
    """Return how many genes of a cell are changed, each by itself.

    Args:
        whole: of a screening, whether the cell is run in whole.
    """
    n = len(genes)
    if wanted.kind in (DELETE, OVEREXPRESS):
        possible = max(n - 1, 0) if wanted.kind == OVEREXPRESS or n == 1 else n
        return possible if whole or not isinstance(wanted, Screen) else min(wanted.top, possible)
    ranks = np.arange(n)
    step = 0 if wanted.quartiles is None else round(wanted.quartiles * n / 4)
    if wanted.kind == INHIBIT:
        target = ranks + step if wanted.rank is None else np.maximum(ranks, wanted.rank)
    else:
        target = ranks - step if wanted.rank is None else np.minimum(ranks, wanted.rank)
    return int((np.clip(target, 0, max(n - 1, 0)) != ranks).sum())


def possible_in(genes: np.ndarray, wanted: Sequence[Change]) -> np.ndarray:
    """Return which changes can be made in a cell, bool of shape `(changes,)`: at most, as a gene may be at the top already."""
    here = set(genes.tolist())
    return np.array([change.kind == OVEREXPRESS or here.issuperset(change.tokens) for change in wanted])


def make_plan(
    cells: Iterable[tuple[int, str, np.ndarray]], wanted: EveryGene | Sequence[Change], *, rows: np.ndarray, readout: str, n_targets: int, identity: dict[str, Any],
    names: Sequence[str] = (),
) -> PerturbationPlan:  # fmt: skip
    """Count variants, cell by cell, and take the fingerprint of the cells.

    Args:
        cells: row, id and gene tokens of each of `rows`.
        names: of the changes, if they are listed.

    Raises:
        SettingError: if nothing can be done in any cell.
    """
    digest = CellDigest()
    n_variants, n_genes = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    place = {int(row): i for i, row in enumerate(rows)}
    whole = wanted.judged_rows(rows) if isinstance(wanted, Screen) else frozenset()
    ids: Counter[str] = Counter()
    ever = np.zeros(len(names), dtype=bool)
    for row, cell_id, genes in cells:
        digest.add(cell_id, genes)
        ids[cell_id] += 1
        n_genes[place[row]] = len(genes)
        if isinstance(wanted, EveryGene):
            n_variants[place[row]] = count_genes(genes, wanted, whole=row in whole)
        else:
            can = possible_in(genes, wanted)
            n_variants[place[row]], ever = can.sum(), ever | can
    if len(ids) < len(rows):
        again = [f"{name} ({n} times)" for name, n in ids.most_common(3)]
        logger.warning(
            "%d of %d cells share their id with another (%s): statistics will take those of one id for one cell.",
            len(rows) - len(ids),
            len(rows),
            ", ".join(again),
        )
    if not n_variants.sum():
        what = "a gene of it can be changed" if isinstance(wanted, EveryGene) else f"any of the {len(wanted):,} perturbations can be made in it"
        msg = f"There is nothing to do: none of {len(rows):,} cells is such that {what}. Genes that are not expressed cannot be deleted or shifted."
        raise SettingError(msg)
    changes: Any = [vars(change) for change in wanted] if not isinstance(wanted, EveryGene) else vars(wanted)
    identity = identity | {"cells": digest.hexdigest(), "changes": xxhash.xxh3_64(json.dumps(changes, sort_keys=True).encode()).hexdigest()}
    values = n_targets if readout == PROBABILITY else 1 + n_targets
    never = tuple(name for name, can in zip(names, ever.tolist(), strict=True) if not can)
    return PerturbationPlan(rows, n_variants, n_genes, values, readout == GENE, identity, isinstance(wanted, Screen), never)


class CellDigest:
    """Fingerprint of cells: their ids and genes, in order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_64()

    def add(self, cell_id: str, genes: np.ndarray) -> None:
        """Take in a cell."""
        self._digest.update(genes.astype(np.int64).tobytes() + b"|" + str(cell_id).encode() + b"\n")

    def hexdigest(self) -> str:
        """Return the fingerprint."""
        return self._digest.hexdigest()
