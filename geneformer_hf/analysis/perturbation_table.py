"""The table of a perturbation run: one value a row, written in parts as the run goes, whole at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import CellFileError, SettingError
from .perturbations import Change
from .readouts import CELL, GENE, PROBABILITY, STATE

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string()),
        pa.field("kind", pa.string()),
        # Parquet calls the items of a list so.
        pa.field("genes", pa.list_(pa.field("element", pa.string()))),
        pa.field("target", pa.string()),
        pa.field("readout", pa.string()),
        pa.field("value", pa.float32()),
        pa.field("n_genes", pa.int32()),
    ]
)
"""Columns: the cell; what was done to which genes (Ensembl ids); what was looked at (a state, an affected gene, a class; empty for the cell itself); how; what
came out; over how many genes."""
_PRECISE = SCHEMA.set(SCHEMA.get_field_index("value"), pa.field("value", pa.float64()))
ESTIMATED = "estimated_"
"""Begins the names of readouts that are estimates."""
PLAN_KEY = b"geneformer_hf.plan"


class TableBuilder:
    """Turns what the perturber found into rows.

    Args:
        names_v (array of str of shape `(vocabulary,)`): Ensembl id of each token.
        states, classes: names of the targets, in the order of the values.
    """

    def __init__(self, names_v: Sequence[str | None], *, states: Sequence[str] = (), classes: Sequence[str] = ()) -> None:
        self._names = pa.array(names_v, pa.string())
        self.states, self.classes = pa.array(states, pa.string()), pa.array(classes, pa.string())

    def table(self, cells: Iterable[Any]) -> pa.Table:
        """Return the rows of some perturbed cells, in order: of each cell estimates, the cell itself for all changes, then states or classes, then genes."""
        parts = [part for cell in cells for part in self._of_cell(cell)]
        return pa.concat_tables(parts) if parts else SCHEMA.empty_table()

    def _of_cell(self, cell: Any) -> Iterator[pa.Table]:
        if cell.estimate is not None:
            n = len(cell.estimate.changes)
            target, n_genes = pa.array([cell.estimate.target] * n, pa.string()), np.full(n, cell.n_genes - 1, dtype=np.int32)
            yield self._rows(
                cell.cell_id, cell.estimate.changes, np.arange(n), target, ESTIMATED + cell.estimate.readout, cell.estimate.values_m.astype(np.float32), n_genes
            )
        if cell.shifts:
            yield from self._of_shifts(cell)

    def _of_shifts(self, cell: Any) -> Iterator[pa.Table]:
        first = cell.shifts[0]
        changes = np.arange(len(cell.shifts))
        n_genes = np.array([shift.n_genes for shift in cell.shifts], dtype=np.int32)
        if first.cell is not None:
            values = np.array([shift.cell for shift in cell.shifts], dtype=np.float32)
            yield self._rows(cell.cell_id, cell.changes, changes, pa.array([""] * len(changes)), CELL, values, n_genes)
        for readout, targets, each in (
            (STATE, self.states, [shift.states for shift in cell.shifts]),
            (PROBABILITY, self.classes, [shift.probabilities for shift in cell.shifts]),
        ):
            if each[0] is not None:
                repeated = np.repeat(changes, len(targets))
                target = targets.take(pa.array(np.tile(np.arange(len(targets)), len(changes))))
                yield self._rows(cell.cell_id, cell.changes, repeated, target, readout, np.concatenate(each), n_genes[repeated])
        if first.genes is not None:
            sizes = [len(shift.genes) for shift in cell.shifts]
            repeated = np.repeat(changes, sizes)
            affected = np.concatenate([after.tokens[after.untouched] for after in cell.cells])
            yield self._rows(
                cell.cell_id,
                cell.changes,
                repeated,
                self._names.take(pa.array(affected)),
                GENE,
                np.concatenate([s.genes for s in cell.shifts]),
                n_genes[repeated],
            )

    def _rows(
        self, cell_id: str, changes: Sequence[Change], change_of_row: np.ndarray, target: pa.Array, readout: str, values: np.ndarray, n_genes: np.ndarray
    ) -> pa.Table:
        n = len(change_of_row)
        kinds = pa.array([change.kind for change in changes]).take(pa.array(change_of_row))
        sizes = np.array([len(change.tokens) for change in changes])
        flat = np.concatenate([np.asarray(change.tokens) for change in changes])
        starts = np.cumsum(sizes) - sizes
        offsets = np.concatenate([[0], np.cumsum(sizes[change_of_row])]).astype(np.int32)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes[change_of_row])
        genes = pa.ListArray.from_arrays(pa.array(offsets), self._names.take(pa.array(flat[np.repeat(starts[change_of_row], sizes[change_of_row]) + within])))
        return pa.table(
            [
                pa.array([cell_id] * n, pa.string()),
                kinds,
                genes,
                target,
                pa.array([readout] * n),
                pa.array(values, pa.float32()),
                pa.array(n_genes, pa.int32()),
            ],
            schema=SCHEMA,
        )


def write_part(table: pa.Table, path: Path) -> None:
    """Write rows as Parquet."""
    pq.write_table(table, path, compression="zstd")


def join_parts(parts: Sequence[Path], path: Path, identity: dict[str, Any]) -> None:
    """Write the parts one after the other into one file, which says what it was made from."""
    schema = SCHEMA.with_metadata({PLAN_KEY: json.dumps(identity, sort_keys=True).encode()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                writer.write_batch(batch)


def plan_of(path: Path) -> dict[str, Any] | None:
    """Return what a table was made from, or None if it does not say.

    Raises:
        CellFileError: if it is no Parquet file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        msg = f"{path} cannot be read as a table of perturbations ({error})."
        raise CellFileError(msg) from error
    return dict(json.loads(metadata[PLAN_KEY])) if PLAN_KEY in metadata else None


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        msg = f"{path} does not exist."
        raise CellFileError(msg)
    plan_of(path)
    file = pq.ParquetFile(path)
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        file.close()
        msg = f"{path} is no table of perturbations: it lacks the columns {', '.join(missing)}. Make one with `geneformer-hf perturb`."
        raise CellFileError(msg)
    return file


