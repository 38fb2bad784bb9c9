"""Statistics of perturbations: the published tables, number by number, and the ways in which they can be made fairer.

The published modes take every value of every cell as independent, compare a gene with a background that holds the gene itself, and take the first component
of a mixture for the one with an impact. Each has a remedy, off by default so that published tables come out: `donors`, `leave_out_tested`,
`order_components`. For effect sizes with intervals and tests within cells see `perturbation_effects`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import false_discovery_control, norm

from ..errors import MissingExtraError, SettingError
from ..genes import GeneTable
from .perturbation_table import batches_of, kinds_of, rows_of, states_of
from .readouts import CELL, GENE, STATE

MODES = ("goal_state_shift", "vs_null", "mixture_model", "aggregate_data", "aggregate_gene_shifts")
CELL_EMBEDDING = "cell_emb"
"""What the published tables call the cell where others name an affected gene."""
SIGNIFICANT = 0.05
RESOLUTION = float(np.finfo(np.float32).eps)
"""Difference of two cosines near 1 below which float32, in which they are computed, tells nothing: 1.2e-7."""
BELOW = "below_resolution"
ROWS_AT_ONCE = 2_000_000
"""Values that are put together at once."""
logger = logging.getLogger(__name__)
_BETWEEN_GENES = "\x1f"


@dataclass(frozen=True)
class _Values:
    """Values of one readout, by what was perturbed."""

    genes: list[tuple[str, ...]]
    """What was perturbed, each once, in the order of first appearance."""
    codes: np.ndarray
    """int64 of shape `(n,)`: which of them each value is of."""
    values: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame, donors: Mapping[str, Any] | None) -> _Values:
        if donors is not None:
            frame = _by_donor(frame, donors)
        keys = [tuple(genes) for genes in frame["genes"]]
        codes, genes = pd.factorize(np.fromiter(keys, dtype=object, count=len(keys)))
        return cls(list(genes), codes, frame["value"].to_numpy(dtype=np.float64))

    def of_gene(self) -> list[np.ndarray]:
        """Return the values of each."""
        order = np.argsort(self.codes, kind="stable")
        return np.split(self.values[order], np.cumsum(np.bincount(self.codes, minlength=len(self.genes)))[:-1])


def _by_donor(frame: pd.DataFrame, donors: Mapping[str, Any]) -> pd.DataFrame:
    """Return the mean over the cells of each donor, so that donors and not cells are counted."""
    unknown = [cell for cell in dict.fromkeys(frame["cell_id"]) if cell not in donors]
    if unknown:
        msg = f"donors says nothing of {len(unknown):,} cells, the first {unknown[0]!r}. Give the donor of each cell of the table."
        raise SettingError(msg)
    keyed = frame.assign(genes=[tuple(genes) for genes in frame["genes"]], cell_id=[str(donors[cell]) for cell in frame["cell_id"]])
    return keyed.groupby(["cell_id", "genes", "target"], sort=False, as_index=False)["value"].mean()


def perturbation_statistics(
    table: Any, mode: str, *, gene_table: GeneTable | None = None, null: Any = None, goal: str | None = None, alternatives: Sequence[str] | None = None,
    genes: Sequence[str] | None = None, donors: Mapping[str, Any] | None = None, leave_out_tested: bool = False, order_components: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Return one of the published tables of perturbation statistics.

    Args:
        table (`pa.Table`, `pd.DataFrame`, path, or several of them): what `InSilicoPerturber.run` returned or wrote.
        mode:
            `goal_state_shift` (does a gene move cells to a state more than other genes do), `vs_null` (more than the same gene in another table),
            `mixture_model` (which genes belong to the component with an impact), `aggregate_data` (all values of one perturbation),
            `aggregate_gene_shifts` (every perturbed gene on every other gene).
        gene_table (`GeneTable`, *optional*): names genes, and gives the ids of their tokens.
        null: for `vs_null`, another table.
        goal, alternatives: for `goal_state_shift`; those of the run otherwise.
        genes: for `aggregate_data`, what was perturbed.
        donors: cell to donor; cells of one are then averaged first. Recommended wherever there are several.
        leave_out_tested: compare a gene with all *other* genes. Recommended.
        order_components: the component of lower mean similarity is the one with an impact, whatever its number. Recommended.

    Returns:
        `pd.DataFrame` with the published columns, sorted as published. Where effects are smaller than what float32 can tell apart, so that their
        p-values say nothing, a further column `below_resolution` marks them.

    Raises:
        SettingError: if the table does not hold what the mode needs.
    """
    if mode not in MODES:
        msg = f"mode is {mode!r}; expected {', '.join(MODES)}."
        raise SettingError(msg)
    named = GeneNames(gene_table)
    if mode == "goal_state_shift":
        known = states_of(table)
        goal = goal or (known[1] if known else None)
        others = list(alternatives if alternatives is not None else known[2:] if known else [])
        if goal is None:
            msg = "goal_state_shift needs the goal: the table does not say it. Pass goal (`--goal`)."
            raise SettingError(msg)
        return _goal_state_shift(table, goal, others, named, donors, leave_out_tested=leave_out_tested)
    if mode == "vs_null":
        if null is None:
            msg = "vs_null compares with another table. Pass null (`--null`)."
            raise SettingError(msg)
        return _vs_null(rows_of(table, CELL), rows_of(null, CELL), named, donors)
    if mode == "mixture_model":
        return _mixture_model(_Values.of(rows_of(table, CELL), donors), named, order_components=order_components)
    if mode == "aggregate_data":
        return _aggregate_data(rows_of(table, CELL), genes)
    return _aggregate_gene_shifts(table, named)


