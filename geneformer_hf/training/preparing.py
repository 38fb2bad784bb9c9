"""Cells, labels and splits of a fine-tuning run, opened and checked before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash

from ..data.labelled import TEST, TRAIN, VALIDATION, LabelledCells, open_labelled
from ..data.labels import GeneClasses, class_counts, class_name, describe_counts, is_missing, match_gene_classes, read_gene_classes
from ..data.mixtures import Corpus
from ..data.splits import Split, balance_table, folds, groups_of, most_balanced, one_split, require_enough, require_no_leak
from ..errors import SettingError
from ..models.heads import CLASSES
from ..models.tokenization_geneformer import GeneformerTokenizer
from .arguments import GeneformerFineTuningArguments
from .tasks import CellTask, GeneTask, cell_task

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.1


@dataclass
class Prepared:
    """All that a run needs but its model."""

    tokenizer: GeneformerTokenizer
    cells: LabelledCells
    task: CellTask | GeneTask
    splits: list[Split]
    """One, or as many as folds; of rows of cells, or of genes (rows of `task.classes`)."""
    rows: np.ndarray
    """Cells that are used, int64, sorted."""
    notes: list[str]
    balance: list[pd.DataFrame] = field(default_factory=list)
    """For each split whether columns differ between its sides."""

    def corpus(self, split: Split) -> Corpus:
        """Return the cells as a corpus whose training cells are those of a split; of all cells that are used, for genes."""
        train = split.train if isinstance(self.task, CellTask) else self.rows
        held_out = np.setdiff1d(np.arange(len(self.cells.part)), train)
        return Corpus("cells", self.cells.tokens, held_out)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of labels and splits, for the identity of a run."""
        labels, sides = xxhash.xxh3_64(), xxhash.xxh3_64()
        if isinstance(self.task, CellTask):
            labels.update(np.ascontiguousarray(self.task.learnt).tobytes())
        else:
            labels.update(self.task.classes.token_ids.tobytes() + self.task.classes.class_ids.tobytes())
        for split in self.splits:
            for rows in (split.train, split.validation, split.test):
                sides.update(np.ascontiguousarray(rows).tobytes() + b"|")
        return {"labels": labels.hexdigest(), "splits": sides.hexdigest()}

    def everything(self) -> Split:
        """Return a split that trains on all that was split."""
        every = np.sort(np.concatenate([self.splits[0].train, self.splits[0].validation, self.splits[0].test]))
        nothing = np.empty(0, dtype=np.int64)
        return Split(every, nothing, nothing)


def prepare(
    arguments: GeneformerFineTuningArguments,
    tokenizer: GeneformerTokenizer,
    given: Mapping[int, Any] | None = None,
    *,
    gene_classes: Mapping[str, Sequence[str]] | None = None,
) -> Prepared:
    """Open the cells of a run, read labels, and split.

    Args:
        given: part (train, validation, test) to cells, in place of the paths in the arguments.

    Raises:
        SettingError, CellFileError, ColumnNotFoundError, UnknownGeneError
    """
    paths: dict[int, Any] = {TRAIN: arguments.train_data, VALIDATION: arguments.validation_data, TEST: arguments.test_data}
    sources = {part: cells for part, cells in (paths | {p: c for p, c in (given or {}).items() if c is not None}).items() if cells is not None}
    if TRAIN not in sources:
        msg = "No data: give `train_data`, files of cells or tokenized datasets."
        raise SettingError(msg)
    given_too = [name for part, name in ((VALIDATION, "validation_data"), (TEST, "test_data")) if part in sources]
    if given_too and (arguments.n_folds or arguments.gene_classes or gene_classes):
        why = "n_folds makes the test cells itself" if arguments.n_folds else "genes are split, not cells"
        msg = f"{' and '.join(given_too)} cannot be given here: {why}. Leave it out."
        raise SettingError(msg)
    wanted = [*(arguments.label or []), *(arguments.leave_out or {}), *(arguments.keep_only or {}), *(arguments.balance_columns or [])]
    wanted += [arguments.integrate] if arguments.integrate else []
    # A table that cannot be used is refused before cells are read.
    classes = _gene_classes(arguments, tokenizer, gene_classes) if arguments.gene_classes or gene_classes else None
    columns = list(dict.fromkeys([*wanted, *([arguments.group_column] if arguments.group_column else [])]))
    with arguments.main_process_first(local=False, desc="open the cells"):
        cells = open_labelled(
            sources, columns=columns, tokenizer=tokenizer, gene_ids=arguments.gene_ids, counts_layer=arguments.counts_layer, genome=arguments.genome
        )
    cells.notes += _truncation(cells, tokenizer)
    if classes is not None:
        return _prepare_genes(arguments, tokenizer, cells, classes)
    task = cell_task(cells, arguments)
    for part, name in ((VALIDATION, "validation_data"), (TEST, "test_data")):
        if part in sources and not (cells.usable & (cells.part == part)).any():
            msg = f"{name}: none of its {int((cells.part == part).sum()):,} cells can be used ({'; '.join(cells.notes)}). Give cells with labels that training cells have."
            raise SettingError(msg)
    splits = _split_cells(arguments, cells, task)
    balance = []
    if arguments.balance_columns:
        balance = [balance_table(split, {name: cells.columns[name] for name in arguments.balance_columns}) for split in splits if len(split.test)]
    notes = [*cells.notes, *task.notes, *_remarks(arguments, task, splits, has_test_data=TEST in sources)]
    return Prepared(tokenizer, cells, task, splits, np.flatnonzero(cells.usable), notes, balance)


