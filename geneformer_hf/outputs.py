"""Outputs that are whole or not there: everything is written under a temporary name beside its place, then renamed.

Long work is resumable: `unfinished` keeps the finished parts of an output beside its place until all are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OutputError, OutputExistsError
from .input_files import require_regular

logger = logging.getLogger(__name__)

PARTS = "parts"


MARK = ".geneformer_hf.json"
"""In every folder that a command of ours made: which command, of what, and the files it wrote."""
LOCK = "lock"
CONTENT = "content"
CACHES = ("cache-*.arrow", ".cache")
"""Files that `datasets` and huggingface_hub add to folders of ours."""


def require_free(output: Path, *, overwrite: bool = False, made_by: str | None = None, of: str | None = None) -> None:
    """Raise if the output exists and may not be replaced, or cannot be written; called before any work is done.

    A folder is replaced only if the same command made it, of the same source where that is known, and nothing was added to it.

    Args:
        made_by (`str`, *optional*): the command, for outputs that are folders.
        of (`str`, *optional*): what the folder is made of, such as the model that is converted.

    Raises:
        OutputExistsError, OutputError
    """
    require_regular(output, error=OutputError)
    if os.path.lexists(output) and not overwrite:
        msg = f"{output} exists. Choose another name, or pass --overwrite (`overwrite=True`) to replace it."
        raise OutputExistsError(msg)
    if output.is_dir() and made_by is None:
        msg = f"{output} is a folder, and a file is to be written there. Choose another output."
        raise OutputExistsError(msg)
    if output.is_dir():
        require_ours(output, str(made_by), of)
    elif made_by is not None and os.path.lexists(output):
        msg = f"{output} is a file, and a folder is to be written there. Choose another output."
        raise OutputExistsError(msg)
    existing = next(p for p in (output, *output.parents) if p.exists())
    if existing != output and not (existing.is_dir() and os.access(existing, os.W_OK)):
        msg = f"cannot write {output}: {existing} is {'a folder without write permission' if existing.is_dir() else 'not a folder'}. Choose another output."
        raise OutputError(msg)


def require_ours(folder: Path, made_by: str, of: str | None = None) -> None:
    """Raise unless a folder is empty, or the same command made it, of the same source, and nobody added a file to it.

    Raises:
        OutputExistsError: saying what is there.
    """
    remedy = "It is not replaced, with --overwrite either. Remove it yourself, or choose another output."
    inside = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    if not inside and not folder.is_symlink():
        return
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        made, source, files = mark["made_by"], mark.get("of"), set(mark["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        msg = f"{folder} was not made by a command of geneformer-hf (it holds no readable {MARK}). {remedy}"
        raise OutputExistsError(msg) from None
    if made != made_by or (of is not None and source is not None and source != of):
        what = f"`{made}`" + (f" of {source}" if source else "")
        msg = f"{folder} was made by {what}, and this is `{made_by}`{f' of {of}' if of else ''}. {remedy}"
        raise OutputExistsError(msg)
    added = [name for name in inside if name != MARK and name not in files and not any(fnmatch(Path(name).name, cache) for cache in CACHES)]
    if added:
        msg = f"{folder} holds {len(added):,} files that `{made}` did not write, for instance {added[0]}. {remedy}"
        raise OutputExistsError(msg)


def write_mark(folder: Path, made_by: str, of: str | None = None) -> None:
    """Note in a folder which command made it, of what, and which files it wrote."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    (folder / MARK).write_text(json.dumps({"made_by": made_by, "of": of, "files": files}, indent=1) + "\n", encoding="utf-8")


