"""Splits that do not lie: whole donors on one side, classes in equal shares, differences between sides tested and shown."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import MissingExtraError, SettingError
from .labels import class_name, is_missing


@dataclass(frozen=True)
class Split:
    """Rows of cells (or genes) to train, to choose the best epoch by, and to test on; int64, sorted, none twice."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def names(self, n: int) -> np.ndarray:
        """Return the side of each of `n` rows, as text; empty for rows that are on none."""
        out = np.full(n, "", dtype=object)
        for name in ("train", "validation", "test"):
            out[getattr(self, name)] = name
        return out


def _model_selection() -> Any:
    try:
        from sklearn import model_selection
    except ModuleNotFoundError as error:
        msg = "Splits need scikit-learn. Install it with `pip install 'geneformer-hf[evaluation]'`."
        raise MissingExtraError(msg) from error
    return model_selection


def one_split(rows: np.ndarray, *, classes: np.ndarray | None, groups: np.ndarray | None, validation_share: float, test_share: float, seed: int) -> Split:
    """Split rows at random: test first, then validation from the rest.

    Args:
        rows (int64 of shape `(m,)`): what to split.
        classes (int64 of shape `(n,)`, *optional*): by row; each side gets the same shares of them, as far as groups allow.
        groups (of shape `(n,)`, *optional*): by row; each is wholly on one side.
        validation_share, test_share (`float`): of all rows; with groups, as near as whole groups come.

    Raises:
        SettingError: if there are too few rows or groups for it.
    """
    rest, test = _parted(np.sort(rows), test_share, classes, groups, seed, what="test")
    train, validation = _parted(rest, validation_share * len(rows) / max(len(rest), 1), classes, groups, seed + 1, what="validation")
    return Split(train, validation, test)


def folds(rows: np.ndarray, *, n_folds: int, classes: np.ndarray | None, groups: np.ndarray | None, validation_share: float, seed: int) -> list[Split]:
    """Cut rows into folds: each row is in the test rows of exactly one split. Arguments as in `one_split`.

    Raises:
        SettingError: if a class or the groups are too few for so many folds.
    """
    rows = np.sort(rows)
    if len(rows) < n_folds:
        msg = f"{len(rows):,} items cannot be cut into {n_folds} folds. Lower n_folds."
        raise SettingError(msg)
    if groups is not None and len(np.unique(groups[rows])) < n_folds:
        msg = f"{len(np.unique(groups[rows])):,} groups cannot be cut into {n_folds} folds. Lower n_folds, or leave out group_column."
        raise SettingError(msg)
    out: list[Split] = []
    for rest, test in _cut(rows, n_folds, classes, groups, seed):
        train, validation = _parted(rest, validation_share, classes, groups, seed + 1 + len(out), what="validation")
        out.append(Split(train, validation, test))
    return out


