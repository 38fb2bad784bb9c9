"""`geneformer-hf stats`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..errors import CellFileError, SettingError
from .command import Command, add_overwrite, add_seed

MODES = ("goal_state_shift", "vs_null", "mixture_model", "aggregate_data", "aggregate_gene_shifts", "effects", "cooperativity")


class Stats(Command):
    """Statistics of perturbations: the published tables, effects within cells, pairs against the sum of their genes.

    goal_state_shift, vs_null, mixture_model, aggregate_data and aggregate_gene_shifts are the published modes. effects holds each perturbation against the others
    in the same cells, with intervals and a permuted null; cooperativity holds pairs of genes against the sum of what each does.
    """

    name = "stats"
    help = "statistics of perturbations, with pictures"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "tables",
            nargs="+",
            type=Path,
            metavar="TABLE",
            help="what perturb wrote (.parquet), or raw values of the published package (a folder or .pickle; needs --model); several are joined",
        )
        parser.add_argument("--mode", required=True, choices=MODES)
        parser.add_argument("--output", required=True, type=Path, help="new .csv file")
        parser.add_argument("--null", type=Path, metavar="TABLE", help="vs_null: the table to compare with")
        parser.add_argument("--goal", metavar="STATE", help="goal_state_shift: the goal (default: that of the run)")
        parser.add_argument("--alternatives", metavar="A,B", help="goal_state_shift: other states (default: those of the run)")
        parser.add_argument("--genes", help="aggregate_data: what was perturbed, Ensembl ids separated by commas")
        parser.add_argument(
            "--readout",
            choices=["cell", "state", "gene", "probability", "estimated_cell", "estimated_state"],
            default="cell",
            help="effects, cooperativity: which values (default: cell)",
        )
        parser.add_argument("--target", default="", help="effects, cooperativity: of which state, gene or class")
        parser.add_argument(
            "--donors",
            type=Path,
            metavar="FILE",
            help=".csv with columns cell_id and donor, or an .h5ad (with --donor-column): donors are counted in place of cells",
        )
        parser.add_argument("--donor-column", metavar="COL", help="column of the .h5ad given as --donors")
        parser.add_argument(
            "--leave-out-tested", action="store_true", help="goal_state_shift: compare a gene with all other genes (recommended; default: as published)"
        )
        parser.add_argument(
            "--order-components", action="store_true", help="mixture_model: the lower component has the impact (recommended; default: as published)"
        )
        parser.add_argument("--permutations", type=int, default=1000, metavar="N", help="effects: of the permuted null; 0 leaves it out (default: 1000)")
        add_seed(parser, "the permutations")
        parser.add_argument("--model", help="checkpoint whose gene table names the genes")
        parser.add_argument("--plot", type=Path, metavar="FILE", help="new .png: volcano, ranking or heat map, as the mode has it")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..analysis.effects import cooperativity, perturbation_effects
        from ..analysis.statistics import perturbation_statistics
        from ..models.tokenization_geneformer import GeneformerTokenizer
        from ..outputs import new_file, require_apart, require_free
        from ..reports.csv_files import write_csv
        from ..reports.plots import require_plots

        if args.plot is not None:
            require_plots()
        for path, suffix in ((args.output, ".csv"), (args.plot, ".png")):
            if path is not None:
                if path.suffix != suffix:
                    msg = f"{path}: expected a name that ends in {suffix}."
                    raise CellFileError(msg)
                require_free(path, overwrite=args.overwrite)
                require_apart(path, [*args.tables, args.null, args.donors, args.genes, args.model])
        genes = GeneformerTokenizer.from_pretrained(args.model).gene_table if args.model else None
        tables = [table_of(path, genes) for path in args.tables]
        table: Any = tables[0] if len(tables) == 1 else tables
        donors = donors_of(args.donors, args.donor_column)
        if args.mode == "effects":
            found = perturbation_effects(
                table, readout=args.readout, target=args.target, donors=donors, n_permutations=args.permutations, seed=args.seed, gene_table=genes
            )
        elif args.mode == "cooperativity":
            found = cooperativity(table, readout=args.readout, target=args.target, gene_table=genes)
        else:
            found = perturbation_statistics(
                table, args.mode, gene_table=genes, null=None if args.null is None else table_of(args.null, genes), goal=args.goal, alternatives=args.alternatives.split(",") if args.alternatives else None,
                genes=args.genes.split(",") if args.genes else None, donors=donors, leave_out_tested=args.leave_out_tested, order_components=args.order_components,
            )  # fmt: skip
        with new_file(args.output, overwrite=args.overwrite) as partial:
            write_csv(found, partial, index=False)
        print(found.head(10).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
        print(f"{len(found):,} lines written to {args.output}.")
        if args.plot is not None:
            with new_file(args.plot, overwrite=args.overwrite) as partial:
                draw(found, args.mode, partial)
            print(f"Picture: {args.plot}")
        return 0


def table_of(path: Path, genes: Any) -> Any:
    """Return a table of ours by its path, raw values of the published package as they are read.

    Raises:
        SettingError: if nothing says which genes the tokens of raw values are.
    """
    if not (path.is_dir() or path.suffix == ".pickle"):
        return path
    if genes is None:
        msg = f"{path} holds raw values of the published package, whose genes are tokens. Pass --model, a converted checkpoint of the same vocabulary."
        raise SettingError(msg)
    from ..analysis.published import read_published_perturbations

    return read_published_perturbations(path, genes)


def donors_of(path: Path | None, column: str | None) -> dict[str, str] | None:
    """Return the donor of each cell.

    Raises:
        CellFileError, SettingError
    """
    if path is None:
        return None
    if path.suffix == ".csv":
        from ..data.tables import read_text_table

        frame = read_text_table(path)
        if not {"cell_id", "donor"} <= set(frame.columns):
            msg = f"--donors {path}: expected the columns cell_id and donor, and it has {', '.join(frame.columns)}."
            raise CellFileError(msg)
        return dict(zip(frame["cell_id"], frame["donor"], strict=True))
    if column is None:
        msg = f"--donors {path}: --donor-column says which column holds the donors."
        raise SettingError(msg)
    from ..data.readers import open_cells

    source = open_cells(path)
    return dict(zip(source.cell_ids, source.read_obs([column])[column].astype(str), strict=True))


def draw(table: Any, mode: str, path: Path) -> None:
    """Draw what a mode is about."""
    from ..reports.perturbation_plots import plot_affected_genes, plot_ranking, plot_volcano

    if mode == "aggregate_gene_shifts":
        plot_affected_genes(table, path)
        return
    if mode == "aggregate_data":
        plot_ranking(table["Cosine_sim"], [""] * len(table), path, ylabel="cosine", title="all values of one perturbation")
        return
    if mode == "cooperativity":
        names = [f"{a or x} + {b or y}" for a, x, b, y in table[["Gene_name_1", "Ensembl_ID_1", "Gene_name_2", "Ensembl_ID_2"]].itertuples(index=False)]
        plot_ranking(table["excess"], names, path, ylabel="combined shift less the sum", title="pairs of genes")
        return
    names = table["Gene_name"].where(table["Gene_name"].notna(), table["Ensembl_ID"]).astype(str)
    if mode == "mixture_model":
        plot_ranking(table["Test_avg_shift"], names, path, ylabel="mean cosine to the cell before", title="perturbations by their impact")
        return
    columns = {
        "goal_state_shift": ("Shift_to_goal_end", "Goal_end_FDR", "shift towards the goal"),
        "vs_null": ("Test_vs_null_avg_shift", "Test_vs_null_FDR", "mean difference to the null"),
        "effects": (
            "effect",
            "fdr_permutation" if "fdr_permutation" in table and table["fdr_paired"].isna().all() else "fdr_paired",
            "effect, against the other perturbations of the same cells",
        ),
    }
    x, y, label = columns[mode]
    plot_volcano(
        table[x],
        table[y],
        names,
        path,
        xlabel=label,
        ylabel=f"-log10 {y}",
        title=f"{len(table):,} perturbations",
        below_resolution=table.get("below_resolution"),
    )
