"""Fine-tuning on a small corpus: every kind of label, with a real Trainer; what is written; the same numbers however the work is divided."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, Trainer, TrainerCallback, TrainingArguments

from geneformer_hf import GeneformerForSequenceClassification, embed_cells, load_cells, load_model, predict
from geneformer_hf.data.collators import DataCollatorForCells
from geneformer_hf.errors import CheckpointError, GeneformerError, SettingError
from geneformer_hf.training.outcomes import MODEL
from tests.tolerances import SAME_MODEL, TRAJECTORY
from tests.training.conftest import make_labelled


def losses(found, name="final"):
    return [float(entry["loss"]) for entry in found.history[name] if "loss" in entry]


def accuracy(found, head="cell_type", of=MODEL):
    return found.figures["heads"][head][of]["accuracy"]


def test_cell_types_are_learnt_and_told_in_sorted_order(tune, labelled):
    found = tune(validation_share=0.2, test_share=0.2, num_train_epochs=10)
    assert accuracy(found) > 0.9
    assert found.model.config.id2label == {0: "B", 1: "NK", 2: "T"}
    assert found.model.config.problem_type == "single_label_classification"
    table = found.predictions
    truth = labelled.obs["cell_type"].astype(str)
    assert len(table) == 24
    assert table["cell_type_true"].tolist() == truth.loc[table["cell_id"]].tolist()
    columns = [f"cell_type_probability_{name}" for name in ("B", "NK", "T")]
    np.testing.assert_allclose(table[columns].sum(axis=1), 1, atol=1e-6)
    assert (table["cell_type_predicted"] == table[columns].idxmax(axis=1).str.removeprefix("cell_type_probability_")).all()


def test_the_folder_holds_all_that_a_reader_needs(tune):
    found = tune(baselines=True, num_train_epochs=1)
    names = {path.name for path in found.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "gene_table.json", "README.md", "settings.yaml", "figures.json", "history.json", "report.html",
            "predictions.csv", "splits.csv", "per_class_cell_type.csv", "confusion_cell_type.csv", "confusion_cell_type.png", "roc_cell_type.png",
            "calibration_cell_type.png", "comparison_cell_type.png", "training.png"} <= names  # fmt: skip
    report = (found.folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 5
    assert "logistic regression on the untrained encoder" in report
    assert json.loads((found.folder / "figures.json").read_text())["heads"]["cell_type"][MODEL]["n"] == 12
    sides = pd.read_csv(found.folder / "splits.csv")["split"].value_counts().to_dict()
    assert sides == {"train": 96, "validation": 12, "test": 12}
    assert list(pd.read_csv(found.folder / "confusion_cell_type.csv", index_col=0).index) == ["B", "NK", "T"]
    # Nothing of this machine.
    assert str(found.folder.parent) not in (found.folder / "README.md").read_text() + report


def test_the_baselines_stand_on_the_same_cells(tune):
    found = tune(baselines=True, num_train_epochs=1).figures["heads"]["cell_type"]
    assert list(found) == [MODEL, "majority class", "logistic regression on expression of variable genes", "nearest neighbours on PCA of expression",
                           "logistic regression on the checkpoint, not fine-tuned", "logistic regression on the untrained encoder"]  # fmt: skip
    assert {one["n"] for one in found.values()} == {12}
    assert found["logistic regression on expression of variable genes"]["accuracy"] == 1.0
    assert found["majority class"]["roc_auc"] == 0.5


def test_baselines_of_folds_in_which_not_the_same_genes_vary(tune, labelled):
    """A gene of one cell varies in the folds that train on that cell alone."""
    cells = labelled.copy()
    counts = cells.X.toarray()
    counts[:, -1] = 0
    counts[7, -1] = 9
    cells.X = sp.csr_matrix(counts)
    found = tune(cells=cells, n_folds=2, num_train_epochs=1, baselines=True).figures["heads"]["cell_type"]
    assert {one["n"] for one in found.values()} == {120}


def test_auto_classes_and_plain_trainer(tune, labelled, tokenizer, base, tmp_path):
    """The same with transformers' own Trainer, a dataset and our collator."""
    found = tune()
    again = AutoModelForSequenceClassification.from_pretrained(found.folder)
    assert isinstance(again, GeneformerForSequenceClassification)
    cells = load_cells(labelled, tokenizer=tokenizer, obs=["cell_type"]).rename_column("cell_type", "labels")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pooling="mean")
    arguments = TrainingArguments(str(tmp_path / "plain"), remove_unused_columns=False, num_train_epochs=5, learning_rate=1e-2, per_device_train_batch_size=8,
                                  report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", dataloader_pin_memory=False)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=cells, data_collator=DataCollatorForCells(tokenizer))
    trainer.train()
    logits, labels, _ = trainer.predict(cells)
    assert (logits.argmax(1) == labels).mean() > 0.9


def test_several_heads(tune, labelled):
    cells = labelled.copy()
    # Cells may lack a label of one head or the other.
    kinds, sexes = cells.obs["cell_type"].astype(object), cells.obs["sex"].astype(object)
    kinds.iloc[::7], sexes.iloc[3::7] = None, None
    cells.obs["cell_type"], cells.obs["sex"] = pd.Categorical(kinds), pd.Categorical(sexes)
    found = tune(
        cells=cells,
        label=["cell_type", "sex"],
        pooling="attention",
        task_weights={"cell_type": 2.0},
        class_weights="balanced",
        test_share=0.2,
        num_train_epochs=10,
        use_cpu=True,
    )
    again = load_model(found.folder)
    config = again.config
    assert config.task_labels == {"cell_type": ["B", "NK", "T"], "sex": ["f", "m"]}
    assert (config.pooling, config.task_weights) == ("attention", {"cell_type": 2.0})
    assert len(config.task_class_weights["cell_type"]) == 3
    assert type(AutoModelForSequenceClassification.from_pretrained(found.folder)) is type(again)
    assert accuracy(found) > 0.9
    n = found.predictions["cell_type_true"].ne("").sum()
    assert found.figures["heads"]["cell_type"][MODEL]["n"] == n < len(found.predictions)


def test_pretrained_weights_are_loaded_by_every_class(base, tune, labelled):
    """The published multi-task module begins with random weights instead."""
    theirs = load_file(base / "model.safetensors")
    for settings in ({}, {"label": ["cell_type", "sex"]}, {"gene_classes": {"a": list(labelled.var_names[:20]), "b": list(labelled.var_names[20:])}}):
        found = tune("run" + "".join(settings), learning_rate=0.0, num_train_epochs=1, **settings)
        weights = found.model.cpu().state_dict()
        for name, tensor in theirs.items():
            if name.startswith("bert."):
                assert torch.equal(weights[name], tensor), name


def test_labels_that_hold_together(tune):
    found = tune(label=["is_lymphoid", "is_t"], problem_type="multi_label_classification", test_share=0.2, num_train_epochs=15)
    figures = found.figures["heads"]["is_lymphoid+is_t"][MODEL]
    assert figures["macro_f1"] > 0.85
    assert found.model.config.id2label == {0: "is_lymphoid", 1: "is_t"}


def test_numbers_are_told_in_their_own_units(tune):
    found = tune(label=["age"], problem_type="regression", test_share=0.2, num_train_epochs=8)
    assert found.figures["heads"]["age"][MODEL]["r2"] > 0.7
    assert found.predictions["age_predicted"].mean() == pytest.approx(found.predictions["age_true"].mean(), abs=8)
    assert found.model.config.label_scale[0] == pytest.approx(16, abs=3)


def test_folds_test_every_cell_once_and_the_model_is_trained_on_all(tune, labelled):
    found = tune(n_folds=3, num_train_epochs=2, baselines=True)
    assert sorted(found.predictions["cell_id"]) == sorted(labelled.obs_names)
    figures = found.figures["heads"]["cell_type"]
    assert all(len(one["folds"]) == 3 for one in figures.values())
    assert figures[MODEL]["accuracy"] == pytest.approx(np.mean([fold["accuracy"] for fold in figures[MODEL]["folds"]]), abs=0.01)
    assert len([e for e in found.history["final"] if "loss" in e]) == 30
    assert not list(found.folder.parent.glob("fold-*/checkpoint-*"))


def test_genes_are_tested_where_none_of_them_was_learnt(tune, labelled, tokenizer):
    """Genes of the first twenty against the others, of which cells of one type express most; a rank tells nothing."""
    classes = {"first": list(labelled.var_names[:20]), "other": [*labelled.var_names[20:50], "SYM51", "ENSG99999999999"]}
    found = tune(gene_classes=classes, n_folds=5, num_train_epochs=3, baselines=True)
    assert sorted(found.predictions["ensembl_id"]) == sorted([*labelled.var_names[:50], labelled.var_names[51]])
    assert found.predictions["fold"].value_counts().between(10, 11).all()
    assert (found.predictions["n_cells"] > 20).all()
    assert found.figures["notes"][-1].startswith("1 genes of given are not in the vocabulary: ENSG99999999999")
    figures = found.figures["heads"]["gene_class"]
    assert list(figures) == [MODEL, "majority class", "logistic regression on expression level"]
    each = found.figures["per_occurrence"]
    assert each["n"] == int(found.predictions["n_cells"].sum())
    assert len(each["auc_of_folds"]) == 5
    assert each["mean_auc_plain"] == pytest.approx(np.mean(each["auc_of_folds"]))
    model = AutoModelForTokenClassification.from_pretrained(found.folder)
    assert model.config.id2label == {0: "first", 1: "other"}


def test_training_genes_alone_have_labels(tune, labelled):
    """Of the genes to be tested no label reaches the loss."""
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.extend(batch["input_ids"][batch["labels"] >= 0] for batch in train_dataloader)

    classes = {"a": list(labelled.var_names[:20]), "b": list(labelled.var_names[20:])}
    found = tune(gene_classes=classes, num_train_epochs=1, test_share=0.25, callbacks=[Look()])
    sides = pd.read_csv(found.folder / "splits.csv").set_index("ensembl_id")
    tokens = torch.cat(seen).unique().tolist()
    trained = {labelled.var_names[token - 4] for token in tokens}
    assert trained == set(sides.index[sides["split"] == "train"])
    assert len(found.predictions) == 15


@pytest.mark.parametrize("settings", [{"batch_layout": "padded"}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"per_device_eval_batch_size": 1}],
                         ids=["padded", "accumulated", "evaluated_one_by_one"])  # fmt: skip
