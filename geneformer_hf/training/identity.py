"""What the numbers of a run depend on: a checkpoint is for runs that agree in it."""

from __future__ import annotations

from typing import Any

import torch
import xxhash

from ..models.adapters import unwrapped
from .configs import resolved
from .planned import PlannedTrainer
from .settings import TrainingSettings

# Settings that change no number: how the work is divided, watched and kept.
# fmt: off
FREE_SETTINGS = frozenset([
    "output_dir", "train_data", "eval_data", "validation_data", "test_data", "train_names", "from_checkpoint", "tokenizer", "num_processes", "gradient_accumulation_steps",
    "per_device_train_batch_size", "per_device_eval_batch_size", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_strategy", "logging_steps",
    "logging_first_step", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project", "save_strategy", "save_steps",
    "save_total_limit", "save_on_each_node", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "activation_checkpointing", "gradient_checkpointing", "baseline_cells",
    "baselines", "use_cpu", "torch_empty_cache_steps", "gene_ids", "counts_layer", "genome", "gene_classes",
    # Taken up below as what they come to.
    "batch_layout", "group_by_length", "train_weights", "data_seed",
])
# fmt: on


def identity_of(arguments: TrainingSettings, trainer: PlannedTrainer, model: Any, *, is_new: bool, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return all that the numbers of a run depend on.

    Args:
        is_new (`bool`): the weights follow from the seed.
        more: what else they depend on.
    """
    settings = {name: value for name, value in resolved(arguments).items() if name not in FREE_SETTINGS}
    batch = {"tokens per batch": arguments.max_tokens_per_batch, "batches per step": trainer.plan.batches_per_step, "batch layout": trainer.layout}
    if not arguments.max_tokens_per_batch:
        batch = {"cells per step": arguments.train_batch_size * trainer.plan.batches_per_step}
    unimportant = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    config = {name: value for name, value in unwrapped(model).config.to_dict().items() if name not in unimportant}
    return {
        **settings,
        **batch,
        "grouped by length": trainer.plan.group_by_length,
        "shares": [round(float(share), 9) for share in trainer.mixture.shares],
        "seed of order and masks": arguments.order_seed,
        "model": config,
        "first weights": xxhash.xxh3_128().hexdigest() if is_new else hash_of_weights(model),
        "data": [corpus.fingerprint for corpus in trainer.mixture.corpora],
        **(more or {}),
    }


def hash_of_weights(model: Any) -> str:
    """Return a hash of all weights: checkpoints are told apart by what they are, not by where they lie."""
    digest = xxhash.xxh3_128()
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
