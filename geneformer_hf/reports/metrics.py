"""How well a masked-gene model does on held-out cells."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

TOP = 10


class MaskedGeneScores:
    """Sums over hidden genes, batch by batch: loss, top-1 and top-10 accuracy."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, logits_mv: torch.Tensor, targets_m: torch.Tensor) -> None:
        """Count some hidden genes.

        Args:
            logits_mv (`torch.Tensor` of shape `(m, vocabulary)`), targets_m (`torch.LongTensor` of shape `(m,)`).
        """
        logits_mv = logits_mv.float()
        right_m1 = logits_mv.gather(1, targets_m[:, None])
        # Ties count against the model: one that says nothing about any gene is not right about all of them.
        rank_m = (logits_mv >= right_m1).sum(1) - 1
        parts = (F.cross_entropy(logits_mv, targets_m, reduction="sum"), (rank_m == 0).sum(), (rank_m < TOP).sum())
        for i, part in enumerate(parts):
            self._sums[i] += float(part)
        self._sums[3] += len(targets_m)

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Add up what several processes have counted; `reduce` sums a float64 tensor over them."""
        self._sums = reduce(torch.tensor(self._sums, dtype=torch.float64, device=device)).tolist()

    def __iadd__(self, other: MaskedGeneScores) -> MaskedGeneScores:
        self._sums = [ours + theirs for ours, theirs in zip(self._sums, other._sums, strict=True)]
        return self

    @property
    def n_genes(self) -> int:
        """Hidden genes counted."""
        return int(self._sums[3])

    def figures(self) -> dict[str, float]:
        """Return loss in nats, perplexity and accuracies; NaN where no gene was hidden."""
        n = self._sums[3] or math.nan
        loss = self._sums[0] / n
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy_top1": self._sums[1] / n,
            f"accuracy_top{TOP}": self._sums[2] / n,
        }
