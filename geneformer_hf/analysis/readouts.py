"""What a perturbation does to a cell, read from hidden states before and after: of the cell, of its other genes, of a classifier.

Definitions are those of the published package (`spec` of InSilicoPerturber), with the genes that a change is about left out wherever single genes are compared:

- `cell`: cosine similarity of the cell to itself before. By `mean`, that of each untouched gene, averaged; by `cls`, that of the `<cls>` vectors.
- `state`: cosine of the cell's embedding to that of a state, after minus before. By `mean` all genes count, also those that were moved to the top.
- `gene`: cosine similarity of each untouched gene to itself before.
- `probability`: what a fine-tuned model says of each class, after minus before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..models.configuration_geneformer import GeneformerConfig
from ..models.heads import Head
from .perturbations import ChangedCell

CELL, STATE, GENE, PROBABILITY = READOUTS = ("cell", "state", "gene", "probability")


@dataclass(frozen=True)
class Before:
    """A cell before it is perturbed, as far as readouts need it."""

    first_gene: int
    """Position of its first gene."""
    n_genes: int
    unit_me: torch.Tensor | None = None
    """Its genes' vectors of length 1, `(genes, e)`."""
    unit_e: torch.Tensor | None = None
    """Its own vector of length 1."""
    to_states_s: torch.Tensor | None = None
    """Cosine to each state."""
    probabilities_c: np.ndarray | None = None


@dataclass(frozen=True)
class Shift:
    """What one perturbation did to one cell."""

    n_genes: int
    """Genes that were compared: untouched ones, or all genes of the perturbed cell for its embedding."""
    cell: float | None = None
    states: np.ndarray | None = None
    """float32 of shape `(states,)`."""
    genes: np.ndarray | None = None
    """float32 of shape `(untouched genes,)`, in the order of their ranks after the change."""
    probabilities: np.ndarray | None = None
    """float32 of shape `(classes of all heads,)`."""


