"""Hyperparameter search: `Trainer.hyperparameter_search` with Optuna, resumable, in parallel, the best run refitted."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..data.labelled import TEST, TRAIN, VALIDATION
from ..errors import CheckpointError, MissingExtraError, OutputExistsError, SettingError, TrainingDivergedError
from ..input_files import read_json_object
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import require_apart
from ..reports.csv_files import write_csv
from ..reports.search_plots import plot_importances, plot_trials
from .arguments import GeneformerFineTuningArguments
from .checkpointing import MODEL_FOLDER
from .configs import resolved
from .finetuning import FineTuningRun, finetune, settle
from .preparing import Prepared, prepare
from .ray_trials import require_ray, run_in_ray
from .search_settings import SearchSettings
from .starting import open_tokenizer
from .study import FOLDER, n_done, open_study, require_optuna, trials_table
from .trials import run_in_processes, run_trials

logger = logging.getLogger(__name__)


@dataclass
class SearchRun:
    """What `search` returns."""

    folder: Path
    trials: pd.DataFrame
    """A line for each trial: number, state, figure, settings, duration."""
    best: dict[str, Any]
    """Settings of the best trial."""
    value: float
    refitted: FineTuningRun | None = field(default=None)


def search(
    arguments: GeneformerFineTuningArguments,
    settings: SearchSettings,
    train_data: Any = None,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    tokenizer: GeneformerTokenizer | None = None,
) -> SearchRun:
    """Look for the settings that do best on validation cells, then fine-tune with them and test.

    Test cells are never looked at by a trial. Stopped or killed, the same call goes on with the trials that are missing.

    Args:
        arguments (`GeneformerFineTuningArguments`): what all trials share.
        settings (`SearchSettings`)
        train_data, validation_data, test_data, tokenizer: as in `finetune`; with several jobs they must be in files.

    Returns:
        `SearchRun`; table and pictures of the trials lie in `output_dir/search`, the refitted model in `output_dir/model`.

    Raises:
        SettingError, MissingExtraError, CheckpointError
    """
    folder = Path(str(arguments.output_dir)) / FOLDER
    if arguments.n_folds:
        msg = "n_folds: a search has one split, so that trials are compared on the same validation cells; cross-validate the best settings afterwards with finetune."
        raise SettingError(msg)
    require_optuna()
    if settings.backend == "ray":
        require_ray()
    _require_free(arguments, settings)
    # Not locked: the same command in other shells takes part in the search.
    folder.mkdir(parents=True, exist_ok=True)
    given = {TRAIN: train_data, VALIDATION: validation_data, TEST: test_data}
    in_memory = [cells for cells in given.values() if cells is not None and not isinstance(cells, (str, Path, list))]
    if settings.n_jobs > 1 and in_memory and settings.backend != "ray":
        msg = f"n_jobs is {settings.n_jobs}, and cells were given in memory, which other processes do not see. Give files (train_data=[path])."
        raise SettingError(msg)
    tokenizer = tokenizer or open_tokenizer(arguments)
    prepared = prepare(arguments, tokenizer, given)
    metric, direction = _objective_of(arguments, settings, prepared)
    _require_same_search(folder, arguments, settings, metric, overwrite=arguments.overwrite)
    study = open_study(folder, direction, settings)
    missing = settings.n_trials - n_done(study)
    logger.warning("%s trials in all, %s to go. Figure: %s of validation cells.", settings.n_trials, max(missing, 0), metric)
    if missing > 0 and settings.backend == "ray":
        run_in_ray(arguments, settings, prepared, missing)
    elif missing > 0 and settings.n_jobs == 1:
        run_trials(arguments, settings, prepared, missing)
    elif missing > 0:
        run_in_processes(arguments, settings, given, tokenizer, missing)
    study = open_study(folder, direction, settings)
    trials = trials_table(study)
    write_csv(trials, folder / "trials.csv", index=False)
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not finished:
        msg = f"no trial of {len(study.trials)} came to its end; see {folder / 'trials.csv'}. Try other settings, or pruner: none."
        raise TrainingDivergedError(msg)
    _draw(study, folder, metric, settings.space)
    best = dict(study.best_trial.params)
    (folder / "best.yaml").write_text(
        yaml.safe_dump({k: v for k, v in resolved(_with(arguments, best)).items() if k != "output_dir"}, sort_keys=True, allow_unicode=True), encoding="utf-8"
    )
    found = SearchRun(folder, trials, best, float(study.best_value))
    if settings.refit:
        found.refitted = finetune(_with(arguments, best), train_data, validation_data=validation_data, test_data=test_data, tokenizer=tokenizer)
    return found


def _objective_of(arguments: GeneformerFineTuningArguments, settings: SearchSettings, prepared: Prepared) -> tuple[str, str]:
    """Return the figure that is searched by, and its direction."""
    mine = copy.copy(arguments)
    if settings.metric is not None:
        mine.metric_for_best_model, mine.greater_is_better = settings.metric, None
    if not len(prepared.splits[0].validation):
        msg = "there are no validation cells to compare trials on. Set validation_share, for instance to 0.1, or give validation_data."
        raise SettingError(msg)
    settle(mine, prepared.task, prepared.splits[0])
    return str(mine.metric_for_best_model), "maximize" if mine.greater_is_better else "minimize"


def _require_free(arguments: GeneformerFineTuningArguments, settings: SearchSettings) -> None:
    """Raise, before any trial, if the refitted model would find its place taken.

    Raises:
        OutputExistsError
    """
    data = [*(arguments.train_data or []), *(arguments.validation_data or []), *(arguments.test_data or [])]
    require_apart(Path(str(arguments.output_dir)), [*data, arguments.from_checkpoint, arguments.tokenizer])
    model = Path(str(arguments.output_dir)) / MODEL_FOLDER
    if settings.refit and model.exists() and not arguments.overwrite:
        msg = f"{model} holds a model already. Pass `overwrite: true` (--overwrite) to replace it when the search is done (trials are kept), or refit: false."
        raise OutputExistsError(msg)


def _require_same_search(folder: Path, arguments: GeneformerFineTuningArguments, settings: SearchSettings, metric: str, *, overwrite: bool) -> None:
    """Raise if the folder holds trials of another search, or remove them where they may be overwritten; note down what this one is.

    Raises:
        CheckpointError
    """
    ignored = {"n_trials", "n_jobs", "backend", "refit"}
    known = {name: value for name, value in vars(settings).items() if name not in ignored} | {"metric": metric}
    ours = json.loads(json.dumps({"settings": {**resolved(arguments)}, "search": known}, default=dict))
    path = folder / "search.json"
    if path.is_file():
        theirs = read_json_object(path, error=CheckpointError)
        different = [
            f"{name} is {ours[part].get(name)} and was {theirs[part].get(name)}"
            for part in ("settings", "search")
            for name in dict.fromkeys([*ours[part], *theirs.get(part, {})])
            if ours[part].get(name) != theirs.get(part, {}).get(name)
        ]
        if different and overwrite:
            shutil.rmtree(folder)
            folder.mkdir()
        elif different:
            msg = f"{folder} holds trials of another search: {'; '.join(different[:6])}. Choose another output_dir, or pass overwrite to replace them."
            raise CheckpointError(msg)
    path.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def _with(arguments: GeneformerFineTuningArguments, best: Mapping[str, Any]) -> GeneformerFineTuningArguments:
    found = copy.copy(arguments)
    for name, value in best.items():
        setattr(found, name, value)
    return found


def _draw(study: Any, folder: Path, metric: str, space: Mapping[str, Any]) -> None:
    try:
        plot_trials(study, folder / "trials.png", metric=metric)
        plot_importances(study, folder / "importances.png", metric=metric, logarithmic=[n for n, d in space.items() if isinstance(d, Mapping) and d.get("log")])
    except MissingExtraError as error:
        logger.warning("No pictures of the trials: %s", error)
