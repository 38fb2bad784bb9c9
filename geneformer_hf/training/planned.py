"""transformers' Trainer with planned batches, whole checkpoints, and no silent surprises: what pretraining and fine-tuning share."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler
from transformers.trainer_utils import rotate_checkpoints

from ..data.batching import BatchPlan, RankBatches
from ..data.collators import KEY
from ..data.masking import CellKey
from ..data.mixtures import EVALUATION, Mixture
from ..errors import CheckpointError, GeneformerError, OutputError, SettingError, TrainingDivergedError
from ..models.adapters import unwrapped
from ..models.attention import PACKED_ATTENTION
from ..models.tokenization_geneformer import GeneformerTokenizer
from .checkpointing import IDENTITY_FILE, UNFINISHED_CHECKPOINT, put_in_place
from .progress import ProgressBar
from .settings import TrainingSettings

logger = logging.getLogger(__name__)

CELLS = "cells"


class PlannedLoader(DataLoader):
    """A DataLoader over planned batches. They are those of this process already, so accelerate need not shard them."""

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Trainer calls this."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class KeyedCollator:
    """The collator, with the cells of the batch beside it, for messages."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, and the keys of its cells."""
        return self.collate(cells) | {CELLS: [cell[KEY] for cell in cells]}


def layout_of(args: TrainingSettings) -> str:
    """Return how batches are laid out."""
    return "padded" if args.batch_layout == "padded" else "packed"


