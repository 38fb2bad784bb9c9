"""Pipelines of transformers that take cells: an AnnData, a file or a tokenized dataset in, a table with names out.

    pipeline("cell-embedding", model="geneformer-v2")(adata)

They run the packed engine of this package, so results do not depend on batches or padding. `pipeline("fill-mask")` stays what it is, for lists of genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from .errors import CheckpointError
from .models.modeling_geneformer import GeneformerModel

if TYPE_CHECKING:
    import pandas as pd

READING = ("gene_ids", "counts_layer", "genome")


class CellPipeline(Pipeline):
    """A model made ready for cells."""

    _load_tokenizer = True  # type: ignore[assignment]
    options: ClassVar[tuple[str, ...]] = ()
    """What can be asked for beside how cells are read; at the pipeline or at a call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Ours; transformers would put several files into one batch.
        self._cells_in_a_pass, self._batch_size = self._batch_size, None

    def __call__(self, inputs: Any, *, batch_size: int | None = None, progress: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the table of some cells, or a list of tables of a list of files.

        Args:
            inputs (`AnnData`, `str`, `Path` or `datasets.Dataset`): as in `embed_cells`.
            batch_size (`int`, *optional*): most cells in one pass; passes are bounded by tokens anyway.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar.
            kwargs: `gene_ids` and `counts_layer`, as in `embed_cells`, and what the pipeline itself knows.
        """
        return super().__call__(inputs, passes={"batch_size": batch_size or self._cells_in_a_pass, "progress": progress}, **kwargs)

    def _sanitize_parameters(self, passes: dict[str, Any] | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = [name for name in kwargs if name not in (*READING, *self.options)]
        if unknown:
            msg = f"{type(self).__name__} knows no {', '.join(unknown)}; it takes {', '.join((*READING, *self.options))}, batch_size and progress."
            raise TypeError(msg)
        asked = {name: value for name, value in kwargs.items() if name in self.options}
        return {name: value for name, value in kwargs.items() if name in READING}, asked | ({"passes": passes} if passes else {}), {}

    def preprocess(self, input_: Any, **reading: Any) -> dict[str, Any]:
        """Cells are opened where they are read, a block at a time."""
        return {"cells": input_, "reading": reading}

    def _forward(self, input_tensors: dict[str, Any], *, passes: dict[str, Any] | None = None, **asked: Any) -> Any:
        options = {"tokenizer": self.tokenizer, "device": self.device, **(passes or {}), **input_tensors["reading"]}
        return {"table": self.table(input_tensors["cells"], options, asked)}

    def postprocess(self, model_outputs: Any, **_: Any) -> pd.DataFrame:
        """Return the table."""
        return model_outputs["table"]

    def table(self, cells: Any, options: dict[str, Any], asked: dict[str, Any]) -> pd.DataFrame:
        """Return what this pipeline says of cells."""
        raise NotImplementedError


class CellEmbeddingPipeline(CellPipeline):
    """Embeddings: a line for each cell, its id as index, a column for each dimension. `layer` and `pooling` are those of `embed_cells`."""

    options = ("layer", "pooling")

    def table(self, cells: Any, options: dict[str, Any], asked: dict[str, Any]) -> pd.DataFrame:
        """Return the embeddings of cells."""
        import pandas as pd

        from .analysis.embeddings import Embedder

        reading = {name: options.pop(name) for name in READING if name in options}
        runner = Embedder(self.model, **options, **({"layer": -2, "pooling": None} | asked))
        parts = [pd.DataFrame(vectors, index=chunk.cell_ids) for chunk, vectors in runner.iter_cells(runner.open(cells, **reading))]
        return (pd.concat(parts) if parts else pd.DataFrame()).rename_axis("cell_id")


class CellClassificationPipeline(CellPipeline):
    """Labels of a fine-tuned model: label, probability and entropy of each cell, then the probability of each class; its id as index."""

    def table(self, cells: Any, options: dict[str, Any], asked: dict[str, Any]) -> pd.DataFrame:
        """Return what is predicted of cells.

        Raises:
            CheckpointError: if the checkpoint has no such head, of which transformers would make one at random.
        """
        from .analysis.predictions import predict

        trained = self.model.config.architectures or [type(self.model).__name__]
        if trained[0].replace("Bert", "Geneformer", 1) != type(self.model).__name__:
            msg = f"{self.model.name_or_path} is a {trained[0]}, which has no head to predict labels of cells with. Fine-tune it first (`geneformer-hf finetune`)."
            raise CheckpointError(msg)
        return predict(self.model, cells, **options, **asked).to_frame()


class MaskedGenePredictionPipeline(CellPipeline):
    """Genes that are hidden and asked for: a line for each, as `predict_masked_genes` says; so are `genes`, `share`, `top_k` and `seed`."""

    options = ("genes", "share", "top_k", "seed")

    def table(self, cells: Any, options: dict[str, Any], asked: dict[str, Any]) -> pd.DataFrame:
        """Return what is predicted of hidden genes."""
        from .analysis.masked_genes import predict_masked_genes

        return predict_masked_genes(self.model, cells, **options, **asked)


TASKS = {
    "cell-embedding": (CellEmbeddingPipeline, GeneformerModel),
    "cell-classification": (CellClassificationPipeline, AutoModelForSequenceClassification),
    "masked-gene-prediction": (MaskedGenePredictionPipeline, AutoModelForMaskedLM),
}


def register() -> None:
    """Make the pipelines known to transformers; once is enough."""
    for task, (implementation, model) in TASKS.items():
        if task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=implementation, pt_model=model, type="multimodal")
