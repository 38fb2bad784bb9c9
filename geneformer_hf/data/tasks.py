"""Independent tasks on this process, on several, or on a Dask cluster; what they give does not depend on which."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import CellFileError, GeneformerError, MissingExtraError, OutputError, SettingError, WorkerDiedError

LOST = "What is finished is kept: run the same command again to go on, with fewer processes if memory ran out."


class Workers(ABC):
    """Whoever does the tasks."""

    @abstractmethod
    def _finished(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Generator[tuple[int, Any]]:
        """Yield number and result of each task as it is finished, in any order."""

    def run(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, label: str = "", unit: str = "tasks", n_done: int = 0, progress: bool = False
    ) -> Generator[tuple[int, Any]]:
        """Yield number and result of each task as it is finished, in any order; left early, the rest is not done.

        Args:
            function: a function of a module, which other processes can import.
            tasks: its arguments, small: paths and numbers.
            n_done (`int`, *optional*, defaults to 0): tasks an earlier run has finished, for the progress bar.

        Raises:
            WorkerDiedError: if a process died; errors of a task come through as they are.
        """
        with (
            tqdm(total=n_done + len(tasks), initial=n_done, desc=label, unit=f" {unit}", disable=not progress or n_done + len(tasks) < 2) as bar,
            closing(self._finished(function, tasks)) as results,
        ):
            for result in results:
                bar.update(1)
                yield result


@dataclass(frozen=True)
class Failure:
    """What is wrong with a file, where that may be no reason to stop."""

    error: GeneformerError


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or what is wrong with its file."""
    try:
        return function(*arguments)
    except (OutputError, SettingError, MissingExtraError):
        # A full disk or a wrong option is no fault of the file.
        raise
    except GeneformerError as error:
        return Failure(error)


class FileTasks:
    """Tasks that belong to files: a file that cannot be used is skipped as a whole, or stops everything.

    Args:
        workers: who does them.
        skip_bad_files (`bool`): whether to go on.
    """

    def __init__(self, workers: Workers, *, skip_bad_files: bool, progress: bool) -> None:
        self._workers, self._skip, self._progress = workers, skip_bad_files, progress
        self.skipped: dict[str, GeneformerError] = {}
        """Files that could not be used, and why."""
        self.parts_of: dict[str, list[Path]] = {}
        """Finished parts to forget where a file turns out to be bad: mended, it will have others."""

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], files: Sequence[str], label: str, unit: str, *, n_done: int = 0) -> list[Any]:
        """Return the results of the tasks, without those of skipped files.

        Args:
            files (`Sequence[str]`): the file each task belongs to.

        Raises:
            GeneformerError: of the first bad file, unless bad files are skipped.
        """
        results: list[Any] = [None] * len(tasks)
        failed: str | None = None
        with closing(
            self._workers.run(attempt, [(function, *task) for task in tasks], label=label, unit=unit, n_done=n_done, progress=self._progress)
        ) as finished:
            for number, result in finished:
                results[number] = result
                if isinstance(result, Failure):
                    self.skipped.setdefault(files[number], result.error)
                    if not self._skip:
                        failed = files[number]
                        break
        if failed is not None:
            for part in self.parts_of.get(failed, ()):
                part.unlink(missing_ok=True)
            raise self.skipped[failed]
        return [result for result, name in zip(results, files, strict=True) if name not in self.skipped]

    def require_some(self, n_files: int) -> None:
        """Raise if no file is left.

        Raises:
            CellFileError
        """
        if len(self.skipped) == n_files:
            msg = f"none of the {n_files:,} files can be used: {'; '.join(map(str, self.skipped.values()))}"
            raise CellFileError(msg)


class _Here(Workers):
    def _finished(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Generator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            yield number, function(*task)


class _Processes(Workers):
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def _finished(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Generator[tuple[int, Any]]:
        futures = {self._pool.submit(function, *task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            msg = f"A worker process died: it was killed, or memory ran out. {LOST}"
            raise WorkerDiedError(msg) from error
        finally:
            for future in futures:
                future.cancel()
            # What runs cannot be stopped, and what it writes should be there before anybody looks.
            wait([future for future in futures if not future.cancelled()])


class _Dask(Workers):
    def __init__(self, client: Any) -> None:
        self._client = client

    def _finished(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Generator[tuple[int, Any]]:
        import distributed

        # Not pure: whether a part is there is for the task to see, not for the scheduler to remember from another run.
        futures = [self._client.submit(function, *task, pure=False) for task in tasks]
        number_of = {future.key: number for number, future in enumerate(futures)}
        try:
            for future in distributed.as_completed(futures):
                yield number_of[future.key], future.result()
        except distributed.KilledWorker as error:
            msg = f"A Dask worker died again and again over the same task ({error}). {LOST}"
            raise WorkerDiedError(msg) from error
        finally:
            self._client.cancel(futures, force=True)


@contextmanager
def open_workers(num_proc: int | None = None, dask: str | None = None) -> Iterator[Workers]:
    """Start whoever does the tasks, and stop them at the end.

    Args:
        num_proc (`int`, *optional*): processes on this machine; workers of a local cluster where `dask` is `local`.
        dask (`str`, *optional*): address of a Dask scheduler, or `local` for a cluster on this machine.

    Raises:
        MissingExtraError: if Dask is asked for and not installed.
        SettingError: if no scheduler answers at the address.
    """
    if dask is not None:
        with _open_dask(num_proc, dask) as workers:
            yield workers
    elif num_proc is None or num_proc <= 1:
        yield _Here()
    else:
        # Spawned, not forked: numpy, Arrow and torch hold threads that do not survive a fork.
        pool = ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn"), initializer=_die_with_parent)
        try:
            yield _Processes(pool)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _open_dask(num_proc: int | None, dask: str) -> Iterator[Workers]:
    try:
        import distributed
    except ModuleNotFoundError as error:
        msg = "Dask is not installed. Install it with `pip install 'geneformer-hf[dask]'`."
        raise MissingExtraError(msg) from error
    if dask != "local":
        try:
            client = distributed.Client(dask, timeout="20s")
        except (OSError, ValueError) as error:
            msg = f"No Dask scheduler answers at {dask!r} ({type(error).__name__}: {error}). Expected an address such as tcp://host:8786, or 'local'."
            raise SettingError(msg) from error
        with client:
            yield _Dask(client)
        return
    n_workers = num_proc or os.cpu_count() or 1
    # It reports every connection that closes, at the end of every run.
    chatter, level = logging.getLogger("distributed"), logging.getLogger("distributed").level
    chatter.setLevel(logging.CRITICAL)
    try:
        with (
            distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                processes=True,
                # Without an address the scheduler's HTTP server asks for port 8787, where the user's own cluster may listen.
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield _Dask(client)
    finally:
        chatter.setLevel(level)


def _die_with_parent() -> None:
    """End this worker when the process that started it is gone; a pool's workers would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
