"""What a fine-tuned model must beat, on the same split: the majority, linear models and neighbours of expression, and the encoder untouched.

All by scikit-learn. Expression is log(1 + counts per 10,000) of the genes of the vocabulary; where a dataset holds no counts, the rank of a
gene within its cell takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..errors import MissingExtraError
from ..models.modeling_geneformer import IGNORED

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


def principal_components(train: np.ndarray, test: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return up to 50 principal components of the training rows, of both."""
    from sklearn.decomposition import PCA

    pca = PCA(min(COMPONENTS, *train.shape), random_state=seed).fit(train)
    return pca.transform(train), pca.transform(test)


def predicted_by(kind: str, problem: str, train: np.ndarray, labels: np.ndarray, test: np.ndarray, n_outputs: int) -> np.ndarray:
    """Fit a model of scikit-learn and return what it says of other cells.

    Args:
        kind: "majority", "linear" or "neighbours".
        problem: problem_type of the task.
        labels (int64 of shape `(n,)`, or float32 of shape `(n, k)`): of the training cells; -100 does not count.

    Returns:
        float64 of shape `(m, n_outputs)`: probabilities, or numbers.
    """
    sklearn_or_refuse()
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multioutput import MultiOutputClassifier
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    if problem == "single_label_classification":
        train, labels = train[labels != IGNORED], labels[labels != IGNORED]
    k = min(NEIGHBOURS, len(train))
    if problem == "regression":
        model: Any = {"majority": DummyRegressor(), "linear": Ridge(alpha=train.shape[1]), "neighbours": KNeighborsRegressor(k)}[kind]
        return np.asarray(model.fit(train, labels).predict(test), dtype=np.float64).reshape(len(test), -1)
    linear = LogisticRegression(C=1 / max(train.shape[1], 1) ** 0.5, max_iter=1000)
    model = {"majority": DummyClassifier(strategy="prior"), "linear": linear, "neighbours": KNeighborsClassifier(k)}[kind]
    out = np.zeros((len(test), n_outputs))
    with warnings.catch_warnings():
        # A baseline that has not quite converged is one still.
        warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")
        if problem == "single_label_classification":
            if len(np.unique(labels)) == 1:
                out[:, labels[0]] = 1.0
                return out
            model.fit(train, labels)
            out[:, model.classes_] = model.predict_proba(test)
            # Of fifteen neighbours none may be of a class; that does not make it impossible.
            return (out * k + 1 / n_outputs) / (k + 1) if kind == "neighbours" else out
        varied = [i for i in range(n_outputs) if 0 < labels[:, i].sum() < len(labels)]
        out[:] = labels.mean(axis=0)
        if varied:
            found = MultiOutputClassifier(model).fit(train, labels[:, varied]).predict_proba(test)
            out[:, varied] = np.stack([p[:, -1] for p in found], axis=1)
    return out
