"""How a readout of a cell changes, to first order, with what enters the encoder: one pass forward, a few backward, for all genes at once.

Two things happen when a gene is deleted: nobody attends to it any more, and the genes after it move up by one. The first is told by a gate on each key, the
derivative by which says what closing it would do; the second by the gradient with respect to the embedding of each position. Moving a gene to the top
changes positions alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .attention import after_attention


@dataclass(frozen=True)
class FirstOrder:
    """What some readouts of a cell change by, to first order."""

    values_k: torch.Tensor
    """`(k,)`: the readouts as they are."""
    deleted_km: torch.Tensor
    """`(k, genes)`: what deleting each gene adds."""
    to_top_km: torch.Tensor
    """`(k, genes)`: what moving each gene to the top adds."""


def first_order(
    bert: Any, tokens_l: torch.Tensor, *, first_gene: int, n_genes: int, n_layers: int, readouts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> FirstOrder:
    """Estimate what deleting each gene, or moving it to the top, does to readouts.

    Args:
        bert (`BertModel`): in eval mode.
        tokens_l (`torch.LongTensor` of shape `(l,)`): the cell with its special tokens.
        first_gene, n_genes: where its genes stand.
        n_layers: layers to run.
        readouts: from hidden states of shape `(l, e)` and the weight of each position, `(l,)`, in a mean to readouts of shape `(k,)`.
    """
    length, table = len(tokens_l), bert.embeddings.position_embeddings.weight
    embeddings = bert.embeddings
    with torch.enable_grad():
        entered_le = (embeddings.word_embeddings(tokens_l) + embeddings.token_type_embeddings.weight[0] + table[:length]).detach().requires_grad_()
        gate_l = torch.zeros(length, device=tokens_l.device, requires_grad=True)
        hidden_le = embeddings.LayerNorm(entered_le)
        for layer in bert.encoder.layer[:n_layers]:
            attention = layer.attention.self
            heads = attention.num_attention_heads
            query, key, value = (f(hidden_le).view(1, length, heads, -1).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=gate_l.expand(1, 1, length, length))
            hidden_le = after_attention(layer, context.transpose(1, 2).reshape(length, -1), hidden_le)
        values_k = readouts(hidden_le, gate_l.exp())
        by_entered_kle, by_gate_kl = torch.autograd.grad(
            values_k, (entered_le, gate_l), torch.eye(len(values_k), device=values_k.device, dtype=values_k.dtype), is_grads_batched=True
        )
    genes = slice(first_gene, first_gene + n_genes)
    with torch.no_grad():
        up_le, down_le = (table[:length].roll(step, 0) - table[:length] for step in (1, -1))
        moved_up_kl = (by_entered_kle * up_le).sum(-1)
        # Whatever stands behind a gene that is deleted moves up, the end of the cell as well.
        behind_kl = moved_up_kl.flip(1).cumsum(1).flip(1) - moved_up_kl
        deleted_km = (behind_kl - by_gate_kl)[:, genes]
        moved_down_km = (by_entered_kle * down_le).sum(-1)[:, genes]
        before_km = moved_down_km.cumsum(1) - moved_down_km
        own_km = (by_entered_kle * (table[first_gene] - table[:length])).sum(-1)[:, genes]
        return FirstOrder(values_k.detach(), deleted_km, before_km + own_km)
