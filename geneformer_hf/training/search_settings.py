"""What a hyperparameter search tries, and how often: the space, as YAML gives it and as Optuna draws from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from .arguments import GeneformerFineTuningArguments
from .settings import suggestion

PRUNERS = ("median", "hyperband", "none")
BACKENDS = ("optuna", "ray")
# fmt: off
SEARCHABLE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "freeze_layers", "freeze_embeddings", "pooling", "dropout", "attention_dropout", "class_weights", "adapter",
    "quantization", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets",
)
# fmt: on
"""Arguments of which a search may try several values: how is learnt, not what."""
SEARCH_KEYS = ("space", "n_trials", "metric", "pruner", "n_jobs", "backend", "refit", "seed")


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
    backend: str = "optuna"
    """What runs the trials: this process and `n_jobs - 1` others (`optuna`), or the workers of a Ray cluster (`ray`, if it is installed).

    With both, Optuna chooses what is tried and what is stopped early, and keeps the trials: a search begun with one goes on with the other.
    """
    refit: bool = True
    """Fine-tune with the best settings at the end, and test."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        for name, choices in (("pruner", PRUNERS), ("backend", BACKENDS)):
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
  backend       optuna, or ray: trials on the workers of a Ray cluster, or of this machine where there is none (default: optuna)
  refit         fine-tune with the best settings at the end, and test (default: true)
  seed          of what is tried (default: 0)
"""


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
