"""Folders of datasets checked before they are opened: shards inside the folder, features that only hold values."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import CellFileError
from ..input_files import read_json_object, require_regular
from .store_checks import require_memory

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
FORMATS = (None, "python", "numpy", "torch", "pandas", "arrow")
PLAIN_FEATURES = ("Value", "ClassLabel", "List", "LargeList", "Sequence", "Array2D", "Array3D", "Array4D", "Array5D")
"""Features that hold their values. The others (Image, Audio, Pdf, …) name files, which `datasets` opens when a row is read."""

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}
"""Bytes of a decoded Parquet value by its physical type; 8 for the others."""
MOST_DEPTH = 20
_TIME = r"\[(s|ms|us|ns)(, tz=[\w/+:-]{1,40})?\]"
_VALUE = re.compile(
    rf"null|bool_?|u?int(8|16|32|64)|float(16|32|64)?|halffloat|double|date(32|64)|(large_)?(string|binary|utf8)(_view)?|(time(32|64)|timestamp|duration){_TIME}"
    r"|decimal(128|256)\(\d{1,3}(, ?-?\d{1,3})?\)"
)
"""Types of values. `datasets` looks any other name up in pyarrow and calls it."""


def shards_of(folder: Path) -> list[Path]:
    """Return the Arrow files of a dataset folder, in order, after checking all that its settings name.

    Raises:
        CellFileError: if a setting has the wrong type, a shard is missing, empty or outside the folder, or a feature names files.
    """
    state = read_json_object(folder / STATE)
    shards = []
    for key in ("_data_files", "_indices_data_files", "_indices_files"):
        entries = state.get(key) or ([] if key != "_data_files" or state.get(key) == [] else None)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            msg = f"{folder / STATE}: {key} is {state.get(key)!r}; expected a list of objects with a file name each. The dataset is damaged: tokenize the cells again."
            raise CellFileError(msg)
        names = [require_name_inside(entry.get("filename"), folder, f"{STATE}, {key}") for entry in entries]
        shards += [folder / name for name in names if key == "_data_files"]
    for shard in shards:
        require_regular(shard)
        if not shard.is_file() or not shard.stat().st_size:
            msg = f"{folder}: the shard {shard.name} is {'empty' if shard.is_file() else 'missing'}. The dataset is incomplete: copy it again, or tokenize the cells again."
            raise CellFileError(msg)
        require_plain_schema(schema_of(shard), str(shard))
    if state.get("_format_type") not in FORMATS:
        msg = f"{folder / STATE}: _format_type is {state['_format_type']!r}; expected one of {', '.join(map(str, FORMATS))}. Save the dataset again without a format."
        raise CellFileError(msg)
    columns = state.get("_format_columns")
    if columns is not None and not (isinstance(columns, list) and all(isinstance(column, str) for column in columns)):
        msg = f"{folder / STATE}: _format_columns is {columns!r}; expected names of columns. Save the dataset again without a format."
        raise CellFileError(msg)
    if state.get("_format_kwargs") not in (None, {}):
        msg = f"{folder / STATE}: _format_kwargs is {state['_format_kwargs']!r}; expected none. Save the dataset again without a format."
        raise CellFileError(msg)
    if (folder / INFO).is_file():
        require_plain_types(read_json_object(folder / INFO).get("features"), f"{folder / INFO}: features")
    return shards


def splits_of(folder: Path) -> list[str]:
    """Return the names of the datasets in a folder of several.

    Raises:
        CellFileError: if the list is damaged, or a name leads out of the folder.
    """
    names = read_json_object(folder / SPLITS).get("splits")
    if not isinstance(names, list):
        msg = f"{folder / SPLITS}: splits is {names!r}; expected a list of names. The dataset is damaged: copy it again."
        raise CellFileError(msg)
    return [require_name_inside(name, folder, f"{SPLITS}, splits") for name in names]


def require_name_inside(name: Any, folder: Path, where: str) -> str:
    """Return the name of a file or folder that lies directly in a folder.

    Raises:
        CellFileError: for anything but text, a path, a null byte, or a symbolic link that leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or PurePosixPath(name).name != name or name == "..":
        msg = f"{folder}: {where} names the file {name!r}; expected a plain name of a file inside the folder. Nothing of it was opened."
        raise CellFileError(msg)
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        msg = f"{folder}: {name} is a link to {(folder / name).resolve()}, outside the folder. Copy the dataset with its links followed (`cp -rL`)."
        raise CellFileError(msg)
    return name


