"""What is learnt: which labels of cells or genes, with which model class, and how well it is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.labelled import TRAIN, LabelledCells
from ..data.labels import GeneClasses, balanced_weights, class_ids, class_name, describe_counts, is_missing, label_matrix, numbers_of
from ..errors import SettingError
from ..models.heads import CLASSES, IGNORED, JOINED, LABELS, NUMBERS, Head, column_names
from ..models.modeling_geneformer import (
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
)
from ..reports.classification import figures_of
from .arguments import GeneformerFineTuningArguments

NO_HEADS: dict[str, Any] = dict.fromkeys(
    ("task_labels", "task_weights", "integrate", "task_class_weights", "class_weights", "label_columns", "label_mean", "label_scale", "problem_type")
)
"""What the configuration of another task may have left, none of which holds any more."""


@dataclass
class CellTask:
    """Labels of cells, for one head or several."""

    heads: list[Head]
    labels: np.ndarray
    """By row: int64 of shape `(n,)`; of shape `(n, heads)` for several; float32 of shape `(n, k)` for labels that hold together and numbers."""
    notes: list[str] = field(default_factory=list)
    batches: np.ndarray | None = None
    """By row, int64 of shape `(n,)`: what cells of one class are drawn together across; -100 where unknown."""
    stratify_by: str | None = None
    """The head whose classes shall have equal shares on all sides of a split."""

    @property
    def kind(self) -> str:
        """`problem_type` of its heads."""
        return self.heads[0].kind

    @property
    def is_multi_task(self) -> bool:
        """Whether a column of labels is one of several, of heads or of batches."""
        return len(self.heads) > 1 or self.batches is not None

    @property
    def learnt(self) -> np.ndarray:
        """What a training step is given of each row: labels and, as one more column, batches."""
        return self.labels if self.batches is None else np.column_stack([self.labels, self.batches])

    @property
    def model_class(self) -> Any:
        """The class of model that learns it."""
        return GeneformerForMultiTaskClassification if self.is_multi_task else GeneformerForSequenceClassification

    def labels_of(self, head: Head) -> np.ndarray:
        """Return the labels of one head, by row."""
        return self.labels[:, self.heads.index(head)] if self.is_multi_task else self.labels

    def unlabelled(self) -> np.ndarray:
        """Return which rows say nothing that could be learnt, bool of shape `(n,)`."""
        if self.kind == CLASSES:
            return np.asarray((self.labels.reshape(len(self.labels), -1) == IGNORED).all(axis=1))
        return np.asarray(np.isnan(self.labels).any(axis=1))

    def classes_to_stratify(self) -> np.ndarray | None:
        """Return class ids by row for splits with equal shares: those of the first column that is to be predicted."""
        if self.kind != CLASSES:
            return None
        return self.labels_of(next(head for head in self.heads if head.name == self.stratify_by) if self.stratify_by else self.heads[0])

    def config_fields(self, arguments: GeneformerFineTuningArguments, train_rows: np.ndarray) -> dict[str, Any]:
        """Return what the configuration of a model has to say of this task."""
        columns = column_names(self.heads)
        fields: dict[str, Any] = NO_HEADS | {"problem_type": self.kind, "label_columns": columns}
        if self.is_multi_task:
            fields |= {
                "task_labels": {head.name: head.names for head in self.heads},
                "task_weights": {name: float(weight) for name, weight in (arguments.task_weights or {}).items()} or None,  # type: ignore[union-attr]
                "integrate": arguments.integrate,
                "integration_weight": float(arguments.integration_weight),
            }
            if arguments.class_weights == "balanced":
                fields["task_class_weights"] = {h.name: balanced_weights(self.labels_of(h)[train_rows], len(h.names)) for h in self.heads}
            return fields
        (head,) = self.heads
        # Set beside num_labels, which makes names of its own.
        fields |= {"id2label": dict(enumerate(head.names)), "label2id": {name: i for i, name in enumerate(head.names)}}
        if arguments.class_weights == "balanced":
            fields["class_weights"] = balanced_weights(self.labels[train_rows], len(head.names))
        if self.kind == NUMBERS:
            known = self.labels[train_rows].astype(np.float64)
            fields |= {"label_mean": known.mean(axis=0).tolist(), "label_scale": np.where(known.std(axis=0) > 0, known.std(axis=0), 1.0).tolist()}
        return fields

    def metrics(self, logits: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """Return the figures that are followed while training: of each head, and their mean over heads."""
        names = {CLASSES: ("accuracy", "macro_f1", "log_loss"), LABELS: ("accuracy", "macro_f1"), NUMBERS: ("r2", "mae")}[self.kind]
        found: dict[str, float] = {}
        means: dict[str, list[float]] = {name: [] for name in names}
        for head in self.heads:
            labels = self.labels_of(head)[rows]
            if head.kind == CLASSES and not (labels != IGNORED).any():
                continue
            figures = figures_of(head, labels, head.probabilities(logits))
            for name in names:
                if self.is_multi_task:
                    found[f"{head.name}_{name}"] = figures[name]
                means[name].append(figures[name])
        return {name: float(np.mean(values)) for name, values in means.items() if values} | found


def cell_task(cells: LabelledCells, arguments: GeneformerFineTuningArguments) -> CellTask:
    """Turn columns of obs into a task, and leave out cells as the arguments say: by value, without a label, beyond a number, of rare classes.

    Raises:
        SettingError: if labels are missing, or there are fewer than two classes.
    """
    columns: dict[str, Sequence[Any]] = {name: cells.columns[name] for name in arguments.label or []}
    cells.filter(leave_out=arguments.leave_out, keep_only=arguments.keep_only)  # type: ignore[arg-type]
    _handle_missing(cells, columns, arguments)
    here = cells.usable & (cells.part == TRAIN)
    if not here.any():
        msg = f"no cell is left to train on: {'; '.join(cells.notes)}."
        raise SettingError(msg)
    only = next(iter(columns.values()))
    cells.draw(
        class_ids(only)[1] if arguments.max_cells_per_class else None,
        seed=arguments.order_seed,
        most=arguments.max_cells,
        most_per_class=arguments.max_cells_per_class,
    )
    if arguments.problem_type == CLASSES:
        return _class_task(cells, columns, arguments)
    used = {name: [value if use else None for value, use in zip(values, cells.usable, strict=True)] for name, values in columns.items()}
    names, labels = label_matrix(used) if arguments.problem_type == LABELS else (list(columns), numbers_of(used))
    if not names:
        msg = f"column {', '.join(columns)} names no label in any cell."
        raise SettingError(msg)
    return CellTask([Head(JOINED.join(columns), names, arguments.problem_type)], labels)


def _class_task(cells: LabelledCells, columns: Mapping[str, Sequence[Any]], arguments: GeneformerFineTuningArguments) -> CellTask:
    heads: list[Head] = []
    labels = []
    # Sorted, as a config.json keeps them.
    for column, values in sorted(columns.items()):
        names, ids = _classes_of(cells, column, values, arguments)
        heads.append(Head(column, names, CLASSES, heads[-1].stop if heads else 0))
        labels.append(ids)
    batches = _batches(cells, arguments.integrate) if arguments.integrate else None
    task = CellTask(heads, labels[0] if len(labels) == 1 and batches is None else np.stack(labels, axis=1), batches=batches, stratify_by=next(iter(columns)))
    # What is left without a label now is of a rare class, or of one that no training cell has.
    cells.leave_out(task.unlabelled(), f"no {' or '.join(columns)} that is learnt")
    return task


def _classes_of(cells: LabelledCells, column: str, values: Sequence[Any], arguments: GeneformerFineTuningArguments) -> tuple[list[str], np.ndarray]:
    """Return the classes among usable training cells, and the ids of all cells."""
    here = cells.usable & (cells.part == TRAIN)
    names, ids = class_ids([value if use else None for value, use in zip(values, here, strict=True)])
    _, ids = class_ids(values, names)
    if arguments.rare_threshold:
        if len(arguments.label or []) == 1:
            cells.leave_out_rare(ids, names, threshold=arguments.rare_threshold)
        counts = {name: int(((ids == i) & here).sum()) for i, name in enumerate(names)}
        least = arguments.rare_threshold * sum(counts.values()) if arguments.rare_threshold < 1 else arguments.rare_threshold
        rare = {name: n for name, n in counts.items() if n < least}
        if rare and len(arguments.label or []) > 1:
            cells.notes.append(f"{column}: {sum(rare.values()):,} labels not used, of classes with fewer than {least:,.0f} cells: {describe_counts(rare)}")
        names, ids = class_ids([None if not is_missing(v) and class_name(v) in rare else v for v in values], [name for name in names if name not in rare])
    lowered = {name.lower() for name in names}
    if lowered & {"0", "1"} and lowered & {"true", "false"}:
        msg = f"column {column!r} holds {', '.join(names)}: 0 and 1 in some files, False and True in others. Write them alike."
        raise SettingError(msg)
    if len(names) < 2:
        msg = f"column {column!r} holds {len(names)} class{'' if len(names) == 1 else 'es'} ({', '.join(names) or 'none'}) among {int(here.sum()):,} cells to train on; a classifier needs two at least."
        raise SettingError(msg)
    strange = cells.usable & ~here & (ids == IGNORED) & np.array([not is_missing(v) for v in values])
    if strange.any():
        found = sorted({class_name(values[row]) for row in np.flatnonzero(strange).tolist()})
        cells.notes.append(
            f"{int(strange.sum()):,} validation or test cells have a {column} that no training cell has, and cannot be scored: {', '.join(found[:10])}"
        )
    looks_missing = [name for name in names if name.lower() in ("nan", "none", "na", "unknown", "unassigned")]
    if looks_missing:
        cells.notes.append(
            f"{column} has the class {', '.join(looks_missing)}, which is learnt like any other. To leave such cells out: leave_out: {{{column}: [{', '.join(looks_missing)}]}}"
        )
    return names, ids


def _batches(cells: LabelledCells, column: str) -> np.ndarray:
    """Return the batch of each cell.

    Raises:
        SettingError: if there is but one.
    """
    _, ids = class_ids(cells.columns[column])
    here = cells.usable & (cells.part == TRAIN)
    used = np.unique(ids[here & (ids != IGNORED)])
    if len(used) < 2:
        msg = f"integrate: column {column!r} holds {len(used)} value{'' if len(used) == 1 else 's'} among {int(here.sum()):,} cells to train on; expected two batches at least."
        raise SettingError(msg)
    unknown = int((here & (ids == IGNORED)).sum())
    if unknown:
        cells.notes.append(f"{unknown:,} cells without a {column} are learnt, and drawn to no others")
    return ids


def _handle_missing(cells: LabelledCells, columns: Mapping[str, Sequence[Any]], arguments: GeneformerFineTuningArguments) -> None:
    """Refuse cells to train on that have no label, or leave them out; those to be tested are left out."""
    missing = np.stack([np.array([is_missing(value) for value in values]) for values in columns.values()])
    several_heads = arguments.problem_type == CLASSES and len(columns) > 1
    unlabelled = np.asarray(missing.all(axis=0) if several_heads else missing.any(axis=0))
    to_train = unlabelled & cells.usable & (cells.part == TRAIN)
    if to_train.any() and arguments.missing_labels == "refuse" and not several_heads:
        rows = np.flatnonzero(to_train)
        msg = (
            f"{len(rows):,} of {int(cells.usable.sum()):,} cells have no {' or '.join(columns)} (the first: {cells.cell_ids[rows[0]]}). "
            "Fill it in, or pass missing_labels: leave_out to go on without them."
        )
        raise SettingError(msg)
    cells.leave_out(unlabelled, f"no {' or '.join(columns)}")


@dataclass
class GeneTask:
    """Classes of genes."""

    classes: GeneClasses
    vocab_size: int

    @property
    def head(self) -> Head:
        """The one head."""
        return Head("gene_class", self.classes.names, CLASSES)

    @property
    def model_class(self) -> Any:
        """The class of model that learns it."""
        return GeneformerForTokenClassification

    def config_fields(self, arguments: GeneformerFineTuningArguments, train_rows: np.ndarray) -> dict[str, Any]:
        """Return what the configuration of a model has to say of this task; rows are genes."""
        names = self.classes.names
        weights = balanced_weights(self.classes.class_ids[train_rows], len(names)) if arguments.class_weights == "balanced" else None
        return NO_HEADS | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, "class_weights": weights}


@dataclass
class GeneScores:
    """What a model says of some genes, in all cells that express them."""

    sums_vc: np.ndarray
    """float64 of shape `(vocabulary, classes)`: probabilities summed over cells."""
    n_cells_v: np.ndarray
    """int64 of shape `(vocabulary,)`: cells each gene was scored in."""
    classes_m: np.ndarray
    """int16 of shape `(m,)`: the true class of each gene in each cell."""
    probabilities_mc: np.ndarray
    """float32 of shape `(m, classes)`."""

    @classmethod
    def empty(cls, vocab_size: int, n_classes: int) -> GeneScores:
        """Return scores of nothing."""
        zeros = np.zeros((vocab_size, n_classes))
        return cls(zeros, np.zeros(vocab_size, dtype=np.int64), np.empty(0, dtype=np.int16), np.empty((0, n_classes), dtype=np.float32))

    def means(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the mean probabilities of some genes over cells; NaN for those in no cell."""
        counts = self.n_cells_v[token_ids][:, None]
        return np.divide(self.sums_vc[token_ids], counts, out=np.full((len(token_ids), self.sums_vc.shape[1]), np.nan), where=counts > 0)
