"""Deleting genes one by one: this package against the published procedure, written naively step by step, in one run.

    python benchmarks/bench_perturb.py [--genes 250 800 1200] [--variants 192] [--preset gf-6L-30M-i2048] [--device cpu] [--dtype bf16]

The published procedure, for each cell: batches of 32 variants as lists, padded with a mask; `BertForMaskedLM` with its default attention and all hidden states;
the original vectors gathered and repeated for each variant; cosine at each position; results appended to dictionaries. Three readouts: similarity of the cell
to itself by `mean` (V1), shift towards a state by `mean` (V1), similarity by `cls` (the same shape, V2 vocabulary). Cells are generated and weights random; of each cell the first
`--variants` genes are deleted (all with 0), by both ways. Each way runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM
from transformers.models.bert import BertConfig

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, InSilicoPerturber, StateShift, StateVectors
from geneformer_hf.analysis.perturbations import Change
from geneformer_hf.device import resolve_device
from geneformer_hf.models.loading import fingerprint_of

BARS = {"mean": 3.5, "state": 3.5, "cls": 4.5}
LARGEST_DIFFERENCE, LARGEST_SHARE_OF_MEMORY, BATCH = 2e-5, 0.25, 32


def config_of(args: argparse.Namespace) -> GeneformerConfig:
    config = GeneformerConfig.from_preset(args.preset)
    if args.readout == "cls":
        ids = {"vocab_size": 20_275, "cls_token_id": 2, "eos_token_id": 3}
        return GeneformerConfig.from_dict({**config.to_dict(), **ids})
    return config


def cell_of(config: GeneformerConfig, n_genes: int) -> list[int]:
    genes = np.random.default_rng(n_genes).choice(np.arange(4, config.vocab_size), n_genes, replace=False).tolist()
    return genes if config.cls_token_id is None else [config.cls_token_id, *genes, config.eos_token_id]


def state_of(config: GeneformerConfig) -> np.ndarray:
    return np.random.default_rng(5).normal(size=config.hidden_size)


def plain_bert(config: GeneformerConfig, ours: GeneformerForMaskedLM, device: torch.device, dtype: torch.dtype | None) -> BertForMaskedLM:
    known = BertConfig().to_dict()
    model = BertForMaskedLM(BertConfig(**{k: v for k, v in config.to_dict().items() if k in known and k != "model_type"})).eval()
    model.load_state_dict(ours.state_dict(), assign=True)
    return model.to(device, dtype or torch.float32)


def published_way(model: BertForMaskedLM, config: GeneformerConfig, cell: list[int], n_variants: int, readout: str, device: torch.device) -> list[float]:
    first = int(config.cls_token_id is not None)
    variants = [cell[:i] + cell[i + 1 :] for i in range(first, first + n_variants)]
    state = torch.from_numpy(state_of(config)).float().to(device)

    def run(cells: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, cells))
        ids = torch.tensor([c + [0] * (longest - len(c)) for c in cells]).to(device)
        mask = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in cells]).to(device)
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2].float()

    original = run([cell])[0]
    found: dict[int, list[float]] = {}
    for start in range(0, n_variants, BATCH):
        some = variants[start : start + BATCH]
        hidden = run(some)
        if readout == "mean":
            repeated = torch.stack([torch.cat([original[:i], original[i + 1 :]]) for i in range(start, start + len(some))])
            values = F.cosine_similarity(hidden, repeated, dim=2).mean(1)
        elif readout == "cls":
            values = F.cosine_similarity(hidden[:, 0], original[0].repeat(len(some), 1), dim=1)
        else:
            before = F.cosine_similarity(original.mean(0), state, dim=0)
            values = F.cosine_similarity(hidden.mean(1), state.repeat(len(some), 1), dim=1) - before
        for i, value in enumerate(values.tolist()):
            found.setdefault(cell[first + start + i], []).append(value)
    return [value for values in found.values() for value in values]


def our_way(
    model: GeneformerForMaskedLM, config: GeneformerConfig, cell: list[int], n_variants: int, readout: str, device: torch.device, dtype: str | None
) -> list[float]:
    states = StateShift(column="state", start="a", goal="b")
    vectors = StateVectors({name: state_of(config) for name in "ab"}, fingerprint_of(model), config.num_hidden_layers - 1, "mean")
    pooling = "cls" if readout == "cls" else "mean"
    given = {"states": states, "vectors": vectors} if readout == "state" else {}
    perturber = InSilicoPerturber(model, pooling=pooling, device=device, dtype=dtype, progress=False, **given)
    first = int(config.cls_token_id is not None)
    changes = [Change("delete", (token,)) for token in cell[first : first + n_variants]]
    perturber.changes_of = lambda perturbations: changes  # type: ignore[method-assign]
    if given:
        perturber.reader = perturber._reader(vectors.only(("b",)))
    tokens = perturber.open(datasets.Dataset.from_dict({"input_ids": [cell]}))
    (done,) = perturber.iter_cells(tokens, [])
    return [float(shift.states[0]) if readout == "state" else shift.cell for shift in done.shifts]


def child(args: argparse.Namespace) -> None:
    """Run one way on one cell, and print what it took."""
    config, device = config_of(args), resolve_device(args.device)
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).eval()
    cell = cell_of(config, args.genes[0])
    n = min(args.variants or args.genes[0], args.genes[0])
    if args.way == "published way":
        bert = plain_bert(config, model, device, None if args.dtype is None else torch.bfloat16)
        way = partial(published_way, bert, config, cell, readout=args.readout, device=device)
    else:
        way = partial(our_way, model.to(device), config, cell, readout=args.readout, device=device, dtype=args.dtype)
    # Once to warm up.
    way(n_variants=2)
    start = time.perf_counter()
    values = way(n_variants=n)
    if device.type != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": seconds, "megabytes": peak, "values": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="+", default=[250, 800, 1200])
    parser.add_argument("--variants", type=int, default=192)
    parser.add_argument("--preset", default="gf-6L-30M-i2048")
    parser.add_argument("--readouts", nargs="+", default=["mean", "state", "cls"])
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--way")
    parser.add_argument("--readout", default="mean")
    args = parser.parse_args()
    if args.way:
        child(args)
        return
    for readout in args.readouts:
        total = {"published way": 0.0, "geneformer_hf": 0.0}
        difference, share = 0.0, 0.0
        for n_genes in args.genes:
            found = {}
            for way in total:
                options = ["--way", way, "--readout", readout, "--genes", str(n_genes), "--variants", str(args.variants), "--preset", args.preset]
                options += ["--device", args.device] if args.device else []
                options += ["--dtype", args.dtype] if args.dtype else []
                done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
                found[way] = json.loads(done.stdout.splitlines()[-1])
                total[way] += found[way]["seconds"]
            theirs, ours = found["published way"], found["geneformer_hf"]
            difference = max(difference, float(np.abs(np.subtract(theirs["values"], ours["values"])).max()))
            share = max(share, ours["megabytes"] / theirs["megabytes"]) if n_genes > 500 else share
            print(
                f"{readout:6} {n_genes:5,} genes: published way {theirs['seconds']:7.2f} s, {theirs['megabytes']:7,.0f} MB; geneformer_hf {ours['seconds']:7.2f} s, {ours['megabytes']:7,.0f} MB; "
                f"{theirs['seconds'] / ours['seconds']:5.1f} times",
                flush=True,
            )
        ratio = total["published way"] / total["geneformer_hf"]
        holds = ratio >= BARS[readout] and (args.dtype is not None or difference <= LARGEST_DIFFERENCE)
        print(
            json.dumps(
                {
                    "claim": f"deleting genes one by one, {readout}",
                    "ratio": ratio,
                    "bar": BARS[readout],
                    "difference": difference,
                    "share_of_memory": share,
                    "holds": holds,
                }
            )
        )


if __name__ == "__main__":
    main()