@dataclass(frozen=True)
class Reader:
    """Which readouts are asked for, and how a cell is pooled.

    Args:
        pooling: `"cls"` or `"mean"`.
        states_se (`torch.Tensor` of shape `(states, e)`, *optional*): vectors of length 1.
    """

    config: GeneformerConfig
    pooling: str
    readouts: Sequence[str]
    states_se: torch.Tensor | None = None
    model: Any = None
    """A fine-tuned model, for probabilities."""
    heads: Sequence[Head] = field(default_factory=list)

    @property
    def only_first(self) -> bool:
        """Whether the first token of a cell is all that is looked at."""
        if PROBABILITY in self.readouts:
            return self.config.pooling in ("first", "cls")
        return self.pooling == "cls" and GENE not in self.readouts

    def before(self, tokens: np.ndarray, hidden_le: torch.Tensor) -> Before:
        """Take up a cell as it is; `hidden_le` has a row for each token, or for the first alone."""
        first_gene = int(self.config.cls_token_id is not None and len(tokens) > 0 and int(tokens[0]) == self.config.cls_token_id)
        has_end = int(self.config.eos_token_id is not None and len(tokens) > first_gene and int(tokens[-1]) == self.config.eos_token_id)
        n_genes = len(tokens) - first_gene - has_end
        found: dict[str, Any] = {}
        if PROBABILITY in self.readouts:
            return Before(first_gene, n_genes, probabilities_c=self._probabilities([tokens], hidden_le, [len(hidden_le)])[0])
        genes_me = hidden_le[first_gene : first_gene + n_genes].float()
        own_e = hidden_le[0].float() if self.pooling == "cls" else genes_me.mean(0)
        if self.pooling == "mean" or GENE in self.readouts:
            found["unit_me"] = F.normalize(genes_me, dim=1)
        found["unit_e"] = F.normalize(own_e, dim=0)
        if self.states_se is not None:
            found["to_states_s"] = _dot(self.states_se, found["unit_e"])
        return Before(first_gene, n_genes, **found)

    def after(self, changed: Sequence[tuple[Before, ChangedCell, np.ndarray]], hidden_te: torch.Tensor, lengths: Sequence[int]) -> list[Shift]:
        """Compare perturbed cells with what they were: all of a pass at once, so that an accelerator is waited for once a pass and not for each cell.

        Args:
            changed: of each cell what it was, what was changed, and its tokens.
            hidden_te (`torch.Tensor` of shape `(t, e)`), lengths (`Sequence[int]`): the cells end to end, with a row for each token, or for the first alone.
        """
        starts = np.concatenate(([0], np.cumsum(lengths)[:-1])).tolist()
        if PROBABILITY in self.readouts:
            said_bc = self._probabilities([tokens for *_, tokens in changed], hidden_te, lengths)
            return [
                Shift(len(cell.tokens), probabilities=(said_c - before.probabilities_c).astype(np.float32))
                for (before, cell, _), said_c in zip(changed, said_bc, strict=True)
            ]
        n_untouched = [int(cell.untouched.sum()) for _, cell, _ in changed]
        found: list[dict[str, Any]] = [{} for _ in changed]
        likeness_u = self._likeness(changed, hidden_te, starts)
        own_be = None
        if self.pooling == "cls":
            own_be = F.normalize(hidden_te[starts].float(), dim=1)
        elif STATE in self.readouts:
            genes = (
                slice(start + before.first_gene, start + before.first_gene + len(cell.tokens)) for start, (before, cell, _) in zip(starts, changed, strict=True)
            )
            own_be = F.normalize(torch.stack([hidden_te[some].float().mean(0) for some in genes]), dim=1)
        if CELL in self.readouts:
            if own_be is not None and self.pooling == "cls":
                like_b = _dot(own_be, torch.stack([before.unit_e for before, *_ in changed]))  # type: ignore[misc]
            else:
                # Of no gene it is NaN.
                like_b = torch.stack([part.mean() for part in likeness_u.split(n_untouched)])  # type: ignore[union-attr]
            for one, like in zip(found, like_b.tolist(), strict=True):
                one["cell"] = like
        if STATE in self.readouts:
            nearer_bs = _dot(self.states_se[None], own_be[:, None]) - torch.stack([before.to_states_s for before, *_ in changed])  # type: ignore[index, misc]
            for one, nearer_s in zip(found, nearer_bs.cpu().numpy(), strict=True):
                one["states"] = nearer_s
        if GENE in self.readouts:
            for one, part in zip(found, likeness_u.cpu().split(n_untouched), strict=True):  # type: ignore[union-attr]
                one["genes"] = part.numpy()
        return [Shift(n, **one) for n, one in zip(n_untouched, found, strict=True)]

    def _likeness(self, changed: Sequence[tuple[Before, ChangedCell, np.ndarray]], hidden_te: torch.Tensor, starts: Sequence[int]) -> torch.Tensor | None:
        """Return the cosine similarity of each untouched gene of each cell to itself before, cells end to end; None where no readout needs it."""
        befores = {id(before): before for before, *_ in changed}
        units = [before.unit_me for before in befores.values() if before.unit_me is not None]
        if not units:
            return None
        first_of = dict(zip(befores, np.concatenate(([0], np.cumsum([len(unit) for unit in units])[:-1])).tolist(), strict=True))
        rows_u = np.concatenate([start + before.first_gene + np.flatnonzero(cell.untouched) for start, (before, cell, _) in zip(starts, changed, strict=True)])
        origin_u = np.concatenate([first_of[id(before)] + cell.origin[cell.untouched] for before, cell, _ in changed])
        rows, origin = (torch.from_numpy(places).to(hidden_te.device) for places in (rows_u, origin_u))
        unit_me = units[0] if len(units) == 1 else torch.cat(units)
        return _dot(F.normalize(hidden_te[rows].float(), dim=1), unit_me[origin])

    def _probabilities(self, cells: Sequence[np.ndarray], hidden_te: torch.Tensor, lengths: Sequence[int]) -> np.ndarray:
        """Return what all heads say of some cells, float64 of shape `(b, classes of all heads)`."""
        ids = np.concatenate([tokens[:length] for tokens, length in zip(cells, lengths, strict=True)]).astype(np.int64)
        borders = torch.tensor([0, *np.cumsum(lengths).tolist()], device=hidden_te.device)
        said = self.model.head(hidden_te[None], torch.from_numpy(ids).to(hidden_te.device)[None], None, borders)
        logits = (torch.cat(said, dim=1) if isinstance(said, tuple) else said).float().cpu().numpy()
        return np.concatenate([head.probabilities(logits) for head in self.heads], axis=1)


def _dot(vectors_xe: torch.Tensor, one_e: torch.Tensor) -> torch.Tensor:
    """Return dot products in the precision of the vectors; a matrix product would be made in half precision by autocast, where all likenesses are 1."""
    return (vectors_xe * one_e).sum(-1)


def named_states(vectors: Mapping[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """Return the vectors of states with length 1, float32 of shape `(states, e)`."""
    return F.normalize(torch.from_numpy(np.stack(list(vectors.values())).astype(np.float64)), dim=1).float().to(device)
