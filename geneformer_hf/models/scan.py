"""Hidden states of the many variants of one cell that each differ from it in one gene, with the work they share done once.

Deleting gene p leaves the genes before it where they are and moves those after it up by one; moving it to the top moves those before it down by one. So over
all variants a token enters the first layer in two ways only (three, as the gene that is moved), and its query, key and value there are computed once for
each. What a token attends to is then the keys before p in one way and those after p in the other: sums over both sides are shared by
neighbouring variants. From the second layer on everything differs, and every variant is run through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .attention import after_attention

VARIANTS_AT_ONCE = 25
"""Variants whose first layer shares its sums."""
QUERIES_AT_ONCE = 256
"""Tokens whose sums are looked at together: what they attend to stays in the cache of a core."""


@dataclass(frozen=True)
class _Ways:
    """The tokens of a cell in one of the ways they enter the first layer."""

    hidden_le: torch.Tensor
    query_hld: torch.Tensor
    key_hld: torch.Tensor
    value_hld: torch.Tensor

    @classmethod
    def of(cls, bert: Any, tokens_l: torch.Tensor, positions_l: torch.Tensor) -> _Ways:
        attention = bert.encoder.layer[0].attention.self
        hidden_le = bert.embeddings(input_ids=tokens_l[None], position_ids=positions_l[None]).squeeze(0)
        heads = attention.num_attention_heads
        parts = (f(hidden_le).view(len(tokens_l), heads, -1).transpose(0, 1) for f in (attention.query, attention.key, attention.value))
        return cls(hidden_le, *parts)


@dataclass(frozen=True)
class FirstLayer:
    """What the tokens of some variants attended to in the first layer."""

    layer: Any
    hidden_qe: torch.Tensor
    """The tokens in each way they enter, `(queries, e)`."""
    rows_nl: torch.Tensor
    """Which of those the tokens of a variant are, in their order, `(variants, l or l - 1)`."""
    context_nle: torch.Tensor

    def states(self, variants: slice) -> torch.Tensor:
        """Return the states of some of the variants after the layer, `(variants, l or l - 1, e)`."""
        return after_attention(self.layer, self.context_nle[variants], self.hidden_qe[self.rows_nl[variants]])


class CellScan:
    """One cell, ready to be run without (or with at the top) each of its genes.

    Args:
        bert (`BertModel`): in eval mode.
        tokens_l (`torch.LongTensor` of shape `(l,)`): the cell with its special tokens.
        first_gene (`int`): position of the first gene: 1 after `<cls>`, else 0.
        to_top (`bool`): move each gene to the top in place of deleting it.
    """

    def __init__(self, bert: Any, tokens_l: torch.Tensor, *, first_gene: int, to_top: bool) -> None:
        self.bert, self.first_gene, self.to_top = bert, first_gene, to_top
        places_l = torch.arange(len(tokens_l), device=tokens_l.device)
        is_gene = places_l >= first_gene
        self.moved: _Ways | None = None
        if to_top:
            # Genes before the one that is moved go down by one; the end of the cell stays.
            self.before = _Ways.of(bert, tokens_l, (places_l + is_gene.long()).clamp(max=len(tokens_l) - 1))
            self.after = _Ways.of(bert, tokens_l, places_l)
            self.moved = _Ways.of(bert, tokens_l, torch.full_like(places_l, first_gene))
        else:
            self.before = _Ways.of(bert, tokens_l, places_l)
            self.after = _Ways.of(bert, tokens_l, (places_l - 1).clamp(min=0))

    def first_layer(self, positions: Sequence[int]) -> FirstLayer | None:
        """Return the first layer of the variants of the tokens at some positions, in ascending order.

        None where sums of what is left cannot be told from zero, so that the variants have to be run one by one.
        """
        n, length = len(positions), self.before.hidden_le.shape[0]
        context_nle = self.before.hidden_le.new_empty(n, length - (self.moved is None), self.before.hidden_le.shape[1])
        for start in range(0, length, QUERIES_AT_ONCE):
            block = range(start, min(start + QUERIES_AT_ONCE, length))
            for way, variants in (
                # Tokens enter in one way where they stand before the gene, in the other behind it.
                (self.before, [k for k, p in enumerate(positions) if p > block.start]),
                (self.after, [k for k, p in enumerate(positions) if p < block.stop - 1]),
            ):
                if not variants:
                    continue
                seen_qne = self._attend(way.query_hld[:, block.start : block.stop], [positions[k] for k in variants])
                if seen_qne is None:
                    return None
                for seen_qe, k in zip(seen_qne.unbind(1), variants, strict=True):
                    own = slice(block.start, min(block.stop, positions[k])) if way is self.before else slice(max(block.start, positions[k] + 1), block.stop)
                    context_nle[k, self._places(own, positions[k])] = seen_qe[own.start - block.start : own.stop - block.start]
        if self.moved is not None:
            top_qne = self._attend(self.moved.query_hld[:, list(positions)], positions)
            if top_qne is None:
                return None
            context_nle[:, self.first_gene] = top_qne.diagonal(dim1=0, dim2=1).T
        return FirstLayer(self.bert.encoder.layer[0], self._hidden(positions), self._rows(positions), context_nle)

    def _places(self, tokens: slice, gone: int) -> torch.Tensor:
        """Return where some tokens stand in the variant of one."""
        places = torch.arange(tokens.start, tokens.stop, device=self.before.hidden_le.device)
        if self.moved is None:
            return places - (places > gone).long()
        return places + ((places >= self.first_gene) & (places < gone)).long()

    def _attend(self, query_hqd: torch.Tensor, positions: Sequence[int]) -> torch.Tensor | None:
        """Return what some queries attend to in the variants of some positions, `(queries, variants, e)`; None where it cannot be told from zero."""
        n, first, last, scale = len(positions), positions[0], positions[-1], query_hqd.shape[-1] ** -0.5
        ways = [(self.before, slice(0, last)), (self.after, slice(first + 1, None))] + ([(self.moved, list(positions))] if self.moved is not None else [])
        key_hkd, value_hkd = (torch.cat([getattr(way, name)[:, keys] for way, keys in ways], dim=1) for name in ("key_hld", "value_hld"))
        weights_hqk = (query_hqd * scale) @ key_hkd.transpose(1, 2)
        weights_hqk = weights_hqk.sub_(weights_hqk.amax(-1, keepdim=True)).exp_()
        sums_hqnd = query_hqd.new_empty(*query_hqd.shape[:2], n, query_hqd.shape[-1])
        totals_hqn = query_hqd.new_empty(*sums_hqnd.shape[:3])
        sum_hqd, total_hq = torch.zeros_like(query_hqd), torch.zeros_like(totals_hqn[..., 0])
        for i, (low, high) in enumerate(pairwise([0, *positions])):
            # Keys before the gene are those before the last gene, and some.
            sum_hqd += weights_hqk[..., low:high] @ value_hkd[:, low:high]
            total_hq += weights_hqk[..., low:high].sum(-1)
            sums_hqnd[:, :, i], totals_hqn[:, :, i] = sum_hqd, total_hq
        sum_hqd, total_hq = torch.zeros_like(sum_hqd), torch.zeros_like(total_hq)
        ends = [last - first + p for p in [*positions, self.before.hidden_le.shape[0] - 1]]
        for i, (low, high) in reversed(list(enumerate(pairwise(ends)))):
            sum_hqd += weights_hqk[..., low:high] @ value_hkd[:, low:high]
            total_hq += weights_hqk[..., low:high].sum(-1)
            sums_hqnd[:, :, i] += sum_hqd
            totals_hqn[:, :, i] += total_hq
        if self.moved is not None:
            own_hqn = weights_hqk[..., -n:]
            sums_hqnd.addcmul_(own_hqn[..., None], value_hkd[:, None, -n:])
            totals_hqn += own_hqn
        if bool((totals_hqn < 1e-20).any()):
            return None
        return sums_hqnd.div_(totals_hqn[..., None]).permute(1, 2, 0, 3).flatten(2)

    def _hidden(self, positions: Sequence[int]) -> torch.Tensor:
        """Return the tokens up to the last position as they enter before it, those from the first as they enter behind it, and the moved ones."""
        parts = [self.before.hidden_le[: positions[-1] + 1], self.after.hidden_le[positions[0] :]]
        return torch.cat([*parts, self.moved.hidden_le[list(positions)]] if self.moved is not None else parts)

    def _rows(self, positions: Sequence[int]) -> torch.Tensor:
        """Return for each variant, in the order of its tokens, which of those each token is; int64 of shape `(variants, l or l - 1)`."""
        length, n, shift = self.before.hidden_le.shape[0], len(positions), positions[-1] + 1 - positions[0]
        gone_n1 = torch.tensor(positions, device=self.before.hidden_le.device)[:, None]
        others_l = torch.arange(length - 1, device=gone_n1.device)
        others_nl = others_l + (others_l >= gone_n1)
        rows_nl = torch.where(others_nl < gone_n1, others_nl, shift + others_nl)
        if self.moved is None:
            return rows_nl
        own_n1 = torch.arange(n, device=gone_n1.device)[:, None] + shift + length
        return torch.cat([rows_nl[:, : self.first_gene], own_n1, rows_nl[:, self.first_gene :]], dim=1)
