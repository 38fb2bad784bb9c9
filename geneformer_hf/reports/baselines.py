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


WIDTHS = (16, 64, 256, 1024)
PRIORS = (100.0, 1_000.0, 10_000.0, 100_000.0)


class RankFrequencyBaseline:
    """Predicts a hidden gene by how often it stands near that rank, backed by its overall share.

    Counts are pooled over bins of `width` ranks; the overall share weighs as much as `prior` tokens of a bin. What is not given is
    chosen on a tenth of the cells, kept aside for that, so that the baseline is as good as it can be.
    """

    def __init__(self, cells: Iterable[Any], vocab_size: int, *, width: int | None = None, prior: float | None = None) -> None:
        arrays = [np.asarray(cell) for cell in cells]
        self.width, self.prior = (width, prior) if width is not None and prior is not None else _choose_smoothing(arrays, vocab_size, width, prior)
        self._count(arrays, vocab_size)

    def _count(self, arrays: Sequence[np.ndarray], vocab_size: int) -> None:
        self._overall = GeneFrequencyBaseline(arrays, vocab_size).shares
        n_bins = max((len(cell) for cell in arrays), default=1) // self.width + 1
        self._counts = np.zeros((n_bins, vocab_size))
        for cell in arrays:
            np.add.at(self._counts, (np.arange(len(cell)) // self.width, cell), 1)
        self._totals = self._counts.sum(axis=1)

    def loss(self, genes: np.ndarray, ranks: np.ndarray) -> float:
        """Return the mean negative log-likelihood in nats of hidden genes at their ranks."""
        return self._loss(genes, ranks, self.prior)

    def losses(self, genes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the negative log-likelihood in nats of each hidden gene at its rank."""
        return self._losses(genes, ranks, self.prior)

    def _loss(self, genes: np.ndarray, ranks: np.ndarray, prior: float) -> float:
        return float(self._losses(genes, ranks, prior).mean())

    def _losses(self, genes: np.ndarray, ranks: np.ndarray, prior: float) -> np.ndarray:
        bins = np.minimum(ranks // self.width, len(self._counts) - 1)
        shares = (self._counts[bins, genes] + prior * self._overall[genes]) / (self._totals[bins] + prior)
        return -np.log(shares)


def _choose_smoothing(arrays: Sequence[np.ndarray], vocab_size: int, width: int | None, prior: float | None) -> tuple[int, float]:
    """Return the width and prior under which every tenth cell is likeliest, given the others."""
    aside, rest = arrays[::10], [cell for i, cell in enumerate(arrays) if i % 10]
    widths, priors = (width,) if width else WIDTHS, (prior,) if prior else PRIORS
    if not rest:
        return widths[0], priors[-1]
    genes, ranks = np.concatenate(aside), np.concatenate([np.arange(len(cell)) for cell in aside])
    losses: dict[tuple[int, float], float] = {}
    for some_width in widths:
        baseline = RankFrequencyBaseline(rest, vocab_size, width=some_width, prior=priors[0])
        losses |= {(some_width, some_prior): baseline._loss(genes, ranks, some_prior) for some_prior in priors}
    return min(losses, key=lambda pair: losses[pair])


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
