"""Streams of tokenized cells for training on corpora larger than memory or disk cache.

`stream_cells` ranks on the fly from files of counts; `stream_tokens` reads tokenized Arrow or Parquet shards. Both return
an ordinary `datasets.IterableDataset`: `split_dataset_by_node`, DataLoader workers, `set_epoch`, `state_dict` and Trainer work.

A shuffle buffer loses and repeats rows when it is resumed. Here the order is a function of seed, epoch and shard instead:
shards are shuffled, a few of them are read at a time, and their rows are permuted together. So a position is a pair of numbers.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets.iterable_dataset import _BaseExamplesIterable

from ..errors import CellFileError, SettingError
from ..input_files import require_regular
from ..models.tokenization_geneformer import GeneformerTokenizer
from .collators import KEY
from .columns import ObsColumns, ObsHead
from .dataset_folders import require_plain_schema, require_readable_groups, shards_of
from .encoder import CellEncoder, EncodingOptions, features_of
from .files import find_files
from .readers import FileSource, open_cells

SHARD_CELLS = 1024
MIXED_SHARDS = 8


class ShardedCells(_BaseExamplesIterable):
    """Shards of cells in an order that follows from seed, epoch and shard alone.

    Args:
        about: what tells these cells from others, such as names and sizes of files; a saved position is for them alone.
        numbers (`Sequence[int]`): the shards, in the order they are read.
        key (`tuple` of `int`, *optional*): what the permutations are drawn from; None leaves everything in order.
        mixed (`int`): shards read at a time, whose rows are permuted together.
    """

    with_cell_keys = False
    """Whether rows carry the `cell_key` from which DataCollatorForMaskedGenes draws their masks."""

    def __init__(self, about: Any, features: datasets.Features, numbers: Sequence[int], key: tuple[int, ...] | None, mixed: int) -> None:
        super().__init__()
        self._about = about
        self._features, self._numbers, self._key = features, tuple(numbers), key
        self._mixed = mixed if key is not None else 1

    @abstractmethod
    def _read(self, number: int) -> pa.Table:
        """Return the rows of a shard."""

    @abstractmethod
    def _with(self, numbers: Sequence[int], key: tuple[int, ...] | None) -> ShardedCells:
        """Return the same cells with other shards or another key."""

    @property
    def is_typed(self) -> bool:
        """True: examples are as the features say."""
        return True

    @property
    def features(self) -> datasets.Features:
        """Columns and their types."""
        return datasets.Features(self._features | {KEY: datasets.List(datasets.Value("int64"))}) if self.with_cell_keys else self._features

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._numbers)

    @property
    def sleep_on_threads_shutdown(self) -> bool:
        """False: no thread outlives an iteration."""
        return False

    def shuffle_data_sources(self, generator: np.random.Generator) -> ShardedCells:
        """Return the shards in the order of another epoch; datasets calls this for every epoch but the first."""
        if self._key is None:
            return self
        return self._again(self._numbers, (*self._key[:1], int(generator.integers(1 << 62)))).shuffled()

    def shuffled(self) -> ShardedCells:
        """Return the shards in the order their key says."""
        if self._key is None:
            return self
        numbers = np.sort(np.array(self._numbers, dtype=np.int64))
        return self._again(np.random.default_rng(self._key).permutation(numbers).tolist(), self._key)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> ShardedCells:
        """Return some of the shards."""
        places = self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous)
        return self._again([self._numbers[place] for place in places], self._key)

    def reshard_data_sources(self) -> ShardedCells:
        """Return itself: the shards are small already."""
        return self

    def _init_state_dict(self) -> dict:
        self._state_dict = {"group": 0, "row": 0, "made_for": self._signature, "type": type(self).__name__}
        return self._state_dict

    @property
    def _signature(self) -> str:
        numbers = xxhash.xxh3_64(repr((self._about, self._numbers)).encode()).hexdigest()
        return f"{len(self._numbers)} shards {numbers}, key {self._key}, {self._mixed} mixed"

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state: dict[str, Any] = self._state_dict or {"group": 0, "row": 0, "made_for": self._signature}
        if state["made_for"] != self._signature:
            msg = f"The state was saved by another stream ({state['made_for']}) than this one ({self._signature}). Make the stream with the same files, seed, epoch, ranks and workers."
            raise SettingError(msg)
        groups = [self._numbers[i : i + self._mixed] for i in range(0, len(self._numbers), self._mixed)]
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._load, groups[state["group"]]) if state["group"] < len(groups) else None
            while coming is not None:
                table, group = coming.result(), state["group"]
                coming = reader.submit(self._load, groups[group + 1]) if group + 1 < len(groups) else None
                order = np.arange(len(table)) if self._key is None else np.random.default_rng([*self._key, *groups[group]]).permutation(len(table))
                examples = _Examples(table)
                for place in range(state["row"], len(order)):
                    state["row"] = place + 1
                    yield f"{group}-{place}", examples[int(order[place])]
                state["group"], state["row"] = group + 1, 0

    def _again(self, numbers: Sequence[int], key: tuple[int, ...] | None) -> ShardedCells:
        again = self._with(numbers, key)
        again.with_cell_keys = self.with_cell_keys
        return again

    def _load(self, numbers: Sequence[int]) -> pa.Table:
        tables = [self._read(number) for number in numbers]
        if self.with_cell_keys:
            showing = 0 if self._key is None else self._key[1]
            tables = [self._add_keys(table, number, showing) for table, number in zip(tables, numbers, strict=True)]
        return pa.concat_tables(tables).combine_chunks() if len(tables) > 1 else tables[0].combine_chunks()

    @staticmethod
    def _add_keys(table: pa.Table, number: int, showing: int) -> pa.Table:
        """Add a column with corpus, row and pass; a row is told by its shard and its place there."""
        keys = np.stack([np.zeros(len(table), np.int64), (number << 32) + np.arange(len(table)), np.full(len(table), showing)], axis=1)
        return table.append_column(KEY, pa.ListArray.from_arrays(pa.array(np.arange(len(table) + 1) * 3, pa.int32()), pa.array(keys.ravel(), pa.int64())))


class _Examples:
    """Rows of a table as dictionaries; lists become numpy arrays that share the table's memory."""

    def __init__(self, table: pa.Table) -> None:
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._plain: dict[str, list[Any]] = {}
        for name in table.column_names:
            chunks = table.column(name).chunks
            column = chunks[0] if len(chunks) == 1 else pa.array([], table.schema.field(name).type) if not chunks else pa.concat_arrays(chunks)
            is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
            # A missing list, or one with gaps, has no numpy array of its type.
            if is_list and not column.null_count and not column.values.null_count:
                # Offsets count from the beginning of the values, whatever slice the column is.
                self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False))
            else:
                self._plain[name] = column.to_pylist()
        self._names = table.column_names

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = {}
        for name in self._names:
            if name in self._plain:
                example[name] = self._plain[name][row]
            else:
                offsets, values = self._lists[name]
                example[name] = values[offsets[row] : offsets[row + 1]]
        return example


