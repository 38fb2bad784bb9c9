"""Every example and every Python block of the README runs on a small model: those of the README as processes of their own, the rest within this one."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import datasets
import numpy as np
import pytest

from geneformer_hf import GeneformerPretrainingArguments, GeneformerTokenizer, load_cells
from geneformer_hf.gene_ids import human_genes
from geneformer_hf.training.configs import read_config
from tests.conftest import make_cells

ROOT = Path(__file__).parents[1]
ARGUMENTS = {
    "embed_pbmc.py": ["cells.h5ad", "geneformer-v2", "out.h5ad"],
    "tokenize_files.py": ["*.h5ad", "geneformer-v2", "tokens"],
    "own_vocabulary.py": ["cells.h5ad", "mine"],
    "predict_hidden_genes.py": ["cells.h5ad", "geneformer-v2"],
    "filter_cells.py": ["cells.h5ad", "checked.h5ad"],
    "stream_batches.py": ["*.h5ad", "geneformer-v2"],
    "tokenize_corpus.py": ["*.h5ad", "geneformer-v2", "tokens"],
    "pretrain.py": ["tokens", "geneformer-v2", "run"],
    "continue_pretraining.py": ["geneformer-v2", "new", "old", "tuned"],
    "finetune_cell_types.py": ["cells.h5ad", "geneformer-v2", "run"],
    "classify_genes.py": ["cells.h5ad", "geneformer-v2", "genes.csv", "run"],
    "multitask.py": ["cells.h5ad", "geneformer-v2", "run", "cell_type", "sex"],
    "lora.py": ["cells.h5ad", "geneformer-v2", "run"],
    "qlora.py": ["cells.h5ad", "geneformer-v2", "run"],
    "search_hyperparameters.py": ["cells.h5ad", "geneformer-v2", "run"],
    "deletion_scan.py": ["cells.h5ad", "geneformer-v2", "deleted.parquet", "deleted.png"],
    "goal_states.py": ["cells.h5ad", "geneformer-v2", "state", "a", "b", "overexpress", "towards"],
    "combinations.py": ["cells.h5ad", "geneformer-v2", "pairs.csv"],
    "screen_genes.py": ["cells.h5ad", "geneformer-v2", "screened.parquet"],
    "share_model.py": ["run/model", "lab/pbmc-types", "cells.h5ad"],
    "share_dataset.py": ["cells.h5ad", "geneformer-v2", "lab/tokens"],
    "load_published.py": ["cells.h5ad", "Geneformer-V1-10M", "geneformer-v1"],
    "cell_pipelines.py": ["cells.h5ad", "geneformer-v2"],
    "export_onnx.py": ["cells.h5ad", "geneformer-v2", "graphs"],
    "evaluate_checkpoints.py": ["cells.h5ad", "cell_type", "sex", "report", "geneformer-v2"],
    "genes_in_context.py": ["cells.h5ad", "geneformer-v2", "cell_type", "modules.h5ad"],
    "attention_regulators.py": ["cells.h5ad", "geneformer-v2", "factors.txt", "network.h5ad", "network.graphml"],
    "benchmark_checkpoints.py": ["table", "cell_type", "sex", "cells.h5ad", "geneformer-v2"],
    "transfer_task.py": ["dosage-sensitivity", "geneformer-v2", "cells.h5ad", "genes.csv", "run"],
    "affected_genes.py": ["cells.h5ad", "geneformer-v2", "affected.csv", "affected.png"],
}


@pytest.fixture
def folder(h5ad, model_folder, tmp_path):
    model_folder.rename(tmp_path / "geneformer-v2")
    return tmp_path


def run_process(code, folder, *arguments):
    done = subprocess.run([sys.executable, *code, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(code, folder, *arguments):
    """What `python *code *arguments` prints, without the seconds that a process takes to import."""
    kind, what = ("script", code[0]) if len(code) == 1 else (code[0], code[1])
    words = [str(argument) for argument in (*code[2:], *arguments)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        # A user's own process goes on after a warning; the tests' filters make errors of them.
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(what), *words])
        if kind == "-c":
            exec(compile(what, "<block>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            assert not ended.value.code, printed.getvalue()
        else:
            runpy.run_path(str(what), run_name="__main__")
    return printed.getvalue()


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(ARGUMENTS)


def test_embed_pbmc(folder):
    assert "30 cells, 16 dimensions" in run_process([ROOT / "examples" / "embed_pbmc.py"], folder, *ARGUMENTS["embed_pbmc.py"])
    assert anndata.read_h5ad(folder / "out.h5ad").obsm["X_geneformer"].shape == (30, 16)


def test_tokenize_files(folder):
    assert "30 cells -> tokens" in run([ROOT / "examples" / "tokenize_files.py"], folder, *ARGUMENTS["tokenize_files.py"])
    assert len(datasets.load_from_disk(str(folder / "tokens"))) == 30


def test_own_vocabulary(folder):
    assert "60 genes, medians of 30 cells" in run([ROOT / "examples" / "own_vocabulary.py"], folder, *ARGUMENTS["own_vocabulary.py"])
    assert len(GeneformerTokenizer.from_pretrained(folder / "mine").gene_table) == 60


def test_predict_hidden_genes(folder):
    printed = run([ROOT / "examples" / "predict_hidden_genes.py"], folder, *ARGUMENTS["predict_hidden_genes.py"])
    assert re.search(r"hidden: ENSG\d{11}\n(?:.+  [01]\.\d{4}\n){5}", printed)


def test_filter_cells(folder):
    coding = sorted(gene for gene, kind in human_genes().biotype_of.items() if kind == "protein_coding")[:60]
    make_cells(coding, 30).write_h5ad(folder / "cells.h5ad")
    assert "30 of 30 cells pass -> checked.h5ad" in run([ROOT / "examples" / "filter_cells.py"], folder, *ARGUMENTS["filter_cells.py"])
    assert anndata.read_h5ad(folder / "checked.h5ad").obs["filter_pass"].all()


def test_stream_batches(folder):
    printed = run([ROOT / "examples" / "stream_batches.py"], folder, *ARGUMENTS["stream_batches.py"])
    assert "resumed: 22 cells left, none of them seen: True" in printed


def test_tokenize_corpus(folder):
    assert "30 cells of 1 files -> tokens; 0 files skipped" in run([ROOT / "examples" / "tokenize_corpus.py"], folder, *ARGUMENTS["tokenize_corpus.py"])
    assert len(datasets.load_from_disk(str(folder / "tokens"))) == 30


def test_pretrain(folder):
    run([ROOT / "examples" / "tokenize_files.py"], folder, *ARGUMENTS["tokenize_files.py"])
    printed = run([ROOT / "examples" / "pretrain.py"], folder, *ARGUMENTS["pretrain.py"])
    assert re.search(r"held-out loss \d\.\d\d; gene frequency \d\.\d\d nats\nGeneformerForMaskedLM in run.model", printed)


def test_continue_pretraining(folder, tokenizer):
    for name, seed in (("new", 1), ("old", 2)):
        load_cells(make_cells(list(tokenizer.gene_table.ensembl_ids), 30, seed=seed), tokenizer=tokenizer, cache_dir=folder / "cache").save_to_disk(
            folder / name
        )
    printed = run([ROOT / "examples" / "continue_pretraining.py"], folder, *ARGUMENTS["continue_pretraining.py"])
    assert re.fullmatch(r"(?:(?:new|old): held-out loss \d\.\d{3} before, \d\.\d{3} after\n){2}", printed)


@pytest.fixture
def labelled(folder, tokenizer):
    """Cells with labels, and genes with classes."""
    genes = list(tokenizer.gene_table.ensembl_ids)
    cells = make_cells(genes, 60)
    cells.obs["sex"], cells.obs["donor_id"] = ["f", "m"] * 30, [f"d{i // 10}" for i in range(60)]
    cells.write_h5ad(folder / "cells.h5ad")
    (folder / "genes.csv").write_text("gene,class\n" + "".join(f"{gene},{'a' if i % 2 else 'b'}\n" for i, gene in enumerate(genes)))
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("finetune_cell_types.py", r"macro F1 [01]\.\d\d  this model\n(?:.*\n)*.*cell_type_predicted"),
        ("classify_genes.py", r"ROC AUC [01]\.\d\d over 60 genes  this model\n"),
        pytest.param(
            "multitask.py",
            r"cell_type: accuracy [01]\.\d\d\nsex: accuracy [01]\.\d\d\nGeneformerForMultiTaskClassification \{'cell_type'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lora.py",
            r"[\d,]+ of [\d,]+ parameters were trained\nembeddings \(60, 16\); a PeftModel\w*\nmerged with its base: run-merged",
            marks=pytest.mark.slow,
        ),
        pytest.param("qlora.py", r"nf4 .* MB .*\nint8 .*\nnone .*", marks=pytest.mark.slow),
        pytest.param("search_hyperparameters.py", r"(?:.*complete.*\n)(?:.*\n)+best \{.*\}, refitted in run.model", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning(labelled, name, expected):
    printed = run([ROOT / "examples" / name], labelled, *ARGUMENTS[name])
    assert re.search(expected, printed), printed


def test_the_how_to_of_fine_tuning(labelled):
    """Commands, YAML and Python of docs/finetuning.md, in their order."""
    text = (ROOT / "docs" / "finetuning.md").read_text()
    cells = anndata.read_h5ad(labelled / "cells.h5ad")
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.add_categories("unassigned")
    cells.obs.loc[cells.obs_names[:3], "cell_type"] = "unassigned"
    cells.write_h5ad(labelled / "cells.h5ad")
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (labelled / "run.yaml").write_text(settings)
    assert "macro f1" in run(["-m", "geneformer_hf", "finetune"], labelled, "--config", "run.yaml")
    run(["-m", "geneformer_hf", "predict"], labelled, "cells.h5ad", "--model", "run/model", "--output", "predicted.h5ad")
    assert "cell_type_predicted" in anndata.read_h5ad(labelled / "predicted.h5ad").obs
    tuned, plain = re.findall(r"```python\n(.*?)```", text, re.S)
    make_cells(list(cells.var_names), 60).write_h5ad(labelled / "cells.h5ad")
    assert "cell_type_entropy" in run(["-c", tuned + "\nprint(table.columns)"], labelled)
    run(["-c", plain], labelled)


@pytest.mark.slow
def test_the_how_tos_of_adapters_and_searching(labelled):
    text = (ROOT / "docs" / "adapters.md").read_text()
    commands = [line.split("  #")[0].split() for line in re.findall(r"```bash\n(.*?)```", text, re.S)[0].splitlines()]
    printed = [run(["-m", "geneformer_hf"], labelled, *words[1:]) for words in commands]
    assert re.search(r"LoRA adapter of .*geneformer-v2: rank 16 on all-linear; saved whole: classifier, pooler; 0\.\d MB\nTrained on plain weights", printed[1])
    assert (labelled / "adapted.csv").is_file()
    assert (labelled / "merged" / "model.safetensors").is_file()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "trainable params" in run(["-c", block], labelled)
    (settings,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "searching.md").read_text(), re.S)
    (labelled / "search.yaml").write_text(settings)
    assert "Best: " in run(["-m", "geneformer_hf", "search"], labelled, "--config", "search.yaml")


def test_the_how_to_of_genes(labelled):
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "classifying_genes.md").read_text(), re.S)[0].splitlines()
    for line in commands:
        run(["-m", "geneformer_hf"], labelled, *line.split("  #")[0].split()[1:])
    assert "gene_class_predicted" in anndata.read_h5ad(labelled / "genes.h5ad").var


@pytest.fixture
def in_two_states(folder):
    cells = anndata.read_h5ad(folder / "cells.h5ad")[:16].copy()
    cells.obs["state"] = ["a", "b"] * 8
    cells.write_h5ad(folder / "cells.h5ad")
    return folder


def test_deletion_scan(in_two_states):
    printed = run([ROOT / "examples" / "deletion_scan.py"], in_two_states, *ARGUMENTS["deletion_scan.py"])
    assert "16 cells of " in printed
    assert "Ensembl_ID Gene_name" in printed
    assert (in_two_states / "deleted.png").stat().st_size > 5000


def test_goal_states(in_two_states, tokenizer):
    known = list(tokenizer.gene_table.ensembl_ids)[:3]
    printed = run([ROOT / "examples" / "goal_states.py"], in_two_states, *ARGUMENTS["goal_states.py"], *known)
    assert re.search(r"\d+ genes; nearest to b: SYM", printed)
    assert re.search(r"\d of 3 known genes can be ranked; they stand above \d+% of the others", printed)
    assert {p.name for p in (in_two_states / "towards").iterdir()} == {"shifts.parquet", "ranking.csv", "ranking.png"}


def test_combinations(in_two_states, tokenizer):
    printed = run([ROOT / "examples" / "combinations.py"], in_two_states, *ARGUMENTS["combinations.py"], *list(tokenizer.gene_table.ensembl_ids)[:3])
    assert len(printed.splitlines()) == 1 + 3
    assert "excess" in (in_two_states / "pairs.csv").read_text()


def test_screen_genes(in_two_states):
    printed = run([ROOT / "examples" / "screen_genes.py"], in_two_states, *ARGUMENTS["screen_genes.py"])
    assert re.search(r"of 1 cells: rank correlation -?\d\.\d\d, \d+% of the exact top 10", printed)


def test_affected_genes(in_two_states, tokenizer):
    printed = run([ROOT / "examples" / "affected_genes.py"], in_two_states, *ARGUMENTS["affected_genes.py"], *list(tokenizer.gene_table.ensembl_ids)[:2])
    assert "Cosine_sim_mean" in printed
    assert (in_two_states / "affected.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "expected", "made"),
    [
        pytest.param(
            "evaluate_checkpoints.py",
            r"geneformer-v2 +0\.\d+ +0\.\d+ +0\.\d+ +0\.\d+\n(?:.*\n)*.*Overall: geneformer-v2",
            "report/report.html",
            marks=pytest.mark.slow,
        ),
        ("genes_in_context.py", r"(?: *SYM\d+ +\d+ +0\.\d+(?:.*)\n){5}module\n(?:.*\n)+ *all genes", "modules.h5ad"),
        ("attention_regulators.py", r"cell0: \d+ tokens; most attention goes to \S+\n.*auc_matched", "network.graphml"),
        pytest.param("benchmark_checkpoints.py", r"cells +geneformer-v2 +0\.\d+", "table/report.html", marks=pytest.mark.slow),
        ("transfer_task.py", r"Published: AUC 0\.914.*\nAUC [01]\.\d\d  this model", "run/model/report.html"),
    ],
)
def test_evaluating(labelled, name, expected, made):
    (labelled / "factors.txt").write_text("\n".join(f"SYM{i}" for i in range(20)))
    printed = run([ROOT / "examples" / name], labelled, *ARGUMENTS[name])
    assert re.search(expected, printed), printed
    assert (labelled / made).stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluation", "genes_in_context", "transfer_tasks"])
def test_the_how_tos_of_evaluating(labelled, name):
    """Commands, YAML and Python of three how-tos, in their order."""
    (labelled / "factors.txt").write_text("\n".join(f"SYM{i}" for i in range(20)))
    text = (ROOT / "docs" / f"{name}.md").read_text()
    for settings in re.findall(r"```yaml\n(.*?)```", text, re.S):
        (labelled / "benchmark.yaml").write_text(settings)
    lines = [line.split("  #")[0].split() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[0] == "geneformer-hf"]
    assert all(run(["-m", "geneformer_hf"], labelled, *words) for words in commands)
    outputs = [labelled / words[words.index("--output") + 1] for words in commands if "--output" in words]
    assert all((output / "report.html").is_file() or (output / "model" / "report.html").is_file() for output in outputs)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        run(["-c", block], labelled)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("from_helical", marks=pytest.mark.slow),
        "from_bionemo",
        "from_upstream",
        pytest.param("where_geneformer_stands", marks=pytest.mark.slow),
        "census",
    ],
)
def test_the_snippets_for_those_who_come_from_elsewhere(labelled, tokenizer, name):
    cells = anndata.read_h5ad(labelled / "cells.h5ad")
    if name == "from_upstream":
        load_cells(cells, tokenizer=tokenizer).remove_columns("cell_id").save_to_disk(labelled / "cells.dataset")
    if name == "census":
        import tiledbsoma.io

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiledbsoma.io.from_anndata(str(labelled / "experiment"), cells, measurement_name="RNA", X_layer_name="raw")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        run(["-c", block], labelled)


@pytest.mark.slow
def test_the_how_to_of_perturbation(labelled, tokenizer):
    """The commands and the Python of docs/perturbation.md, with genes and states of the test's own cells."""
    genes = list(tokenizer.gene_table.ensembl_ids)
    text = (ROOT / "docs" / "perturbation.md").read_text().replace("ENSG00000000001", genes[0]).replace("ENSG00000000002", genes[1])
    text = text.replace("--start B --goal T", "--start a --goal b")
    cells = anndata.read_h5ad(labelled / "cells.h5ad")[:12].copy()
    cells.obs["cell_type"] = ["a", "b"] * 6
    cells.write_h5ad(labelled / "cells.h5ad")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            run(["-m", "geneformer_hf"], labelled, *line.split()[1:])
    assert (labelled / "effects.png").stat().st_size > 5000
    assert "Shift_to_goal_end" in (labelled / "shifts.csv").read_text().splitlines()[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "fdr_paired" in run(["-c", block + "\nprint(*effects.columns)"], labelled)


def test_the_yaml_of_the_how_to(folder):
    """The first block of docs/pretraining.md, with a smaller shape, and the one that names datasets."""
    run(["-m", "geneformer_hf", "tokenize"], folder, "cells.h5ad", "--model", "geneformer-v2", "--output", "tokens")
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "pretraining.md").read_text(), re.S)
    (folder / "run.yaml").write_text(blocks[0].replace("held_out: 1000", "held_out: 5"))
    small = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}'
    printed = run(["-m", "geneformer_hf", "pretrain"], folder, "--config", "run.yaml", "--shape_overrides", small, "--max_steps", "2")
    assert "5 held-out cells" in printed
    for number, block in enumerate(blocks[1:]):
        (folder / f"{number}.yaml").write_text(block)
        assert read_config(folder / f"{number}.yaml", GeneformerPretrainingArguments)


