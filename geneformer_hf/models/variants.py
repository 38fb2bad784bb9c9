"""Hidden states of perturbed cells: passes of bounded size, and of each pass only what a readout makes of it is kept.

Perturbations of one gene each in one cell share their first layer (`CellScan`); all others are packed, variants of several cells in one pass. Both give the same
numbers. On a CPU passes run side by side, each on its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from ..device import run_with_backoff
from .attention import encode_packed, first_tokens, run_layers
from .encoding import PackedEncoder
from .scan import VARIANTS_AT_ONCE, CellScan

T = TypeVar("T")
PassReader: TypeAlias = Callable[["Sequence[Variant]", torch.Tensor, list[int]], list[T]]


@dataclass(frozen=True)
class Variant:
    """A cell after a change, as tokens."""

    tokens: np.ndarray
    """int64 of shape `(l,)`, special tokens included."""
    about: Any
    """Whatever the reader of its hidden states has to know."""
    scan: ScannedCell | None = None
    """The cell it differs from in one gene, if it does."""
    position: int = -1
    """Where that gene stands in that cell."""


@dataclass(frozen=True)
class ScannedCell:
    """A cell whose genes are deleted, or moved to the top, one by one."""

    tokens: np.ndarray
    first_gene: int
    to_top: bool


class VariantEncoder(PackedEncoder):
    """A model made ready to give hidden states of variants.

    Args (beyond those of `PackedEncoder`):
        only_first (`bool`): of each variant give the first token alone, `(1, e)` in place of `(l, e)`.
    """

    def __init__(self, model: Any, *, only_first: bool = False, **options: Any) -> None:
        super().__init__(model, **options)
        self.only_first = only_first

    def read(self, variants: Iterable[Variant], reader: PassReader[T]) -> Iterator[T]:
        """Yield what `reader` makes of each variant, in order; call it within `ready()`.

        `reader` gets the variants of a pass, their hidden states end to end, `(t, e)`, and how many of these each has; it runs beside others on threads of
        their own.
        """
        for found in self.beside(lambda job: self._read_group(*job, reader), self._with_scans(self._grouped(variants))):
            yield from found

    def _with_scans(self, groups: Iterable[list[Variant]]) -> Iterator[tuple[list[Variant], CellScan | None]]:
        cell: ScannedCell | None = None
        scan: CellScan | None = None
        for group in groups:
            if (whole := group[0].scan) is not cell:
                cell = whole
                with self._computing():
                    scan = None if whole is None else self._scan_of(whole)
            yield group, scan

    def _grouped(self, variants: Iterable[Variant]) -> Iterator[list[Variant]]:
        """Cut variants into groups: variants of one cell that share their first layer, or as many as one pass takes."""
        group: list[Variant] = []
        tokens = 0
        for variant in variants:
            if self._dtype is not None or self._n_layers == 0 or self._device.type != "cpu":
                # Sums over keys are for full precision, and of many small steps: an accelerator is better off with large passes.
                variant = Variant(variant.tokens, variant.about)  # noqa: PLW2901
            if group:
                last = group[-1]
                if variant.scan is not None:
                    fits = last.scan is variant.scan and variant.position > last.position and len(group) < VARIANTS_AT_ONCE
                else:
                    fits = last.scan is None and tokens + len(variant.tokens) <= self.tokens_per_pass and len(group) < (self._batch_size or len(group) + 1)
                if not fits:
                    yield group
                    group, tokens = [], 0
            group.append(variant)
            tokens += len(variant.tokens)
        if group:
            yield group

    def _scan_of(self, cell: ScannedCell) -> CellScan:
        ids = torch.from_numpy(cell.tokens.astype(np.int64)).to(self._device)
        return CellScan(self._model.base_model, ids, first_gene=cell.first_gene, to_top=cell.to_top)

    def _read_group(self, group: list[Variant], scan: CellScan | None, reader: PassReader[T]) -> list[T]:
        parts = run_with_backoff(lambda some: self._run_group(some, scan, reader), group)
        if len(parts) > 1:
            self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
        return [found for part in parts for found in part]

    def _run_group(self, group: Sequence[Variant], scan: CellScan | None, reader: PassReader[T]) -> list[T]:
        with self._computing():
            first = None if scan is None else scan.first_layer([variant.position for variant in group])
            found: list[T] = []
            if first is None:
                for some in self._passes(group):
                    ids = torch.from_numpy(np.concatenate([v.tokens for v in some]).astype(np.int64)).to(self._device)
                    lengths = [len(v.tokens) for v in some]
                    hidden = encode_packed(self._model.base_model, ids, lengths, max(self._n_layers - self.only_first, 0))
                    found += self._finish(some, hidden, lengths, self._n_layers - 1, reader)
                return found
            done = 0
            for some in self._passes(group):
                hidden = first.states(slice(done, done + len(some))).flatten(0, 1)
                done += len(some)
                lengths = [len(v.tokens) for v in some]
                last = max(self._n_layers - self.only_first, 1)
                hidden = run_layers(self._model.base_model.encoder.layer[1:last], hidden, lengths)
                found += self._finish(some, hidden, lengths, last, reader)
            return found

    def _finish(self, some: Sequence[Variant], hidden_te: torch.Tensor, lengths: Sequence[int], layer: int, reader: PassReader[T]) -> list[T]:
        """Run the last layer for first tokens where only those are asked for, and read."""
        if not self.only_first:
            return reader(some, hidden_te, list(lengths))
        if 0 <= layer < self._n_layers:
            first_be = first_tokens(self._model.base_model.encoder.layer[layer], hidden_te, lengths)
        else:
            first_be = hidden_te[torch.tensor([0, *lengths[:-1]], device=hidden_te.device).cumsum(0)]
        return reader(some, first_be, [1] * len(some))

    def _passes(self, group: Sequence[Variant]) -> Iterator[Sequence[Variant]]:
        start, tokens = 0, 0
        for i, variant in enumerate(group):
            if i > start and tokens + len(variant.tokens) > self.tokens_per_pass:
                yield group[start:i]
                start, tokens = i, 0
            tokens += len(variant.tokens)
        yield group[start:]
