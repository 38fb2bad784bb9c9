"""`geneformer-hf embed`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CellFileError, ColumnNotFoundError, OutputError
from .command import KINDS, Command, add_computing, add_overwrite, add_reading, add_seed, describe_size


class Embed(Command):
    """Embed cells (or genes) with any Geneformer checkpoint.

    Into an .h5ad: a copy of the input with obsm["X_geneformer"] (with --genes: varm["X_geneformer"]); everything else in the
    file stays as it is. Into a .parquet: cell_id and embedding (with --genes: ensembl_id, n_cells, embedding).
    """

    name = "embed"
    help = "cells -> embeddings in .h5ad or .parquet, with pictures"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("input", type=Path, help=f"raw counts ({KINDS}), or folder of a tokenized dataset")
        parser.add_argument("--model", required=True, help="checkpoint: folder or Hub id")
        parser.add_argument("--output", required=True, type=Path, help="new .h5ad (a copy of the input; of other kinds counts, obs and genes) or .parquet file")
        parser.add_argument("--pooling", choices=["cls", "mean"], help="default: cls where the vocabulary has it, else mean")
        parser.add_argument("--layer", type=int, default=-2, help="index into hidden_states; -1 the last layer (default: -2, the second to last)")
        parser.add_argument(
            "--genes",
            nargs="?",
            const="mean",
            choices=["mean", "contextual"],
            help="embed genes instead: mean over the cells that express each, or contextual, every gene in every cell (.parquet only)",
        )
        parser.add_argument(
            "--plot", nargs="+", metavar="COL", default=[], help="draw a UMAP and a heat map coloured by these columns of obs, beside the output"
        )
        add_reading(parser)
        add_computing(parser)
        add_seed(parser, "the UMAP")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..analysis.cells import SourceCells
        from ..analysis.embeddings import Embedder
        from ..data.writing import add_obs_to_file, note_in_file
        from ..outputs import new_file, put, require_apart, require_free
        from ..reports.plots import require_plots

        self._check(args)
        if args.plot:
            require_plots(umap=True)
        require_apart(args.output, [args.input, args.model, args.base])
        require_free(args.output, overwrite=args.overwrite)
        names = _file_names(args.plot)
        for name in names.values():
            for kind in ("umap", "heatmap"):
                require_free(args.output.with_name(f"{args.output.stem}_{kind}_{name}.png"), overwrite=args.overwrite)
        runner = Embedder(
            args.model,
            layer=args.layer,
            pooling=args.pooling or ("mean" if args.genes else None),
            batch_size=args.batch_size,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            base=args.base,
            allow_missing_weights=args.allow_missing_weights,
        )
        cells = runner.open(args.input, gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome)
        columns = {column: cells.column(column) for column in args.plot}
        if not cells.n_cells:
            msg = f"{args.input} holds no cells."
            raise CellFileError(msg)
        if isinstance(cells, SourceCells):
            print_source(args.input, args.output, cells, args.genes)
        with new_file(args.output, overwrite=args.overwrite) as partial:
            written: list[Path] = []
            failure: Exception | None = None
            if args.genes:
                self._genes(args, runner, cells, partial)
            else:
                embeddings = self._cells(args, runner, cells, partial)
                try:
                    written = self._plot(args, embeddings, columns, partial) if columns else []
                except Exception as error:  # noqa: BLE001 - plotting libraries raise anything; the embeddings are written, and the error is reported below
                    failure = error
            if not args.genes and partial.suffix == ".h5ad" and isinstance(cells, SourceCells) and cells.source.genome_fractions is not None:
                add_obs_to_file(partial, {"genome_fraction": cells.source.genome_fractions})
            note_in_file(partial, "X_geneformer", record_of(args, runner))
            for path in written:
                put(path, args.output.with_name(path.name), overwrite=args.overwrite)
        what = "genes" if args.genes else "cells"
        print(
            f"Embeddings of {what} (layer {args.layer}, {'every gene in its cell' if args.genes == 'contextual' else runner.pooling if not args.genes else 'mean per gene'}, {runner.config.hidden_size} dimensions) written to {args.output} ({describe_size(args.output)})."
        )
        if failure is not None:
            msg = f"{args.output} is complete, but the plots could not be drawn: {type(failure).__name__}: {failure}. Draw them with scanpy from obsm['X_geneformer']."
            raise OutputError(msg) from failure
        for path in written:
            print(f"Picture: {args.output.with_name(path.name)}")
        return 0

    def _check(self, args: Namespace) -> None:
        if args.output.suffix not in (".h5ad", ".parquet"):
            msg = f"--output {args.output}: expected a name that ends in .h5ad or .parquet."
            raise CellFileError(msg)
        if args.output.suffix == ".h5ad" and (args.input / "dataset_info.json").is_file():
            msg = f"{args.input} is a dataset, which has no .h5ad to add to. Write to a .parquet file."
            raise CellFileError(msg)
        if args.genes == "contextual" and args.output.suffix != ".parquet":
            msg = "--genes contextual has one row per gene and cell, which only a .parquet file takes."
            raise CellFileError(msg)
        if args.genes and args.plot:
            msg = "--plot draws cells by a column of obs; leave out --genes or --plot."
            raise ColumnNotFoundError(msg)

    def _cells(self, args: Namespace, runner: Any, cells: Any, partial: Path) -> Any:
        """Write as the embeddings come; hold them all only to draw them."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ..data.writing import copy_as_h5ad, new_array

        size = runner.config.hidden_size
        metadata = {"geneformer": json.dumps(record_of(args, runner))}
        kept = np.empty((cells.n_cells if args.plot else 0, size), dtype=np.float32)
        with ExitStack() as stack:
            if partial.suffix == ".parquet":
                schema = pa.schema([("cell_id", pa.string()), ("embedding", pa.list_(pa.float32(), size))], metadata)
                writer = stack.enter_context(pq.ParquetWriter(partial, schema))
            else:
                copy_as_h5ad(cells.source, partial)
                obsm = stack.enter_context(new_array(partial, "obsm", "X_geneformer", (cells.n_cells, size)))
            n_embedded = 0
            for chunk, vectors in runner.iter_cells(cells):
                n_embedded += int((~np.isnan(vectors[:, 0])).sum())
                rows = slice(chunk.start, chunk.start + len(vectors))
                if partial.suffix == ".parquet":
                    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), size)
                    writer.write_table(pa.table([pa.array(chunk.cell_ids, pa.string()), lists], schema=schema))
                else:
                    obsm[rows] = vectors
                if args.plot:
                    kept[rows] = vectors
            if not n_embedded:
                msg = f"{args.input}: none of its {cells.n_cells:,} cells holds a gene of the model's vocabulary, so there is nothing to embed."
                raise CellFileError(msg)
        return kept

    def _genes(self, args: Namespace, runner: Any, cells: Any, partial: Path) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ..analysis.embeddings import embed_genes, iter_gene_embeddings
        from ..data.writing import can_be_copied, copy_as_h5ad, new_array

        options = {
            "layer": args.layer,
            "batch_size": args.batch_size,
            "device": args.device,
            "dtype": args.dtype,
            "gene_ids": args.gene_ids,
            "counts_layer": args.counts_layer,
            "genome": args.genome,
            "tokenizer": runner.tokenizer(),
        }
        metadata = {"geneformer": json.dumps(record_of(args, runner))}
        if args.genes == "contextual":
            size = runner.config.hidden_size
            schema = pa.schema(
                [("cell_id", pa.string()), ("ensembl_id", pa.string()), ("rank", pa.int32()), ("embedding", pa.list_(pa.float32(), size))], metadata
            )
            with pq.ParquetWriter(partial, schema) as writer:
                for batch in iter_gene_embeddings(runner.model, args.input, **options):
                    writer.write_batch(batch)
            return
        genes = embed_genes(runner.model, args.input, **options)
        if args.output.suffix == ".parquet":
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(genes.vectors.ravel()), genes.vectors.shape[1])
            pq.write_table(pa.table({"ensembl_id": genes.ensembl_ids, "n_cells": genes.n_cells, "embedding": vectors}, metadata=metadata), partial)
            return
        ids = runner.gene_table(cells).ensembl_of_tokens(cells.genes.token_of_column)
        vectors = genes.for_genes([ensembl_id or "" for ensembl_id in ids])
        n_without = int(np.isnan(vectors[:, 0]).sum())
        if n_without:
            print(f"{n_without:,} of {len(vectors):,} genes are outside the vocabulary or in no cell's tokens; their rows of varm are NaN.")
        source, place = cells.source, "varm"
        copy_as_h5ad(source, partial)
        if can_be_copied(source):
            place = "raw/varm" if source.counts == "raw.X" else "varm"
            if source.gene_columns is not None:
                # Antibodies and the like have rows in varm as well.
                vectors, of_genes = np.full((source.n_columns, vectors.shape[1]), np.nan, dtype=np.float32), vectors
                vectors[source.gene_columns] = of_genes
        with new_array(partial, place, "X_geneformer", vectors.shape) as varm:
            varm[:] = vectors

    def _plot(self, args: Namespace, embeddings: Any, columns: dict[str, list[Any]], partial: Path) -> list[Path]:
        from ..data.writing import new_array
        from ..reports.plots import plot_heatmap, plot_umap, umap_coordinates

        coordinates = umap_coordinates(embeddings, seed=args.seed)
        written, names = [], _file_names(args.plot)
        for column, values in columns.items():
            stem = partial.with_name(f"{args.output.stem}_KIND_{names[column]}.png")
            for kind, draw, data in (("umap", plot_umap, coordinates), ("heatmap", plot_heatmap, embeddings)):
                path = stem.with_name(stem.name.replace("_KIND_", f"_{kind}_"))
                draw(data, values, path, title=f"Geneformer embeddings of {len(values):,} cells by {column}", name=column)
                written.append(path)
        if partial.suffix == ".h5ad":
            with new_array(partial, "obsm", "X_geneformer_umap", coordinates.shape) as obsm:
                obsm[:] = coordinates
        return written


