"""Embedding cells: this package against the published way, written naively, in one run.

    python benchmarks/bench_embed.py [--cells 64] [--preset gf-6L-30M-i2048] [--device cpu]

The published way: cells sorted by length, batches of 16 padded to their longest with a mask, `BertForMaskedLM` with its
default attention and all hidden states, mean over the genes of each cell. Cells are generated, of 300 to 2,048 genes; the
weights are random. Needs neither datasets nor anndata.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from transformers import BertForMaskedLM
from transformers.models.bert import BertConfig

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM
from geneformer_hf.device import resolve_device
from geneformer_hf.models.encoding import PackedEncoder

BAR, LARGEST_DIFFERENCE = 3.5, 2e-5


def published_way(model: BertForMaskedLM, cells: list[np.ndarray], device: torch.device) -> np.ndarray:
    order = sorted(range(len(cells)), key=lambda i: -len(cells[i]))
    out = np.empty((len(cells), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        longest = max(len(cells[i]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(cells[i])], mask[row, : len(cells[i])] = torch.from_numpy(cells[i]), 1
        with torch.no_grad():
            hidden = model(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True).hidden_states[-2]
        for row, i in enumerate(batch):
            out[i] = hidden[row, : len(cells[i])].mean(0).cpu().numpy()
    return out


def ours(model: GeneformerForMaskedLM, cells: list[np.ndarray], device: torch.device) -> np.ndarray:
    """What `embed_cells` does between tokens and vectors; it cannot be called itself where datasets is absent."""
    encoder = PackedEncoder(model, n_layers=model.config.num_hidden_layers - 1, device=device)
    offsets = np.concatenate(([0], np.cumsum([len(cell) for cell in cells])))
    out = np.empty((len(cells), model.config.hidden_size), dtype=np.float32)
    with encoder.ready():
        for done in encoder.encode(np.concatenate(cells), offsets, np.arange(len(cells))):
            for i, part in zip(done.cells, done.hidden.split(done.lengths), strict=True):
                out[i] = part.mean(0).cpu().numpy()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--preset", default="gf-6L-30M-i2048")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = resolve_device(args.device)
    rng = np.random.default_rng(0)
    config = GeneformerConfig.from_preset(args.preset)
    cells = [rng.choice(np.arange(4, config.vocab_size), length, replace=False) for length in rng.integers(300, 2049, args.cells)]
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).eval().to(device)
    known = BertConfig().to_dict()
    plain = BertForMaskedLM(BertConfig(**{k: v for k, v in config.to_dict().items() if k in known and k != "model_type"})).eval().to(device)
    plain.load_state_dict(model.state_dict())
    seconds: dict[str, list[float]] = {"published way": [], "geneformer_hf": []}
    results = {}
    # In turns, so that a busy machine slows both.
    for _ in range(args.repeats):
        for name, run, which in (("published way", published_way, plain), ("geneformer_hf", ours, model)):
            start = time.perf_counter()
            results[name] = run(which, cells, device)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    tokens = sum(map(len, cells))
    print(f"{args.cells} cells, {tokens:,} tokens, {args.preset}, {device.type}, {torch.get_num_threads()} threads")
    for name, median in medians.items():
        print(f"{name:15} {median:7.2f} s {tokens / median:10,.0f} tokens/s {medians['published way'] / median:5.1f}")
    difference = float(np.abs(results["published way"] - results["geneformer_hf"]).max())
    print(f"largest difference {difference:.1e}")
    ratio = medians["published way"] / medians["geneformer_hf"]
    print(
        json.dumps(
            {
                "claim": "embedding cells of mixed length against the published way",
                "ratio": ratio,
                "bar": BAR,
                "difference": difference,
                "holds": ratio >= BAR and difference <= LARGEST_DIFFERENCE,
            }
        )
    )


if __name__ == "__main__":
    main()
