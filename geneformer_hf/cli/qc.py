"""`geneformer-hf qc`."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from ..errors import SettingError
from .command import KINDS, Command, add_overwrite, add_reading, add_seed, add_skipping, add_workers, options_of
from .medians import read_biotypes


class Qc(Command):
    """Mark the cells that pass the quality filters of the published corpora; no cell is dropped.

    The output is a copy of the input with filter_pass, filter_reason and the measures in obs; tokenize and medians leave out
    cells whose filter_pass is 0. Beside it: a summary table (_qc.csv) and a picture (_qc.png). Several inputs go into a folder.
    """

    name = "qc"
    help = "mark cells of low quality (filter_pass), with reasons, a table and a picture"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", help=f"{KINDS}; globs and folders are sorted")
        parser.add_argument(
            "--output", required=True, type=Path, help="new .h5ad file, or .parquet or .csv for a table of the cells alone; several inputs: new folder"
        )
        parser.add_argument(
            "--sd", type=float, default=3.0, metavar="X", help="counts and mitochondrial share may be this many SD from the mean of the dataset (default: 3)"
        )
        parser.add_argument("--min-genes", type=int, default=7, metavar="N", help="detected protein-coding or miRNA genes a cell needs (default: 7)")
        parser.add_argument(
            "--exclude", nargs="+", type=exclusion, default=[], metavar="COL[=VALUE,…]",
            help="columns of obs that mark cells to leave out, such as malignant or highly mutated ones, with the values that do (default values: true, 1, yes, malignant, tumor, cancer)",
        )  # fmt: skip
        parser.add_argument("--dataset", metavar="COL", help="column of obs that names the dataset of a cell (default: a file is a dataset)")
        parser.add_argument(
            "--sample", metavar="COL", help="column of obs that names the sample, within which doublets form (default: the dataset within a file)"
        )
        parser.add_argument("--no-doublets", action="store_true", help="do not score doublets (default: scrublet)")
        parser.add_argument("--max-doublet-score", type=float, metavar="X", help="highest score that passes (default: the valley scrublet finds)")
        parser.add_argument(
            "--gene-biotypes", type=Path, metavar="FILE", help="CSV with the columns ensembl_id and biotype (default: GENCODE's, for human genes)"
        )
        add_seed(parser, "the doublet scores")
        add_reading(parser)
        add_workers(parser)
        add_skipping(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..data.files import find_files
        from ..data.quality import QualityRules, assess_quality
        from ..outputs import put, require_apart, require_free, unfinished
        from ..reports.csv_files import write_csv
        from ..reports.plots import require_plots

        paths = find_files(args.files)
        require_apart(args.output, [*paths, args.gene_biotypes])
        require_plots()
        single = args.output.suffix in (".h5ad", ".parquet", ".csv")
        if single and len(paths) > 1:
            msg = f"--output {args.output}: {len(paths)} inputs need a folder to go to; give a name without .h5ad, .parquet or .csv."
            raise SettingError(msg)
        beside = [args.output.with_name(f"{args.output.stem}_qc{suffix}") for suffix in (".csv", ".png")] if single else []
        for path in beside:
            require_free(path, overwrite=args.overwrite)
            require_apart(path, [*paths, args.gene_biotypes])
        rules = QualityRules(
            args.sd, args.min_genes, tuple(args.exclude), args.dataset, args.sample, not args.no_doublets, args.max_doublet_score
        )  # fmt: skip
        with unfinished(args.output, overwrite=args.overwrite, made_by=None if single else "qc") as work:
            quality = assess_quality(
                paths,
                rules=rules,
                gene_biotypes=None if args.gene_biotypes is None else read_biotypes(args.gene_biotypes),
                seed=args.seed,
                **options_of(args),
                work=work,
            )
            whole = work.folder / args.output.name
            if single:
                self._write(quality, quality.files[0], whole, args)
                table, picture = (work.folder / path.name for path in beside)
            else:
                # An earlier run may have been stopped here, with other files.
                shutil.rmtree(whole, ignore_errors=True)
                whole.mkdir()
                for name, output in zip(quality.files, output_names(quality.files), strict=True):
                    self._write(quality, name, whole / output, args)
                table, picture = whole / "qc.csv", whole / "qc.png"
            write_csv(quality.summary, table)
            self._draw(quality, picture)
            work.put_in_place(whole)
            for path in beside:
                put(work.folder / path.name, path, overwrite=args.overwrite)
        self._print(quality, args.output, beside)
        return 0

    def _write(self, quality: Any, name: str, output: Path, args: Namespace) -> None:
        import h5py

        from ..data.readers import open_cells
        from ..data.writing import add_obs, can_be_copied, copy_as_h5ad
        from ..reports.csv_files import write_csv

        cells = quality.cells(name)
        if output.suffix == ".parquet":
            cells.to_parquet(output)
            return
        if output.suffix == ".csv":
            write_csv(cells, output)
            return
        source = open_cells(name, gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome)
        if not can_be_copied(source):
            print(f"{name} is no .h5ad: the output holds its counts, obs and genes, and nothing else of it.")
        copy_as_h5ad(source, output)
        columns = {c: cells[c].to_numpy() for c in cells if not cells[c].isna().all()}
        if "filter_pass" in source.obs_columns and "filter_reason" not in source.obs_columns:
            columns["filter_pass_before"] = source.passing
        with h5py.File(output, "r+") as file:
            add_obs(file, columns)

    def _draw(self, quality: Any, picture: Path) -> None:
        from ..reports.plots import plot_quality

        n_cells, n_passing = int(quality.summary["cells"].sum()), int(quality.summary["passing"].sum())
        frames = (quality.cells(name) for name in quality.files)
        plot_quality(frames, picture, title=f"{n_passing:,} of {n_cells:,} cells pass", bounds=quality.summary)

    def _print(self, quality: Any, output: Path, beside: list[Path]) -> None:
        from ..data.quality import REASONS

        for name, genes in quality.genes.items():
            print(f"{name}: {genes}.")
        for name, row in quality.summary.iterrows():
            found = ", ".join(f"{reason} {int(row[reason]):,}" for reason in REASONS if row[reason])
            print(f"{name}: {int(row['passing']):,} of {int(row['cells']):,} cells pass{f' (failing, some for several reasons: {found})' if found else ''}.")
        print(f"Written to {output}" + (f", with {' and '.join(str(p) for p in beside)}." if beside else ", with qc.csv and qc.png."))


def exclusion(text: str) -> tuple[str, tuple[str, ...]]:
    """Read COL or COL=VALUE,VALUE."""
    column, equals, values = text.partition("=")
    if not column or (equals and not values):
        msg = f"{text!r} is neither COL nor COL=VALUE,VALUE"
        raise ArgumentTypeError(msg)
    return column, tuple(values.split(",")) if values else ()


def output_names(files: list[str]) -> list[str]:
    """Return a name for the copy of each file: its own, or all with their numbers where names repeat in several folders."""
    stems = [Path(name).stem for name in files]
    return [f"{stem}.h5ad" if len(set(stems)) == len(stems) else f"{number:04d}-{stem}.h5ad" for number, stem in enumerate(stems)]
