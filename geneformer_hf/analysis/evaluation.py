"""Does it work on these cells? Checkpoints without any training, beside an untrained model and expression itself, on the same cells and folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data.labels import class_ids
from ..errors import SettingError
from ..models.configuration_geneformer import GeneformerConfig
from ..models.heads import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.integration import integration_figures, scib_metrics
from ..reports.label_transfer import KNN, MAJORITY, PROBE, Fold, means, transfer, transfer_folds
from .cells import Cells
from .embeddings import Embedder
from .representations import BASELINE, MODEL, STORED, UNTRAINED, Representation, UnrankedCells, expression, iter_models, named_models, stored

NUMBERS = {"layer": (-math.inf, math.inf), "n_folds": (2, math.inf), "seed": (0, 2**32 - 1), "batch_size": (1, math.inf)}
"""Options that are whole numbers, and between which they lie; a seed as numpy and scikit-learn take it."""
LEAST_CELLS = 16
"""Fewer cells have no fifteen neighbours."""


@dataclass(frozen=True)
class Judged:
    """One representation and its figures."""

    representation: Representation
    integration: dict[str, float]
    """As `integration_figures`."""
    transfer: list[dict[str, Any]]
    """As `transfer`: a row for each fold and method."""

    def row(self) -> dict[str, Any]:
        """Return all figures in one row, those of label transfer as means over folds."""
        found = {"name": self.representation.name, "kind": self.representation.kind, "dimensions": self.representation.vectors.shape[1]} | self.integration
        for short, method in (("knn", KNN), ("probe", PROBE)):
            found |= {f"{short}_{name}": value for name, value in means(self.transfer, method).items()}
        return found


@dataclass(frozen=True)
class CellEvaluation:
    """What `evaluate_cells` returns."""

    judged: list[Judged]
    """The models in the given order, untrained ones, embeddings of other tools, expression."""
    labels: np.ndarray
    """Label of each cell as text, of shape `(n,)`; None where it is missing."""
    batches: np.ndarray | None
    held_out: str
    """What label transfer keeps apart: a column, or `random parts`."""
    used: np.ndarray
    """bool of shape `(n,)`: cells that were judged."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def table(self) -> pd.DataFrame:
        """A row for each representation."""
        return pd.DataFrame([one.row() for one in self.judged])

    @property
    def transfer(self) -> pd.DataFrame:
        """A row for each representation, fold and method."""
        rows = [{"name": one.representation.name} | {k: v for k, v in row.items() if k != "f1_by_class"} for one in self.judged for row in one.transfer]
        return pd.DataFrame(rows)

    @property
    def majority(self) -> dict[str, float]:
        """Figures of naming every cell by the most frequent label."""
        return means(self.judged[0].transfer, MAJORITY)

    def verdict(self) -> str:
        """Say where the best model stands, in one sentence for each kind of figure."""
        return " ".join(
            self._standing(key, what)
            for key, what in (("avg_bio", "cell types apart (avg bio)"), ("overall", "overall"), ("knn_macro_f1", "labels from neighbours (macro F1)"))
        )

    def _standing(self, key: str, what: str) -> str:
        rows = [one.row() for one in self.judged]
        known = [row for row in rows if np.isfinite(row.get(key, np.nan))]
        models, others = ([row for row in known if row["kind"] in kinds] for kinds in ((MODEL,), (UNTRAINED, STORED, BASELINE)))
        if not models:
            return ""
        best = max(models, key=lambda row: row[key])
        words = f"{what[0].upper()}{what[1:]}: {best['name']} {best[key]:.3f}"
        if not others:
            return f"{words}."
        rival = max(others, key=lambda row: row[key])
        side = "above" if best[key] > rival[key] else "below" if best[key] < rival[key] else "as"
        return f"{words}, {side} the best of the others ({rival['name']}, {rival[key]:.3f})."


