"""transformers' Trainer with our batches, our evaluation, whole checkpoints, and no silent surprises."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler
from transformers.trainer_utils import rotate_checkpoints

from ..data.batching import BatchPlan, RankBatches
from ..data.collators import KEY, DataCollatorForMaskedGenes
from ..data.masking import CellKey
from ..data.mixtures import EVALUATION, Corpus, KeyedCells, Mixture
from ..errors import CheckpointError, GeneformerError, OutputError, SettingError, TrainingDivergedError
from ..models.attention import PACKED_ATTENTION
from ..models.modeling_geneformer import IGNORED, has_fused_loss
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.metrics import MaskedGeneScores
from .arguments import GeneformerPretrainingArguments
from .checkpointing import IDENTITY_FILE, UNFINISHED_CHECKPOINT, put_in_place
from .progress import ProgressBar

logger = logging.getLogger(__name__)

CELLS = "cells"


class PlannedLoader(DataLoader):
    """A DataLoader over planned batches. They are those of this process already, so accelerate need not shard them."""

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Trainer calls this."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class KeyedCollator:
    """The collator, with the cells of the batch beside it, for messages."""

    def __init__(self, collate: DataCollatorForMaskedGenes) -> None:
        self.collate = collate

    def __call__(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch, and the keys of its cells."""
        return self.collate(cells) | {CELLS: [cell[KEY] for cell in cells]}


class GeneformerPretrainer(Trainer):
    """Trainer for masked genes.

    Args:
        model (`GeneformerForMaskedLM`)
        args (`GeneformerPretrainingArguments`)
        mixture (`Mixture`): the cells; those held out are evaluated on.
        tokenizer (`GeneformerTokenizer`)
        identity (`dict`): what the numbers depend on; written with each checkpoint.
    """

    args: GeneformerPretrainingArguments

    def __init__(
        self, model: Any, args: GeneformerPretrainingArguments, *, mixture: Mixture, tokenizer: GeneformerTokenizer, identity: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:  # fmt: skip
        self.mixture, self.identity = mixture, identity or {}
        self.layout = "padded" if args.batch_layout == "padded" else "packed"
        if self.layout == "packed":
            model.set_attn_implementation(PACKED_ATTENTION)
        if args.fused_loss:
            if not has_fused_loss():
                msg = f"fused_loss needs torch 2.13 or later; this is torch {torch.__version__}."
                raise SettingError(msg)
            model.fused_loss = True
        self.keyed_collator = self._collator(args, tokenizer)
        self._require_metric(args)
        super().__init__(
            model=model, args=args, train_dataset=KeyedCells(mixture.corpora), processing_class=tokenizer, callbacks=list(callbacks),
            eval_dataset=[corpus for corpus in mixture.corpora if corpus.n_held_out] or None,  # type: ignore[arg-type]
            data_collator=self.keyed_collator,
        )  # fmt: skip
        self.plan = BatchPlan(
            mixture,
            batches_per_step=args.world_size * args.gradient_accumulation_steps,
            cells_per_batch=None if args.max_tokens_per_batch else args.per_device_train_batch_size,
            tokens_per_batch=args.max_tokens_per_batch,
            layout=self.layout,
            group_by_length=self.layout == "padded" and args.group_by_length is not False,
        )
        self.add_callback(_RequireSharding(self))
        self.add_callback(_KeepCadence())
        for theirs in (ProgressCallback, PrinterCallback):
            self.remove_callback(theirs)
        self._bar = ProgressBar()
        if not args.disable_tqdm:
            self.add_callback(self._bar)

    def _require_metric(self, args: GeneformerPretrainingArguments) -> None:
        """Raise if the figure that tells the best checkpoint is not among those that will be measured."""
        names = list(MaskedGeneScores().figures())
        judged = [corpus.name for corpus in self.mixture.corpora if corpus.n_held_out]
        known = [*names, *(f"{corpus}_{name}" for corpus in judged for name in names if len(judged) > 1)]
        wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if wanted not in known:
            msg = f"metric_for_best_model {args.metric_for_best_model!r} is not one of {', '.join(known)}."
            raise SettingError(msg)

    def _collator(self, args: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer) -> KeyedCollator:
        rates = args.rates
        return KeyedCollator(
            DataCollatorForMaskedGenes(
                tokenizer, mask_probability=rates.chosen, mask_share=rates.masked, random_share=rates.random, seed=args.order_seed, layout=self.layout,
                # Fixed shapes, so that compiled code is not compiled anew for every length.
                pad_to_multiple_of=64 if args.torch_compile else None,
            )
        )  # fmt: skip

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches of the plan."""
        args = self.args
        return PlannedLoader(
            KeyedCells(self.mixture.corpora),
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

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return loss, perplexity and accuracies at hidden genes of held-out cells, of each corpus and of all.

        The hidden genes are the same each time.
        """
        corpora: list[Corpus] = eval_dataset or self.eval_dataset or []  # type: ignore[assignment]
        metrics: dict[str, float] = {}
        total = MaskedGeneScores()
        for corpus in corpora:
            scores = self.score_held_out(corpus)
            if len(corpora) > 1:
                metrics |= {f"{metric_key_prefix}_{corpus.name}_{name}": value for name, value in scores.figures().items()}
            total += scores
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in total.figures().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_held_out(self, corpus: Corpus) -> MaskedGeneScores:
        """Return the scores of the model as it is now on the held-out cells of one corpus."""
        model, collate = self.model, self.keyed_collator.collate
        mask = collate.masker.mask_token_id
        assert model is not None
        was_training = model.training
        model.eval()
        scores, batches = MaskedGeneScores(), self.held_out_batches(corpus)
        dataset, progress = KeyedCells(self.mixture.corpora), not self.args.disable_tqdm and self.is_world_process_zero()
        with torch.no_grad(), self.compute_loss_context_manager():
            for keys, counts in tqdm(batches, desc=f"Evaluating on {corpus.name}", disable=None if progress else True, leave=False, unit=" batches"):
                batch = self._prepare_inputs(collate(dataset.__getitems__(keys)))
                logits_mv = model(**batch, full_logits=False).logits
                if counts:
                    asked = batch["labels"] != IGNORED
                    scores.add(logits_mv, batch["labels"][asked], batch["input_ids"][asked] == mask)
        model.train(was_training)
        if self.args.world_size > 1:
            scores.merge(self.accelerator.reduce, self.args.device)
        return scores

    def held_out_batches(self, corpus: Corpus) -> list[tuple[list[CellKey], bool]]:
        """Return this process's held-out batches, and whether they count: all processes run equally many, for those that share layers."""
        number = self.mixture.corpora.index(corpus)
        rows = corpus.held_out_rows[(-corpus.lengths[corpus.held_out_rows]).argsort(kind="stable")]
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
