"""One vector per cell from the hidden states of its tokens, whether cells come padded or packed."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_geneformer import GeneformerConfig


def token_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GeneformerConfig) -> torch.Tensor:
    """Return a bool tensor of the shape of `input_ids`: True everywhere but at pads."""
    return attention_mask.bool() if attention_mask is not None else torch.ne(input_ids, config.pad_token_id or 0)


def gene_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: GeneformerConfig) -> torch.Tensor:
    """Return a bool tensor of the shape of `input_ids`: True where a gene stands.

    Pads are left out always; the first and last token of a cell only where they are `<cls>` and `<eos>`.
    """
    keep = token_positions(input_ids, attention_mask, config)
    for special in (config.cls_token_id, config.eos_token_id):
        if special is not None:
            keep = keep & (input_ids != special)
    return keep


def mean_over_genes(hidden_ble: torch.Tensor, genes_bl: torch.Tensor) -> torch.Tensor:
    """Return the mean hidden state over gene positions, of shape `(b, e)`; zero for a cell without genes."""
    weights = genes_bl.to(hidden_ble.dtype).unsqueeze(-1)
    return (hidden_ble * weights).sum(1) / weights.sum(1).clamp(min=1)


class GeneAttention(nn.Module):
    """Weighs the genes of a cell by a learnt score, softmax over its genes alone; zero for a cell without genes."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # Not called `score`: peft would take it for a head of its own.
        self.weigh = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_ble: torch.Tensor, genes_bl: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum, of shape `(b, e)`."""
        scores_bl = self.weigh(hidden_ble).squeeze(-1).float().masked_fill(~genes_bl, float("-inf"))
        # A row of nothing but -inf would become NaN.
        weights_bl = torch.where(genes_bl, scores_bl.softmax(-1).nan_to_num(), 0.0)
        return (hidden_ble * weights_bl.to(hidden_ble.dtype).unsqueeze(-1)).sum(1)


def pool_cells(
    hidden_ble: torch.Tensor,
    input_ids_bl: torch.Tensor | None,
    attention_mask_bl: torch.Tensor | None,
    borders: torch.Tensor | None,
    *,
    config: GeneformerConfig,
    attention: nn.Module | None = None,
) -> torch.Tensor:
    """Return what a cell's head reads, of shape `(cells, e)`: `config.pooling` says what.

    Args:
        hidden_ble (`torch.Tensor` of shape `(b, l, e)`, or `(1, t, e)` for packed cells).
        borders (`torch.Tensor` of shape `(cells + 1,)`, *optional*): where packed cells begin and the last one ends.
        attention (`GeneAttention`, *optional*): for pooling "attention" and "attention_all".
    """
    if config.pooling in ("first", "cls"):
        return hidden_ble[:, 0] if borders is None else hidden_ble[0, borders[:-1].long()]
    if input_ids_bl is None:
        msg = f"pooling {config.pooling!r} leaves out special tokens, so the model needs `input_ids`; it got only embeddings."
        raise ValueError(msg)
    genes_bl = (
        token_positions(input_ids_bl, attention_mask_bl, config)
        if config.pooling == "attention_all"
        else gene_positions(input_ids_bl, attention_mask_bl, config)
    )
    pool = mean_over_genes if attention is None else attention
    if borders is None:
        return pool(hidden_ble, genes_bl)
    lengths = borders.diff().tolist()
    cells = zip(hidden_ble.split(lengths, dim=1), genes_bl.split(lengths, dim=1), strict=True)
    return torch.cat([pool(hidden, genes) for hidden, genes in cells])
