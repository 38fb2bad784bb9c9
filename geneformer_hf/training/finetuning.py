"""Fine-tuning: a pretrained encoder learns labels of cells or genes, is tested on cells or genes it has not seen, and is kept with its figures."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import IntervalStrategy, TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from ..data.labelled import TEST, TRAIN, VALIDATION
from ..data.mixtures import Mixture
from ..data.splits import Split
from ..errors import OutputError, OutputExistsError, SettingError
from ..models.adapters import count_parameters, unwrapped
from ..models.heads import LABELS, NUMBERS, Head
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..outputs import require_apart
from .arguments import GeneformerFineTuningArguments
from .checkpointing import CONFIG_FILE, FOLD, IDENTITY_FILE, MODEL_FOLDER, checkpoint_to_resume, only_run, remove_leftovers, remove_other_runs
from .configs import write_config
from .fine_tuner import GeneformerFineTuner
from .identity import identity_of
from .outcomes import Outcome, save_outcome
from .planned import refusals_of_trainer
from .preparing import Prepared, prepare
from .processes import require_processes
from .starting import open_tokenizer, start_model
from .tasks import CellTask, GeneScores, GeneTask

logger = logging.getLogger(__name__)

RESULT_FILE = "test.npz"


@dataclass
class FineTuningRun:
    """What `finetune` returns."""

    folder: Path
    """The finished model: opens with the Auto classes, `load_model`, `predict` and `embed_cells`."""
    model: Any
    figures: dict[str, Any]
    """Figures on test cells or genes, those of the baselines among them; see `figures.json`."""
    predictions: pd.DataFrame
    """What was predicted for each test cell or gene."""
    history: dict[str, list[dict[str, float]]]
    """What was logged, by fold."""

    def __repr__(self) -> str:
        shown = []
        for head, found in self.figures.get("heads", {}).items():
            mine = found["this model"]
            shown.append(f"{head}: {', '.join(f'{key} {mine[key]:.3f}' for key in ('accuracy', 'macro_f1', 'r2') if key in mine)}")
        return f"FineTuningRun({str(self.folder)!r}; {'; '.join(shown) or 'nothing tested'})"


@dataclass
class Trained:
    """A model after one training, and what it says of the test cells or genes."""

    logits: np.ndarray | None = None
    scores: GeneScores | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    trainer: GeneformerFineTuner | None = None
    n_trained: int = 0
    """Parameters that were trained."""
    n_parameters: int = 0


def finetune(
    arguments: GeneformerFineTuningArguments,
    train_data: Any = None,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    tokenizer: GeneformerTokenizer | None = None,
    gene_classes: Mapping[str, Sequence[str]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FineTuningRun:
    """Fine-tune a pretrained model for labels of cells (`arguments.label`) or of genes (`gene_classes`), and test it.

    Cells are split into cells to train on, to choose the best epoch by, and to test on; or into folds. Stopped or killed, the same call
    goes on from the last checkpoint in `output_dir`, as if nothing had happened.

    Args:
        arguments (`GeneformerFineTuningArguments`)
        train_data, validation_data, test_data (`AnnData`, `Dataset`, `str`, `Path` or several of them, *optional*):
            in place of those of the arguments.
        tokenizer (*optional*): in place of that of the checkpoint.
        gene_classes (*optional*): class to genes, in place of a table.
        callbacks: for the Trainer.

    Returns:
        `FineTuningRun`; model, figures, pictures and report lie in `output_dir/model`.

    Raises:
        SettingError, CellFileError, ColumnNotFoundError, UnknownGeneError, CheckpointError, VocabularyMismatchError, OutputExistsError, TrainingDivergedError
    """
    require_processes(arguments)
    output = Path(str(arguments.output_dir))
    require_place(arguments, output)
    with only_run(output, is_main=arguments.process_index == 0):
        return _finetune(arguments, output, {TRAIN: train_data, VALIDATION: validation_data, TEST: test_data}, tokenizer, gene_classes, callbacks)


def _finetune(
    arguments: GeneformerFineTuningArguments,
    output: Path,
    data: dict[int, Any],
    tokenizer: GeneformerTokenizer | None,
    gene_classes: Any,
    callbacks: Sequence[TrainerCallback],
) -> FineTuningRun:
    """Train in a folder that this run holds."""
    started, asked = time.monotonic(), arguments
    tokenizer = tokenizer or open_tokenizer(arguments)
    prepared = prepare(arguments, tokenizer, data, gene_classes=gene_classes)
    if arguments.process_index == 0:
        logger.warning("%s", _announcement(arguments, prepared))
    trained = []
    for number, split in enumerate(prepared.splits if arguments.n_folds else []):
        trained.append(_train_fold(arguments, prepared, split, number, callbacks))
    last_split = prepared.everything() if arguments.n_folds else prepared.splits[0]
    final = train_once(arguments, prepared, last_split, output, callbacks=callbacks, asked=asked, name="all" if arguments.n_folds else "")
    outcome = Outcome(prepared, trained or [final], final, asked, seconds=time.monotonic() - started)
    figures, predictions = save_outcome(outcome)
    history = {f"{FOLD}{i + 1}": fold.history for i, fold in enumerate(trained)} | {"final": final.history}
    assert final.trainer is not None
    return FineTuningRun(output / MODEL_FOLDER, final.trainer.accelerator.unwrap_model(final.trainer.model), figures, predictions, history)


def require_place(arguments: GeneformerFineTuningArguments, output: Path) -> None:
    """Raise if the output is a file, an input, or holds a finished run."""
    if output.exists() and not output.is_dir():
        msg = f"output_dir {output} is a file; name a folder."
        raise OutputError(msg)
    data = [*(arguments.train_data or []), *(arguments.validation_data or []), *(arguments.test_data or [])]
    places = [*data, arguments.from_checkpoint, arguments.tokenizer, arguments.gene_classes]
    require_apart(output, places)
    if (output / MODEL_FOLDER).exists() and not arguments.overwrite:
        msg = f"{output} holds the model of a finished run ({output / MODEL_FOLDER}). Choose another output_dir, or pass `overwrite: true` (--overwrite) to start anew there."
        raise OutputExistsError(msg)


def _train_fold(arguments: GeneformerFineTuningArguments, prepared: Prepared, split: Split, number: int, callbacks: Sequence[TrainerCallback]) -> Trained:
    """Train and test one fold, in a folder of its own; a finished one is read again."""
    folder = Path(str(arguments.output_dir)) / f"{FOLD}{number + 1}"
    mine = copy.copy(arguments)
    mine.output_dir = str(folder)
    # A checkpoint named by the user is of the whole run.
    mine.resume_from_checkpoint = None
    finished = folder.parent if arguments.overwrite and number == 0 and (folder.parent / MODEL_FOLDER).exists() else None
    return train_once(mine, prepared, split, folder, callbacks=callbacks, asked=mine, name=f"fold {number + 1}", keep=True, replaces=finished)


def train_once(
    arguments: GeneformerFineTuningArguments,
    prepared: Prepared,
    split: Split,
    folder: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    asked: GeneformerFineTuningArguments,
    name: str = "",
    keep: bool = False,
    replaces: Path | None = None,
) -> Trained:
    """Train on one split, or go on with it, and test.

    Args:
        keep (`bool`): write what was found, in place of checkpoints, and read it again the next time.
        replaces (*optional*): the folder of a finished run, removed when data and settings have turned out to be usable, and not before.
    """
    arguments = copy.copy(arguments)
    trainer, model = make_trainer(arguments, prepared, split, callbacks=callbacks)
    trainer.identity = identity_of(arguments, trainer, model, is_new=False, more={"name": name, **prepared.fingerprint, **_chosen_by(arguments)})
    with arguments.main_process_first(local=False, desc="look for checkpoints"):
        if replaces is not None and arguments.process_index == 0:
            remove_other_runs(replaces, {}, asked_for=None, made_by="finetune")
        if arguments.overwrite and arguments.process_index == 0:
            remove_other_runs(folder, trainer.identity, asked_for=arguments.resume_from_checkpoint, made_by="finetune")
        if keep and _is_result_of(folder, trainer.identity):
            return _read_result(folder, trainer)
        resume = checkpoint_to_resume(folder, asked_for=arguments.resume_from_checkpoint, identity=trainer.identity)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        write_config(asked, folder / CONFIG_FILE)
        logger.warning("%s", _beginning(trainer, split, name, resume))
    trainer.accelerator.wait_for_everyone()
    attention = unwrapped(model).config._attn_implementation
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        trainer.close_bar()
    n_trained, n_parameters = count_parameters(model, trained=True), count_parameters(model)
    found = Trained(history=trainer.state.log_history, trainer=trainer, n_trained=n_trained, n_parameters=n_parameters)
    if len(split.test):
        if isinstance(prepared.task, CellTask):
            found.logits, _ = trainer.predict_rows(split.test, desc="Testing")
        else:
            classes = prepared.task.classes.of_tokens(prepared.task.vocab_size, split.test)
            found.scores = trainer.score_genes(prepared.rows, classes, desc="Testing")
    unwrapped(model).set_attn_implementation(attention if attention != "packed_cells" else "sdpa")
    if keep:
        if trainer.is_world_process_zero():
            _write_result(folder, found, trainer.identity)
        trainer.accelerator.wait_for_everyone()
    return found


def make_trainer(
    arguments: GeneformerFineTuningArguments, prepared: Prepared, split: Split, *, callbacks: Sequence[TrainerCallback] = (), by_trial: bool = False
) -> tuple[GeneformerFineTuner, Any]:
    """Return a Trainer for one split, and its model; `by_trial` leaves it to each trial of a search to make one.

    The arguments, which must be a copy, are completed: what is evaluated, and which figure tells the best epoch.
    """
    task = prepared.task
    settle(arguments, task, split)

    def init(trial: Any = None) -> Any:
        # Weights of new heads and adapters, and dropout, follow from the seed.
        set_seed(arguments.seed)
        return start_model(arguments, task.model_class, task.config_fields(arguments, split.train), prepared.tokenizer)

    model = None if by_trial else init()
    mixture = Mixture([prepared.corpus(split)], seed=arguments.order_seed)
    with refusals_of_trainer():
        trainer = GeneformerFineTuner(
            model, arguments, mixture=mixture, task=task, tokenizer=prepared.tokenizer, validation=split.validation,
            train_genes=split.train if isinstance(task, GeneTask) else None, callbacks=callbacks, model_init=init if by_trial else None,
        )  # fmt: skip
        trainer.require_schedule()
    return trainer, model


def _chosen_by(arguments: GeneformerFineTuningArguments) -> dict[str, Any]:
    """Return how the best epoch is told, where it is: with another figure or other evaluations another one might be."""
    if not arguments.load_best_model_at_end:
        return {"best by": None}
    steps = arguments.eval_steps if arguments.eval_strategy == IntervalStrategy.STEPS else None
    return {"best by": [arguments.metric_for_best_model, str(arguments.eval_strategy), steps]}


def settle(arguments: GeneformerFineTuningArguments, task: CellTask | GeneTask, split: Split) -> None:
    """Set, in a copy of the arguments, what follows from the task and the split.

    Raises:
        SettingError: if the figure that tells the best epoch is not among those that will be measured.
    """
    if not len(split.validation):
        arguments.eval_strategy, arguments.load_best_model_at_end = IntervalStrategy.NO, False
        if arguments.save_strategy == SaveStrategy.BEST:
            arguments.save_strategy = SaveStrategy.EPOCH
        return
    known = figure_names(task)
    wanted = (arguments.metric_for_best_model or known[1]).removeprefix("eval_")
    if wanted not in known:
        msg = f"metric_for_best_model {arguments.metric_for_best_model!r} is not one of {', '.join(known)}."
        raise SettingError(msg)
    arguments.metric_for_best_model = f"eval_{wanted}"
    if arguments.greater_is_better is None:
        arguments.greater_is_better = not wanted.endswith(("loss", "mae"))


def figure_names(task: CellTask | GeneTask) -> list[str]:
    """Return the names of the figures that are followed while training; the second tells the best epoch by default."""
    if isinstance(task, GeneTask):
        return ["loss", "macro_f1", "accuracy", "roc_auc"]
    mine = {"regression": ["r2", "mae"], "multi_label_classification": ["macro_f1", "accuracy"]}.get(task.kind, ["macro_f1", "accuracy", "log_loss"])
    return ["loss", *mine, *(f"{head.name}_{name}" for head in task.heads for name in mine if task.is_multi_task)]


def _announcement(arguments: GeneformerFineTuningArguments, prepared: Prepared) -> str:
    task, split = prepared.task, prepared.splits[0]
    what = "cells" if isinstance(task, CellTask) else "genes"
    heads = task.heads if isinstance(task, CellTask) else [task.head]
    shown = "; ".join(f"{head.name}: {_names_of(head)}" for head in heads)
    n = sum(len(rows) for rows in (split.train, split.validation, split.test))
    division = (
        f"{arguments.n_folds} folds"
        if arguments.n_folds
        else f"{len(split.train):,} to train, {len(split.validation):,} to choose the epoch, {len(split.test):,} to test"
    )
    in_cells = "" if what == "cells" else f" in {len(prepared.rows):,} cells"
    return "\n".join([f"{shown}. {n:,} {what}{in_cells}: {division}.", *(f"Note: {note}" for note in prepared.notes)])


def _names_of(head: Head) -> str:
    n, noun = len(head.names), {NUMBERS: "number", LABELS: "label"}.get(head.kind, "class")
    return f"{n} {noun}{'' if n == 1 else 'es' if noun == 'class' else 's'}"


def _beginning(trainer: GeneformerFineTuner, split: Split, name: str, resume: Path | None) -> str:
    model = trainer.accelerator.unwrap_model(trainer.model)
    n_trained, n = count_parameters(model, trained=True), count_parameters(model)
    slow = ""
    if trainer.args.device.type == "cpu" and unwrapped(model).config.attention_probs_dropout_prob > 0:
        slow = " Dropout of attention is slow on a CPU: attention_dropout: 0 is several times faster."
    start = f"Going on from {resume}" if resume else "Starting"
    return f"{start}{f' ({name})' if name else ''}: {n_trained:,} of {n:,} parameters are trained, {trainer.plan.steps_per_epoch:,} steps an epoch ({trainer.args.device.type}).{slow}"


def _is_result_of(folder: Path, identity: dict[str, Any]) -> bool:
    path = folder / IDENTITY_FILE
    return (folder / RESULT_FILE).is_file() and path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(identity))


def _write_result(folder: Path, found: Trained, identity: dict[str, Any]) -> None:
    """Keep what a fold has found; its checkpoints are of no use any more."""
    arrays: dict[str, np.ndarray] = {"parameters": np.array([found.n_trained, found.n_parameters])}
    if found.logits is not None:
        arrays["logits"] = found.logits
    if found.scores is not None:
        arrays |= vars(found.scores)
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    (folder / "history.json").write_text(json.dumps(found.history) + "\n", encoding="utf-8")
    partial = folder / f".{RESULT_FILE}"
    np.savez(partial.with_suffix(".partial.npz"), **arrays)  # type: ignore[arg-type]
    partial.with_suffix(".partial.npz").replace(folder / RESULT_FILE)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def _read_result(folder: Path, trainer: GeneformerFineTuner) -> Trained:
    with np.load(folder / RESULT_FILE) as arrays:
        n_trained, n_parameters = arrays["parameters"].tolist()
        scores = None
        if "sums_vc" in arrays:
            scores = GeneScores(**{name: arrays[name] for name in ("sums_vc", "n_cells_v", "classes_m", "probabilities_mc")})
        logits = arrays.get("logits")
    return Trained(logits, scores, json.loads((folder / "history.json").read_text(encoding="utf-8")), trainer, n_trained, n_parameters)
