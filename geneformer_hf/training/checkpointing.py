"""Checkpoints that are whole or not there, and that know which run they belong to.

A checkpoint is written under a temporary name and renamed when all of its files, of all processes, are there. So a kill at any
moment, or a full disk, leaves the one before it as the last.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CheckpointError, OutputError, OutputExistsError, SettingError
from ..input_files import read_json_object
from ..models.adapters import ADAPTER_FILE, complete_adapter
from ..outputs import put, require_ours, write_mark

IDENTITY_FILE = "geneformer_run.json"
MODEL_FOLDER = "model"
UNFINISHED_CHECKPOINT = ".checkpoint.unfinished"
UNFINISHED_MODEL = ".model.unfinished"
CONFIG_FILE = "settings.yaml"
FOLD = "fold-"
LOCK_FILE = ".geneformer_hf.lock"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, the last one last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit() and (path / IDENTITY_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(output: Path, *, asked_for: str | None, identity: dict[str, Any]) -> Path | None:
    """Return the checkpoint to go on from: the one asked for, else the last of this run, else None.

    Raises:
        OutputExistsError: if the run in this folder is finished, or another one.
        CheckpointError: if the checkpoint asked for is none, or belongs to another run; each difference is named.
    """
    asked_for = None if asked_for is None or str(asked_for).lower() == "false" else str(asked_for)
    if asked_for is None or asked_for.lower() == "true":
        if (output / MODEL_FOLDER).exists():
            msg = f"{output} holds the model of a finished run ({output / MODEL_FOLDER}). Choose another output_dir, or pass `overwrite: true` (--overwrite) to replace it."
            raise OutputExistsError(msg)
        found = checkpoints_in(output)
        if not found:
            if asked_for is not None:
                msg = f"{output} holds no whole checkpoint to resume from. Leave out resume_from_checkpoint to start."
                raise CheckpointError(msg)
            return None
        checkpoint = found[-1]
    else:
        checkpoint = Path(asked_for)
        if not (checkpoint / IDENTITY_FILE).is_file():
            inside = checkpoints_in(checkpoint) if checkpoint.is_dir() else []
            if not inside:
                msg = f"{asked_for} is no checkpoint of ours: it has no {IDENTITY_FILE}. Give a folder checkpoint-N of this run, or go on from its weights with from_checkpoint."
                raise CheckpointError(msg)
            checkpoint = inside[-1]
    _require_same_run(checkpoint, identity)
    return checkpoint


def _require_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    try:
        theirs = read_json_object(checkpoint / IDENTITY_FILE, error=CheckpointError)
    except (OSError, CheckpointError) as error:
        msg = f"{checkpoint / IDENTITY_FILE} cannot be read: {error}. Remove this checkpoint to go on from the one before."
        raise CheckpointError(msg) from error
    ours, theirs = _flat(json.loads(json.dumps(identity))), _flat(theirs)
    different = [
        f"{name} is {_shown(ours.get(name))} and was {_shown(theirs.get(name))}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if different:
        msg = f"{checkpoint} belongs to another run: {'; '.join(different)}. Use the settings and data of that run, or start another in a new output_dir (with from_checkpoint, to start from its weights); overwrite replaces this one."
        raise CheckpointError(msg)


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the model beside the settings, so that each difference is named."""
    return {name: value for name, value in identity.items() if name != "model"} | {
        f"{name} of the model": value for name, value in identity.get("model", {}).items()
    }


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def remove_leftovers(output: Path) -> None:
    """Remove what a killed run had not finished writing."""
    for name in (UNFINISHED_CHECKPOINT, UNFINISHED_MODEL):
        shutil.rmtree(output / name, ignore_errors=True)


@contextmanager
def only_run(output: Path, *, is_main: bool) -> Iterator[None]:
    """Hold a training folder while a run writes there; the first process of a run holds it for all.

    Raises:
        OutputError: if another run holds it.
    """
    if not is_main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK_FILE)
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"another run is training in {output} (it holds {output / LOCK_FILE}). Wait for it, or choose another output_dir."
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write to {output}: {error.strerror or error}. Choose another output_dir."
        raise OutputError(msg) from error
    try:
        yield
    finally:
        if [path.name for path in output.iterdir()] in ([], [LOCK_FILE]):
            # Refused before anything was written.
            (output / LOCK_FILE).unlink(missing_ok=True)
            output.rmdir()
        lock.release()


def put_model(unfinished: Path, output: Path, *, made_by: str) -> None:
    """Give the finished model of a run its name; what has that name by now is left as it is.

    Raises:
        OutputExistsError: if a folder of that name appeared during training; the model is kept under another one.
    """
    write_mark(unfinished, made_by)
    try:
        put(unfinished, output / MODEL_FOLDER, overwrite=False)
    except OutputExistsError:
        kept = next(path for path in (output / f"{MODEL_FOLDER}-{n}" for n in itertools.count(2)) if not path.exists())
        unfinished.rename(kept)
        msg = f"{output / MODEL_FOLDER} appeared during training and is left as it is. The trained model is in {kept}."
        raise OutputExistsError(msg) from None


def put_in_place(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name, in place of what had it."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        unfinished.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        unfinished.rename(final)


def remove_other_runs(output: Path, identity: dict[str, Any], *, asked_for: str | None, made_by: str) -> None:
    """Remove model, checkpoints and settings of a run that is finished or another one, and nothing else; an unfinished one goes on.

    Raises:
        SettingError: if a checkpoint to go on from was named as well.
        OutputExistsError: if the folder `model` there is not the work of the same command, or somebody added files to it.
    """
    if asked_for is not None:
        msg = "overwrite removes a run and resume_from_checkpoint goes on with one; give one of them."
        raise SettingError(msg)
    model = output / MODEL_FOLDER
    if model.exists():
        require_ours(model, made_by)
    elif _is_unfinished(output, identity):
        return
    # Folds of a finished run go with it; those beside no model are of this run, or are computed again.
    folds = [path for path in output.glob(f"{FOLD}*") if (path / IDENTITY_FILE).is_file() or checkpoints_in(path)] if model.exists() else []
    for path in (*checkpoints_in(output), *folds):
        shutil.rmtree(path)
    shutil.rmtree(model, ignore_errors=True)


def _is_unfinished(output: Path, identity: dict[str, Any]) -> bool:
    """Return whether a folder without a model holds this run, or nothing of another."""
    try:
        checkpoint_to_resume(output, asked_for=None, identity=identity)
    except CheckpointError:
        return False
    return True


def save_weights(trainer: Any, folder: Path) -> None:
    """Write a model, or its adapter, as Trainer does on all processes; whole enough to be opened again by itself."""
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        # Trainer's own record of the arguments is a pickle; settings.yaml says the same.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if (folder / ADAPTER_FILE).is_file():
            complete_adapter(trainer.accelerator.unwrap_model(trainer.model), folder)