def require_apart(output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise if the output is an input or a folder that holds one: replacing it would lose what the work is made from.

    Args:
        inputs: paths; text that names nothing on this disk, such as a Hub id, is passed over.

    Raises:
        OutputError
    """
    # Path.resolve raises in a loop of symbolic links, which whoever opens the input refuses.
    place = Path(os.path.realpath(output))
    for path in inputs:
        if path is None or (isinstance(path, str) and not os.path.lexists(path)):
            continue
        real = Path(os.path.realpath(path))
        if real.is_relative_to(place):
            msg = f"{output} {'is' if real == place else 'holds'} the input {path}, which writing there would replace. Choose another output."
            raise OutputError(msg)


@contextmanager
def new_folder(output: str | Path, *, made_by: str, of: str | None = None, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; it takes its name when everything in it is written, and is removed on any error.

    Args:
        made_by, of (`str`): see `require_free`.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False, or it was made by something else; also if it appeared meanwhile.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite, made_by=made_by, of=of)
    with _temporary_beside(output) as partial:
        partial.mkdir()
        yield partial
        write_mark(partial, made_by, of)
        require_free(output, overwrite=overwrite, made_by=made_by, of=of)
        put(partial, output, overwrite=overwrite)


@contextmanager
def new_file(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the name of a file to write; it takes its real name when it is complete, and is removed on any error.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False; also if it appeared meanwhile.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite)
    with _temporary_beside(output) as folder:
        folder.mkdir()
        yield folder / output.name
        require_free(output, overwrite=overwrite)
        put(folder / output.name, output, overwrite=overwrite)


@dataclass(frozen=True)
class Unfinished:
    """The folder that holds what is finished of an output; the same command goes on from there."""

    folder: Path
    output: Path
    overwrite: bool
    made_by: str | None
    of: str | None

    @property
    def parts(self) -> Path:
        """Finished parts, each under a name that says all it depends on."""
        return self.folder / PARTS

    def put_in_place(self, whole: Path) -> None:
        """Give the finished output, which lies inside this folder, its name.

        Raises:
            OutputExistsError: if somebody else wrote it in the meantime.
        """
        if whole.is_dir():
            write_mark(whole, self.made_by or "", self.of)
        require_free(self.output, overwrite=self.overwrite, made_by=self.made_by, of=self.of)
        put(whole, self.output, overwrite=self.overwrite)


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
def unfinished(output: str | Path, *, overwrite: bool = False, made_by: str | None = None, of: str | None = None) -> Iterator[Unfinished]:
    """Yield a folder for the finished parts of an output; `made_by` names the command where that output is a folder.

    It goes when the work is done, or failed before any part was finished. Otherwise it stays, and the next call yields it
    again. Nobody else can hold it at the same time.

    Raises:
        OutputExistsError: if the output exists and `overwrite` is False.
        OutputError: if another process is writing this output, or nothing can be written there.
    """
    output = Path(output)
    require_free(output, overwrite=overwrite, made_by=made_by, of=of)
    # Absolute: workers of a cluster may run in another folder.
    work = Unfinished(output.absolute().with_name(f".{output.name}.unfinished"), output, overwrite, made_by, of)
    lock = FileLock(work.folder / LOCK)
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


@contextmanager
def _temporary_beside(output: Path) -> Iterator[Path]:
    """Yield a name, in a temporary folder where the output will be, so that a rename is all that is left to do.

    The folder is locked while this process lives. What killed runs left of the same output is removed first.

    Raises:
        OutputError: if nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        folder, lock = _locked_folder(output)
    except OSError as error:
        msg = f"cannot write to the folder {output.parent}: {error.strerror or error}. Choose another output."
        raise OutputError(msg) from error
    try:
        yield folder / CONTENT
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(output: Path) -> tuple[Path, FileLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            # Another process took it for a leftover in the moment before it was locked.
            continue
        if (folder / LOCK).exists():
            # mkdtemp makes folders for the owner alone.
            folder.chmod(0o755)
            return folder, lock


def _remove_leftovers(output: Path) -> None:
    """Remove what killed runs left next to an output, and restore an output that one had moved aside."""
    for suffix in (".partial", ".old"):
        for folder in _left_beside(output, suffix):
            lock = FileLock(folder / LOCK)
            try:
                if not (folder / LOCK).is_file():
                    continue
                lock.acquire(timeout=0)
            except (Timeout, OSError):
                # In use, on this machine or another one.
                continue
            if suffix == ".partial":
                logger.warning("Removing %s, which an interrupted run left there.", folder)
            elif (folder / output.name).exists() and not os.path.lexists(output):
                logger.warning("Restoring %s, which an interrupted run had moved aside.", output)
                (folder / output.name).rename(output)
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def _left_beside(output: Path, suffix: str) -> list[Path]:
    """Return the temporary folders of an output by their names, as `tempfile` makes them: not those of `NAME.more`."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    return [path for path in output.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def put(finished: Path, output: Path, *, overwrite: bool) -> None:
    """Give something finished the name of the output; what has that name is replaced only with `overwrite`.

    Raises:
        OutputExistsError: if the name is taken by now.
    """
    try:
        if overwrite and output.is_dir() and not finished.is_dir():
            raise FileExistsError
        if overwrite:
            _replace(finished, output)
        elif finished.is_dir():
            # Reserves the name; renaming a folder over an empty one is one step.
            output.mkdir()
            finished.rename(output)
        else:
            _create(finished, output)
    except (FileExistsError, NotADirectoryError) as error:
        msg = f"{output} appeared while the work was done, and is left as it is; what was finished is removed. Run this again with another output."
        raise OutputExistsError(msg) from error


def _create(finished: Path, output: Path) -> None:
    """Give a file a name that nothing has."""
    try:
        os.link(finished, output)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links: reserve the name, then rename over the reservation.
        os.close(os.open(output, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        finished.replace(output)
        return
    finished.unlink()


def _replace(partial: Path, output: Path) -> None:
    """Rename over what is there; the old output is out of the way only for the moment between two renames."""
    if not output.is_dir():
        partial.replace(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    lock = FileLock(old / LOCK)
    lock.acquire(timeout=0)
    output.rename(old / output.name)
    try:
        partial.rename(output)
    except OSError:
        (old / output.name).rename(output)
        raise
    finally:
        lock.release()
        shutil.rmtree(old, ignore_errors=True)
