"""Settings of training from YAML, recipes and the command line, and back into YAML."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from argparse import ArgumentError
from collections.abc import Sequence
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..errors import SettingError
from ..input_files import load_yaml, read_text
from .settings import TrainingSettings, suggestion

RECIPES = "recipes"
_OFF_BY_DEFAULT = ("activation_checkpointing", "gradient_checkpointing", "disable_tqdm")
"""None until Trainer says False."""
_DERIVED = ("overwrite", "resume_from_checkpoint", "hub_token", "do_eval", "use_cpu", "dataloader_pin_memory", "local_rank")
"""What is for one call alone, secrets, and what follows from the machine or from other settings."""

Settings = TypeVar("Settings", bound=TrainingSettings)


def recipe_names(kind: type[TrainingSettings]) -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files(__package__) / RECIPES / kind.command
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(config: str | Path, kind: type[TrainingSettings], *, also: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings in a YAML file, or in a recipe of the package by its name.

    Datasets may be given as `train_data: [{path: …, name: …, weight: …}, …]`.

    Raises:
        SettingError: if there is no such file, it is no YAML, or a key is not known.
    """
    path = Path(config)
    if not path.is_file():
        if str(config) not in recipe_names(kind):
            msg = f"{config} does not exist, and is not one of the recipes {', '.join(recipe_names(kind))}{suggestion(str(config), recipe_names(kind))}."
            raise SettingError(msg)
        text = (resources.files(__package__) / RECIPES / kind.command / f"{config}.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(path, error=SettingError)
    settings = load_yaml(text, str(config), error=SettingError) or {}
    if not isinstance(settings, dict):
        msg = f"{config} holds a {type(settings).__name__}; expected lines of `name: value`."
        raise SettingError(msg)
    require_known([name for name in settings if name not in also], kind, where=str(config))
    return _with_datasets_spelt_out(settings, where=str(config))


def require_known(names: Any, kind: type[TrainingSettings], *, where: str) -> None:
    """Raise if a name is not that of an argument; the closest one is suggested.

    Raises:
        SettingError
    """
    # `config` is a word of the command line, where a misspelling of it ends up here.
    known = ["config", *(f.name for f in dataclasses.fields(kind) if f.init)]
    unknown = [f"{name}{suggestion(str(name), known)}" for name in names if name not in known[1:]]
    if unknown:
        msg = f"{where}: unknown setting {', '.join(unknown)}. `geneformer-hf {kind.command} --help` lists all."
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


def parse_arguments(kind: type[Settings], settings: dict[str, Any] | None = None, argv: Sequence[str] = (), *, prog: str | None = None) -> Settings:
    """Return the arguments from settings (of YAML) and command-line options, which win.

    Raises:
        SettingError: for an unknown option, or a value that cannot be used.
    """
    parser = HfArgumentParser(kind, prog=prog, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
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
        require_known([word.removeprefix("--").split("=")[0].replace("-", "_") for word in rest if word.startswith("--")], kind, where="command line")
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


def describe_settings(kind: type[TrainingSettings], *, inherited: bool = False) -> str:
    """Return all settings with their defaults, for people; with `inherited`, those of transformers' Trainer too."""
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    lines = ["settings, as --name value or, in the YAML file, as name: value"]
    for f in dataclasses.fields(kind):
        if f.init and f.name not in theirs:
            lines += _described(f)
    lines += ["", "and those of transformers.TrainingArguments" + ("" if inherited else f", {len(theirs)} more (--help-all), such as")]
    usual = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
             "weight_decay", "bf16", "gradient_checkpointing", "torch_compile", "seed", "save_steps", "eval_strategy", "logging_steps", "report_to")  # fmt: skip
    for f in dataclasses.fields(kind):
        if f.init and f.name in theirs and (inherited or f.name in usual):
            lines += _described(f)
    return "\n".join(lines)


def _described(f: dataclasses.Field) -> list[str]:
    default = f.default_factory() if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING else f.default
    about = " ".join(str(f.metadata.get("help", "")).split())
    if "(default: " not in about:
        about += f" (default: {'none' if default in (None, '') else _plain(default)})"
    return textwrap.wrap(about, 118, initial_indent=f"  --{f.name:<28} ", subsequent_indent=" " * 33)


def resolved(arguments: TrainingSettings) -> dict[str, Any]:
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


def write_config(arguments: TrainingSettings, path: Path) -> None:
    """Write all arguments that differ from the defaults; the file is fit for `--config`."""
    header = "# Settings of this run that differ from the defaults, as resolved from config and command line.\n"
    path.write_text(header + yaml.safe_dump(resolved(arguments), sort_keys=True, allow_unicode=True), encoding="utf-8")
