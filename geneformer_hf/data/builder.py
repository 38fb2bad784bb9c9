"""Files of cells as a tokenized Hugging Face dataset, written in Arrow batches in constant memory.

`load_cells` is the way in. Behind it `CellDatasetBuilder` is an ordinary `datasets.ArrowBasedBuilder`: it is cached (by the
content of the files, the gene table, the encoding version and the options), and streams. With `num_proc`, `load_cells` goes
through `corpus.py`, with the same rows in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError

from ..errors import CellFileError, GeneformerError
from ..models.tokenization_geneformer import GeneformerTokenizer
from .columns import ObsColumns, ObsHead
from .corpus import cached_corpus
from .encoder import CellEncoder, EncodingOptions, features_of, row_ranges
from .files import content_hash, find_files
from .readers import CellSource, FileSource, SourceOptions, open_cells
from .report import FileReport, with_report


@dataclass
class CellDatasetConfig(datasets.BuilderConfig):
    """Configuration of `CellDatasetBuilder`."""

    name: str = "cells"
    files: tuple[str | CellSource, ...] = ()
    """Paths of files of cells, or open sources that have an identity, in the order of their rows."""
    tokenizer: GeneformerTokenizer | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    encoding: EncodingOptions = field(default_factory=EncodingOptions)

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        """Return the name of the cache folder: it follows the content of the files, not their paths."""
        if self.tokenizer is None or not self.files:
            msg = "CellDatasetBuilder needs `files=` and `tokenizer=`; `load_cells` passes both."
            raise ValueError(msg)
        digest = xxhash.xxh3_128()
        for part in (
            self.tokenizer.encoding_fingerprint,
            self.source,
            self.encoding,
            *(f.identity if isinstance(f, CellSource) else content_hash(f) for f in self.files),
        ):
            digest.update(repr(part).encode() + b"\0")
        return f"{self.name}-{digest.hexdigest()}"


class CellsRefusedError(DatasetGenerationError):
    """Carries our own error through datasets, which would replace it by one that says only that something went wrong."""


class CellDatasetBuilder(datasets.ArrowBasedBuilder):
    """Tokenized cells of files as a dataset.

    Example:
        `CellDatasetBuilder(files=("a.h5ad",), tokenizer=tokenizer).as_streaming_dataset("train")` streams without a cache;
        `load_cells` builds and opens it.
    """

    BUILDER_CONFIG_CLASS = CellDatasetConfig
    VERSION = datasets.Version("1.0.0")
    config: CellDatasetConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._work_dir: tempfile.TemporaryDirectory[str] | None = None
        self._encoders: dict[int, CellEncoder] = {}
        super().__init__(*args, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        self.sources = [open_cells(f, **vars(self.config.source)) for f in self.config.files]
        self._columns = ObsColumns.of([ObsHead.of(s) for s in self.sources], self.config.encoding.obs)
        return datasets.DatasetInfo(features=features_of(self._tokenizer, self._columns, self.config.encoding))

    @property
    def _tokenizer(self) -> GeneformerTokenizer:
        if self.config.tokenizer is None:
            msg = "CellDatasetBuilder has no tokenizer."
            raise ValueError(msg)
        return self.config.tokenizer

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        ranges = []
        for number, source in enumerate(self.sources):
            # Genes that match nothing are refused here, before processes start.
            self._encoder(number)
            # Once, before processes share the rows.
            if isinstance(source, FileSource) and not source.holds_rows:
                if self._work_dir is None:
                    Path(self._cache_dir_root).mkdir(parents=True, exist_ok=True)
                    self._work_dir = tempfile.TemporaryDirectory(prefix="geneformer-hf-", dir=self._cache_dir_root)
                source.prepare(Path(self._work_dir.name))
                # Of a mixture of genomes, while its rows are there.
                _ = source.genome_fractions
            ranges += [(number, start, stop) for start, stop in row_ranges(source.n_cells)]
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"ranges": ranges})]

    def _generate_tables(self, ranges: list[tuple[int, int, int]]) -> Iterator[tuple[Key, pa.Table]]:
        try:
            for place, (number, start, stop) in enumerate(ranges):
                for batch, table in enumerate(self._encoder(number).tables(start, stop)):
                    yield Key(place, batch), table
        except GeneformerError as error:
            raise CellsRefusedError(error) from error

    def clean_up(self) -> None:
        """Remove the rows of transposed files; only needed while the dataset is generated."""
        if self._work_dir is not None:
            self._work_dir.cleanup()
            self._work_dir = None
        self._encoders.clear()

    def _encoder(self, number: int) -> CellEncoder:
        if number not in self._encoders:
            self._encoders[number] = CellEncoder(self.sources[number], self._tokenizer, self._columns, self.config.encoding)
        return self._encoders[number]


def load_cells(
    files: Any,
    *,
    tokenizer: GeneformerTokenizer,
    obs: str | Sequence[str] = "all",
    gene_ids: str | None = None,
    counts_layer: str | None = None,
    genome: str | None = None,
    total_counts: str | None = None,
    keep_counts: bool = False,
    keep_uncropped: bool = False,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Tokenize cells into a dataset with the columns `input_ids`, `length`, `cell_id` and obs.

    Rows keep the order of the files as given (a glob or folder: sorted) and of the cells within. Left out, counted and
    logged: cells whose `obs["filter_pass"]` is 0 and cells without any gene of the vocabulary.

    Args:
        files (`str`, `Path`, a sequence of them, `AnnData` or `SomaSource`):
            Files of cells (`.h5ad`, `.zarr`, `.loom`, 10x `.h5` or folder, scDL archive), a glob, a folder, cells in memory, or a query of a SOMA experiment.
        tokenizer (`GeneformerTokenizer`): the one of the model the dataset is for.
        obs (`"all"`, `"none"` or a sequence of names, *optional*, defaults to `"all"`):
            Columns of obs to keep. Categories become `ClassLabel`s in their order (anndata turns repeated text into
            categories when it writes a file); missing values become None. A column
            named like one of ours is kept as `obs_<name>`.
        gene_ids (`str`, *optional*): column of var that names the genes, or `index`. Found by itself where it can be.
        counts_layer (`str`, *optional*): layer of the raw counts, or `X` or `raw.X`. Found by itself where it can be.
        genome (`str`, *optional*):
            Genome to read of a file that mixes several, as it is called there (`hg19`) or by species (`human`). Cells with less than
            half of their counts in it are read as cells without genes; the column `genome_fraction` holds the fraction of each cell.
        total_counts (`str`, *optional*): column of obs with the counts per cell; only `keep_counts` depends on it.
        keep_counts (`bool`, *optional*, defaults to `False`): adds `counts`, counts per 10,000 beside each token.
        keep_uncropped (`bool`, *optional*, defaults to `False`):
            Adds `input_ids_uncropped` and `length_uncropped`: all ranked genes, without special tokens.
        num_proc (`int`, *optional*): processes for files on disk; the rows do not depend on it.
        cache_dir (`str`, *optional*): where datasets keeps the result; its default cache otherwise.

    Returns:
        `datasets.Dataset`; `info.description` is a JSON report of what was read and left out.

    Raises:
        CellFileError, NotRawCountsError, GeneIdError, ColumnNotFoundError

    Example:
        >>> import anndata, numpy as np, pandas as pd
        >>> from geneformer_hf import GeneTable, GeneformerTokenizer
        >>> table = GeneTable(["ENSG00000000003", "ENSG00000000005"], [2, 3], [1.0, 2.0])
        >>> cells = anndata.AnnData(np.array([[1, 4]]), pd.DataFrame(index=["cell1"]), pd.DataFrame(index=list(table.ensembl_ids)))
        >>> load_cells(cells, tokenizer=GeneformerTokenizer(gene_table=table))[0]
        {'input_ids': [3, 2], 'length': 2, 'cell_id': 'cell1'}
    """
    source_options = SourceOptions(gene_ids, counts_layer, total_counts, genome)
    wanted: Any = obs if obs in ("all", "none") else (obs,) if isinstance(obs, str) else tuple(obs)
    encoding = EncodingOptions(wanted, keep_counts, keep_uncropped, genome is not None)
    if hasattr(files, "obs") and hasattr(files, "var"):
        return _load_memory(files, tokenizer, source_options, encoding)
    if isinstance(files, CellSource):
        return _build((files,), tokenizer, source_options, encoding, cache_dir)
    paths = find_files(files)
    if num_proc is not None and num_proc > 1:
        # datasets would fork, which hangs where zarr, torch or numpy have threads by then.
        config = CellDatasetConfig(files=tuple(map(str, paths)), tokenizer=tokenizer, source=source_options, encoding=encoding)
        options = {name: value for name, value in (vars(source_options) | vars(encoding)).items() if name != "genome_fraction"}
        return cached_corpus(paths, cache_dir, config.create_config_id({}), tokenizer=tokenizer, num_proc=num_proc, **options)
    return _build(tuple(map(str, paths)), tokenizer, source_options, encoding, cache_dir)


