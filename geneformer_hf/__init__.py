"""Geneformer for the Hugging Face ecosystem: importing this package registers its models with the Auto classes.

Everything outside `models` is loaded on first use, so that the import needs neither anndata nor datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import pipelines as pipelines  # registers them with transformers
from ._version import __version__
from .genes import GeneTable
from .models import (
    CHECKPOINTS,
    GeneformerConfig,
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
    GeneformerTokenizer,
)
from .ranking import rank_genes

if TYPE_CHECKING:
    from .analysis.effects import cooperativity, perturbation_effects
    from .analysis.embeddings import embed_cells, embed_genes, iter_gene_embeddings, state_embeddings
    from .analysis.masked_genes import predict_masked_genes
    from .analysis.perturbations import Perturbation
    from .analysis.perturbing import InSilicoPerturber
    from .analysis.predictions import CellPredictions, GenePredictions, predict
    from .analysis.published import read_published_perturbations
    from .analysis.screening import screening_quality
    from .analysis.states import StateShift, StateVectors
    from .analysis.statistics import perturbation_statistics
    from .data.builder import CellDatasetBuilder, load_cells
    from .data.corpus import tokenize_corpus
    from .data.medians import fit_gene_table
    from .data.quality import QualityRules, assess_quality
    from .data.streaming import stream_cells, stream_tokens
    from .hub.conversion import convert_checkpoint
    from .hub.export import export_checkpoint, merge_adapter
    from .hub.onnx_export import export_onnx
    from .hub.sharing import pull_folder, push_folder
    from .models.adapters import add_adapter
    from .models.loading import load_model, load_peft_model
    from .training.arguments import GeneformerFineTuningArguments, GeneformerPretrainingArguments
    from .training.finetuning import FineTuningRun, finetune
    from .training.pretraining import PretrainingRun, pretrain
    from .training.search import SearchRun, search
    from .training.search_settings import SearchSettings

_LAZY = {
    "CellDatasetBuilder": "data.builder",
    "CellPredictions": "analysis.predictions",
    "FineTuningRun": "training.finetuning",
    "GenePredictions": "analysis.predictions",
    "GeneformerFineTuningArguments": "training.arguments",
    "GeneformerPretrainingArguments": "training.arguments",
    "InSilicoPerturber": "analysis.perturbing",
    "Perturbation": "analysis.perturbations",
    "PretrainingRun": "training.pretraining",
    "QualityRules": "data.quality",
    "SearchRun": "training.search",
    "SearchSettings": "training.search_settings",
    "StateShift": "analysis.states",
    "StateVectors": "analysis.states",
    "add_adapter": "models.adapters",
    "assess_quality": "data.quality",
    "cooperativity": "analysis.effects",
    "convert_checkpoint": "hub.conversion",
    "embed_cells": "analysis.embeddings",
    "embed_genes": "analysis.embeddings",
    "export_checkpoint": "hub.export",
    "export_onnx": "hub.onnx_export",
    "finetune": "training.finetuning",
    "fit_gene_table": "data.medians",
    "iter_gene_embeddings": "analysis.embeddings",
    "load_cells": "data.builder",
    "load_model": "models.loading",
    "load_peft_model": "models.loading",
    "merge_adapter": "hub.export",
    "perturbation_effects": "analysis.effects",
    "perturbation_statistics": "analysis.statistics",
    "read_published_perturbations": "analysis.published",
    "screening_quality": "analysis.screening",
    "predict": "analysis.predictions",
    "predict_masked_genes": "analysis.masked_genes",
    "pretrain": "training.pretraining",
    "pull_folder": "hub.sharing",
    "push_folder": "hub.sharing",
    "search": "training.search",
    "state_embeddings": "analysis.embeddings",
    "stream_cells": "data.streaming",
    "stream_tokens": "data.streaming",
    "tokenize_corpus": "data.corpus",
}

__all__ = [
    "CHECKPOINTS",
    "CellDatasetBuilder",
    "CellPredictions",
    "FineTuningRun",
    "GenePredictions",
    "GeneTable",
    "GeneformerConfig",
    "GeneformerFineTuningArguments",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "GeneformerPretrainingArguments",
    "GeneformerTokenizer",
    "InSilicoPerturber",
    "Perturbation",
    "PretrainingRun",
    "QualityRules",
    "SearchRun",
    "SearchSettings",
    "StateShift",
    "StateVectors",
    "__version__",
    "add_adapter",
    "assess_quality",
    "convert_checkpoint",
    "cooperativity",
    "embed_cells",
    "embed_genes",
    "export_checkpoint",
    "export_onnx",
    "finetune",
    "fit_gene_table",
    "iter_gene_embeddings",
    "load_cells",
    "load_model",
    "load_peft_model",
    "merge_adapter",
    "perturbation_effects",
    "perturbation_statistics",
    "predict",
    "predict_masked_genes",
    "pretrain",
    "pull_folder",
    "push_folder",
    "rank_genes",
    "read_published_perturbations",
    "screening_quality",
    "search",
    "state_embeddings",
    "stream_cells",
    "stream_tokens",
    "tokenize_corpus",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
