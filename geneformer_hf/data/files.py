"""Which files a user means, and what is in them.

Apart from the builder on purpose: datasets replaces `Path`, `open` and `glob` in the module of a builder, to stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CellFileError
from ..input_files import require_regular
from .anndata_files import split_modality
from .scdl import is_scdl_archive
from .stores import is_zarr
from .tenx import is_tenx_folder, is_tenx_matrix, parts_of_sample

KINDS = (".h5ad", ".zarr", ".loom", ".h5", ".h5mu")
KINDS_DESCRIBED = ".h5ad, .zarr, .loom, 10x .h5, .h5mu, 10x folder or scDL archive"


def find_files(files: Any) -> list[Path]:
    """Return the paths a user means: one file, several in their order, a glob or a folder sorted by name.

    Raises:
        CellFileError: if nothing is found, a file is named twice, or a folder holds files of several kinds.
    """
    paths: list[Path] = []
    for item in [files] if isinstance(files, (str, Path)) else files:
        path = Path(item)
        require_regular(path)
        if path.is_dir() and path.suffix != ".zarr" and not is_cells_folder(path):
            found = _in_folder(path)
        elif not path.exists() and any(c in str(item) for c in "*?["):
            found = [Path(p) for p in sorted(glob(str(item), recursive=True))]  # noqa: PTH207 - Path.glob takes no absolute patterns
        elif path.exists() or split_modality(path)[1]:
            found = [path]
        else:
            msg = f"{item} does not exist; expected a file of cells ({KINDS_DESCRIBED}), a glob or a folder."
            raise CellFileError(msg)
        if not found:
            msg = f"{item}: no file of cells there (no .h5ad file, nor {', '.join(KINDS[1:])} or 10x folder)."
            raise CellFileError(msg)
        paths += found
    if not paths:
        msg = "No file was given."
        raise CellFileError(msg)
    for path in paths:
        require_regular(path)
    real = [p.resolve() for p in paths]
    twice = sorted({str(p) for p, target in zip(paths, real, strict=True) if real.count(target) > 1}) if len(set(real)) < len(real) else []
    if twice:
        msg = f"Named more than once: {', '.join(twice)}. Each file's cells would be there twice."
        raise CellFileError(msg)
    return paths


def is_cells_folder(path: Path) -> bool:
    """Return True for a folder that is itself a file of cells: a zarr store, a 10x folder or an scDL archive."""
    return path.is_dir() and (is_zarr(path) or is_tenx_folder(path) or is_scdl_archive(path))


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of cells in a folder, sorted by name."""
    found = sorted(p for p in folder.iterdir() if p.suffix in KINDS or is_cells_folder(p) or is_tenx_matrix(p))
    kinds = {kind: sum(_kind_of(p) == kind for p in found) for kind in sorted({_kind_of(p) for p in found})}
    if len(kinds) > 1:
        counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        msg = f"{folder} holds files of several kinds ({counted}), so the same cells may be there more than once. Name the files, or use a glob such as '{folder}/*{found[0].suffix}'."
        raise CellFileError(msg)
    return found


def _kind_of(path: Path) -> str:
    return path.suffix if path.suffix in KINDS else "scDL archive" if is_scdl_archive(path) else "10x folder"


def content_hash(path: str | Path) -> str:
    """Return the xxh3 hash of the bytes of a file, or of all files of a folder and their names.

    Raises:
        CellFileError: if something cannot be read.
    """
    path, modality = split_modality(Path(path))
    if path.name.startswith("matrix.mtx"):
        path = path.parent
    digest = xxhash.xxh3_128(modality.encode())
    for part in _parts_of(path):
        if part != path:
            digest.update(part.relative_to(path if path.is_dir() else path.parent).as_posix().encode() + b"\0")
        try:
            with part.open("rb") as file:
                while chunk := file.read(16 << 20):
                    digest.update(chunk)
        except OSError as error:
            msg = f"{part} cannot be read: {error.strerror or error}."
            raise CellFileError(msg) from error
    return digest.hexdigest()


def _parts_of(path: Path) -> Sequence[Path]:
    if is_tenx_matrix(path):
        return parts_of_sample(path)
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
