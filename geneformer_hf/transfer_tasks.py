"""The published transfer tasks as recipes: what each needs, how it is learnt or judged, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import SettingError

GENES, CELLS, EMBEDDING = KINDS = ("genes", "cells", "embedding")
RECIPES = "tasks"


@dataclass(frozen=True, kw_only=True)
class Need:
    """A file that a task needs."""

    what: str
    format: str
    where: str
    """Where it was published."""
    label: str | None = None
    """Column of obs to predict, or by which embeddings are judged."""
    group: str | None = None
    """Column whose values, such as individuals, are each wholly on one side."""
    batch: str | None = None
    """Column of batches."""


@dataclass(frozen=True, kw_only=True)
class TransferTask:
    """A published task."""

    name: str
    title: str
    question: str
    kind: str
    """`genes` and `cells` are fine-tuned; `embedding` is judged without training."""
    source: str
    published: str
    """Published result, with its source."""
    needs: Mapping[str, Need]
    """`cells`, and for tasks of genes `genes`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of fine-tuning."""
    frozen_share: float = 0.0
    """Share of the layers that are frozen."""

    def require(self, **given: Any) -> None:
        """Raise unless every file is given.

        Raises:
            SettingError: with what is needed, in which format, and where it was published.
        """
        missing = [name for name in self.needs if given.get(name) is None]
        if missing:
            wanted = "; ".join(
                f"--{name} ({name}=), {self.needs[name].what}. Format: {self.needs[name].format}. Published: {self.needs[name].where}" for name in missing
            )
            msg = f"the task {self.name!r} needs {wanted}. These files are not part of this package."
            raise SettingError(msg)


def task_names() -> list[str]:
    """Return the names of the tasks, sorted.

    Example:
        >>> task_names()[:2]
        ['batch-integration', 'bivalent-promoters']
    """
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str) -> TransferTask:
    """Return a task by its name.

    Raises:
        SettingError: if there is none of that name.

    Example:
        >>> load_task("dosage-sensitivity").title
        'Dosage-sensitive transcription factors'
    """
    if name not in task_names():
        msg = f"{name!r} is not one of the tasks {', '.join(task_names())}."
        raise SettingError(msg)
    content = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    needs = {role: Need(**need) for role, need in content.pop("needs").items()}
    return TransferTask(name=name, needs=needs, **content)


def run_task(
    task: TransferTask | str,
    model: Any,
    *,
    output: str | Path,
    cells: Any = None,
    genes: str | Path | None = None,
    label: str | None = None,
    group: str | None = None,
    batch: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Any:
    """Run a published task on a checkpoint.

    Args:
        task: the task, or its name (`task_names`).
        model (`str` or `Path`): checkpoint, a folder or Hub id.
        output (`str` or `Path`): new folder: of the fine-tuning run, or of the evaluation.
        cells (`str`, `Path`, `AnnData` or `datasets.Dataset`): what the task learns from or is judged on.
        genes (`str` or `Path`): classes of genes, for tasks of genes.
        label, group, batch (`str`, *optional*): columns of obs, in place of those of the recipe.
        settings (*optional*): in place of those of the recipe: arguments of fine-tuning, or of `evaluate_cells`.

    Returns:
        `FineTuningRun`, or `CellEvaluation` for tasks of kind `embedding`.

    Raises:
        SettingError: if a file is missing, with its format and where it was published; and as `finetune` or `evaluate_cells`.
    """
    task = load_task(task) if isinstance(task, str) else task
    task.require(cells=cells, genes=genes)
    need, settings = task.needs["cells"], dict(settings or {})
    if task.kind == EMBEDDING:
        columns = {"labels": label or need.label, "batch": batch or need.batch, "held_out": group or need.group}
        return _judge(task, model, cells, Path(output), columns | settings, overwrite=overwrite)
    from .training.arguments import GeneformerFineTuningArguments
    from .training.finetuning import finetune

    chosen = fine_tuning_settings(task, model, output=output, cells=cells, genes=genes, label=label, group=group, overwrite=overwrite)
    return finetune(GeneformerFineTuningArguments(**(chosen | settings)), None if "train_data" in chosen else cells)


def fine_tuning_settings(
    task: TransferTask,
    model: Any,
    *,
    output: str | Path,
    cells: Any,
    genes: str | Path | None = None,
    label: str | None = None,
    group: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Return the arguments of fine-tuning of a task of genes or cells, by name; as in `run_task`."""
    need, chosen = task.needs["cells"], dict(task.settings)
    label, group = label or need.label, group or need.group
    if task.kind == GENES:
        chosen["gene_classes"] = str(genes)
    else:
        chosen |= {"label": [label]} | ({"group_column": group} if group else {})
    if task.frozen_share:
        chosen["freeze_layers"] = round(task.frozen_share * _layers_of(model))
    if isinstance(cells, (str, Path)):
        chosen["train_data"] = [str(cells)]
    return chosen | {"from_checkpoint": str(model), "output_dir": str(output), "overwrite": overwrite}


def _judge(task: TransferTask, model: Any, cells: Any, output: Path, settings: dict[str, Any], *, overwrite: bool) -> Any:
    from .analysis.evaluation import evaluate_cells
    from .analysis.evaluation_report import write_evaluation
    from .outputs import new_folder, require_apart, require_free

    require_apart(output, [model, cells if isinstance(cells, (str, Path)) else None])
    require_free(output, overwrite=overwrite, made_by="task")
    found = evaluate_cells(model, cells, **settings)
    given = {name: value for name, value in settings.items() if value is not None}
    with new_folder(output, made_by="task", overwrite=overwrite) as partial:
        write_evaluation(found, partial, title=task.title, settings={"task": task.name, "published": task.published} | given)
    return found


def _layers_of(model: Any) -> int:
    from .models.loading import load_model

    return int(load_model(model).config.num_hidden_layers)


def _folder() -> Any:
    return resources.files(__package__) / "resources" / RECIPES