def _gene_classes(arguments: GeneformerFineTuningArguments, tokenizer: GeneformerTokenizer, given: Mapping[str, Sequence[str]] | None) -> GeneClasses:
    where = str(arguments.gene_classes or "gene_classes")
    return match_gene_classes(given if given is not None else read_gene_classes(Path(where)), tokenizer.gene_table, where=where)


def _truncation(cells: LabelledCells, tokenizer: GeneformerTokenizer) -> list[str]:
    """Say how many cells are as long as the model can take, so that genes of lower rank are likely cut off."""
    lengths = np.concatenate([np.asarray(t.column("input_ids").combine_chunks().value_lengths()) for t in _token_tables(cells)])
    full = int((lengths >= tokenizer.model_max_length).sum())
    if full < 0.01 * len(lengths):
        return []
    return [f"{full:,} of {len(lengths):,} cells fill all {tokenizer.model_max_length:,} tokens the model takes: genes of lower rank are cut off there"]


def _token_tables(cells: LabelledCells) -> Iterator[pa.Table]:
    yield from cells.tokens.select_columns(["input_ids"]).with_format("arrow").iter(4096)


def _prepare_genes(arguments: GeneformerFineTuningArguments, tokenizer: GeneformerTokenizer, cells: LabelledCells, classes: GeneClasses) -> Prepared:
    cells.filter(leave_out=arguments.leave_out, keep_only=arguments.keep_only)  # type: ignore[arg-type]
    where = str(arguments.gene_classes or "gene_classes")
    notes = []
    if classes.unknown:
        notes.append(f"{len(classes.unknown):,} genes of {Path(where).name} are not in the vocabulary: {_some(classes.unknown)}")
    size = max(tokenizer.get_vocab().values()) + 1
    cells.draw(None, seed=arguments.order_seed, most=arguments.max_cells)
    n_cells = _cells_with(cells, classes.of_tokens(size) >= 0)
    unseen = n_cells[classes.token_ids] == 0
    if unseen.any():
        names = tokenizer.gene_table.ensembl_of_tokens(classes.token_ids[unseen].tolist())
        notes.append(
            f"{int(unseen.sum()):,} genes are among the tokens of no cell that is used, so that nothing can be said of them: {_some([str(n) for n in names])}"
        )
        classes = type(classes)(classes.names, classes.token_ids[~unseen], classes.class_ids[~unseen], classes.unknown)
    task = GeneTask(classes, size)
    rows, ids = np.arange(len(classes.token_ids)), classes.class_ids
    share = arguments.validation_share or 0.0
    least = arguments.n_folds or 1 + (arguments.test_share > 0) + (share > 0)
    require_enough(ids, classes.names, least=max(least, 1), why="one for each side of the split", what="genes")
    if arguments.n_folds:
        splits = folds(rows, n_folds=arguments.n_folds, classes=ids, groups=None, validation_share=share, seed=arguments.order_seed)
    else:
        splits = [one_split(rows, classes=ids, groups=None, validation_share=share, test_share=arguments.test_share, seed=arguments.order_seed)]
    return Prepared(tokenizer, cells, task, splits, np.flatnonzero(cells.usable), [*cells.notes, *notes])


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def _cells_with(cells: LabelledCells, is_asked: np.ndarray) -> np.ndarray:
    """Count in how many cells each gene is, and leave out cells with none of those that are asked for."""
    counts, without = np.zeros(len(is_asked), dtype=np.int64), np.zeros(len(cells.part), dtype=bool)
    start = 0
    for table in _token_tables(cells):
        column = table.column("input_ids").combine_chunks()
        flat, sizes = np.asarray(column.flatten()), np.asarray(column.value_lengths())
        cell = np.repeat(np.arange(len(sizes)), sizes)
        used = cells.usable[start : start + len(sizes)]
        without[start : start + len(sizes)] = np.bincount(cell, weights=is_asked[flat], minlength=len(sizes)) == 0
        counts += np.bincount(flat[used[cell]], minlength=len(counts))
        start += len(sizes)
    cells.leave_out(without, "they express none of the genes that have a class")
    if not cells.usable.any():
        msg = "no cell expresses any of the genes that have a class."
        raise SettingError(msg)
    return counts


