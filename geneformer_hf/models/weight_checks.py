"""Weights of a checkpoint compared with those of the model: prefixes of wrapped models taken off, missing ones refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import CheckpointError, WeightShapesError
from ..input_files import require_regular
from ..pickles import sha256

WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod|_fsdp_wrapped_module)\.)+|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DataParallel, Lightning, torch.compile and FSDP put into the names of weights."""
HINT = (
    "Save the model again with save_pretrained; to draw them at random, open it with `load_model(…, allow_missing_weights=True)` (`--allow-missing-weights`)."
)


def without_wrappers(name: str) -> str:
    """Return the name of a weight without the prefixes of wrapped and compiled models.

    Example:
        >>> without_wrappers("module._orig_mod.bert.encoder.layer.0._orig_mod.output.dense.bias")
        'bert.encoder.layer.0.output.dense.bias'
    """
    return WRAPPERS.sub("", name)


def is_wrapped(missing: Collection[str], unexpected: Collection[str]) -> bool:
    """Return whether weights would reach the model if the prefixes in the file were taken off."""
    wrapped = [name for name in unexpected if without_wrappers(name) != name]
    lacking = set(missing)
    # A model may be saved with or without the name of its encoder in front.
    return any({plain, f"bert.{plain}", plain.removeprefix("bert.")} & lacking for plain in map(without_wrappers, wrapped))


def wrapper_names(unexpected: Iterable[str]) -> str:
    """Return the prefixes that were found, for people."""
    found = {match.group() for name in unexpected for match in WRAPPERS.finditer(name)}
    return ", ".join(repr(prefix) for prefix in sorted(found))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint folder by their names in the file: of safetensors, else of pickles read as tensors alone."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        state |= load_file(path)
    for path in [] if state else sorted(folder.glob("pytorch_model*.bin")):
        state |= torch.load(path, map_location="cpu", weights_only=True)
    return state


def hash_of_weights(folder: Path) -> str:
    """Return the SHA-256 of the files of weights in a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        require_regular(path, error=CheckpointError)
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def require_shapes(model_class: Any, config: Any, folder: Path, where: str) -> None:
    """Raise if weights in a checkpoint folder have other shapes than the configuration gives the model; nothing but their headers is read.

    Raises:
        WeightShapesError: naming the first, with both shapes.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {without_wrappers(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    differing = []
    for name, shape in expected.items():
        there = next((found[one] for one in (name, f"bert.{name}", name.removeprefix("bert.")) if one in found), shape)
        if there != shape:
            differing.append(f"{name} is {' x '.join(map(str, there))} in the file and {' x '.join(map(str, shape))} by config.json")
    if differing:
        more = f", and {len(differing) - 3:,} more" if len(differing) > 3 else ""
        msg = f"{where}: {len(differing):,} weights have other shapes than config.json says: {'; '.join(differing[:3])}{more}. Correct config.json, or save the model again; `ignore_mismatched_sizes=True` draws them at random."
        raise WeightShapesError(msg)


def encoder_weights(names: Iterable[str]) -> list[str]:
    """Return those weights that are part of the encoder, sorted; the pooler and the heads are not."""
    return sorted(name for name in names if re.match(r"(bert\.)?(embeddings|encoder)\.", name))


def needed_weights(model: Any, names: Iterable[str]) -> list[str]:
    """Return those weights that the model's output depends on: all but those of a pooler that no head reads."""
    reads_pooler = hasattr(model, "classifier") or hasattr(model, "classifiers")
    return sorted(name for name in names if reads_pooler or not re.match(r"(bert\.)?pooler\.", name))


def require_weights(missing: Collection[str], where: str, *, of: str = "") -> None:
    """Raise if weights are missing: a model would draw them at random, and every answer would be of chance.

    Raises:
        CheckpointError
    """
    if missing:
        names = sorted(missing)
        shown = ", ".join(names[:3]) + (f", and {len(names) - 3:,} more" if len(names) > 3 else "")
        msg = f"{where} lacks {len(names):,} weights{of}: {shown}. {HINT}"
        raise CheckpointError(msg)


def require_no_more(unexpected: Iterable[str], n_layers: int, where: str) -> None:
    """Raise if a checkpoint holds layers of an encoder that its configuration does not count.

    Raises:
        CheckpointError
    """
    layers = {int(match[1]) for name in unexpected if (match := re.search(r"(?:^|\.)encoder\.layer\.(\d+)\.", name))}
    beyond = sorted(layer for layer in layers if layer >= n_layers)
    if beyond:
        msg = (
            f"{where} holds weights of {beyond[-1] + 1} layers, and its config.json says num_hidden_layers is {n_layers}. "
            "Correct config.json, or pass `num_hidden_layers=` to from_pretrained to use the first layers."
        )
        raise CheckpointError(msg)
