"""Tokenized datasets as they lie on disk: opening them, and whether they were made for a model."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..errors import CellFileError, GeneformerError, VocabularyMismatchError
from ..input_files import require_regular
from ..models.tokenization_geneformer import GeneformerTokenizer
from .dataset_folders import open_dataset_folder, require_plain_features, require_plain_schema, schema_of, splits_of

REPOSITORY = "repository"
"""Key of the report."""
LOOKED_AT = 1000
"""Cells of a dataset that are looked at before training."""


def open_tokenized(path: str | Path) -> datasets.Dataset:
    """Open a dataset folder (`geneformer-hf tokenize`, `save_to_disk`), a Parquet file or a folder of these.

    Raises:
        CellFileError: if there is none, or it is damaged.
    """
    folder = Path(path)
    require_regular(folder)
    if not folder.exists():
        msg = f"{path} does not exist; expected the folder of a tokenized dataset, or Parquet files."
        raise CellFileError(msg)
    if (folder / "dataset_dict.json").is_file():
        splits = splits_of(folder)
        msg = f"{path} holds several datasets ({', '.join(splits)}). Name one: {folder / (splits[0] if splits else 'train')}."
        raise CellFileError(msg)
    try:
        if (folder / "state.json").is_file():
            return open_dataset_folder(folder)
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
        if files and all(file.suffix == ".parquet" for file in files):
            for file in files:
                require_regular(file)
                require_plain_schema(schema_of(file), str(file))
            return require_plain_features(datasets.Dataset.from_parquet([str(file) for file in files]), str(path))
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        if isinstance(error, CellFileError):
            raise
        msg = f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}. It is damaged or incomplete: tokenize the cells again."
        raise CellFileError(msg) from error
    msg = f"{path} is not the folder of a tokenized dataset (no state.json) and holds no Parquet files. Make one with `geneformer-hf tokenize`."
    raise CellFileError(msg)


def report_of(dataset: Any) -> dict[str, Any]:
    """Return what `load_cells` recorded with a dataset, empty for other datasets."""
    try:
        report = json.loads(dataset.info.description or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def repository_of_cells(dataset: Any) -> str | None:
    """Return where on the Hub a dataset is from, as `push_folder` and `pull_folder` record it, None where that is not known."""
    found = report_of(dataset).get(REPOSITORY)
    return found if isinstance(found, str) else None


def gene_table_of(dataset: Any) -> str | None:
    """Return the fingerprint of the gene table a dataset was tokenized with, None where it is not recorded."""
    parts = str(report_of(dataset).get("encoding", "")).split("-")
    return parts[1] if len(parts) > 1 else None


def require_lists_of_ids(dataset: Any, *, name: str) -> None:
    """Raise unless this is a dataset whose column `input_ids` holds a list of whole numbers in each row.

    Raises:
        CellFileError
    """
    if not isinstance(dataset, datasets.Dataset):
        msg = f"{name} is a {type(dataset).__name__}; expected a datasets.Dataset of tokenized cells{', such as one of its splits' if isinstance(dataset, dict) else ''}."
        raise CellFileError(msg)
    if "input_ids" not in dataset.column_names:
        msg = f"{name}: no column 'input_ids'; found {', '.join(dataset.column_names) or 'none'}. Tokenized cells are expected: `geneformer-hf tokenize`."
        raise CellFileError(msg)
    kind = dataset.features["input_ids"]
    inner = getattr(kind, "feature", None)
    whole = isinstance(inner, datasets.Value) and ("int" in inner.dtype)
    if not whole and len(dataset):
        msg = f"{name}: input_ids holds {kind}; expected lists of token ids (whole numbers)."
        raise CellFileError(msg)


def require_token_ids(ids: np.ndarray, vocab_size: int, *, name: Callable[[int], str]) -> None:
    """Raise unless all of these are token ids of a vocabulary of so many.

    Args:
        name: gives the name of the cell of a token, by the place of the token.

    Raises:
        VocabularyMismatchError: naming the first that is not.
    """
    if not ids.size:
        return
    wrong, place = None, 0
    if ids.dtype.kind not in "iu":
        wrong = "missing or non-integer values"
    elif int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        place = int(((ids < 0) | (ids >= vocab_size)).argmax())
        wrong = f"the token id {int(ids[place]):,}"
    if wrong:
        msg = f"{name(place)} holds {wrong}; expected token ids from 0 to {vocab_size - 1:,}. It was tokenized for another model, or is damaged: tokenize the cells with this model's tokenizer."
        raise VocabularyMismatchError(msg)


def materialized(stream: datasets.IterableDataset) -> datasets.Dataset:
    """Return the rows of a stream as a dataset in a temporary folder, which goes with it; memory is bounded by some rows.

    Raises:
        CellFileError: if there are none.
    """
    folder = tempfile.mkdtemp(prefix="geneformer-hf-")
    try:
        fingerprint = uuid.uuid4().hex
        dataset = datasets.Dataset.from_generator(lambda: iter(stream), features=stream.features, cache_dir=folder, fingerprint=fingerprint)
    except datasets.exceptions.DatasetGenerationError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error.__cause__, GeneformerError):
            raise error.__cause__ from None
        msg = f"The stream cannot be read: {type(error.__cause__).__name__}: {error.__cause__}."
        raise CellFileError(msg) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def as_lists(column: pa.Array) -> pa.Array:
    """Return lists of a fixed size as lists of any size."""
    return column.cast(pa.list_(column.type.value_type)) if pa.types.is_fixed_size_list(column.type) else column


def require_made_with(dataset: datasets.Dataset, tokenizer: GeneformerTokenizer, *, name: str) -> None:
    """Raise unless a dataset can have been made with a tokenizer: what it records, and a thousand of its cells, are compared.

    Raises:
        VocabularyMismatchError
    """
    table = gene_table_of(dataset)
    if table is not None and table != tokenizer.gene_table.fingerprint:
        msg = f"{name} was tokenized with gene table {table}, and the tokenizer has {tokenizer.gene_table.fingerprint}. Tokenize the cells with this model's tokenizer."
        raise VocabularyMismatchError(msg)
    rows = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
    cells = dataset.select_columns(["input_ids"]).with_format(None)[rows]["input_ids"]
    n_broken = sum(cell is None or None in cell for cell in cells)
    if n_broken:
        msg = f"{name}: {n_broken:,} of {len(cells):,} cells looked at are missing, or hold a missing token (null). Tokenize the cells again."
        raise VocabularyMismatchError(msg)
    size = max(tokenizer.get_vocab().values()) + 1
    largest, smallest = max(max(cell, default=0) for cell in cells), min(min(cell, default=0) for cell in cells)
    if largest >= size or smallest < 0:
        msg = f"{name} holds the token id {largest if largest >= size else smallest:,}, and the vocabulary has {size:,} tokens. It was tokenized with another one: tokenize the cells again."
        raise VocabularyMismatchError(msg)
    for what, token, place in (("<cls>", tokenizer.cls_token_id, 0), ("<eos>", tokenizer.eos_token_id, -1)):
        lacking = sum(len(cell) == 0 or int(cell[place]) != token for cell in cells)
        if token is not None and lacking:
            msg = f"{name}: {lacking:,} of {len(cells):,} cells looked at lack {what} (id {token}), which this model's cells have. A V1 dataset does not fit a V2 model: tokenize the cells with this model's tokenizer."
            raise VocabularyMismatchError(msg)
    longest = max(len(cell) for cell in cells)
    if longest > tokenizer.model_max_length:
        msg = f"{name} holds cells of {longest:,} tokens, and the model has positions for {tokenizer.model_max_length:,}. Tokenize the cells with this model's tokenizer, which keeps the highest ranks."
        raise VocabularyMismatchError(msg)
