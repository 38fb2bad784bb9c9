"""Supervised contrast across batches: cells of one class are drawn together, those of other batches first."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from .heads import IGNORED

TEMPERATURE = 0.1


def contrast_across(vectors_be: torch.Tensor, classes_b: torch.Tensor, batches_b: torch.Tensor, *, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Return the summed loss of cells: how much less like the cells of their class in other batches they are than like all others.

    For each cell, minus the mean over its partners of log softmax of cosine over temperature, among all other cells of the step. Partners are the cells
    of its class in other batches; where there are none, those in its own; a cell with neither has no loss. In several processes the others are
    the cells of all of them, so the sum over processes is that of one process.

    Source: Khosla et al. 2020, Supervised contrastive learning, NeurIPS 33, with partners chosen by batch.

    Args:
        vectors_be (`torch.Tensor` of shape `(b, e)`): cell embeddings.
        classes_b, batches_b (int64 `torch.Tensor` of shape `(b,)`): -100 where unknown; such a cell is left out.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> together = contrast_across(vectors, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
        >>> apart = contrast_across(vectors, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
        >>> bool(together < apart)
        True
    """
    known = (classes_b != IGNORED) & (batches_b != IGNORED)
    unit = F.normalize(vectors_be.float(), dim=1)
    others, classes, batches, first = _of_all_processes(unit, torch.where(known, classes_b, IGNORED), batches_b)
    usable = classes != IGNORED
    itself = torch.arange(len(others), device=unit.device) == (first + torch.arange(len(unit), device=unit.device))[:, None]
    counted = usable & ~itself
    likeness = (unit @ others.T / temperature).masked_fill(~counted, float("-inf"))
    same = (classes_b[:, None] == classes) & counted
    across = same & (batches_b[:, None] != batches)
    partners = torch.where(across.any(1, keepdim=True), across, same) & known[:, None]
    n_partners = partners.sum(1)
    # Where nothing counts, logsumexp is -inf; such a row has no partners and is not looked at.
    rows = n_partners > 0
    if not rows.any():
        return unit.sum() * 0.0
    logs = likeness[rows] - torch.logsumexp(likeness[rows], 1, keepdim=True)
    return -(logs.masked_fill(~partners[rows], 0.0).sum(1) / n_partners[rows]).sum()


def _of_all_processes(unit_be: torch.Tensor, classes_b: torch.Tensor, batches_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return vectors, classes and batches of all processes end to end, and where those of this one begin; gradients flow back to the others."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return unit_be, classes_b, batches_b, 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=unit_be.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(unit_be)], device=unit_be.device))
    most = int(max(int(size) for size in sizes))
    # Processes may hold different numbers of cells; what fills up is of no class.
    vectors = torch.cat(all_gather(F.pad(unit_be, (0, 0, 0, most - len(unit_be)))))
    ids = [torch.full((2, most), IGNORED, dtype=torch.int64, device=unit_be.device) for _ in sizes]
    dist.all_gather(ids, F.pad(torch.stack([classes_b, batches_b]), (0, most - len(unit_be)), value=IGNORED))
    classes, batches = torch.cat(ids, dim=1)
    return vectors, classes, batches, dist.get_rank() * most