class PlannedTrainer(Trainer):
    """Trainer whose steps follow a plan made from the seed.

    Args:
        model (`PreTrainedModel` or `PeftModel`, or None with `model_init`)
        args (`TrainingSettings`)
        mixture (`Mixture`): the cells.
        dataset (`KeyedCells`): gives cells by their keys.
        collate: makes a batch of some of its cells.
        identity (`dict`): what the numbers depend on; written with each checkpoint.
    """

    args: Any

    def __init__(
        self, model: Any, args: TrainingSettings, *, mixture: Mixture, dataset: Any, collate: Any, tokenizer: GeneformerTokenizer, eval_dataset: Any = None,
        identity: dict[str, Any] | None = None, callbacks: Sequence[TrainerCallback] = (), model_init: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.mixture, self.identity = mixture, identity or {}
        self.layout = layout_of(args)
        if model is not None and self.layout == "packed":
            unwrapped(model).set_attn_implementation(PACKED_ATTENTION)
        self.keyed_collator = KeyedCollator(collate)
        super().__init__(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=list(callbacks), eval_dataset=eval_dataset,
            data_collator=self.keyed_collator, model_init=model_init,
        )  # fmt: skip
        self.make_plan()
        self.add_callback(_RequireSharding(self))
        self.add_callback(_KeepCadence())
        for theirs in (ProgressCallback, PrinterCallback):
            self.remove_callback(theirs)
        self._bar = ProgressBar()
        if not args.disable_tqdm:
            self.add_callback(self._bar)

    def make_plan(self) -> None:
        """Plan the steps by the arguments as they are now."""
        args = self.args
        self.plan = BatchPlan(
            self.mixture,
            batches_per_step=args.world_size * args.gradient_accumulation_steps,
            cells_per_batch=None if args.max_tokens_per_batch else args.per_device_train_batch_size,
            tokens_per_batch=args.max_tokens_per_batch,
            layout=self.layout,
            group_by_length=self.layout == "padded" and args.group_by_length is not False,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches of the plan."""
        args = self.args
        return PlannedLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=RankBatches(self.plan, rank=args.process_index, world_size=args.world_size),  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def close_bar(self) -> None:
        """Close the progress bar, where an interruption has left it open."""
        self._bar.close()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The decoder shares its weights with the embeddings, so a checkpoint holds them once.
        missing = [name for name in load_result.missing_keys if not name.startswith("cls.predictions.decoder.")]
        if missing or load_result.unexpected_keys:
            msg = f"The checkpoint does not hold this model: {len(missing)} weights are missing ({', '.join(missing[:3])}), {len(load_result.unexpected_keys)} are not of it."
            raise CheckpointError(msg)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the batches of a step; an error in a loader's worker comes without its traceback."""
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except GeneformerError as error:
            last = str(error).strip().splitlines()[-1]
            if str(error).startswith("Caught "):
                raise type(error)(last.split(": ", 1)[-1]) from error
            raise

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one batch forward and backward.

        Raises:
            TrainingDivergedError: if the loss is not finite.
        """
        cells = inputs.pop(CELLS)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            # torch has a class of its own for accelerators alone.
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            msg = (
                f"Out of memory with a batch of {len(cells):,} cells, {inputs['input_ids'].numel():,} tokens: {str(error).splitlines()[0]} "
                "Lower per_device_train_batch_size and raise gradient_accumulation_steps by as much (the numbers stay the same), bound max_tokens_per_batch, or set gradient_checkpointing."
            )
            raise SettingError(msg) from error
        if not torch.isfinite(loss):
            self._stop("The loss", float(loss), cells)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:
            # Without clipping nobody has looked yet.
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # With fp16 the scaler skips steps whose gradient overflows; that is its work.
        if not self.args.fp16 and not math.isfinite(float(norm)):
            self._stop("The gradient norm", float(norm), [])
        return norm

    def _stop(self, what: str, value: float, cells: Sequence[CellKey]) -> None:
        spoilt = self._spoilt_weights()
        where = "; ".join(
            f"{c.name} rows {', '.join(str(k.row) for k in cells if k.corpus == i)}"
            for i, c in enumerate(self.mixture.corpora)
            if any(k.corpus == i for k in cells)
        )
        cause = f"the weights are not finite either ({len(spoilt)} tensors, first {spoilt[0]})" if spoilt else "the weights before it are finite"
        msg = (
            f"{what} is {value} at step {self.state.global_step + 1:,} (epoch {self.state.epoch or 0:.2f}, learning rate {self._get_learning_rate():.3g}, process {self.args.process_index})"
            f"{f', in the batch of {where}' if where else ''}; {cause}. Training stops, the last checkpoint stays as it is. "
            "Lower learning_rate or max_grad_norm, warm up longer, or use bf16 in place of fp16."
        )
        raise TrainingDivergedError(msg)

    def _spoilt_weights(self) -> list[str]:
        return [name for name, weight in self.accelerator.unwrap_model(self.model).named_parameters() if not bool(torch.isfinite(weight).all())]

    def require_schedule(self) -> None:
        """Make the learning-rate schedule once for nothing, so that settings it cannot take are refused before any work.

        Raises:
            ValueError, TypeError: as transformers does.
        """
        kwargs = self.args.lr_scheduler_kwargs
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        get_scheduler(self.args.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=kwargs)  # type: ignore[arg-type]
        self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]

    def dealt_batches(self, number: int, rows: np.ndarray) -> list[tuple[list[CellKey], bool]]:
        """Return this process's batches of some cells of a corpus, longest first, and whether they count.

        All processes run equally many, for those that share layers.
        """
        rows = rows[(-self.mixture.corpora[number].lengths[rows]).argsort(kind="stable")]
        size, rank, world = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        batches = [[CellKey(number, row, EVALUATION) for row in rows[i : i + size].tolist()] for i in range(0, len(rows), size)]
        mine = [(batch, True) for batch in batches[rank::world]]
        return mine + [(batches[0], False)] * (-(-len(batches) // world) - len(mine))

    # A checkpoint is first written into a folder of another name: Trainer asks this method where to.
    _unfinished: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        spoilt = self._spoilt_weights()
        if spoilt:
            msg = f"After step {self.state.global_step:,} the weights are not finite ({len(spoilt)} tensors, first {spoilt[0]}), so no checkpoint is written. Lower learning_rate or max_grad_norm."
            raise TrainingDivergedError(msg)
        name = f"checkpoint-{self.state.global_step}"
        unfinished = run / UNFINISHED_CHECKPOINT
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        best_before, self._unfinished = self.state.best_model_checkpoint, str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(run / name)
                else:
                    self.state.best_model_checkpoint = best_before
                self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
                (unfinished / name / IDENTITY_FILE).write_text(json.dumps(self.identity, indent=1) + "\n", encoding="utf-8")
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            last = sorted(int(p.name.removeprefix("checkpoint-")) for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit())
            msg = f"checkpoint {run / name} cannot be written: {error}. {f'The one of step {last[-1]:,} is whole' if last else 'There is none before it'}; make room and run the same command to go on from there."
            raise OutputError(msg) from error
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            put_in_place(unfinished / name, run / name)
        self.accelerator.wait_for_everyone()
        if self.args.save_on_each_node and self.is_local_process_zero() and (unfinished / name).is_dir():
            # Nodes without a common disk each have their own files.
            put_in_place(unfinished / name, run / name)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run), save_total_limit=self.args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=False
            )


@contextmanager
def refusals_of_trainer() -> Iterator[None]:
    """Turn what transformers says of settings it cannot take into our error."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"Trainer refuses these settings: {error}"
        raise SettingError(msg) from error


class _KeepCadence(TrainerCallback):
    """Logs, evaluates and saves as the settings of this call say: when resuming, Trainer would go by those of the checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class _RequireSharding(TrainerCallback):
    """Refuses to train when sharding was asked for and did not happen: on a CPU, FSDP silently becomes plain data parallelism."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if asked and not is_sharded(self._trainer.model_wrapped):
            msg = (
                f"FSDP was asked for, but the model is not sharded: each of {args.world_size} processes holds all of it "
                f"(on {args.device.type}, accelerate falls back to plain data parallelism without a word). Use it on GPUs, with several processes, or leave it out."
            )
            raise SettingError(msg)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of a model are divided among processes by FSDP, version 1 or 2."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(isinstance(p, DTensor) for p in model.parameters())
