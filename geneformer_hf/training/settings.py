"""What all training shares: settings beside those of transformers' Trainer, and which values cannot be used."""

# ruff: noqa: RUF009  (about is dataclasses.field with a help text)

from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import TrainingArguments

from ..device import resolve_device
from ..errors import SettingError
from ..models.adapters import LORA_TARGETS, QUANTIZATIONS, LoraSettings

BATCH_LAYOUTS = ("auto", "padded", "packed")
WHOLE = "a whole number above 0"
SHARE = "a share of at least 0 and below 1"
ADAPTERS = ("none", "lora")
RANGES: dict[str, tuple[float, Any, str]] = {
    "per_device_train_batch_size": (1, int, WHOLE),
    "per_device_eval_batch_size": (1, int, WHOLE),
    "gradient_accumulation_steps": (1, int, WHOLE),
    "max_tokens_per_batch": (1, int, WHOLE),
    "baseline_cells": (1, int, WHOLE),
    "num_processes": (1, int, WHOLE),
    "freeze_layers": (0, int, "0 or a whole number of layers"),
    "lora_rank": (1, int, WHOLE),
    "lora_alpha": (1e-9, (int, float), "a number above 0"),
    "lora_dropout": (0, (int, float), SHARE),
    "dataloader_num_workers": (0, int, "0 or a whole number"),
    "seed": (0, int, "0 or a whole number"),
    "data_seed": (0, int, "0 or a whole number"),
    "num_train_epochs": (1e-9, (int, float), "a number above 0"),
    "learning_rate": (0, (int, float), "0 or a number above it"),
    "adam_beta1": (0, (int, float), "a number from 0 to below 1"),
    "adam_beta2": (0, (int, float), "a number from 0 to below 1"),
    "warmup_steps": (0, (int, float), "0 or a number above it"),
    "weight_decay": (0, (int, float), "0 or a number above it"),
    "max_grad_norm": (0, (int, float), "0 (no clipping) or a number above it"),
    "save_steps": (1e-9, (int, float), "a number above 0"),
    "logging_steps": (1e-9, (int, float), "a number above 0"),
    "eval_steps": (1e-9, (int, float), "a number above 0"),
}
"""Lowest value, type, and what is expected, of settings that are numbers."""


def about(text: str, default: Any = None, **more: Any) -> Any:
    """Return a field of a dataclass with a help text."""
    return field(default=default, metadata={"help": text}, **more)


