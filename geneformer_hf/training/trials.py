"""Trials of a search by Trainer and Optuna: in this process, or in several."""

from __future__ import annotations

import copy
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy
from transformers.trainer_utils import SaveStrategy

from ..errors import GeneformerError, SettingError, TrainingDivergedError, WorkerDiedError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .arguments import GeneformerFineTuningArguments
from .finetuning import make_trainer
from .preparing import Prepared, prepare
from .search_settings import SearchSettings, suggested
from .study import FOLDER, STUDY, open_study, own_sampler, require_optuna

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """The figure a trial is judged by, picked from those of an evaluation."""

    metric: str

    def __call__(self, metrics: Mapping[str, float]) -> float:
        """Return the figure."""
        return float(metrics[self.metric])


def trainer_of_trials(arguments: GeneformerFineTuningArguments, settings: SearchSettings, prepared: Prepared) -> tuple[Any, Objective, str]:
    """Return a Trainer that makes a model for each trial and saves none, what it is judged by, and the direction."""
    mine = copy.copy(arguments)
    if settings.metric is not None:
        mine.metric_for_best_model, mine.greater_is_better = settings.metric, None
    mine.output_dir = str(Path(str(arguments.output_dir)) / FOLDER / "runs")
    mine.load_best_model_at_end, mine.save_strategy = False, SaveStrategy.NO
    if mine.eval_strategy == IntervalStrategy.NO:
        mine.eval_strategy = IntervalStrategy.EPOCH
    trainer, _ = make_trainer(mine, prepared, prepared.splits[0], by_trial=True)
    return trainer, Objective(str(mine.metric_for_best_model)), "maximize" if mine.greater_is_better else "minimize"


def run_trials(arguments: GeneformerFineTuningArguments, settings: SearchSettings, prepared: Prepared, n_trials: int) -> None:
    """Run trials in this process, by Trainer."""
    folder = Path(str(arguments.output_dir)) / FOLDER
    trainer, objective, direction = trainer_of_trials(arguments, settings, prepared)
    before = {name: getattr(trainer.args, name) for name in settings.space}
    trainer.model_init = _pruned_if_refused(trainer.model_init)

    def space(trial: Any) -> dict[str, Any]:
        for name, value in before.items():
            # Trainer casts what is tried to the type of what was there.
            setattr(trainer.args, name, value)
        return suggested(trial, settings.space)

    study = open_study(folder, direction, settings)
    try:
        trainer.hyperparameter_search(
            hp_space=space, compute_objective=objective, n_trials=n_trials, direction=direction, backend="optuna", study_name=STUDY,
            storage=study._storage, load_if_exists=True, pruner=study.pruner, sampler=own_sampler(study, settings, folder / "calls.lock"), catch=(TrainingDivergedError,),
        )  # fmt: skip
    finally:
        trainer.close_bar()


def _pruned_if_refused(start: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let values that do not go together, such as an adapter on layers that are all frozen, end a trial and not the search."""

    def start_or_prune(trial: Any) -> Any:
        try:
            return start(trial)
        except SettingError as error:
            logger.warning("Trial %s is left out: %s", getattr(trial, "number", ""), error)
            raise require_optuna().TrialPruned(str(error)) from error

    return start_or_prune


def run_in_processes(
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
        run_trials(arguments, settings, prepare(arguments, tokenizer, given), n_trials)
    except GeneformerError as error:
        logger.error("A process of the search stops: %s", error)  # noqa: TRY400 - the message is for users
        raise SystemExit(1) from None