class CountShards(ShardedCells):
    """Row ranges of files of counts, ranked as they are read."""

    def __init__(
        self, about: Any, encoders: Sequence[CellEncoder], ranges: Sequence[tuple[int, int, int]], features: datasets.Features,
        numbers: Sequence[int], key: tuple[int, ...] | None, mixed: int,
    ) -> None:  # fmt: skip
        super().__init__(about, features, numbers, key, mixed)
        self._encoders, self._ranges, self._all_mixed = encoders, ranges, mixed

    def _read(self, number: int) -> pa.Table:
        file, start, stop = self._ranges[number]
        return pa.concat_tables([self._features.arrow_schema.empty_table(), *self._encoders[file].tables(start, stop)])

    def _with(self, numbers: Sequence[int], key: tuple[int, ...] | None) -> CountShards:
        return CountShards(self._about, self._encoders, self._ranges, self._features, numbers, key, self._all_mixed)


class TokenShards(ShardedCells):
    """Row ranges of Arrow files and row groups of Parquet files."""

    def __init__(
        self, about: Any, pieces: Sequence[tuple[str, int, int]], features: datasets.Features, columns: Sequence[str],
        numbers: Sequence[int], key: tuple[int, ...] | None, mixed: int,
    ) -> None:  # fmt: skip
        super().__init__(about, features, numbers, key, mixed)
        self._pieces, self._columns, self._all_mixed = pieces, columns, mixed

    def _read(self, number: int) -> pa.Table:
        path, first, second = self._pieces[number]
        if path.endswith(".parquet"):
            try:
                return _open_parquet(path).read_row_group(first, columns=list(self._columns), use_threads=False)
            except (OSError, pa.ArrowException) as error:
                msg = f"{path}: row group {first:,} cannot be read: {str(error).splitlines()[0]} Write or download it again."
                raise CellFileError(msg) from error
        return _open_arrow(path).select(self._columns).slice(first, second - first)

    def _with(self, numbers: Sequence[int], key: tuple[int, ...] | None) -> TokenShards:
        return TokenShards(self._about, self._pieces, self._features, self._columns, numbers, key, self._all_mixed)


