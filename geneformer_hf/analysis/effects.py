"""How much a perturbation does, and how sure that is: effects within cells, over donors, against a permuted null; pairs against the sum of their genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student
from scipy.stats import wilcoxon

from ..errors import SettingError
from ..genes import GeneTable
from .perturbation_table import rows_of
from .readouts import CELL
from .statistics import GeneNames, fdr_of, with_resolution

LEAST_UNITS = 6
"""Cells or donors below which a signed-rank test cannot come out under 0.05 and is not made."""


def perturbation_effects(
    table: Any, *, readout: str = CELL, target: str = "", donors: Mapping[str, Any] | None = None, confidence: float = 0.95, n_permutations: int = 1000, seed: int = 0,
    gene_table: GeneTable | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Hold each perturbation against the others in the same cells.

    Cells differ in how much anything moves them, and values of one cell are not independent; so each value is compared with the mean of all other
    perturbations of its cell, and cells (donors, where they are given) are what is counted.

    Args:
        table: as in `perturbation_statistics`.
        readout, target: which values: `"cell"`, `"state"` of one state, `"gene"` of one affected gene, `"probability"` of one class.
        donors: cell to donor; differences are averaged over the cells of each first.
        confidence: of the interval.
        n_permutations: of the perturbations within each cell, for the permuted null; 0 leaves it out.

    Returns:
        `pd.DataFrame`, largest effect first: `Ensembl_ID`, `Gene_name`, `mean_value`, `effect` (mean difference to the other perturbations of the same cells), `ci_low`,
        `ci_high` (Student's t over cells or donors), `effect_size` (the effect in standard deviations over them), `n_cells`, `n_donors` (with donors), `p_paired` (Wilcoxon signed-rank test,
        NaN below six cells or donors), `fdr_paired`, `p_permutation`, `fdr_permutation`, `below_resolution` (the effect is smaller than what float32 can tell apart).

    Raises:
        SettingError: if the table has no such values, or cells without a donor.
    """
    frame = rows_of(table, readout, target)
    cells, cell_names = pd.factorize(frame["cell_id"])
    keys = [tuple(genes) for genes in frame["genes"]]
    codes, genes = pd.factorize(np.fromiter(keys, dtype=object, count=len(keys)))
    values = frame["value"].to_numpy(dtype=np.float64)
    unit_of_cell = _units(list(cell_names), donors)
    differences = _against_the_others(values, cells)
    units = unit_of_cell[cells]
    means = _means_by_unit(differences, codes, units, len(genes))
    effect = np.array([np.nanmean(m) if np.isfinite(m).any() else np.nan for m in means])
    spread = np.array([m.std(ddof=1) if len(m) > 1 else np.nan for m in means])
    n_units = np.array([len(m) for m in means])
    half = student.ppf(0.5 + confidence / 2, np.maximum(n_units - 1, 1)) * spread / np.sqrt(n_units)
    p = np.array([wilcoxon(m).pvalue if len(m) >= LEAST_UNITS and np.any(m) else np.nan for m in means])
    names = GeneNames(gene_table).columns(list(genes))
    n_cells = np.bincount(codes, minlength=len(genes))
    found = pd.DataFrame(
        {"Ensembl_ID": names["Ensembl_ID"], "Gene_name": names["Gene_name"], "mean_value": np.bincount(codes, values) / n_cells, "effect": effect}
        | {"ci_low": effect - half, "ci_high": effect + half, "effect_size": effect / spread, "n_cells": n_cells}
        | ({"n_donors": n_units} if donors is not None else {})
        | {"p_paired": p, "fdr_paired": _fdr(p)}
    )
    if n_permutations:
        found["p_permutation"] = _permuted(differences, cells, codes, units, len(genes), effect, n=n_permutations, seed=seed)
        found["fdr_permutation"] = _fdr(found["p_permutation"].to_numpy())
    found = with_resolution(found, effect, always=True)
    order = np.argsort(-np.abs(np.nan_to_num(effect)), kind="stable")
    return found.iloc[order].reset_index(drop=True)


def _fdr(p: np.ndarray) -> np.ndarray:
    """Return false discovery rates of those that could be tested, NaN for the others."""
    found = np.full(len(p), np.nan)
    known = np.isfinite(p)
    found[known] = fdr_of(p[known])
    return found


def _units(cell_ids: Sequence[str], donors: Mapping[str, Any] | None) -> np.ndarray:
    if donors is None:
        return np.arange(len(cell_ids))
    unknown = [cell for cell in cell_ids if cell not in donors]
    if unknown:
        msg = f"donors says nothing of {len(unknown):,} cells, the first {unknown[0]!r}. Give the donor of each cell of the table."
        raise SettingError(msg)
    return np.asarray(pd.factorize(np.array([str(donors[cell]) for cell in cell_ids]))[0])


