"""Rank value encoding: the genes of a cell ordered by expression scaled by each gene's median.

Everything here is numpy on raw counts. The rules, stated once:

- A stored zero is not detected. A gene in several columns is summed before ranking (`sum_columns`).
- The value of a gene is ``count / median``. The published formula also divides by the cell's total and multiplies by
  10,000, which cannot change the order within a cell.
- Values equal after rounding to 44 of their 64 bits (32 of the fraction, a relative difference of about 2e-10) are ties,
  and ties keep column order. The published order of ties is undefined; the 20 bits left out carry the rounding noise that
  differs between sparse and dense arithmetic, and they hold the column during the sort, which makes a plain fast sort a
  stable one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from .errors import ColumnNotFoundError, NotRawCountsError

ENCODING_VERSION = "2.0.0"
"""Goes into cache keys; raise it whenever the same counts could give other tokens."""

TARGET_SUM = 10_000.0
"""Counts per cell that medians and `keep_counts` are scaled to."""

ROUNDING_NOISE = 1e-4
"""Distance from a whole number, as a fraction of the value where that is above 1, that arithmetic in float32 leaves."""
TIE_BITS = 20
MAX_COLUMNS = 1 << TIE_BITS
_HALF = np.uint64(1 << (TIE_BITS - 1))
_COLUMN_MASK = np.uint64(MAX_COLUMNS - 1)
_NOT_DETECTED = ~_COLUMN_MASK
"""Sort keys from here on belong to a value of zero: a stored zero, or a column left out."""


def check_counts(values: np.ndarray, where: str = "the matrix") -> None:
    """Raise unless every value is a whole number, finite and not negative.

    Raises:
        NotRawCountsError: saying what the values look like instead.
    """
    problem = count_problem(values)
    if problem:
        msg = (
            f"{where} {problem}. Geneformer ranks raw transcript counts. Name where they are with `counts_layer=` (`--counts-layer`): a layer, 'X' or 'raw.X'."
        )
        raise NotRawCountsError(msg)


def count_problem(values: np.ndarray) -> str | None:
    """Return what is wrong with values that should be raw counts, or None if they are."""
    if values.size == 0:
        return None
    if values.dtype.kind not in "buif":
        return f"holds values of type {values.dtype}, expected numbers"
    low, high = values.min(), values.max()
    if values.dtype.kind in "bu" or (values.dtype.kind == "i" and low >= 0):
        return None
    if not (np.isfinite(low) and np.isfinite(high)):
        n_bad = int((~np.isfinite(values)).sum())
        return f"holds {n_bad:,} values that are NaN or infinite among {values.size:,}; remove or mend these cells"
    if low < 0:
        n_negative = int((values < 0).sum())
        looks = "looks scaled" if n_negative > values.size / 100 else "holds negative values"
        return f"{looks} (smallest value {low:.3g}, {n_negative:,} of {values.size:,} values negative)"
    fractional = np.trunc(values) != values
    if not fractional.any():
        return None
    n_fractional, looks = int(fractional.sum()), "log-normalised" if high < 20 else "normalised"
    # float64, so that the distance is not itself rounded.
    apart = np.abs(values[fractional].astype(np.float64) - np.rint(values[fractional]))
    if (apart <= ROUNDING_NOISE * np.maximum(1, values[fractional])).all():
        return (
            f"holds counts with rounding noise ({n_fractional:,} of {values.size:,} values are up to {apart.max():.2g} from a whole number, as expm1(log1p(x)) leaves "
            "them); round them first, for instance `adata.X.data = np.rint(adata.X.data)` (`adata.X = np.rint(adata.X)` for a dense matrix)"
        )
    looks = f"looks {looks}" if n_fractional > values.size / 100 else "holds fractions"
    return f"{looks} (largest value {high:.4g}, {n_fractional:,} of {values.size:,} values not whole numbers)"


def choose_counts(samples: Mapping[str, Callable[[], np.ndarray]], counts_layer: str | None = None, *, where: str = "") -> str:
    """Decide which matrix of a file holds raw counts: the one named, else X, else raw.X, else the layer `counts`, else the layer `raw`.

    Args:
        samples: matrix name (`X`, `raw.X`, or a layer) to a function that returns some of its stored values.
        counts_layer (`str`, *optional*):
            The matrix the user names; it is still checked. `raw` is raw.X where there is one, else the layer; `layers/raw` is the layer.

    Raises:
        ColumnNotFoundError: if the matrix named is not there.
        NotRawCountsError: if it, or every candidate, holds something else; each is described.
    """
    prefix = f"{where}: " if where else ""
    if counts_layer is not None:
        name = "raw.X" if counts_layer == "raw" and "raw.X" in samples else counts_layer.removeprefix("layers/")
        if name not in samples:
            msg = f"{prefix}there is no layer {counts_layer!r}. Found: {', '.join(samples)}."
            raise ColumnNotFoundError(msg)
        check_counts(samples[name](), f"{prefix}{name}")
        return name
    problems = {}
    for name in ("X", "raw.X", "counts", "raw"):
        if name in samples:
            problem = count_problem(samples[name]())
            if problem is None:
                return name
            problems[name] = problem
    found = "; ".join(f"{name} {problem}" for name, problem in problems.items()) or "there is no X"
    others = [name for name in samples if name not in problems]
    msg = f"{prefix}no raw counts: {found}. Geneformer ranks raw transcript counts."
    msg += (
        f" Name the layer that holds them with `counts_layer=` (`--counts-layer`); other layers: {', '.join(others)}."
        if others
        else " Save them in `layers['counts']` or `raw` and try again; estimated counts must be rounded first."
    )
    raise NotRawCountsError(msg)


def sum_columns(counts_ng: sp.csr_array, slot_of_column: np.ndarray, n_slots: int) -> sp.csr_array:
    """Return the counts per slot, adding what falls into one slot and leaving out columns at -1 and stored zeros.

    The result is float64, so that sums of narrow integers do not overflow, and shares no memory with the input.

    Args:
        counts_ng (`scipy.sparse.csr_array` of shape `(n, g)`).
        slot_of_column (int32 of shape `(g,)`).
    """
    slots = slot_of_column[counts_ng.indices]
    keep = (slots >= 0) & (counts_ng.data > 0)
    kept = np.flatnonzero(keep)
    data, slots, indptr = counts_ng.data[kept].astype(np.float64), slots[kept], np.searchsorted(kept, counts_ng.indptr)
    out = sp.csr_array((data, slots, indptr), shape=(counts_ng.shape[0], n_slots))
    # Sorted rows of distinct columns, as nearly every file has them, pass this check without being touched.
    if not out.has_canonical_format:
        out.sum_duplicates()
    return out


def rank_columns(counts_ng: sp.csr_array, medians_g: np.ndarray, *, most: int | None = None, front: int = 0, back: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Order the columns of every row by ``count / median``, highest first; the one loop under every encoding.

    Args:
        counts_ng (`scipy.sparse.csr_array` of shape `(n, g)`): counts that are not negative, no column twice in a row.
        medians_g (float64 of shape `(g,)`): infinite where a column is left out.
        most (`int`, *optional*): keep at most that many columns of a row.
        front, back (`int`, *optional*, defaults to 0): empty places before and after each row, for special tokens.

    Returns:
        columns in rank order (int64 of shape `(t,)`) and the offsets of the rows (int64 of shape `(n + 1,)`).
    """
    if counts_ng.shape[1] > MAX_COLUMNS:
        msg = f"counts_ng has {counts_ng.shape[1]:,} columns; at most {MAX_COLUMNS:,} can be ranked. Leave out what is not in the vocabulary first."
        raise ValueError(msg)
    # Positive floats sort like their bit patterns; inverted, the largest comes first. The low bits give way to the column.
    values = counts_ng.data / medians_g[counts_ng.indices]
    # A stored -0.0, which rounding leaves, would carry its sign into the key.
    values += 0.0
    keys = values.view(np.uint64)
    # Rounded, not cut off: 3 / 0.3 and 6 / 0.6 fall on either side of 10 and are the same value.
    keys += _HALF
    np.invert(keys, out=keys)
    keys &= ~_COLUMN_MASK
    keys |= counts_ng.indices.astype(np.uint64)
    bounds = counts_ng.indptr.tolist()
    n = len(bounds) - 1
    limit = most if most is not None else counts_ng.shape[1]
    out = np.zeros(len(keys) + n * (front + back), dtype=np.uint64)
    offsets = np.zeros(n + 1, dtype=np.int64)
    place = 0
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        row = keys[start:stop]
        row.sort()
        kept = min(int(row.searchsorted(_NOT_DETECTED)), limit)
        out[place + front : place + front + kept] = row[:kept]
        place += front + kept + back
        offsets[i + 1] = place
    out = out[:place]
    out &= _COLUMN_MASK
    return out.view(np.int64), offsets


