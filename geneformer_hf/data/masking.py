"""Which genes a model is asked for: drawn per cell from (seed, corpus, pass, row), so that nothing else can change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import SettingError, VocabularyMismatchError
from ..models.heads import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer

_HALF_WORD = 1 << 32


class CellKey(NamedTuple):
    """A cell, and the how-manieth time it is shown."""

    corpus: int
    row: int
    showing: int
    """The pass over the corpus; each pass hides other genes."""


@dataclass(frozen=True)
class MaskingRates:
    """How genes are hidden.

    Source of the defaults: Theodoris et al. 2023, Methods (as BERT, Devlin et al. 2018).
    """

    chosen: float = 0.15
    """Share of genes a cell is asked for."""
    masked: float = 0.8
    """Share of the chosen that become `<mask>`."""
    random: float = 0.1
    """Share of the chosen that become a random gene; the rest stay as they are."""

    def __post_init__(self) -> None:
        if not 0 < self.chosen < 1:
            msg = f"mask_probability is {self.chosen}; expected a share between 0 and 1."
            raise SettingError(msg)
        if not (self.masked >= 0 and self.random >= 0 and self.masked + self.random <= 1 + 1e-9):
            msg = (
                f"mask_share is {self.masked} and random_share {self.random}; expected shares of 0 or more that add up to 1 at most (the rest stays unchanged)."
            )
            raise SettingError(msg)


class GeneMasker:
    """Chooses genes and hides them; special tokens are never chosen and never drawn.

    Every cell has its own stream of random numbers: Philox (Salmon et al. 2011, as numpy implements it) keyed by the seed
    and the corpus, counting from the row and the pass. So masks depend on nothing but these and the cell's own tokens: not on batches,
    order, workers, processes or resuming.

    Args:
        tokenizer (`GeneformerTokenizer`)
        rates (`MaskingRates`, *optional*)
        seed (`int`, *optional*, defaults to 0)
    """

    def __init__(self, tokenizer: GeneformerTokenizer, rates: MaskingRates | None = None, *, seed: int = 0) -> None:
        if not 0 <= seed < 1 << 64:
            msg = f"seed is {seed}; expected 0 or more, and less than 2**64."
            raise SettingError(msg)
        self.rates, self.seed = rates or MaskingRates(), seed
        self.mask_token_id, self._pad = int(tokenizer.mask_token_id), int(tokenizer.pad_token_id)
        self._genes = np.sort(np.asarray(tokenizer.gene_table.token_ids, dtype=np.int64))
        self._is_special = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
        self._is_special[list(tokenizer.all_special_ids)] = True

    def hide(self, input_ids_t: np.ndarray, lengths: np.ndarray, keys: Sequence[CellKey]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the model reads and what it is asked for, both int64 of shape `(t,)`.

        Args:
            input_ids_t (`np.ndarray` of shape `(t,)`): cells end to end, without pads.
            lengths (`np.ndarray` of shape `(b,)`), keys (`Sequence[CellKey]` of b): each cell's tokens and key.
        """
        ids = input_ids_t.astype(np.int64)
        self.require_known(ids, lengths, keys)
        words = self._words(lengths, keys)
        # One half of a word decides whether a gene is chosen; the other what becomes of it, and within the random share which gene.
        chosen = ((words >> np.uint64(32)) < np.uint64(round(self.rates.chosen * _HALF_WORD))) & ~self._is_special[ids]
        fate = (words & np.uint64(_HALF_WORD - 1)).astype(np.float64) / _HALF_WORD
        masked, drawn = self.rates.masked, self.rates.random
        labels = np.where(chosen, ids, IGNORED)
        is_random = chosen & (fate >= masked) & (fate < masked + drawn)
        if drawn > 0:
            place = ((fate[is_random] - masked) / drawn * len(self._genes)).astype(np.int64)
            ids[is_random] = self._genes[np.minimum(place, len(self._genes) - 1)]
        ids[chosen & (fate < masked)] = self.mask_token_id
        return ids, labels

    def require_known(self, ids_t: np.ndarray, lengths: np.ndarray, keys: Sequence[CellKey]) -> None:
        """Raise if a token id is not in the vocabulary.

        Raises:
            VocabularyMismatchError
        """
        size = len(self._is_special)
        wrong = (ids_t >= size) | (ids_t < 0) | (ids_t == self._pad)
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            key = keys[int(np.searchsorted(np.cumsum(lengths), place, side="right"))]
            if ids_t[place] == self._pad:
                msg = f"row {key.row:,} of corpus {key.corpus} holds pads (id {self._pad}). Cells are expected as they are; batches are padded later. Tokenize them again, or take the pads away."
                raise VocabularyMismatchError(msg)
            msg = f"row {key.row:,} of corpus {key.corpus} holds the token id {ids_t[place]:,}, and the vocabulary has {size:,} tokens. The dataset is damaged, or was made with another tokenizer."
            raise VocabularyMismatchError(msg)

    def _words(self, lengths: np.ndarray, keys: Sequence[CellKey]) -> np.ndarray:
        """Return a random uint64 for each token."""
        words = np.empty(int(lengths.sum()), dtype=np.uint64)
        start = 0
        # One generator set anew for each cell: making one costs four times as much.
        bits = np.random.Philox(key=[self.seed, 0])
        state = bits.state
        for length, key in zip(lengths.tolist(), keys, strict=True):
            state["state"]["key"][1] = key.corpus
            state["state"]["counter"][:] = (0, 0, key.row, key.showing)
            state["buffer_pos"] = 4
            bits.state = state
            words[start : start + length] = bits.random_raw(length)
            start += length
        return words
