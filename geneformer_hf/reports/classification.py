"""How well labels are predicted: of cells, of genes, several at once, and numbers. Counted by scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import MissingExtraError
from ..models.heads import CLASSES, IGNORED, LABELS, NUMBERS, Head

CALIBRATION_BINS = 10
ROC_POINTS = 100
"""Points of false-positive rate at which curves of folds are averaged, as published."""


def metrics() -> Any:
    """Return sklearn.metrics, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        from sklearn import metrics as found
    except ModuleNotFoundError as error:
        msg = "Figures need scikit-learn. Install it with `pip install 'geneformer-hf[evaluation]'`."
        raise MissingExtraError(msg) from error
    return found


def class_figures(labels_n: np.ndarray, probabilities_nc: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return figures of a classification into classes that exclude each other.

    Args:
        labels_n (int array of shape `(n,)`): class ids; -100 does not count.
        probabilities_nc (float array of shape `(n, c)`)

    Returns:
        accuracy; balanced_accuracy (mean recall of the classes that occur); macro_f1 (over classes that occur or are predicted);
        log_loss (nats); brier; ece (expected calibration error over ten bins); roc_auc (two classes: of the second; more: the mean over
        classes against the rest); per_class; confusion (rows are true); calibration.
    """
    m = metrics()
    kept = labels_n != IGNORED
    if not kept.any():
        # Nothing to count, such as a head without a label in one fold.
        nothing = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "brier", "ece", "roc_auc"), math.nan)
        return {"n": 0, **nothing, "calibration": [], "per_class": [], "confusion": [[0] * len(names) for _ in names]}
    truth, p = labels_n[kept], np.asarray(probabilities_nc, dtype=np.float64)[kept]
    predicted, every = p.argmax(axis=1), np.arange(len(names))
    precision, recall, f1, support = m.precision_recall_fscore_support(truth, predicted, labels=every, zero_division=0.0)
    aucs = [auc_of(truth == i, p[:, i]) for i in every]
    seen = np.union1d(truth, predicted)
    return {
        "n": int(kept.sum()),
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_f1": float(f1[seen].mean()),
        "log_loss": float(-np.log(np.clip(p[np.arange(len(truth)), truth], 1e-300, None)).mean()),
        "brier": float((np.square(p).sum(axis=1) - 2 * p[np.arange(len(truth)), truth] + 1).mean()),
        **calibration(p.max(axis=1), truth == predicted),
        "roc_auc": aucs[1] if len(names) == 2 else float(np.nanmean(aucs)) if not np.isnan(aucs).all() else float("nan"),
        "per_class": [
            {"class": names[i], "n": int(support[i]), "precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "roc_auc": aucs[i]}
            for i in every.tolist()
        ],
        "confusion": m.confusion_matrix(truth, predicted, labels=every).tolist(),
    }


def auc_of(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve; NaN where only one side occurs."""
    return float(metrics().roc_auc_score(is_positive, scores)) if 0 < is_positive.sum() < len(is_positive) else float("nan")


def calibration(confidence_n: np.ndarray, right_n: np.ndarray) -> dict[str, Any]:
    """Return the expected calibration error (Guo et al. 2017), and confidence, share right and number of each bin."""
    bins = np.clip((confidence_n * CALIBRATION_BINS).astype(int), 0, CALIBRATION_BINS - 1)
    rows = []
    for number in np.unique(bins).tolist():
        here = bins == number
        rows.append({"confidence": float(confidence_n[here].mean()), "right": float(right_n[here].mean()), "n": int(here.sum())})
    error = sum(row["n"] * abs(row["confidence"] - row["right"]) for row in rows) / max(len(confidence_n), 1)
    return {"ece": float(error), "calibration": rows}


def label_figures(labels_nk: np.ndarray, probabilities_nk: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return figures of labels that can hold together; a label is predicted from 0.5 on."""
    m = metrics()
    truth, p = np.asarray(labels_nk) > 0.5, np.asarray(probabilities_nk, dtype=np.float64)
    predicted = p >= 0.5
    # Label by label: of a single one scikit-learn would count its absence as a class.
    counted = [
        m.precision_recall_fscore_support(truth[:, i], predicted[:, i], average="binary", pos_label=True, zero_division=0.0)[:3] for i in range(len(names))
    ]
    precision, recall, f1 = (np.array(values) for values in zip(*counted, strict=True))
    support, aucs = truth.sum(axis=0), [auc_of(truth[:, i], p[:, i]) for i in range(len(names))]
    return {
        "n": len(truth),
        "accuracy": float((truth == predicted).mean()),
        "all_right": float((truth == predicted).all(axis=1).mean()),
        "macro_f1": float(f1.mean()),
        "micro_f1": float(2 * (truth & predicted).sum() / max(truth.sum() + predicted.sum(), 1)),
        "roc_auc": float(np.nanmean(aucs)) if not np.isnan(aucs).all() else float("nan"),
        "per_class": [
            {"class": names[i], "n": int(support[i]), "precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "roc_auc": aucs[i]}
            for i in range(len(names))
        ],
    }


def number_figures(labels_nk: np.ndarray, predicted_nk: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return figures of predicted numbers: mean over columns, and each column by itself."""
    from scipy.stats import pearsonr, spearmanr

    m = metrics()
    rows = []
    for i, name in enumerate(names):
        truth, found = np.asarray(labels_nk, dtype=np.float64)[:, i], np.asarray(predicted_nk, dtype=np.float64)[:, i]
        with warnings.catch_warnings():
            # A constant has no correlation; NaN says so.
            warnings.simplefilter("ignore")
            several = len(truth) > 1
            pearson = float(pearsonr(truth, found).statistic) if several else math.nan
            spearman = float(spearmanr(truth, found).statistic) if several else math.nan
            r2 = float(m.r2_score(truth, found)) if several else math.nan
        rows.append({"column": name, "n": len(truth), "r2": r2, "mae": float(np.abs(truth - found).mean()),
                     "rmse": float(np.sqrt(np.square(truth - found).mean())), "pearson": pearson, "spearman": spearman})  # fmt: skip
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("r2", "mae", "rmse", "pearson", "spearman")}
    return {"n": len(labels_nk), **means, "per_column": rows}


def figures_of(head: Head, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Return all figures of the predictions of a head."""
    count = {CLASSES: class_figures, LABELS: label_figures, NUMBERS: number_figures}[head.kind]
    return count(labels, probabilities, head.names)


def main_figure(kind: str) -> str:
    """Return the figure that heads a comparison."""
    return "r2" if kind == NUMBERS else "macro_f1"


@dataclass(frozen=True)
class RocCurve:
    """A ROC curve, or the mean of several."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: float
    sd: float = 0.0
    """Standard deviation of the area over folds."""


def roc_curve(is_positive: np.ndarray, scores: np.ndarray) -> RocCurve:
    """Return the ROC curve of some scores."""
    m = metrics()
    fpr, tpr, _ = m.roc_curve(is_positive, scores)
    return RocCurve(fpr, tpr, float(m.auc(fpr, tpr)))


def mean_roc(curves: Sequence[RocCurve], *, weighted: bool) -> RocCurve:
    """Return the mean of the curves of folds at 100 false-positive rates, with mean and standard deviation of their areas.

    Args:
        weighted (`bool`): by the number of points of each curve, as the published package does; else all alike.
    """
    weights = np.array([len(curve.true_positive_rate) if weighted else 1 for curve in curves], dtype=np.float64)
    weights /= weights.sum()
    grid = np.linspace(0, 1, ROC_POINTS)
    heights = np.stack([np.interp(grid, curve.false_positive_rate, curve.true_positive_rate) for curve in curves])
    heights[:, 0] = 0.0
    areas = np.array([curve.auc for curve in curves])
    mean = float(weights @ areas)
    return RocCurve(grid, weights @ heights, mean, float(np.sqrt(weights @ np.square(areas - mean))))


def per_class_table(figures: dict[str, Any]) -> pd.DataFrame:
    """Return the figures of each class, label or column as a table."""
    return pd.DataFrame(figures.get("per_class") or figures.get("per_column"))
