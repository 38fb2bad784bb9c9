"""`geneformer-hf benchmark`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .command import Command


class Benchmark(Command):
    """Judge checkpoints on several datasets, as `evaluate` does: one table that can be cut off, gone on with, and added to.

    The YAML file has models (a list, or names to folders), datasets (a list of path, labels, batch, held_out, name) and options (layer, pooling, n_folds, seed,
    dtype, device). The same command goes on where it stopped; with more models or datasets only what is new is computed.
    """

    name = "benchmark"
    help = "checkpoints by datasets: one resumable table with baselines"
    when_interrupted = "finished parts are kept; the same command goes on from there"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="models, datasets and options in YAML")
        parser.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="more checkpoints: folders or Hub ids, or NAME=FOLDER")
        parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the table: new, or one to go on with")
        parser.add_argument("--device", help="where to compute (default: the accelerator if there is one)")

    def run(self, args: Namespace) -> int:
        from ..analysis.benchmarking import benchmark, read_benchmark
        from ..analysis.representations import named_models
        from .evaluate import models_of, print_table

        settings: dict[str, Any] = read_benchmark(args.config)
        models = named_models(settings.pop("models")) | (models_of(args.model) if args.model else {})
        if args.device:
            settings["device"] = args.device
        table = benchmark(models, settings.pop("datasets"), args.output, **settings)
        for dataset, rows in table.groupby("dataset", sort=False):
            print(f"\n{dataset}: {int(rows['cells_judged'].max()):,} cells")
            print_table(rows)
        print(f"\nTable and pictures: {args.output}. Look at {args.output / 'report.html'}")
        return 0
