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
            return Before(first_gene, n_genes, probabilities_c=self._probabilities(tokens, hidden_le))
        genes_me = hidden_le[first_gene : first_gene + n_genes].float()
        own_e = hidden_le[0].float() if self.pooling == "cls" else genes_me.mean(0)
        if self.pooling == "mean" or GENE in self.readouts:
            found["unit_me"] = F.normalize(genes_me, dim=1)
        found["unit_e"] = F.normalize(own_e, dim=0)
        if self.states_se is not None:
            found["to_states_s"] = _dot(self.states_se, found["unit_e"])
        return Before(first_gene, n_genes, **found)

    def after(self, before: Before, cell: ChangedCell, tokens: np.ndarray, hidden_le: torch.Tensor) -> Shift:
        """Compare a perturbed cell with what it was."""
        n_untouched = int(cell.untouched.sum())
        if PROBABILITY in self.readouts:
            assert before.probabilities_c is not None
            return Shift(len(cell.tokens), probabilities=(self._probabilities(tokens, hidden_le) - before.probabilities_c).astype(np.float32))
        found: dict[str, Any] = {}
        genes_me = hidden_le[before.first_gene : before.first_gene + len(cell.tokens)].float()
        likeness_u = None
        if before.unit_me is not None:
            rows = torch.from_numpy(np.flatnonzero(cell.untouched)).to(genes_me.device)
            origin = torch.from_numpy(cell.origin[cell.untouched]).to(genes_me.device)
            likeness_u = (F.normalize(genes_me[rows], dim=1) * before.unit_me[origin]).sum(1)
        own_e = F.normalize(hidden_le[0].float() if self.pooling == "cls" else genes_me.mean(0), dim=0)
        if CELL in self.readouts:
            if self.pooling == "cls":
                found["cell"] = float(_dot(own_e, before.unit_e))  # type: ignore[arg-type]
            else:
                found["cell"] = float(likeness_u.mean()) if n_untouched else float("nan")  # type: ignore[union-attr]
        if STATE in self.readouts:
            found["states"] = (_dot(self.states_se, own_e) - before.to_states_s).cpu().numpy()  # type: ignore[arg-type, operator]
        if GENE in self.readouts:
            found["genes"] = likeness_u.cpu().numpy()  # type: ignore[union-attr]
        return Shift(n_untouched, **found)

    def _probabilities(self, tokens: np.ndarray, hidden_le: torch.Tensor) -> np.ndarray:
        """Return what all heads say of a cell, float64 of shape `(classes of all heads,)`."""
        ids = torch.from_numpy(tokens[: len(hidden_le)].astype(np.int64)).to(hidden_le.device)[None]
        said = self.model.head(hidden_le[None], ids)
        logits = (torch.cat(said, dim=1) if isinstance(said, tuple) else said).float().cpu().numpy()
        return np.concatenate([head.probabilities(logits)[0] for head in self.heads])


def _dot(vectors_xe: torch.Tensor, one_e: torch.Tensor) -> torch.Tensor:
    """Return dot products in the precision of the vectors; a matrix product would be made in half precision by autocast, where all likenesses are 1."""
    return (vectors_xe * one_e).sum(-1)


def named_states(vectors: Mapping[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """Return the vectors of states with length 1, float32 of shape `(states, e)`."""
    return F.normalize(torch.from_numpy(np.stack(list(vectors.values())).astype(np.float64)), dim=1).float().to(device)
