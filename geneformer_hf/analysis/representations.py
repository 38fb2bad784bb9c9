"""Ways to stand for a cell that an evaluation compares: checkpoints, untrained models, embeddings of other tools, expression itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..data.readers import open_cells
from ..errors import ColumnNotFoundError, SettingError
from ..models.configuration_geneformer import GeneformerConfig
from ..models.loading import untrained_encoder
from ..reports.cell_baselines import expression_matrix
from ..reports.expression import principal_components, variable_expression
from .cells import Cells, SourceCells, TokenChunk
from .embeddings import Embedder

MODEL, UNTRAINED, STORED, BASELINE = KINDS = ("model", "untrained", "obsm", "baseline")
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size", "vocabulary_fingerprint")


@dataclass(frozen=True)
class Representation:
    """One vector for each cell."""

    name: str
    kind: str
    """`model`, `untrained`, `obsm` or `baseline`."""
    vectors: np.ndarray
    """float32 of shape `(n, e)`; NaN for cells without a gene of the model's vocabulary."""
    is_scaled: bool = True
    """Whether a linear probe sees its dimensions in standard deviations: not those of expression, whose sizes mean something."""


def named_models(models: Any) -> dict[str, Any]:
    """Return models by the names they are shown under.

    Args:
        models: one model, folder or Hub id; several; or a dictionary of names to them.

    Raises:
        SettingError: if there is none, or two have one name.

    Example:
        >>> list(named_models(["runs/small/model", "runs/large/model"]))
        ['small/model', 'large/model']
    """
    if isinstance(models, Mapping):
        found = {str(name): model for name, model in models.items()}
    else:
        given = list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
        texts = [str(one) if isinstance(one, (str, Path)) else str(getattr(one, "name_or_path", "") or "model") for one in given]
        for n_parts in range(1, 8):
            names = ["/".join(Path(text).parts[-n_parts:]) for text in texts]
            if len(set(names)) == len(names):
                break
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            msg = f"two models are called {', '.join(repeated)}. Give each a name: a dictionary of names to models, or --model NAME=FOLDER."
            raise SettingError(msg)
        found = dict(zip(names, given, strict=True))
    if not found:
        msg = "no model was given. Name one or more checkpoints."
        raise SettingError(msg)
    return found


def shape_of(config: GeneformerConfig) -> str:
    """Return what an untrained model depends on, as text."""
    return json.dumps([getattr(config, field, None) for field in SHAPE])


def iter_models(
    models: Mapping[str, Any], open_cells: Callable[[Embedder], Cells], *, untrained: bool, seed: int, **options: Any
) -> Iterator[tuple[Representation, Cells, GeneformerConfig]]:
    """Embed cells with each model, one model in memory at a time; then with an untrained one of each shape and vocabulary among them.

    Args:
        open_cells: opens the cells for a model.
        options: for `Embedder`.
    """
    shapes: dict[str, tuple[str, Any, Any]] = {}
    for name, model in models.items():
        runner = Embedder(model, **options)
        cells = open_cells(runner)
        yield Representation(name, MODEL, runner.embed(cells)), cells, runner.config
        shapes.setdefault(shape_of(runner.config), (name, runner.config, runner.tokenizer() if isinstance(cells, SourceCells) else None))
    for name, config, tokenizer in shapes.values() if untrained else ():
        runner = Embedder(untrained_encoder(config, seed), **(options | {"tokenizer": tokenizer, "quantization": None}))
        shown = "untrained" if len(shapes) == 1 else f"untrained, shape of {name}"
        cells = open_cells(runner)
        yield Representation(shown, UNTRAINED, runner.embed(cells)), cells, config


class UnrankedCells(SourceCells):
    """Counts that no model reads: for baselines alone."""

    def __init__(self, cells: Any, *, gene_ids: str | None, counts_layer: str | None, genome: str | None) -> None:
        if hasattr(cells, "column_names"):
            msg = "a tokenized dataset can only be judged with a model, whose vocabulary tells its genes. Name one, or give the file of cells."
            raise SettingError(msg)
        self.source = open_cells(cells, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome)
        self.n_cells = self.source.n_cells

    def chunks(self) -> Iterator[TokenChunk]:
        """Raise: there is no vocabulary to rank with."""
        raise NotImplementedError


def stored(cells: Cells, keys: Sequence[str]) -> list[Representation]:
    """Return embeddings that lie in `obsm`.

    Raises:
        ColumnNotFoundError: if the cells are a dataset, which has none.
    """
    if not keys:
        return []
    if not isinstance(cells, SourceCells):
        msg = f"obsm {', '.join(keys)} was asked for, and a tokenized dataset holds no obsm. Give the file of cells."
        raise ColumnNotFoundError(msg)
    return [Representation(f"obsm {key}", STORED, cells.source.read_obsm(key)) for key in keys]


def expression(cells: Cells, config: GeneformerConfig | None, batches: np.ndarray | None, kept: np.ndarray, *, seed: int) -> list[Representation]:
    """Return the principal components of variable genes, and their log counts: of all genes of a file, or of the tokens of a dataset.

    Args:
        batches (int64 of shape `(n,)`, *optional*), kept (bool of shape `(n,)`): genes are chosen by the kept cells; other rows are NaN.
    """
    if isinstance(cells, SourceCells):
        matrix = sp.vstack([block.counts_ng for block in cells.source.iter_blocks()], format="csr")
        what, counts = "log counts", True
    else:
        assert config is not None, "a dataset is opened for a model"
        dataset = cells.dataset  # type: ignore[attr-defined]
        special = [int(token) for token in (config.pad_token_id, config.cls_token_id, config.eos_token_id) if token is not None]  # type: ignore[arg-type]
        matrix, counts = expression_matrix(dataset, np.arange(cells.n_cells), config.vocab_size, special), False
        what = "log counts" if "counts" in dataset.column_names else "gene ranks"
    values = variable_expression(matrix[kept], None if batches is None else batches[kept], counts=counts)
    components = principal_components(values, seed=seed)
    genes = f"{values.shape[1]:,} variable genes"
    return [
        Representation(f"PCA of {genes}", BASELINE, _at(kept, components), is_scaled=False),
        Representation(f"{what} of {genes}", BASELINE, _at(kept, values), is_scaled=False),
    ]


def _at(kept: np.ndarray, values: np.ndarray) -> np.ndarray:
    out = np.full((len(kept), values.shape[1]), np.nan, dtype=np.float32)
    out[kept] = values
    return out