def open_dataset_folder(folder: str | Path) -> datasets.Dataset:
    """Open one dataset that `save_to_disk` wrote, after `shards_of` has checked it.

    Raises:
        CellFileError
    """
    shards_of(Path(folder))
    return require_plain_features(datasets.load_from_disk(str(folder)), str(folder))


def require_plain_features(dataset: datasets.Dataset, where: str) -> datasets.Dataset:
    """Return a dataset whose columns hold their values; one with columns that name files is refused.

    Raises:
        CellFileError
    """
    require_plain_types(dataset.features.to_dict(), where)
    return dataset


def require_plain_types(features: Any, where: str) -> None:
    """Raise if a column, as `Features.to_dict` or `dataset_info.json` describes it, does not simply hold values.

    `datasets` calls whatever function of pyarrow the type of a value names, and opens files that labels or images name.

    Raises:
        CellFileError
    """
    stack: list[tuple[str, Any, int]] = [("features", features, 0)]
    while stack:
        name, item, depth = stack.pop()
        if depth > MOST_DEPTH:
            msg = f"{where}: {name} nests types more than {MOST_DEPTH} deep. The dataset is damaged: tokenize the cells again."
            raise CellFileError(msg)
        if isinstance(item, list):
            stack += [(name, one, depth + 1) for one in item]
        elif isinstance(item, dict) and ("_type" not in item or isinstance(item["_type"], dict)):
            stack += [(str(key), one, depth + 1) for key, one in item.items()]
        elif isinstance(item, dict):
            _require_plain_type(name, item, where)
            stack += [(name, item["feature"], depth + 1)] if "feature" in item else []
        elif item is not None:
            msg = f"{where}: the type of {name} is {item!r}; expected an object with _type. The dataset is damaged: tokenize the cells again."
            raise CellFileError(msg)


def _require_plain_type(name: str, item: dict[str, Any], where: str) -> None:
    kind, problem = item["_type"], None
    if kind not in PLAIN_FEATURES:
        problem = f"a column of type {kind!r}, which opens files that its values name, or is not known; expected {', '.join(PLAIN_FEATURES)}"
    elif "dtype" in item and not (isinstance(item["dtype"], str) and _VALUE.fullmatch(item["dtype"])):
        problem = f"values of type {item['dtype']!r}; expected numbers, text or times, as pyarrow names them"
    elif item.get("names_file") is not None:
        problem = f"names of classes in the file {item['names_file']!r}; expected the names themselves"
    elif kind == "ClassLabel":
        names = item.get("names")
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names) or len(set(names)) < len(names):
            problem = f"names of classes {str(names)[:80]}; expected a list of distinct texts"
    elif kind in ("List", "LargeList", "Sequence") and "feature" not in item:
        problem = "a list of nothing; expected the type of its values"
    if problem:
        msg = f"{where}: {name} is {problem}. Remove the column (`dataset.remove_columns`), or tokenize the cells again."
        raise CellFileError(msg)


def require_plain_schema(schema: pa.Schema, where: str) -> None:
    """Raise if the features that an Arrow or Parquet file carries in its schema do not simply hold values.

    Raises:
        CellFileError
    """
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: the description of its columns cannot be read ({type(error).__name__}). The dataset is damaged: tokenize the cells again."
        raise CellFileError(msg) from error
    info = content.get("info") if isinstance(content, dict) else None
    require_plain_types(info.get("features") if isinstance(info, dict) else None, where)


def schema_of(path: Path) -> pa.Schema:
    """Return the schema of an Arrow or Parquet file.

    Raises:
        CellFileError: if it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as file:
            try:
                return pa.ipc.open_stream(file).schema
            except pa.ArrowInvalid:
                return pa.ipc.open_file(file).schema
    except (OSError, ValueError, pa.ArrowException) as error:
        msg = f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}. It is damaged or incomplete: tokenize the cells again."
        raise CellFileError(msg) from error


def require_readable_groups(file: pq.ParquetFile, where: str) -> None:
    """Refuse a Parquet file with a row group larger than memory once decoded; a few encoded bytes can stand for any number of values.

    Raises:
        CellFileError
    """
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        n_values = sum(column.num_values for column in columns)
        n_bytes = sum(column.num_values * WIDTHS.get(column.physical_type, 8) for column in columns)
        require_memory(n_bytes, f"{where}: row group {i:,} of {group.num_rows:,} cells and {n_values:,} values")