def test_the_stream_of_the_how_to(folder):
    """The block of docs/large_corpora.md, on a dataset made by the command before it."""
    run(["-m", "geneformer_hf", "tokenize"], folder, "cells.h5ad", "--model", "geneformer-v2", "--output", "tokens")
    rows, batches = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "large_corpora.md").read_text(), re.S)
    assert run(["-c", rows.replace("...", "print(cell['cell_id'])")], folder).count("cell") == 90
    assert run(["-c", batches.replace("...", "print(len(batch['input_ids']))")], folder).split() == ["16", "14"]


def test_the_python_of_the_readme(folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    assert all(sum(bool(line) for line in block.splitlines()) <= 5 for block in blocks)
    run_process(["-c", blocks[0] + "\nimport numpy; numpy.save('a.npy', adata.obsm['X_geneformer'])"], folder)
    run_process(["-c", blocks[1] + "\nimport numpy; numpy.save('b.npy', embeddings)"], folder)
    np.testing.assert_allclose(np.load(folder / "a.npy"), np.load(folder / "b.npy"), atol=1e-5)
    assert np.isfinite(np.load(folder / "a.npy")).all()


def test_the_commands_of_the_readme_exist():
    from geneformer_hf.cli.main import COMMANDS

    first_columns = re.findall(r"^\| (`[`\w, ]+`) \|", (ROOT / "README.md").read_text(), re.M)
    named = {word for column in first_columns for word in re.findall(r"\w+", column)}
    assert named == {command.name for command in COMMANDS}


def test_links_between_documents_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
