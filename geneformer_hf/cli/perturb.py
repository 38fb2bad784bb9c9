"""`geneformer-hf perturb`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..errors import CellFileError, SettingError
from .command import KINDS, Command, add_computing, add_overwrite, add_reading, describe_size, listed_genes


class Perturb(Command):
    """Delete, overexpress or shift genes in silico, and write what it does to each cell.

    The table has one value a row: cell_id, kind, genes (Ensembl ids), target (a state, an affected gene or a class), readout, value, n_genes. Stopped or killed, the
    same command goes on where it was. Several GPUs or machines: accelerate launch -m geneformer_hf perturb …
    """

    name = "perturb"
    help = "in silico perturbation: every gene, a list, pairs, the most promising; towards states; resumable"
    when_interrupted = "what is finished is kept, and the same command goes on from there"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("input", type=Path, help=f"raw counts ({KINDS}), or folder of a tokenized dataset")
        parser.add_argument("--model", required=True, help="checkpoint: folder or Hub id")
        parser.add_argument("--output", type=Path, help="new .parquet file (needed but for --plan-only)")
        parser.add_argument("--kind", required=True, choices=["delete", "overexpress", "inhibit", "activate"])
        parser.add_argument("--quartiles", type=int, choices=[1, 2, 3], help="inhibit, activate: quarters of a cell's genes to shift by (default: 1)")
        parser.add_argument("--rank", type=int, help="inhibit, activate: the rank to move to, 0 being the top")
        parser.add_argument("--genes", required=True, help="all: each gene of each cell; Ensembl ids or symbols parted by commas; or a file with one a line")
        how = parser.add_mutually_exclusive_group()
        how.add_argument("--together", action="store_true", help="change all listed genes at once (default: one by one)")
        how.add_argument("--pairs", action="store_true", help="each listed gene, and each pair of them")
        how.add_argument("--anchor", metavar="ID", help="this gene, each listed gene, and this one with each of them")
        parser.add_argument(
            "--readout", choices=["cell", "gene", "probability"], default="cell", help="what is looked at (default: cell; gene: every other gene as well)"
        )
        parser.add_argument("--pooling", choices=["cls", "mean"], help="default: cls where the vocabulary has it, else mean")
        parser.add_argument("--layer", type=int, default=-2, help="index into hidden_states; -1 the last layer (default: -2, the second to last)")
        parser.add_argument("--state-column", metavar="COL", help="column that says which state a cell is in; cells of --start are perturbed")
        parser.add_argument("--start", metavar="STATE", help="state of the cells to perturb")
        parser.add_argument("--goal", metavar="STATE", help="state whose nearness is read")
        parser.add_argument("--alternatives", metavar="A,B", help="other states whose nearness is read")
        parser.add_argument("--state-vectors", type=Path, metavar="FILE", help="mean embeddings of the states (default: computed from the input)")
        parser.add_argument("--screen", action="store_true", help="with --genes all: estimate each gene, and run the most promising ones of each cell")
        parser.add_argument("--top", type=int, metavar="K", help="--screen: genes of each cell that are run (default: 50)")
        parser.add_argument(
            "--judged", type=int, metavar="N", help="--screen: cells run in whole, to judge the estimates by (default: one in twenty, 50 at most)"
        )
        parser.add_argument("--anchors", type=int, metavar="N", help="--screen: exact passes that the estimates of a cell lean on (default: 4)")
        parser.add_argument("--plan-only", action="store_true", help="say what would be done and how long it takes, and stop")
        add_reading(parser)
        add_computing(parser)
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        import pyarrow.parquet as pq

        from ..analysis.perturbation_parts import processes
        from ..analysis.perturbing import InSilicoPerturber
        from ..analysis.screening import screening_quality
        from ..analysis.states import StateVectors
        from ..outputs import require_apart

        self._check(args)
        perturbations = perturbations_of(args)
        if args.output is not None:
            require_apart(args.output, [args.input, args.model, args.base, args.state_vectors, args.genes, args.anchor])
        perturber = InSilicoPerturber(
            args.model, readout=args.readout, pooling=args.pooling, layer=args.layer, states=states_of(args),
            vectors=None if args.state_vectors is None else StateVectors.load(args.state_vectors),
            batch_size=args.batch_size, device=args.device, dtype=args.dtype, quantization=args.quantization, base=args.base, allow_missing_weights=args.allow_missing_weights,
        )  # fmt: skip
        reading = {"gene_ids": args.gene_ids, "counts_layer": args.counts_layer, "genome": args.genome}
        first = processes().is_main_process
        if first:
            print(f"{args.input}: {perturber.plan(args.input, perturbations, **reading).describe()}.")
        if args.plan_only:
            return 0
        perturber.write(args.input, perturbations, args.output, overwrite=args.overwrite, **reading)
        if first:
            print(f"{pq.read_metadata(args.output).num_rows:,} values written to {args.output} ({describe_size(args.output)}).")
            if args.screen and (quality := screening_quality(args.output, top=perturbations.top)):
                print(f"Screening: {quality.describe()}.")
            print(f"Statistics: geneformer-hf stats {args.output} {_likely_statistics(args)} --model {args.model} --output statistics.csv")
        return 0

    def _check(self, args: Namespace) -> None:
        if args.output is None and not args.plan_only:
            msg = "--output is missing; give a new .parquet file, or --plan-only."
            raise SettingError(msg)
        if args.output is not None and args.output.suffix != ".parquet":
            msg = f"--output {args.output}: expected a name that ends in .parquet."
            raise CellFileError(msg)
        if args.genes == "all" and (args.together or args.pairs or args.anchor):
            msg = "--genes all changes each gene of a cell by itself; --together, --pairs and --anchor need a list."
            raise SettingError(msg)
        if not args.screen and any(value is not None for value in (args.top, args.judged, args.anchors)):
            msg = "--top, --judged and --anchors are settings of a screening; add --screen, or leave them out."
            raise SettingError(msg)
        if args.screen and args.genes != "all":
            msg = "--screen looks for genes among all those of a cell; it needs --genes all."
            raise SettingError(msg)
        if args.screen and (args.rank is not None or args.quartiles is not None):
            msg = "--rank and --quartiles shift genes, and --screen estimates deleting and overexpressing them. Leave them out, or --screen."
            raise SettingError(msg)


def perturbations_of(args: Namespace) -> Any:
    """Return what the command line asks for."""
    from ..analysis.perturbations import Perturbation

    shift = {"quartiles": args.quartiles, "rank": args.rank}
    if args.screen:
        given = {name: value for name in ("top", "judged", "anchors") if (value := getattr(args, name)) is not None}
        return Perturbation.screen(args.kind, **given)
    if args.genes == "all":
        return Perturbation.every(args.kind, **shift)
    genes = listed_genes(args.genes)
    if args.together:
        return [Perturbation(kind=args.kind, genes=tuple(genes), **shift)]
    if args.pairs:
        return Perturbation.pairs(args.kind, genes, **shift)
    if args.anchor:
        return Perturbation.with_anchor(args.kind, args.anchor, genes, **shift)
    return Perturbation.each(args.kind, genes, **shift)


def states_of(args: Namespace) -> Any:
    """Return the states the command line asks for, or None.

    Raises:
        SettingError: if some of them are missing.
    """
    from ..analysis.states import StateShift

    given = {"--state-column": args.state_column, "--start": args.start, "--goal": args.goal}
    if not any(given.values()) and not args.alternatives:
        return None
    missing = [name for name, value in given.items() if not value]
    if missing:
        msg = f"{', '.join(missing)} missing: moving cells to a state needs --state-column, --start and --goal."
        raise SettingError(msg)
    alternatives = tuple(name.strip() for name in (args.alternatives or "").split(",") if name.strip())
    return StateShift(column=args.state_column, start=args.start, goal=args.goal, alternatives=alternatives)


def _likely_statistics(args: Namespace) -> str:
    if args.screen:
        return "--mode effects --readout " + (f"estimated_state --target {args.goal}" if args.goal else "estimated_cell")
    if args.pairs or args.anchor:
        return "--mode cooperativity"
    if args.readout == "gene":
        return "--mode aggregate_gene_shifts"
    return "--mode goal_state_shift" if args.goal else "--mode effects"