class GeneNames:
    """Ids of tokens and symbols of genes, as far as they are known."""

    def __init__(self, table: GeneTable | None) -> None:
        self.tokens = {} if table is None else dict(zip(table.ensembl_ids, map(int, table.token_ids), strict=True))
        self.symbols = {} if table is None or table.symbols is None else dict(zip(table.ensembl_ids, table.symbols, strict=True))

    def columns(self, genes: Sequence[tuple[str, ...]]) -> dict[str, list[Any]]:
        """Return Gene, Gene_name and Ensembl_ID of perturbations of one gene or several."""
        one: dict[str, list[tuple[Any, ...]]] = {
            "Gene": [tuple(self.tokens.get(g, g) for g in several) for several in genes],
            "Gene_name": [tuple(self.symbols.get(g) or None for g in several) for several in genes],
            "Ensembl_ID": list(genes),
        }
        return {name: [several[0] if len(several) == 1 else several for several in column] for name, column in one.items()}


def rank_sums(background: np.ndarray, groups: Sequence[np.ndarray], *, leave_out: bool = False) -> np.ndarray:
    """Return the two-sided p-value of the Wilcoxon rank-sum test of each group against a background, as `scipy.stats.ranksums`.

    The background is sorted once, so that thousands of groups against a million values take seconds.

    Args:
        background (float of shape `(n,)`).
        groups: values of each.
        leave_out: the groups are parts of the background; leave each out of it when it is tested.
    """
    ordered = np.sort(background)
    found = np.ones(len(groups))
    for i, group in enumerate(groups):
        mine = np.sort(group)
        low, high = (np.searchsorted(ordered, mine, side=side).astype(np.float64) for side in ("left", "right"))
        own_low, own_high = (np.searchsorted(mine, mine, side=side).astype(np.float64) for side in ("left", "right"))
        n_others = float(len(ordered))
        if leave_out:
            low, high, n_others = low - own_low, high - own_high, n_others - len(mine)
        if not n_others or not len(mine):
            found[i] = np.nan
            continue
        # Mean rank of a value among ties: those below, half of those alike, in both.
        ranks = (low + high + own_low + own_high + 1) / 2
        n, total = len(mine), n_others + len(mine)
        z = (ranks.sum() - n * (total + 1) / 2) / np.sqrt(n * n_others * (total + 1) / 12)
        found[i] = 2 * norm.sf(abs(z))
    return found


def with_resolution(table: pd.DataFrame, effects: np.ndarray, *, always: bool = False) -> pd.DataFrame:
    """Return a table with a column that marks effects below the resolution of float32, where there are any, and warn of them."""
    below = np.abs(effects) < RESOLUTION
    if below.any():
        logger.warning(
            "%s of %s effects are smaller than %.1e, the resolution of float32 (marked in the column %s). Their p-values are those of rounding errors, not of a perturbation.",
            f"{int(below.sum()):,}",
            f"{len(below):,}",
            RESOLUTION,
            BELOW,
        )
    return table.assign(**{BELOW: below}) if always or below.any() else table


def fdr_of(p: np.ndarray) -> np.ndarray:
    """Return false discovery rates by Benjamini and Hochberg; what could not be tested counts as 1."""
    return np.asarray(false_discovery_control(np.nan_to_num(p, nan=1.0))) if len(p) else p


