"""`geneformer-hf evaluate`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .command import KINDS, Command, add_computing, add_overwrite, add_reading, add_seed, positive


class Evaluate(Command):
    """Judge checkpoints on labelled cells without any training, beside an untrained model and expression itself.

    Writes report.html (one page with all pictures), evaluation.json, evaluation.csv and pictures/ into a new folder.
    """

    name = "evaluate"
    help = "how good a checkpoint's embeddings are on your cells, beside baselines: one report"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("input", type=Path, help=f"labelled raw counts ({KINDS}), or folder of a tokenized dataset")
        parser.add_argument(
            "--model", nargs="+", default=[], metavar="MODEL", help="checkpoints: folders or Hub ids, or NAME=FOLDER (none: --obsm and baselines alone)"
        )
        parser.add_argument("--labels", required=True, metavar="COL", help="column of obs with cell types")
        parser.add_argument("--batch", metavar="COL", help="column of obs with batches (default: no figures of integration)")
        parser.add_argument(
            "--held-out", metavar="COL", help="column whose values are kept apart in label transfer, such as donors (default: the batch, else random parts)"
        )
        parser.add_argument("--obsm", nargs="+", default=[], metavar="KEY", help="embeddings of other tools to judge as well, by their keys in obsm")
        parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
        parser.add_argument("--genes", action="store_true", help="also look at genes: context, modules, hidden genes, ranks")
        parser.add_argument(
            "--gene-classes",
            type=Path,
            metavar="FILE",
            help="--genes: classes of genes, as JSON of class to genes, or a table (default: mitochondrial, ribosomal)",
        )
        parser.add_argument("--no-baselines", action="store_true", help="leave out the untrained model and expression")
        parser.add_argument("--no-umap", action="store_true", help="draw no UMAPs")
        add_judging(parser)
        add_reading(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..analysis.evaluation import evaluate_cells
        from ..analysis.evaluation_report import write_evaluation
        from ..data.labels import read_gene_classes
        from ..errors import SettingError
        from ..outputs import new_folder, require_apart, require_free
        from ..reports.plots import require_plots

        require_plots(umap=not args.no_umap)
        require_apart(args.output, [args.input, args.gene_classes, *models_of(args.model).values()])
        require_free(args.output, overwrite=args.overwrite, made_by="evaluate")
        if args.gene_classes is not None and not args.genes:
            msg = "--gene-classes is of use with --genes. Add it, or leave out the classes."
            raise SettingError(msg)
        classes = read_gene_classes(args.gene_classes) if args.gene_classes is not None else None
        models = models_of(args.model)
        found = evaluate_cells(
            models,
            args.input,
            labels=args.labels,
            batch=args.batch,
            held_out=args.held_out,
            obsm=args.obsm,
            untrained=not args.no_baselines,
            baselines=not args.no_baselines,
            n_folds=args.folds,
            gene_ids=args.gene_ids,
            counts_layer=args.counts_layer,
            genome=args.genome,
            seed=args.seed,
            **embedding_options(args),
        )
        settings = {"input": args.input.name, "models": {name: str(model) for name, model in models.items()}, "labels": args.labels, "batch": args.batch,
                    "held_out": found.held_out, "layer": args.layer, "pooling": args.pooling or "default", "folds": args.folds, "seed": args.seed}  # fmt: skip
        with new_folder(args.output, made_by="evaluate", overwrite=args.overwrite) as partial:
            further = self._genes(args, models, classes, partial) if args.genes else []
            write_evaluation(
                found, partial, title=f"Embeddings of {args.input.name}", settings=settings, umaps=not args.no_umap, seed=args.seed, further=further
            )
        print_table(found.table)
        print(found.verdict())
        for note in found.notes:
            print(note)
        print(f"Report, figures and pictures: {args.output}. Look at {args.output / 'report.html'}")
        return 0

    def _genes(self, args: Namespace, models: dict[str, Any], classes: dict[str, list[str]] | None, folder: Path) -> list[Any]:
        """Write what the models make of genes, and return the sections of the page."""
        from ..analysis.evaluation_report import PICTURES
        from ..analysis.gene_report import gene_section
        from ..reports.figures import write_figures

        (folder / PICTURES).mkdir()
        sections, figures = [], {}
        for name, model in models.items():
            section, figures[name] = gene_section(
                name, model, args.input, folder / PICTURES, labels=args.labels, classes=classes, seed=args.seed,
                gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome, **embedding_options(args),
            )  # fmt: skip
            sections.append(section)
        write_figures(figures, folder / "genes.json")
        return sections


def add_judging(parser: ArgumentParser) -> None:
    """Declare how models embed and are judged."""
    parser.add_argument("--folds", type=positive, default=5, metavar="N", help="of label transfer (default: 5; each donor or batch where there are no more)")
    parser.add_argument("--pooling", choices=["cls", "mean"], help="default: cls where the vocabulary has it, else mean")
    parser.add_argument("--layer", type=int, default=-2, help="index into hidden_states; -1 the last layer (default: -2, the second to last)")
    add_computing(parser, several=True)
    add_seed(parser, "clusters, folds, pictures and the untrained model")


def embedding_options(args: Namespace) -> dict[str, Any]:
    """Return how models embed, of what `add_judging` declared."""
    return {name: getattr(args, name) for name in ("layer", "pooling", "batch_size", "device", "dtype", "quantization", "allow_missing_weights")}


def models_of(words: list[str]) -> dict[str, Any]:
    """Return checkpoints by name: the part before "=", or the end of the folder."""
    from ..analysis.representations import named_models
    from ..errors import SettingError

    named = dict(word.split("=", 1) for word in words if "=" in word and not Path(word).exists())
    plain = [word for word in words if "=" not in word or Path(word).exists()]
    found = named_models(plain) if plain else {}
    if len(named) + len(found) < len(words) or set(named) & set(found):
        msg = f"two models have one name: {' '.join(words)}. Give each another, as NAME=FOLDER."
        raise SettingError(msg)
    return found | named


def print_table(table: Any) -> None:
    """Print the figures that sum up the others."""
    columns = {"avg_bio": "avg bio", "avg_batch": "avg batch", "overall": "overall", "knn_macro_f1": "kNN F1", "probe_macro_f1": "probe F1"}
    known = [name for name in columns if name in table]
    width = max(len(name) for name in table["name"]) + 2
    print(f"{'':{width}}{''.join(f'{columns[name]:>11}' for name in known)}")
    for row in table.to_dict("records"):
        print(f"{row['name']:{width}}{''.join(f'{row[name]:11.3f}' for name in known)}")
