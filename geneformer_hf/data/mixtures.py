"""Which cells training shows, and in what order: corpora, held-out cells, weighted mixtures without an end.

The order is a function of the seed alone, so any place in it can be found again. For each cell of a corpus it takes eight bytes of
memory (its length, its place in a pass); tokens stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import datasets
import numpy as np
import torch.utils.data
import xxhash

from ..errors import CellFileError, SettingError
from .collators import KEY
from .masking import CellKey
from .tokenized import as_lists, require_lists_of_ids

APPORTIONED = 1024
"""Cells over which a mixture keeps its shares, to one cell a corpus."""
FINGERPRINT_CELLS = 1000
READ_CELLS = 10_000
EVALUATION = (1 << 62) - 1
"""The showing of held-out cells: always the same, so that their hidden genes are."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized cells of one domain, some of them held out.

    Args:
        name (`str`): what logs and reports call it.
        cells (`datasets.Dataset`): with `input_ids`, and `length` where it was tokenized here.
        held_out (`int` or int array, *optional*, defaults to 0): cells kept for evaluation: how many, or which rows.
        held_out_from (`str`, *optional*): the name of the dataset they are from, if it is another one.
        repository (`str`, *optional*): where on the Hub the cells to train on are from, if they are.
    """

    name: str
    cells: datasets.Dataset
    held_out: int | np.ndarray = 0
    held_out_from: str | None = None
    repository: str | None = None
    held_out_rows: np.ndarray = field(init=False, repr=False, compare=False)
    """int64, sorted."""
    lengths: np.ndarray = field(init=False, repr=False, compare=False)
    """int32 of shape `(cells,)`: tokens of each cell."""
    _tokens: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_lists_of_ids(self.cells, name=self.name)
        if not len(self.cells):
            msg = f"{self.name}: no cells in it. Tokenize files that have some."
            raise CellFileError(msg)
        n_held_out = self.held_out if isinstance(self.held_out, int) else len(self.held_out)
        if not 0 <= n_held_out < len(self.cells):
            msg = f"{self.name}: {n_held_out:,} of {len(self.cells):,} cells cannot be held out; some must be left to train on. Set held_out, for instance to 0.1 (a share)."
            raise SettingError(msg)
        rows = self.held_out
        if isinstance(rows, int):
            # Of one order for each number of cells, whatever the seed of the run: fewer are part of more, so that a later run on the same
            # dataset holds out cells that an earlier one has not trained on.
            rows = np.random.default_rng([0, len(self.cells)]).permutation(len(self.cells))[:n_held_out]
        object.__setattr__(self, "held_out_rows", np.sort(rows).astype(np.int64))
        object.__setattr__(self, "_tokens", self.cells.select_columns(["input_ids"]).with_format("arrow"))
        object.__setattr__(self, "lengths", self._read_lengths())

    def _read_lengths(self) -> np.ndarray:
        """Count the tokens of each cell; a column `length` says what its maker thought."""
        parts = []
        for start in range(0, len(self.cells), READ_CELLS):
            column = self._tokens[start : start + READ_CELLS]["input_ids"]
            if column.null_count:
                msg = f"{self.name}: {column.null_count:,} of the cells from row {start:,} on are missing (null). Tokenize the cells again."
                raise CellFileError(msg)
            parts += [as_lists(chunk).value_lengths().to_numpy() for chunk in column.chunks]
        return np.concatenate(parts).astype(np.int32)

    @property
    def n_train(self) -> int:
        """Cells to train on."""
        return len(self.cells) - self.n_held_out

    @property
    def n_held_out(self) -> int:
        """Cells kept for evaluation."""
        return len(self.held_out_rows)

    def train_rows(self, places: np.ndarray) -> np.ndarray:
        """Return the rows of the training cells at some places, counted without those held out."""
        skipped = np.searchsorted(self.held_out_rows - np.arange(self.n_held_out), places, side="right")
        return places + skipped

    def read(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Return the token ids of some cells."""
        column = as_lists(self._tokens[list(rows)]["input_ids"].combine_chunks())
        values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
        return [values[offsets[i] : offsets[i + 1]] for i in range(len(rows))]

    @property
    def fingerprint(self) -> str:
        """A hash of the number of cells, their lengths, and the tokens of a thousand of them; not of where they lie."""
        digest = xxhash.xxh3_128(self.held_out_rows.tobytes())
        digest.update(self.lengths.tobytes())
        for cell in self.read(np.unique(np.linspace(0, len(self.cells) - 1, FINGERPRINT_CELLS).astype(int)).tolist()):
            digest.update(cell.astype(np.int32).tobytes())
        return digest.hexdigest()


