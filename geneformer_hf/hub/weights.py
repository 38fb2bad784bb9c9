"""Weights as somebody left them on disk: safetensors, or pickles, of which nothing but tensors is read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ..errors import CheckpointError, UnsafePickleError
from ..pickles import UnpicklingError, require_content


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights in a folder as they are, by name; pickles (`pytorch_model*.bin`) where there are no safetensors.

    Raises:
        CheckpointError: if a file is damaged, a git-lfs pointer, or holds other things than tensors by name.
        UnsafePickleError: if it is a pickle that asks for more than tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        require_content(path)
        try:
            content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            msg = f"{path} is damaged, or a pickle that asks for more than tensors. It was refused and nothing of it was executed. Download it again, or ask its owner for safetensors."
            raise UnsafePickleError(msg) from error
        except Exception as error:
            told = str(error).splitlines()
            msg = f"{path}: the weights cannot be read ({': '.join([type(error).__name__, *told[:1]])}). Download them again."
            raise CheckpointError(msg) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()):
            msg = f"{path} holds other things than tensors by name, so it is no file of weights."
            raise CheckpointError(msg)
        tensors |= content
    return tensors
