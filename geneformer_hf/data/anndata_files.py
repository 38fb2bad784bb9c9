"""Files of anndata, any version: `.h5ad` and `.zarr`, X, raw and layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import CellFileError
from ..ranking import choose_counts
from .frames import Frame, RecordFrame, open_frame
from .matrices import layout_of, require_sound_index, sample_of
from .sources import FileSource, SourceOptions
from .stores import is_group, open_store


class AnnDataFileSource(FileSource):
    """An `.h5ad` file or `.zarr` store."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.name, self.options = path, str(path), options
        with self._open() as store:
            for key in ("obs", "var"):
                if key not in store:
                    msg = f"{path} has no {key!r} (it holds: {', '.join(store) or 'nothing'}), so anndata did not write it. Write one with `adata.write_h5ad(...)`."
                    raise CellFileError(msg)
            obs = self._obs(store)
            self.is_legacy = isinstance(obs, RecordFrame)
            self.n_cells = len(obs)
            keys = stored_matrices(store)
            samples = {n: lambda key=key: sample_of(store[key]) for n, key in keys.items()}
            self.counts = choose_counts(samples, options.counts_layer, where=self.name)
            self._key = keys[self.counts]
            self.layout, shape = layout_of(store[self._key], self.name)
            var = open_frame(store, self._key.removesuffix("X") + "var" if self.counts == "raw.X" else "var", self.name)
            self._name_genes(var.text(), var.index(), var.index_name)
            if shape != (self.n_cells, self.n_columns):
                msg = f"{path}: {self.counts} has shape {shape}, but obs has {self.n_cells:,} rows and var {self.n_columns:,}. The file is damaged; write it again."
                raise CellFileError(msg)
            if self.layout != "dense":
                require_sound_index(store[self._key], shape, self.layout, f"{path}: {self.counts}")

    def keys_of(self, place: str) -> list[str]:
        """Return the names of what is stored in `obsm` or `varm`."""
        with self._open() as store:
            item = store.get(place, {})
            return list(item) if isinstance(item, dict) or is_group(item) else list(item.dtype.names or ())

    def _stored_obsm(self, key: str) -> Any:
        import anndata

        with self._open() as store:
            item = store["obsm"]
            return anndata.io.read_elem(item[key]) if is_group(item) else item[key]

    def _open(self) -> AbstractContextManager[Any]:
        return open_store(self.path)

    def _matrix(self, store: Any) -> Any:
        return store[self._key]

    def _obs(self, store: Any) -> Frame:
        return open_frame(store, "obs", self.name)


def stored_matrices(store: Any) -> dict[str, str]:
    """Return the matrices of a file by their names (`X`, `raw.X`, layers) and where they lie."""
    # anndata before 0.7 wrote raw beside everything else, with a dot.
    places = (("X", "X"), ("raw.X", "raw/X"), ("raw.X", "raw.X"))
    keys = {name: key for name, key in places if key in store and store[key].attrs.get("encoding-type") != "null"}
    # X is X, also where a layer has that name.
    return keys | {name: f"layers/{name}" for name in store.get("layers", ()) if name not in ("X", "raw.X")}
