"""The datasets of a run: opened, checked against the tokenizer, some cells held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np

from ..data.mixtures import Corpus
from ..data.tokenized import gene_table_of, open_tokenized, repository_of_cells, require_lists_of_ids, require_made_with
from ..errors import CellFileError, SettingError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .arguments import GeneformerPretrainingArguments

logger = logging.getLogger(__name__)

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
    if isinstance(train_data, dict) and isinstance(eval_data, dict):
        if set(train_data) != set(eval_data):
            msg = f"datasets to train on are {', '.join(train_data)} and to evaluate on {', '.join(eval_data)}; expected the same names."
            raise SettingError(msg)
        evaluation = {name: evaluation[name] for name in training}
    if evaluation and len(evaluation) != len(training):
        msg = f"{len(evaluation)} datasets to evaluate on for {len(training)} to train on; expected one for each, in the same order."
        raise SettingError(msg)
    for name, cells in (*training.items(), *evaluation.items()):
        require_lists_of_ids(cells, name=name)
        if not len(cells):
            msg = f"{name}: no cells in it. Tokenize files that have some."
            raise CellFileError(msg)
        require_made_with(cells, tokenizer, name=name)
        if gene_table_of(cells) is None:
            logger.warning("%s does not say which vocabulary it was made with: only ids, lengths and special tokens could be checked.", name)
    _require_different(training, evaluation)
    held_out: list[tuple[str, datasets.Dataset] | None] = [*evaluation.items()] if evaluation else [None] * len(training)
    corpora = [_corpus(arguments, name, cells, other) for name, cells, other in zip(names, training.values(), held_out, strict=True)]
    for corpus in corpora:
        shortest = 1 + sum(token is not None for token in (tokenizer.cls_token_id, tokenizer.eos_token_id))
        bad = int(((corpus.lengths > tokenizer.model_max_length) | (corpus.lengths < shortest)).sum())
        if bad:
            msg = f"{corpus.name}: {bad:,} of {len(corpus.lengths):,} cells have no gene, or more than {tokenizer.model_max_length:,} tokens (up to {corpus.lengths.max():,}). Tokenize them with this model's tokenizer, which keeps the highest ranks."
            raise SettingError(msg)
    return corpora


def _opened(paths: Sequence[str] | None, given: Cells | None) -> dict[str, datasets.Dataset]:
    if isinstance(given, datasets.DatasetDict):
        msg = f"This is a DatasetDict ({', '.join(given)}). Give one of its splits to train on, and one as eval_data."
        raise SettingError(msg)
    if given is not None:
        return given if isinstance(given, dict) else {"cells": given}
    return dict(zip(_names_of(paths or []), [open_tokenized(path) for path in paths or []], strict=True))


def _require_different(training: dict[str, datasets.Dataset], evaluation: dict[str, datasets.Dataset]) -> None:
    """Raise if a dataset is given twice: cells would be trained on and evaluated on."""
    seen: dict[str, str] = {}
    for role, several in (("train", training), ("evaluate", evaluation)):
        for name, cells in several.items():
            here = f"{name} to {role} on"
            other = seen.setdefault(cells._fingerprint, here)
            if other != here:
                msg = f"{here} is the same dataset as {other}. Each may be given once; held_out keeps cells of it for evaluation."
                raise SettingError(msg)


def _corpus(arguments: GeneformerPretrainingArguments, name: str, cells: datasets.Dataset, evaluation: tuple[str, datasets.Dataset] | None) -> Corpus:
    if evaluation is None:
        return Corpus(name, cells, _n_held_out(arguments.held_out, len(cells)), repository=repository_of_cells(cells))
    other_name, other = evaluation
    repository = repository_of_cells(cells)
    cells, other = cells.select_columns(["input_ids"]), other.select_columns(["input_ids"])
    if other.features != cells.features:
        other = other.cast(cells.features)
    together = datasets.concatenate_datasets([cells, other])
    return Corpus(name, together, np.arange(len(cells), len(together)), held_out_from=other_name, repository=repository)


def _n_held_out(held_out: float, n_cells: int) -> int:
    return max(1, round(held_out * n_cells)) if 0 < held_out < 1 else int(held_out)


def _names_of(paths: Sequence[str]) -> list[str]:
    names = [Path(path).name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [f"{name}{i + 1}" for i, name in enumerate(names)]