def _split_cells(arguments: GeneformerFineTuningArguments, cells: LabelledCells, task: CellTask) -> list[Split]:
    rows = np.flatnonzero(cells.usable & (cells.part == TRAIN))
    classes = task.classes_to_stratify()
    # Missing ones are a class by themselves: they need not be spread.
    strata = classes if arguments.stratify else None
    column = arguments.group_column
    groups = groups_of(cells.columns[column], column, np.flatnonzero(cells.usable)) if column else None
    # With folds all trainings take equally long, as that of the final model does.
    usual = 0.0 if arguments.n_folds else VALIDATION_SHARE
    validation_share = usual if arguments.validation_share is None else arguments.validation_share
    validation_share = 0.0 if arguments.validation_data is not None or (cells.part == VALIDATION).any() else validation_share
    test_share = 0.0 if (cells.part == TEST).any() else arguments.test_share
    seed = arguments.order_seed
    if arguments.n_folds:
        if classes is not None and groups is None:
            for head in task.heads:
                require_enough(task.labels_of(head)[rows], head.names, least=arguments.n_folds, why="one for each fold")
        splits = folds(rows, n_folds=arguments.n_folds, classes=strata, groups=groups, validation_share=validation_share, seed=seed)
    else:
        if classes is not None:
            _require_classes(task, rows, cells)
            least = 1 + (validation_share > 0) + (test_share > 0)
            for head in task.heads:
                require_enough(task.labels_of(head)[rows], head.names, least=least, why="one for each side of the split")

        def drawn(number: int) -> Split:
            return one_split(rows, classes=strata, groups=groups, validation_share=validation_share, test_share=test_share, seed=seed + 1000 * number)

        several = arguments.split_trials if arguments.balance_columns and test_share else 1
        candidates = [drawn(number) for number in range(several)]
        split = candidates[0] if several == 1 else most_balanced(candidates, {name: cells.columns[name] for name in arguments.balance_columns or []})
        given = [np.flatnonzero(cells.usable & (cells.part == part)) for part in (VALIDATION, TEST)]
        splits = [Split(split.train, *(mine if len(mine) else theirs for mine, theirs in zip(given, (split.validation, split.test), strict=True)))]
    if column:
        for split in splits:
            require_no_leak(split, cells.columns[column], column)
        cells.notes += _groups_behind(splits, cells.columns[column], column)
    return splits


def _require_classes(task: CellTask, rows: np.ndarray, cells: LabelledCells) -> None:
    """Raise if a column of classes looks like one of numbers.

    Raises:
        SettingError
    """
    for head in task.heads:
        numbers = all(
            isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.bool_))
            for value in cells.columns[head.name]
            if not is_missing(value)
        )
        if numbers and len(head.names) > max(20, len(rows) // 10):
            msg = f"column {head.name!r} holds {len(head.names):,} different numbers in {len(rows):,} cells, too many for classes. To predict numbers pass problem_type: regression."
            raise SettingError(msg)


def _groups_behind(splits: Sequence[Split], values: Sequence[Any], column: str) -> list[str]:
    """Say how many groups stand on each side."""
    found = []
    for number, split in enumerate(splits):
        sides = {name: sorted({class_name(values[row]) for row in getattr(split, name).tolist()}) for name in ("train", "validation", "test")}
        shown = ", ".join(
            f"{len(names):,} to {what} ({_some(names, 5)})"
            for (name, names), what in zip(sides.items(), ("train", "choose the epoch", "test"), strict=True)
            if names
        )
        found.append(f"{column}{f', fold {number + 1}' if len(splits) > 1 else ''}: {shown}")
        if len(sides["test"]) == 1:
            found.append(f"the test rests on one {column}: another may be much easier or harder. n_folds tests each once")
    return found


def _remarks(arguments: GeneformerFineTuningArguments, task: CellTask, splits: Sequence[Split], *, has_test_data: bool) -> list[str]:
    """Return what a reader of the figures should know of the splits."""
    found = []
    for number, split in enumerate(splits):
        if not len(split.train):
            msg = "no cell is left to train on after the split. Lower validation_share and test_share, or give more cells."
            raise SettingError(msg)
        for head in task.heads:
            if head.kind != CLASSES:
                continue
            labels = task.labels_of(head)
            train, test = class_counts(labels[split.train], head.names), class_counts(labels[split.test], head.names)
            where = f"{head.name}{f', fold {number + 1}' if len(splits) > 1 else ''}"
            untaught = {name: n for name, n in test.items() if n and not train[name]}
            if untaught:
                found.append(f"{where}: classes in test cells that no training cell has, which cannot be right: {describe_counts(untaught)}")
            for side, counts in (("test", test), ("validation", class_counts(labels[split.validation], head.names))):
                without = [name for name, n in counts.items() if not n]
                if without and len(getattr(split, side)):
                    found.append(f"{where}: classes without a {side} cell, of which the figures say nothing: {_some(without)}")
    if arguments.n_folds and arguments.validation_share and arguments.load_best_model_at_end:
        found.append("folds were tested at the epoch that did best on their validation cells; the final model was trained for all epochs")
    if arguments.group_column is None and not has_test_data:
        found.append(
            "cells were split one by one: cells of one donor or batch may be on both sides, and figures are higher than for a new donor. Name it with group_column, if there is one."
        )
    return found
