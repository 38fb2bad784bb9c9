"""Cells into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.modeling_geneformer import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer


class DataCollatorForMaskedGenes:
    """Pad cells and hide genes for pretraining.

    Each gene is chosen with probability `mask_probability`; of those chosen, 80 % become `<mask>`, 10 % a random gene and
    10 % stay. Special tokens are never chosen and never drawn.

    Args:
        tokenizer (`GeneformerTokenizer`)
        mask_probability (`float`, *optional*, defaults to 0.15)
        seed (`int`, *optional*, defaults to 0): the same seed and the same calls give the same masks.

    Source of the shares: Theodoris et al. 2023 (as BERT, Devlin et al. 2018).
    """

    def __init__(self, tokenizer: GeneformerTokenizer, *, mask_probability: float = 0.15, seed: int = 0) -> None:
        if not 0 < mask_probability < 1:
            msg = f"mask_probability is {mask_probability}; expected a share between 0 and 1."
            raise ValueError(msg)
        self.mask_probability = mask_probability
        self._pad, self._mask = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)
        self._genes = np.sort(tokenizer.gene_table.token_ids).astype(np.int64)
        self._specials = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._rng = np.random.default_rng(seed)

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, int64 of shape `(b, l)`."""
        lengths = [len(cell["input_ids"]) for cell in cells]
        ids = np.full((len(cells), max(lengths)), self._pad, dtype=np.int64)
        for row, (cell, length) in enumerate(zip(cells, lengths, strict=True)):
            ids[row, :length] = cell["input_ids"]
        present = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
        chosen = (self._rng.random(ids.shape) < self.mask_probability) & present & ~np.isin(ids, self._specials)
        labels = np.where(chosen, ids, IGNORED)
        fate = self._rng.random(ids.shape)
        random_genes = self._genes[self._rng.integers(len(self._genes), size=ids.shape)]
        ids = np.where(chosen & (fate < 0.8), self._mask, np.where(chosen & (fate >= 0.9), random_genes, ids))
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(present.astype(np.int64)), "labels": torch.from_numpy(labels)}
