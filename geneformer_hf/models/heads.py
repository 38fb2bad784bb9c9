"""What the heads of a fine-tuned model say: names and kinds of their outputs, logits as probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .configuration_geneformer import GeneformerConfig

CLASSES, LABELS, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (CLASSES, LABELS, NUMBERS)
JOINED = "+"
IGNORED = -100
"""Label of a cell, gene or token that has none."""


@dataclass(frozen=True)
class Head:
    """One thing that is predicted of each cell or gene."""

    name: str
    """Column of obs; with several in one head, their names joined."""
    names: list[str]
    """Classes, labels or columns of numbers, in the order of the logits."""
    kind: str
    start: int = 0
    """First column of its logits among those of all heads."""

    @property
    def column(self) -> str:
        """Its name as part of the names of columns: a slash would make a group of them in an .h5ad."""
        return self.name.replace("/", "_")

    @property
    def stop(self) -> int:
        """One past its last column of logits."""
        return self.start + len(self.names)

    def probabilities(self, logits_nc: np.ndarray) -> np.ndarray:
        """Return what the logits of all heads say for this one: probabilities, or numbers; float64 of shape `(n, names)`."""
        mine = np.asarray(logits_nc[:, self.start : self.stop], dtype=np.float64)
        if self.kind == CLASSES:
            return softmax(mine)
        return 1 / (1 + np.exp(-mine)) if self.kind == LABELS else mine


def softmax(logits_nc: np.ndarray) -> np.ndarray:
    """Return probabilities, float64 of shape `(n, c)`."""
    shifted = np.asarray(logits_nc, dtype=np.float64)
    powers = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def entropy(probabilities_nc: np.ndarray) -> np.ndarray:
    """Return the entropy of each row in nats: 0 is certain, log(c) knows nothing.

    Example:
        >>> entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(3).tolist()
        [0.0, 0.693]
    """
    p = np.asarray(probabilities_nc, dtype=np.float64)
    return np.maximum(-(p * np.log(np.clip(p, 1e-300, None))).sum(axis=1), 0.0)


def heads_of(config: GeneformerConfig) -> list[Head]:
    """Return the heads of a fine-tuned model of cells."""
    if config.task_labels:
        heads: list[Head] = []
        for name, names in config.task_labels.items():
            heads.append(Head(name, list(names), CLASSES, heads[-1].stop if heads else 0))
        return heads
    names = [str(name) for _, name in sorted((int(i), name) for i, name in (config.id2label or {}).items())]
    kind = config.problem_type or (NUMBERS if len(names) == 1 else CLASSES)
    return [Head(JOINED.join(config.label_columns or ["label"]), names, kind)]


def column_names(heads: Sequence[Head]) -> list[str]:
    """Return the columns of obs that heads were taught from."""
    return [name for head in heads for name in (head.name.split(JOINED) if head.kind != CLASSES else [head.name])]
