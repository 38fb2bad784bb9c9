import re
import subprocess
import sys
from pathlib import Path

import geneformer_hf

PUBLIC = {
    "CHECKPOINTS", "CellDatasetBuilder", "GeneTable", "GeneformerConfig", "GeneformerForMaskedLM", "GeneformerForMultiTaskClassification",
    "GeneformerForSequenceClassification", "GeneformerForTokenClassification", "GeneformerModel", "GeneformerPretrainingArguments", "GeneformerTokenizer", "PretrainingRun", "QualityRules", "__version__",
    "CellPredictions", "FineTuningRun", "GenePredictions", "GeneformerFineTuningArguments", "SearchRun", "SearchSettings", "add_adapter", "finetune", "load_model", "load_peft_model",
    "merge_adapter", "predict", "predict_masked_genes", "search",
    "InSilicoPerturber", "Perturbation", "StateShift", "StateVectors", "cooperativity", "perturbation_effects", "perturbation_statistics", "read_published_perturbations",
    "screening_quality",
    "assess_quality",
    "convert_checkpoint", "embed_cells", "embed_genes", "export_checkpoint", "export_onnx", "fit_gene_table", "iter_gene_embeddings", "load_cells", "pretrain", "pull_folder", "push_folder", "rank_genes",
    "AttentionNetwork", "BenchmarkDataset", "CellEvaluation", "attention_network", "benchmark", "context_specificity", "evaluate_cells", "gene_modules", "gene_similarity",
    "SomaSource", "convert_multi_task", "open_census", "write_scdl", "hide_genes", "iter_attention", "load_task", "rank_contributions", "regulator_centrality", "run_task", "task_names",
    "state_embeddings", "stream_cells", "stream_tokens", "tokenize_corpus",
}  # fmt: skip


def test_the_top_level_names():
    assert set(geneformer_hf.__all__) == set(dir(geneformer_hf)) == PUBLIC
    assert all(getattr(geneformer_hf, name) is not None for name in PUBLIC)


def test_another_name_is_an_attribute_error():
    assert not hasattr(geneformer_hf, "nothing")


def test_the_import_is_light():
    code = "from geneformer_hf import GeneformerForMaskedLM, GeneformerTokenizer; import sys; print([m for m in ('anndata', 'datasets', 'h5py', 'pandas', 'peft', 'scanpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_twice_is_harmless():
    code = "import geneformer_hf, importlib; importlib.reload(geneformer_hf); from transformers import AutoConfig; print(AutoConfig.for_model('geneformer').model_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "geneformer"


def test_every_public_name_is_in_the_reference():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert set(re.findall(r"auto(?:class|function):: geneformer_hf\.(\w+)", page)) == PUBLIC - {"CHECKPOINTS", "__version__"}
