"""Tokenized datasets as the Hub likes them (shards of Parquet, a card) and as they lie on disk (Arrow, for `load_from_disk`)."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import datasets
import pyarrow.parquet as pq

from ..data.dataset_cards import dataset_card, report_in_card, without_folders
from ..data.dataset_folders import require_plain_features, require_plain_schema, require_readable_groups, schema_of, splits_of
from ..data.tokenized import REPOSITORY, open_tokenized, report_of
from ..errors import CellFileError
from ..input_files import read_json_object, read_text
from .folders import REPORT

PARQUET_PATTERN = "data/*.parquet"
SHARD_BYTES = 500 << 20


def write_tables(folder: Path, output: Path, repository: str) -> dict[str, Path]:
    """Write the splits of a dataset as Parquet, with its card and report; return names in the repository and files.

    The report names the repository, so that what is made of the cells can say where they are from.

    Raises:
        CellFileError: if it is damaged.
    """
    splits = _splits(folder)
    found: dict[str, Path] = {}
    for split, dataset in splits.items():
        n_shards = max(1, math.ceil(dataset.data.nbytes / SHARD_BYTES))
        for i in range(n_shards):
            name = f"data/{split}-{i:05d}-of-{n_shards:05d}.parquet"
            found[name] = output / name
            found[name].parent.mkdir(parents=True, exist_ok=True)
            dataset.shard(n_shards, i, contiguous=True).to_parquet(str(found[name]))
    report = without_folders(report_of(next(iter(splits.values())))) | {REPOSITORY: repository}
    texts = {REPORT: json.dumps(report, indent=1) + "\n"}
    own = folder / "README.md"
    texts["README.md"] = dataset_card(splits, report, text=read_text(own) if own.is_file() else None, name=folder.resolve().name, as_parquet=True)
    for name, text in texts.items():
        found[name] = output / name
        found[name].write_text(text, encoding="utf-8")
    return found


def _splits(folder: Path) -> dict[str, datasets.Dataset]:
    if (folder / "dataset_dict.json").is_file():
        return {name: open_tokenized(folder / name) for name in splits_of(folder)}
    return {"train": open_tokenized(folder)}


def read_tables(folder: Path, output: Path, repository: str) -> None:
    """Make of a repository's Parquet files what `load_from_disk` opens: one dataset, or several splits.

    Raises:
        CellFileError: if they cannot be read.
    """
    card = read_text(folder / "README.md") if (folder / "README.md").is_file() else ""
    report = read_json_object(folder / REPORT) if (folder / REPORT).is_file() else report_in_card(card)
    # By what was fetched and checked, never by what the card names: that could be any file of this disk, or any address.
    files: dict[str, list[str]] = {}
    for one in sorted(folder.rglob("*.parquet")):
        shard = re.fullmatch(r"(\w+)-\d+-of-\d+.*", one.stem)
        files.setdefault(shard[1] if shard else "train", []).append(str(one))
    for name in (path for paths in files.values() for path in paths):
        require_plain_schema(schema_of(Path(name)), name)
        require_readable_groups(pq.ParquetFile(name), name)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        try:
            splits = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            msg = f"the Parquet files cannot be read: {str(error).splitlines()[0]}"
            raise CellFileError(msg) from error
        for dataset in splits.values():
            require_plain_features(dataset, repository)
            dataset.info.description = json.dumps(report | {REPOSITORY: repository}, indent=1)
        made = next(iter(splits.values())) if list(splits) == ["train"] else splits
        made.save_to_disk(str(output))
    if card:
        (output / "README.md").write_text(card, encoding="utf-8")
