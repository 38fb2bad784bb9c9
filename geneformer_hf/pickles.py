"""The restricted reader for published dictionaries and raw values: the only place where pickle is imported.

The published Geneformer dictionaries are pickles of plain ``dict``, ``str`` and ``int`` plus numpy scalars; raw values of
perturbations are dictionaries that make a list for a new key. Anything else in such a file is refused before it can run.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import CellFileError, CheckpointError, UnsafePickleError
from .input_files import require_regular
from .pickle_bounds import MOST_BYTES, require_bounded

UnpicklingError = pickle.UnpicklingError
"""What torch raises where a pickle of weights asks for more than tensors."""

_NUMBER = re.compile("b1|[iu][1248]|f[248]")
_TEXT = re.compile("U[0-9]{1,6}")


class _NumpyType:
    """Stands for `numpy.dtype`, which reads its argument as a language of its own and trusts the state it is given: a bent file can crash it."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not (_NUMBER.fullmatch(code) or _TEXT.fullmatch(code)):
            msg = f"a numpy value of type {code!r}; expected numbers or texts"
            raise ValueError(msg)
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            msg = f"a numpy type of state {state!r}"
            raise ValueError(msg)
        self.order = state[1]


class _NumpyScalar:
    """Stands for numpy's `scalar`: the value of a type that some bytes hold."""

    def __new__(cls, of_type: Any, content: Any) -> Any:
        if not isinstance(of_type, _NumpyType) or not isinstance(content, bytes):
            msg = "a numpy value that is not a type and its bytes"
            raise TypeError(msg)
        kind = np.dtype(of_type.order + of_type.code)
        if len(content) != kind.itemsize:
            msg = f"a numpy value of type {of_type.code} in {len(content)} bytes; expected {kind.itemsize}"
            raise ValueError(msg)
        if kind.kind == "U":
            return content.decode("utf-32-be" if kind.str.startswith(">") else "utf-32-le").rstrip("\0")
        return np.frombuffer(content, dtype=kind)[0]

    def __setstate__(self, state: Any) -> None:
        # Without it, a pickle could set attributes of this class.
        raise NotImplementedError


# The two spellings of numpy's module before and after numpy 2.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _NumpyType,
    ("numpy.core.multiarray", "scalar"): _NumpyScalar,
    ("numpy._core.multiarray", "scalar"): _NumpyScalar,
}

_ALLOWED_IN_RAW_VALUES = {("collections", "defaultdict"): defaultdict, ("builtins", "list"): list}

_LFS_HEADER = b"version https://git-lfs.github.com/spec/"


class _RestrictedUnpickler(pickle.Unpickler):
    allowed: ClassVar[dict[tuple[str, str], Any]] = _ALLOWED

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            msg = (
                f"the pickle asks for {module}.{name}, which no published Geneformer file of this kind contains. It was refused and nothing of it was executed."
            )
            raise UnsafePickleError(msg) from None


class _RawValuesUnpickler(_RestrictedUnpickler):
    allowed: ClassVar[dict[tuple[str, str], Any]] = _ALLOWED | _ALLOWED_IN_RAW_VALUES


class _ObjectType(_NumpyType):
    """Stands for `numpy.dtype` in an array of Python objects."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in ("O", "O8"):
            msg = f"an array of type {code!r}; expected Python objects"
            raise ValueError(msg)
        self.code, self.order = code, "|"


class _Array:
    """Stands for `numpy.ndarray` where it is named."""


class _ObjectArray:
    """Stands for numpy's empty array, which is given its shape and values afterwards."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind is not _Array or shape != (0,) or code not in (b"b", "b"):
            msg = "an array that does not begin empty"
            raise ValueError(msg)
        self.content: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _ObjectType) or not isinstance(state[4], list):
            msg = "an array whose values are not a list of objects"
            raise ValueError(msg)
        _, shape, _, _, content = state
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) != len(content):
            msg = f"an array of shape {shape!r} with {len(content):,} values"
            raise ValueError(msg)
        self.content = content


class _ObjectArrayUnpickler(_RestrictedUnpickler):
    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _ObjectType,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _ObjectArray,
        ("numpy._core.multiarray", "_reconstruct"): _ObjectArray,
    }


def is_lfs_pointer(path: Path) -> bool:
    """Return True if the file is the small text that git leaves in place of a large file it did not download."""
    with path.open("rb") as file:
        return file.read(len(_LFS_HEADER)) == _LFS_HEADER