def _against_the_others(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return each value less the mean of the others of its cell; NaN for the only one of a cell."""
    sums, counts = np.bincount(cells, values)[cells], np.bincount(cells)[cells]
    return values - np.divide(sums - values, counts - 1, out=np.full(len(values), np.nan), where=counts > 1)


def _means_by_unit(differences: np.ndarray, codes: np.ndarray, units: np.ndarray, n_genes: int) -> list[np.ndarray]:
    """Return for each perturbation the mean difference in each cell or donor."""
    known = np.isfinite(differences)
    keyed = pd.DataFrame({"code": codes[known], "unit": units[known], "value": differences[known]}).groupby(["code", "unit"], sort=True)["value"].mean()
    found = {code: group.to_numpy() for code, group in keyed.groupby(level=0)}
    return [found.get(code, np.empty(0)) for code in range(n_genes)]


def _permuted(
    differences: np.ndarray, cells: np.ndarray, codes: np.ndarray, units: np.ndarray, n_genes: int, effect: np.ndarray, *, n: int, seed: int
) -> np.ndarray:
    """Return how often an effect as large comes about when perturbations are exchanged within cells."""
    known = np.isfinite(differences)
    differences, cells, codes, units = differences[known], cells[known], codes[known], units[known]
    order = np.argsort(cells, kind="stable")
    differences, cells, codes, units = differences[order], cells[order], codes[order], units[order]
    # A perturbation's mean over units of its mean in a unit, as a weighted sum over its values.
    pair = np.unique(np.stack([codes, units]), axis=1, return_inverse=True)[1].ravel()
    n_in_pair = np.bincount(pair)[pair]
    units_of_code = np.bincount(pd.DataFrame({"c": codes, "p": pair}).drop_duplicates()["c"], minlength=n_genes)
    weights = 1 / (n_in_pair * units_of_code[codes])
    rng = np.random.default_rng(seed)
    at_least = np.zeros(n_genes)
    size = np.abs(np.nan_to_num(effect)) - 1e-12
    for _ in range(n):
        shuffled = differences[np.lexsort([rng.random(len(cells)), cells])]
        at_least += np.abs(np.bincount(codes, shuffled * weights, minlength=n_genes)) >= size
    return np.where(np.bincount(codes, minlength=n_genes) > 0, (1 + at_least) / (1 + n), np.nan)


def cooperativity(table: Any, *, readout: str = CELL, target: str = "", confidence: float = 0.95, gene_table: GeneTable | None = None) -> pd.DataFrame:
    """Hold pairs of genes against the sum of what each does, cell by cell.

    A shift is one minus the cosine for the readouts `cell` and `gene`, the value itself otherwise.

    Returns:
        `pd.DataFrame`, largest excess first: `Ensembl_ID` and `Gene_name` of both (`_1`, `_2`), `shift_1`, `shift_2`, `sum_of_shifts`, `combined_shift`, `excess` (combined less sum), `ci_low`,
        `ci_high`, `n_cells`, `p_paired` (Wilcoxon signed-rank test over cells), `fdr_paired`, `below_resolution`.

    Raises:
        SettingError: if there is no pair with both of its genes alone (`Perturbation.pairs`, `Perturbation.with_anchor`).
    """
    frame = rows_of(table, readout, target)
    values = frame["value"].to_numpy(dtype=np.float64)
    shift = 1 - values if readout in (CELL, "gene") else values
    keyed = pd.DataFrame({"genes": [tuple(genes) for genes in frame["genes"]], "cell": frame["cell_id"].to_numpy(), "shift": shift})
    wide = keyed.pivot_table(index="cell", columns="genes", values="shift", aggfunc="mean")
    pairs = [genes for genes in wide.columns if len(genes) == 2 and all((gene,) in wide.columns for gene in genes)]
    if not pairs:
        msg = (
            "the table has no pair of genes together with each of them alone. Perturb Perturbation.pairs(kind, genes) (`--pairs`) or with_anchor (`--anchor`)."
        )
        raise SettingError(msg)
    names = GeneNames(gene_table)
    lines = []
    for first, second in pairs:
        three = np.stack([wide[first,].to_numpy(), wide[second,].to_numpy(), wide[first, second].to_numpy()])
        one, two, both = three[:, np.isfinite(three).all(axis=0)]
        excess = both - one - two
        n = len(excess)
        half = student.ppf(0.5 + confidence / 2, max(n - 1, 1)) * (excess.std(ddof=1) if n > 1 else np.nan) / np.sqrt(max(n, 1))
        mean = excess.mean() if n else np.nan
        lines.append(
            {
                "Ensembl_ID_1": first, "Gene_name_1": names.symbols.get(first), "Ensembl_ID_2": second, "Gene_name_2": names.symbols.get(second),
                "shift_1": one.mean() if n else np.nan, "shift_2": two.mean() if n else np.nan, "sum_of_shifts": (one + two).mean() if n else np.nan,
                "combined_shift": both.mean() if n else np.nan, "excess": mean, "ci_low": mean - half, "ci_high": mean + half, "n_cells": n,
                "p_paired": wilcoxon(excess).pvalue if n >= LEAST_UNITS and np.any(excess) else np.nan,
            }
        )  # fmt: skip
    found = pd.DataFrame(lines)
    found["fdr_paired"] = _fdr(found["p_paired"].to_numpy())
    found = with_resolution(found, found["excess"].to_numpy(dtype=np.float64), always=True)
    return found.sort_values("excess", key=lambda column: -column.abs(), kind="stable").reset_index(drop=True)
