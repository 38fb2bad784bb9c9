"""What a folder is that somebody wants to share, what of it may go to the Hub, and whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..errors import CheckpointError
from ..input_files import load_yaml, read_json_object, read_text
from ..models.adapters import ADAPTER_FILE, ADAPTER_WEIGHTS, describe_adapter, is_adapter, with_base
from ..models.configuration_geneformer import GeneformerConfig
from ..models.loading import model_class_of, require_same_vocabulary
from ..models.places import CONVERSION_FILE, Place, converted_from, fetched, place_of
from ..models.tokenization_geneformer import GENE_TABLE_FILE, GeneformerTokenizer
from ..outputs import MARK
from ..pickles import require_content
from ..reports.cards import plain_card, with_base_model

SHARED_SUFFIXES = (
    ".json", ".jsonl", ".safetensors", ".parquet", ".onnx", ".data", ".md", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".html", ".png", ".svg", ".pdf",
)  # fmt: skip
"""Nothing in such files runs when they are opened."""
CARD, REPORT = "README.md", "report.json"
OF_TABLES = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What `datasets` keeps beside its Arrow files."""
RUNNING = ("checkpoint-*", "runs", "wandb", "mlruns")
"""Folders that belong to a run and not to what it made."""
LEGAL = ("LICENSE", "NOTICE", "COPYING")
SETTINGS_FILE = "settings.yaml"
"""What a training run writes beside its model: it may name folders."""


@dataclass
class Folder:
    """A folder that can be shared."""

    path: Path
    kind: str
    """`model`, `adapter`, `tokenizer` or `dataset`."""
    files: list[str]
    """What is shared of it, relative to it."""
    left_out: list[str]
    """What is not: pickles, states of optimisers, code, hidden files."""
    base: Place | None = None
    """Of an adapter: where its model is on the Hub."""
    changed: dict[str, bytes] = field(default_factory=dict)
    """Files that are shared with another content than they have here."""
    has_plain_card: bool = False
    """Whether the card says no more than the folder does, because there was none."""


def describe_folder(folder: str | Path, *, base: str | None = None) -> Folder:
    """Return what a folder is and what of it is shared, after looking whether it is whole.

    Args:
        folder (`str` or `Path`): of a model, an adapter, a tokenizer or a dataset.
        base (`str`, *optional*): of an adapter: where its model is on the Hub, if it was trained on one that is on this disk.

    Raises:
        CheckpointError: if it is none of these, a file is missing or a git-lfs pointer, weights are pickles, or the base of an adapter is nowhere to be had.
        VocabularyMismatchError: if model and tokenizer do not belong together.
    """
    path = Path(folder)
    if not path.is_dir():
        msg = f"{folder} is not a folder. Give the folder of a model, an adapter, a tokenizer or a tokenized dataset."
        raise CheckpointError(msg)
    files, left_out = _sorted_out(path)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        # Its tables go as Parquet, with a card of their own.
        kind, files, left_out = "dataset", [name for name in files if is_beside_tables(name)], [name for name in left_out if not name.endswith(".arrow")]
    else:
        kind = _kind_of(path, left_out)
    # CONVERSION_FILE describes the weights of this disk; the card says where they are from.
    found = Folder(path, kind, [name for name in files if name != CONVERSION_FILE], left_out)
    for name in found.files:
        require_content(path / name)
        if Path(name).name == SETTINGS_FILE:
            found.changed[name] = without_folders(read_text(path / name, error=CheckpointError)).encode()
    if kind == "adapter":
        found.base = _base_on_the_hub(path, base)
        found.changed |= {name: text.encode() for name, text in with_base(path, found.base).items()}
    elif base is not None:
        msg = f"{folder} is no adapter (it holds no {ADAPTER_FILE}), so it has no base."
        raise CheckpointError(msg)
    elif kind == "model":
        _require_whole(path)
        if (path / GENE_TABLE_FILE).is_file():
            require_same_vocabulary(GeneformerConfig.from_pretrained(path), GeneformerTokenizer.from_pretrained(path))
    if kind != "dataset":
        found.changed |= _card(found)
    return found


def _card(found: Folder) -> dict[str, bytes]:
    """Return the card if the folder has none, or one that does not name its base yet."""
    base = found.base.name if found.base else None
    if CARD in found.files:
        text = read_text(found.path / CARD, error=CheckpointError)
        return {CARD: with_base_model(text, base).encode()} if base else {}
    config = GeneformerConfig.from_pretrained(found.path) if (found.path / "config.json").is_file() else None
    found.files.append(CARD)
    found.has_plain_card = True
    return {CARD: plain_card(found.kind, config, name=found.path.resolve().name, base=base).encode()}


