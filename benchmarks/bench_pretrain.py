"""Pretraining: this package against the stock way, in one run.

    python benchmarks/bench_pretrain.py                                             # on a CPU: transformers' Trainer on both sides
    python benchmarks/bench_pretrain.py --loop --preset Geneformer-V2-104M --length 4096   # on a GPU: bf16, padded against packed

The stock way: Trainer, `BertForMaskedLM` with its default attention and its head at every position, random batches padded to the
longest. Both sides get the same cells in the same steps with the same hidden genes, start from the same weights and have no dropout;
the losses are compared step by step. Each side is a process of its own, in turns; peak memory is that of the process (on a GPU, what
torch allocated).

Cells: the first 300 of pbmc3k as published (294 to 2,048 tokens), where the shared folder is at hand; else generated ones of such
lengths. `--loop` is a plain training loop, needs neither datasets nor anndata, and counts model FLOPs (forward and backward, the head
at hidden genes alone) against the peak of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, GeneformerTokenizer, GeneTable
from geneformer_hf.data.masking import CellKey, GeneMasker
from geneformer_hf.data.packing import pack_cells, pad_cells
from geneformer_hf.device import resolve_device
from geneformer_hf.models.attention import PACKED_ATTENTION
from geneformer_hf.models.modeling_geneformer import has_fused_loss

SPEED_BAR, MEMORY_BAR, LOSS_BAR = 3.0, 0.6, 1e-4
# Dense bf16, from the makers' data sheets.
PEAK_TFLOPS = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "V100": 125.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def real_or_generated_cells(vocab_size: int, longest: int) -> list[np.ndarray]:
    shared = Path(os.environ.get("GENEFORMER_HF_SHARED", Path(__file__).parents[2] / "shared")) / "golden" / "v1" / "tokens_pbmc3k_first300.npz"
    if longest == 2048 and shared.is_file():
        stored = np.load(shared)
        return [cell.astype(np.int64) for cell in np.split(stored["values"], stored["offsets"][1:-1])]
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(0.4 * longest), 0.4, 300), 0.14 * longest, longest).astype(int)
    return [rng.permutation(np.arange(4, vocab_size))[:length] for length in lengths]


def plain_tokenizer(config: GeneformerConfig) -> GeneformerTokenizer:
    """Return a tokenizer of the size of the vocabulary; cells come as token ids."""
    first = 4 if config.cls_token_id is not None else 2
    genes = [f"ENSG{i:011d}" for i in range(config.vocab_size - first)]
    specials = {"cls_token": "<cls>", "eos_token": "<eos>"} if first == 4 else {}
    return GeneformerTokenizer(
        gene_table=GeneTable(genes, range(first, config.vocab_size), np.ones(len(genes))), model_max_length=config.max_position_embeddings, **specials
    )


def plain_bert(config: GeneformerConfig, weights: dict) -> BertForMaskedLM:
    known = BertConfig().to_dict()
    model = BertForMaskedLM(BertConfig(**{k: v for k, v in config.to_dict().items() if k in known and k != "model_type"}))
    model.load_state_dict(weights)
    return model


class Clock(TrainerCallback):
    """Times the steps after the first, which pays for what is done once."""

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = time.perf_counter()
        if state.global_step == 1:
            self.started = self.stopped


def peak_megabytes(device: torch.device) -> float:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 1e6


def train_with_trainer(way: str, args: argparse.Namespace) -> dict:
    """Run one side under transformers' Trainer and return losses, speed and memory."""
    import datasets

    from geneformer_hf.data.mixtures import Corpus, KeyedCells, Mixture
    from geneformer_hf.training.arguments import GeneformerPretrainingArguments
    from geneformer_hf.training.trainer import GeneformerPretrainer

    torch.set_num_threads(args.threads)
    config = GeneformerConfig.from_preset(args.preset, **NO_DROPOUT)
    tokenizer, cells = plain_tokenizer(config), real_or_generated_cells(config.vocab_size, args.length)
    corpus = Corpus("cells", datasets.Dataset.from_dict({"input_ids": cells}))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        usual = {"output_dir": folder, "max_steps": args.steps, "per_device_train_batch_size": args.batch, "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
                 "disable_tqdm": True, "report_to": [], "use_cpu": True, "dataloader_pin_memory": False, "seed": 42, "remove_unused_columns": False}  # fmt: skip
        set_seed(42)
        model = GeneformerForMaskedLM(config)
        ours = GeneformerPretrainer(model, GeneformerPretrainingArguments(**usual), mixture=Mixture([corpus], seed=42), tokenizer=tokenizer, callbacks=[clock])
        steps = [step[0] for step, _ in zip(ours.plan.steps(), range(args.steps), strict=False)]
        n_tokens = sum(int(corpus.lengths[key.row]) for step in steps[1:] for key in step)
        trainer: Trainer = ours
        if way == "stock":
            bert = plain_bert(config, model.state_dict())
            del ours, model
            masker, keyed = GeneMasker(tokenizer, seed=42), KeyedCells([corpus])

            def collate(rows: list[dict]) -> dict:
                lengths = np.array([len(row["input_ids"]) for row in rows])
                hidden = masker.hide(np.concatenate([row["input_ids"] for row in rows]), lengths, [row["cell_key"] for row in rows])
                return pad_cells(lengths, *hidden, pad=0)

            rows = [row for step in steps for row in keyed.__getitems__(step)]
            arguments = TrainingArguments(**usual, train_sampling_strategy="sequential")
            trainer = Trainer(bert, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "tokens_per_s": n_tokens / (clock.stopped - clock.started), "peak_mb": peak_megabytes(torch.device("cpu"))}