def rank_genes(counts_ng: Any, token_ids_g: np.ndarray, medians_g: np.ndarray, totals_n: np.ndarray | None = None) -> list[np.ndarray]:
    """Order each cell's detected genes by median-scaled expression, highest first.

    Args:
        counts_ng (sparse or dense array of shape `(n, g)`):
            Raw transcript counts. Stored zeros are treated as not detected.
        token_ids_g (`np.ndarray` of shape `(g,)`):
            Token id of each column. Columns with the same id are summed; an id of -1 leaves its column out.
        medians_g (`np.ndarray` of shape `(g,)`): Non-zero median per gene, in counts per 10,000.
        totals_n (`np.ndarray` of shape `(n,)`, *optional*):
            Counts per cell over *all* genes. Dividing by them cannot change the order within a cell, so they are only
            checked: a total below the counts of its cell belongs to another matrix.

    Returns:
        `list[np.ndarray]`: one int32 array per cell. Ties keep column order (see the module for what a tie is).

    Raises:
        NotRawCountsError: if a count is negative, not finite or not a whole number, or a total is too small.

    Source: Theodoris et al. 2023, Methods, "Rank value encoding" (doi:10.1038/s41586-023-06139-9).

    Example:
        >>> counts = sp.csr_array([[4, 0, 9]])
        >>> rank_genes(counts, np.array([2, 3, 4]), np.array([1.0, 1.0, 3.0]), np.array([13]))
        [array([2, 4], dtype=int32)]
    """
    counts = sp.csr_array(counts_ng)
    token_ids_g, medians_g = np.asarray(token_ids_g), np.asarray(medians_g, dtype=np.float64)
    check_counts(counts.data, "counts_ng")
    if totals_n is not None:
        sums = np.asarray(counts.sum(axis=1)).ravel()
        short = np.flatnonzero(np.asarray(totals_n) < sums)
        if len(short):
            i = int(short[0])
            msg = f"totals_n is below the counts of {len(short)} of {len(sums)} cells (cell {i}: total {totals_n[i]}, counts {sums[i]:g}). Pass the totals over all genes of the same matrix, or leave them out."
            raise NotRawCountsError(msg)
    used = token_ids_g >= 0
    slot_tokens, first, slots_used = np.unique(token_ids_g[used], return_index=True, return_inverse=True)
    # np.unique sorts by token; slots follow first appearance, so that ties keep column order.
    by_appearance = np.argsort(first)
    slot_of_token = np.empty(len(first), dtype=np.int32)
    slot_of_token[by_appearance] = np.arange(len(first), dtype=np.int32)
    slot_of_column = np.full(len(token_ids_g), -1, dtype=np.int32)
    slot_of_column[used] = slot_of_token[slots_used]
    counts = sum_columns(counts, slot_of_column, len(first))
    ranked, offsets = rank_columns(counts, medians_g[used][first][by_appearance])
    tokens = slot_tokens[by_appearance].astype(np.int32)[ranked]
    return [tokens[start:stop] for start, stop in pairwise(offsets.tolist())]
