"""The datasets of a run: opened, checked against the tokenizer, some cells held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np

from ..data.mixtures import Corpus
from ..data.tokenized import open_tokenized, require_made_with
from ..errors import SettingError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .arguments import GeneformerPretrainingArguments

Cells: TypeAlias = datasets.Dataset | dict[str, datasets.Dataset]


def open_corpora(
    arguments: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer, train_data: Cells | None = None, eval_data: Cells | None = None
) -> list[Corpus]:
    """Open and check the datasets to train and evaluate on.

    Raises:
        SettingError, CellFileError, VocabularyMismatchError
    """
    training, evaluation = _opened(arguments.train_data, train_data), _opened(arguments.eval_data, eval_data)
    if not training:
        msg = "No data: give `train_data`, tokenized datasets to train on (`geneformer-hf tokenize`)."
        raise SettingError(msg)
    names = arguments.train_names or list(training)
    if len(names) != len(training) or len(set(names)) != len(names):
        msg = f"train_names {names} for {len(training)} datasets; expected one name for each, all different."
        raise SettingError(msg)
    if evaluation and len(evaluation) != len(training):
        msg = f"{len(evaluation)} datasets to evaluate on for {len(training)} to train on; expected one for each, in the same order."
        raise SettingError(msg)
    for name, cells in (*training.items(), *evaluation.items()):
        if "input_ids" in cells.column_names and len(cells):
            require_made_with(cells, tokenizer, name=name)
    held_out: list[datasets.Dataset | None] = [*evaluation.values()] if evaluation else [None] * len(training)
    corpora = [_corpus(arguments, name, cells, other) for name, cells, other in zip(names, training.values(), held_out, strict=True)]
    for corpus in corpora:
        if corpus.lengths.max() > tokenizer.model_max_length or corpus.lengths.min() < 1:
            bad = int(((corpus.lengths > tokenizer.model_max_length) | (corpus.lengths < 1)).sum())
            msg = f"{corpus.name}: {bad:,} of {len(corpus.lengths):,} cells have no token, or more than {tokenizer.model_max_length:,} (up to {corpus.lengths.max():,}). Tokenize them with this model's tokenizer, which keeps the highest ranks."
            raise SettingError(msg)
    return corpora


def _opened(paths: Sequence[str] | None, given: Cells | None) -> dict[str, datasets.Dataset]:
    if given is not None:
        return given if isinstance(given, dict) else {"cells": given}
    return dict(zip(_names_of(paths or []), [open_tokenized(path) for path in paths or []], strict=True))


def _corpus(arguments: GeneformerPretrainingArguments, name: str, cells: datasets.Dataset, evaluation: datasets.Dataset | None) -> Corpus:
    if evaluation is None:
        return Corpus(name, cells, _n_held_out(arguments.held_out, len(cells)), seed=arguments.order_seed)
    columns = [column for column in ("input_ids", "length") if column in cells.column_names and column in evaluation.column_names]
    cells, evaluation = cells.select_columns(columns), evaluation.select_columns(columns)
    if evaluation.features != cells.features:
        evaluation = evaluation.cast(cells.features)
    together = datasets.concatenate_datasets([cells, evaluation])
    return Corpus(name, together, np.arange(len(cells), len(together)))


def _n_held_out(held_out: float, n_cells: int) -> int:
    return max(1, round(held_out * n_cells)) if 0 < held_out < 1 else int(held_out)


def _names_of(paths: Sequence[str]) -> list[str]:
    names = [Path(path).name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [f"{name}{i + 1}" for i, name in enumerate(names)]