@pytest.mark.parametrize(
    "kind", [{}, {"label": ["cell_type", "sex"], "pooling": "mean"}, {"label": ["age"], "problem_type": "regression"}], ids=["classes", "heads", "numbers"]
)
def test_losses_do_not_depend_on_how_the_work_is_divided(tune, settings, kind):
    first = tune("first", num_train_epochs=1, learning_rate=1e-3, **kind)
    other = tune("other", num_train_epochs=1, learning_rate=1e-3, **kind, **(settings | ({"group_by_length": False} if "batch_layout" in settings else {})))
    np.testing.assert_allclose(losses(first), losses(other), rtol=TRAJECTORY, atol=TRAJECTORY)
    numbers = [c for c in first.predictions if "probability" in c or c.endswith("_predicted")]
    for column in numbers:
        if first.predictions[column].dtype == float:
            np.testing.assert_allclose(first.predictions[column], other.predictions[column], atol=10 * SAME_MODEL, rtol=1e-4)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings", [{}, {"adapter": "lora"}, pytest.param({"label": ["cell_type", "sex"]}, marks=pytest.mark.slow)], ids=["whole", "lora", "heads"]
)
def test_stopped_and_called_again_it_ends_with_the_same_bytes(tune, settings, tmp_path):
    settings = settings | {"dropout": 0.1, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    whole = tune("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune("parted", callbacks=[Stop(13)], **settings)
    assert not (tmp_path / "parted" / "model").exists()
    parted = tune("parted", **settings)
    name = "adapter_model.safetensors" if "adapter" in settings else "model.safetensors"
    ours, theirs = load_file(parted.folder / name), load_file(whole.folder / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    pd.testing.assert_frame_equal(parted.predictions, whole.predictions)


@pytest.mark.slow
def test_finished_folds_are_not_run_again(tune, tmp_path):
    whole = tune("whole", n_folds=3, num_train_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        tune("parted", n_folds=3, num_train_epochs=1, callbacks=[StopInFold("fold-2")])
    before = (tmp_path / "parted" / "fold-1" / "test.npz").stat().st_mtime_ns
    parted = tune("parted", n_folds=3, num_train_epochs=1)
    assert (tmp_path / "parted" / "fold-1" / "test.npz").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(parted.predictions, whole.predictions)
    assert parted.figures["heads"] == whole.figures["heads"]


class StopInFold(TrainerCallback):
    def __init__(self, fold):
        self.fold = fold

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.fold) and state.global_step == 3:
            raise KeyboardInterrupt


def test_class_weights_and_numbers_of_cells(tune, labelled, caplog):
    found = tune(class_weights="balanced", max_cells_per_class=20, num_train_epochs=1)
    assert "60 cells left out: over 20 of their class (max_cells_per_class), drawn by seed 42" in found.figures["notes"]
    assert found.model.config.class_weights == pytest.approx([1.0, 1.0, 1.0], abs=0.1)
    again = tune("again", class_weights="balanced", max_cells_per_class=20, num_train_epochs=1)
    pd.testing.assert_frame_equal(found.predictions, again.predictions)


def test_the_first_layers_stand_still(tune, base):
    found = tune(freeze_layers=1, freeze_embeddings=True, num_train_epochs=1)
    theirs, ours = load_file(base / "model.safetensors"), found.model.cpu().state_dict()
    for name, tensor in theirs.items():
        if name.startswith(("bert.embeddings.", "bert.encoder.layer.0.")):
            assert torch.equal(ours[name], tensor), name
    assert not torch.equal(ours["bert.encoder.layer.1.output.dense.weight"], theirs["bert.encoder.layer.1.output.dense.weight"])


def test_other_files_to_choose_and_to_test_by(tune, genes):
    found = tune(validation_data=make_labelled(genes, 30, seed=1), test_data=make_labelled(genes, 40, seed=2), num_train_epochs=10)
    sides = pd.read_csv(found.folder / "splits.csv")["split"].value_counts().to_dict()
    assert sides == {"train": 120, "validation": 30, "test": 40}
    assert accuracy(found) > 0.9


def test_labels_of_the_test_that_nobody_was_taught(tune, genes):
    strange = make_labelled(genes, 40, seed=2)
    strange.obs["cell_type"] = strange.obs["cell_type"].cat.rename_categories({"NK": "Neutrophil"})
    found = tune(test_data=strange, num_train_epochs=1)
    n = int((strange.obs["cell_type"] == "Neutrophil").sum())
    assert f"{n} validation or test cells have a cell_type that no training cell has, and cannot be scored: Neutrophil" in found.figures["notes"]
    assert len(found.predictions) == 40 - n


def test_a_classifier_is_fine_tuned_for_other_classes(tune):
    first = tune("first", num_train_epochs=1)
    second = tune("second", from_checkpoint=str(first.folder), label=["sex"], num_train_epochs=1)
    assert second.model.config.id2label == {0: "f", 1: "m"}
    assert "classifier.weight" in load_file(second.folder / "model.safetensors")


def test_donors_are_wholly_on_one_side(tune, labelled):
    found = tune(group_column="donor", test_share=0.2, num_train_epochs=1)
    sides = pd.read_csv(found.folder / "splits.csv")
    sides["donor"] = labelled.obs["donor"].astype(str).to_numpy()
    assert (sides.groupby("donor")["split"].nunique() == 1).all()
    assert set(sides["split"]) == {"train", "validation", "test"}


def test_contrast_draws_cells_of_a_class_together_across_batches(tune, labelled):
    """The cells of one batch express twenty genes more."""
    cells = labelled.copy()
    cells.obs["batch"] = ["x", "y"] * 60
    counts = cells.X.toarray()
    counts[::2, -20:] += np.random.default_rng(0).poisson(6.0, (60, 20))
    cells.X = sp.csr_matrix(counts)
    kind, batch = (cells.obs[name].astype(str).to_numpy() for name in ("cell_type", "batch"))
    same, across = kind[:, None] == kind, batch[:, None] != batch
    apart = {}
    for weight in (0.0, 3.0):
        found = tune(f"weight{weight}", cells=cells, integrate="batch", integration_weight=weight, num_train_epochs=6, pooling="mean", learning_rate=3e-3)
        assert list(found.figures["heads"]) == ["cell_type"]
        assert load_model(found.folder).config.integrate == "batch"
        vectors = embed_cells(found.folder, cells, layer=-1, pooling="mean", progress=False)
        centred = vectors - vectors.mean(axis=0)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        likeness = unit @ unit.T
        apart[weight] = likeness[same & ~across].mean() - likeness[same & across].mean()
    assert apart[3.0] < 0.7 * apart[0.0]
    frame = predict(found.folder, cells, progress=False).to_frame()
    assert set(frame["cell_type_predicted"]) <= set(kind)


def test_the_loss_of_an_evaluation_holds_no_contrast(tune):
    """Which cells come together in a batch is chance, so it would depend on the size of batches."""
    losses = [
        [e["eval_loss"] for e in tune(f"by{size}", integrate="sex", num_train_epochs=1, per_device_eval_batch_size=size).history["final"] if "eval_loss" in e]
        for size in (3, 32)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_model_of_one_head_is_made_of_one_of_several(tune, labelled):
    """What the configuration says of the heads before does not hold any more."""
    several = tune("several", label=["cell_type", "sex"], num_train_epochs=1, task_weights={"sex": 0.5}, class_weights="balanced")
    one = tune("one", from_checkpoint=str(several.folder), label=["donor"], num_train_epochs=1)
    config = load_model(one.folder).config
    assert (config.task_labels, config.task_weights, config.task_class_weights) == (None, None, None)
    frame = predict(one.folder, labelled, progress=False).to_frame()
    assert set(frame["donor_predicted"]) <= {f"d{i}" for i in range(6)}
    genes = tune(
        "genes", from_checkpoint=str(several.folder), gene_classes={"a": list(labelled.var_names[:20]), "b": list(labelled.var_names[20:])}, num_train_epochs=1
    )
    assert predict(genes.folder, labelled, progress=False).names == ["a", "b"]


def test_a_column_named_like_one_of_ours_is_the_users(tune, labelled):
    cells = labelled.copy()
    cells.obs["length"] = np.linspace(1000, 5000, 120)
    found = tune(cells=cells, label=["length"], problem_type="regression", num_train_epochs=1)
    rows = found.predictions["row"].to_numpy()
    np.testing.assert_allclose(found.predictions["length_true"], cells.obs["length"].to_numpy()[rows], rtol=1e-5)


def test_what_files_leave_out_is_in_report_and_card(tune, labelled):
    cells = labelled.copy()
    cells.obs["filter_pass"] = [0] * 10 + [1] * 110
    counts = cells.X.toarray()
    counts[20:25] = 0
    cells.X = sp.csr_matrix(counts)
    found = tune(cells=cells, num_train_epochs=1)
    assert found.figures["notes"][:2] == [
        "10 cells of the files are not among these: filter_pass is 0",
        "5 cells of the files are not among these: they hold no gene of the vocabulary",
    ]
    for name in ("report.html", "README.md"):
        assert "filter_pass is 0" in (found.folder / name).read_text()


def test_names_that_are_hard_on_files_and_pictures(tune, labelled):
    cells = labelled.copy()
    cells.obs["a/b"] = cells.obs["cell_type"].cat.rename_categories({"B": r"a$\foo$", "NK": "<b>", "T": "T" * 80})
    cells.obs["a b"], cells.obs["x" * 260] = cells.obs["sex"].to_numpy(), cells.obs["sex"].to_numpy()
    found = tune(cells=cells, label=["a/b", "a b", "x" * 260], num_train_epochs=1)
    assert len(list(found.folder.glob("confusion_*.png"))) == len(list(found.folder.glob("per_class_*.csv"))) == 3
    report = (found.folder / "report.html").read_text()
    assert "&lt;b&gt;" in report
    assert "<b>" not in report
    adata = cells.copy()
    predict(found.folder, adata, progress=False).add_to(adata)
    assert "a_b_probabilities" in adata.obsm


def test_the_same_file_cannot_teach_and_test(tune, labelled, tmp_path):
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    path = str(tmp_path / "cells.h5ad")
    with pytest.raises(SettingError, match="are the same cells; given twice"):
        tune(cells=path, test_data=path)


def test_one_label_by_itself_and_few_numbers(tune, labelled):
    found = tune(label=["is_t"], problem_type="multi_label_classification", num_train_epochs=1)
    (row,) = found.figures["heads"]["is_t"][MODEL]["per_class"]
    assert (row["class"], row["n"]) == ("is_t", int(found.predictions["is_t_true"].sum()))
    few = tune("few", cells=labelled[:12].copy(), label=["age"], problem_type="regression", num_train_epochs=1)
    assert few.figures["heads"]["age"][MODEL]["n"] == 1


def test_resuming_with_another_figure_for_the_best_epoch_is_refused(tune):
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop(30)], metric_for_best_model="loss")
    with pytest.raises(CheckpointError, match=r"metric_for_best_model is eval_macro_f1 and was eval_loss"):
        tune(metric_for_best_model="macro_f1")


def test_overwriting_folds_makes_them_anew_and_keeps_them(tune, tmp_path):
    tune(n_folds=2, num_train_epochs=1)
    before = (tmp_path / "run" / "fold-1" / "test.npz").stat().st_mtime_ns
    tune(n_folds=2, num_train_epochs=1, overwrite=True)
    assert (tmp_path / "run" / "fold-1" / "test.npz").stat().st_mtime_ns > before
    assert {path.name for path in (tmp_path / "run").glob("fold-*")} == {"fold-1", "fold-2"}


def test_donors_behind_the_figures_are_told(tune):
    found = tune(group_column="donor", num_train_epochs=1)
    notes = " ".join(found.figures["notes"])
    assert "donor: 4 to train" in notes
    assert "the test rests on one donor" in notes
    assert "donor" in pd.read_csv(found.folder / "splits.csv").columns


@pytest.mark.parametrize("folds", [None, 2], ids=["split", "folds"])
@pytest.mark.parametrize(
    "wrong", [{"label": ["nothing"]}, {"freeze_layers": 9}, {"metric_for_best_model": "f1", "validation_share": 0.2}], ids=["column", "layers", "figure"]
)
def test_overwriting_with_settings_that_cannot_be_used_keeps_the_model(tune, folds, wrong):
    first = tune(num_train_epochs=1, n_folds=folds)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    with pytest.raises(GeneformerError):
        tune(num_train_epochs=1, n_folds=folds, overwrite=True, **wrong)
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before


def test_the_sides_of_the_split_are_made_alike_and_the_tests_shown(tune):
    found = tune(balance_columns=["years", "sex"], split_trials=30, num_train_epochs=1)
    report = (found.folder / "report.html").read_text()
    assert "rank-sum" in report
    assert "chi-square" in report
    one = tune("one", balance_columns=["years", "sex"], split_trials=1, num_train_epochs=1)
    tests = [set(run.predictions["row"]) for run in (found, one)]
    assert tests[0] != tests[1]
    folds = tune("folds", balance_columns=["years"], n_folds=2, num_train_epochs=1)
    assert "<th>fold</th><th>column</th>" in (folds.folder / "report.html").read_text()
