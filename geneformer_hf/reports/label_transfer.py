"""Labels learnt from some donors or batches and tested on others: nearest neighbours and a linear probe on any embedding, the same folds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.splits import folds as cut_in_folds
from ..errors import SettingError
from ..models.heads import CLASSES, IGNORED
from .cell_baselines import NEIGHBOURS, Standardised, fitted
from .classification import class_figures

METHODS = {"majority class": "majority", f"{NEIGHBOURS} nearest neighbours": "neighbours", "linear probe": "linear"}
MAJORITY, KNN, PROBE = METHODS
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Fold:
    """Cells to learn from and cells to test on."""

    name: str
    train: np.ndarray
    test: np.ndarray


def transfer_folds(labels_n: np.ndarray, groups_n: np.ndarray | None, group_names: Sequence[str], *, n_folds: int, seed: int) -> list[Fold]:
    """Cut cells into folds: each group by itself where there are no more groups than folds, else whole groups together; at random without groups.

    Args:
        labels_n (int array of shape `(n,)`).
        groups_n (int array of shape `(n,)`, *optional*): number of the donor or batch of each cell.

    Raises:
        SettingError: if there is one group only, or fewer cells than folds.
    """
    rows = np.arange(len(labels_n))
    if groups_n is None:
        cut = cut_in_folds(rows, n_folds=n_folds, classes=labels_n, groups=None, validation_share=0, seed=seed)
        return [Fold(f"part {i + 1}", split.train, split.test) for i, split in enumerate(cut)]
    present = np.unique(groups_n)
    if len(present) < 2:
        msg = f"all {len(labels_n):,} cells are of {group_names[present[0]]!r}, so there is nobody to test on. Name another column with held_out, or none for random folds."
        raise SettingError(msg)
    if len(present) <= n_folds:
        return [Fold(group_names[group], rows[groups_n != group], rows[groups_n == group]) for group in present]
    cut = cut_in_folds(rows, n_folds=n_folds, classes=labels_n, groups=groups_n, validation_share=0, seed=seed)
    return [Fold(f"{len(np.unique(groups_n[split.test])):,} of {len(present):,} groups, part {i + 1}", split.train, split.test) for i, split in enumerate(cut)]


def transfer(vectors_ne: np.ndarray, labels_n: np.ndarray, names: Sequence[str], folds: Sequence[Fold], *, standardised: bool) -> list[dict[str, Any]]:
    """Predict the labels of the test cells of each fold from its training cells.

    Cells of a class that no training cell has are left out of the figures and counted: nobody could name them.

    Args:
        vectors_ne (`np.ndarray` of shape `(n, e)`): without NaN.
        standardised: whether the probe sees each dimension in standard deviations of the training cells.

    Returns:
        a row for each fold and method: fold, method, n_train, n_test, n_unseen, accuracy, balanced_accuracy, macro_f1 and f1_by_class, a dictionary.
    """
    rows = []
    for fold in folds:
        train, taught = vectors_ne[fold.train], np.unique(labels_n[fold.train])
        known = np.isin(labels_n[fold.test], taught)
        scale = Standardised(train) if standardised else np.asarray
        for method, kind in METHODS.items():
            units = scale if kind == "linear" else np.asarray
            model = fitted(kind, CLASSES, units(train), labels_n[fold.train], len(names))
            truth = np.where(known, labels_n[fold.test], IGNORED)
            figures = class_figures(truth, model(units(vectors_ne[fold.test])), names)
            rows.append(
                {"fold": fold.name, "method": method, "n_train": len(fold.train), "n_test": int(known.sum()), "n_unseen": int((~known).sum())}
                | {name: figures[name] for name in FIGURES}
                | {"f1_by_class": {row["class"]: row["f1"] for row in figures["per_class"] if row["n"]}}
            )
    return rows


def means(rows: Sequence[dict[str, Any]], method: str) -> dict[str, float]:
    """Return the mean of each figure of a method over folds; folds without a test cell do not count."""
    mine = [row for row in rows if row["method"] == method and row["n_test"]]
    return {name: float(np.mean([row[name] for row in mine])) if mine else float("nan") for name in FIGURES}
