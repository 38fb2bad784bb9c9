"""What cannot be fine-tuned is refused before any work, with numbers and a remedy; nothing of a user is lost."""

import numpy as np
import pandas as pd
import pytest
import yaml

from geneformer_hf import GeneformerFineTuningArguments, load_cells
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CellFileError, CheckpointError, ColumnNotFoundError, OutputExistsError, SettingError, VocabularyMismatchError
from geneformer_hf.training.configs import parse_arguments, read_config, recipe_names, resolved
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "give label, a column of obs to predict, or gene_classes, a table of genes; one of them"),
        ({"gene_classes": "genes.csv"}, "give label, a column of obs to predict, or gene_classes"),
        ({"label": ["cell_type", "cell_type"]}, "label names a column twice"),
        ({"label": None, "gene_classes": "genes.csv", "group_column": "donor"}, "group_column is for cells, and gene_classes is about genes"),
        ({"problem_type": "regresion"}, r"problem_type is 'regresion'; expected .* \(did you mean 'regression'\?\)"),
        ({"problem_type": "regression", "class_weights": "balanced"}, "class_weights are for classes, and problem_type is regression"),
        ({"task_weights": {"cell_type": 2}}, "task_weights is for several columns of label"),
        ({"label": ["cell_type", "sex"], "task_weights": {"age": 2}}, "task_weights names 'age', which is not a column of label"),
        ({"label": ["cell_type", "sex"], "integrate": "donor"}, "integrate is for one column of classes"),
        ({"problem_type": "regression", "integrate": "donor"}, "integrate is for one column of classes"),
        ({"integrate": "cell_type"}, "integrate names 'cell_type', the column to predict; expected what it shall not depend on"),
        ({"integrate": "donor", "integration_weight": -1}, "integration_weight is -1; expected a number of at least 0"),
        ({"test_share": 1.0}, "test_share is 1.0; expected a share of at least 0 and below 1"),
        ({"n_folds": 1}, "n_folds is 1; expected a whole number of at least 2"),
        ({"n_folds": 3, "test_data": ["a.h5ad"]}, "n_folds makes the test cells itself"),
        ({"pooling": "max"}, "pooling is 'max'; expected first or mean or attention or cls"),
        ({"leave_out": {"cell_type": "B"}}, "leave_out: 'cell_type' has 'B'; expected a list of values"),
        ({"leave_out": "cell_type"}, "leave_out is 'cell_type'; expected names and values"),
        ({"rare_threshold": -1}, "rare_threshold is -1; expected a share below 1, or a number of cells"),
        ({"save_strategy": "steps"}, "load_best_model_at_end needs the same save_strategy and eval_strategy"),
    ],
)
def test_settings_that_contradict_each_other(change, message):
    with pytest.raises(SettingError, match=message):
        GeneformerFineTuningArguments(**({"output_dir": "run", "from_checkpoint": "m", "label": ["cell_type"]} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric_for_best_model": "f1"}, "metric_for_best_model 'f1' is not one of loss, macro_f1, accuracy, log_loss"),
        ({"keep_only": {"cell_type": ["B"]}}, r"column 'cell_type' holds 1 class \(B\) among \d+ cells to train on; a classifier needs two at least"),
        ({"leave_out": {"cell_type": ["Platelet"]}}, r"leave_out: no cell has cell_type 'Platelet'. Found: "),
        ({"leave_out": {"cell_type": ["B", "NK", "T"]}}, "no cell is left to train on: 120 cells left out"),
        ({"label": ["years"]}, "column .years. holds 120 different numbers in 120 cells, too many for classes. To predict numbers pass problem_type: regression"),
        ({"integrate": "donor", "keep_only": {"donor": ["d0"]}}, r"integrate: column 'donor' holds 1 value among \d+ cells to train on; expected two batches"),
        ({"group_column": "donor", "n_folds": 7}, "6 groups cannot be cut into 7 folds"),
        ({"label": ["cell_type"], "problem_type": "regression"}, "column 'cell_type' holds '.*' .120 of 120 values are no finite numbers."),
    ],
)  # fmt: skip
def test_cells_that_do_not_fit_the_settings(tune, change, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        tune(**change)
    assert not (tmp_path / "run" / "model").exists()


def test_a_column_that_is_not_there(tune, labelled, tokenizer):
    with pytest.raises(ColumnNotFoundError, match="celltype"):
        tune(label=["celltype"])
    with pytest.raises(ColumnNotFoundError, match="no column 'celltype'; found input_ids"):
        tune("other", cells=load_cells(labelled, tokenizer=tokenizer), label=["celltype"])


def test_labels_that_are_missing(tune, labelled):
    cells = labelled.copy()
    kinds = cells.obs["cell_type"].astype(object)
    kinds.iloc[5:9] = None
    cells.obs["cell_type"] = pd.Categorical(kinds)
    with pytest.raises(SettingError, match=r"4 of 120 cells have no cell_type \(the first: cell5\). Fill it in, or pass missing_labels: leave_out"):
        tune(cells=cells)
    found = tune("again", cells=cells, missing_labels="leave_out", num_train_epochs=1)
    assert found.figures["notes"][0] == "4 cells left out: no cell_type"
    assert pd.read_csv(found.folder / "splits.csv")["split"].isna().sum() == 4


def test_classes_of_one_cell(tune, labelled):
    cells = labelled.copy()
    kinds = cells.obs["cell_type"].astype(object)
    kinds.iloc[7] = "Platelet"
    cells.obs["cell_type"] = pd.Categorical(kinds)
    with pytest.raises(
        SettingError, match=r"1 of 4 classes have fewer than 3 cells, one for each side of the split: Platelet \(1\)\. Leave them out with rare_threshold: 3"
    ):
        tune(cells=cells)
    found = tune("again", cells=cells, rare_threshold=3, num_train_epochs=1)
    assert "1 cells left out: classes of fewer than 3 cells (rare_threshold 3): Platelet 1" in found.figures["notes"]
    assert found.model.config.id2label == {0: "B", 1: "NK", 2: "T"}


def test_a_class_that_says_it_is_missing_is_pointed_at(tune, labelled):
    cells = labelled.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"NK": "unassigned"})
    found = tune(cells=cells, num_train_epochs=1)
    assert any("leave_out: {cell_type: [unassigned]}" in note for note in found.figures["notes"])


