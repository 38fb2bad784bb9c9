"""Which files a user means, and what is in them.

Apart from the builder on purpose: datasets replaces `Path`, `open` and `glob` in the module of a builder, to stream.
"""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CellFileError


def find_files(files: Any) -> list[Path]:
    """Return the paths a user means: one file, several in their order, a glob or a folder sorted by name.

    Raises:
        CellFileError: if nothing is found, or a file is named twice.
    """
    paths: list[Path] = []
    for item in [files] if isinstance(files, (str, Path)) else files:
        path = Path(item)
        if path.is_dir():
            found = sorted(path.glob("*.h5ad"))
        elif not path.exists() and any(c in str(item) for c in "*?["):
            found = [Path(p) for p in sorted(glob(str(item), recursive=True))]  # noqa: PTH207 - Path.glob takes no absolute patterns
        elif path.exists():
            found = [path]
        else:
            msg = f"{item} does not exist; expected an .h5ad file, a glob or a folder."
            raise CellFileError(msg)
        if not found:
            msg = f"{item}: no .h5ad file there."
            raise CellFileError(msg)
        paths += found
    if not paths:
        msg = "No file was given."
        raise CellFileError(msg)
    real = [p.resolve() for p in paths]
    twice = sorted({str(p) for p, target in zip(paths, real, strict=True) if real.count(target) > 1})
    if twice:
        msg = f"Named more than once: {', '.join(twice)}. Each file's cells would be there twice."
        raise CellFileError(msg)
    return paths


def content_hash(path: str | Path) -> str:
    """Return the xxh3 hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(16 << 20):
                digest.update(chunk)
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror or error}."
        raise CellFileError(msg) from error
    return digest.hexdigest()
