"""What a masked-gene model and an embedding must beat, measured on the same held-out cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class GeneFrequencyBaseline:
    """Predicts every hidden gene by its share of the training tokens, smoothed by one count per gene.

    Args:
        cells: token ids of the training cells.
        vocab_size (`int`): tokens of the vocabulary.
    """

    def __init__(self, cells: Iterable[Any], vocab_size: int) -> None:
        counts = np.ones(vocab_size)
        for cell in cells:
            np.add.at(counts, np.asarray(cell), 1)
        self.shares = counts / counts.sum()

    def loss(self, genes: np.ndarray, ranks: np.ndarray) -> float:
        """Return the mean negative log-likelihood in nats of hidden genes."""
        return float(-np.log(self.shares[genes]).mean())


class RankFrequencyBaseline:
    """Predicts a hidden gene by how often it stands near that rank, backed by its overall share.

    Counts are pooled over bins of `width` ranks; the overall share weighs as much as `prior` tokens of a bin.
    """

    def __init__(self, cells: Iterable[Any], vocab_size: int, *, width: int = 16, prior: float = 100.0) -> None:
        arrays = [np.asarray(cell) for cell in cells]
        self._overall = GeneFrequencyBaseline(arrays, vocab_size).shares
        n_bins = max((len(cell) for cell in arrays), default=1) // width + 1
        self._counts, self._width, self._prior = np.zeros((n_bins, vocab_size)), width, prior
        for cell in arrays:
            np.add.at(self._counts, (np.arange(len(cell)) // width, cell), 1)

    def loss(self, genes: np.ndarray, ranks: np.ndarray) -> float:
        """Return the mean negative log-likelihood in nats of hidden genes at their ranks."""
        bins = np.minimum(ranks // self._width, len(self._counts) - 1)
        totals = self._counts.sum(axis=1)[bins]
        shares = (self._counts[bins, genes] + self._prior * self._overall[genes]) / (totals + self._prior)
        return float(-np.log(shares).mean())


def neighbour_accuracy(train: np.ndarray, train_labels: Sequence[str], test: np.ndarray, test_labels: Sequence[str], *, k: int = 15) -> float:
    """Return the share of test cells whose label is the most frequent among their k nearest training cells.

    Args:
        train, test (`np.ndarray` of shape `(n, e)`): embeddings without NaN.
    """
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(n_neighbors=k).fit(train, list(train_labels))
    return float(classifier.score(test, list(test_labels)))


def majority_accuracy(train_labels: Sequence[str], test_labels: Sequence[str]) -> float:
    """Return the share of test cells that carry the most frequent training label."""
    names, counts = np.unique(list(train_labels), return_counts=True)
    return float(np.mean(np.asarray(list(test_labels)) == names[counts.argmax()]))