def test_donors_on_both_sides_are_refused(tune, labelled):
    with pytest.raises(SettingError, match=r"\d of the values of 'donor' are among train cells and among test cells \(d\d, d\d"):
        tune(test_data=labelled[:40].copy(), group_column="donor")


def test_the_same_cells_twice(tune, labelled, tokenizer):
    cells = load_cells(labelled, tokenizer=tokenizer)
    with pytest.raises(SettingError, match="are the same cells; given twice"):
        tune(cells=cells, test_data=cells)


def test_tokens_and_tokenizers_of_other_models(tune, labelled, v1_tokenizer, tokenizer, tmp_path):
    with pytest.raises(VocabularyMismatchError):
        tune(cells=load_cells(labelled, tokenizer=v1_tokenizer))
    v1_tokenizer.save_pretrained(tmp_path / "v1")
    with pytest.raises(VocabularyMismatchError, match="Model and tokenizer do not belong together"):
        tune("other", tokenizer=str(tmp_path / "v1"))


def test_a_checkpoint_without_its_weights(tune, tokenizer, tmp_path):
    """An encoder of which weights are missing would begin at random, as the published multi-task module does."""
    from safetensors.torch import load_file, save_file

    from geneformer_hf import GeneformerForMaskedLM

    GeneformerForMaskedLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    weights = {key: w for key, w in load_file(tmp_path / "half" / "model.safetensors").items() if ".layer.2." not in key}
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 16 weights of its encoder: bert\.encoder\.layer\.2\."):
        tune(from_checkpoint=str(tmp_path / "half"))


def test_a_finished_run_is_kept(tune, tmp_path):
    first = tune(num_train_epochs=1)
    before = (first.folder / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="holds the model of a finished run"):
        tune(num_train_epochs=2)
    assert (first.folder / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    tune(num_train_epochs=2, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (first.folder / "model.safetensors").read_bytes() != before


def test_a_checkpoint_of_other_labels_is_refused(tune, labelled):
    from tests.training.test_finetuning import Stop

    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop(5)], **steps)
    shuffled = labelled.copy()
    shuffled.obs["cell_type"] = shuffled.obs["cell_type"].to_numpy()[np.random.default_rng(0).permutation(120)]
    with pytest.raises(CheckpointError, match=r"belongs to another run: .*labels is \w+ and was \w+"):
        tune(cells=shuffled, **steps)


def test_empty_and_damaged_inputs(tune, tmp_path, genes, labelled):
    with pytest.raises(CellFileError, match="does not exist"):
        tune(cells=False, train_data=[str(tmp_path / "gone.h5ad")])
    with pytest.raises(SettingError, match="No data: give `train_data`"):
        tune(cells=False)
    empty = labelled[:0].copy()
    with pytest.raises(CellFileError, match="none of 0 cells is left"):
        tune(cells=empty)


def test_the_command_line_says_it_without_a_traceback(base, labelled, tmp_path, capsys):
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    usual = ["finetune", "--from_checkpoint", str(base), "--train_data", str(tmp_path / "cells.h5ad"), "--output_dir", str(tmp_path / "run")]
    for arguments, message in (
        (["--label", "nothing"], "'nothing'"),
        (["--label", "cell_type", "--lerning_rate", "1"], "lerning_rate (did you mean 'learning_rate'?)"),
        (["--label", "cell_type", "--gene_classes", "x.csv"], "one of them"),
    ):
        assert main([*usual, *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_from_yaml_prints_the_comparison(base, labelled, tmp_path, capsys):
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    settings = {"from_checkpoint": str(base), "train_data": str(tmp_path / "cells.h5ad"), "label": "cell_type", "output_dir": str(tmp_path / "run"), "num_train_epochs": 1, "disable_tqdm": True,
                "leave_out": {"sex": ["m"]}, "learning_rate": 1e-2}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["finetune", "--config", str(tmp_path / "run.yaml"), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "logistic regression on expression of variable genes" in printed
    assert "report.html" in printed
    written = yaml.safe_load((tmp_path / "run" / "model" / "settings.yaml").read_text())
    assert written["seed"] == 3
    assert written["leave_out"] == {"sex": ["m"]}
    assert (
        resolved(parse_arguments(GeneformerFineTuningArguments, read_config(tmp_path / "run" / "model" / "settings.yaml", GeneformerFineTuningArguments)))
        == written
    )


def test_the_recipes_parse():
    for name in recipe_names(GeneformerFineTuningArguments):
        settings = read_config(name, GeneformerFineTuningArguments)
        task = {} if "label" in settings or "gene_classes" in settings else {"label": ["cell_type"]}
        assert parse_arguments(GeneformerFineTuningArguments, settings | task | {"output_dir": "out"}).command == "finetune"
    assert len(recipe_names(GeneformerFineTuningArguments)) >= 3