@lru_cache(maxsize=16)
def _open_arrow(path: str) -> pa.Table:
    require_regular(path)
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        msg = f"{path} cannot be read as an Arrow stream: {error}. Tokenized cells are expected: make them with `geneformer-hf tokenize`, or rank counts on the fly with `stream_cells`."
        raise CellFileError(msg) from error


def _open_parquet(path: str) -> pq.ParquetFile:
    # One for each thread: a stream that was broken off may still be reading ahead, and a ParquetFile serves one reader at a time.
    return _open_parquet_in(path, threading.get_ident())


@lru_cache(maxsize=16)
def _open_parquet_in(path: str, thread: int) -> pq.ParquetFile:
    import fsspec

    if "://" not in path:
        require_regular(path)
    try:
        return pq.ParquetFile(fsspec.open(path, "rb").open() if "://" in path else path)
    except (OSError, pa.ArrowInvalid) as error:
        msg = f"{path} cannot be read as a Parquet file: {error}. Write or download it again."
        raise CellFileError(msg) from error


def stream_cells(
    files: Any,
    *,
    tokenizer: GeneformerTokenizer,
    obs: str | Sequence[str] = "none",
    shuffle: bool = False,
    seed: int = 0,
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    keep_counts: bool = False,
    shard_cells: int = SHARD_CELLS,
    mix: int = MIXED_SHARDS,
    cell_keys: bool = False,
) -> datasets.IterableDataset:
    """Rank cells on the fly, straight from files of counts: nothing is written, memory is bounded by a few shards.

    Rows are those of `load_cells`, but lists are numpy arrays; without `shuffle` they come in the same order.

    Args:
        files, tokenizer, gene_ids, counts_layer, genome, keep_counts: as in `load_cells`.
        obs (`"all"`, `"none"` or a sequence of names, *optional*, defaults to `"none"`): columns of obs to keep.
        shuffle (`bool`, *optional*, defaults to `False`): shuffle, differently in each epoch (`set_epoch`).
        seed (`int`, *optional*, defaults to 0): the same seed and epoch give the same order.
        shard_cells (`int`, *optional*, defaults to 1024): cells read in one go; a shard is what a rank or worker gets.
        mix (`int`, *optional*, defaults to 8): shards whose rows are shuffled together: more mix better and take more memory.
        cell_keys (`bool`, *optional*, defaults to `False`):
            add the column `cell_key`, from which `DataCollatorForMaskedGenes` draws masks that depend on seed, epoch and cell alone; without `shuffle`, on the cell alone.

    Returns:
        `datasets.IterableDataset`.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError
    """
    _require_positive(shard_cells=shard_cells, mix=mix)
    is_memory = hasattr(files, "obs") and hasattr(files, "var")
    sources = [open_cells(item, gene_ids=gene_ids, counts_layer=counts_layer, genome=genome) for item in ([files] if is_memory else find_files(files))]
    wanted: Any = obs if obs in ("all", "none") else (obs,) if isinstance(obs, str) else tuple(obs)
    options = EncodingOptions(wanted, keep_counts, genome_fraction=genome is not None)
    columns = ObsColumns.of([ObsHead.of(source) for source in sources], wanted)
    encoders = [CellEncoder(source, tokenizer, columns, options) for source in sources]
    for source in sources:
        if isinstance(source, FileSource):
            # Before workers share the rows.
            source.prepare()
    ranges = [(n, start, min(start + shard_cells, s.n_cells)) for n, s in enumerate(sources) for start in range(0, s.n_cells, shard_cells)]
    features = features_of(tokenizer, columns, options)
    sizes = [(Path(s.name).name, s.n_cells, _size_of(Path(s.name))) for s in sources]
    return _stream(CountShards(sizes, encoders, ranges, features, range(len(ranges)), _key_of(seed, shuffle=shuffle), mix), cell_keys=cell_keys)


