"""What every command is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from ..errors import CellFileError
from ..input_files import read_text

KINDS = "files of cells (.h5ad, .zarr, .h5mu, .loom, 10x .h5 or folder, scDL archive)"


class Command(ABC):
    """One command: its name, its arguments, and what it does. Heavy imports happen inside `run`."""

    name: str
    help: str
    when_interrupted = "no output was written"
    takes_rest = False
    """Arguments it does not declare, --help among them, are its own to read: `args.rest`."""

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""

    @abstractmethod
    def run(self, args: Namespace) -> int:
        """Do it and return the exit code."""


def positive(text: str) -> int:
    """Read a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        msg = f"{text!r} is not a whole number above 0"
        raise ArgumentTypeError(msg)
    return number


def add_seed(parser: ArgumentParser, of: str) -> None:
    """Declare --seed, of what it is of."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help=f"of {of} (default: 0)")


def _seed(text: str) -> int:
    # What numpy and scikit-learn take.
    if not text.isdecimal() or int(text) >= 2**32:
        msg = f"{text!r} is not a whole number from 0 to {2**32 - 1}"
        raise ArgumentTypeError(msg)
    return int(text)


def add_reading(parser: ArgumentParser) -> None:
    """Declare how a file of cells is read."""
    parser.add_argument(
        "--counts-layer",
        metavar="NAME",
        help="layer with the raw counts, or X or raw.X; matrix.T for a transposed matrix.mtx (default: X, raw.X, layers['counts'] or layers['raw'], whichever holds raw counts)",
    )
    parser.add_argument("--gene-ids", metavar="COL", help="column of var with Ensembl ids or symbols, or 'index' (default: found by itself)")
    parser.add_argument(
        "--genome",
        metavar="NAME",
        help="genome to read of a file that mixes several, such as hg19 or human; cells with less than half of their counts in it are left without genes",
    )


def add_workers(parser: ArgumentParser) -> None:
    """Declare who does the work."""
    parser.add_argument("--num-proc", type=positive, default=1, metavar="N", help="processes; with --dask local, its workers (default: 1)")
    parser.add_argument(
        "--dask", metavar="ADDRESS|local", help="a Dask scheduler that sees the same paths, or 'local' for a cluster on this machine (default: no Dask)"
    )


def add_skipping(parser: ArgumentParser) -> None:
    """Declare --skip-bad-files."""
    parser.add_argument("--skip-bad-files", action="store_true", help="leave out files that cannot be used, and count them (default: stop at the first)")


def add_computing(parser: ArgumentParser, *, several: bool = False) -> None:
    """Declare where and how a model computes, or several do, which cannot have one base."""
    parser.add_argument("--batch-size", type=positive, metavar="N", help="most cells in one pass (default: by tokens)")
    parser.add_argument("--device", help="where to compute (default: the accelerator if there is one)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="compute in this type (default: fp32)")
    parser.add_argument(
        "--quantization",
        choices=["int8", "nf4", "none"],
        help="load the weights in 8-bit or 4-bit; none: an adapter on plain weights (default: as it was saved)",
    )
    parser.add_argument("--allow-missing-weights", action="store_true", help="draw weights that the checkpoint lacks at random (default: name them and stop)")
    if not several:
        parser.add_argument("--base", metavar="FOLDER|ID", help="for an adapter whose base has moved: where it is now")


def add_overwrite(parser: ArgumentParser) -> None:
    """Declare --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists (default: refuse)")


def options_of(args: Namespace) -> dict[str, Any]:
    """Return what `add_reading`, `add_workers` and `add_skipping` declared, as keyword arguments, with a progress bar."""
    names = ("gene_ids", "counts_layer", "genome", "num_proc", "dask", "skip_bad_files")
    return {name: getattr(args, name) for name in names} | {"progress": True}


def describe_size(path: Path) -> str:
    """Return the size of a file or folder for people."""
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    return f"{size / 1e6:,.1f} MB"


def listed_genes(text: str, option: str = "--genes") -> list[str]:
    """Return genes from a list separated by commas, or from a file with one a line.

    Raises:
        CellFileError
    """
    path = Path(text)
    # A long list is no name of a file.
    if os.path.lexists(text) and not os.path.isdir(text):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        lines = read_text(path).removeprefix("\ufeff").splitlines()
    elif path.suffix in (".txt", ".csv", ".tsv"):
        msg = f"{option} {path} does not exist."
        raise CellFileError(msg)
    else:
        lines = text.split(",")
    genes = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not genes:
        msg = f"{option} {text}: there are no genes in it."
        raise CellFileError(msg)
    return genes