class Mixture:
    """Corpora in given shares, as a sequence of cells without an end.

    Each corpus is shown pass after pass, every pass in another order; none of its cells comes again before all have come. Without
    weights this holds for all corpora together.

    Args:
        corpora (`Sequence[Corpus]`)
        weights (`Sequence[float]`, *optional*): the share of each; by default their share of all cells.
        seed (`int`, *optional*, defaults to 0)
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float] | None = None, *, seed: int = 0) -> None:
        self._sizes, self._weighted = [corpus.n_train for corpus in corpora], weights is not None
        sizes = np.array(self._sizes, dtype=np.float64)
        if weights is not None and (len(weights) != len(corpora) or not all(0 < weight < float("inf") for weight in weights)):
            msg = f"weights {list(weights)} for {len(corpora)} corpora; expected one number above 0 for each."
            raise SettingError(msg)
        self.corpora, self.seed = list(corpora), seed
        shares = sizes if weights is None else np.array(weights, dtype=np.float64)
        self.shares = shares / shares.sum()
        self.cells_per_epoch = int(sizes.sum()) if weights is None else round(sizes[0] / self.shares[0])
        """All cells once; with weights, as many as show the first corpus once."""
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield blocks of 1,024 cells: corpus, row and pass of each, int64."""
        if not self._weighted:
            borders = np.cumsum([0, *self._sizes])
            for start in count(0, APPORTIONED):
                places, passes = self._take(0, int(borders[-1]), start, APPORTIONED)
                corpus = np.searchsorted(borders, places, side="right") - 1
                yield corpus, self._rows(corpus, places - borders[corpus]), passes
        shown = np.zeros(len(self.corpora), dtype=np.int64)
        for number in count():
            counts = self._counts(shown, (number + 1) * APPORTIONED)
            corpus = np.random.default_rng([self.seed, 1, number]).permutation(np.repeat(np.arange(len(counts)), counts))
            places, passes = np.empty_like(corpus), np.empty_like(corpus)
            for i, n in enumerate(counts.tolist()):
                places[corpus == i], passes[corpus == i] = self._take(i, self._sizes[i], int(shown[i]), n)
            yield corpus, self._rows(corpus, places), passes
            shown += counts

    def _rows(self, corpus: np.ndarray, places: np.ndarray) -> np.ndarray:
        rows = np.empty_like(places)
        for i, cells in enumerate(self.corpora):
            rows[corpus == i] = cells.train_rows(places[corpus == i])
        return rows

    def _counts(self, shown: np.ndarray, until: int) -> np.ndarray:
        """Return how many cells of each corpus come next, so that after `until` cells all shares are right to one cell."""
        missing = np.maximum(self.shares * until - shown, 0)
        counts = missing.astype(np.int64)
        for i in np.argsort(-(missing - counts), kind="stable")[: until - int(shown.sum()) - int(counts.sum())]:
            counts[i] += 1
        surplus = int(counts.sum()) - (until - int(shown.sum()))
        if surplus > 0:
            counts[int(counts.argmax())] -= surplus
        return counts

    def _take(self, stream: int, size: int, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return places and passes of the next cells of one corpus, or of all."""
        places, passes = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            number, within = divmod(start + done, size)
            some = min(n - done, size - within)
            places[done : done + some] = self._order(stream, size, number)[within : within + some]
            passes[done : done + some] = number
            done += some
        return places, passes

    def _order(self, stream: int, size: int, number: int) -> np.ndarray:
        known = self._passes.get(stream)
        if known is None or known[0] != number:
            order = np.arange(size, dtype=np.uint32)
            np.random.default_rng([self.seed, 0, stream, number]).shuffle(order)
            known = self._passes[stream] = (number, order)
        return known[1]


class KeyedCells(torch.utils.data.Dataset):
    """The cells of some corpora by `CellKey`, which goes along as the key of their masks; with labels by row, where there is one corpus."""

    def __init__(self, corpora: Sequence[Corpus], labels: np.ndarray | None = None) -> None:
        self.corpora, self.labels = list(corpora), labels

    def __len__(self) -> int:
        return sum(corpus.n_train for corpus in self.corpora)

    def __getitem__(self, key: CellKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[CellKey]) -> list[dict[str, Any]]:
        """Return several cells; torch's DataLoader asks for a batch at a time."""
        found: list[dict[str, Any]] = [{KEY: key} for key in keys]
        for number, corpus in enumerate(self.corpora):
            places = [i for i, key in enumerate(keys) if key.corpus == number]
            if places:
                for i, tokens in zip(places, corpus.read([keys[i].row for i in places]), strict=True):
                    found[i]["input_ids"] = tokens
                    if self.labels is not None:
                        found[i]["labels"] = self.labels[keys[i].row]
        return found