def batches_of(table: Any) -> Iterator[pa.RecordBatch]:
    """Yield the rows of perturbations, some at a time: of a table, a data frame, a file, or several of any.

    Raises:
        CellFileError: if one is no table of perturbations.
    """
    if isinstance(table, (list, tuple)):
        for one in table:
            yield from batches_of(one)
    elif isinstance(table, (str, Path)):
        with _open(Path(table)) as file:
            yield from file.iter_batches(columns=SCHEMA.names)
    else:
        names = table.column_names if isinstance(table, pa.Table) else list(table.columns)
        missing = [name for name in SCHEMA.names if name not in names]
        if missing:
            msg = f"the table lacks the columns {', '.join(missing)}; expected what InSilicoPerturber.run returns."
            raise CellFileError(msg)
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, schema=_PRECISE, preserve_index=False)
        yield from table.select(SCHEMA.names).to_batches()


def _kinds(batch: pa.RecordBatch) -> dict[tuple[str, str], None]:
    """Return the readouts and their targets, those of affected genes as one."""
    columns = {"readout": batch["readout"], "target": pc.if_else(pc.equal(batch["readout"], GENE), "", batch["target"])}
    found = pa.table(columns).group_by(list(columns), use_threads=False).aggregate([])
    return dict.fromkeys(zip(*(found[name].to_pylist() for name in columns), strict=True))


def kinds_of(table: Any) -> list[tuple[str, str]]:
    """Return the readouts and their targets in the order of their appearance, those of affected genes as one with an empty target."""
    return list({kind: None for batch in batches_of(table) for kind in _kinds(batch)})


def rows_of(table: Any, readout: str, target: str | None = None, *, chosen: bool = False) -> pd.DataFrame:
    """Return the rows of one readout (and target) of perturbations, and keep no others in memory: those of affected genes may be very many.

    Exact rows of a screening are warned of, unless the caller knows that they were `chosen`.

    Raises:
        CellFileError: if it is no table of perturbations.
        SettingError: if it has no such rows.
    """
    kept: list[pa.RecordBatch] = []
    others: dict[tuple[str, str], None] = {}
    for batch in batches_of(table):
        mine = pc.equal(batch["readout"], readout)
        if target is not None:
            mine = pc.and_(mine, pc.equal(batch["target"], target))
        kept.append(batch.filter(mine))
        others |= _kinds(batch)
    if not any(batch.num_rows for batch in kept):
        kinds = ", ".join(f"{name}{f' of {of}' if of else ''}" for name, of in others)
        msg = f"the table has no values of readout {readout!r}{f' for {target!r}' if target is not None else ''}. It has: {kinds or 'nothing'}."
        raise SettingError(msg)
    if not chosen and not readout.startswith(ESTIMATED) and any(name.startswith(ESTIMATED) for name, _ in others):
        logger.warning(
            "The table is of a screening: it has exact values of those genes alone that looked best in each cell, and a test of such a choice finds too much. "
            "Read %s%s for all genes, or run those of interest in every cell.", ESTIMATED, readout,
        )  # fmt: skip
    # Data frames may hold more digits than files.
    return pa.concat_tables([pa.Table.from_batches([batch]) for batch in kept if batch.num_rows], promote_options="permissive").to_pandas()


def states_of(table: Any) -> list[str]:
    """Return the states of a run, start and goal first, as far as its table says them."""
    if isinstance(table, (list, tuple)):
        return states_of(table[0]) if table else []
    metadata = pq.read_schema(table).metadata if isinstance(table, (str, Path)) else table.schema.metadata if isinstance(table, pa.Table) else None
    plan = json.loads(metadata[PLAN_KEY]) if metadata and PLAN_KEY in metadata else {}
    return list((plan.get("states") or {}).get("targets", []))
