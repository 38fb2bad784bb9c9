"""Whether the processes of a run are those that were meant."""

from __future__ import annotations

import os

from ..errors import SettingError
from .settings import TrainingSettings


def require_processes(arguments: TrainingSettings) -> None:
    """Raise unless the processes that were started are connected, and are those that were meant.

    Both `torchrun` and `accelerate launch` can start processes that know nothing of each other.

    Raises:
        SettingError
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        msg = f"{started} processes were started (WORLD_SIZE), and this one works alone (world size {arguments.world_size}): each would train a model of its own. On a CPU pass --use_cpu; else check the launcher's configuration."
        raise SettingError(msg)
    if arguments.num_processes is not None and arguments.num_processes != arguments.world_size:
        msg = f"num_processes is {arguments.num_processes}, and {arguments.world_size} are running. Start them with `torchrun --nproc_per_node {arguments.num_processes} -m geneformer_hf {arguments.command} …`."
        raise SettingError(msg)
    if arguments.fsdp and arguments.world_size == 1:
        msg = "fsdp divides a model among processes, and there is one. Start several with `torchrun --nproc_per_node …`, or leave fsdp out."
        raise SettingError(msg)
    if arguments.n_gpu > 1:
        msg = f"{arguments.n_gpu} GPUs are visible to one process. Use them with `torchrun --nproc_per_node {arguments.n_gpu} -m geneformer_hf {arguments.command} …`, or show it one (CUDA_VISIBLE_DEVICES=0)."
        raise SettingError(msg)
