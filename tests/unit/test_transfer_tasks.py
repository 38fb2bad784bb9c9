"""Published tasks as recipes: all of them read, what they need is said, and those that can run do."""

import json
import pickle

import numpy as np
import pytest
import yaml

from geneformer_hf import GeneformerFineTuningArguments, load_task, run_task, task_names
from geneformer_hf.cli.main import main
from geneformer_hf.data.labels import read_gene_classes
from geneformer_hf.errors import CellFileError, SettingError, UnsafePickleError
from geneformer_hf.transfer_tasks import CELLS, EMBEDDING, GENES
from tests.conftest import write
from tests.unit.test_evaluation import make_labelled

TASKS = {
    "batch-integration": EMBEDDING, "bivalent-promoters": GENES, "bivalent-promoters-unmethylated": GENES, "cell-annotation": CELLS, "differentiation": CELLS, "disease": CELLS,
    "dosage-sensitivity": GENES, "network-centrality": GENES, "tf-range": GENES, "tf-targets": GENES,
}  # fmt: skip
QUICK = {"num_train_epochs": 1, "disable_tqdm": True, "pooling": "mean", "baselines": False, "logging_steps": 50, "save_strategy": "no", "eval_strategy": "no"}


@pytest.fixture(scope="module")
def labelled(genes):
    return make_labelled(genes)


def test_every_published_task_is_there():
    assert {name: load_task(name).kind for name in task_names()} == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_says_what_it_needs_and_where_it_was_published(name):
    task = load_task(name)
    assert task.question.endswith("?")
    assert "Nature" in task.source
    assert "cells" in task.needs
    assert ("genes" in task.needs) == (task.kind == GENES)
    for need in task.needs.values():
        assert need.what
        assert need.format
        assert need.where
    if task.kind == CELLS:
        assert task.needs["cells"].label
    GeneformerFineTuningArguments(
        output_dir="x", from_checkpoint="y", train_data=["z"], **({"gene_classes": "g"} if task.kind == GENES else {"label": ["l"]}), **task.settings
    )


@pytest.mark.parametrize("name", TASKS)
def test_without_its_files_a_task_fails_with_what_it_needs(name, model_folder, tmp_path):
    task = load_task(name)
    with pytest.raises(SettingError) as caught:
        run_task(name, model_folder, output=tmp_path / "out")
    for need in task.needs.values():
        assert need.what in str(caught.value)
        assert need.format in str(caught.value)
        assert need.where in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused():
    with pytest.raises(SettingError, match="'promoters' is not one of the tasks batch-integration"):
        load_task("promoters")


def test_a_task_of_genes_is_learnt_with_two_thirds_of_the_layers_frozen(labelled, genes, model_folder, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"in": genes[:12], "out": genes[12:24]}))
    cells = write(labelled, tmp_path / "cells.h5ad")
    found = run_task(
        "dosage-sensitivity",
        model_folder,
        output=tmp_path / "out",
        cells=cells,
        genes=tmp_path / "classes.json",
        settings=QUICK | {"n_folds": 2, "pooling": None},
    )
    assert found.figures["folds"] == 2
    settings = (found.folder / "settings.yaml").read_text()
    assert "freeze_layers: 2" in settings
    assert "warmup_steps: 0.1" in settings
    assert (found.folder / "report.html").is_file()


def test_a_task_of_cells_takes_its_columns_from_the_recipe_or_the_user(labelled, model_folder, tmp_path, capsys):
    cells = write(labelled, tmp_path / "cells.h5ad")
    quick = [
        "--num_train_epochs",
        "1",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "--pooling",
        "mean",
        "--baselines",
        "false",
        "--save_strategy=no",
        "--eval_strategy",
        "no",
        "--learning_rate",
        "1e-3",
    ]
    arguments = [
        "task",
        "disease",
        "--model",
        str(model_folder),
        "--cells",
        str(cells),
        "--label",
        "cell_type",
        "--group",
        "donor",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, *quick, "--test_share", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "Published: accuracy 0.864" in printed
    settings = (tmp_path / "out" / "model" / "settings.yaml").read_text()
    assert "group_column: donor" in settings
    assert "test_share: 0.3" in settings
    assert yaml.safe_load(settings)["learning_rate"] == 0.001


def test_batch_integration_is_judged_without_training(labelled, model_folder, tmp_path, capsys):
    cells = write(labelled, tmp_path / "cells.h5ad")
    assert main(["task", "batch-integration", "--model", str(model_folder), "--cells", str(cells), "--output", str(tmp_path / "out"), "--pooling", "mean"]) == 0
    printed = capsys.readouterr().out
    assert "overall" in printed
    assert "Published: avg_bio 0.146" in printed
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_the_command_lists_tasks_and_tells_what_one_needs(capsys):
    assert main(["task"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TASKS)
    assert main(["task", "tf-range"]) == 0
    printed = capsys.readouterr().out
    assert "tf_regulatory_range.pickle" in printed
    assert "Published: AUC 0.74" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["nothing"], "is not one of the tasks", id="no_such_task"),
        pytest.param(["tf-range", "--cells", "x.h5ad"], "needs --model and --output as well", id="no_model"),
        pytest.param(["tf-range", "--model", "m", "--output", "o", "--cells", "x.h5ad"], "tf_regulatory_range.pickle", id="no_genes"),
        pytest.param(["cell-annotation", "--model", "m", "--output", "o", "--cells", "x", "--epochs", "3"], "unknown setting epochs", id="an_unknown_setting"),
        pytest.param(["cell-annotation", "--model", "m", "--output", "o", "--cells", "x", "--seed"], "seed: expected one argument", id="half_a_setting"),
    ],
)
def test_the_command_refuses_with_a_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["task", *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "-5"], "'-5' is not a whole number from 0"),
        (["--layer", "["], "invalid int value: '['"),
        (["--folds", "0"], "'0' is not a whole number above 0"),
        (["--pooling", "max"], "invalid choice: 'max'"),
    ],
)
def test_integration_takes_the_arguments_of_evaluate_and_no_others(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["task", "batch-integration", "--model", "m", "--output", "o", "--cells", "x", *words])
    printed = capsys.readouterr().err
    assert message in printed
    assert "geneformer-hf task batch-integration" in printed
    assert list(tmp_path.iterdir()) == []


def test_published_pickles_of_gene_classes_are_read(tmp_path):
    classes = {"long_range": ["ENSG00000000001"], "short_range": ["ENSG00000000002", "ENSG00000000003"]}
    (tmp_path / "classes.pickle").write_bytes(pickle.dumps(classes))
    assert read_gene_classes(tmp_path / "classes.pickle") == classes


def test_pickles_that_would_run_something_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "classes.pickle").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UnsafePickleError, match=r"builtins.print"):
        read_gene_classes(tmp_path / "classes.pickle")


def test_pickles_of_something_else_are_refused(tmp_path):
    (tmp_path / "numbers.pickle").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(CellFileError, match="other things than lists of genes"):
        read_gene_classes(tmp_path / "numbers.pickle")
    with pytest.raises(CellFileError, match="does not exist"):
        read_gene_classes(tmp_path / "none.pickle")


@pytest.mark.shared
def test_the_labels_of_the_shared_folder_fit_the_recipe(shared):
    classes = read_gene_classes(shared / "data" / "gene_labels" / "dosage_sensitivity_TFs.json")
    assert sorted(len(genes) for genes in classes.values()) == [122, 368]
    assert "122 dosage-sensitive and 368 insensitive" in load_task("dosage-sensitivity").needs["genes"].what
    assert np.unique([gene for genes in classes.values() for gene in genes]).size == 490
