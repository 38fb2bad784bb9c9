"""Baselines on the very split of a model: what the same cells and labels give without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.labelled import LabelledCells
from ..data.mixtures import Corpus
from ..data.splits import Split
from ..device import resolve_device
from ..models.configuration_geneformer import GeneformerConfig
from ..models.encoding import PackedEncoder
from ..models.heads import CLASSES, NUMBERS
from ..models.pooling import gene_positions
from ..reports.cell_baselines import COMPONENTS, Standardised, expression_matrix, fitted, most_variable, sklearn_or_refuse
from .arguments import GeneformerFineTuningArguments
from .tasks import CellTask, GeneTask

READ_CELLS = 512
APPLIED_CELLS = 10_000
MAJORITY = "majority class"
FROZEN, UNTRAINED = "logistic regression on the checkpoint, not fine-tuned", "logistic regression on the untrained encoder"
EXPRESSION_LEVEL = "logistic regression on expression level"


def cell_baselines(
    cells: LabelledCells, task: CellTask, split: Split, arguments: GeneformerFineTuningArguments, vectors: dict[str, np.ndarray], config: GeneformerConfig
) -> dict[str, dict[str, np.ndarray]]:
    """Fit every baseline to the training cells of a split and apply it to the test cells, head by head.

    Args:
        vectors: names to embeddings of all cells, float32 of shape `(n, e)`, for linear models on them.

    Returns:
        head to baseline to probabilities (or numbers) of shape `(test, outputs)`.
    """
    sklearn_or_refuse()
    from sklearn.decomposition import PCA

    train = split.train
    if len(train) > arguments.baseline_cells:
        drawn = np.random.default_rng([arguments.order_seed, 5]).choice(len(train), arguments.baseline_cells, replace=False)
        train = train[np.sort(drawn)]
    special = [int(t) for t in (config.pad_token_id, config.cls_token_id, config.eos_token_id) if t is not None]  # type: ignore[arg-type]
    of_train = expression_matrix(cells.tokens, train, config.vocab_size, special)
    columns = most_variable(of_train)
    dense = of_train[:, columns].toarray()
    pca = PCA(min(COMPONENTS, *dense.shape), random_state=arguments.order_seed).fit(dense)
    what, number = "expression" if cells.has_counts else "gene ranks", task.kind == NUMBERS
    linear = f"{'ridge' if number else 'logistic'} regression on {what} of variable genes"
    scales = {(name.replace("logistic", "ridge") if number else name): (Standardised(space[train]), space) for name, space in vectors.items()}

    def spaces(rows: np.ndarray, expression: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
        found = {
            "mean" if number else MAJORITY: ("majority", expression[:, :1]),
            # Not in units of standard deviations: that takes two points of accuracy from it on the cells of docs/finetuning.md.
            linear: ("linear", expression),
            f"nearest neighbours on PCA of {what}": ("neighbours", pca.transform(expression)),
        }
        return found | {name: ("linear", scale(space[rows])) for name, (scale, space) in scales.items()}

    of_rows = spaces(train, dense)
    models = {h.name: {name: fitted(kind, h.kind, x, task.labels_of(h)[train], len(h.names)) for name, (kind, x) in of_rows.items()} for h in task.heads}
    parts: dict[str, dict[str, list[np.ndarray]]] = {head: {name: [] for name in of_rows} for head in models}
    for start in range(0, len(split.test), APPLIED_CELLS):
        # Expression of so many test cells is held at a time.
        rows = split.test[start : start + APPLIED_CELLS]
        found = spaces(rows, expression_matrix(cells.tokens, rows, config.vocab_size, special)[:, columns].toarray())
        for head, by_name in models.items():
            for name, model in by_name.items():
                parts[head][name].append(model(found[name][1]))
    return {head: {name: np.concatenate(several) for name, several in by_name.items()} for head, by_name in parts.items()}


def frozen_vectors(model: Any, corpus: Corpus, rows: np.ndarray, *, pooling: str) -> np.ndarray:
    """Return pooled last hidden states of some cells under a model as it is, float32 of shape `(n, e)`; zeros for other rows."""
    config = model.config
    encoder = PackedEncoder(model, n_layers=config.num_hidden_layers, device=resolve_device())
    out = np.zeros((len(corpus.lengths), config.hidden_size), dtype=np.float32)
    with encoder.ready():
        for start in range(0, len(rows), READ_CELLS):
            some = rows[start : start + READ_CELLS]
            tokens = corpus.read(some.tolist())
            offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in tokens])]).astype(np.int64)
            for done in encoder.encode(np.concatenate(tokens), offsets, np.arange(len(some))):
                keep = gene_positions(done.input_ids, torch.ones_like(done.input_ids), config)
                first = 0
                for cell, length in zip(done.cells.tolist(), done.lengths, strict=True):
                    span = slice(first, first + length)
                    first += length
                    hidden = done.hidden[span].float().cpu()
                    out[some[cell]] = (hidden[0] if pooling in ("first", "cls") else hidden[keep[span]].mean(0)).numpy()
    return out


def gene_baselines(cells: LabelledCells, task: GeneTask, splits: Sequence[Split], rows: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Predict the classes of test genes from how they are expressed: how often, how high, at which rank.

    Returns:
        baseline to probabilities of the test genes of each split.
    """
    sklearn_or_refuse()
    features = expression_features(cells, rows, task.vocab_size)[task.classes.token_ids]
    labels, n_classes = task.classes.class_ids, len(task.classes.names)
    found: dict[str, list[np.ndarray]] = {MAJORITY: [], EXPRESSION_LEVEL: []}
    for split in splits:
        units = Standardised(features[split.train])
        train, test = units(features[split.train]), units(features[split.test])
        found[MAJORITY].append(fitted("majority", CLASSES, train, labels[split.train], n_classes)(test))
        found[EXPRESSION_LEVEL].append(fitted("linear", CLASSES, train, labels[split.train], n_classes)(test))
    return found


def expression_features(cells: LabelledCells, rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return of each token id: share of cells it is in, mean rank there (0 is the highest, 1 the lowest), and mean log expression where it is known.

    float64 of shape `(vocabulary, 2 or 3)`.
    """
    n_cells, ranks, levels = np.zeros(vocab_size), np.zeros(vocab_size), np.zeros(vocab_size)
    arrow = cells.tokens.with_format("arrow")
    for start in range(0, len(rows), READ_CELLS):
        table = arrow[rows[start : start + READ_CELLS].tolist()]
        column = table.column("input_ids").combine_chunks()
        flat, sizes = np.asarray(column.flatten()), np.asarray(column.value_lengths())
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        np.add.at(n_cells, flat, 1)
        np.add.at(ranks, flat, (np.arange(len(flat)) - starts) / np.repeat(np.maximum(sizes, 1), sizes))
        if cells.has_counts:
            np.add.at(levels, flat, np.log1p(np.asarray(table.column("counts").combine_chunks().flatten(), dtype=np.float64)))
    present = np.maximum(n_cells, 1)
    columns = [n_cells / max(len(rows), 1), np.where(n_cells > 0, ranks / present, 1.0)]
    return np.stack([*columns, levels / present] if cells.has_counts else columns, axis=1)
