"""Trials of a search on the workers of a Ray cluster.

Ray Tune says where a trial runs. What it tries and whether it is stopped early is said by the study, as without Ray, and there its course is kept: a
search stopped half-way goes on with the trials that are missing, on Ray or not.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SettingError, TrainingDivergedError, WorkerDiedError
from .arguments import GeneformerFineTuningArguments
from .preparing import Prepared
from .search_settings import SearchSettings, suggested
from .study import FOLDER, open_study, own_sampler
from .trials import Objective, trainer_of_trials

logger = logging.getLogger(__name__)


def require_ray() -> Any:
    """Return Ray, set to tell nobody of its use and to draw no tables of its own.

    Raises:
        MissingExtraError
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    try:
        import ray
        import ray.tune
    except ModuleNotFoundError as error:
        msg = "backend: ray needs Ray Tune. Install it with `pip install 'geneformer-hf[ray]'`, or search with `backend: optuna`."
        raise MissingExtraError(msg) from error
    return ray


def run_in_ray(arguments: GeneformerFineTuningArguments, settings: SearchSettings, prepared: Prepared, n_trials: int) -> None:
    """Run trials by `Trainer.hyperparameter_search` on Ray Tune, `n_jobs` at a time.

    A cluster that is there already (`ray.init`, or RAY_ADDRESS) is used; otherwise one is started on this machine for the time of the search.

    Raises:
        WorkerDiedError: if a trial fails by anything but its own settings; the others are kept.
    """
    ray = require_ray()
    folder = (Path(str(arguments.output_dir)) / FOLDER).resolve()
    trainer, objective, direction = trainer_of_trials(arguments, settings, prepared)
    study = open_study(folder, direction, settings)
    study.sampler = own_sampler(study, settings, folder / "calls.lock")
    asked = _Asked(study, settings)
    # Ray Tune gives each trial the values that the searcher suggests on top of an empty space.
    options: dict[str, Any] = {
        "search_alg": _searcher(asked, direction), "scheduler": _scheduler(asked), "max_concurrent_trials": settings.n_jobs, "storage_path": str(folder / "ray"),
        "raise_on_failed_trial": False, "reuse_actors": True, "verbose": 0, "progress_reporter": _silent_reporter(),
    }  # fmt: skip
    with _cluster(ray, settings.n_jobs):
        try:
            trainer.hyperparameter_search(
                hp_space=lambda trial: {}, compute_objective=_WithStep(objective, trainer), n_trials=n_trials, direction=direction, backend="ray", **options
            )
        except AttributeError:
            # Trainer takes the best trial to be there.
            if asked.n_ended:
                raise
        finally:
            trainer.close_bar()
    if asked.failures:
        msg = f"{len(asked.failures)} of {n_trials} trials failed on Ray: {asked.failures[0]} Finished trials are kept in {folder}; the same call goes on with the others."
        raise WorkerDiedError(msg)


@contextmanager
def _cluster(ray: Any, n_jobs: int) -> Iterator[None]:
    """Use the cluster that is there, or start one on this machine and end it afterwards."""
    if ray.is_initialized():
        yield
        return
    own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": n_jobs, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **own)
    try:
        yield
    finally:
        ray.shutdown()


class _WithStep:
    """The objective, which also notes the step an evaluation was made at: Trainer tells it to Optuna and not to Ray."""

    def __init__(self, objective: Objective, trainer: Any) -> None:
        self.objective, self.trainer = objective, trainer

    def __call__(self, metrics: dict[str, float]) -> float:
        metrics["global_step"] = self.trainer.state.global_step
        return self.objective(metrics)


class _Asked:
    """The trials that the study was asked for, by the names Ray gave them."""

    def __init__(self, study: Any, settings: SearchSettings) -> None:
        self.study, self.settings = study, settings
        self.trials: dict[str, Any] = {}
        self.failures: list[str] = []
        self.n_ended = 0

    def values(self, name: str) -> dict[str, Any]:
        """Return what a trial tries."""
        self.trials[name] = self.study.ask()
        return suggested(self.trials[name], self.settings.space)

    def worse(self, name: str, result: Mapping[str, Any]) -> bool:
        """Take up an evaluation; return whether the trial is to be stopped early."""
        trial = self.trials[name]
        trial.report(result["objective"], int(result["global_step"]))
        if not trial.should_prune():
            return False
        self._end(name, "PRUNED")
        return True

    def ended(self, name: str, result: Mapping[str, Any]) -> None:
        """Take up the figure of a trial that came to its end."""
        if name in self.trials:
            self._end(name, "COMPLETE", result["objective"])

    def failed(self, name: str, traceback: str) -> None:
        """Take up why a trial failed; settings that do not go together, or that diverge, are no failure of the search."""
        number = self.trials[name].number
        # Ray hands over the worker's traceback as text; the exception itself it keeps pickled.
        raised = re.findall(r"^(?:[\w.]+\.)?(\w+): (.*)$", traceback, re.MULTILINE)
        kind, message = raised[-1] if raised else ("no reason given", "")
        if kind == SettingError.__name__:
            logger.warning("Trial %s is left out: %s", number, message)
            self._end(name, "PRUNED")
            return
        if kind == TrainingDivergedError.__name__:
            logger.warning("Trial %s diverged: %s", number, message)
        else:
            self.failures.append(f"trial {number}: {kind}: {message}")
        self._end(name, "FAIL")

    def _end(self, name: str, state: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        trial = self.trials.pop(name)
        self.study.tell(trial, value, TrialState[state])
        self.n_ended += state != "FAIL"
        logger.info("Trial %s: %s%s", trial.number, state.lower(), "" if value is None else f", {value:.4f}")


def _searcher(asked: _Asked, direction: str) -> Any:
    """Return what tells Ray the values to try, and hears of the end."""
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="objective", mode=direction[:3])

        def suggest(self, trial_id: str) -> dict[str, Any]:
            return asked.values(trial_id)

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if result is not None and not error:
                asked.ended(trial_id, result)

        def save(self, checkpoint_path: str) -> None:
            """Leave nothing for Ray to restore: the study is the memory."""

        restore = save

    return StudySearcher()


def _scheduler(asked: _Asked) -> Any:
    """Return what tells Ray to stop a trial early, and hears of failures."""
    from ray.tune.schedulers import FIFOScheduler

    class StudyScheduler(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            return self.STOP if asked.worse(trial.trial_id, result) else self.CONTINUE

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            asked.failed(trial.trial_id, Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else "")

    return StudyScheduler()


def _silent_reporter() -> Any:
    """Return a reporter that prints nothing; the study is shown at the end."""
    from ray.tune import ProgressReporter

    class Silent(ProgressReporter):
        def should_report(self, trials: list[Any], done: bool = False) -> bool:
            return False

        def report(self, trials: list[Any], done: bool, *sys_info: str) -> None:
            """Print nothing."""

    return Silent()
