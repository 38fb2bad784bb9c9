"""What transformers, torch and safetensors say of a checkpoint that does not open, as errors of this package."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..errors import CheckpointError, CheckpointFilesError, GeneformerError, UnsafePickleError, WeightShapesError
from ..pickles import UnpicklingError

_RAISED = (
    *(OSError, ValueError, SafetensorError, RuntimeError, LookupError, EOFError, TypeError, AttributeError, AssertionError, ArithmeticError),
    StrictDataclassError,
)

OPENING = threading.RLock()
"""Held while a model is opened: transformers and peft switch torch's global initialisation off and on again, and two threads at once leave it off."""


@contextmanager
def refusals(model: Any) -> Iterator[None]:
    """Turn what libraries raise for a checkpoint they cannot open into our error, which is the same built-in one as well.

    Args:
        model: what the user called it.
    """
    try:
        yield
    except UnpicklingError as error:
        msg = f"{model} cannot be opened: its weights are a pickle that is damaged, or asks for more than tensors. It was refused and nothing of it was executed. Ask its owner for safetensors."
        raise UnsafePickleError(msg) from error
    except _RAISED as error:
        if isinstance(error, (GeneformerError, torch.OutOfMemoryError)):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"{model} cannot be opened as a Geneformer checkpoint: {first}"
        kinds = ((OSError, CheckpointFilesError), (RuntimeError, WeightShapesError))
        raise next((ours for theirs, ours in kinds if isinstance(error, theirs)), CheckpointError)(msg) from error
