"""The study of a search: the trials that Optuna keeps in a file, which several processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from ..errors import MissingExtraError
from .search_settings import SearchSettings

FOLDER = "search"
STUDY_FILE = "study.journal"
STUDY = "finetune"


def require_optuna() -> Any:
    """Return Optuna.

    Raises:
        MissingExtraError
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        msg = "Searching needs Optuna. Install it with `pip install 'geneformer-hf[tune]'`."
        raise MissingExtraError(msg) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(folder: Path, direction: str, settings: SearchSettings, *, sampler: Any = None) -> Any:
    """Open the study in a folder, or begin one; several processes may at once."""
    optuna = require_optuna()
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STUDY_FILE)))
    return optuna.create_study(study_name=STUDY, storage=storage, direction=direction, load_if_exists=True, pruner=pruners[settings.pruner](), sampler=sampler)


def own_sampler(study: Any, settings: SearchSettings, lock: Path) -> Any:
    """Return a sampler that no call before has had, on this machine or another: with the same seed they would try the same again."""
    with FileLock(lock):
        number = int(study.user_attrs.get("calls", 0)) + 1
        study.set_user_attr("calls", number)
    return require_optuna().samplers.TPESampler(seed=settings.seed + 1000 * number)


def n_done(study: Any) -> int:
    """Return how many trials have come to an end, stopped early or not."""
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


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
