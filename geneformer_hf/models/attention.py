"""The encoder over packed cells: no padding in any linear layer, and attention confined to each cell.

Cells of a batch are laid end to end, `(t, e)` for t tokens in all. On a CPU attention runs cell by cell without a mask,
because there a padding mask costs more than the padding; on an accelerator queries and keys are padded for the attention
call alone. The layers are walked by BERT's parameter names, so whatever replaces them (LoRA, 4-bit linear layers) runs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def encode_packed(bert: Any, input_ids_t: torch.Tensor, lengths: Sequence[int], n_layers: int) -> torch.Tensor:
    """Run the first layers of a BERT encoder over packed cells; the model must be in eval mode.

    Args:
        bert (`BertModel`): the encoder.
        input_ids_t (`torch.LongTensor` of shape `(t,)`): the cells end to end, without pads.
        lengths (`Sequence[int]`): tokens of each cell; they sum to t.
        n_layers (`int`): layers to run; the result is `hidden_states[n_layers]`.

    Returns:
        `torch.Tensor` of shape `(t, e)`.
    """
    device = input_ids_t.device
    lengths_b = torch.tensor(list(lengths), device=device)
    starts_b = lengths_b.cumsum(0) - lengths_b
    positions_t = torch.arange(len(input_ids_t), device=device) - starts_b.repeat_interleave(lengths_b)
    hidden_te = bert.embeddings(input_ids=input_ids_t.unsqueeze(0), position_ids=positions_t.unsqueeze(0)).squeeze(0)
    layout = None if device.type == "cpu" else _Padded(lengths_b, positions_t)
    for layer in bert.encoder.layer[:n_layers]:
        attention = layer.attention.self
        query, key, value = attention.query(hidden_te), attention.key(hidden_te), attention.value(hidden_te)
        heads = attention.num_attention_heads
        if layout is None:
            context_te = _cell_by_cell(query, key, value, heads, lengths)
        else:
            context_te = layout.attend(query, key, value, heads)
        # BERT's output modules without dropout; the sums are in place, as nothing else holds those tensors.
        hidden_te = layer.attention.output.LayerNorm(layer.attention.output.dense(context_te).add_(hidden_te))
        inner_te = layer.intermediate.dense(hidden_te)
        activation = layer.intermediate.intermediate_act_fn
        inner_te = inner_te.relu_() if isinstance(activation, nn.ReLU) else activation(inner_te)
        hidden_te = layer.output.LayerNorm(layer.output.dense(inner_te).add_(hidden_te))
    return hidden_te


def _cell_by_cell(query_te: torch.Tensor, key_te: torch.Tensor, value_te: torch.Tensor, heads: int, lengths: Sequence[int]) -> torch.Tensor:
    context_te = torch.empty_like(query_te)
    start = 0
    for length in lengths:
        cell = slice(start, start + length)
        start += length
        query, key, value = (x[cell].view(1, length, heads, -1).transpose(1, 2) for x in (query_te, key_te, value_te))
        context_te[cell] = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(length, -1)
    return context_te


class _Padded:
    """Where each packed token stands in a padded batch."""

    def __init__(self, lengths_b: torch.Tensor, positions_t: torch.Tensor) -> None:
        self.n_cells, self.longest = len(lengths_b), int(lengths_b.max())
        cells_t = torch.arange(self.n_cells, device=lengths_b.device).repeat_interleave(lengths_b)
        self.places_t = cells_t * self.longest + positions_t
        keep_bl = torch.arange(self.longest, device=lengths_b.device) < lengths_b.unsqueeze(1)
        self.mask = None if bool(keep_bl.all()) else keep_bl[:, None, None, :]

    def attend(self, query_te: torch.Tensor, key_te: torch.Tensor, value_te: torch.Tensor, heads: int) -> torch.Tensor:
        query, key, value = (self._pad(x_te, heads) for x_te in (query_te, key_te, value_te))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return context.transpose(1, 2).reshape(self.n_cells * self.longest, -1)[self.places_t]

    def _pad(self, x_te: torch.Tensor, heads: int) -> torch.Tensor:
        padded = x_te.new_zeros(self.n_cells * self.longest, x_te.shape[-1])
        padded[self.places_t] = x_te
        return padded.view(self.n_cells, self.longest, heads, -1).transpose(1, 2)
