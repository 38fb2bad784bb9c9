"""Fine-tuning a model of the 104M shape: the whole of it, LoRA, LoRA on 8-bit and on 4-bit weights, side by side in one run.

    python benchmarks/bench_finetune.py                       # a CPU: two cells of 600 tokens a step
    python benchmarks/bench_finetune.py --length 2048 --cells 12 --bf16      # a GPU

Random weights, generated cells, packed batches, AdamW, no dropout; a plain training loop, the same cells for all. Each way is a process
of its own, in turns. State: weights, gradients and AdamW's averages. Peak memory is what the process ever holds more than before the model was loaded
(on a GPU, what torch allocated): activations, and on a CPU the weights before they are quantised, are in it. Inference is timed on the same cells with the
same weights; its error is that of the logits against float32, relative, with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, GeneformerForSequenceClassification
from geneformer_hf.data.packing import pack_cells
from geneformer_hf.device import resolve_device
from geneformer_hf.models.adapters import LoraSettings, add_adapter, open_weights, quantization_config, unwrapped
from geneformer_hf.models.attention import PACKED_ATTENTION

WAYS = {"full": (None, False), "LoRA": (None, True), "LoRA, 8-bit": ("int8", True), "LoRA, 4-bit": ("nf4", True)}
LORA_MEMORY_BAR, QLORA_MEMORY_BAR = 0.4, 0.2
CLASSES = 10


class Peak:
    """The most memory this process has held since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.process = device, psutil.Process()
        self.before = self.most = self.process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)

    def megabytes(self) -> float:
        if self.device.type == "cpu":
            return (self.most - self.before) / 1e6
        return torch.get_device_module(self.device).max_memory_allocated() / 1e6


def batches(config: GeneformerConfig, length: int, n_cells: int, n: int) -> list[tuple[dict, torch.Tensor]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        lengths = np.clip(rng.lognormal(np.log(length), 0.2, n_cells), 50, config.max_position_embeddings).astype(int)
        cells = [rng.permutation(np.arange(4, config.vocab_size))[:k] for k in lengths]
        found.append((pack_cells(lengths, np.concatenate(cells)), torch.from_numpy(rng.integers(0, CLASSES, n_cells))))
    return found


def to(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def measure(way: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    quantization, lora = WAYS[way]
    device = resolve_device()
    peak = Peak(device)
    config = GeneformerConfig.from_pretrained(folder, num_labels=CLASSES, problem_type="single_label_classification", pooling="mean")
    torch.manual_seed(0)
    model = open_weights(
        GeneformerForSequenceClassification, folder, config, quantization=quantization_config(quantization) if quantization else None, device=device, quiet=True
    )
    if quantization is None:
        model = model.to(device)
    unwrapped(model).set_attn_implementation(PACKED_ATTENTION)
    stored = model.get_memory_footprint() / 1e6
    made = batches(config, args.length, args.cells, args.steps + 1)
    with torch.inference_mode():
        model.eval()(**to(made[0][0], device))
        started = time.perf_counter()
        logits = [model(**to(batch, device)).logits.float().cpu() for batch, _ in made[1:]]
        inference = (time.perf_counter() - started) / args.steps
    if lora:
        model = add_adapter(model, LoraSettings(rank=16, dropout=0.0))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for batch, labels in made:
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(**to(batch, device), labels=labels.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - started)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    np.save(Path(folder) / f"{way}.npy", torch.cat(logits).numpy())
    # Single precision: a gradient and AdamW's two averages for each number that is trained.
    state = (3 * 4 * trained) / 1e6 + model.get_memory_footprint() / 1e6
    return {
        "step_s": float(np.median(seconds[1:])),
        "inference_s": inference,
        "peak_mb": peak.megabytes(),
        "state_mb": state,
        "stored_mb": stored,
        "trained": trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="Geneformer-V2-104M")
    parser.add_argument("--length", type=int, default=600)
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = GeneformerConfig.from_preset(args.preset, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        GeneformerForMaskedLM(config).save_pretrained(folder)
        shared = [
            "--preset",
            args.preset,
            "--length",
            str(args.length),
            "--cells",
            str(args.cells),
            "--steps",
            str(args.steps),
            *(["--bf16"] if args.bf16 else []),
        ]
        found = {}
        for way in WAYS:
            command = [sys.executable, __file__, *shared, "--way", way, "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            found[way] = json.loads(done.stdout.splitlines()[-1])
            logits = np.load(Path(folder) / f"{way}.npy")
            reference = np.load(Path(folder) / "full.npy")
            found[way]["error"] = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
    full = found["full"]
    print(f"{args.preset} shape, {args.cells} cells of about {args.length} tokens a step, {resolve_device()}")
    print(
        f"{'':14}{'trained':>14}{'a step':>10}{'ratio':>8}{'state':>12}{'ratio':>8}{'peak memory':>14}{'weights':>10}{'inference':>11}{'ratio':>8}{'logit error':>13}"
    )
    for way, one in found.items():
        print(
            f"{way:14}{one['trained']:14,}{one['step_s']:9.2f}s{one['step_s'] / full['step_s']:8.2f}{one['state_mb']:9,.0f} MB{one['state_mb'] / full['state_mb']:8.2f}{one['peak_mb']:11,.0f} MB"
            f"{one['stored_mb']:7,.0f} MB{one['inference_s']:10.2f}s{one['inference_s'] / full['inference_s']:8.2f}{one['error']:13.3f}"
        )
    for name, way, bar in (("LoRA", "LoRA", LORA_MEMORY_BAR), ("QLoRA (4-bit)", "LoRA, 4-bit", QLORA_MEMORY_BAR)):
        ratio = found[way]["state_mb"] / full["state_mb"]
        print(
            json.dumps(
                {
                    "claim": f"memory of weights, gradients and optimiser, {name} against the whole model, {args.preset} shape",
                    "ratio": round(ratio, 3),
                    "bar": bar,
                    "holds": ratio <= bar,
                }
            )
        )


if __name__ == "__main__":
    main()
