"""How the cells of training fall into optimiser steps, and the cells of a step into batches.

The plan is made for all processes at once and is a function of the seed alone: a step holds the same cells whether one process
accumulates eight batches or eight processes run one each. Batches of a step are cut by length; that changes no sum over the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..errors import SettingError
from .masking import CellKey
from .mixtures import Mixture

GROUPED_STEPS = 50
"""Steps whose cells are sorted by length together, as in transformers' LengthGroupedSampler."""


class BatchPlan:
    """Steps of training, each a list of batches of cells.

    Args:
        mixture (`Mixture`): the cells.
        batches_per_step (`int`): processes times accumulated batches.
        cells_per_batch (`int`, *optional*), tokens_per_batch (`int`, *optional*):
            One of them: cells in each batch; or a bound on its tokens, pads included, whatever the number of cells.
        layout (`"padded"` or `"packed"`): what the batches will be.
        group_by_length (`bool`): make steps of cells of similar length. Only padded batches gain by it.
    """

    def __init__(
        self, mixture: Mixture, *, batches_per_step: int, cells_per_batch: int | None = None, tokens_per_batch: int | None = None, layout: str = "packed",
        group_by_length: bool = False,
    ) -> None:  # fmt: skip
        if (cells_per_batch is None) == (tokens_per_batch is None):
            msg = "give either cells_per_batch or tokens_per_batch."
            raise SettingError(msg)
        self.mixture, self.batches_per_step, self.layout, self.group_by_length = mixture, batches_per_step, layout, group_by_length
        self._cells_per_batch, self._tokens_per_batch = cells_per_batch, tokens_per_batch
        longest = max(int(corpus.lengths.max()) for corpus in mixture.corpora)
        if tokens_per_batch is not None and tokens_per_batch < longest:
            msg = f"max_tokens_per_batch is {tokens_per_batch:,}, and the longest cell has {longest:,} tokens. Raise it to {longest:,} at least."
            raise SettingError(msg)
        self._n_steps_per_epoch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show `mixture.cells_per_epoch` cells; the last one is filled up with cells of the next epoch."""
        if self._n_steps_per_epoch is None:
            if self._cells_per_batch is not None:
                self._n_steps_per_epoch = -(-self.mixture.cells_per_epoch // (self._cells_per_batch * self.batches_per_step))
            else:
                shown, self._n_steps_per_epoch = 0, 0
                for step in self._all_steps():
                    shown += sum(len(batch) for batch in step)
                    self._n_steps_per_epoch += 1
                    if shown >= self.mixture.cells_per_epoch:
                        break
        return self._n_steps_per_epoch

    def steps(self, epoch: int = 0) -> Iterator[list[list[CellKey]]]:
        """Yield the steps of an epoch: `batches_per_step` batches each, those of one step together."""
        n = self.steps_per_epoch
        for step in islice(self._all_steps(), epoch * n, (epoch + 1) * n):
            yield [[CellKey(*cell) for cell in batch.tolist()] for batch in step]

    def _all_steps(self) -> Iterator[list[np.ndarray]]:
        return self._steps_of_cells(self._cells_per_batch) if self._cells_per_batch is not None else self._steps_of_tokens(self._tokens_per_batch or 0)

    def _steps_of_cells(self, cells_per_batch: int) -> Iterator[list[np.ndarray]]:
        size = cells_per_batch * self.batches_per_step
        n_grouped = GROUPED_STEPS if self.group_by_length else 1
        for number, cells in enumerate(self._windows(size * n_grouped, within=self.steps_per_epoch * size)):
            window, order = cells, np.arange(len(cells) // size)
            if self.group_by_length:
                window = cells[self._longest_first(cells)]
                np.random.default_rng([self.mixture.seed, 2, number]).shuffle(order)
                if number == 0:
                    # The longest cells come first, so that a lack of memory shows at once.
                    order = np.concatenate([[0], order[order != 0]])
            for step in order:
                yield self._batches_of(window[step * size : (step + 1) * size])

    def _batches_of(self, cells: np.ndarray) -> list[np.ndarray]:
        """Cut the cells of a step into batches of one size."""
        cells = cells[self._longest_first(cells)]
        n = self.batches_per_step
        if self.layout == "padded":
            return np.split(cells, n)
        # Dealt out to and fro, so that all batches have about the same number of tokens.
        rounds = cells.reshape(-1, n, cells.shape[1])
        rounds[1::2] = rounds[1::2, ::-1].copy()
        return [rounds[:, i] for i in range(n)]

    def _steps_of_tokens(self, tokens_per_batch: int) -> Iterator[list[np.ndarray]]:
        mean = np.average([corpus.lengths.mean() for corpus in self.mixture.corpora], weights=self.mixture.shares)
        size = GROUPED_STEPS * self.batches_per_step * max(1, int(tokens_per_batch / mean))
        waiting: list[np.ndarray] = []
        rest = np.empty((0, 3), dtype=np.int64)
        for number, fresh in enumerate(self._windows(size, within=self.mixture.cells_per_epoch)):
            window = np.concatenate([rest, fresh])
            if self.layout == "padded":
                window = window[self._longest_first(window)]
            batches = self._within_budget(window, tokens_per_batch)
            if self.layout == "packed":
                # The last batch is not full yet; its cells come first in the next window. (Sorted, the shortest would wait for ever.)
                rest = batches.pop()
            else:
                np.random.default_rng([self.mixture.seed, 2, number]).shuffle(batches)  # type: ignore[arg-type]
            waiting += batches
            while len(waiting) >= self.batches_per_step:
                yield waiting[: self.batches_per_step]
                waiting = waiting[self.batches_per_step :]

    def _within_budget(self, cells: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
        lengths = self._lengths(cells)
        batches, start = [], 0
        while start < len(cells):
            # What a batch costs if it ends after each of the next cells; padded ones begin with their longest.
            ahead = lengths[start : start + tokens_per_batch]
            cost = ahead[0] * np.arange(1, len(ahead) + 1) if self.layout == "padded" else np.cumsum(ahead)
            n = max(1, int(np.searchsorted(cost, tokens_per_batch, side="right")))
            batches.append(cells[start : start + n])
            start += n
        return batches

    def _windows(self, size: int, *, within: int) -> Iterator[np.ndarray]:
        """Yield `size` cells at a time, or what is left of an epoch of `within` cells: int64 of shape `(cells, 3)`, the parts of their keys.

        So cells that are sorted together are of one epoch, and none comes again before all have come.
        """
        waiting, left = np.empty((0, 3), dtype=np.int64), within
        for block in self.mixture.blocks():
            waiting = np.concatenate([waiting, np.stack(block, axis=1)])
            while len(waiting) >= min(size, left):
                n = min(size, left)
                yield waiting[:n]
                waiting = waiting[n:]
                left = left - n or within

    def _lengths(self, cells: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(cells), dtype=np.int64)
        for number, corpus in enumerate(self.mixture.corpora):
            here = cells[:, 0] == number
            lengths[here] = corpus.lengths[cells[here, 1]]
        return lengths

    def _longest_first(self, cells: np.ndarray) -> np.ndarray:
        return np.argsort(-self._lengths(cells), kind="stable")


class RankBatches:
    """The batches of one process, epoch by epoch: a `batch_sampler` for torch's DataLoader."""

    def __init__(self, plan: BatchPlan, *, rank: int = 0, world_size: int = 1) -> None:
        if plan.batches_per_step % world_size:
            msg = f"{plan.batches_per_step} batches a step cannot be dealt to {world_size} processes."
            raise SettingError(msg)
        self.plan, self.rank, self.world_size, self.epoch = plan, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * (self.plan.batches_per_step // self.world_size)

    def __iter__(self) -> Iterator[list[CellKey]]:
        for step in self.plan.steps(self.epoch):
            yield from step[self.rank :: self.world_size]