def _goal_state_shift(
    table: Any, goal: str, others: Sequence[str], named: GeneNames, donors: Mapping[str, Any] | None, *, leave_out_tested: bool
) -> pd.DataFrame:
    columns: dict[str, dict[str, np.ndarray]] = {"shift": {}, "p": {}, "fdr": {}}
    genes: list[tuple[str, ...]] = []
    detections = np.empty(0)
    for state in (goal, *others):
        found = _Values.of(rows_of(table, STATE, state), donors)
        groups = found.of_gene()
        if genes and found.genes != genes:
            msg = f"the table does not hold the same perturbations for {goal!r} and {state!r}; it was put together from different runs."
            raise SettingError(msg)
        genes, detections = found.genes, np.array([len(group) for group in groups])
        columns["shift"][state] = np.array([group.mean() for group in groups])
        columns["p"][state] = rank_sums(found.values, groups, leave_out=leave_out_tested)
        columns["fdr"][state] = fdr_of(columns["p"][state])
    table = pd.DataFrame(
        named.columns(genes)
        | {"Shift_to_goal_end": columns["shift"][goal]}
        | {f"Shift_to_alt_end_{state}": columns["shift"][state] for state in others}
        | {"Goal_end_vs_random_pval": columns["p"][goal]}
        | {f"Alt_end_vs_random_pval_{state}": columns["p"][state] for state in others}
        | {"Goal_end_FDR": columns["fdr"][goal]}
        | {f"Alt_end_FDR_{state}": columns["fdr"][state] for state in others}
        | {"N_Detections": detections, "Sig": (columns["fdr"][goal] < SIGNIFICANT).astype(int)}
    )
    table = with_resolution(table, columns["shift"][goal])
    return _sorted(table, ["Sig", "Shift_to_goal_end", "Goal_end_FDR"], [False, False, True])


def _sorted(table: pd.DataFrame, by: list[str], ascending: list[bool]) -> pd.DataFrame:
    return table.sort_values(by=by, ascending=ascending, kind="stable").reset_index(drop=True)


def _vs_null(frame: pd.DataFrame, null: pd.DataFrame, named: GeneNames, donors: Mapping[str, Any] | None) -> pd.DataFrame:
    ours, theirs = _Values.of(frame, donors), _Values.of(null, donors)
    null_of = dict(zip(theirs.genes, theirs.of_gene(), strict=True))
    groups = ours.of_gene()
    nulls = [null_of.get(genes, np.empty(0)) for genes in ours.genes]
    p = np.array([rank_sums(other, [group])[0] for group, other in zip(groups, nulls, strict=True)])
    p = np.nan_to_num(p, nan=1.0)
    test = np.array([group.mean() for group in groups])
    base = np.array([other.mean() if len(other) else np.nan for other in nulls])
    fdr = fdr_of(p)
    table = pd.DataFrame(
        named.columns(ours.genes)
        | {"Test_avg_shift": test, "Null_avg_shift": base, "Test_vs_null_avg_shift": test - base, "Test_vs_null_pval": p, "Test_vs_null_FDR": fdr}
        | {"N_Detections_test": [len(g) for g in groups], "N_Detections_null": [len(g) for g in nulls], "Sig": (fdr < SIGNIFICANT).astype(int)}
    )
    table = with_resolution(table, test - base)
    return _sorted(table, ["Sig", "Test_vs_null_avg_shift", "Test_vs_null_FDR"], [False, False, True])


def _mixture_model(values: _Values, named: GeneNames, *, order_components: bool) -> pd.DataFrame:
    try:
        from sklearn.mixture import GaussianMixture
    except ModuleNotFoundError as error:
        msg = "mixture_model needs scikit-learn. Install it with `pip install 'geneformer-hf[evaluation]'`."
        raise MissingExtraError(msg) from error
    # By token, as published: where the mixture begins to be fitted depends on the order.
    order = sorted(range(len(values.genes)), key=lambda i: tuple(named.tokens.get(gene, -1) for gene in values.genes[i]))
    each = values.of_gene()
    genes, groups = [values.genes[i] for i in order], [each[i] for i in order]
    means = np.array([group.mean() for group in groups])
    if len(np.unique(means)) < 2:
        msg = f"mixture_model needs perturbations with at least two different means; the table has {len(np.unique(means))}."
        raise SettingError(msg)
    mixture = GaussianMixture(n_components=2, random_state=0).fit(means[:, None])
    impact, other = (int(np.argmin(mixture.means_[:, 0])), int(np.argmax(mixture.means_[:, 0]))) if order_components else (0, 1)

    def has_impact(x: np.ndarray) -> np.ndarray:
        """Beyond the means of both components it is plain; between them the posterior says."""
        predicted = mixture.predict(x[:, None]) == impact
        return np.where(x > mixture.means_[other, 0], False, np.where(x < mixture.means_[impact, 0], True, predicted))

    percent = [100 * has_impact(group).mean() for group in groups]
    table = pd.DataFrame(
        named.columns(genes)
        | {"Test_avg_shift": means, "Impact_component": has_impact(means).astype(int), "Impact_component_percent": percent}
        | {"N_Detections": [len(group) for group in groups]}
    )
    table = with_resolution(table, 1 - means)
    return _sorted(table, ["Impact_component", "Test_avg_shift"], [False, True])