def _build(
    files: tuple[str | CellSource, ...], tokenizer: GeneformerTokenizer, source_options: SourceOptions, encoding: EncodingOptions, cache_dir: str | Path | None
) -> datasets.Dataset:
    builder = CellDatasetBuilder(cache_dir=cache_dir, files=files, tokenizer=tokenizer, source=source_options, encoding=encoding)
    try:
        builder.download_and_prepare()
    except CellsRefusedError as refused:
        raise refused.args[0] from None
    except DatasetGenerationError as error:
        # A full disk, for instance: the operating system's own error says more.
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        msg = f"{', '.join(map(str, files[:3]))} cannot be turned into a dataset: {type(error.__cause__).__name__}: {error.__cause__}. Leave columns of obs out (`obs=`, --obs), or write the file again."
        raise CellFileError(msg) from error.__cause__
    finally:
        builder.clean_up()
    if not builder.info.splits or not builder.info.splits["train"].num_examples:
        return _reported(_in_memory([], builder.info.features), builder.sources, tokenizer)
    return _reported(builder.as_dataset("train"), builder.sources, tokenizer)


def _load_memory(adata: Any, tokenizer: GeneformerTokenizer, source_options: SourceOptions, encoding: EncodingOptions) -> datasets.Dataset:
    source = open_cells(adata, **vars(source_options))
    columns = ObsColumns.of([ObsHead.of(source)], encoding.obs)
    features = features_of(tokenizer, columns, encoding)
    tables = list(CellEncoder(source, tokenizer, columns, encoding).tables())
    return _reported(_in_memory(tables, features), [source], tokenizer)


def _in_memory(tables: list[pa.Table], features: datasets.Features) -> datasets.Dataset:
    table = pa.concat_tables(tables) if tables else features.arrow_schema.empty_table()
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _reported(dataset: datasets.Dataset, sources: Sequence[CellSource], tokenizer: GeneformerTokenizer) -> datasets.Dataset:
    return with_report(dataset, [FileReport.of(source, tokenizer.gene_table) for source in sources], tokenizer)
