"""A perturbation run in parts, shared by processes: each takes its share, the first joins them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from ..errors import OutputExistsError, SettingError
from ..outputs import PARTS, new_part, unfinished
from .perturbation_table import join_parts
from .states import StateVectors

T = TypeVar("T")
PLAN, STATES = "plan.json", "states.json"


def processes() -> PartialState:
    """Return the processes of this run.

    Raises:
        SettingError: if several were started that know nothing of each other, so that each would do all of the work.
    """
    # Without accelerators processes find each other only if they are told that there are none.
    state = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        msg = f"{started} processes were started (WORLD_SIZE), and this one works alone: each would do all of the work. Start them with `torchrun --nproc_per_node {started} -m geneformer_hf perturb …`."
        raise SettingError(msg)
    return state


def mine_of(items: Sequence[T]) -> Sequence[T]:
    """Return the share of this process: every n-th, so that neighbours, which are alike, are spread."""
    state = processes()
    return items[state.process_index :: state.num_processes]


@contextmanager
def shared_parts(output: Path, identity: dict[str, Any], *, overwrite: bool) -> Iterator[tuple[Path, Callable[[Sequence[Path]], None]]]:
    """Yield the folder for parts, and what to call with all of them in the end.

    Raises:
        OutputExistsError: if finished parts of another plan lie there.
    """
    state = processes()
    folder = output.absolute().with_name(f".{output.name}.unfinished") / PARTS
    if not state.is_main_process:
        # The first process has made the folder by now, and holds it.
        state.wait_for_everyone()
        yield folder, lambda paths: state.wait_for_everyone()
        state.wait_for_everyone()
        return
    with unfinished(output, overwrite=overwrite) as work:
        _require_same(work.parts, identity, output)
        state.wait_for_everyone()

        def finish(paths: Sequence[Path]) -> None:
            state.wait_for_everyone()
            whole = work.folder / output.name
            join_parts(paths, whole, identity)
            work.put_in_place(whole)

        yield work.parts, finish
    state.wait_for_everyone()


def shared_states(folder: Path, compute: Callable[[], StateVectors]) -> StateVectors:
    """Return vectors of states, computed by the first process for all of them, and once for a run however often it stops."""
    state, path = processes(), folder / STATES
    if state.is_main_process and not path.is_file():
        compute().save(path)
    state.wait_for_everyone()
    return StateVectors.load(path)


def _require_same(parts: Path, identity: dict[str, Any], output: Path) -> None:
    path = parts.parent / PLAN
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(identity))
        different = [name for name in ours if ours[name] != theirs.get(name)]
        if different:
            msg = (
                f"{parts.parent} holds finished parts of another plan for {output} (other {', '.join(different)}). Go on with that plan, choose another output, or "
                "remove that folder to forget them."
            )
            raise OutputExistsError(msg)
    with new_part(path) as partial:
        partial.write_text(json.dumps(identity) + "\n", encoding="utf-8")
