"""Folders of datasets checked before they are opened: shards inside the folder, features that only hold values."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from ..errors import CellFileError
from ..input_files import read_json_object, require_regular

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
FORMATS = (None, "python", "numpy", "torch", "pandas", "arrow")
PLAIN_FEATURES = ("Value", "ClassLabel", "List", "LargeList", "Sequence", "Array2D", "Array3D", "Array4D", "Array5D")
"""Features that hold their values. The others (Image, Audio, Pdf, …) name files, which `datasets` opens when a row is read."""


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
    if state.get("_format_type") not in FORMATS:
        msg = f"{folder / STATE}: _format_type is {state['_format_type']!r}; expected one of {', '.join(map(str, FORMATS))}. Save the dataset again without a format."
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
    """Raise if a column, as `Features.to_dict` or `dataset_info.json` describes it, names files in place of holding values.

    Raises:
        CellFileError
    """
    stack = [features]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            kind = item.get("_type")
            if kind is not None and not isinstance(kind, dict) and kind not in PLAIN_FEATURES:
                msg = f"{where}: a column of type {kind!r}, which opens files that its values name. Expected {', '.join(PLAIN_FEATURES)}. Remove the column (`dataset.remove_columns`)."
                raise CellFileError(msg)
            stack += item.values()