def is_shared(name: str) -> bool:
    """Return whether a file may be shared, by its name: not hidden, of a kind that does not run, inside its folder."""
    path = PurePosixPath(name)
    if any(fnmatch(part, pattern) for part in path.parts[:-1] for pattern in RUNNING):
        return False
    if len(path.parts) == 1 and path.stem.upper() in LEGAL:
        return True
    return path.suffix.lower() in SHARED_SUFFIXES and not any(part.startswith(".") for part in path.parts) and path.name != CONVERSION_FILE


def is_beside_tables(name: str) -> bool:
    """Return whether a file of a dataset is none of those that its tables are made of, on this disk or on the Hub."""
    path = PurePosixPath(name)
    return path.name not in OF_TABLES and path.suffix not in (".parquet", ".arrow") and name not in (CARD, REPORT)


def _sorted_out(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files that are shared and those that are not; links that lead out of the folder are refused.

    Raises:
        CheckpointError
    """
    files: list[str] = []
    left_out: list[str] = []
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name == MARK:
            continue
        if not path.resolve().is_relative_to(root):
            msg = f"{path} is a link to {path.resolve()}, outside of the folder. Copy what should be shared into it."
            raise CheckpointError(msg)
        (files if is_shared(name) else left_out).append(name)
    return files, left_out


def _kind_of(path: Path, left_out: Iterable[str]) -> str:
    if is_adapter(path):
        return "adapter"
    if any(path.glob("*.safetensors")) or (path / "encoder.onnx").is_file():
        return "model"
    pickled = [name for name in left_out if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle")) and "/" not in name and name != "training_args.bin"]
    if (path / "config.json").is_file() and pickled:
        msg = f"{path} holds its weights as pickles ({', '.join(pickled[:3])}), which are not shared. Open it with load_model and save it with save_pretrained, or convert it: both write safetensors."
        raise CheckpointError(msg)
    if (path / GENE_TABLE_FILE).is_file():
        return "tokenizer"
    msg = f"{path} is not the folder of a model (*.safetensors), an adapter ({ADAPTER_FILE}), a tokenizer ({GENE_TABLE_FILE}) or a dataset (state.json, dataset_dict.json)."
    inside = sorted(p.parent.name for p in path.glob("*/config.json"))
    raise CheckpointError(msg + (f" Folders inside that are: {', '.join(inside)}." if inside else ""))


def _require_whole(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        msg = f"{path} holds weights and no config.json. Save the model with save_pretrained."
        raise CheckpointError(msg)
    model_class_of(GeneformerConfig.from_pretrained(path), str(path))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json_object(index, error=CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            msg = f"{index} names no files of weights (weight_map). Save the model again."
            raise CheckpointError(msg)
        missing = sorted({name for name in shards.values() if not (path / name).is_file()})
        if missing:
            msg = f"{path}: {len(missing)} files of weights are missing, for instance {missing[0]}. Save the model again."
            raise CheckpointError(msg)


def _base_on_the_hub(path: Path, base: str | None) -> Place:
    """Return where others find the base of an adapter.

    Raises:
        CheckpointError: if it is on this disk alone.
    """
    require_content(path / ADAPTER_WEIGHTS)
    about = describe_adapter(path)
    if base is None and not Path(about.base).exists() and not Path(about.base).is_absolute():
        found = about.base_place
    elif base is not None:
        found = place_of(base)
        if found.is_local:
            msg = f"the base {base} is a folder of this disk, which nobody else has. Push it first, and give its id on the Hub."
            raise CheckpointError(msg)
    else:
        origin = converted_from(about.base)
        if origin is None:
            msg = f"{path} was trained on {about.base}, a folder of this disk, which nobody else has. Push that first, and name it with `base=` (--base)."
            raise CheckpointError(msg)
        return origin
    # It is there, and at this commit.
    return fetched(found, ("config.json",))[1]


def without_folders(settings: str) -> str:
    """Return settings in which paths of this disk are names.

    Example:
        >>> without_folders("train_data: [/home/me/cells.h5ad]\\nlearning_rate: 0.001\\nfrom_checkpoint: lab/model")
        'train_data:\\n- cells.h5ad\\nlearning_rate: 0.001\\nfrom_checkpoint: lab/model\\n'
    """

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(one) for key, one in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        if isinstance(value, str) and re.match(r"(/|\.{1,2}/|~|\\|[A-Za-z]:[\\/])", value):
            return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return value

    try:
        return yaml.safe_dump(named(load_yaml(settings, SETTINGS_FILE, error=CheckpointError)), sort_keys=False, allow_unicode=True)
    except CheckpointError as error:
        msg = f"{SETTINGS_FILE} is damaged ({error}). Remove or correct it."
        raise CheckpointError(msg) from error
