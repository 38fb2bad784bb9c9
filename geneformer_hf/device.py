"""The one place that decides on device and number type, and that recognises an exhausted accelerator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .errors import SettingError

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

T = TypeVar("T")
Items = TypeVar("Items", bound=Any)


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device to compute on: the one asked for, else CUDA (or ROCm), else Apple MPS, else the CPU.

    Raises:
        SettingError: if the device asked for does not exist here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device is None or str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        msg = f"device {device!r} is not known to torch. Use 'cpu', 'cuda', 'cuda:1', 'mps' or leave it out."
        raise SettingError(msg) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        msg = f"device {device!r} was asked for, but torch {torch.__version__} sees no CUDA device. Leave device out to use what is there."
        raise SettingError(msg)
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        msg = f"device {device!r} was asked for, but torch {torch.__version__} sees no Apple GPU. Leave device out to use what is there."
        raise SettingError(msg)
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a torch floating-point type from its name; None means "as the model is stored".

    Example:
        >>> resolve_dtype("bf16")
        torch.bfloat16
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        msg = f"dtype {dtype!r} is not one of {', '.join(DTYPES)}."
        raise SettingError(msg)
    return DTYPES[dtype]


def has_variable_length_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's variable-length attention kernel runs here: on CUDA, in half precision."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def run_with_backoff(run: Callable[[Items], T], items: Items) -> list[T]:
    """Call ``run(items)``; each time the accelerator runs out of memory, cut the items in half and run the halves.

    Args:
        run: must be safe to call again after a failure.
        items: anything with a length that can be sliced.

    Returns:
        the results in order: one, or as many as there were parts in the end.

    Raises:
        torch.OutOfMemoryError: if a single item does not fit.
    """
    try:
        return [run(items)]
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    logger.warning("Out of memory with %s cells in one pass: going on with smaller passes.", f"{len(items):,}")
    return [*run_with_backoff(run, items[:half]), *run_with_backoff(run, items[half:])]