def train_in_a_loop(way: str, args: argparse.Namespace) -> dict:
    """Run one side in a plain loop with bf16 autocast and return losses, speed, memory and model FLOP utilisation."""
    device = resolve_device(args.device)
    config = GeneformerConfig.from_preset(args.preset, **NO_DROPOUT)
    cells, masker = real_or_generated_cells(config.vocab_size, args.length), GeneMasker(plain_tokenizer(config), seed=42)
    set_seed(42)
    model: torch.nn.Module = GeneformerForMaskedLM(config)
    if way == "stock":
        model = plain_bert(config, model.state_dict())
    elif way.startswith("packed"):
        model.set_attn_implementation(PACKED_ATTENTION)
        model.fused_loss = way == "packed, fused loss"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    rng, losses, n_tokens, flops, started = np.random.default_rng(1), [], 0, 0.0, 0.0
    for step in range(args.steps):
        rows = rng.choice(len(cells), args.batch, replace=args.batch > len(cells))
        lengths = np.array([len(cells[row]) for row in rows])
        hidden = masker.hide(np.concatenate([cells[row] for row in rows]), lengths, [CellKey(0, int(row), step) for row in rows])
        batch = pack_cells(lengths, *hidden) if way.startswith("packed") else pad_cells(lengths, *hidden, pad=0)
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step == args.warmup - 1:
            started = time.perf_counter()
        elif step >= args.warmup:
            n_tokens += int(lengths.sum())
            flops += model_flops(config, lengths, int((hidden[1] != -100).sum()))
    seconds = time.perf_counter() - started
    peak = args.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if device.type != "cpu" and name in torch.cuda.get_device_name(device)), None)
    utilisation = flops / seconds / (peak * 1e12) if peak else None
    return {"losses": losses, "tokens_per_s": n_tokens / seconds, "peak_mb": peak_megabytes(device), "utilisation": utilisation}


def model_flops(config: GeneformerConfig, lengths: np.ndarray, n_hidden: int) -> float:
    """FLOPs of a step that does no more than it must: no pads, the head at hidden genes; backward costs twice forward."""
    e, f = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * e * e + 2 * e * f) * lengths.sum()
    attention = 4 * e * (lengths.astype(np.float64) ** 2).sum()
    head = 2 * (e * e + e * config.vocab_size) * n_hidden
    return 3 * (config.num_hidden_layers * (linear + attention) + head)


def run_child(way: str, argv: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *argv, "--child", way], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gf-6L-30M-i2048")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=12, help="cells a batch (default: 12, as published for V1)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, with --loop")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--loop", action="store_true", help="a plain training loop in bf16, on any device")
    parser.add_argument("--device")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device, for the utilisation")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps((train_in_a_loop if args.loop else train_with_trainer)(args.child, args)))
        return
    fused = ["packed, fused loss"] if has_fused_loss() else []
    ways = ["stock", "padded", "packed", *fused] if args.loop else ["stock", "geneformer_hf"]
    results: dict[str, list[dict]] = {way: [] for way in ways}
    # In turns, so that a busy machine slows both.
    for _ in range(args.repeats):
        for way in ways:
            results[way].append(run_child(way, sys.argv[1:]))
    device = resolve_device(args.device)
    where = "CPU" if device.type == "cpu" or not args.loop else torch.cuda.get_device_name(device)
    print(f"{args.preset}, {args.batch} cells of up to {args.length:,} tokens a step, {'bf16' if args.loop else 'float32'}, {where}")
    print(f"{'':22} {'tokens/s':>10} {'peak MB':>9} {'utilisation':>12}  loss of the last step")
    for way, runs in results.items():
        best = max(runs, key=lambda run: run["tokens_per_s"])
        used = f"{best['utilisation']:.1%}" if best.get("utilisation") else ""
        print(f"{way:22} {best['tokens_per_s']:10,.0f} {min(run['peak_mb'] for run in runs):9,.0f} {used:>12}  {best['losses'][-1]:.5f}")
    mine = "packed" if args.loop else "geneformer_hf"
    speed = max(run["tokens_per_s"] for run in results[mine]) / max(run["tokens_per_s"] for run in results["stock"])
    memory = min(run["peak_mb"] for run in results[mine]) / min(run["peak_mb"] for run in results["stock"])
    apart = max(abs(a - b) for a, b in zip(results[mine][0]["losses"], results["stock"][0]["losses"], strict=True))
    print(
        json.dumps(
            {
                "claim": f"pretraining {args.preset} on {where}: gene tokens a second, against the stock way",
                "ratio": round(speed, 2),
                "bar": SPEED_BAR,
                "holds": speed >= SPEED_BAR,
            }
        )
    )
    print(
        json.dumps({"claim": "peak memory of the process, against the stock way", "ratio": round(memory, 3), "bar": MEMORY_BAR, "holds": memory <= MEMORY_BAR})
    )
    if not args.loop:
        print(json.dumps({"claim": "largest difference of the losses, step by step", "ratio": apart, "bar": LOSS_BAR, "holds": apart <= LOSS_BAR}))


if __name__ == "__main__":
    main()
