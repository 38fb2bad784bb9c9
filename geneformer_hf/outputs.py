"""Outputs that are whole or not there: everything is written under a temporary name beside its place, then renamed.

Long work is resumable: `unfinished` keeps the finished parts of an output beside its place until all are there.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OutputError, OutputExistsError

logger = logging.getLogger(__name__)

PARTS = "parts"


def require_free(output: Path, *, overwrite: bool = False) -> None:
    """Raise if the output exists and may not be replaced, or cannot be written; called before any work is done.

    Raises:
        OutputExistsError, OutputError
    """
    if output.exists() and not overwrite:
        msg = f"{output} exists. Choose another name, or pass --overwrite (`overwrite=True`) to replace it."
        raise OutputExistsError(msg)
    existing = next(p for p in (output, *output.parents) if p.exists())
    if existing != output and not (existing.is_dir() and os.access(existing, os.W_OK)):
        msg = f"cannot write {output}: {existing} is {'a folder without write permission' if existing.is_dir() else 'not a folder'}. Choose another output."
        raise OutputError(msg)


def require_apart(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise if the output is an input or a folder that holds one: replacing it would lose what the work is made from.

    Raises:
        OutputError
    """
    place = Path(output).resolve()
    for path in inputs:
        if Path(path).resolve().is_relative_to(place):
            msg = f"{output} {'is' if Path(path).resolve() == place else 'holds'} the input {path}, which writing there would replace. Choose another output."
            raise OutputError(msg)


@contextmanager
def new_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; it takes its name when everything in it is written, and is removed on any error.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite)
    partial = _temporary_beside(output)
    try:
        # mkdtemp makes folders for the owner alone.
        partial.chmod(0o755)
        yield partial
        _replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the name of a file to write; it takes its real name when it is whole, and is removed on any error.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite)
    folder = _temporary_beside(output)
    try:
        yield folder / output.name
        (folder / output.name).replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Unfinished:
    """The folder that holds what is finished of an output; the same command goes on from there."""

    folder: Path
    output: Path
    overwrite: bool

    @property
    def parts(self) -> Path:
        """Finished parts, each under a name that says all it depends on."""
        return self.folder / PARTS

    def put_in_place(self, whole: Path) -> None:
        """Give the finished output, which lies inside this folder, its name.

        Raises:
            OutputExistsError: if somebody else wrote it in the meantime.
        """
        require_free(self.output, overwrite=self.overwrite)
        _replace(whole, self.output)


@contextmanager
def new_part(part: Path) -> Iterator[Path]:
    """Yield the name of a part to write; it takes its real name when it is whole."""
    partial = part.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(part)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def unfinished(output: str | Path, *, overwrite: bool = False) -> Iterator[Unfinished]:
    """Yield a folder for the finished parts of an output.

    It goes when the work is done, or failed before any part was finished. Otherwise it stays, and the next call yields it
    again. Nobody else can hold it at the same time.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False.
        OutputError: if another process is writing this output, or nothing can be written there.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite)
    # Absolute: workers of a cluster may run in another folder.
    work = Unfinished(output.absolute().with_name(f".{output.name}.unfinished"), output, overwrite)
    lock = FileLock(work.folder / "lock")
    try:
        work.parts.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"{output} is being written by another process. Wait for it, or choose another output."
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write to the folder {output.parent}: {error.strerror or error}. Choose another output."
        raise OutputError(msg) from error
    done = False
    try:
        yield work
        done = True
    finally:
        n_parts = sum(not p.name.startswith(".") for p in work.parts.iterdir()) if work.parts.is_dir() else 0
        if done or not n_parts:
            shutil.rmtree(work.folder, ignore_errors=True)
        else:
            logger.warning(
                "Finished parts are kept in %s (%s); the next run goes on from there. Remove the folder to forget them.", work.folder, f"{n_parts:,}"
            )
        lock.release()


def _temporary_beside(output: Path) -> Path:
    """Make a temporary folder where the output will be, so that a rename is all that is left to do.

    Raises:
        OutputError: if nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        msg = f"cannot write to the folder {output.parent}: {error.strerror or error}. Choose another output."
        raise OutputError(msg) from error


def _replace(partial: Path, output: Path) -> None:
    """Rename over what is there; the old output is out of the way only for the moment between two renames."""
    if not output.is_dir():
        partial.replace(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    output.rename(old / output.name)
    try:
        partial.rename(output)
    except OSError:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
