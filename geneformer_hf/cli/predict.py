"""`geneformer-hf predict`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CellFileError
from .command import KINDS, Command, add_computing, add_overwrite, add_reading, describe_size


class Predict(Command):
    """Apply a fine-tuned model to cells, with or without labels.

    Into an .h5ad: a copy of the input with label, probability and entropy in obs, all probabilities and logits in obsm (a model of genes: classes
    in var); everything else in the file stays as it is. Into a .parquet or .csv: a table of the same.
    """

    name = "predict"
    help = "labels, probabilities and entropy of new cells from a fine-tuned model"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("input", type=Path, help=f"raw counts ({KINDS}), or folder of a tokenized dataset")
        parser.add_argument("--model", required=True, help="fine-tuned model or adapter: folder or Hub id")
        parser.add_argument("--output", required=True, type=Path, help="new .h5ad (a copy of the input), .parquet or .csv file")
        add_reading(parser)
        add_computing(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..analysis.predictions import Predictor
        from ..outputs import new_file, require_apart, require_free

        if args.output.suffix not in (".h5ad", ".parquet", ".csv"):
            msg = f"--output {args.output}: expected a name that ends in .h5ad, .parquet or .csv."
            raise CellFileError(msg)
        if args.output.suffix == ".h5ad" and (args.input / "dataset_info.json").is_file():
            msg = f"{args.input} is a dataset, which has no .h5ad to add to. Write to a .parquet or .csv file."
            raise CellFileError(msg)
        require_apart(args.output, [args.input, args.model, args.base])
        require_free(args.output, overwrite=args.overwrite)
        runner = Predictor(
            args.model,
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            base=args.base,
            allow_missing_weights=args.allow_missing_weights,
        )
        cells = runner.open(args.input, gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome)
        if not cells.n_cells:
            msg = f"{args.input} holds no cells."
            raise CellFileError(msg)
        with new_file(args.output, overwrite=args.overwrite) as partial:
            if runner.of_genes:
                said = write_genes(runner, cells, partial)
            else:
                said = write_cells(runner, cells, partial, model=str(args.model))
        print(f"{said}\nWritten to {args.output} ({describe_size(args.output)}).")
        return 0


def write_cells(runner: Any, cells: Any, partial: Path, *, model: str) -> str:
    """Write the predictions of cells as they come, and say in words what they are."""
    import numpy as np

    columns: dict[str, list[Any]] = {}

    def remember(found: Any) -> None:
        for one in found.heads:
            for name, values in one.columns().items():
                columns.setdefault(name, []).append(values)

    replaced = _replaced(runner, cells) if partial.suffix == ".h5ad" else []
    (_into_copy if partial.suffix == ".h5ad" else _into_table)(runner, cells, partial, remember)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    if partial.suffix == ".h5ad":
        import h5py

        from ..data.writing import add_obs, note_in_file

        with h5py.File(partial, "r+") as file:
            add_obs(file, joined)
        classes = {head.column: np.array(head.names, dtype=object) for head in runner.heads}
        note_in_file(partial, "geneformer_predictions", {"classes": classes, "model": model, "geneformer_hf": __version__})
    said = [_said(head, joined, cells) for head in runner.heads]
    return "\n".join([*said, *([f"Replaced in the copy: {', '.join(replaced)}."] if replaced else [])])


def _replaced(runner: Any, cells: Any) -> list[str]:
    """Return what the input holds under the names of predictions."""
    source, found = cells.source, []
    for head in runner.heads:
        in_obsm = source.keys_of("obsm")
        found += [
            f"obs[{name!r}]" for name in source.obs_columns if name.startswith(f"{head.column}_") and name.endswith(("_predicted", "_probability", "_entropy"))
        ]
        found += [f"obsm[{key!r}]" for key in (f"{head.column}_probabilities", f"{head.column}_logits") if key in in_obsm]
    return found


def _into_copy(runner: Any, cells: Any, partial: Path, remember: Callable[[Any], None]) -> None:
    """Copy the input and fill obsm."""
    from ..data.writing import copy_as_h5ad, new_arrays

    copy_as_h5ad(cells.source, partial)
    heads = runner.heads
    shapes = {f"{head.column}_{what}": (cells.n_cells, len(head.names)) for head in heads for what in ("probabilities", "logits")}
    with new_arrays(partial, "obsm", shapes) as obsm:
        for chunk, found in _predicted(runner, cells):
            remember(found)
            for one in found.heads:
                obsm[f"{one.head.column}_probabilities"][chunk.start : chunk.start + chunk.n_cells] = one.probabilities
                obsm[f"{one.head.column}_logits"][chunk.start : chunk.start + chunk.n_cells] = one.logits


def _into_table(runner: Any, cells: Any, partial: Path, remember: Callable[[Any], None]) -> None:
    """Write a line for each cell."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    from ..reports.csv_files import without_formulas

    writer: Any = None
    for _, found in _predicted(runner, cells):
        remember(found)
        frame = found.to_frame().reset_index()
        table = pa.Table.from_pandas(frame if partial.suffix == ".parquet" else without_formulas(frame), preserve_index=False)
        # A chunk in which nothing could be predicted has no type of its own.
        fields = [pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in table.schema]
        table = table.cast(pa.schema(fields))
        if writer is None:
            kind = pq.ParquetWriter if partial.suffix == ".parquet" else pyarrow.csv.CSVWriter
            writer = kind(partial, table.schema)
        writer.write_table(table)
    writer.close()


