"""What a perturbation run will do, before it does it: cells, variants, rows, time and room on the disk; and what tells it from another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import OutputError, SettingError
from .cells import Cells
from .perturbations import DELETE, INHIBIT, OVEREXPRESS, Change, EveryGene
from .readouts import GENE, PROBABILITY

VARIANTS_PER_PART = 5000
BYTES_PER_ROW = 12
"""Of a finished table, compressed, as measured on gene readouts; others take more a row and have few."""


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
    seconds: float | None = None
    """Estimated from a few variants of a cell of middle length."""

    @property
    def n_variants(self) -> int:
        """Variants of all cells."""
        return int(self.n_variants_n.sum())

    @property
    def n_rows(self) -> int:
        """Rows of the table, at most."""
        return self.n_variants * self.values_per_variant + (int((self.n_variants_n * (self.n_genes_n - 1)).sum()) if self.reads_genes else 0)

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
        if self.seconds is not None:
            lines.append(f"about {_duration(self.seconds)} on this machine")
        return "; ".join(lines)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the cells in parts that are written by themselves, always the same ones."""
        bounds = np.cumsum(self.n_variants_n) // VARIANTS_PER_PART
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


def count_changes(genes: np.ndarray, wanted: EveryGene | Sequence[Change]) -> int:
    """Return how many changes can be made in a cell, at most."""
    n = len(genes)
    if isinstance(wanted, EveryGene):
        if wanted.kind in (DELETE, OVEREXPRESS):
            return max(n - 1, 0) if wanted.kind == OVEREXPRESS or n == 1 else n
        ranks = np.arange(n)
        step = 0 if wanted.quartiles is None else round(wanted.quartiles * n / 4)
        if wanted.kind == INHIBIT:
            target = ranks + step if wanted.rank is None else np.maximum(ranks, wanted.rank)
        else:
            target = ranks - step if wanted.rank is None else np.minimum(ranks, wanted.rank)
        return int((np.clip(target, 0, max(n - 1, 0)) != ranks).sum())
    here = set(genes.tolist())
    return sum(change.kind == OVEREXPRESS or here.issuperset(change.tokens) for change in wanted)


def make_plan(
    tokens: Cells, genes_of: Any, wanted: EveryGene | Sequence[Change], *, rows: np.ndarray, readout: str, n_targets: int, identity: dict[str, Any]
) -> PerturbationPlan:
    """Count variants, cell by cell, and take the fingerprint of the cells.

    Args:
        genes_of: from a chunk of cells to the gene tokens of each.

    Raises:
        SettingError: if nothing can be done in any cell.
    """
    digest = xxhash.xxh3_64()
    n_variants, n_genes = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    place = {int(row): i for i, row in enumerate(rows)}
    for row, cell_id, genes in genes_of(tokens, rows):
        digest.update(genes.astype(np.int64).tobytes() + b"|" + str(cell_id).encode() + b"\n")
        n_variants[place[row]], n_genes[place[row]] = count_changes(genes, wanted), len(genes)
    if not n_variants.sum():
        what = "a gene of it can be changed" if isinstance(wanted, EveryGene) else f"any of the {len(wanted):,} perturbations can be made in it"
        msg = f"There is nothing to do: none of {len(rows):,} cells is such that {what}. Genes that are not expressed cannot be deleted or shifted."
        raise SettingError(msg)
    changes: Any = [vars(change) for change in wanted] if not isinstance(wanted, EveryGene) else vars(wanted)
    identity = identity | {"cells": digest.hexdigest(), "changes": xxhash.xxh3_64(json.dumps(changes, sort_keys=True).encode()).hexdigest()}
    values = n_targets if readout == PROBABILITY else 1 + n_targets
    return PerturbationPlan(rows, n_variants, n_genes, values, readout == GENE, identity)