def evaluate_cells(
    models: Any,
    cells: Any,
    *,
    labels: str,
    batch: str | None = None,
    held_out: str | None = None,
    obsm: Sequence[str] = (),
    untrained: bool = True,
    baselines: bool = True,
    n_folds: int = 5,
    tokenizer: GeneformerTokenizer | None = None,
    layer: int = -2,
    pooling: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    allow_missing_weights: bool = False,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CellEvaluation:
    """Judge the embeddings of checkpoints on labelled cells without any training, beside baselines.

    Every representation is judged on the same cells: those that have a label and, in every vocabulary, a gene.

    Args:
        models: one model, folder or Hub id; several; or a dictionary of names to them. Each uses the tokenizer of its folder. None or empty: baselines alone.
        cells (`AnnData`, `str`, `Path` or `datasets.Dataset`): as in `embed_cells`. A dataset suits models of one vocabulary.
        labels (`str`): column of obs with cell types.
        batch (`str`, *optional*): column of obs with batches, for the figures of integration.
        held_out (`str`, *optional*): column whose values are kept apart in label transfer, such as donors; `batch` otherwise, else random parts.
        obsm (`Sequence[str]`, *optional*): embeddings of other tools, by their keys in `obsm`, to judge as well.
        untrained (`bool`, *optional*, defaults to `True`): also judge a model with random weights of each shape among the models.
        baselines (`bool`, *optional*, defaults to `True`): also judge log counts of 2,000 variable genes, and their 50 principal components.
        n_folds (`int`, *optional*, defaults to 5): of label transfer; where there are no more donors or batches than that, each is a fold.
        seed (`int`, *optional*, defaults to 0): of clusters, folds, components and the untrained model.
        allow_missing_weights (`bool`, *optional*, defaults to `False`): as in `load_model`.
        tokenizer, layer, pooling, batch_size, device, dtype, quantization, gene_ids, counts_layer, genome, progress: as in `embed_cells`.

    Returns:
        `CellEvaluation`.

    Raises:
        SettingError: if there are too few cells, labels, batches or donors.
        MissingExtraError: without scib-metrics, scanpy and scikit-learn.
        ColumnNotFoundError, CellFileError, LayerError, VocabularyMismatchError, CheckpointError: as `embed_cells`.
    """
    scib_metrics()
    require_numbers({"layer": layer, "n_folds": n_folds, "seed": seed, "batch_size": batch_size})
    if not models and not obsm and not baselines:
        msg = "there is nothing to judge: no model, no obsm, no baselines. Name one or more checkpoints."
        raise SettingError(msg)
    read: list[_Labelled] = []

    def open_cells(runner: Embedder) -> Cells:
        tokens = runner.open(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
        if not read:
            # Before the first model has embedded a million cells in vain.
            read.append(_Labelled(tokens, labels, batch, held_out))
            read[0].folds(n_folds, seed)
            stored(tokens, obsm)
        return tokens

    made: list[Representation] = []
    opened: tuple[Cells, GeneformerConfig | None]
    if models:
        options = {
            "layer": layer,
            "pooling": pooling,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "allow_missing_weights": allow_missing_weights,
        }
        for representation, tokens, config in iter_models(
            named_models(models), open_cells, untrained=untrained, seed=seed, tokenizer=tokenizer, progress=progress, **options
        ):
            made.append(representation)
            opened = tokens, config
    else:
        opened = UnrankedCells(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome), None
        read.append(_Labelled(opened[0], labels, batch, held_out))
    known = read[0]
    made += stored(opened[0], obsm)
    known.leave_out_empty(made)
    values = expression(*opened, known.batch_ids, known.used, seed=seed) if baselines or batch is not None else []
    judge = Judge(known, values[1].vectors[known.used] if values else None, n_folds=n_folds, seed=seed)
    made += values if baselines else []
    judged = [judge(one) for one in tqdm(made, desc="Judging", unit=" embeddings", disable=not progress)]
    return CellEvaluation(judged, known.labels, known.batches, known.held_out, known.used, known.notes + _undefined(judged, known, labels) + _doubts(judged))


def require_numbers(options: Mapping[str, Any]) -> None:
    """Refuse options that are no whole numbers, or out of their range, before anything is computed.

    Raises:
        SettingError
    """
    for name, (least, most) in NUMBERS.items():
        value = options.get(name)
        if value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= most):
            continue
        bounds = "" if math.isinf(least) else f", {least} or more" if math.isinf(most) else f" from {least} to {most}"
        msg = f"{name} is {value!r}; expected a whole number{bounds}."
        raise SettingError(msg)


def _undefined(judged: Sequence[Judged], known: _Labelled, labels: str) -> list[str]:
    """Describe the metrics that are undefined for these cells (NaN), with the reason."""
    notes = []
    tested = {row["fold"]: row["n_test"] for row in judged[0].transfer}
    empty = [fold for fold, n in tested.items() if not n]
    if empty:
        where = (
            f"all folds (held out: {known.held_out})"
            if len(empty) == len(tested)
            else f"{len(empty):,} of {len(tested):,} folds ({', '.join(map(str, empty[:3]))}{', …' if len(empty) > 3 else ''})"
        )
        notes.append(
            f"Label transfer is undefined in {where}: no held-out cell has a {labels} that occurs in the training cells. "
            + ("Hold out by a column whose values share labels (`held_out=`, --held-out)." if len(empty) == len(tested) else "Means are over the other folds.")
        )
    missing = sorted({name for one in judged for name, value in one.integration.items() if isinstance(value, float) and np.isnan(value)})
    if missing:
        notes.append(
            f"Undefined metrics, left empty: {', '.join(name.replace('_', ' ') for name in missing)}. Labels and batches do not overlap, or a group is too small."
        )
    return notes


def _doubts(judged: Sequence[Judged]) -> list[str]:
    """Say so where labels follow none of the embeddings, expression included: they may belong to other cells."""
    if not any(one.representation.kind == BASELINE for one in judged):
        return []
    best = max((means(one.transfer, KNN)["balanced_accuracy"] for one in judged), default=np.nan)
    chance = means(judged[0].transfer, MAJORITY)["balanced_accuracy"]
    n_labels = len({name for one in judged for row in one.transfer for name in row["f1_by_class"]})
    if n_labels < 3 or not best < max(2 / n_labels, 1.2 * chance):
        return []
    return [
        f"Neighbours tell the {n_labels} labels hardly better than chance in every embedding, expression included (best balanced accuracy {best:.3f}, chance {1 / n_labels:.3f}). Labels may not belong to these cells: look at marker genes."
    ]


class _Labelled:
    """What is known of the cells, and which of them can be judged."""

    def __init__(self, cells: Cells, labels: str, batch: str | None, held_out: str | None) -> None:
        self.names, self.label_ids = class_ids(cells.column(labels))
        self.labels = named(self.names, self.label_ids)
        self.used, self.notes = np.ones(cells.n_cells, dtype=bool), list[str]()
        self._leave_out(self.label_ids == IGNORED, f"have no {labels}")
        self.batch_names: list[str] = []
        self.batch_ids: np.ndarray | None = None
        self.batches: np.ndarray | None = None
        if batch is not None:
            self.batch_names, self.batch_ids = class_ids(cells.column(batch))
            self.batches = named(self.batch_names, self.batch_ids)
            self._leave_out(self.batch_ids == IGNORED, f"have no {batch}")
        self.group_names, self.group_ids = self.batch_names, self.batch_ids
        self.held_out = held_out or batch or "random parts"
        if held_out is not None:
            self.group_names, self.group_ids = class_ids(cells.column(held_out))
            self._leave_out(self.group_ids == IGNORED, f"have no {held_out}")
        self._require_enough(labels, batch)

    def leave_out_empty(self, made: Sequence[Representation]) -> None:
        """Leave out cells that some representation says nothing of, from all."""
        for one in made:
            self._leave_out(
                ~np.isfinite(one.vectors).all(axis=1),
                f"hold no gene of the vocabulary of {one.name}" if one.kind in (MODEL, UNTRAINED) else f"are not finite in {one.name}",
            )
        self._require_enough("label", "batch" if self.batch_ids is not None else None)

    def folds(self, n_folds: int, seed: int) -> list[Fold]:
        """Return the folds of label transfer, over the cells that can be judged."""
        groups = None if self.group_ids is None else self.group_ids[self.used]
        return transfer_folds(self.label_ids[self.used], groups, self.group_names, n_folds=n_folds, seed=seed)

    def _leave_out(self, rows: np.ndarray, why: str) -> None:
        fresh = rows & self.used
        if fresh.any():
            self.used &= ~rows
            self.notes.append(f"{int(fresh.sum()):,} of {len(rows):,} cells {why}; they are not judged.")

    def _require_enough(self, labels: str, batch: str | None) -> None:
        n = int(self.used.sum())
        if n < LEAST_CELLS:
            msg = f"{n} of {len(self.used):,} cells can be judged; expected {LEAST_CELLS} or more. {' '.join(self.notes)}"
            raise SettingError(msg)
        for column, ids, names in ((labels, self.label_ids, self.names), (batch, self.batch_ids, self.batch_names)):
            present = [] if ids is None else np.unique(ids[self.used]).tolist()
            if column is not None and len(present) < 2:
                msg = f"{column} has one value among the {n:,} cells that can be judged ({names[present[0]]!r}); expected two or more."
                raise SettingError(msg)


def named(names: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """Return the class of each cell as text, None where it is missing."""
    return np.array([*names, None], dtype=object)[np.where(ids == IGNORED, len(names), ids)]


class Judge:
    """Judges every representation on the same cells, labels and folds.

    Args:
        known: the cells.
        expression_ng (`np.ndarray` of shape `(used cells, g)`, *optional*): before any integration.
    """

    def __init__(self, known: _Labelled, expression_ng: np.ndarray | None, *, n_folds: int, seed: int) -> None:
        self._known, self._expression, self._seed = known, expression_ng, seed
        self._labels = known.label_ids[known.used]
        self._batches = None if known.batch_ids is None else known.batch_ids[known.used]
        self._folds = known.folds(n_folds, seed)

    def __call__(self, one: Representation) -> Judged:
        """Return the figures of a representation."""
        vectors = one.vectors[self._known.used]
        figures = integration_figures(vectors, self._labels, self._batches, expression_ng=self._expression, seed=self._seed)
        return Judged(one, figures, transfer(vectors, self._labels, self._known.names, self._folds, standardised=one.is_scaled))