def _aggregate_data(frame: pd.DataFrame, genes: Sequence[str] | None) -> pd.DataFrame:
    known = list(dict.fromkeys(tuple(found) for found in frame["genes"]))
    wanted = tuple(genes) if genes is not None else known[0]
    if genes is None and len(known) > 1:
        msg = f"aggregate_data is about one perturbation, and the table has {len(known):,}. Pass genes."
        raise SettingError(msg)
    if wanted not in known:
        msg = f"the table has no perturbation of {', '.join(wanted)}."
        raise SettingError(msg)
    mine = [tuple(found) == wanted for found in frame["genes"]]
    return pd.DataFrame({"Cosine_sim": frame.loc[mine, "value"].to_numpy(dtype=np.float64), "Gene": wanted[0] if len(wanted) == 1 else [wanted] * sum(mine)})


def _moments(table: Any) -> pd.DataFrame:
    """Return number, mean and standard deviation of the values of each perturbation and affected gene (or the cell), with little more than these in memory."""
    held: list[pd.DataFrame] = []
    n_held, n_known = 0, 0
    for batch in batches_of(table):
        read = batch.filter(pc.is_in(batch["readout"], pa.array([CELL, GENE])))
        genes = pc.binary_join(read["genes"], _BETWEEN_GENES)
        values = pa.table({"genes": genes, "target": read["target"], "mean": pc.cast(read["value"], pa.float64())})
        held.append(values.to_pandas().assign(n=1, squares=0.0))
        n_held += read.num_rows
        if n_held > ROWS_AT_ONCE + 2 * n_known:
            held = [_merged(held)]
            n_held = n_known = len(held[0])
    found = _merged(held)
    return found.assign(genes=[tuple(genes.split(_BETWEEN_GENES)) for genes in found["genes"]], sd=np.sqrt(found["squares"] / found["n"]))


def _merged(pieces: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return number, mean and sum of squared deviations of pieces put together (Chan, Golub and LeVeque 1983, Am Stat 37:242)."""
    rows = pd.concat(pieces, ignore_index=True)
    keys = [rows["genes"], rows["target"]]
    n = rows["n"].groupby(keys, sort=False)
    means = (rows["n"] * rows["mean"]).groupby(keys, sort=False).transform("sum") / n.transform("sum")
    squares = rows["squares"] + rows["n"] * (rows["mean"] - means) ** 2
    return pd.DataFrame({"n": n.sum(), "mean": means.groupby(keys, sort=False).first(), "squares": squares.groupby(keys, sort=False).sum()}).reset_index()


def _aggregate_gene_shifts(table: Any, named: GeneNames) -> pd.DataFrame:
    if all(readout != GENE for readout, _ in kinds_of(table)):
        rows_of(table, GENE)
    found = _moments(table)
    perturbed = named.columns(list(found["genes"]))
    of_cell = found["target"] == ""
    affected = found["target"].where(~of_cell)
    shifts = pd.DataFrame(
        {"Perturbed": perturbed["Gene"], "Gene_name": perturbed["Gene_name"], "Ensembl_ID": perturbed["Ensembl_ID"]}
        | {"Affected": [CELL_EMBEDDING if cell else named.tokens.get(gene, gene) for cell, gene in zip(of_cell, found["target"], strict=True)]}
        | {"Affected_gene_name": [None if cell else named.symbols.get(gene) or None for cell, gene in zip(of_cell, found["target"], strict=True)]}
        | {"Affected_Ensembl_ID": affected, "Cosine_sim_mean": found["mean"], "Cosine_sim_stdev": found["sd"], "N_Detections": found["n"]}
    )
    order = np.lexsort([shifts["Cosine_sim_mean"], ~of_cell])
    return shifts.iloc[order].reset_index(drop=True)
