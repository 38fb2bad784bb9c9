"""The exported encoder in ONNX Runtime, in 32 and 8 bit, against torch, in one run: speed, size and error.

    python benchmarks/bench_onnx.py [--preset Geneformer-V2-104M] [--cells 8] [--longest 1024]
    python benchmarks/bench_onnx.py --model FOLDER --input cells.h5ad

Without a model: random weights in a published shape, generated cells. With one: its own cells, and how far embeddings of cells (the mean over
their genes) move in 8 bit, beside how far cells lie apart. All take the same padded batches of 4 with a mask, but for the engine of this
package, which takes cells packed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, GeneformerTokenizer, GeneTable, export_onnx, load_model
from geneformer_hf.models.encoding import PackedEncoder

BAR, BATCH = 1.5, 4


def random_model(preset: str, folder: Path) -> None:
    config = GeneformerConfig.from_preset(preset)
    n_special = 2 if config.cls_token_id is None else 4
    genes = [f"ENSG{i:011d}" for i in range(config.vocab_size - n_special)]
    ends = {} if config.cls_token_id is None else {"cls_token": "<cls>", "eos_token": "<eos>"}
    table = GeneTable(genes, range(n_special, config.vocab_size), np.ones(len(genes)))
    torch.manual_seed(0)
    GeneformerForMaskedLM(config).save_pretrained(folder)
    GeneformerTokenizer(gene_table=table, model_max_length=config.max_position_embeddings, **ends).save_pretrained(folder)


def batches(cells: list[np.ndarray]):
    order = sorted(range(len(cells)), key=lambda i: len(cells[i]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = np.zeros((len(rows), max(len(cells[i]) for i in rows)), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, : len(cells[i])], mask[row, : len(cells[i])] = cells[i], 1
        yield rows, ids, mask


def pooled(run, cells: list[np.ndarray], size: int) -> np.ndarray:
    out = np.empty((len(cells), size), dtype=np.float32)
    for rows, ids, mask in batches(cells):
        hidden = run(ids, mask)
        for row, i in enumerate(rows):
            out[i] = hidden[row, : len(cells[i])].mean(0)
    return out


def by_torch(model):
    def run(ids, mask):
        with torch.inference_mode():
            return model.base_model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True).hidden_states[-2].numpy()

    return run


def by_onnx(path: Path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(["second_to_last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]


def packed(model, cells: list[np.ndarray]) -> np.ndarray:
    encoder = PackedEncoder(model, n_layers=model.config.num_hidden_layers - 1, device=torch.device("cpu"))
    offsets = np.concatenate(([0], np.cumsum([len(cell) for cell in cells])))
    out = np.empty((len(cells), model.config.hidden_size), dtype=np.float32)
    with encoder.ready():
        for done in encoder.encode(np.concatenate(cells), offsets, np.arange(len(cells))):
            for i, part in zip(done.cells, done.hidden.split(done.lengths), strict=True):
                out[i] = part.mean(0).numpy()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="Geneformer-V2-104M")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or Path(temporary) / "model"
        if args.model is None:
            random_model(args.preset, folder)
        exported = export_onnx(folder, Path(temporary) / "onnx", int8=True)
        model = load_model(folder)
        rng = np.random.default_rng(0)
        if args.input:
            import anndata

            adata = anndata.read_h5ad(args.input)
            chosen = rng.choice(adata.n_obs, min(args.cells, adata.n_obs), replace=False)
            cells = GeneformerTokenizer.from_pretrained(folder).encode_anndata(adata[np.sort(chosen)].copy())
        else:
            longest = min(args.longest, model.config.max_position_embeddings)
            cells = [rng.choice(np.arange(4, model.config.vocab_size), n, replace=False) for n in rng.integers(longest // 6, longest + 1, args.cells)]
        size = model.config.hidden_size
        files = {"ONNX 32 bit": exported.output / "encoder.onnx", "ONNX 8 bit": exported.output / "encoder_int8.onnx"}
        ways = {"torch": lambda: pooled(by_torch(model), cells, size), "torch, packed": lambda: packed(model, cells)}
        for name, path in files.items():
            run = by_onnx(path)
            ways[name] = lambda run=run: pooled(run, cells, size)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        results = {}
        for _ in range(args.repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                results[name] = way()
                seconds[name].append(time.perf_counter() - start)
        sizes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
    medians = {name: float(np.median(s)) for name, s in seconds.items()}
    reference = results["torch"]
    apart = np.linalg.norm(reference[:, None] - reference[None], axis=-1)[np.triu_indices(len(reference), 1)].mean()
    print(f"{len(cells)} cells, {sum(map(len, cells)):,} tokens, {folder.name if args.model else args.preset}, {torch.get_num_threads()} threads")
    errors = {}
    for name, median in medians.items():
        moved = float(np.linalg.norm(results[name] - reference, axis=-1).mean())
        errors[name] = moved / float(np.linalg.norm(reference, axis=-1).mean())
        size_told = f"; {sizes[name]:,.1f} MB" if name in sizes else ""
        print(
            f"{name:15} {median:7.2f} s, {medians['torch'] / median:4.2f} times torch{size_told}; embeddings {errors[name]:.1e} off, {moved / apart:.3f} of the distance of two cells"
        )
    ratio = medians["torch"] / medians["ONNX 8 bit"]
    holds = ratio >= BAR and errors["ONNX 32 bit"] < 1e-4
    print(
        json.dumps(
            {
                "claim": "8-bit encoder in ONNX Runtime against torch on the same padded batches",
                "ratio": ratio,
                "bar": BAR,
                "error": errors["ONNX 8 bit"],
                "holds": holds,
            }
        )
    )


if __name__ == "__main__":
    main()
