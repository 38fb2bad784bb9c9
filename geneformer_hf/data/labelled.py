"""Cells with what is known about them: files or datasets opened, labels read, cells chosen; nothing left out without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import CellFileError, ColumnNotFoundError, SettingError
from ..models.heads import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer
from .builder import load_cells
from .files import is_cells_folder
from .labels import class_counts, class_name, describe_counts, is_missing
from .tokenized import open_tokenized, report_of, repository_of_cells, require_lists_of_ids, require_made_with

TRAIN, VALIDATION, TEST = 0, 1, 2
PART_NAMES = ("train", "validation", "test")


@dataclass
class LabelledCells:
    """The cells of a run, from all of its files, in their order."""

    tokens: datasets.Dataset
    """Column `input_ids`, and `counts` (per 10,000, beside each token) where the counts are known."""
    columns: dict[str, list[Any]]
    """What was asked for of obs."""
    part: np.ndarray
    """int8 of shape `(n,)`: what the user gave a cell for (train, validation, test)."""
    cell_ids: list[str]
    usable: np.ndarray = field(init=False)
    """bool of shape `(n,)`: cells that were not left out."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    repositories: list[str] = field(default_factory=list)
    """Where on the Hub the datasets among them are from."""

    def __post_init__(self) -> None:
        self.usable = np.ones(len(self.part), dtype=bool)

    @property
    def has_counts(self) -> bool:
        """Whether expression is known beside the tokens."""
        return "counts" in self.tokens.column_names

    def leave_out(self, rows: np.ndarray, why: str) -> None:
        """Do not use some cells.

        Args:
            rows: bool of shape `(n,)`.
        """
        fresh = rows & self.usable
        if fresh.any():
            self.usable &= ~rows
            self.notes.append(f"{int(fresh.sum()):,} cells left out: {why}")

    def filter(self, *, leave_out: Mapping[str, Sequence[Any]] | None = None, keep_only: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Leave cells out by the values of columns.

        Raises:
            SettingError: if no cell has one of the values.
        """
        for wanted, settings in ((False, leave_out), (True, keep_only)):
            for column, values in (settings or {}).items():
                texts = np.array(["" if is_missing(v) else class_name(v) for v in self.columns[column]], dtype=object)
                named = [class_name(v) for v in values]
                absent = sorted(set(named) - set(texts))
                if absent:
                    msg = f"{'keep_only' if wanted else 'leave_out'}: no cell has {column} {', '.join(map(repr, absent))}. Found: {describe_counts(_counted(texts))}."
                    raise SettingError(msg)
                chosen = np.isin(texts, named)
                self.leave_out(
                    ~chosen if wanted else chosen, f"{column} is {'none of' if wanted else 'one of'} {', '.join(name or '(missing)' for name in named)}"
                )

    def leave_out_rare(self, ids_n: np.ndarray, names: Sequence[str], *, threshold: float) -> None:
        """Leave out classes with fewer training cells than a share or number."""
        here = self.usable & (self.part == TRAIN)
        counts = class_counts(ids_n[here], names)
        least = threshold * int(here.sum()) if threshold < 1 else threshold
        rare = {name: n for name, n in counts.items() if n < least}
        if rare:
            rows = np.isin(ids_n, [i for i, name in enumerate(names) if name in rare])
            self.leave_out(rows, f"classes of fewer than {least:,.0f} cells (rare_threshold {threshold:g}): {describe_counts(rare)}")

    def draw(self, ids_n: np.ndarray | None, *, seed: int, most: int | None = None, most_per_class: int | None = None) -> None:
        """Use a random part of the training cells: so many of each class, then so many in all."""
        rng = np.random.default_rng([seed, 11])
        if most_per_class is not None and ids_n is not None:
            spare = np.zeros(len(self.part), dtype=bool)
            for number in np.unique(ids_n[ids_n != IGNORED]).tolist():
                rows = np.flatnonzero(self.usable & (self.part == TRAIN) & (ids_n == number))
                spare[rng.permutation(rows)[most_per_class:]] = True
            self.leave_out(spare, f"over {most_per_class:,} of their class (max_cells_per_class), drawn by seed {seed}")
        if most is not None:
            spare = np.zeros(len(self.part), dtype=bool)
            rows = np.flatnonzero(self.usable & (self.part == TRAIN))
            spare[rng.permutation(rows)[most:]] = True
            self.leave_out(spare, f"over {most:,} (max_cells), drawn by seed {seed}")


def _counted(texts: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(texts.astype(str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def open_labelled(
    given: Mapping[int, Any],
    *,
    columns: Sequence[str],
    tokenizer: GeneformerTokenizer,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
) -> LabelledCells:
    """Open the cells of a run.

    Args:
        given: part (train, validation, test) to an AnnData, a dataset, a path, or several.
        columns: columns of obs to read.

    Raises:
        CellFileError, ColumnNotFoundError, NotRawCountsError, GeneIdError, VocabularyMismatchError
    """
    opened, parts, notes = [], [], []
    for part, cells in given.items():
        for one in cells if isinstance(cells, (list, tuple)) else [cells]:
            name = str(one) if isinstance(one, (str, Path)) else f"{PART_NAMES[part]}_data"
            dataset = _open(one, columns, tokenizer, gene_ids, counts_layer, genome, name=name)
            if not len(dataset):
                msg = f"{name}: no cells in it that hold a gene of the vocabulary."
                raise CellFileError(msg)
            opened.append((name, dataset))
            notes += left_out_of(dataset)
            parts.append(np.full(len(dataset), part, dtype=np.int8))
    _require_different(opened)
    kept = ["input_ids", "counts"] if all(_has_counts(dataset) for _, dataset in opened) else ["input_ids"]
    tokens = [dataset.select_columns(kept) for _, dataset in opened]
    tokens = [dataset if dataset.features == tokens[0].features else dataset.cast(tokens[0].features) for dataset in tokens]
    values: dict[str, list[Any]] = {column: [] for column in columns}
    cell_ids: list[str] = []
    for _, dataset in opened:
        for column in columns:
            values[column] += _decoded(dataset, column)
        cell_ids += list(dataset["cell_id"][:]) if "cell_id" in dataset.column_names else [str(i) for i in range(len(dataset))]
    repositories = sorted({found for _, dataset in opened if (found := repository_of_cells(dataset))})
    together = datasets.concatenate_datasets(tokens) if len(tokens) > 1 else tokens[0]
    return LabelledCells(together, values, np.concatenate(parts), cell_ids, notes=notes, repositories=repositories)


def left_out_of(dataset: datasets.Dataset) -> list[str]:
    """Return, for people, which cells of its files are not in a dataset."""
    report, notes = report_of(dataset), []
    for key, why in (("left_out_by_filter_pass", "filter_pass is 0"), ("left_out_without_genes", "they hold no gene of the vocabulary")):
        if report.get(key):
            notes.append(f"{int(report[key]):,} cells of the files are not among these: {why}")
    return notes


def _open(
    cells: Any, columns: Sequence[str], tokenizer: GeneformerTokenizer, gene_ids: str | None, counts_layer: str | None, genome: str | None, *, name: str
) -> datasets.Dataset:
    if isinstance(cells, (str, Path)) and is_tokenized(Path(cells)):
        cells = open_tokenized(cells)
    if isinstance(cells, datasets.DatasetDict):
        msg = f"{name} is a DatasetDict ({', '.join(cells)}). Give one of its splits."
        raise CellFileError(msg)
    if not isinstance(cells, datasets.Dataset):
        return load_cells(
            cells,
            tokenizer=tokenizer,
            obs=list(dict.fromkeys(columns)) or "none",
            gene_ids=gene_ids,
            counts_layer=counts_layer,
            genome=genome,
            keep_counts=True,
        )
    require_lists_of_ids(cells, name=name)
    missing = [column for column in columns if _name_in(cells, column) is None]
    if missing:
        msg = f"{name}: no column {', '.join(map(repr, missing))}; found {', '.join(cells.column_names)}."
        raise ColumnNotFoundError(msg)
    if len(cells):
        require_made_with(cells, tokenizer, name=name)
    return cells


def _has_counts(dataset: datasets.Dataset) -> bool:
    """Return whether expression stands beside each token, as `keep_counts` keeps it."""
    kind = dataset.features.get("counts")
    inner = getattr(kind, "feature", None)
    return isinstance(inner, datasets.Value) and "float" in inner.dtype


def _name_in(dataset: datasets.Dataset, column: str) -> str | None:
    """Return what a column of obs is called in a dataset: one named like a column of ours has another name there."""
    if f"obs_{column}" in dataset.column_names:
        return f"obs_{column}"
    ours = column in ("input_ids", "length", "cell_id", "counts", "input_ids_uncropped", "length_uncropped") and bool(report_of(dataset))
    return column if column in dataset.column_names and not ours else None


def is_tokenized(path: Path) -> bool:
    """Return whether a path is a dataset of tokens rather than a file of cells."""
    if path.suffix == ".parquet":
        return True
    if not path.is_dir() or is_cells_folder(path):
        return False
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or any(path.glob("*.parquet"))


def _decoded(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Return a column, classes by their names."""
    name = _name_in(dataset, column) or column
    feature, values = dataset.features[name], list(dataset[name][:])
    return [None if value is None else feature.names[value] for value in values] if isinstance(feature, datasets.ClassLabel) else values


def _require_different(opened: Sequence[tuple[str, datasets.Dataset]]) -> None:
    seen: dict[str, str] = {}
    for name, dataset in opened:
        other = seen.get(dataset._fingerprint)
        seen[dataset._fingerprint] = name
        if other is not None:
            msg = f"{name} and {other} are the same cells; given twice, they would be on both sides of a split."
            raise SettingError(msg)
