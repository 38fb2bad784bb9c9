"""Geneformer for the Hugging Face ecosystem: importing this package registers its models with the Auto classes.

Everything is loaded on first use, so that the import needs neither torch nor transformers; `registration` says how that goes together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import like
from .registration import register

if TYPE_CHECKING:
    from .analysis.attention_networks import AttentionNetwork, attention_network, regulator_centrality
    from .analysis.attention_weights import iter_attention
    from .analysis.benchmarking import BenchmarkDataset, benchmark
    from .analysis.effects import cooperativity, perturbation_effects
    from .analysis.embeddings import embed_cells, embed_genes, iter_gene_embeddings, state_embeddings
    from .analysis.evaluation import CellEvaluation, evaluate_cells
    from .analysis.gene_classes import hide_genes
    from .analysis.gene_context import context_specificity
    from .analysis.gene_modules import gene_modules, gene_similarity
    from .analysis.masked_genes import predict_masked_genes
    from .analysis.perturbations import Perturbation
    from .analysis.perturbing import InSilicoPerturber
    from .analysis.predictions import CellPredictions, GenePredictions, predict
    from .analysis.published import read_published_perturbations
    from .analysis.rank_contribution import rank_contributions
    from .analysis.screening import screening_quality
    from .analysis.states import StateShift, StateVectors
    from .analysis.statistics import perturbation_statistics
    from .data.builder import CellDatasetBuilder, load_cells
    from .data.corpus import tokenize_corpus
    from .data.medians import fit_gene_table
    from .data.quality import QualityRules, assess_quality
    from .data.scdl import write_scdl
    from .data.soma import SomaSource, open_census
    from .data.streaming import stream_cells, stream_tokens
    from .genes import GeneTable
    from .hub.conversion import convert_checkpoint
    from .hub.export import export_checkpoint, merge_adapter
    from .hub.onnx_export import export_onnx
    from .hub.sharing import pull_folder, push_folder
    from .hub.upstream import convert_multi_task
    from .models.adapters import add_adapter
    from .models.checkpoints import CHECKPOINTS
    from .models.configuration_geneformer import GeneformerConfig
    from .models.loading import load_model, load_peft_model
    from .models.modeling_geneformer import (
        GeneformerForMaskedLM,
        GeneformerForMultiTaskClassification,
        GeneformerForSequenceClassification,
        GeneformerForTokenClassification,
        GeneformerModel,
    )
    from .models.tokenization_geneformer import GeneformerTokenizer
    from .ranking import rank_genes
    from .training.arguments import GeneformerFineTuningArguments, GeneformerPretrainingArguments
    from .training.finetuning import FineTuningRun, finetune
    from .training.pretraining import PretrainingRun, pretrain
    from .training.search import SearchRun, search
    from .training.search_settings import SearchSettings
    from .transfer_tasks import load_task, run_task, task_names


_LAZY = {
    "CHECKPOINTS": "models.checkpoints",
    "AttentionNetwork": "analysis.attention_networks",
    "BenchmarkDataset": "analysis.benchmarking",
    "CellDatasetBuilder": "data.builder",
    "CellEvaluation": "analysis.evaluation",
    "CellPredictions": "analysis.predictions",
    "FineTuningRun": "training.finetuning",
    "GenePredictions": "analysis.predictions",
    "GeneTable": "genes",
    "GeneformerConfig": "models.configuration_geneformer",
    "GeneformerFineTuningArguments": "training.arguments",
    "GeneformerForMaskedLM": "models.modeling_geneformer",
    "GeneformerForMultiTaskClassification": "models.modeling_geneformer",
    "GeneformerForSequenceClassification": "models.modeling_geneformer",
    "GeneformerForTokenClassification": "models.modeling_geneformer",
    "GeneformerModel": "models.modeling_geneformer",
    "GeneformerPretrainingArguments": "training.arguments",
    "GeneformerTokenizer": "models.tokenization_geneformer",
    "InSilicoPerturber": "analysis.perturbing",
    "Perturbation": "analysis.perturbations",
    "PretrainingRun": "training.pretraining",
    "QualityRules": "data.quality",
    "SearchRun": "training.search",
    "SearchSettings": "training.search_settings",
    "SomaSource": "data.soma",
    "StateShift": "analysis.states",
    "StateVectors": "analysis.states",
    "add_adapter": "models.adapters",
    "assess_quality": "data.quality",
    "attention_network": "analysis.attention_networks",
    "benchmark": "analysis.benchmarking",
    "context_specificity": "analysis.gene_context",
    "convert_checkpoint": "hub.conversion",
    "convert_multi_task": "hub.upstream",
    "cooperativity": "analysis.effects",
    "embed_cells": "analysis.embeddings",
    "embed_genes": "analysis.embeddings",
    "evaluate_cells": "analysis.evaluation",
    "export_checkpoint": "hub.export",
    "export_onnx": "hub.onnx_export",
    "finetune": "training.finetuning",
    "fit_gene_table": "data.medians",
    "gene_modules": "analysis.gene_modules",
    "gene_similarity": "analysis.gene_modules",
    "hide_genes": "analysis.gene_classes",
    "iter_attention": "analysis.attention_weights",
    "iter_gene_embeddings": "analysis.embeddings",
    "load_cells": "data.builder",
    "load_model": "models.loading",
    "load_peft_model": "models.loading",
    "load_task": "transfer_tasks",
    "merge_adapter": "hub.export",
    "open_census": "data.soma",
    "perturbation_effects": "analysis.effects",
    "perturbation_statistics": "analysis.statistics",
    "predict": "analysis.predictions",
    "predict_masked_genes": "analysis.masked_genes",
    "pretrain": "training.pretraining",
    "pull_folder": "hub.sharing",
    "push_folder": "hub.sharing",
    "rank_contributions": "analysis.rank_contribution",
    "rank_genes": "ranking",
    "read_published_perturbations": "analysis.published",
    "regulator_centrality": "analysis.attention_networks",
    "run_task": "transfer_tasks",
    "screening_quality": "analysis.screening",
    "search": "training.search",
    "state_embeddings": "analysis.embeddings",
    "stream_cells": "data.streaming",
    "stream_tokens": "data.streaming",
    "task_names": "transfer_tasks",
    "tokenize_corpus": "data.corpus",
    "write_scdl": "data.scdl",
}

__all__ = [
    "CHECKPOINTS",
    "AttentionNetwork",
    "BenchmarkDataset",
    "CellDatasetBuilder",
    "CellEvaluation",
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
    "SomaSource",
    "StateShift",
    "StateVectors",
    "__version__",
    "add_adapter",
    "assess_quality",
    "attention_network",
    "benchmark",
    "context_specificity",
    "convert_checkpoint",
    "convert_multi_task",
    "cooperativity",
    "embed_cells",
    "embed_genes",
    "evaluate_cells",
    "export_checkpoint",
    "export_onnx",
    "finetune",
    "fit_gene_table",
    "gene_modules",
    "gene_similarity",
    "hide_genes",
    "iter_attention",
    "iter_gene_embeddings",
    "load_cells",
    "load_model",
    "load_peft_model",
    "load_task",
    "merge_adapter",
    "open_census",
    "perturbation_effects",
    "perturbation_statistics",
    "predict",
    "predict_masked_genes",
    "pretrain",
    "pull_folder",
    "push_folder",
    "rank_contributions",
    "rank_genes",
    "read_published_perturbations",
    "regulator_centrality",
    "run_task",
    "screening_quality",
    "search",
    "state_embeddings",
    "stream_cells",
    "stream_tokens",
    "task_names",
    "tokenize_corpus",
    "write_scdl",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    msg = f"module {__name__!r} has no attribute {name!r}.{like(name, __all__)}"
    raise AttributeError(msg, name=name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
