"""Cells into batches: padded to the longest, or laid end to end."""

from __future__ import annotations

import numpy as np
import torch

from ..models.heads import IGNORED

LAYOUTS = ("padded", "packed")


def pad_cells(
    lengths: np.ndarray, input_ids_t: np.ndarray, labels_t: np.ndarray | None = None, *, pad: int, multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and, where tokens have labels, `labels`: int64 of shape `(b, l)`."""
    longest = int(lengths.max())
    if multiple_of:
        longest = -(-longest // multiple_of) * multiple_of
    present = np.arange(longest) < lengths[:, None]
    ids = np.full(present.shape, pad, dtype=np.int64)
    ids[present] = input_ids_t
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(present.astype(np.int64))}
    if labels_t is not None:
        labels = np.full(present.shape, IGNORED, dtype=np.int64)
        labels[present] = labels_t
        batch["labels"] = torch.from_numpy(labels)
    return batch


def pack_cells(lengths: np.ndarray, input_ids_t: np.ndarray, labels_t: np.ndarray | None = None) -> dict[str, torch.Tensor | int]:
    """Return one row of shape `(1, t)`: `input_ids`, `position_ids` and, where tokens have them, `labels`; and where cells begin and end.

    The model must have been told: `model.set_attn_implementation("packed_cells")`, or `"flash_attention_2"`; other attention functions
    of transformers ignore `cu_seq_lens_q` and would mix cells.
    """
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    borders = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    longest = int(lengths.max())
    labels: dict[str, torch.Tensor | int] = {} if labels_t is None else {"labels": torch.from_numpy(labels_t.astype(np.int64))[None]}
    return labels | {
        "input_ids": torch.from_numpy(input_ids_t.astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