def require_content(path: Path) -> None:
    """Raise with the remedy if the file is a git-lfs pointer."""
    if is_lfs_pointer(path):
        msg = (
            f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself. "
            "Run `git lfs install && git lfs pull` in that clone, or give the Hub id instead of the folder."
        )
        raise CheckpointError(msg)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_dictionary(path: Path) -> dict[str, Any]:
    """Read one published dictionary without executing anything in it.

    Returns:
        `dict`: numpy scalars are turned into Python numbers.

    Raises:
        UnsafePickleError: if the pickle names any class or function but numpy's scalar and dtype.
        CheckpointError: if the file is a git-lfs pointer, is damaged, or holds no dictionary with string keys.
    """
    content = _read(path, _RestrictedUnpickler)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        msg = f"{path} holds a {type(content).__name__}; expected a dictionary from gene names to values."
        raise CheckpointError(msg)
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in content.items()}


def read_class_ids(path: Path) -> dict[int, str]:
    """Read the classes of a fine-tuned model, `…_id_class_dict.pkl`, without executing anything in it.

    Returns:
        `dict`: class id to name.

    Raises:
        UnsafePickleError: if the pickle names any class or function but numpy's scalar and dtype.
        CheckpointError: if the file is a git-lfs pointer, is damaged, or holds no dictionary of class ids and names.
    """
    content = _read(path, _RestrictedUnpickler)
    if isinstance(content, dict):
        content = {_plain(key): _plain(value) for key, value in content.items()}
        if content and all(isinstance(value, int) and not isinstance(value, bool) for value in content.values()):
            # The same the other way round.
            content = {value: key for key, value in content.items()}
        if content and all(isinstance(key, int) for key in content):
            return {key: str(value) for key, value in content.items()}
    msg = f"{path} does not hold class ids and names; expected {{0: name, 1: name, …}} as the published classifier writes it."
    raise CheckpointError(msg)


def read_label_mappings(path: Path) -> dict[str, dict[str, int]]:
    """Read the classes of a multi-task model, `task_label_mappings.pkl`, without executing anything in it.

    Returns:
        `dict`: task to class name to number.

    Raises:
        UnsafePickleError, CheckpointError: as `read_class_ids`.
    """
    content = _read(path, _RestrictedUnpickler)
    if isinstance(content, dict) and content and all(isinstance(one, dict) for one in content.values()):
        found = {str(task): {str(_plain(name)): _plain(number) for name, number in one.items()} for task, one in content.items()}
        if all(all(isinstance(n, int) for n in one.values()) and sorted(one.values()) == list(range(len(one))) for one in found.values()):
            return found
    msg = f"{path} does not hold classes of tasks; expected {{task: {{name: 0, name: 1, …}}, …}} as the published MTLClassifier writes it."
    raise CheckpointError(msg)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def read_raw_values(path: Path) -> dict[Any, Any]:
    """Read the raw values of a published perturbation without executing anything in the file.

    Returns:
        `dict`: as it was pickled.

    Raises:
        UnsafePickleError: if the pickle names anything but numpy's scalar and dtype, and dictionaries of lists.
        CheckpointError: if the file is a git-lfs pointer, is damaged, or holds no dictionary.
    """
    content = _read(path, _RawValuesUnpickler)
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; expected a dictionary of raw values."
        raise CheckpointError(msg)
    return content


def require_plain_objects(path: Path) -> None:
    """Raise unless a `.npy` file holds numbers or texts, or Python objects that are texts or None.

    numpy unpickles arrays of objects, so a library that lets it runs what the file says. Here the same bytes go through the
    restricted reader first.

    Raises:
        UnsafePickleError: if the pickle inside names anything but numpy's array and dtype.
        CellFileError: if the file is special, damaged, or holds other objects.
    """
    require_regular(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read_header(file)
            if not kind.hasobject:
                n_bytes = math.prod(shape) * kind.itemsize
                if file.tell() + n_bytes > path.stat().st_size:
                    msg = f"its header declares {n_bytes:,} bytes of values, more than the file has"
                    raise ValueError(msg)
                return
            content = file.read(MOST_BYTES + 1)
        require_bounded(content)
        found = _ObjectArrayUnpickler(io.BytesIO(content)).load()
        strange = next((type(value).__name__ for value in found.content if not isinstance(value, (str, type(None)))), None)
        if strange is not None or kind != np.dtype(object):
            msg = f"it holds a value of type {strange or kind}; expected texts"
            raise ValueError(msg)
    except UnsafePickleError as error:
        error.args = (f"{path}: {error.args[0]}",)
        raise
    except Exception as error:
        msg = f"{path} cannot be read as an array of texts ({type(error).__name__}: {error}). Write the archive again from its source."
        raise CellFileError(msg) from error


def _read(path: Path, reader: type[_RestrictedUnpickler]) -> Any:
    require_regular(path, error=CheckpointError)
    require_content(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        require_bounded(content)
        return reader(io.BytesIO(content)).load()
    except UnsafePickleError as error:
        error.args = (f"{path}: {error.args[0]}",)
        raise
    except Exception as error:
        msg = f"{path} cannot be read as a pickled dictionary ({type(error).__name__}: {error}). Download it again."
        raise CheckpointError(msg) from error
