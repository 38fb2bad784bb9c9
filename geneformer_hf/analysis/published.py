"""Raw values of perturbations made with the published package, as tables of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import CellFileError
from ..genes import GeneTable
from ..pickles import read_raw_values
from .perturbation_table import SCHEMA
from .readouts import CELL, GENE, STATE

NAME = re.compile(
    r"in_silico_(?P<kind>delete|overexpress|inhibit|activate)_(?P<prefix>.*?)_?(?:dict_)?(?P<what>cell_embs|gene_embs)(?:_dict)?_(?P<rest>.*)_raw\.pickle$"
)
CELL_EMBEDDING = "cell_emb"


def read_published_perturbations(path: str | Path, gene_table: GeneTable, *, prefix: str | None = None) -> pa.Table:
    """Read raw pickles of the published `InSilicoPerturber`, through the restricted reader.

    Args:
        path (`str` or `Path`): a file, or a folder of which all files of one run are read, in the order of their names.
        gene_table (`GeneTable`): of the vocabulary the run was made with.
        prefix: output prefix of the run; needed where a folder holds several.

    Returns:
        `pa.Table` with the columns of a perturbation run. Cells are told apart as far as the files do: by the number in the name, or by their place in the list of
        values; `n_genes` is 0, as it is not known.

    Raises:
        CellFileError: if there are none, or those of several runs.
        UnsafePickleError, CheckpointError
    """
    path = Path(path)
    files = sorted(path.glob("*_raw.pickle")) if path.is_dir() else [path]
    named = [(file, found) for file in files if (found := NAME.match(file.name)) is not None]
    runs = sorted({(found["kind"], found["prefix"]) for _, found in named})
    if prefix is not None:
        named = [(file, found) for file, found in named if found["prefix"] == prefix]
    elif len(runs) > 1:
        msg = f"{path} holds raw values of several runs: {', '.join(f'{kind} {name}' for kind, name in runs)}. Pass prefix, and keep kinds in folders of their own."
        raise CellFileError(msg)
    if not named:
        msg = f"{path}: no raw values of the published package here (in_silico_KIND_PREFIX_…_raw.pickle){f' with prefix {prefix!r}' if prefix else ''}."
        raise CellFileError(msg)
    lines = [line for file, found in named for line in _lines(read_raw_values(file), found, gene_table, file)]
    return pa.Table.from_pylist(lines, SCHEMA)


def _lines(content: dict[Any, Any], name: re.Match[str], genes: GeneTable, file: Path) -> Iterator[dict[str, Any]]:
    number = re.match(r"(\d+)batch", name["rest"])
    by_state = content if all(isinstance(key, str) for key in content) else {"": content}
    for state, values in by_state.items():
        for key, listed in values.items():
            try:
                perturbed, affected = key
                tokens = [int(token) for token in perturbed] if isinstance(perturbed, (tuple, list)) else [int(perturbed)]
                of_cell = isinstance(affected, str)
                names = genes.ensembl_of_tokens([*tokens, *([] if of_cell else [int(affected)])])
            except (TypeError, ValueError) as error:
                msg = f"{file}: {key!r} is not what the published package writes, a perturbed token (or several) and what was affected."
                raise CellFileError(msg) from error
            unknown = [token for token, ensembl_id in zip([*tokens, affected], names, strict=False) if ensembl_id is None]
            if unknown:
                msg = (
                    f"{file}: token {unknown[0]} is no gene of this vocabulary of {len(genes):,}. Give the gene table of the model that the run was made with."
                )
                raise CellFileError(msg)
            readout, target = (STATE, state) if state else (CELL, "") if of_cell else (GENE, names[-1])
            for place, value in enumerate(listed):
                cell = number[1] if number is not None and len(listed) == 1 else f"{number[1]}:{place}" if number is not None else str(place)
                yield {
                    "cell_id": cell,
                    "kind": name["kind"],
                    "genes": names[: len(tokens)],
                    "target": target,
                    "readout": readout,
                    "value": float(value),
                    "n_genes": 0,
                }