def _cut(rows: np.ndarray, n: int, classes: np.ndarray | None, groups: np.ndarray | None, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    selection = _model_selection()
    of_rows = None if classes is None else classes[rows]
    if of_rows is not None and np.unique(of_rows, return_counts=True)[1].max() < n:
        # No class can be spread over so many parts.
        of_rows = None
    if groups is not None:
        kind = selection.GroupKFold if of_rows is None else selection.StratifiedGroupKFold
        found = kind(n, shuffle=True, random_state=seed).split(rows, of_rows, groups[rows])
    else:
        kind = selection.KFold if of_rows is None else selection.StratifiedKFold
        found = kind(n, shuffle=True, random_state=seed).split(rows, of_rows)
    with warnings.catch_warnings():
        # Classes of fewer items than folds are looked at by `require_enough`, with their names.
        warnings.filterwarnings("ignore", message="The least populated class")
        return [(rows[train], rows[test]) for train, test in found]


def _parted(rows: np.ndarray, share: float, classes: np.ndarray | None, groups: np.ndarray | None, seed: int, *, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rest, and a share."""
    if share <= 0:
        return rows, rows[:0]
    n = round(share * len(rows))
    if n < 1 or n >= len(rows):
        msg = f"{what}_share is {share:.3g} of {len(rows):,} items, which is {n}. Give more cells, or another share."
        raise SettingError(msg)
    if groups is not None:
        n_groups = len(np.unique(groups[rows]))
        if n_groups < 2:
            msg = (
                f"{n_groups} group is left of group_column, and each has to be wholly on one side: none for {what}. Set {what}_share to 0, or give {what}_data."
            )
            raise SettingError(msg)
        chosen = _groups_near(rows, share, classes, groups, seed)
        return rows[~chosen], rows[chosen]
    selection = _model_selection()
    of_rows = None if classes is None else classes[rows]
    if of_rows is not None:
        # A class of one stays where most are: it cannot be on both sides.
        counts = np.unique(of_rows, return_counts=True)
        single = np.isin(of_rows, counts[0][counts[1] < 2])
        if min(n, int((~single).sum()) - n) < len(counts[0][counts[1] > 1]):
            of_rows, single = None, np.zeros(len(rows), dtype=bool)
        else:
            rest, some = selection.train_test_split(rows[~single], test_size=n, random_state=seed, stratify=of_rows[~single])
            return np.sort(np.concatenate([rest, rows[single]])), np.sort(some)
    rest, some = selection.train_test_split(rows, test_size=n, random_state=seed)
    return np.sort(rest), np.sort(some)


ORDERS = 5
"""Orders of groups of which the best is taken; few, so that other seeds give other splits."""


def _groups_near(rows: np.ndarray, share: float, classes: np.ndarray | None, groups: np.ndarray, seed: int) -> np.ndarray:
    """Choose whole groups whose cells come near to a share, and whose classes are like those of all: bool of shape `(rows,)`.

    Of a few random orders of groups; each is gone through once, and a group is taken where it brings the share nearer.
    """
    rng, target = np.random.default_rng([seed, 13]), share * len(rows)
    names, number, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
    kinds = np.zeros(len(rows), dtype=np.int64) if classes is None else np.unique(classes[rows], return_inverse=True)[1]
    table = np.zeros((len(names), kinds.max() + 1))
    np.add.at(table, (number, kinds), 1)
    best, best_score = np.zeros(len(names), dtype=bool), np.inf
    for _ in range(ORDERS):
        taken, size = np.zeros(len(names), dtype=bool), 0
        for group in rng.permutation(len(names)):
            nearer = abs(size + sizes[group] - target) < abs(size - target)
            if nearer and taken.sum() < len(names) - 1:
                taken[group], size = True, size + int(sizes[group])
        if not size:
            taken[sizes.argmin()] = True
        mine, rest = table[taken].sum(axis=0), table[~taken].sum(axis=0)
        # A class that nobody would be taught is worse than any difference of shares.
        score = (
            abs(mine.sum() - target) / target
            + np.abs(mine / mine.sum() - table.sum(axis=0) / len(rows)).sum() / 2
            + 10 * float(((rest == 0) & (mine > 0)).sum())
        )
        if score < best_score:
            best, best_score = taken, score
    return best[number]


def groups_of(values: Sequence[Any], column: str, rows: np.ndarray) -> np.ndarray:
    """Return the group of each row as a number.

    Raises:
        SettingError: if one is missing: its side could not be told.
    """
    missing = [row for row in rows.tolist() if is_missing(values[row])]
    if missing:
        msg = f'group_column {column!r} is missing in {len(missing):,} of {len(rows):,} cells (first row {missing[0]:,}), so it cannot be told on which side they may be. Fill it, or leave these cells out (leave_out: {{{column}: [""]}}).'
        raise SettingError(msg)
    names = [class_name(v) if not is_missing(v) else "" for v in values]
    return np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)[1]


def require_no_leak(split: Split, values: Sequence[Any], column: str) -> None:
    """Raise if a group, such as a donor, is on two sides.

    Raises:
        SettingError
    """
    sides = {name: {class_name(values[row]) for row in getattr(split, name).tolist()} for name in ("train", "validation", "test")}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        both = sorted(sides[one] & sides[other])
        if both:
            msg = f"{len(both):,} of the values of {column!r} are among {one} cells and among {other} cells ({', '.join(both[:5])}): figures would tell how well donors are recognised. Give files without common {column}."
            raise SettingError(msg)


def balance_table(split: Split, columns: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Test for each column whether training and test rows differ.

    Numbers by Wilcoxon's rank-sum test, text by a chi-square test of independence (as the published package, which compares with counts
    rescaled). Missing values are left out.

    Returns:
        `pd.DataFrame`: column, test, train, test_rows (means, or shares of the most frequent values), p_value.
    """
    from scipy.stats import chi2_contingency, ranksums

    lines = []
    for name, values in columns.items():
        sides = [[values[row] for row in rows.tolist() if not is_missing(values[row])] for rows in (split.train, split.test)]
        if all(isinstance(v, (int, float, np.number)) and not isinstance(v, (bool, np.bool_)) for side in sides for v in side):
            p = float(ranksums(*sides).pvalue) if all(sides) else float("nan")
            shown = [f"mean {np.mean(side):.4g}" if side else "none" for side in sides]
            lines.append((name, "rank-sum", *shown, p))
            continue
        counts = pd.DataFrame([pd.Series([class_name(v) for v in side], dtype=object).value_counts() for side in sides]).fillna(0)
        p = float(chi2_contingency(counts.to_numpy()).pvalue) if counts.shape[1] > 1 and (counts.sum(axis=1) > 0).all() else 1.0
        most = counts.sum().sort_values(ascending=False).index[:3]
        shown = [", ".join(f"{value} {n / max(row.sum(), 1):.0%}" for value, n in row[most].items()) for _, row in counts.iterrows()]
        lines.append((name, "chi-square", *shown, p))
    return pd.DataFrame(lines, columns=["column", "test", "train", "test_rows", "p_value"])


def most_balanced(candidates: Sequence[Split], columns: Mapping[str, Sequence[Any]]) -> Split:
    """Return the split whose smallest p-value is the largest."""
    return max(candidates, key=lambda split: balance_table(split, columns)["p_value"].min())


def require_enough(ids: np.ndarray, names: Sequence[str], *, least: int, why: str, what: str = "cells") -> None:
    """Raise if a class has too few items.

    Raises:
        SettingError
    """
    counts = np.bincount(ids[ids >= 0], minlength=len(names))
    few = [f"{names[i]} ({counts[i]})" for i in np.flatnonzero(counts < least).tolist()]
    if few:
        msg = f"{len(few)} of {len(names)} classes have fewer than {least} {what}, {why}: {', '.join(few[:8])}. Leave them out with rare_threshold: {least}, or give more {what}."
        raise SettingError(msg)
