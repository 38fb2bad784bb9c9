"""Errors a user can act on. Each says what was found, what was expected, where, and what to do.

Every class is also the built-in error a Python programmer would expect, so ``except ValueError`` works. The command
line prints these without a traceback; anything else that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GeneformerError(Exception):
    """Base of all errors raised on purpose by this package."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message, quotes and escaped line breaks included.
        return str(self.args[0]) if self.args else ""


class CellFileError(GeneformerError, ValueError):
    """A file of cells is missing, damaged, or not laid out as expected."""


class NotRawCountsError(GeneformerError, ValueError):
    """A matrix holds something other than raw transcript counts."""


class GeneIdError(GeneformerError, ValueError):
    """The genes of a file or matrix cannot be matched to the gene table."""


class UnknownGeneError(GeneformerError, KeyError):
    """A gene named by the user is not in the vocabulary."""


class ColumnNotFoundError(GeneformerError, KeyError):
    """A column named by the user is not in obs or var."""


class CheckpointError(GeneformerError, ValueError):
    """A checkpoint, tokenizer or dictionary folder is incomplete or inconsistent."""


class HubError(CheckpointError, OSError):
    """A repository on the Hub cannot be read or written, or what came from there is damaged."""


class CheckpointFilesError(CheckpointError, OSError):
    """Files of a checkpoint are missing, or cannot be opened."""


class WeightShapesError(CheckpointError, RuntimeError):
    """The weights of a checkpoint have other shapes than its configuration says, or cannot be read."""


class UnsafePickleError(CheckpointError):
    """A pickle asks for something that published dictionaries never contain; nothing of it was executed."""


class VocabularyMismatchError(GeneformerError, ValueError):
    """A model, a tokenizer and a dataset do not share one vocabulary."""


class LayerError(GeneformerError, ValueError):
    """The requested layer or pooling does not exist in this model."""


class SettingError(GeneformerError, ValueError):
    """An argument has a value that cannot be used here."""


class OutputError(GeneformerError, OSError):
    """The output cannot be written where it was asked for."""


class OutputExistsError(GeneformerError, FileExistsError):
    """The output exists and overwriting was not asked for."""


class WorkerDiedError(GeneformerError, RuntimeError):
    """A worker process was killed, usually for want of memory."""


class TrainingDivergedError(GeneformerError, ArithmeticError):
    """A loss or gradient is not finite; going on would only spoil the weights further."""


class MissingExtraError(GeneformerError, ImportError):
    """An optional dependency is needed and not installed."""


def like(word: str, known: Iterable[str]) -> str:
    """Return a question after what is spelt like a word, for the end of a message; empty where nothing is.

    Example:
        >>> like("tokenise", ["embed", "tokenize"]), like("xyz", ["embed"])
        (' Did you mean tokenize?', '')
    """
    similar = get_close_matches(word, sorted(known), n=1)
    return f" Did you mean {similar[0]}?" if similar else ""