def _predicted(runner: Any, cells: Any) -> Iterator[tuple[Any, Any]]:
    from ..analysis.predictions import CellPredictions, predictions_of

    for chunk, logits in runner.iter_logits(cells):
        yield chunk, CellPredictions(predictions_of(runner.heads, logits), chunk.cell_ids)


def _said(head: Any, columns: dict[str, Any], cells: Any) -> str:
    """Say what was predicted, and how it agrees with labels, where the input has any."""
    import numpy as np
    import pandas as pd

    from ..data.labels import class_name, describe_counts, is_missing
    from ..errors import ColumnNotFoundError
    from ..models.heads import NUMBERS

    if head.kind == NUMBERS:
        values = {column: columns[column.replace("/", "_") + "_predicted"] for column in head.names}
        means = [f"{column} {np.nanmean(found):.4g}" for column, found in values.items()]
        return f"Mean of the predicted {', '.join(means)}."
    predicted = pd.Series(columns[f"{head.column}_predicted"])
    text = f"{head.name}: {describe_counts(predicted.value_counts().to_dict()) or 'nothing, for no cell holds a gene of the vocabulary'}."
    try:
        given = cells.column(head.name)
    except ColumnNotFoundError:
        return text
    truth = [None if is_missing(v) else class_name(v) for v in given]
    known = [(t, p) for t, p in zip(truth, predicted, strict=True) if t in head.names and not is_missing(p)]
    strange = sorted({t for t in truth if t is not None and t not in head.names})
    if known:
        text += f" The input has a column {head.name}: {np.mean([t == p for t, p in known]):.1%} of {len(known):,} cells agree."
    if strange:
        n = sum(t in set(strange) for t in truth)
        text += f" {n:,} cells have a {head.name} that the model does not know: {', '.join(strange[:8])}{', …' if len(strange) > 8 else ''}."
    return text


def write_genes(runner: Any, cells: Any, partial: Path) -> str:
    """Write the classes of genes, averaged over all cells."""
    from ..data.labels import describe_counts
    from ..data.writing import add_var, copy_as_h5ad
    from ..reports.csv_files import write_csv

    found = runner.genes(cells)
    frame = found.to_frame()
    if partial.suffix == ".csv":
        write_csv(frame, partial)
    elif partial.suffix == ".parquet":
        frame.to_parquet(partial)
    else:
        columns = found.columns_for(runner.gene_table(cells).ensembl_of_tokens(cells.genes.token_of_column))
        copy_as_h5ad(cells.source, partial)
        add_var(partial, columns, cells.source)
    return f"{len(frame):,} genes: {describe_counts(frame['gene_class_predicted'].value_counts().to_dict())}."
