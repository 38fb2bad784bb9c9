"""Cells into batches: with hidden genes to pretrain, with labels of cells or genes to fine-tune."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data

from ..errors import SettingError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .masking import CellKey, GeneMasker, MaskingRates
from .packing import LAYOUTS, pack_cells, pad_cells
from .tokenized import require_token_ids

KEY = "cell_key"
"""Column with the key of a cell's masks: corpus, row and pass."""


class _Layout:
    """Cells laid out with what a tokenizer says of pads."""

    def __init__(self, tokenizer: GeneformerTokenizer, layout: str, pad_to_multiple_of: int | None) -> None:
        if layout not in LAYOUTS:
            msg = f"layout {layout!r} is not one of {', '.join(map(repr, LAYOUTS))}."
            raise SettingError(msg)
        self.layout, self._pad, self._multiple_of = layout, int(tokenizer.pad_token_id), pad_to_multiple_of
        self._vocab_size = 1 + max(tokenizer.get_vocab().values())

    def _laid_out(self, lengths: np.ndarray, ids: np.ndarray, labels: np.ndarray | None = None) -> dict[str, Any]:
        if self.layout == "packed":
            return pack_cells(lengths, ids, labels)
        return pad_cells(lengths, ids, labels, pad=self._pad, multiple_of=self._multiple_of)

    def _end_to_end(self, cells: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of cells, and their tokens laid end to end.

        Raises:
            VocabularyMismatchError: if something in them is no token id of the vocabulary.
        """
        lengths = np.array([len(cell["input_ids"]) for cell in cells])
        # An empty list becomes an array of float64.
        parts = [np.asarray(cell["input_ids"]) for cell in cells if len(cell["input_ids"])]
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        require_token_ids(ids, self._vocab_size, name=lambda place: self._cell_of(cells, lengths, place))
        return lengths, ids

    @staticmethod
    def _cell_of(cells: Sequence[dict[str, Any]], lengths: np.ndarray, place: int) -> str:
        row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        return f"cell {cells[row]['cell_id']!r}" if "cell_id" in cells[row] else f"cell {row:,} of a batch"


class DataCollatorForMaskedGenes(_Layout):
    """Lay out cells and hide genes for pretraining.

    Each gene is chosen with probability `mask_probability`; of those chosen, 80 % become `<mask>`, 10 % a random gene and
    10 % stay. Special tokens are never chosen and never drawn.

    Cells that carry a `cell_key` (those of `pretrain`, and of streams made with `cell_keys=True`) have masks that depend on
    nothing else. Others are numbered in the order they come, so their masks depend on order and cannot be resumed.

    Args:
        tokenizer (`GeneformerTokenizer`)
        mask_probability (`float`, *optional*, defaults to 0.15), mask_share (0.8), random_share (0.1): see `MaskingRates`.
        seed (`int`, *optional*, defaults to 0): the same seed and keys give the same masks.
        layout (`"padded"` or `"packed"`, *optional*, defaults to `"padded"`):
            packed batches are for models with `set_attn_implementation("packed_cells")`.
        pad_to_multiple_of (`int`, *optional*): round padded lengths up.

    Source of the shares: Theodoris et al. 2023 (as BERT, Devlin et al. 2018).
    """

    def __init__(
        self,
        tokenizer: GeneformerTokenizer,
        *,
        mask_probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
        layout: str = "padded",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        super().__init__(tokenizer, layout, pad_to_multiple_of)
        self.masker = GeneMasker(tokenizer, MaskingRates(mask_probability, mask_share, random_share), seed=seed)
        self._n_seen = 0

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` (-100 where nothing is asked) and what the layout needs: see `pad_cells`, `pack_cells`."""
        lengths, packed = self._end_to_end(cells)
        ids, labels = self.masker.hide(packed, lengths, [self._key_of(cell) for cell in cells])
        return self._laid_out(lengths, ids, labels)

    def _key_of(self, cell: dict[str, Any]) -> CellKey:
        if KEY in cell:
            return CellKey(*(int(part) for part in cell[KEY]))
        self._n_seen += 1
        worker = torch.utils.data.get_worker_info()
        # Each worker of a loader starts counting from 0 in every epoch: the seed torch gives them tells them apart, and processes their rank.
        return CellKey(int(os.environ.get("RANK", "0")), self._n_seen - 1, 0 if worker is None else worker.seed % (1 << 62))


class DataCollatorForCells(_Layout):
    """Lay out cells with their labels (column `labels` or `label`): class ids, several ids for several heads, or numbers.

    For `GeneformerForSequenceClassification` and `GeneformerForMultiTaskClassification`, in any Trainer with
    `remove_unused_columns=False`. Other columns are left out.

    Args:
        tokenizer (`GeneformerTokenizer`)
        layout (`"padded"` or `"packed"`, *optional*, defaults to `"padded"`):
            packed batches are for models with `set_attn_implementation("packed_cells")`.
        pad_to_multiple_of (`int`, *optional*): round padded lengths up.

    Example:
        >>> from geneformer_hf import GeneTable, GeneformerTokenizer
        >>> tokenizer = GeneformerTokenizer(gene_table=GeneTable(["ENSG00000000003", "ENSG00000000005"], [2, 3], [1.0, 2.0]))
        >>> batch = DataCollatorForCells(tokenizer)([{"input_ids": [3, 2], "label": 1}, {"input_ids": [2], "label": 0}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[3, 2], [2, 0]], [1, 0])
    """

    def __init__(self, tokenizer: GeneformerTokenizer, *, layout: str = "padded", pad_to_multiple_of: int | None = None) -> None:
        super().__init__(tokenizer, layout, pad_to_multiple_of)

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what the layout needs (see `pad_cells`, `pack_cells`) and, where cells have them, `labels` of shape `(b,)` or `(b, k)`."""
        batch = self._laid_out(*self._end_to_end(cells))
        name = next((name for name in ("labels", "label") if name in cells[0]), None)
        if name is not None:
            labels = torch.as_tensor(np.asarray([cell[name] for cell in cells]))
            batch["labels"] = labels.float() if labels.is_floating_point() else labels.long()
        return batch


class DataCollatorForGenes(_Layout):
    """Lay out cells with the classes of their genes, for `GeneformerForTokenClassification`.

    Args:
        tokenizer (`GeneformerTokenizer`)
        class_of_token (int array of shape `(vocabulary,)`): the class of each token id, -100 where it has none; see `GeneClasses.of_tokens`.
        layout, pad_to_multiple_of: as in `DataCollatorForCells`.
    """

    def __init__(self, tokenizer: GeneformerTokenizer, class_of_token: np.ndarray, *, layout: str = "padded", pad_to_multiple_of: int | None = None) -> None:
        super().__init__(tokenizer, layout, pad_to_multiple_of)
        self.class_of_token = np.asarray(class_of_token, dtype=np.int64)

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return what the layout needs, with `labels` beside each token."""
        lengths, ids = self._end_to_end(cells)
        return self._laid_out(lengths, ids, self.class_of_token[ids])