@dataclass
class TrainingSettings(TrainingArguments):
    """Every argument of `transformers.TrainingArguments`, and what pretraining and fine-tuning share."""

    command: ClassVar[str] = "train"
    ranges: ClassVar[dict[str, tuple[float, Any, str]]] = RANGES
    lists: ClassVar[tuple[str, ...]] = ()
    """Settings that hold several texts; one alone may be given as it is."""
    mappings: ClassVar[tuple[str, ...]] = ()
    """Settings that hold names and values; on the command line, JSON."""

    from_checkpoint: str | None = about("go on from the weights of this checkpoint (folder or Hub id)")
    tokenizer: str | None = about("folder or Hub id with the tokenizer the data were made with (default: that of from_checkpoint)")
    train_data: list[str] | None = about("data to train on")
    batch_layout: str = about("packed: cells end to end, no padding; padded: to the longest of a batch; auto: packed", "auto")
    max_tokens_per_batch: int | None = about("bound the tokens of a batch, pads included, instead of counting per_device_train_batch_size cells")
    group_by_length: bool | None = about("padded batches of cells of similar length (default: for padded batches)")
    freeze_layers: int = about("encoder layers to leave as they are, from the first", 0)
    freeze_embeddings: bool = about("leave the embeddings as they are", False)
    adapter: str = about("none: train the weights; lora: train a low-rank adapter beside them", ADAPTERS[0])
    quantization: str = about(f"with an adapter, load the weights below it in: {', '.join(QUANTIZATIONS)}", "none")
    double_quantization: bool = about("nf4: quantise the scales too", True)
    compute_dtype: str = about("nf4: what weights are computed in (bf16, fp16, fp32)", "bf16")
    lora_rank: int = about("rank of the update", LoraSettings.rank)
    lora_alpha: float = about("the update is multiplied by lora_alpha / lora_rank", LoraSettings.alpha)
    lora_dropout: float = about("dropout before the update", LoraSettings.dropout)
    lora_targets: str = about(f"linear layers with an update: {', '.join(LORA_TARGETS)}", LoraSettings.targets)
    baseline_cells: int = about("training cells that the baselines learn from, at most", 20_000)
    num_processes: int | None = about("refuse to run in another number of processes than this")
    overwrite: bool = about("replace a finished run, or another one, in output_dir; an unfinished one goes on", False)

    # Other defaults than transformers'.
    eval_strategy: str = about("when to evaluate: epoch, steps or no", "epoch")
    logging_steps: float = about("steps between two logs", 50)
    save_total_limit: int | None = 3
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if not self.output_dir:
            msg = "output_dir is missing: name a folder for checkpoints and the model."
            raise SettingError(msg)
        for name in self.mappings:
            self._read_mapping(name)
        # Trainer would take its bar away wherever transformers' own messages are turned off.
        self.disable_tqdm = bool(self.disable_tqdm)
        self.use_cpu_asked = self.use_cpu
        if resolve_device().type == "cpu":
            # The same settings on a laptop as on a GPU: Trainer wants to be told before it takes bf16.
            self.use_cpu = True
        for name in self.lists:
            if isinstance(getattr(self, name), (str, Path)):
                setattr(self, name, [getattr(self, name)])
        wrong = self.out_of_range()
        if wrong:
            self._refuse(wrong)
        super().__post_init__()
        wrong = [text for holds, text in self.contradictions() if holds]
        if wrong:
            self._refuse(wrong)

    def _read_mapping(self, name: str) -> None:
        """Read JSON, or the same without its quotation marks."""
        value = getattr(self, name)
        if isinstance(value, str):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
            if not isinstance(value, dict):
                msg = f"{name} is {value!r}; expected names and values, as --{name} '{{\"hidden_size\": 128}}'."
                raise SettingError(msg)
            setattr(self, name, value)

    @staticmethod
    def _refuse(wrong: list[str]) -> None:
        msg = f"These settings cannot be used: {'; '.join(wrong)}."
        raise SettingError(msg)

    def out_of_range(self) -> list[str]:
        """Return what is not a value that the setting takes; looked at before Trainer's own arithmetic with it."""
        wrong = []
        for name, (lowest, kind, text) in self.ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= lowest
            if not fits:
                wrong.append(f"{name} is {value!r}; expected {text}")
        for name, choices in (
            ("batch_layout", BATCH_LAYOUTS),
            ("adapter", ADAPTERS),
            ("quantization", ("none", *QUANTIZATIONS)),
            ("lora_targets", tuple(LORA_TARGETS)),
            ("compute_dtype", ("bf16", "fp16", "fp32")),
        ):
            value = getattr(self, name)
            if value not in choices:
                wrong.append(f"{name} {value!r} is not one of {', '.join(choices)}{suggestion(str(value), choices)}")
        if isinstance(self.lora_dropout, (int, float)) and self.lora_dropout >= 1:
            wrong.append(f"lora_dropout is {self.lora_dropout}; expected {SHARE}")
        for name in self.lists:
            values = getattr(self, name)
            if values is not None and not (isinstance(values, (list, tuple)) and all(isinstance(value, (str, Path)) for value in values)):
                wrong.append(f"{name} is {values!r}; expected a list of texts")
        if self.max_steps != -1 and not (isinstance(self.max_steps, int) and self.max_steps > 0):
            wrong.append(f"max_steps is {self.max_steps!r}; expected a whole number above 0, or -1 for num_train_epochs")
        return wrong

    def contradictions(self) -> list[tuple[bool, str]]:
        """Return what contradicts what, each with whether it holds."""
        return [
            (self.quantization != "none" and self.adapter == "none", f"quantization {self.quantization!r} is for weights that stand still: pass adapter lora as well"),
            (self.adapter == "lora" and self.freeze_embeddings, "with an adapter all embeddings stand still; leave out freeze_embeddings"),
            (bool(self.group_by_length) and self.batch_layout != "padded", "group_by_length is for batch_layout 'padded'; packed batches have no pads to save"),
            (self.group_by_length is False and self.max_tokens_per_batch is not None and self.batch_layout == "padded",
             "padded batches with max_tokens_per_batch are always grouped by length"),
            (self.auto_find_batch_size, "auto_find_batch_size would change the batch size of the recipe; use max_tokens_per_batch"),
            (self.remove_unused_columns, "remove_unused_columns would remove the keys of cells"),
            (not self.average_tokens_across_devices, "average_tokens_across_devices must be on: the loss is a mean over the items of all processes"),
            (self.train_sampling_strategy != "random", "train_sampling_strategy is Trainer's own; use batch_layout and group_by_length"),
            (self.dataloader_drop_last, "dataloader_drop_last is not needed: a last step is filled up with cells of the next epoch"),
            (max(self.seed, self.data_seed or 0) >= 1 << 32, f"seed is {self.seed} and data_seed {self.data_seed}; expected less than 2**32"),
            (max(self.adam_beta1, self.adam_beta2) >= 1, f"adam_beta1 is {self.adam_beta1} and adam_beta2 {self.adam_beta2}; expected less than 1"),
            (self.ignore_data_skip, "ignore_data_skip would show the same cells again after an interruption"),
            (self.neftune_noise_alpha is not None, "neftune_noise_alpha scales noise by the length of a row, which here holds several cells"),
            (str(self.lr_scheduler_type) in ("SchedulerType.REDUCE_ON_PLATEAU", "SchedulerType.GREEDY", "reduce_lr_on_plateau", "greedy"),
             "this lr_scheduler_type follows evaluations and losses as they are logged, so numbers would depend on how often that is"),
            (self.push_to_hub, "push_to_hub would publish checkpoints in place of the finished model; run `geneformer-hf push output_dir/model REPO` when it is done"),
            (str(self.save_strategy) in ("SaveStrategy.BEST", "best") and (self.metric_for_best_model is None or str(self.eval_strategy) in ("IntervalStrategy.NO", "no")),
             "save_strategy 'best' needs metric_for_best_model and an eval_strategy; without them no checkpoint would be saved"),
            (self.dataloader_persistent_workers and not self.dataloader_num_workers, "dataloader_persistent_workers needs dataloader_num_workers above 0"),
            (self.save_only_model, "save_only_model leaves out what resuming needs; the final model is saved by itself in output_dir/model"),
        ]  # fmt: skip

    @property
    def lora(self) -> LoraSettings:
        """The adapter to train."""
        return LoraSettings(rank=self.lora_rank, alpha=self.lora_alpha, dropout=self.lora_dropout, targets=self.lora_targets)

    @property
    def order_seed(self) -> int:
        """Seed of order, held-out cells and masks."""
        return self.seed if self.data_seed is None else self.data_seed


def suggestion(name: str, known: Any) -> str:
    """Return a hint at the known name closest to an unknown one, for the end of a sentence.

    Example:
        >>> suggestion("learning_rte", ["learning_rate", "seed"])
        " (did you mean 'learning_rate'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
