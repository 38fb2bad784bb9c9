"""What deleting each gene of a cell, or moving it to the top, does to readouts: to first order, from a few passes for all genes at once.

Three things happen when gene p goes: nobody attends to it any more, the genes on one side of it stand one rank off, and, moved to the top, it is attended to there.

- A gene that goes, or comes, is one of many that are attended to, so that its weight is nearly infinitesimal: the derivative by the weight of a key tells its effect.
- Ranks are another matter. A gene one rank off enters the encoder with another position vector, by no means near the one it had. All variants lie on one path
  though, from no gene off to all of them off: readouts are computed exactly at a few places of it, and the derivative half way says what happens in between.

Derivatives are taken with every gene half way between its two ways to enter, which is the middle of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .attention import after_attention, first_tokens, run_layers
from .scan import CellScan


@dataclass(frozen=True)
class Slope:
    """How one readout changes, to first order."""

    along_c: np.ndarray
    """float64 of shape `(genes + 1,)`: on the path, by the number of genes that are entered as those before the changed one are; from 0."""
    own_m: np.ndarray
    """float64 of shape `(genes,)`: with each gene gone from its place, and come to the top."""

    def values(self, places: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """Return the readout of each variant, `(genes,)`, from its exact values at some places of the path."""
        rest_c = np.interp(np.arange(len(self.along_c)), places, exact - self.along_c[places])
        path_c = self.along_c + rest_c
        return (path_c[:-1] + path_c[1:]) / 2 + self.own_m


class ScanEstimate:
    """The path that the variants of one cell lie on.

    Args:
        scan (`CellScan`): the cell; it says whether genes are deleted or moved to the top.
        n_genes (`int`): genes of the cell, 4 at least.
        n_layers (`int`): layers to run, 1 at least.
        anchors (`int`): places of the path at which readouts are exact, 2 at least.
        only_first (`bool`): readouts look at the first token alone; hidden states have one row then.
    """

    def __init__(self, scan: CellScan, *, n_genes: int, n_layers: int, anchors: int, only_first: bool) -> None:
        self._layers = scan.bert.encoder.layer[:n_layers]
        self._only_first, self._first_gene, self._n_genes = only_first, scan.first_gene, n_genes
        self._genes = slice(scan.first_gene, scan.first_gene + n_genes)
        self._before_le, self._after_le = scan.before.hidden_le, scan.after.hidden_le
        self._top_me = None if scan.moved is None else scan.moved.hidden_le[self._genes]
        # One gene stays at the top all along, so that each other one takes its place there.
        self._at_top = scan.first_gene + n_genes // 2
        self.length = len(self._before_le)
        """Tokens of the cell."""
        self.places = np.round(np.linspace(0, n_genes, anchors)).astype(int)
        """Places of the path with exact values, `(anchors,)`."""

    def _entered(self, n_before: float | None) -> torch.Tensor:
        """Return what enters the encoder with some genes as those before a changed one are; None: all half way."""
        ranks_l = torch.arange(len(self._before_le), device=self._before_le.device) - self._first_gene
        share_l = torch.full_like(ranks_l, 0.5, dtype=torch.float32) if n_before is None else (ranks_l < n_before).float()
        share_l[: self._first_gene], share_l[self._genes.stop :] = 1.0, 0.0
        entered_le = torch.lerp(self._after_le, self._before_le, share_l[:, None].to(self._after_le.dtype))
        if self._top_me is not None:
            entered_le[self._at_top] = self._top_me[self._at_top - self._first_gene]
        return entered_le

    @cached_property
    def anchor_states(self) -> list[torch.Tensor]:
        """Hidden states at each of the places, `(l, e)` or `(1, e)`."""
        return [self._run(self._entered(place)) for place in self.places.tolist()]

    @cached_property
    def original_states(self) -> torch.Tensor:
        """Hidden states of the cell as it is."""
        if self._top_me is None and self._genes.stop == self.length:
            # Nothing stands behind the genes, and none of them is off.
            return self.anchor_states[-1]
        return self._run(self._before_le if self._top_me is None else self._after_le)

    @torch.no_grad()
    def _run(self, hidden_le: torch.Tensor) -> torch.Tensor:
        length = [len(hidden_le)]
        if self._only_first:
            return first_tokens(self._layers[-1], run_layers(self._layers[:-1], hidden_le, length), length)
        return run_layers(self._layers, hidden_le, length)

    def slopes(self, readouts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[Slope]:
        """Differentiate readouts half way.

        Args:
            readouts:
                from hidden states, `(x, e)`, and the weight each has in a mean, `(x,)`, to `(k,)`. Behind the l tokens of the cell come its genes at
                the top, with weight 0, where genes are moved there; with `only_first` there is the first token alone.
        """
        with torch.enable_grad():
            entered_le = self._entered(None).requires_grad_()
            hidden_xe, ghosts_me, passed = entered_le, self._top_me, []
            for i, layer in enumerate(self._layers):
                first = self._only_first and i == len(self._layers) - 1
                one = _Layer.run(layer, hidden_xe, ghosts_me, at_top=self._at_top, first_gene=self._first_gene, only_first=first)
                passed.append(one)
                hidden_xe = after_attention(layer, one.context_xe, hidden_xe[:1] if first else hidden_xe)
                ghosts_me = one.of_ghosts(ghosts_me)
            n_ghosts = 0 if ghosts_me is None else len(ghosts_me)
            weight_x = torch.cat([hidden_xe.new_ones(len(hidden_xe)), hidden_xe.new_zeros(n_ghosts)]).requires_grad_()
            values_k = readouts(hidden_xe if ghosts_me is None else torch.cat([hidden_xe, ghosts_me]), weight_x)
            wanted = [entered_le, weight_x, *(one.context_xe for one in passed)]
            gradients = [torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True) for value in values_k]
        own_kx = torch.zeros(len(values_k), self.length + (0 if self._top_me is None else self._n_genes), device=entered_le.device)
        with torch.no_grad():
            for own_x, gradient in zip(own_kx, gradients, strict=True):
                if gradient[1] is not None and not self._only_first:
                    own_x[: len(gradient[1])] += gradient[1]
            for i, one in enumerate(passed):
                one.add_by_weight(own_kx, torch.stack([gradient[2 + i] for gradient in gradients]))
            step_le = self._before_le - self._after_le
            return [self._slope((gradient[0] * step_le).sum(-1), own_x) for gradient, own_x in zip(gradients, own_kx, strict=True)]

    def _slope(self, by_step_l: torch.Tensor, own_x: torch.Tensor) -> Slope:
        by_step_m = by_step_l[self._genes].cpu().double().numpy()
        gone_m = own_x[self._genes].cpu().double().numpy()
        own_m = -gone_m
        if self._top_me is not None:
            place = self._at_top - self._first_gene
            # The one that stood there goes, this one comes; what stood there was nowhere else.
            own_m[place] = 0
            own_m += own_x[self.length :].cpu().double().numpy() - gone_m[place]
            by_step_m[place] = 0
        return Slope(np.concatenate([[0], by_step_m.cumsum()]), own_m)


@dataclass(frozen=True)
class _Layer:
    """One layer of the middle of the path, with what derivatives by the weight of keys need."""

    layer: Any
    query_hxd: torch.Tensor
    key_hld: torch.Tensor
    value_hld: torch.Tensor
    context_xe: torch.Tensor
    """Where the graph goes on."""
    ghost_key_hmd: torch.Tensor | None
    ghost_value_hmd: torch.Tensor | None
    ghost_context_me: torch.Tensor | None

    @classmethod
    def run(cls, layer: Any, hidden_le: torch.Tensor, ghosts_me: torch.Tensor | None, *, at_top: int, first_gene: int, only_first: bool) -> _Layer:
        attention = layer.attention.self
        heads = attention.num_attention_heads

        def parted(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(0, 1)

        query, key, value = attention.query(hidden_le[:1] if only_first else hidden_le), attention.key(hidden_le), attention.value(hidden_le)
        query, key, value = parted(query), parted(key), parted(value)
        context_xe = F.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1).flatten(1)
        ghosts: list[torch.Tensor | None] = [None, None, None]
        if ghosts_me is not None:
            with torch.no_grad():
                ghost_key, ghost_value = parted(attention.key(ghosts_me)), parted(attention.value(ghosts_me))
                context = None if only_first else _of_ghosts(parted(attention.query(ghosts_me)), ghost_key, ghost_value, key, value, at_top, first_gene)
                ghosts = [ghost_key, ghost_value, context]
        return cls(layer, query.detach(), key.detach(), value.detach(), context_xe, *ghosts)

    @torch.no_grad()
    def of_ghosts(self, ghosts_me: torch.Tensor | None) -> torch.Tensor | None:
        """Return the states of the genes at the top after the layer, if there are any that go on."""
        if ghosts_me is None or self.ghost_context_me is None:
            return None
        return after_attention(self.layer, self.ghost_context_me, ghosts_me)

    def add_by_weight(self, found_kx: torch.Tensor, by_context_kxe: torch.Tensor) -> None:
        """Add the derivatives of readouts by the weight of each key, real ones first: attention goes to it, and from all others."""
        d, scale = self.query_hxd.shape[-1], self.query_hxd.shape[-1] ** -0.5
        for head, query_xd in enumerate(self.query_hxd):
            own = slice(head * d, (head + 1) * d)
            by_context_kxd = by_context_kxe[..., own]
            # What a key of value v adds to a readout: weight times (derivative . v - derivative . context), over all that attend.
            less_kx1 = -(by_context_kxd * self.context_xe[:, own].detach()).sum(-1, keepdim=True)
            asked_kxd1 = torch.cat([by_context_kxd, less_kx1], dim=-1)
            scaled_xd = query_xd * scale
            scores_xl = scaled_xd @ self.key_hld[head].T
            total_x1 = scores_xl.logsumexp(-1, keepdim=True)
            self._add(found_kx[:, : scores_xl.shape[1]], scores_xl, total_x1, asked_kxd1, self.value_hld[head])
            if self.ghost_key_hmd is not None and self.ghost_value_hmd is not None:
                self._add(found_kx[:, scores_xl.shape[1] :], scaled_xd @ self.ghost_key_hmd[head].T, total_x1, asked_kxd1, self.ghost_value_hmd[head])

    @staticmethod
    def _add(found_ky: torch.Tensor, scores_xy: torch.Tensor, total_x1: torch.Tensor, asked_kxd1: torch.Tensor, value_yd: torch.Tensor) -> None:
        answer_kyd1 = scores_xy.sub_(total_x1).exp_().T @ asked_kxd1
        found_ky += (answer_kyd1[..., :-1] * value_yd).sum(-1) + answer_kyd1[..., -1]


def _of_ghosts(
    query_hmd: torch.Tensor,
    key_hmd: torch.Tensor,
    value_hmd: torch.Tensor,
    real_key_hld: torch.Tensor,
    real_value_hld: torch.Tensor,
    at_top: int,
    first_gene: int,
) -> torch.Tensor:
    """Return what each gene attends to at the top, `(m, e)`: itself in place of what stands there, and all others."""
    scale, places_m = query_hmd.shape[-1] ** -0.5, torch.arange(query_hmd.shape[1], device=query_hmd.device)
    found = []
    for query_md, key_md, value_md, real_key_ld, real_value_ld in zip(query_hmd, key_hmd, value_hmd, real_key_hld, real_value_hld, strict=True):
        scores_ml = (query_md * scale) @ real_key_ld.T
        scores_ml[places_m, first_gene + places_m] = -torch.inf
        scores_ml[:, at_top] = (query_md * key_md).sum(-1) * scale
        weight_ml = scores_ml.softmax(-1)
        found.append(weight_ml @ real_value_ld + weight_ml[:, at_top, None] * (value_md - real_value_ld[at_top]))
    return torch.stack(found, dim=1).flatten(1)
