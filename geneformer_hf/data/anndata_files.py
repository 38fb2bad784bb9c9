"""Files of anndata, any version: `.h5ad` and `.zarr`, X, raw and layers; and one modality of a file of MuData."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..anndata_objects import rna_modality
from ..errors import CellFileError
from ..feature_types import kind_of_feature
from ..ranking import choose_counts
from .frames import Frame, RecordFrame, open_frame
from .matrices import layout_of, require_sound_index, sample_of
from .sources import FileSource, SourceOptions
from .stores import is_group, open_store


class AnnDataFileSource(FileSource):
    """An `.h5ad` file or `.zarr` store, or a modality of a file of MuData (`cells.h5mu/rna`)."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path, self.modality = split_modality(path)
        self.name, self.options = str(path), options
        with open_store(self.path) as store:
            self._choose_modality(store)
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

    def _choose_modality(self, store: Any) -> None:
        is_mudata = "mod" in store and is_group(store["mod"]) and "X" not in store
        found = [name for name in store["mod"] if is_group(store["mod"][name])] if is_mudata else []
        # A modality of a zarr store is a store of its own, at the path that it has on disk.
        inside = f"{self.path}/mod" if self.path.is_dir() else str(self.path)
        if self.modality and self.modality not in found:
            msg = f"{self.path} holds no modality {self.modality!r}. Found: {', '.join(found) or 'none'}."
            raise CellFileError(msg)
        if found and not self.modality:
            self.modality = rna_modality(found, str(self.path), f"`{inside}/{{}}`")
        if kind_of_feature(self.modality) == "other":
            msg = f"{self.path}: the modality {self.modality!r} holds other features than genes. Name one of RNA; found {', '.join(found)}."
            raise CellFileError(msg)
        if self.modality:
            self.name = f"{inside}/{self.modality}"

    @property
    def counts_described(self) -> str:
        """Where the counts are, for people."""
        return super().counts_described + (f" of the modality {self.modality!r}" if self.modality else "")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with open_store(self.path) as store:
            yield store[f"mod/{self.modality}"] if self.modality else store

    def _matrix(self, store: Any) -> Any:
        return store[self._key]

    def _obs(self, store: Any) -> Frame:
        return open_frame(store, "obs", self.name)


def split_modality(path: Path) -> tuple[Path, str]:
    """Return the file of a path such as `cells.h5mu/rna`, and the modality; no modality for other paths.

    Example:
        >>> split_modality(Path("cells.h5ad"))
        (PosixPath('cells.h5ad'), '')
    """
    for file in path.parents:
        if file.suffix == ".h5mu" and file.is_file():
            return file, path.relative_to(file).as_posix().removeprefix("mod/")
    return path, ""


def stored_matrices(store: Any) -> dict[str, str]:
    """Return the matrices of a file by their names (`X`, `raw.X`, layers) and where they lie."""
    # anndata before 0.7 wrote raw beside everything else, with a dot.
    places = (("X", "X"), ("raw.X", "raw/X"), ("raw.X", "raw.X"))
    keys = {name: key for name, key in places if key in store and store[key].attrs.get("encoding-type") != "null"}
    # X is X, also where a layer has that name.
    return keys | {name: f"layers/{name}" for name in store.get("layers", ()) if name not in ("X", "raw.X")}
