"""Arguments of pretraining: those of transformers' Trainer and ours, from Python, YAML and the command line."""

# ruff: noqa: RUF009  (_about is dataclasses.field with a help text)

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import textwrap
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..data.masking import MaskingRates
from ..device import resolve_device
from ..errors import SettingError
from ..models.configuration_geneformer import PRESETS

_OFF_BY_DEFAULT = ("activation_checkpointing", "gradient_checkpointing", "disable_tqdm")
"""None until Trainer says False."""
BATCH_LAYOUTS = ("auto", "padded", "packed")
RECIPES = "recipes"
_DERIVED = ("overwrite", "resume_from_checkpoint", "hub_token", "do_eval", "use_cpu", "dataloader_pin_memory", "local_rank")
"""What is for one call alone, secrets, and what follows from the machine or from other settings."""


_WHOLE = "a whole number above 0"
RANGES: dict[str, tuple[float, Any, str]] = {
    "per_device_train_batch_size": (1, int, _WHOLE),
    "per_device_eval_batch_size": (1, int, _WHOLE),
    "gradient_accumulation_steps": (1, int, _WHOLE),
    "max_tokens_per_batch": (1, int, _WHOLE),
    "baseline_cells": (1, int, _WHOLE),
    "num_processes": (1, int, _WHOLE),
    "freeze_layers": (0, int, "0 or a whole number of layers"),
    "dataloader_num_workers": (0, int, "0 or a whole number"),
    "seed": (0, int, "0 or a whole number"),
    "data_seed": (0, int, "0 or a whole number"),
    "num_train_epochs": (1e-9, (int, float), "a number above 0"),
    "learning_rate": (0, (int, float), "0 or a number above it"),
    "held_out": (0, (int, float), "a share below 1, or a number of cells"),
    "mask_probability": (0, (int, float), "a share between 0 and 1"),
    "mask_share": (0, (int, float), "a share"),
    "random_share": (0, (int, float), "a share"),
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
METRICS = ("loss", "loss_at_mask", "perplexity", "accuracy_top1", "accuracy_top10")


def _about(text: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": text}, **more)


@dataclass
class GeneformerPretrainingArguments(TrainingArguments):
    """How to pretrain: every argument of `transformers.TrainingArguments`, and these.

    The batch size of a recipe is in cells: `per_device_train_batch_size` times `gradient_accumulation_steps` times the number of
    processes. Same product, same numbers.

    Example:
        >>> arguments = GeneformerPretrainingArguments(output_dir="run", shape="gf-6L-30M-i2048", tokenizer="geneformer-v1", train_data=["tokens"])
        >>> arguments.mask_probability, arguments.batch_layout
        (0.15, 'auto')
    """

    shape: str | None = _about(f"shape of a new model with random weights: {', '.join(PRESETS)}")
    shape_overrides: dict | str | None = _about('fields of the configuration to change, as JSON: {"hidden_size": 128}')
    from_checkpoint: str | None = _about("go on from the weights of this checkpoint (folder or Hub id) instead")
    tokenizer: str | None = _about("folder or Hub id with the tokenizer the data were made with (default: that of from_checkpoint)")
    train_data: list[str] | None = _about("tokenized datasets to train on; with several, the first is the new domain")
    train_names: list[str] | None = _about("what logs call them (default: the names of their folders)")
    train_weights: list[float] | None = _about("share of each dataset among the cells shown (default: all cells once an epoch)")
    eval_data: list[str] | None = _about("tokenized datasets to evaluate on, one for each of train_data, for instance of other donors")
    held_out: float = _about("without eval_data, cells of each dataset kept for evaluation: a share below 1, or a number", 0.01)
    mask_probability: float = _about("share of genes the model is asked for", MaskingRates.chosen)
    mask_share: float = _about("of those, the share that becomes <mask>", MaskingRates.masked)
    random_share: float = _about("of those, the share that becomes a random gene; the rest stays", MaskingRates.random)
    batch_layout: str = _about("packed: cells end to end, no padding; padded: to the longest of a batch; auto: packed", "auto")
    max_tokens_per_batch: int | None = _about("bound the tokens of a batch, pads included, instead of counting per_device_train_batch_size cells")
    group_by_length: bool | None = _about("padded batches of cells of similar length (default: for padded batches)")
    fused_loss: bool = _about("compute logits and loss in chunks: less memory, slower on a CPU", False)
    freeze_layers: int = _about("encoder layers to leave as they are, from the first", 0)
    freeze_embeddings: bool = _about("leave the embeddings as they are", False)
    baseline_cells: int = _about("training cells from which the two baselines count genes", 20_000)
    num_processes: int | None = _about("refuse to run in another number of processes than this")
    overwrite: bool = _about("replace a finished run, or another one, in output_dir; an unfinished one goes on", False)

    # Other defaults than transformers'.
    eval_strategy: str = "epoch"
    logging_steps: float = 50
    save_total_limit: int | None = 3
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if not self.output_dir:
            msg = "output_dir is missing: name a folder for checkpoints and the model."
            raise SettingError(msg)
        if isinstance(self.shape_overrides, str):
            # JSON, or the same without its quotation marks.
            with contextlib.suppress(yaml.YAMLError):
                self.shape_overrides = yaml.safe_load(self.shape_overrides)
            if not isinstance(self.shape_overrides, dict):
                msg = f"shape_overrides is {self.shape_overrides!r}; expected names and values, as --shape_overrides '{{\"hidden_size\": 128}}'."
                raise SettingError(msg)
        # Trainer would take its bar away wherever transformers' own messages are turned off.
        self.disable_tqdm = bool(self.disable_tqdm)
        self.use_cpu_asked = self.use_cpu
        if resolve_device().type == "cpu":
            # The same settings on a laptop as on a GPU: Trainer wants to be told before it takes bf16.
            self.use_cpu = True
        for name in ("train_data", "train_names", "eval_data"):
            if isinstance(getattr(self, name), (str, Path)):
                setattr(self, name, [getattr(self, name)])
        self._require_in_range()
        super().__post_init__()
        self._require_consistent()
        MaskingRates(self.mask_probability, self.mask_share, self.random_share)

    def _require_in_range(self) -> None:
        """Raise if a setting is not what it has to be; before Trainer's own arithmetic with it.

        Raises:
            SettingError
        """
        wrong = []
        for name, (lowest, kind, text) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= lowest
            if not fits:
                wrong.append(f"{name} is {value!r}; expected {text}")
        for name in ("train_data", "train_names", "eval_data"):
            values = getattr(self, name)
            if values is not None and not (isinstance(values, (list, tuple)) and all(isinstance(value, (str, Path)) for value in values)):
                wrong.append(f"{name} is {values!r}; expected a list of texts")
        weights = self.train_weights
        if weights is not None and not (
            isinstance(weights, (list, tuple)) and all(isinstance(w, (int, float)) and math.isfinite(w) and w > 0 for w in weights)
        ):
            wrong.append(f"train_weights is {weights!r}; expected one number above 0 for each dataset")
        if self.max_steps != -1 and not (isinstance(self.max_steps, int) and self.max_steps > 0):
            wrong.append(f"max_steps is {self.max_steps!r}; expected a whole number above 0, or -1 for num_train_epochs")
        if self.held_out > 1 and self.held_out != int(self.held_out):
            wrong.append(f"held_out is {self.held_out}; expected a share below 1, or a whole number of cells")
        if wrong:
            msg = f"These settings cannot be used: {'; '.join(wrong)}."
            raise SettingError(msg)

    def _require_consistent(self) -> None:
        contradictions = [
            (self.shape is not None and self.from_checkpoint is not None, "shape makes a new model and from_checkpoint goes on from one; give one of them"),
            (self.shape_overrides is not None and self.shape is None, "shape_overrides changes a new model; give shape as well"),
            (self.shape is not None and self.shape not in PRESETS, f"shape {self.shape!r} is not one of {', '.join(PRESETS)}{suggestion(self.shape or '', PRESETS)}"),
            (self.batch_layout not in BATCH_LAYOUTS, f"batch_layout {self.batch_layout!r} is not one of {', '.join(BATCH_LAYOUTS)}"),
            (bool(self.group_by_length) and self.batch_layout != "padded", "group_by_length is for batch_layout 'padded'; packed batches have no pads to save"),
            (self.group_by_length is False and self.max_tokens_per_batch is not None and self.batch_layout == "padded",
             "padded batches with max_tokens_per_batch are always grouped by length"),
            (self.auto_find_batch_size, "auto_find_batch_size would change the batch size of the recipe; use max_tokens_per_batch"),
            (self.remove_unused_columns, "remove_unused_columns would remove the keys of the masks"),
            (self.label_smoothing_factor > 0, "label_smoothing_factor needs all logits at all positions, which pretraining never computes"),
            (not self.average_tokens_across_devices, "average_tokens_across_devices must be on: the loss is a mean over the genes of all processes"),
            (self.train_sampling_strategy != "random", "train_sampling_strategy is Trainer's own; use batch_layout and group_by_length"),
            (self.dataloader_drop_last, "dataloader_drop_last is not needed: a last step is filled up with cells of the next epoch"),
            (max(self.seed, self.data_seed or 0) >= 1 << 32, f"seed is {self.seed} and data_seed {self.data_seed}; expected less than 2**32"),
            (max(self.adam_beta1, self.adam_beta2) >= 1, f"adam_beta1 is {self.adam_beta1} and adam_beta2 {self.adam_beta2}; expected less than 1"),
            (self.ignore_data_skip, "ignore_data_skip would show the same cells again after an interruption"),
            (self.neftune_noise_alpha is not None, "neftune_noise_alpha scales noise by the length of a row, which here holds several cells"),
            (str(self.lr_scheduler_type) in ("SchedulerType.REDUCE_ON_PLATEAU", "SchedulerType.GREEDY", "reduce_lr_on_plateau", "greedy"),
             "this lr_scheduler_type follows evaluations and losses as they are logged, so numbers would depend on how often that is"),
            (self.push_to_hub, "push_to_hub would publish checkpoints in place of the finished model; upload the folder output_dir/model when it is done"),
            (str(self.save_strategy) in ("SaveStrategy.BEST", "best") and (self.metric_for_best_model is None or str(self.eval_strategy) in ("IntervalStrategy.NO", "no")),
             "save_strategy 'best' needs metric_for_best_model and an eval_strategy; without them no checkpoint would be saved"),
            ((self.metric_for_best_model or "loss").removeprefix("eval_").split("_")[-1] not in [name.split("_")[-1] for name in METRICS],
             f"metric_for_best_model {self.metric_for_best_model!r} is not one of {', '.join(METRICS)}"),
            (self.dataloader_persistent_workers and not self.dataloader_num_workers, "dataloader_persistent_workers needs dataloader_num_workers above 0"),
            (self.save_only_model, "save_only_model leaves out what resuming needs; the final model is saved by itself in output_dir/model"),
        ]  # fmt: skip
        wrong = [text for holds, text in contradictions if holds]
        if wrong:
            msg = f"These settings cannot be used: {'; '.join(wrong)}."
            raise SettingError(msg)

    @property
    def rates(self) -> MaskingRates:
        """How genes are hidden."""
        return MaskingRates(self.mask_probability, self.mask_share, self.random_share)

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


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files(__package__) / RECIPES
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(config: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file, or in a recipe of the package by its name.

    Datasets may be given as `train_data: [{path: …, name: …, weight: …}, …]`.

    Raises:
        SettingError: if there is no such file, it is no YAML, or a key is not known.
    """
    path = Path(config)
    if not path.is_file():
        if str(config) not in recipe_names():
            msg = f"{config} does not exist, and is not one of the recipes {', '.join(recipe_names())}{suggestion(str(config), recipe_names())}."
            raise SettingError(msg)
        text = (resources.files(__package__) / RECIPES / f"{config}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            msg = f"{config} is not a text in UTF-8: {error}."
            raise SettingError(msg) from error
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        msg = f"{config} is not valid YAML: {' '.join(str(error).split())}"
        raise SettingError(msg) from error
    if not isinstance(settings, dict):
        msg = f"{config} holds a {type(settings).__name__}; expected lines of `name: value`."
        raise SettingError(msg)
    require_known(settings, where=str(config))
    return _with_datasets_spelt_out(settings, where=str(config))


def require_known(names: Any, *, where: str) -> None:
    """Raise if a name is not that of an argument; the closest one is suggested.

    Raises:
        SettingError
    """
    # `config` is a word of the command line, where a misspelling of it ends up here.
    known = ["config", *(f.name for f in dataclasses.fields(GeneformerPretrainingArguments) if f.init)]
    unknown = [f"{name}{suggestion(str(name), known)}" for name in names if name not in known[1:]]
    if unknown:
        msg = f"{where}: unknown setting {', '.join(unknown)}. `geneformer-hf pretrain --help` lists all."
        raise SettingError(msg)


def _with_datasets_spelt_out(settings: dict[str, Any], *, where: str) -> dict[str, Any]:
    data = settings.get("train_data")
    if isinstance(data, dict):
        settings = settings | {"train_data": [data]}
        data = settings["train_data"]
    if not isinstance(data, list) or not any(isinstance(entry, dict) for entry in data):
        return settings
    if any(not isinstance(entry, dict) or "path" not in entry or set(entry) - {"path", "name", "weight"} for entry in data):
        msg = f"{where}: train_data is a list of paths, or of {{path: …, name: …, weight: …}}."
        raise SettingError(msg)
    if {"train_names", "train_weights"} & set(settings):
        msg = f"{where}: names and weights are given twice, within train_data and beside it."
        raise SettingError(msg)
    settings = settings | {"train_data": [entry["path"] for entry in data]}
    for key, name in (("name", "train_names"), ("weight", "train_weights")):
        given = [entry[key] for entry in data if key in entry]
        if given and len(given) != len(data):
            msg = f"{where}: {len(given)} of {len(data)} datasets have a {key}; give all of them one, or none."
            raise SettingError(msg)
        if given:
            settings[name] = given
    return settings


def parse_arguments(settings: dict[str, Any] | None = None, argv: Sequence[str] = (), *, prog: str | None = None) -> GeneformerPretrainingArguments:
    """Return the arguments from settings (of YAML) and command-line options, which win.

    Raises:
        SettingError: for an unknown option, or a value that cannot be used.
    """
    parser = HfArgumentParser(GeneformerPretrainingArguments, prog=prog, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    parser.exit_on_error = False
    parser.error = _refuse  # type: ignore[method-assign]
    takes_list = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    words = []
    for name, value in (settings or {}).items():
        # As words, so that what is written in YAML is read as on the command line: PyYAML takes 1e-3 for a text, and 1.5 for a seed.
        if isinstance(value, dict):
            words += [f"--{name}={json.dumps(value)}"]
        elif isinstance(value, (list, tuple)) and name in takes_list:
            words += [f"--{name}", *map(_word, value)]
        elif isinstance(value, (list, tuple)):
            parser.set_defaults(**{name: list(value)})
        elif value is not None:
            words += [f"--{name}", str(value)] if name in takes_list else [f"--{name}={value}"]
    try:
        # One after the other: a list at the end of the first would take up the words of the second.
        namespace, unread = parser.parse_known_args(words)
        namespace, rest = parser.parse_known_args(list(argv), namespace)
    except ArgumentError as error:
        _refuse(str(error).removeprefix("argument "))
    rest = [*unread, *rest]
    if rest:
        require_known([word.removeprefix("--").split("=")[0].replace("-", "_") for word in rest if word.startswith("--")], where="command line")
        _refuse(f"cannot make sense of {' '.join(rest)}")
    try:
        return parser.parse_dict(vars(namespace))[0]
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        if isinstance(error, SettingError):
            raise
        msg = f"These settings cannot be used: {error}"
        raise SettingError(msg) from error


def _word(value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        _refuse(f"{value!r} stands in a list; expected texts or numbers")
    return str(value)


def _refuse(message: str) -> NoReturn:
    msg = f"These settings cannot be used: {message}."
    raise SettingError(msg)


def describe_settings(*, inherited: bool = False) -> str:
    """Return all settings with their defaults, for people; with `inherited`, those of transformers' Trainer too."""
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    lines = ["settings, as --name value or, in the YAML file, as name: value"]
    for f in dataclasses.fields(GeneformerPretrainingArguments):
        if f.init and f.name not in theirs:
            lines += _described(f)
    lines += ["", "and those of transformers.TrainingArguments" + ("" if inherited else f", {len(theirs)} more (--help-all), such as")]
    usual = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
             "weight_decay", "bf16", "gradient_checkpointing", "torch_compile", "seed", "save_steps", "eval_strategy", "logging_steps", "report_to")  # fmt: skip
    for f in dataclasses.fields(GeneformerPretrainingArguments):
        if f.init and f.name in theirs and (inherited or f.name in usual):
            lines += _described(f)
    return "\n".join(lines)


def _described(f: dataclasses.Field) -> list[str]:
    default = f.default_factory() if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING else f.default
    about = " ".join(str(f.metadata.get("help", "")).split())
    if "(default: " not in about:
        about += f" (default: {'none' if default in (None, '') else _plain(default)})"
    return textwrap.wrap(about, 118, initial_indent=f"  --{f.name:<28} ", subsequent_indent=" " * 33)


def resolved(arguments: GeneformerPretrainingArguments) -> dict[str, Any]:
    """Return all arguments as plain values, fit for YAML and for `parse_arguments`; secrets are left out."""
    # Made anew, so that what Trainer derives from the machine or from other settings is no setting. (Another instance of the arguments
    # to compare with would reset accelerate's state.)
    settings = {}
    for f in dataclasses.fields(arguments):
        value = _plain(getattr(arguments, f.name))
        default = f.default_factory() if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING else f.default
        if f.name == "accelerator_config" and value.items() <= AcceleratorConfig().to_dict().items():
            continue
        nothing = value is None or value in ("", []) or (value is False and f.name in _OFF_BY_DEFAULT)
        if f.init and f.name not in _DERIVED and value != _plain(default) and not nothing:
            settings[f.name] = value
    if arguments.use_cpu_asked:
        settings["use_cpu"] = True
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_config(arguments: GeneformerPretrainingArguments, path: Path) -> None:
    """Write all arguments that differ from the defaults; the file is fit for `--config`."""
    header = "# Settings of this run that differ from the defaults, as resolved from config and command line.\n"
    path.write_text(header + yaml.safe_dump(resolved(arguments), sort_keys=True, allow_unicode=True), encoding="utf-8")
