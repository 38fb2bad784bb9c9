"""Cells of a SOMA experiment, such as CELLxGENE Census: a query on obs becomes a source of cells like any file, read a block at a time.

TileDB-SOMA reads experiments on disk and in the cloud alike; the Census is one of them, found through the package cellxgene-census.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..errors import CellFileError, ColumnNotFoundError, MissingExtraError, SettingError
from ..ranking import check_counts
from .matrices import BLOCK_CELLS
from .sources import CellSource, SourceOptions
from .store_checks import files_of

MEASUREMENT, LAYER, JOIN_ID = "RNA", "raw", "soma_joinid"
CELL_IDS = ("obs_id", "observation_joinid", "barcode", "cell_id")
GENE_INDEX = ("feature_id", "ensembl_id", "var_id")
BLOCK = min(1024, BLOCK_CELLS)
"""Cells read at once: rows of the Census hold some thousand genes each."""
BUFFER_BYTES = 64 << 20
"""For each column of a read, unless the context says otherwise; tiledbsoma takes 1 GiB."""


def tiledbsoma() -> Any:
    """Return tiledbsoma, or say how to get it.

    Raises:
        MissingExtraError
    """
    try:
        import tiledbsoma as found
    except ModuleNotFoundError as error:
        msg = "SOMA experiments need the package tiledbsoma. Install it with `pip install 'geneformer-hf[soma]'`; for the Census, `'geneformer-hf[census]'`."
        raise MissingExtraError(msg) from error
    return found


class SomaSource(CellSource):
    """The cells of an experiment that a query on obs finds, in the order of their join ids.

    Args:
        uri (`str` or `Path`): of the experiment.
        obs_filter (`str`, *optional*): which cells, in the language of SOMA: `"tissue == 'blood' and is_primary_data == True"`; all otherwise.
        measurement, layer (`str`, *optional*, default to `"RNA"` and `"raw"`): where the raw counts are.
        options: `gene_ids` and `total_counts`, as for files.
        context (*optional*): a `SOMATileDBContext`, such as that of the Census, whose settings and timestamp are used.
        provenance: what to record of where this is.

    Raises:
        MissingExtraError; CellFileError for no experiment, no such measurement or no cells; SettingError for a query that cannot be asked.
    """

    layout = "csr"

    def __init__(
        self, uri: str | Path, obs_filter: str | None = None, *, measurement: str = MEASUREMENT, layer: str = LAYER, options: SourceOptions | None = None,
        context: Any = None, provenance: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        context = context or tiledbsoma().SOMATileDBContext()
        self.obs_filter, self._timestamp = obs_filter, context.timestamp_ms
        self._settings = tuple(sorted(({"soma.init_buffer_bytes": str(BUFFER_BYTES)} | context.tiledb_config).items()))
        # TileDB remembers the folder a process began in.
        self._uri = str(Path(uri).absolute()) if "://" not in str(uri) else str(uri)
        self.options = options or SourceOptions(None, None, None)
        self._measurement, self._layer = measurement, self.options.counts_layer or layer
        self.name, self.counts = f"{uri}{f' where {obs_filter}' if obs_filter else ''}", self._layer
        if Path(self._uri).is_dir():
            # Links and special files are refused on the way.
            deque(files_of(Path(self._uri)), maxlen=0)
        with self._open() as experiment:
            self._require_inside(experiment, "ms", "obs")
            if measurement not in experiment.ms:
                msg = f"{uri} has no measurement {measurement!r}. Found: {', '.join(experiment.ms) or 'none'}."
                raise CellFileError(msg)
            self._require_inside(experiment.ms, measurement)
            self._require_inside(experiment.ms[measurement], "X", "var")
            layers = list(experiment.ms[measurement].X)
            if self._layer not in layers:
                msg = f"{uri}: measurement {measurement} has no layer {self._layer!r}. Found: {', '.join(layers) or 'none'}. Name the one with raw counts."
                raise ColumnNotFoundError(msg)
            self._require_inside(experiment.ms[measurement].X, self._layer)
            self._obs_columns = [name for name in experiment.obs.schema.names if name != JOIN_ID]
            self._ids = self._join_ids(experiment)
            self.n_cells = len(self._ids)
            var = experiment.ms[measurement].var.read().concat().to_pandas()
        if not self.n_cells:
            msg = f"{uri}: no cell has {obs_filter or 'any value'}. Columns of obs: {', '.join(self._obs_columns)}."
            raise CellFileError(msg)
        self._var_ids = var.pop(JOIN_ID).to_numpy()
        text = {
            name: var[name].astype(str).tolist()
            for name in var
            if pd.api.types.is_string_dtype(var[name]) or var[name].dtype == "category" or var[name].dtype == object
        }
        index = next((name for name in GENE_INDEX if name in text), next(iter(text), None))
        if index is None:
            msg = f"{uri} does not name its genes: its var holds no text ({', '.join(var) or 'nothing'})."
            raise CellFileError(msg)
        self._name_genes(text, text[index], index)
        check_counts(next(self._iter_counts(0, min(64, self.n_cells)))[0].data, f"{self.name}: {self.counts}")
        self.provenance = {
            "uri": str(uri),
            "obs_filter": obs_filter,
            "measurement": measurement,
            "layer": self._layer,
            "tiledbsoma": tiledbsoma().__version__,
        } | dict(provenance or {})

    @contextmanager
    def _open(self) -> Iterator[Any]:
        soma = tiledbsoma()
        try:
            experiment = soma.Experiment.open(self._uri, context=_context(self._settings, self._timestamp, os.getpid()))
        except (soma.SOMAError, ValueError, RuntimeError) as error:
            msg = f"{self._uri} cannot be opened as a SOMA experiment: {_short(error)}"
            raise CellFileError(msg) from error
        with experiment:
            yield experiment

    def _require_inside(self, collection: Any, *names: str) -> None:
        """Raise unless the named members of a collection are there and lie inside the experiment: their addresses may name any folder or bucket."""
        members = collection.members()
        for name in names:
            if name not in members:
                msg = f"{self._uri}: {collection.uri} has no {name!r}. Found: {', '.join(members) or 'nothing'}. Write the experiment again (`tiledbsoma.io.from_anndata`)."
                raise CellFileError(msg)
            if _is_outside(members[name][0], self._uri.rstrip("/")):
                msg = f"{self._uri}: {name!r} lies outside of the experiment, at {members[name][0]}. Only data inside the experiment itself is read; copy that into it."
                raise CellFileError(msg)

    def _join_ids(self, experiment: Any) -> np.ndarray:
        wanted = {} if self.obs_filter is None else {"value_filter": self.obs_filter}
        try:
            table = experiment.obs.read(column_names=[JOIN_ID], **wanted).concat()
        except (tiledbsoma().SOMAError, ValueError, RuntimeError, SyntaxError) as error:
            msg = f"{self._uri}: the query {self.obs_filter!r} cannot be asked: {_short(error)} Columns of obs: {', '.join(self._obs_columns)}."
            raise SettingError(msg) from error
        return np.sort(table.column(JOIN_ID).to_numpy())

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in order."""
        return [name for name in self._obs_columns if name != self._cell_id_column]

    @cached_property
    def _cell_id_column(self) -> str | None:
        return next((name for name in CELL_IDS if name in self._obs_columns), None)

    def read_obs(self, columns: Sequence[str], start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs columns of some cells, indexed by cell id: `obs_id` or `observation_joinid`, else the join id."""
        missing = [name for name in columns if name not in self._obs_columns]
        if missing:
            msg = f"{self.name}: obs has no column {', '.join(map(repr, missing))}. Found: {', '.join(self.obs_columns) or 'none'}."
            raise ColumnNotFoundError(msg)
        ids = self._ids[start:stop]
        named = self._cell_id_column or JOIN_ID
        with self._open() as experiment:
            table = experiment.obs.read((ids,), column_names=list(dict.fromkeys([JOIN_ID, named, *columns]))).concat()
        frame = table.to_pandas().set_index(JOIN_ID).loc[ids] if named != JOIN_ID else table.to_pandas().set_index(JOIN_ID, drop=False).loc[ids]
        return frame[list(columns)].set_index(pd.Index([str(name) for name in frame[named]], dtype=object))

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`: none that is read here."""
        return []

    def _iter_counts(self, start: int, stop: int) -> Iterator[tuple[sp.csr_array, int]]:
        with self._open() as experiment:
            matrix = experiment.ms[self._measurement].X[self._layer]
            for first in range(start, stop, BLOCK):
                ids = self._ids[first : min(first + BLOCK, stop)]
                parts = list(matrix.read((ids,)).tables())
                rows = np.concatenate([part.column("soma_dim_0").to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.int64)
                columns = np.concatenate([part.column("soma_dim_1").to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.int64)
                values = np.concatenate([part.column("soma_data").to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.float32)
                block = sp.coo_array((values, (np.searchsorted(ids, rows), np.searchsorted(self._var_ids, columns))), shape=(len(ids), self.n_columns))
                yield block.tocsr(), first

    @property
    def identity(self) -> str:
        """All that its cells depend on, as text: where, which, and every write to an experiment on disk."""
        writes = sorted(str(path.relative_to(self._uri)) for path in Path(self._uri).rglob("__fragments/*")) if Path(self._uri).is_dir() else []
        return json.dumps([self._uri, self._timestamp, self.obs_filter, self._measurement, self._layer, len(self._ids), int(self._ids.sum()), writes])


def open_census(obs_filter: str, *, organism: str = "homo_sapiens", version: str = "stable", options: SourceOptions | None = None) -> SomaSource:
    """Open the cells of CELLxGENE Census that a query finds.

    Args:
        obs_filter (`str`): such as `"tissue_general == 'blood' and assay == \\"10x 3' v3\\" and is_primary_data == True"`.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`).
        version (`str`, *optional*, defaults to `"stable"`): of the Census; what it stands for is recorded.

    Raises:
        MissingExtraError: without cellxgene-census; and as `SomaSource`.
    """
    try:
        import cellxgene_census
    except ModuleNotFoundError as error:
        msg = (
            "The Census is found through the package cellxgene-census. Install it with `pip install 'geneformer-hf[census]'`, or open a copy of it by its path."
        )
        raise MissingExtraError(msg) from error
    described = cellxgene_census.get_census_version_description(version)
    uri = f"{described['soma']['uri'].rstrip('/')}/census_data/{organism}"
    context = cellxgene_census.get_default_soma_context(tiledb_config={"vfs.s3.region": described["soma"].get("s3_region", "us-west-2")})
    return SomaSource(
        uri, obs_filter, options=options, context=context, provenance={"census_version": described.get("release_build", version), "organism": organism}
    )


@cache
def _context(settings: tuple[tuple[str, Any], ...], timestamp: int | None, process: int) -> Any:
    """Return a context of this process: the threads of TileDB do not survive a fork, and a read in its child would never return."""
    return tiledbsoma().SOMATileDBContext(tiledb_config=dict(settings), timestamp=timestamp)


def _is_outside(address: str, root: str) -> bool:
    """Return whether an address is neither inside a folder or bucket nor, for experiments on a TileDB server, a name that the server resolves."""
    if root.startswith("tiledb://"):
        return False
    if "://" in root:
        return not address.startswith(f"{root}/") or ".." in address.split("/")
    return not Path(address.removeprefix("file://")).resolve().is_relative_to(Path(root).resolve())


def _short(error: Exception) -> str:
    """Return what tiledb says, without where in its own code."""
    return f"{' '.join(str(error).split(' At:')[0].split(chr(10) + 'At:')[0].split())[:300].rstrip('.')}."
