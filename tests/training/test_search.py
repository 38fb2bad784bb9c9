"""Search: Trainer's own, by Optuna; pruned, gone on with, shared by processes; the best settings refitted."""

import builtins

import pandas as pd
import pytest
import yaml

from geneformer_hf import GeneformerFineTuningArguments, SearchSettings, search
from geneformer_hf.cli.main import main
from geneformer_hf.errors import CheckpointError, MissingExtraError, OutputExistsError, SettingError
from geneformer_hf.training.search_settings import read_search
from geneformer_hf.training.study import trials_table

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "freeze_layers": {"low": 0, "high": 2},
    "class_weights": ["none", "balanced"],
    "per_device_train_batch_size": {"low": 4, "high": 12, "step": 4},
}


@pytest.fixture
def arguments(base, tmp_path):
    def make(name="run", **more):
        usual = {
            "output_dir": str(tmp_path / name),
            "from_checkpoint": str(base),
            "label": ["cell_type"],
            "num_train_epochs": 2,
            "disable_tqdm": True,
            "baselines": False,
        }
        return GeneformerFineTuningArguments(**(usual | more))

    return make


def test_trials_are_run_the_best_is_refitted_and_all_is_written(arguments, labelled):
    found = search(arguments(), SearchSettings(space=SPACE, n_trials=5, pruner="none"), labelled)
    assert len(found.trials) == 5
    assert set(found.trials["state"]) == {"complete"}
    assert set(SPACE) <= set(found.trials.columns)
    assert found.trials["learning_rate"].between(1e-4, 3e-2).all()
    assert found.trials["per_device_train_batch_size"].isin([4, 8, 12]).all()
    assert found.value == found.trials["value"].max()
    best = found.trials.loc[found.trials["value"].idxmax()]
    assert found.best["learning_rate"] == pytest.approx(best["learning_rate"])
    assert {path.name for path in found.folder.iterdir()} >= {"trials.csv", "trials.png", "importances.png", "best.yaml", "study.journal", "search.json"}
    settings = yaml.safe_load((found.refitted.folder / "settings.yaml").read_text())
    assert settings["learning_rate"] == pytest.approx(found.best["learning_rate"])
    # What a trial saw is what the refit sees: the figure on the same validation cells is the one of the trial.
    figures = [e["eval_macro_f1"] for e in found.refitted.history["final"] if "eval_macro_f1" in e]
    assert found.value == pytest.approx(figures[-1], abs=1e-6)


@pytest.mark.slow
def test_what_a_trial_tries_reaches_the_model(arguments, labelled, monkeypatch):
    from geneformer_hf.training import finetuning

    seen = []
    start = finetuning.start_model

    def look(settings, *rest):
        seen.append((settings.freeze_layers, settings.class_weights, rest[1]["class_weights"] is not None))
        return start(settings, *rest)

    monkeypatch.setattr(finetuning, "start_model", look)
    space = {"freeze_layers": [0, 1, 2], "class_weights": ["none", "balanced"]}
    found = search(arguments(num_train_epochs=1), SearchSettings(space=space, n_trials=6, pruner="none", refit=False), labelled)
    tried = list(zip(found.trials["freeze_layers"], found.trials["class_weights"], found.trials["class_weights"] == "balanced", strict=True))
    # The first model is made before the first trial.
    assert seen[-6:] == tried
    assert len(set(tried)) > 1


@pytest.mark.slow
def test_a_search_goes_on_with_the_trials_that_are_missing(arguments, labelled):
    first = search(arguments(), SearchSettings(space=SPACE, n_trials=2, refit=False), labelled)
    more = search(arguments(), SearchSettings(space=SPACE, n_trials=4, refit=False), labelled)
    assert len(more.trials) == 4
    # Other values than before, not the same again.
    assert more.trials["learning_rate"].nunique() == 4
    pd.testing.assert_frame_equal(more.trials.head(2), first.trials, check_dtype=False)
    again = search(arguments(), SearchSettings(space=SPACE, n_trials=4, refit=False), labelled)
    pd.testing.assert_frame_equal(again.trials, more.trials)
    refitted = search(arguments(), SearchSettings(space=SPACE, n_trials=4), labelled)
    with pytest.raises(OutputExistsError, match=r"holds a model already\. Pass `overwrite: true`"):
        search(arguments(), SearchSettings(space=SPACE, n_trials=5), labelled)
    five = search(arguments(overwrite=True), SearchSettings(space=SPACE, n_trials=5), labelled)
    assert len(five.trials) == 5
    assert five.refitted.folder == refitted.refitted.folder
    with pytest.raises(CheckpointError, match=r"holds trials of another search: num_train_epochs is 3 and was 2"):
        search(arguments(num_train_epochs=3), SearchSettings(space=SPACE, n_trials=4, refit=False), labelled)


