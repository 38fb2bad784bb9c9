"""Outputs that are whole or not there: everything is written under a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, OutputExistsError


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