def print_source(path: Path, output: Path, cells: Any, genes: str | None) -> None:
    """Print what was found in a file, and what a user may not expect to happen with it."""
    import numpy as np

    from ..data.writing import can_be_copied

    source = cells.source
    print(f"{path}: {cells.n_cells:,} cells, counts in {source.counts_described}; {cells.genes.report.describe()}.")
    if source.passing is not None and not source.passing.all():
        print(f"{int(np.sum(~source.passing)):,} cells have filter_pass 0; they are embedded like the others.")
    if output.suffix == ".h5ad" and not can_be_copied(source):
        print(f"{output} will hold the counts, obs and genes of {path}, and nothing else of it.")
    place = "varm" if genes else "obsm"
    if "X_geneformer" in source.keys_of(place):
        print(f'{place}["X_geneformer"] of the input is replaced in the output.')


def record_of(args: Namespace, runner: Any) -> dict[str, Any]:
    """Return how the embeddings were made, to keep beside them."""
    return {
        "model": str(args.model),
        "layer": args.layer,
        "pooling": runner.pooling if not args.genes else args.genes,
        "dtype": args.dtype or "fp32",
        "gene_table": runner.config.vocabulary_fingerprint or "unknown",
        "geneformer_hf": __version__,
    }


def _file_names(columns: Sequence[str]) -> dict[str, str]:
    """Return columns' names as parts of file names, numbered where two would be one.

    Example:
        >>> _file_names(["cell type", "cell_type", "batch"])
        {'cell type': 'cell_type', 'cell_type': 'cell_type_2', 'batch': 'batch'}
    """
    names: dict[str, str] = {}
    for column in columns:
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in column)
        taken = {name.lower() for name in names.values()}
        names[column] = next(name for name in (plain, *(f"{plain}_{i}" for i in range(2, len(columns) + 2))) if name.lower() not in taken)
    return names
