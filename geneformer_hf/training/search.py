"""Hyperparameter search: `Trainer.hyperparameter_search` with Optuna, resumable, in parallel, the best run refitted."""

from __future__ import annotations

import copy
import json
import logging
import math
import multiprocessing
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock
from transformers import IntervalStrategy
from transformers.trainer_utils import SaveStrategy

from ..data.labelled import TEST, TRAIN, VALIDATION
from ..errors import CheckpointError, GeneformerError, MissingExtraError, OutputExistsError, SettingError, TrainingDivergedError, WorkerDiedError
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.search_plots import plot_importances, plot_trials
from .arguments import GeneformerFineTuningArguments
from .checkpointing import MODEL_FOLDER
from .configs import resolved
from .finetuning import FineTuningRun, finetune, make_trainer, settle
from .preparing import Prepared, prepare
from .settings import suggestion
from .starting import open_tokenizer

logger = logging.getLogger(__name__)

FOLDER = "search"
STUDY_FILE = "study.journal"
STUDY = "finetune"
PRUNERS = ("median", "hyperband", "none")
# fmt: off
SEARCHABLE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "freeze_layers", "freeze_embeddings", "pooling", "dropout", "attention_dropout", "class_weights", "adapter",
    "quantization", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
)
# fmt: on
"""Arguments of which a search may try several values: how is learnt, not what."""
SEARCH_KEYS = ("space", "n_trials", "metric", "pruner", "n_jobs", "refit", "seed")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What to try, and how often.

    Example:
        >>> settings = SearchSettings(space={"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "freeze_layers": [0, 2, 4]})
        >>> settings.n_trials, settings.pruner
        (20, 'median')
    """

    space: Mapping[str, Any]
    """Name of an argument to what to try: a list of values, or {low, high} with `log: true` or `step`. Whole numbers stay whole."""
    n_trials: int = 20
    """Trials in all, finished and pruned ones of earlier calls among them."""
    metric: str | None = None
    """Figure on validation cells to make as good as can be; by default that of fine-tuning."""
    pruner: str = "median"
    """Stop trials early that do worse than the median of the others at the same epoch (`median`), by `hyperband`, or `none`."""
    n_jobs: int = 1
    """Trials at a time, each in a process of its own on this machine. Other machines help by the same command in the same folder."""
    refit: bool = True
    """Fine-tune with the best settings at the end, and test."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, choices in (("pruner", PRUNERS),):
            if getattr(self, name) not in choices:
                wrong.append(f"{name} is {getattr(self, name)!r}; expected {' or '.join(choices)}")
        for name in ("n_trials", "n_jobs"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                wrong.append(f"{name} is {value!r}; expected a whole number above 0")
        if not isinstance(self.space, Mapping) or not self.space:
            wrong.append("space is empty; expected names of arguments and what to try")
        else:
            wrong += [problem for name, dimension in self.space.items() if (problem := _problem_of(name, dimension))]
        if wrong:
            msg = f"The search cannot be used: {'; '.join(wrong)}."
            raise SettingError(msg)


def _problem_of(name: str, dimension: Any) -> str | None:
    """Return what is wrong with one dimension of a space, or None."""
    known = GeneformerFineTuningArguments.__dataclass_fields__
    if name not in known:
        return f"space: {name}{suggestion(name, known)} is no argument of finetune"
    if name not in SEARCHABLE:
        return f"space: {name} cannot be searched over: it changes what is compared, or nothing. Known: {', '.join(SEARCHABLE)}"
    if isinstance(dimension, list):
        return None if dimension else f"space: {name} has no values"
    if not isinstance(dimension, Mapping) or not {"low", "high"} <= set(dimension) or set(dimension) - {"low", "high", "log", "step"}:
        return f"space: {name} is {dimension!r}; expected a list of values, or {{low, high}} with log or step"
    low, high = dimension["low"], dimension["high"]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high)) or low >= high:
        return f"space: {name} goes from {low!r} to {high!r}; expected two numbers, the lower one first (1.0e-5, not 1e-5, which YAML takes for text)"
    if dimension.get("log") and low <= 0:
        return f"space: {name} goes from {low!r} in steps of a factor; expected a number above 0"
    return None


def suggested(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that Optuna tries in a trial."""
    found: dict[str, Any] = {}
    for name, dimension in space.items():
        if isinstance(dimension, list):
            found[name] = trial.suggest_categorical(name, dimension)
            continue
        low, high, log, step = dimension["low"], dimension["high"], bool(dimension.get("log")), dimension.get("step")
        if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
            found[name] = trial.suggest_int(name, low, high, log=log, step=step or 1)
        else:
            found[name] = trial.suggest_float(name, low, high, log=log, step=step)
    return found


HELP = """settings of the search, under `search:` in the YAML file
  space         name of a setting to what to try: a list, or {low, high} with `log: true` or `step`; required
  n_trials      trials in all, those of earlier calls among them (default: 20)
  metric        figure of validation cells to make as good as can be (default: macro_f1, r2 for numbers)
  pruner        median, hyperband or none: which trials are stopped early (default: median)
  n_jobs        trials at a time, each in a process of its own (default: 1)
  refit         fine-tune with the best settings at the end, and test (default: true)
  seed          of what is tried (default: 0)
"""


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
    optuna = _optuna()
    _require_free(arguments, settings)
    folder.mkdir(parents=True, exist_ok=True)
    given = {TRAIN: train_data, VALIDATION: validation_data, TEST: test_data}
    in_memory = [cells for cells in given.values() if cells is not None and not isinstance(cells, (str, Path, list))]
    if settings.n_jobs > 1 and in_memory:
        msg = f"n_jobs is {settings.n_jobs}, and cells were given in memory, which other processes do not see. Give files (train_data=[path])."
        raise SettingError(msg)
    tokenizer = tokenizer or open_tokenizer(arguments)
    prepared = prepare(arguments, tokenizer, given)
    metric, direction = _objective_of(arguments, settings, prepared)
    _require_same_search(folder, arguments, settings, metric, overwrite=arguments.overwrite)
    study = _study(optuna, folder, direction, settings)
    missing = settings.n_trials - _n_done(study)
    logger.warning("%s trials in all, %s to go. Figure: %s of validation cells.", settings.n_trials, max(missing, 0), metric)
    if missing > 0 and settings.n_jobs == 1:
        _run_trials(arguments, settings, prepared, missing)
    elif missing > 0:
        _run_in_processes(arguments, settings, given, tokenizer, missing)
    study = _study(optuna, folder, direction, settings)
    trials = trials_table(study)
    trials.to_csv(folder / "trials.csv", index=False)
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


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        msg = "Searching needs Optuna. Install it with `pip install 'geneformer-hf[tune]'`."
        raise MissingExtraError(msg) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, folder: Path, direction: str, settings: SearchSettings) -> Any:
    """Open the study in a folder, or begin one; several processes may at once."""
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STUDY_FILE)))
    return optuna.create_study(study_name=STUDY, storage=storage, direction=direction, load_if_exists=True, pruner=pruners[settings.pruner]())


def _own_sampler(optuna: Any, study: Any, settings: SearchSettings, lock: Path) -> Any:
    """Return a sampler that no call before has had, on this machine or another: with the same seed they would try the same again."""
    with FileLock(lock):
        number = int(study.user_attrs.get("calls", 0)) + 1
        study.set_user_attr("calls", number)
    return optuna.samplers.TPESampler(seed=settings.seed + 1000 * number)


def _n_done(study: Any) -> int:
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


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
    model = Path(str(arguments.output_dir)) / MODEL_FOLDER
    if settings.refit and model.exists() and not arguments.overwrite:
        msg = f"{model} holds a model already. Pass `overwrite: true` (--overwrite) to replace it when the search is done (trials are kept), or refit: false."
        raise OutputExistsError(msg)


def _require_same_search(folder: Path, arguments: GeneformerFineTuningArguments, settings: SearchSettings, metric: str, *, overwrite: bool) -> None:
    """Raise if the folder holds trials of another search, or begin anew where these may be overwritten; note down what this one is.

    Raises:
        CheckpointError
    """
    ignored = {"n_trials", "n_jobs", "refit"}
    known = {name: value for name, value in vars(settings).items() if name not in ignored} | {"metric": metric}
    ours = json.loads(json.dumps({"settings": {**resolved(arguments)}, "search": known}, default=dict))
    path = folder / "search.json"
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
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
            msg = f"{folder} holds trials of another search: {'; '.join(different[:6])}. Choose another output_dir, or pass overwrite to begin anew."
            raise CheckpointError(msg)
    path.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def _run_trials(arguments: GeneformerFineTuningArguments, settings: SearchSettings, prepared: Prepared, n_trials: int) -> None:
    """Run trials in this process, by Trainer."""
    optuna = _optuna()
    folder = Path(str(arguments.output_dir)) / FOLDER
    mine = copy.copy(arguments)
    if settings.metric is not None:
        mine.metric_for_best_model, mine.greater_is_better = settings.metric, None
    mine.output_dir = str(folder / "runs")
    mine.load_best_model_at_end, mine.save_strategy = False, SaveStrategy.NO
    if mine.eval_strategy == IntervalStrategy.NO:
        mine.eval_strategy = IntervalStrategy.EPOCH
    trainer, _ = make_trainer(mine, prepared, prepared.splits[0], by_trial=True)
    metric, greater = str(mine.metric_for_best_model), bool(mine.greater_is_better)
    before = {name: getattr(mine, name) for name in settings.space}
    start = trainer.model_init

    def start_or_prune(trial: Any) -> Any:
        try:
            return start(trial)  # type: ignore[misc]
        except SettingError as error:
            # Values that do not go together, such as an adapter on layers that are all frozen.
            logger.warning("Trial %s is left out: %s", getattr(trial, "number", ""), error)
            raise optuna.TrialPruned(str(error)) from error

    trainer.model_init = start_or_prune

    def space(trial: Any) -> dict[str, Any]:
        for name, value in before.items():
            # Trainer casts what is tried to the type of what was there.
            setattr(trainer.args, name, value)
        return suggested(trial, settings.space)

    def objective(metrics: Mapping[str, float]) -> float:
        return float(metrics[metric])

    direction = "maximize" if greater else "minimize"
    study = _study(optuna, folder, direction, settings)
    try:
        trainer.hyperparameter_search(
            hp_space=space, compute_objective=objective, n_trials=n_trials, direction=direction, backend="optuna", study_name=STUDY,
            storage=study._storage, load_if_exists=True, pruner=study.pruner, sampler=_own_sampler(optuna, study, settings, folder / "calls.lock"), catch=(TrainingDivergedError,),
        )  # fmt: skip
    finally:
        trainer.close_bar()


def _run_in_processes(
    arguments: GeneformerFineTuningArguments, settings: SearchSettings, given: Mapping[int, Any], tokenizer: GeneformerTokenizer, n_trials: int
) -> None:
    """Run trials in several processes, which share the study.

    Raises:
        WorkerDiedError: if one is killed; the trials of the others are kept.
    """
    share = [n_trials // settings.n_jobs + (i < n_trials % settings.n_jobs) for i in range(settings.n_jobs)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_run_worker, args=(arguments, settings, given, tokenizer, n)) for n in share if n]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    dead = [worker.exitcode for worker in workers if worker.exitcode]
    if dead:
        msg = f"{len(dead)} of {len(workers)} processes of the search ended with code {', '.join(map(str, dead))}. Finished trials are kept; the same call goes on with the others."
        raise WorkerDiedError(msg)


def _run_worker(
    arguments: GeneformerFineTuningArguments, settings: SearchSettings, given: Mapping[int, Any], tokenizer: GeneformerTokenizer, n_trials: int
) -> None:
    """Run trials in a process of its own, which opens the cells by itself; what it cannot do it says without a traceback."""
    try:
        _run_trials(arguments, settings, prepare(arguments, tokenizer, given), n_trials)
    except GeneformerError as error:
        logger.error("A process of the search stops: %s", error)  # noqa: TRY400 - the message is for users
        raise SystemExit(1) from None


def _with(arguments: GeneformerFineTuningArguments, best: Mapping[str, Any]) -> GeneformerFineTuningArguments:
    found = copy.copy(arguments)
    for name, value in best.items():
        setattr(found, name, value)
    return found


def trials_table(study: Any) -> pd.DataFrame:
    """Return a line for each trial."""
    lines = []
    for trial in study.trials:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_complete and trial.datetime_start else float("nan")
        lines.append(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value,
                "epochs": len(trial.intermediate_values),
                "seconds": seconds,
                **trial.params,
            }
        )
    return pd.DataFrame(lines)


def _draw(study: Any, folder: Path, metric: str, space: Mapping[str, Any]) -> None:
    try:
        plot_trials(study, folder / "trials.png", metric=metric)
        plot_importances(study, folder / "importances.png", metric=metric, logarithmic=[n for n, d in space.items() if isinstance(d, Mapping) and d.get("log")])
    except MissingExtraError as error:
        logger.warning("No pictures of the trials: %s", error)


def read_search(settings: Any, *, where: str) -> SearchSettings:
    """Return the settings of a search from a mapping, such as the part `search` of a YAML file.

    Raises:
        SettingError
    """
    if not isinstance(settings, dict):
        msg = f"{where}: `search` is missing; expected at least `search: {{space: {{learning_rate: {{low: 1.0e-5, high: 1.0e-3, log: true}}}}}}`."
        raise SettingError(msg)
    unknown = [f"{name}{suggestion(str(name), SEARCH_KEYS)}" for name in settings if name not in SEARCH_KEYS]
    if unknown:
        msg = f"{where}: search: unknown setting {', '.join(unknown)}. Known: {', '.join(SEARCH_KEYS)}."
        raise SettingError(msg)
    given: dict[str, Any] = {"space": {}, **settings}
    return SearchSettings(**given)