@pytest.mark.slow
def test_bad_trials_are_pruned(arguments, labelled):
    space = {"learning_rate": [1e-2, 1e-9]}
    found = search(arguments(num_train_epochs=6), SearchSettings(space=space, n_trials=14, refit=False), labelled)
    pruned = found.trials[found.trials["state"] == "pruned"]
    assert len(pruned)
    assert (pruned["learning_rate"] == 1e-9).all()
    assert (pruned["epochs"] < 6).all()


@pytest.mark.parametrize(
    ("search_settings", "message"),
    [
        ({}, "space is empty"),
        ({"space": {"lerning_rate": [1]}}, r"space: lerning_rate \(did you mean 'learning_rate'\?\) is no argument of finetune"),
        ({"space": {"learning_rate": {"low": 1}}}, r"learning_rate is .*; expected a list of values, or \{low, high\}"),
        ({"space": {"learning_rate": {"low": 2, "high": 1}}}, "learning_rate goes from 2 to 1; expected two numbers, the lower one first"),
        ({"space": {"learning_rate": {"low": "1e-5", "high": 1}}}, "learning_rate goes from '1e-5' to 1"),
        ({"space": {"learning_rate": {"low": 0.0, "high": 1, "log": True}}}, "in steps of a factor; expected a number above 0"),
        ({"space": {"learning_rate": []}}, "learning_rate has no values"),
        ({"space": {"test_share": [0.1, 0.2]}}, "test_share cannot be searched over"),
        ({"space": {"learning_rate": [1e-3]}, "n_trials": 0}, "n_trials is 0; expected a whole number above 0"),
        ({"space": {"learning_rate": [1e-3]}, "pruner": "x"}, "pruner is 'x'; expected median or hyperband or none"),
        ({"space": {"learning_rate": [1e-3]}, "trials": 3}, r"unknown setting trials \(did you mean 'n_trials'\?\)"),
    ],
)
def test_searches_that_cannot_be_made(search_settings, message):
    with pytest.raises(SettingError, match=message):
        read_search(search_settings, where="run.yaml")


def test_runs_that_cannot_be_searched(arguments, labelled):
    settings = SearchSettings(space={"learning_rate": [1e-3]}, n_trials=1)
    with pytest.raises(SettingError, match="n_folds: a search has one split"):
        search(arguments(n_folds=3), settings, labelled)
    with pytest.raises(SettingError, match="there are no validation cells to compare trials on"):
        search(arguments(validation_share=0.0), settings, labelled)
    with pytest.raises(SettingError, match="n_jobs is 2, and cells were given in memory"):
        search(arguments(), SearchSettings(space={"learning_rate": [1e-3]}, n_jobs=2), labelled)
    with pytest.raises(SettingError, match=r"run\.yaml: `search` is missing"):
        read_search(None, where="run.yaml")


@pytest.mark.parametrize(("package", "message"), [("optuna", "Searching needs Optuna"), ("ray", r"backend: ray needs Ray Tune.*geneformer-hf\[ray\]")])
def test_what_is_not_installed_is_named(arguments, labelled, monkeypatch, package, message):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=message):
        search(arguments(), SearchSettings(space={"learning_rate": [1e-3]}, n_trials=1, backend=package), labelled)