def stream_tokens(
    files: Any, *, shuffle: bool = False, seed: int = 0, columns: Sequence[str] | None = None, shard_cells: int = SHARD_CELLS, mix: int = MIXED_SHARDS,
    cell_keys: bool = False,
) -> datasets.IterableDataset:  # fmt: skip
    """Stream tokenized cells from a dataset folder (`geneformer-hf tokenize`, `save_to_disk`) or from Parquet files.

    Args:
        files (`str`, `Path` or a sequence of them):
            Dataset folder, Parquet files, a folder of these, or their addresses as fsspec knows them (`hf://datasets/…`).
        shuffle, seed, mix, cell_keys: as in `stream_cells`.
        columns (`Sequence[str]`, *optional*): columns to read; all by default.
        shard_cells (`int`, *optional*, defaults to 1024): cells read in one go from Arrow; Parquet files are read by row group.

    Returns:
        `datasets.IterableDataset`; lists are numpy arrays.

    Raises:
        CellFileError: if there is nothing to read, or the files hold different columns.
    """
    _require_positive(shard_cells=shard_cells, mix=mix)
    paths = [p for item in ([files] if isinstance(files, (str, Path)) else files) for p in _token_files(str(item))]
    pieces: list[tuple[str, int, int]] = []
    features: datasets.Features | None = None
    for path in paths:
        if path.endswith(".parquet"):
            file = _open_parquet(path)
            found = _features_of(file.schema_arrow, path)
            require_readable_groups(file, path)
            pieces += [(path, group, 0) for group in range(file.num_row_groups)]
        else:
            table = _open_arrow(path)
            found = _features_of(table.schema, path)
            pieces += [(path, start, min(start + shard_cells, len(table))) for start in range(0, len(table), shard_cells)]
        if features is not None and features != found:
            differing = [name for name in dict.fromkeys([*features, *found]) if features.get(name) != found.get(name)]
            msg = f"{path} holds other columns than {paths[0]}: {', '.join(differing)} differ in type, in classes or in being there. Tokenize the files together, so that a class has one number."
            raise CellFileError(msg)
        features = found
    if features is None or not pieces:
        msg = f"{files}: no tokenized cells there; expected a dataset folder or .parquet files."
        raise CellFileError(msg)
    names = list(columns if columns is not None else features)
    missing = [name for name in names if name not in features]
    if missing:
        msg = f"{paths[0]} has no column {', '.join(map(repr, missing))}. Found: {', '.join(features)}."
        raise CellFileError(msg)
    features = datasets.Features({name: features[name] for name in names})
    sizes = [(Path(path).name, _size_of(Path(path))) for path in paths]
    return _stream(TokenShards(sizes, pieces, features, names, range(len(pieces)), _key_of(seed, shuffle=shuffle), mix), cell_keys=cell_keys)


def _features_of(schema: pa.Schema, path: str) -> datasets.Features:
    """Return the columns of a file, after looking whether they simply hold values.

    Raises:
        CellFileError
    """
    require_plain_schema(schema, path)
    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        msg = f"{path} cannot be read: {str(error).splitlines()[0]}. Tokenize the cells again."
        raise CellFileError(msg) from error


def _token_files(item: str) -> list[str]:
    """Return the Arrow or Parquet files behind a path, in their order."""
    if "://" in item:
        import fsspec

        system, path = fsspec.core.url_to_fs(item)
        if system.isfile(path):
            return [item]
        return [system.unstrip_protocol(p) for p in sorted(system.glob(f"{path}/**/*.parquet"))]
    folder = Path(item)
    require_regular(folder)
    if folder.is_file():
        return [item]
    if (folder / "state.json").is_file():
        return [str(shard) for shard in shards_of(folder)]
    if not folder.is_dir():
        msg = f"{item} does not exist; expected a dataset folder or .parquet files."
        raise CellFileError(msg)
    return [str(p) for p in sorted(folder.rglob("*.parquet"))]


def _key_of(seed: int, *, shuffle: bool) -> tuple[int, ...] | None:
    if seed < 0:
        msg = f"seed is {seed}; expected 0 or more."
        raise SettingError(msg)
    return (seed, 0) if shuffle else None


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            msg = f"{name} is {number}; expected 1 or more."
            raise SettingError(msg)


def _size_of(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0


class CellStream(datasets.IterableDataset):
    """A stream whose saved position brings its epoch along; datasets would silently restart another epoch."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on with the row after the one the position was saved at, in its epoch."""
        self.set_epoch(state_dict["epoch"])
        super().load_state_dict(state_dict)


def _stream(shards: ShardedCells, *, cell_keys: bool) -> datasets.IterableDataset:
    shards.with_cell_keys = cell_keys
    return CellStream(shards.shuffled(), info=datasets.DatasetInfo(features=shards.features))
