"""How well a masked-gene model does on held-out cells."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

TOP = 10


class MaskedGeneScores:
    """Sums over hidden genes, batch by batch: loss, top-1 and top-10 accuracy, of all and of those that are `<mask>`.

    One hidden gene in five is not masked: half of these still stand there to be copied. What a model knows of genes it cannot see
    shows at the masked ones alone.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(2, 4, dtype=torch.float64)

    def add(self, logits_mv: torch.Tensor, targets_m: torch.Tensor, masked_m: torch.Tensor) -> None:
        """Count some hidden genes.

        Args:
            logits_mv (`torch.Tensor` of shape `(m, vocabulary)`), targets_m (`torch.LongTensor` of shape `(m,)`):
                scores of all genes, and the right one.
            masked_m (`torch.BoolTensor` of shape `(m,)`): where `<mask>` stood.
        """
        logits_mv = logits_mv.float()
        right_m1 = logits_mv.gather(1, targets_m[:, None])
        # Ties count against the model: one that says nothing about any gene is not right about all of them.
        rank_m = (logits_mv >= right_m1).sum(1) - 1
        losses_m = F.cross_entropy(logits_mv, targets_m, reduction="none")
        parts_m4 = torch.stack([losses_m, (rank_m == 0).float(), (rank_m < TOP).float(), torch.ones_like(losses_m)], dim=1).cpu().double()
        self._sums += torch.stack([parts_m4.sum(0), parts_m4[masked_m.cpu()].sum(0)])

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Add up what several processes have counted; `reduce` sums a float64 tensor over them."""
        self._sums = reduce(self._sums.to(device)).cpu()

    def __iadd__(self, other: MaskedGeneScores) -> MaskedGeneScores:
        self._sums = self._sums + other._sums
        return self

    def figures(self) -> dict[str, float]:
        """Return loss in nats, perplexity and accuracies, and loss and accuracies at `<mask>` alone; NaN where there was none."""
        (loss, first, ten, n), (loss_there, first_there, ten_there, n_there) = self._sums.tolist()
        n, n_there = n or math.nan, n_there or math.nan
        return {
            "loss": loss / n,
            "perplexity": math.exp(min(loss / n, 700.0)),
            "accuracy_top1": first / n,
            f"accuracy_top{TOP}": ten / n,
            "loss_at_mask": loss_there / n_there,
            "accuracy_top1_at_mask": first_there / n_there,
            f"accuracy_top{TOP}_at_mask": ten_there / n_there,
        }