def test_the_command_prints_the_trials(base, labelled, tmp_path, capsys):
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    settings = {"output_dir": str(tmp_path / "run"), "from_checkpoint": str(base), "train_data": str(tmp_path / "cells.h5ad"), "label": "cell_type", "num_train_epochs": 1, "disable_tqdm": True,
                "baselines": False, "search": {"n_trials": 2, "space": {"learning_rate": {"low": 1.0e-3, "high": 1.0e-2}}}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["search", "--config", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "complete" in printed
    assert "Best: " in printed
    assert "report.html" in printed


def test_values_that_do_not_go_together_end_a_trial_and_not_the_search(arguments, labelled):
    space = {"freeze_layers": [2, 1], "learning_rate": [1e-3]}
    found = search(arguments(adapter="lora"), SearchSettings(space=space, n_trials=6, refit=False, seed=1), labelled)
    assert set(found.trials.loc[found.trials["freeze_layers"] == 2, "state"]) <= {"pruned"}
    assert set(found.trials.loc[found.trials["freeze_layers"] == 1, "state"]) <= {"complete", "pruned"}
    assert found.best["freeze_layers"] == 1


@pytest.fixture
def asked(tmp_path):
    """A study of which Ray asked for four trials."""
    from geneformer_hf.training.ray_trials import _Asked
    from geneformer_hf.training.study import open_study

    settings = SearchSettings(space={"learning_rate": [1e-3, 1e-2]}, backend="ray")
    found = _Asked(open_study(tmp_path, "maximize", settings), settings)
    for name in "abcd":
        assert found.values(name)["learning_rate"] in (1e-3, 1e-2)
    return found


def test_what_ray_reports_lies_in_the_study(asked):
    for name, value in zip("abcd", (0.5, 0.6, 0.7, 0.8), strict=True):
        assert not asked.worse(name, {"objective": value - 0.1, "global_step": 3})
        assert not asked.worse(name, {"objective": value, "global_step": 6})
        asked.ended(name, {"objective": value})
    asked.values("late")
    # The first evaluation is a free one; at the second, 0.2 is below the median of the four.
    assert not asked.worse("late", {"objective": 0.2, "global_step": 1})
    assert asked.worse("late", {"objective": 0.2, "global_step": 6})
    # Ray says so again of a trial it was told to stop.
    asked.ended("late", {"objective": 0.2})
    table = trials_table(asked.study)
    assert list(table["state"]) == ["complete"] * 4 + ["pruned"]
    assert list(table["value"])[:4] == [0.5, 0.6, 0.7, 0.8]
    assert list(table["epochs"]) == [2] * 5
    assert asked.n_ended == 5


def test_why_a_trial_failed_on_ray(asked):
    asked.failed("a", "Failure # 1\nTraceback (most recent call last):\ngeneformer_hf.errors.SettingError: freeze_layers is 2\n")
    asked.failed("b", "Traceback (most recent call last):\ngeneformer_hf.errors.TrainingDivergedError: loss is nan\n")
    asked.failed("c", "Traceback (most recent call last):\n  File x\nMemoryError: too large\n")
    asked.ended("d", {"objective": 1.0})
    assert list(trials_table(asked.study)["state"]) == ["pruned", "fail", "fail", "complete"]
    assert asked.failures == ["trial 2: MemoryError: too large"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_on_ray_are_kept_and_gone_on_with_without_it(arguments, labelled):
    """Two workers of a real cluster; one of the two values of freeze_layers cannot be had with an adapter."""
    shared = {"space": {"freeze_layers": [2, 1], "learning_rate": [1e-2]}, "refit": False, "seed": 1, "pruner": "none"}
    on_ray = search(arguments(adapter="lora"), SearchSettings(n_trials=4, n_jobs=2, backend="ray", **shared), labelled)
    frozen = on_ray.trials["freeze_layers"] == 2
    assert 0 < frozen.sum() < 4
    assert set(on_ray.trials.loc[frozen, "state"]) == {"pruned"}
    assert set(on_ray.trials.loc[~frozen, "state"]) == {"complete"}
    assert on_ray.best["freeze_layers"] == 1
    here = search(arguments(adapter="lora"), SearchSettings(n_trials=12, **shared), labelled)
    assert len(here.trials) == 12
    pd.testing.assert_frame_equal(here.trials[:4], on_ray.trials)
    # The same settings give the same figure, on Ray or not.
    assert here.trials.loc[here.trials["state"] == "complete", "value"].nunique() == 1
    assert (here.trials["state"][4:] == "complete").any()
