"""Attention over packed cells: no padding in any linear layer, and attention confined to each cell.

Cells of a batch are laid end to end, `(t, e)` for t tokens in all. On a CPU attention runs cell by cell without a mask,
because there a padding mask costs more than the padding; on an accelerator a variable-length kernel does it where it can
(half precision, no dropout), else queries and keys are padded for the attention call alone.

Two ways in: `packed_attention`, registered with transformers, serves whole models in training and evaluation;
`encode_packed` walks an encoder's layers for embeddings, without anything that only training needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..device import has_variable_length_attention

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "packed_cells"
"""Name for `model.set_attn_implementation`: packed where a call brings `cu_seq_lens_q`, torch's usual attention where it does not."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each cell; an attention function of transformers.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, heads, t, d)`): packed cells; `(b, heads, l, d)` without `cu_seq_lens_q`.
        attention_mask: for calls without `cu_seq_lens_q`; packed calls need none.
        cu_seq_lens_q (`torch.IntTensor` of shape `(cells + 1,)`): where each cell begins and the last one ends.
        max_length_q (`int`): the longest cell.

    Returns:
        `(1, t, heads, d)`, and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if query.shape[0] != 1 or attention_mask is not None:
        msg = f"packed cells come as one row without an attention mask; got {query.shape[0]} rows{'' if attention_mask is None else ' and a mask'}."
        raise ValueError(msg)
    if kwargs.get("output_attentions"):
        logger.warning("packed cells give no attention weights. Use one cell a row and model.set_attn_implementation('eager') for them.")
    if query.device.type == "cpu" or max_length_q is None:
        lengths = cu_seq_lens_q.diff().tolist()
        if sum(lengths) != query.shape[2] or min(lengths) < 0:
            msg = f"cu_seq_lens_q ends at {sum(lengths):,}, and there are {query.shape[2]:,} tokens. It begins with 0 and holds the end of each cell."
            raise ValueError(msg)
        # One split, whose gradient is one concatenation; slices would each make a gradient as large as the batch.
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        contexts = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2) for q, k, v in parts]
        return torch.cat(contexts, dim=1), None
    query_thd, key_thd, value_thd = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if dropout == 0 and has_variable_length_attention(query.device, query.dtype):
        from torch.nn.attention.varlen import varlen_attn

        context_thd: Any = varlen_attn(query_thd, key_thd, value_thd, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
        return context_thd.unsqueeze(0), None
    # The variable-length kernel has no dropout and no single precision, so neither is given up for it.
    layout = _Padded(cu_seq_lens_q.diff(), longest=max_length_q)
    heads = query.shape[1]
    context = layout.attend(*(x.flatten(1) for x in (query_thd, key_thd, value_thd)), heads=heads, dropout=dropout, scaling=scaling)
    return context.unflatten(-1, (heads, -1)).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let a model compute attention so that it has weights to give, and put it back as it was: torch's fused kernels have none."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
    return run_layers(bert.encoder.layer[:n_layers], hidden_te, lengths)


def run_layers(layers: Sequence[Any], hidden_te: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Run some layers of a BERT encoder over the hidden states of packed cells, `(t, e)`; in eval mode."""
    device = hidden_te.device
    layout = None if device.type == "cpu" else _Padded(torch.tensor(list(lengths), device=device), longest=max(lengths))
    for layer in layers:
        attention = layer.attention.self
        query, key, value = attention.query(hidden_te), attention.key(hidden_te), attention.value(hidden_te)
        heads = attention.num_attention_heads
        if layout is None:
            context_te = _cell_by_cell(query, key, value, heads, lengths)
        else:
            context_te = layout.attend(query, key, value, heads=heads)
        hidden_te = after_attention(layer, context_te, hidden_te)
    return hidden_te


def first_tokens(layer: Any, hidden_te: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Run one layer for the first token of each packed cell alone, `(cells, e)`: all that a readout of `<cls>` needs of the last layer."""
    attention = layer.attention.self
    heads = attention.num_attention_heads
    starts_b = torch.tensor([0, *lengths[:-1]], device=hidden_te.device).cumsum(0)
    first_be = hidden_te[starts_b]
    query_bhd = attention.query(first_be).unflatten(-1, (heads, -1))
    if hidden_te.dtype == torch.float32 and type(attention.key) is type(attention.value) is nn.Linear and not torch.is_autocast_enabled(hidden_te.device.type):
        context_be = _one_query_each(attention, query_bhd, hidden_te, lengths)
    else:
        key_thd, value_thd = (f(hidden_te).unflatten(-1, (heads, -1)) for f in (attention.key, attention.value))
        contexts = []
        for query_hd, key_lhd, value_lhd in zip(query_bhd, key_thd.split(list(lengths)), value_thd.split(list(lengths)), strict=True):
            contexts.append(F.scaled_dot_product_attention(query_hd[None, :, None], key_lhd.transpose(0, 1)[None], value_lhd.transpose(0, 1)[None]).flatten())
        context_be = torch.stack(contexts)
    return after_attention(layer, context_be, first_be)


def _one_query_each(attention: Any, query_bhd: torch.Tensor, hidden_te: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Attend with one query for each cell, `(b, heads, d)`; returns `(b, e)`.

    The weights of keys go to the query, and those of values to what it attended to, so that neither is computed for any token. A bias of the keys
    adds the same to all scores of a query, which leaves its attention as it is.
    """
    heads, d = query_bhd.shape[1:]
    key_hde, value_hde = (f.weight.unflatten(0, (heads, d)) for f in (attention.key, attention.value))
    asked_bhe = torch.einsum("bhd,hde->bhe", query_bhd, key_hde) * d**-0.5
    seen_bhe = torch.stack(
        [(asked_he @ hidden_le.T).softmax(-1) @ hidden_le for asked_he, hidden_le in zip(asked_bhe, hidden_te.split(list(lengths)), strict=True)]
    )
    context_bhd = torch.einsum("bhe,hde->bhd", seen_bhe, value_hde)
    if attention.value.bias is not None:
        context_bhd = context_bhd + attention.value.bias.view(heads, d)
    return context_bhd.flatten(1)


def after_attention(layer: Any, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return what a layer makes of what its tokens attended to, both of shape `(..., e)`.

    BERT's output modules without dropout; the sums are in place, as nothing else holds those tensors.
    """
    hidden = layer.attention.output.LayerNorm(layer.attention.output.dense(context).add_(hidden))
    inner = layer.intermediate.dense(hidden)
    activation = layer.intermediate.intermediate_act_fn
    inner = inner.relu_() if isinstance(activation, nn.ReLU) else activation(inner)
    return layer.output.LayerNorm(layer.output.dense(inner).add_(hidden))


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

    def __init__(self, lengths_b: torch.Tensor, *, longest: int) -> None:
        self.n_cells, self.longest = len(lengths_b), longest
        keep_bl = torch.arange(longest, device=lengths_b.device) < lengths_b.unsqueeze(1)
        self.places_t = keep_bl.flatten().nonzero().squeeze(1)
        self.mask = None if len(self.places_t) == keep_bl.numel() else keep_bl[:, None, None, :]

    def attend(
        self, query_te: torch.Tensor, key_te: torch.Tensor, value_te: torch.Tensor, *, heads: int, dropout: float = 0.0, scaling: float | None = None
    ) -> torch.Tensor:
        query, key, value = (self._pad(x_te, heads) for x_te in (query_te, key_te, value_te))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, dropout_p=dropout, scale=scaling)
        return context.transpose(1, 2).reshape(self.n_cells * self.longest, -1)[self.places_t]

    def _pad(self, x_te: torch.Tensor, heads: int) -> torch.Tensor:
        padded = x_te.new_zeros(self.n_cells * self.longest, x_te.shape[-1]).index_copy(0, self.places_t, x_te)
        return padded.view(self.n_cells, self.longest, heads, -1).transpose(1, 2)
