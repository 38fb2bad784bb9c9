"""Screening: estimates of every gene against the exact scan of the same engine, in one run; with a model and cells also how good they are.

    python benchmarks/bench_screen.py [--genes 1200 2000] [--cells 4] [--preset gf-6L-30M-i2048] [--device cpu]
    python benchmarks/bench_screen.py --model FOLDER --input cells.h5ad --state-column condition [--judged 50]

Speed: generated cells, random weights, two readouts (shift towards a state by `mean` in V1; similarity by `cls`, the same shape with V2's vocabulary). The exact
scan is run on the first 96 genes of each cell and counted up to all; estimates, and the 50 best genes, are run as they are; of two times the shorter counts.
Quality: all genes of the judged cells are run, and their ranks compared.
"""

from __future__ import annotations

import argparse
import json
import time

import datasets
import numpy as np
import torch
from bench_perturb import cell_of, config_of, state_of

from geneformer_hf import GeneformerForMaskedLM, InSilicoPerturber, Perturbation, StateShift, StateVectors, load_cells, load_model
from geneformer_hf.analysis.perturbations import Change
from geneformer_hf.analysis.screening import CellScreener, frozen, screening_quality
from geneformer_hf.device import resolve_device
from geneformer_hf.models.loading import fingerprint_of, tokenizer_of

ESTIMATE_BAR, SCREEN_BAR, RECALL_BAR, TOP, SCANNED, TIMES = 100, 0.8, 0.8, 50, 96, 2


def timed(work) -> float:
    """Return the shortest of a few times, in seconds: others use the machine as well."""
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        for _ in work():
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def speed_of(args: argparse.Namespace, readout: str, n_genes: int) -> None:
    """Time the exact scan, the estimates, and the estimates with the best genes run."""
    config, device = config_of(argparse.Namespace(preset=args.preset, readout=readout)), resolve_device(args.device)
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).eval().to(device)
    vectors = StateVectors({name: state_of(config) for name in "ab"}, fingerprint_of(model), config.num_hidden_layers - 1, "mean")
    given = {"states": StateShift(column="state", start="a", goal="b"), "vectors": vectors} if readout == "state" else {}
    perturber = InSilicoPerturber(model, pooling="cls" if readout == "cls" else "mean", device=device, progress=False, **given)
    if given:
        perturber.reader = perturber._reader(vectors.only(("a", "b")))
    tokens = perturber.open(datasets.Dataset.from_dict({"input_ids": [cell_of(config, n_genes)] * args.cells}))
    wholes = list(perturber._wholes(tokens, np.arange(args.cells)))
    screen = Perturbation.screen("delete", top=TOP, judged=0, anchors=args.anchors)
    state = perturber.reader.states_se[1] if given else None
    screener = CellScreener(model, screen, n_layers=perturber.n_layers, pooling=perturber.pooling, target="b" if given else "", state_e=state)
    perturber.changes_of = lambda wanted: [Change("delete", (int(token),)) for token in wholes[0].genes[:SCANNED]]

    def estimates():
        with perturber.encoder.ready(), frozen(model):
            yield from perturber.encoder.beside(lambda cell: screener.estimate(cell.tokens, cell.first_gene, cell.n_genes), wholes)

    list(estimates())
    exact = timed(lambda: perturber.iter_cells(tokens, [])) * n_genes / SCANNED
    estimated, screened = timed(estimates), timed(lambda: perturber.iter_cells(tokens, screen))
    print(
        f"{readout:6} {n_genes:5,} genes, {args.cells} cells: all genes {exact:7.1f} s; estimates {estimated:6.2f} s, {exact / estimated:4.0f} times; "
        f"with the exact top {TOP} {screened:6.2f} s, {exact / screened:4.1f} times, of G/53 {exact / screened / (n_genes / 53):.2f}",
        flush=True,
    )
    for claim, ratio, bar in (
        (f"estimates against the exact scan, {readout}, {n_genes} genes", exact / estimated, ESTIMATE_BAR),
        (f"screening with exact top {TOP} against the exact scan, {readout}, {n_genes} genes", exact / screened, SCREEN_BAR * n_genes / 53),
    ):
        print(json.dumps({"claim": claim, "ratio": ratio, "bar": bar, "holds": ratio >= bar}))


def quality(args: argparse.Namespace) -> None:
    model = load_model(args.model)
    tokenizer = tokenizer_of(model)
    cells = load_cells(args.input, tokenizer=tokenizer)
    lengths = np.array([len(ids) for ids in cells["input_ids"][:]])
    chosen = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(lengths >= 2 * TOP))[: args.judged])
    labels = [str(value) for value in labels_of(cells, args.state_column)]
    start, goal = sorted(set(labels), key=labels.count, reverse=True)[:2]
    found = []
    for pooling in ("cls", "mean") if model.config.cls_token_id is not None else ("mean",):
        vectors = StateVectors.of(
            model, cells, args.state_column, n_layers=model.config.num_hidden_layers - 1, pooling=pooling, tokenizer=tokenizer, progress=False
        )
        for kind in ("delete", "overexpress"):
            for towards in (None, goal):
                options = {} if towards is None else {"states": StateShift(column="state", start=start, goal=goal), "vectors": vectors}
                # Every judged cell is looked at, whichever its state: one more in the goal, so that there is a cell in each.
                some = cells.select([*chosen, int(chosen[0])]).select_columns(["input_ids"]).add_column("state", [start] * len(chosen) + [goal])
                some = some if towards else some.select(range(len(chosen)))
                perturber = InSilicoPerturber(model, tokenizer=tokenizer, pooling=pooling, progress=False, **options)
                judged = screening_quality(perturber.run(some, Perturbation.screen(kind, top=TOP, judged=len(chosen), anchors=args.anchors)), top=TOP)
                found.append(judged.recall)
                print(f"{pooling:4} {kind:11} {'cell' if towards is None else 'state':5}: {judged.describe()}", flush=True)
    recall = float(np.mean(found))
    print(json.dumps({"claim": f"recall of the exact top {TOP}, mean over readouts", "ratio": recall, "bar": RECALL_BAR, "holds": recall >= RECALL_BAR}))


def labels_of(cells: datasets.Dataset, name: str) -> list:
    feature = cells.features[name]
    return [feature.int2str(v) if hasattr(feature, "int2str") else v for v in cells[name][:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="+", default=[1200, 2000])
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--preset", default="gf-6L-30M-i2048")
    parser.add_argument("--device")
    parser.add_argument("--model")
    parser.add_argument("--input")
    parser.add_argument("--state-column")
    parser.add_argument("--judged", type=int, default=50)
    parser.add_argument("--anchors", type=int, default=4)
    args = parser.parse_args()
    if args.model:
        quality(args)
        return
    for readout in ("state", "cls"):
        for n_genes in args.genes:
            speed_of(args, readout, n_genes)


if __name__ == "__main__":
    main()
