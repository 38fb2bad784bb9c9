"""What a fine-tuned model must beat, on the same split: the majority, linear models and neighbours of expression, and the encoder untouched.

All by scikit-learn. Expression is log(1 + counts per 10,000) of the genes of the vocabulary; where a dataset holds no counts, the rank of a
gene within its cell takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..errors import MissingExtraError
from ..models.heads import CLASSES, IGNORED, NUMBERS

VARIABLE_GENES = 2000
COMPONENTS = 50
NEIGHBOURS = 15


def sklearn_or_refuse() -> Any:
    """Return sklearn, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        import sklearn
    except ModuleNotFoundError as error:
        msg = "Baselines need scikit-learn. Install it with `pip install 'geneformer-hf[evaluation]'`, or pass baselines: false."
        raise MissingExtraError(msg) from error
    return sklearn


def expression_matrix(tokens: Any, rows: np.ndarray, vocab_size: int, special: Sequence[int]) -> sp.csr_matrix:
    """Return the expression of cells by token id, float32 of shape `(rows, vocabulary)`.

    Args:
        tokens (`datasets.Dataset`): with `input_ids` and, where they are known, `counts` per 10,000.
        special: ids of special tokens, which are no genes.
    """
    known = "counts" in tokens.column_names
    lengths, ids, values = [], [], []
    arrow = tokens.select_columns(["input_ids", *(["counts"] if known else [])]).with_format("arrow")
    for start in range(0, len(rows), 4096):
        table = arrow[rows[start : start + 4096].tolist()]
        cells = table.column("input_ids").combine_chunks()
        flat, offsets = np.asarray(cells.flatten()), np.concatenate([[0], np.cumsum(np.asarray(cells.value_lengths()))])
        if known:
            value = np.log1p(np.asarray(table.column("counts").combine_chunks().flatten(), dtype=np.float32))
        else:
            sizes = np.diff(offsets)
            value = 1 - (np.arange(len(flat)) - np.repeat(offsets[:-1], sizes)).astype(np.float32) / np.repeat(np.maximum(sizes, 1), sizes)
        value = np.where(np.isin(flat, special), 0, value).astype(np.float32)
        lengths.append(np.diff(offsets))
        ids.append(flat.astype(np.int32))
        values.append(value)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) if lengths else np.zeros(1, dtype=np.int64)
    matrix = sp.csr_matrix((np.concatenate(values), np.concatenate(ids), indptr), shape=(len(rows), vocab_size))
    matrix.eliminate_zeros()
    return matrix


def most_variable(matrix: sp.csr_matrix, n: int = VARIABLE_GENES) -> np.ndarray:
    """Return the columns of largest variance, sorted."""
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    variance = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - np.square(mean)
    chosen = np.argsort(-variance, kind="stable")[:n]
    return np.sort(chosen[variance[chosen] > 0])


class Standardised:
    """Columns with mean 0 and standard deviation 1 over the training rows, clipped at ten of them."""

    def __init__(self, train: np.ndarray) -> None:
        self._mean, spread = train.mean(axis=0), train.std(axis=0)
        self._spread = np.where(spread > 0, spread, 1)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return rows in these units."""
        return np.clip((rows - self._mean) / self._spread, -10, 10).astype(np.float32)


def fitted(kind: str, problem: str, train: np.ndarray, labels: np.ndarray, n_outputs: int) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a model of scikit-learn to training cells.

    Args:
        kind: "majority", "linear" or "neighbours".
        problem: problem_type of the task.
        labels (int64 of shape `(n,)`, or float32 of shape `(n, k)`): of the training cells; -100 does not count.

    Returns:
        what it says of other cells: a function from their rows to float64 of shape `(m, n_outputs)`, probabilities or numbers.
    """
    sklearn_or_refuse()
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    if problem == CLASSES:
        train, labels = train[labels != IGNORED], labels[labels != IGNORED]
        if not len(labels):
            return lambda rows: np.full((len(rows), n_outputs), 1 / n_outputs)
    k = min(NEIGHBOURS, len(train))
    if problem == NUMBERS:
        regressor: Any = {"majority": DummyRegressor(), "linear": RidgeCV(alphas=np.logspace(-1, 4, 6)), "neighbours": KNeighborsRegressor(k)}[kind].fit(
            train, labels
        )
        return lambda rows: np.asarray(regressor.predict(rows), dtype=np.float64).reshape(len(rows), -1)

    def classifier(classes: np.ndarray) -> Any:
        model = {
            "majority": DummyClassifier(strategy="prior"),
            "linear": LogisticRegression(max_iter=1000),
            "neighbours": KNeighborsClassifier(k),
        }[kind if len(np.unique(classes)) > 1 else "majority"]
        with warnings.catch_warnings():
            # A baseline that has not quite converged is one still.
            warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")
            return model.fit(train, classes)

    if problem == CLASSES:
        model = classifier(labels)

        def probabilities(rows: np.ndarray) -> np.ndarray:
            out = np.zeros((len(rows), n_outputs))
            out[:, model.classes_] = model.predict_proba(rows)
            # Of fifteen neighbours none may be of a class; that does not make it impossible.
            return (out * k + 1 / n_outputs) / (k + 1) if kind == "neighbours" else out

        return probabilities
    models = [classifier(labels[:, i] > 0.5) for i in range(n_outputs)]
    return lambda rows: np.stack(
        [m.predict_proba(rows)[:, list(m.classes_).index(True)] if True in m.classes_ else np.zeros(len(rows)) for m in models], axis=1
    )
