"""What one GPU makes of this package today: a baseline that a faster engine is compared with.

    python benchmarks/bench_gpu.py --out gpu.json --table gpu.md [--seconds 300]
    python benchmarks/bench_gpu.py --parts card gemm perturb --out gpu.json
    python benchmarks/bench_gpu.py --tiny              # every part on the CPU in small shapes: does the script run?

Parts, in the order of a full run:

    card       versions, copy rates, the cost of a launch and of a wait
    gemm       matrix products of the encoder's shapes in bf16, fp16, tf32 and fp32
    perturb    deleting genes one by one: the published procedure and ours, in fp32 and in half precision
    pretrain   steps of stock BertForMaskedLM (padded) and ours (packed), without and with dropout
    attention  what a new shape costs at its first call; torch's attention kernels over equal and ragged cells
    embed      cells of mixed length: the published way and ours
    layer      some encoder layers by themselves: time and kernels of each
    screen     estimates for one cell, stage by stage

Data and weights are random; queries and keys are scaled up, so that attention is not uniform. Everything is run
once in the shapes that are timed before it is timed, which is kept as `first s`. Times are medians, and the sides of
a comparison take turns. Errors are differences from the published way in fp32; kernels are compared with fp32
attention. `waits` are synchronising operations as torch counts them, `busy` is the share of time in which kernels
run, and `MFU` counts the FLOPs that a task needs against the dense bf16 rate of the card, whatever the number type.
A part that fails, or that this torch does not offer, says so, and the next part runs. Needs neither datasets nor
anndata. `--seconds` does not count imports.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertForMaskedLM
from transformers.models.bert import BertConfig

from geneformer_hf import GeneformerConfig, GeneformerForMaskedLM, __version__
from geneformer_hf.device import resolve_device

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_TIME = "left out: no time left"
# Dense bf16, from the makers' data sheets.
PEAK_TFLOPS = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
PADDED_BATCH, VARIANTS_A_BATCH, LAYERS, SHARPER = 16, 32, 3, 3.0


@dataclass(frozen=True)
class Sizes:
    tokens: int = 65_536
    lengths: tuple[int, ...] = (2000, 1200, 4096, 512)
    cell_genes: tuple[int, int] = (300, 2048)
    new_shapes: int = 5
    new_lengths: tuple[int, int, int] = (1003, 37, 211)
    """The first, and the steps from case to case and from call to call."""
    genes: int = 2000
    variants: int = 1024
    variants_fp32: int = 128
    cells: int = 512
    screened: int = 3
    train_cells: tuple[int, int] = (12, 39)
    train_batches: int = 4
    copied: int = 1 << 29
    rounds: int = 6
    calls: int = 4


TINY = Sizes(
    tokens=256, lengths=(64, 32), cell_genes=(8, 60), new_shapes=2, new_lengths=(30, 2, 1), genes=24, variants=16,
    variants_fp32=8, cells=12, screened=2, train_cells=(3, 4), train_batches=2, copied=1 << 16, rounds=2, calls=1,
)  # fmt: skip
TINY_MODEL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 200,
    "max_position_embeddings": 64, "cls_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


# Times and counts


@dataclass
class Timed:
    """What timing one side gave."""

    seconds: list[float] = field(default_factory=list)
    first: float | None = None
    """Seconds of the first run, with whatever is built once for its shapes."""
    peak_gb: float | None = None
    value: Any = None
    reason: str | None = None
    """Why there are no times."""

    @property
    def median(self) -> float | None:
        return float(np.median(self.seconds)) if self.seconds else None

    def rate(self, amount: float) -> float | None:
        return amount / self.median if self.median else None


@dataclass
class Run:
    """What a part is given, and where its numbers go."""

    device: torch.device
    preset: str
    tiny: bool
    ends: float
    """When all parts are over, by `time.perf_counter`."""
    part: str = ""
    part_ends: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    variants_per_s: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cuda, self.sizes = self.device.type == "cuda", TINY if self.tiny else Sizes()
        name = torch.cuda.get_device_name(self.device) if self.cuda else ""
        self.peak = next((rate * 1e12 for known, rate in PEAK_TFLOPS.items() if known in name), None)

    def left(self) -> float:
        return min(self.part_ends, self.ends) - time.perf_counter()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def config(self, **changes: Any) -> GeneformerConfig:
        return GeneformerConfig.from_preset(self.preset, **((TINY_MODEL if self.tiny else {}) | changes))

    def mfu(self, timed: Timed, flops: float) -> float | None:
        return flops / timed.median / self.peak if self.peak and timed.median else None

    def add(self, what: str, timed: Timed, amount: float = 0.0, unit: str = "", **more: Any) -> None:
        """Keep one line of results: a time, how much of what was done in it, and whatever else was found."""
        row: dict[str, Any] = {"part": self.part, "what": what}
        if timed.median is None:
            row["status"] = timed.reason or NO_TIME
        else:
            row |= {"ms": timed.median * 1e3, "repeats": len(timed.seconds)}
            row["spread"] = (max(timed.seconds) - min(timed.seconds)) / timed.median
            row |= {"rate": timed.rate(amount), "unit": unit} if unit else {}
        self.keep(row | {"first s": timed.first, "peak GB": timed.peak_gb} | more)

    def ratio(self, what: str, rates: dict[str, float | None], ours: str, *others: str) -> None:
        """Add how many times as fast one side is as others."""
        for other in others:
            faster, slower = rates.get(ours), rates.get(other)
            if faster and slower:
                found = {"rate": faster / slower, "unit": "times"}
                self.keep({"part": self.part, "what": f"{what}: {ours} against {other}"} | found)

    def keep(self, row: dict[str, Any]) -> None:
        self.rows.append({name: value for name, value in row.items() if value is not None})
        print(" | ".join(cells_of(self.rows[-1])), flush=True)


def reason_of(error: BaseException) -> str:
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    absent = isinstance(error, NotImplementedError | ImportError | AttributeError | FileNotFoundError)
    absent = absent or any(said in text for said in ("No available kernel", "No viable backend"))
    return ("not available: " if absent else "error: ") + text


def by_wall(run: Run, work: Callable[[], Any]) -> tuple[float, Any]:
    run.sync()
    start = time.perf_counter()
    value = work()
    run.sync()
    return time.perf_counter() - start, value


def by_events(run: Run, work: Callable[[], Any]) -> tuple[float, Any]:
    """Time a kernel by the device's own clock; several calls in a row, so that launches are hidden."""
    if not run.cuda:
        return by_wall(run, work)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(run.sizes.calls):
        value = work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / run.sizes.calls, value


def first_run(run: Run, timed: Timed, work: Callable[[], Any]) -> None:
    """Warm up one side, and keep its peak memory."""
    if run.left() <= 0:
        timed.reason = NO_TIME
        return
    try:
        if run.cuda:
            torch.cuda.reset_peak_memory_stats()
        timed.first, _ = by_wall(run, work)
        timed.peak_gb = torch.cuda.max_memory_allocated() / 1e9 if run.cuda else None
    except Exception as error:  # noqa: BLE001
        timed.reason = reason_of(error)
    if timed.reason:
        release(run)


def in_turns(
    run: Run,
    sides: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: Callable[..., tuple[float, Any]] = by_wall,
    warm: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Timed]:
    """Warm up all sides, then time them in turns, as long as the part has time; a side that fails says why.

    `warm` has what runs the same shapes in less time than the work itself.
    """
    found = {name: Timed() for name in sides}
    for name, timed in found.items():
        first_run(run, timed, (warm or sides)[name])
    for done in range(rounds):
        for name, timed in found.items():
            if timed.reason or (done and run.left() <= 0):
                continue
            if not done and run.ends - time.perf_counter() < (timed.first or 0.0):
                timed.reason = NO_TIME
                continue
            try:
                took, timed.value = clock(run, sides[name])
                timed.seconds.append(took)
            except Exception as error:  # noqa: BLE001
                timed.reason = reason_of(error)
    return found


def counts(run: Run, work: Callable[[], Any]) -> dict[str, Any]:
    """Count kernels (on a CPU: operations), copies and waits of some work, and add up the time of the kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if run.left() <= 0:
        return {"counts": NO_TIME}
    wanted = DeviceType.CUDA if run.cuda else DeviceType.CPU
    try:
        with profile(activities=[ProfilerActivity.CUDA if run.cuda else ProfilerActivity.CPU]) as profiler:
            by_wall(run, work)
        found: dict[str, Any] = {"waits": waits(work)} if run.cuda else {}
    except Exception as error:  # noqa: BLE001
        return {"counts": reason_of(error)}
    events = [e for e in profiler.events() if e.device_type == wanted and not getattr(e, "is_user_annotation", False)]
    copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in events)
    by_name: Counter[str] = Counter()
    for e in events:
        by_name[e.name[:120]] += e.time_range.elapsed_us()
    found |= {"kernels": len(events) - copies, "copies": copies, "device ms": sum(by_name.values()) / 1e3}
    return found | {"longest": dict(by_name.most_common(10))}


def waits(work: Callable[[], Any]) -> int:
    """Count the operations that wait for the device."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA" in str(warning.message) for warning in found)


def counts_of_one(run: Run, work: Callable[[int], Any], few: int, more: int, n: int = 1) -> dict[str, Any]:
    """Count what each of n further pieces of work adds: what is done once is left out."""
    less, full = counts(run, partial(work, few)), counts(run, partial(work, more))
    if "counts" in less or "counts" in full:
        return less if "counts" in less else full
    return {name: full[name] if name == "longest" else (full[name] - less[name]) / n for name in full}


def busy(run: Run, counted: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the counts of some work, and the share of its time in which kernels run."""
    known = run.cuda and "device ms" in counted
    return counted | ({"busy": counted["device ms"] / 1e3 / seconds} if known else {})


def model_flops(config: GeneformerConfig, lengths: Sequence[int], layers: int) -> float:
    """Return the FLOPs that some layers need in a forward pass over cells of these lengths."""
    e, f, l_b = config.hidden_size, config.intermediate_size, np.asarray(lengths, dtype=np.float64)
    return float(layers * (2 * (4 * e * e + 2 * e * f) * l_b.sum() + 4 * e * (l_b**2).sum()))


def differences(exact: np.ndarray | None, values: np.ndarray | None) -> dict[str, Any]:
    """Return how far values are from exact ones, of which there may be fewer."""
    if exact is None or values is None:
        return {}
    apart = (values[: len(exact)] - exact).ravel()
    found = {"error": np.abs(apart).max(), "rms error": (apart**2).mean() ** 0.5, "spread of values": exact.std()}
    return {name: float(value) for name, value in found.items()}


# Data and models


def cells_between(config: GeneformerConfig, lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Return cells of so many random genes, between the special tokens of the vocabulary."""
    rng, genes = np.random.default_rng(seed), np.arange(4, config.vocab_size)
    first, last = ([] if token is None else [token] for token in (config.cls_token_id, config.eos_token_id))
    return [np.concatenate([first, rng.choice(genes, n, replace=False), last]).astype(np.int64) for n in lengths]


def genes_of(config: GeneformerConfig, length: int) -> slice:
    """Return where the genes of a cell of so many tokens stand."""
    return slice(int(config.cls_token_id is not None), length - int(config.eos_token_id is not None))


def ragged_lengths(run: Run) -> list[int]:
    rng, found, left = np.random.default_rng(1), [], run.sizes.tokens
    while left:
        found.append(min(int(rng.integers(*run.sizes.cell_genes)), left))
        left -= found[-1]
    return found


def our_model(run: Run, **changes: Any) -> GeneformerForMaskedLM:
    torch.manual_seed(0)
    with run.device:
        model = GeneformerForMaskedLM(run.config(**changes)).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(SHARPER)
            layer.attention.self.key.weight.mul_(SHARPER)
    return model


def stock_model(ours: GeneformerForMaskedLM, dtype: torch.dtype = FP32) -> BertForMaskedLM:
    """Return transformers' own model with the same weights."""
    known = BertConfig().to_dict()
    own = {name: value for name, value in ours.config.to_dict().items() if name in known and name != "model_type"}
    with ours.device:
        model = BertForMaskedLM(BertConfig(**own)).eval()
    model.load_state_dict(ours.state_dict())
    return model.to(dtype)


def tf32(work: Callable[[], Any]) -> Any:
    """Run some work with fp32 matrix products on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return work()
    finally:
        torch.set_float32_matmul_precision(before)


# card and gemm


def about(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "card": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
        "geneformer_hf": __version__, "python": platform.python_version(), "cores": os.cpu_count(),
        "preset": run.preset, "fp32 products": torch.get_float32_matmul_precision(),
    }  # fmt: skip
    if not run.cuda:
        return found
    card = torch.cuda.get_device_properties(run.device)
    found |= {"card": card.name, "memory GB": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver, clock, power"] = told.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError) as error:
        found["driver, clock, power"] = reason_of(error)
    return found


def part_card(run: Run) -> None:
    e, sizes = run.config().hidden_size, run.sizes
    x = torch.randn(sizes.copied // e, e, device=run.device, dtype=BF16)
    y, places = torch.empty_like(x), torch.randperm(len(x), device=run.device)
    one, host = torch.zeros(1, device=run.device), torch.zeros(sizes.tokens, dtype=torch.int64)
    sides = {"copy": partial(y.copy_, x), "relu": partial(torch.relu, x), "gather of rows": lambda: x[places]}
    for name, timed in in_turns(run, sides, rounds=sizes.rounds, clock=by_events).items():
        run.add(f"{name}, bf16", timed, 2 * x.nbytes / 1e12, "TB/s")

    def launches() -> None:
        for _ in range(200):
            one.add_(1)

    sides = {"200 small kernels": launches, "a wait, item()": one.item, "ids of a pass": lambda: host.to(run.device)}
    for name, timed in in_turns(run, sides, rounds=sizes.rounds).items():
        run.add(name, timed)


def part_gemm(run: Run) -> None:
    e, f, t = run.config().hidden_size, run.config().intermediate_size, run.sizes.tokens
    for k, n in ((e, 3 * e), (e, e), (e, f), (f, e)):
        full = [torch.randn(*shape, device=run.device) for shape in ((t, k), (n, k), (n,))]
        half = [x.to(BF16) for x in full]
        sides = {
            "bf16": partial(F.linear, *half),
            "fp16": partial(F.linear, *(x.to(FP16) for x in full)),
            "tf32": partial(tf32, partial(F.linear, *full)),
            "fp32": partial(F.linear, *full),
        }
        if (k, n) == (e, f):
            sides["bf16, then relu"] = lambda half=half: F.linear(*half).relu_()
            sides["bf16, relu inside"] = partial(torch._addmm_activation, half[2], half[0], half[1].T)
        for name, timed in in_turns(run, sides, rounds=run.sizes.rounds, clock=by_events).items():
            run.add(f"{t:,} x {k} x {n}, {name}", timed, 2 * t * k * n / 1e12, "TFLOP/s")


# perturb


def published_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with torch.no_grad():
        return model(**given, output_hidden_states=True).hidden_states[-2].float()


def published_perturb(model: Any, genes: slice, cell: list[int], state_e: torch.Tensor, readout: str, n: int) -> Any:
    """The published procedure, step by step: lists, a mask, repeated originals, a dictionary."""

    def run(cells: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, cells))
        ids = torch.tensor([c + [0] * (longest - len(c)) for c in cells])
        return published_states(model, ids, torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in cells]))

    before = run([cell])[0]
    genes_before, found = before[genes], {}
    for start in range(0, n, VARIANTS_A_BATCH):
        places = range(start, min(start + VARIANTS_A_BATCH, n))
        gone = [genes.start + i for i in places]
        hidden = run([cell[:i] + cell[i + 1 :] for i in gone])
        after = hidden[:, genes.start : genes.stop - 1]
        if readout == "mean":
            repeated = torch.stack([torch.cat([genes_before[:i], genes_before[i + 1 :]]) for i in places])
            values = F.cosine_similarity(after, repeated, dim=2).mean(1)
        elif readout == "cls":
            values = F.cosine_similarity(hidden[:, 0], before[0].repeat(len(gone), 1), dim=1)
        else:
            nearness = F.cosine_similarity(genes_before.mean(0), state_e, dim=0)
            values = F.cosine_similarity(after.mean(1), state_e.repeat(len(gone), 1), dim=1) - nearness
        for i, value in zip(gone, values.tolist(), strict=True):
            found.setdefault(cell[i], []).append(value)
    return np.array([value for values in found.values() for value in values])


def our_perturb(encoder: Any, reader: Any, cell: np.ndarray, n: int) -> np.ndarray:
    """What `InSilicoPerturber` does between tokens and values; it cannot be imported where datasets is absent."""
    from geneformer_hf.analysis.perturbations import Change, changed
    from geneformer_hf.models.variants import ScannedCell, Variant

    config, where = reader.config, genes_of(reader.config, len(cell))
    genes = cell[where]

    def most() -> int:
        special = sum(token is not None for token in (config.cls_token_id, config.eos_token_id))
        return int(config.max_position_embeddings) - special

    def look(some: Any, hidden: torch.Tensor, lengths: list[int]) -> list[Any]:
        return [reader.before(v.tokens, part) for v, part in zip(some, hidden.split(lengths), strict=True)]

    def compare(some: Any, hidden: torch.Tensor, lengths: list[int]) -> list[Any]:
        return reader.after([(*v.about, v.tokens) for v in some], hidden, lengths)

    def variants() -> Any:
        for change, after in jobs:
            place = where.start + int(np.flatnonzero(genes == change.tokens[0])[0])
            tokens = np.concatenate([cell[: where.start], after.tokens, cell[where.stop :]])
            yield Variant(tokens, (before, after), scan, place)

    with encoder.ready():
        changes = [Change("delete", (int(token),)) for token in genes[:n]]
        jobs = [(change, changed(genes, change, most=most())) for change in changes]
        (before,) = encoder.read([Variant(cell, None)], look)
        scan = ScannedCell(cell, where.start, to_top=False)
        shifts = list(encoder.read(variants(), compare))
    return np.array([shift.cell if shift.states is None else shift.states[0] for shift in shifts])


def part_perturb(run: Run) -> None:
    from geneformer_hf.analysis.readouts import CELL, STATE, Reader
    from geneformer_hf.models.variants import VariantEncoder

    sizes, model = run.sizes, our_model(run)
    config, layers = model.config, model.config.num_hidden_layers - 1
    plain = {FP32: stock_model(model), BF16: stock_model(model, BF16)}
    (cell,) = cells_between(config, [sizes.genes])
    state_e = F.normalize(torch.randn(config.hidden_size, device=run.device), dim=0)
    few, many = sizes.variants_fp32, sizes.variants
    one_pass, ends = min(VARIANTS_A_BATCH, few), run.part_ends
    readouts = ["mean", "state"] + ["cls"] * (config.cls_token_id is not None)
    for place, readout in enumerate(readouts):
        run.part_ends = time.perf_counter() + (ends - time.perf_counter()) / (len(readouts) - place)
        looked_at = ([CELL, STATE], state_e[None]) if readout == "state" else ([CELL],)
        reader = Reader(config, "cls" if readout == "cls" else "mean", *looked_at)

        def ours(dtype: torch.dtype | None, n: int, reader: Any = reader) -> np.ndarray:
            given = {"n_layers": layers, "device": run.device, "dtype": dtype}
            return our_perturb(VariantEncoder(model, only_first=reader.only_first, **given), reader, cell, n)

        def published(dtype: torch.dtype, n: int, readout: str = readout) -> np.ndarray:
            genes = genes_of(config, len(cell))
            return published_perturb(plain[dtype], genes, cell.tolist(), state_e, readout, n)

        jobs = {
            "published fp32": (partial(published, FP32), few), "published bf16": (partial(published, BF16), many),
            "ours fp32": (partial(ours, None), few), "ours bf16": (partial(ours, BF16), many),
            "ours fp16": (partial(ours, FP16), few),
        }  # fmt: skip
        sides = {name: partial(work, n) for name, (work, n) in jobs.items()}
        warm = {name: partial(work, one_pass) for name, (work, _) in jobs.items()}
        found = in_turns(run, sides, rounds=3, warm=warm)
        rates = {name: timed.rate(jobs[name][1]) for name, timed in found.items()}
        for name, timed in found.items():
            (work, n), more = jobs[name], differences(found["published fp32"].value, timed.value)
            if timed.median and name.endswith("bf16"):
                more |= busy(run, counts_of_one(run, work, one_pass, 2 * one_pass), timed.median * one_pass / n)
            mfu = run.mfu(timed, n * model_flops(config, [len(cell) - 1], layers))
            run.add(f"{readout}, {n} variants, {name}", timed, n, "variants/s", MFU=mfu, **more)
        run.ratio(readout, rates, "ours bf16", "published fp32", "published bf16", "ours fp32")
        run.variants_per_s[readout] = rates["ours fp32"]


# pretrain


def training_batch(config: GeneformerConfig, lengths: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and labels of some cells end to end, with 15 % of the genes asked for."""
    special = len(cells_between(config, [0])[0])
    rng, ids = np.random.default_rng(seed), np.concatenate(cells_between(config, lengths - special, seed))
    chosen, fate = (rng.random(len(ids)) < 0.15) & (ids >= 4), rng.random(len(ids))
    labels = np.where(chosen, ids, -100)
    ids = np.where(chosen & (fate < 0.9), rng.integers(4, config.vocab_size, len(ids)), ids)
    return np.where(chosen & (fate < 0.8), 1, ids), labels


@dataclass
class Training:
    """A model in training, and the batches it is shown over and over, with bf16 autocast."""

    model: Any
    batches: list[dict[str, Any]]
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Make one step; the batch is copied when it is needed, as Trainer does."""
        device = self.model.device
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.autocast(device.type, BF16):
            loss = self.model(**moved).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def show_all(self) -> None:
        self.losses += torch.stack([self.step(batch) for batch in self.batches]).tolist()


def part_pretrain(run: Run) -> None:
    ends = run.part_ends
    for n_cells, share in zip(run.sizes.train_cells, (0.7, 1.0), strict=True):
        run.part_ends = time.perf_counter() + (ends - time.perf_counter()) * share
        pretrain(run, n_cells, with_stock=n_cells == run.sizes.train_cells[0])
        release(run)


def pretrain(run: Run, n_cells: int, *, with_stock: bool) -> None:
    from geneformer_hf.data.packing import pack_cells, pad_cells
    from geneformer_hf.models.attention import PACKED_ATTENTION

    config, n_batches = run.config(), run.sizes.train_batches
    longest = config.max_position_embeddings
    drawn = np.random.default_rng(0).lognormal(np.log(0.4 * longest), 0.4, (n_batches, n_cells))
    lengths = np.clip(drawn, 0.14 * longest, longest).astype(int)
    data = [training_batch(config, part, seed) for seed, part in enumerate(lengths)]
    trainings: dict[str, Training] = {}
    for dropout in (0.0, 0.1):
        model = our_model(run, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        if with_stock:
            padded = [pad_cells(part, *both, pad=0) for part, both in zip(lengths, data, strict=True)]
            trainings[f"stock, dropout {dropout}"] = Training(stock_model(model), padded)
        model.set_attn_implementation(PACKED_ATTENTION)
        packed = [pack_cells(part, *both) for part, both in zip(lengths, data, strict=True)]
        trainings[f"ours, dropout {dropout}"] = Training(model, packed)
    found = in_turns(run, {name: training.show_all for name, training in trainings.items()}, rounds=3)
    tokens, n_labels = int(lengths.sum()), sum(int((labels != -100).sum()) for _, labels in data)
    head = 2 * (config.hidden_size**2 + config.hidden_size * config.vocab_size) * n_labels
    flops = 3 * (model_flops(config, lengths.ravel(), config.num_hidden_layers) + head)
    rates = {name: timed.rate(tokens) for name, timed in found.items()}
    for name, timed in found.items():
        training, more = trainings[name], {"MFU": run.mfu(timed, flops), "MFLOP a token": flops / tokens / 1e6}
        if timed.median:
            step = timed.median / n_batches
            more |= {"ms a step": step * 1e3, "first loss": training.losses[0], "losses": training.losses}
            more |= busy(run, counts(run, partial(training.step, training.batches[0])), step)
        what = f"{n_batches} steps of {n_cells} cells, {tokens // n_batches:,} tokens, {name}"
        run.add(what, timed, tokens, "tokens/s", **more)
    for dropout in (0.0, 0.1):
        run.ratio(f"{n_cells} cells", rates, f"ours, dropout {dropout}", f"stock, dropout {dropout}")


# attention


@dataclass
class Packed:
    """Queries, keys and values of packed cells, and torch's ways to attend over them; all give `(t, heads, d)`."""

    run: Run
    lengths: list[int]
    dtype: torch.dtype = BF16

    def __post_init__(self) -> None:
        config, device = self.run.config(), self.run.device
        self.heads = config.num_attention_heads
        shape = (sum(self.lengths), self.heads, config.hidden_size // self.heads)
        torch.manual_seed(0)
        *qkv, self.gradient = [torch.randn(shape, device=device, dtype=BF16).to(self.dtype) for _ in range(4)]
        self.qkv = [x.requires_grad_() for x in qkv]
        borders = torch.tensor([0, *np.cumsum(self.lengths).tolist()], dtype=torch.int32, device=device)
        self.borders, self.longest = borders, max(self.lengths)
        self.where = (borders, borders, self.longest, self.longest)
        squares = (np.array(self.lengths, dtype=np.float64) ** 2).sum()
        self.flops = 4.0 * config.hidden_size * float(squares)

    def varlen(self) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*self.qkv, *self.where)

    def flash(self, dropout: float) -> torch.Tensor:
        return torch.ops.aten._flash_attention_forward(*self.qkv, *self.where, dropout, False, False)[0]

    def efficient(self, dropout: float) -> torch.Tensor:
        rows = [x[None] for x in self.qkv]
        return torch.ops.aten._efficient_attention_forward(*rows, None, *self.where, dropout, 0, True)[0][0]

    def views(self) -> list[torch.Tensor]:
        return [x.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2) for x in self.qkv]

    def dense(self, backend: SDPBackend | None, dropout: float = 0.0, mask: Any = None) -> torch.Tensor:
        if backend is not None and not self.run.cuda:
            msg = f"{backend.name} needs a CUDA device"
            raise NotImplementedError(msg)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            context = F.scaled_dot_product_attention(*self.views(), attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).flatten(0, 1)

    def today(self, dropout: float) -> torch.Tensor:
        """What this package does today where the variable-length kernel is not taken."""
        from geneformer_hf.models.attention import _Padded

        layout = _Padded(self.borders.diff(), longest=self.longest)
        context = layout.attend(*(x.flatten(1) for x in self.qkv), heads=self.heads, dropout=dropout)
        return context.unflatten(-1, (self.heads, -1))

    @torch.no_grad()
    def exact(self) -> torch.Tensor:
        """Fp32 attention of each cell by itself."""
        cells = zip(*(x.float().split(self.lengths) for x in self.qkv), strict=True)
        by_head = ([x.transpose(0, 1)[None] for x in cell] for cell in cells)
        return torch.cat([F.scaled_dot_product_attention(*cell)[0].transpose(0, 1) for cell in by_head])

    def choice(self, dropout: float = 0.0, mask: Any = None) -> str:
        """Return which kernel torch takes by default."""
        chosen = torch._fused_sdp_choice(*self.views(), attn_mask=mask, dropout_p=dropout)
        return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()

    def backward_of(self, work: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        """Return what runs backward through one forward pass, over and over."""
        kept: list[torch.Tensor] = []

        def backward() -> Any:
            kept.extend([] if kept else [work()])
            return torch.autograd.grad(kept[0], self.qkv, self.gradient, retain_graph=True)

        return backward


def part_attention(run: Run) -> None:
    ends = run.part_ends
    run.part_ends = time.perf_counter() + run.left() * 0.4
    first_calls(run)
    run.part_ends = ends
    equal = [[length] * (run.sizes.tokens // length) for length in run.sizes.lengths]
    for lengths in (equal[0], ragged_lengths(run), *equal[1:]):
        attention_rates(run, lengths)


def attention_rates(run: Run, lengths: list[int]) -> None:
    half, full = Packed(run, lengths), Packed(run, lengths, FP32)
    ways: dict[str, tuple[Packed, Callable[[], torch.Tensor]]] = {
        "varlen": (half, half.varlen),
        "varlen, dropout 0.1": (half, partial(half.flash, 0.1)),
        "efficient over borders, fp32": (full, partial(full.efficient, 0.0)),
        "efficient over borders, fp32, dropout 0.1": (full, partial(full.efficient, 0.1)),
        "ours padded": (half, partial(half.today, 0.0)),
        "ours padded, dropout 0.1": (half, partial(half.today, 0.1)),
        "ours padded, fp32": (full, partial(full.today, 0.0)),
    }
    shape = f"{len(lengths)} ragged cells"
    if len(set(lengths)) == 1:
        shape = f"{len(lengths)} cells of {lengths[0]:,}"
        for name in ("CUDNN", "FLASH", "EFFICIENT"):
            ways[f"dense {name.lower()}"] = (half, partial(half.dense, getattr(SDPBackend, f"{name}_ATTENTION")))
        ways |= {
            f"dense default ({half.choice()})": (half, partial(half.dense, None)),
            f"dense default ({half.choice(0.1)}), dropout 0.1": (half, partial(half.dense, None, 0.1)),
            f"dense default ({full.choice()}), fp32": (full, partial(full.dense, None)),
        }
    ahead = in_turns(
        run,
        {name: torch.no_grad()(work) for name, (_, work) in ways.items()},
        rounds=run.sizes.rounds,
        clock=by_events,
    )
    exact, behind = half.exact(), {}
    for name, timed in ahead.items():
        packed, work = ways[name]
        compared = timed.median and "dropout" not in name
        error = float((timed.value.float() - exact).abs().max()) if compared else None
        timed.value = None
        run.add(f"{shape}, {name}, forward", timed, packed.flops / 1e12, "TFLOP/s", error=error)
        if timed.median:
            behind[name] = packed.backward_of(work)
    for name, timed in in_turns(run, behind, rounds=run.sizes.rounds, clock=by_events).items():
        run.add(f"{shape}, {name}, backward", timed, 2.5 * half.flops / 1e12, "TFLOP/s")


def first_calls(run: Run) -> None:
    """Time the first and the second call of shapes that were never seen: a kernel that builds a plan pays there."""
    cases = [
        ("default, bf16", BF16, 0.0, False),
        ("default, bf16, mask", BF16, 0.0, True),
        ("default, bf16, mask, dropout 0.1", BF16, 0.1, True),
        ("varlen, bf16", BF16, 0.0, False),
        ("default, fp32, mask", FP32, 0.0, True),
    ]
    first, by_case, by_call = run.sizes.new_lengths
    for place, (name, dtype, dropout, masked) in enumerate(cases):
        took: list[list[float]] = []
        chosen, failed = "", Timed()
        # One more than asked for: the first loads libraries.
        for i in range(run.sizes.new_shapes + 1):
            length = first + by_case * place + by_call * i
            if run.left() <= 0:
                break
            packed = Packed(run, [length] * max(1, run.sizes.tokens // length), dtype)
            short_b1 = torch.arange(len(packed.lengths), device=run.device)[:, None]
            keep_bl = torch.arange(length, device=run.device) < length - short_b1
            mask = keep_bl[:, None, None] if masked else None
            varlen = name.startswith("varlen")
            try:
                chosen = "" if varlen else f" ({packed.choice(dropout, mask)})"
                work = packed.varlen if varlen else partial(packed.dense, None, dropout, mask)
                took.append([seconds for _ in range(2) for seconds in both_ways(run, packed, work)])
            except Exception as error:  # noqa: BLE001
                failed.reason = reason_of(error)
                break
        what = f"first call of a new shape, {name}{chosen}"
        if len(took) < 2:
            run.add(what, failed)
            continue
        names = ("ms", "backward ms", "second call ms", "second backward ms")
        medians = dict(zip(names, (1e3 * np.median(took[1:], axis=0)).tolist(), strict=True))
        built = [1e3 * (sum(call[:2]) - sum(call[2:])) for call in took[1:]]
        rate = {"rate": float(np.median(built)), "unit": "ms more than the second", "most": max(built)}
        run.keep({"part": run.part, "what": what, "seconds": took} | medians | rate)


def both_ways(run: Run, packed: Packed, work: Callable[[], torch.Tensor]) -> tuple[float, float]:
    ahead, context = by_wall(run, work)
    return ahead, by_wall(run, partial(torch.autograd.grad, context, packed.qkv, packed.gradient))[0]


# embed


def published_embed(model: Any, config: GeneformerConfig, cells: list[np.ndarray]) -> tuple[np.ndarray, int]:
    order = sorted(range(len(cells)), key=lambda i: -len(cells[i]))
    out = np.empty((len(cells), config.hidden_size), dtype=np.float32)
    starts = range(0, len(order), PADDED_BATCH)
    for start in starts:
        batch = order[start : start + PADDED_BATCH]
        ids = torch.zeros(len(batch), max(len(cells[i]) for i in batch), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(cells[i])], mask[row, : len(cells[i])] = torch.from_numpy(cells[i]), 1
        hidden = published_states(model, ids, mask)
        for row, i in enumerate(batch):
            out[i] = hidden[row, genes_of(config, len(cells[i]))].mean(0).cpu().numpy()
    return out, len(starts)


def our_embed(run: Run, model: Any, cells: list[np.ndarray], dtype: torch.dtype | None) -> tuple[np.ndarray, int]:
    """What `embed_cells` does between tokens and vectors, and the number of passes."""
    from geneformer_hf.models.encoding import PackedEncoder

    encoder = PackedEncoder(model, n_layers=model.config.num_hidden_layers - 1, device=run.device, dtype=dtype)
    offsets = np.concatenate(([0], np.cumsum([len(cell) for cell in cells])))
    out, passes = np.empty((len(cells), model.config.hidden_size), dtype=np.float32), 0
    with encoder.ready():
        for done in encoder.encode(np.concatenate(cells), offsets, np.arange(len(cells))):
            parts = done.hidden.split(done.lengths)
            pooled = torch.stack([part[genes_of(model.config, len(part))].float().mean(0) for part in parts])
            out[done.cells], passes = pooled.cpu().numpy(), passes + 1
    return out, passes


def part_embed(run: Run) -> None:
    model = our_model(run)
    config, rng = model.config, np.random.default_rng(0)
    cells = cells_between(config, rng.integers(*run.sizes.cell_genes, run.sizes.cells).tolist())
    ours = partial(our_embed, run, model, cells)
    sides = {
        "published fp32": partial(published_embed, stock_model(model), config, cells),
        "ours fp32": partial(ours, None),
        "ours bf16": partial(ours, BF16),
        "published bf16": partial(published_embed, stock_model(model, BF16), config, cells),
        "ours tf32": partial(tf32, partial(ours, None)),
    }
    found, tokens = in_turns(run, sides, rounds=3), sum(map(len, cells))
    rates = {name: timed.rate(len(cells)) for name, timed in found.items()}
    exact, _ = found["published fp32"].value or (None, 0)
    for name, timed in found.items():
        vectors, passes = timed.value or (None, None)
        flops = model_flops(config, [len(cell) for cell in cells], config.num_hidden_layers - 1)
        more = {"MFU": run.mfu(timed, flops), "passes": passes} | differences(exact, vectors)
        if timed.median and name.endswith("bf16"):
            counted = busy(run, counts(run, sides[name]), timed.median)
            more |= {k: v / passes if k in ("kernels", "copies", "waits") else v for k, v in counted.items()}
        run.add(f"{len(cells)} cells, {tokens:,} tokens, {name}", timed, len(cells), "cells/s", **more)
    run.ratio("cells", rates, "ours bf16", "published fp32", "published bf16", "ours fp32")


# layer


def part_layer(run: Run) -> None:
    from geneformer_hf.models.attention import run_layers

    model, n = our_model(run), run.sizes.genes + 1
    equal, ragged = [n] * (run.sizes.tokens // n), ragged_lengths(run)
    models = {"fp32": model, "bf16": our_model(run).to(BF16), "fp16": our_model(run).to(FP16)}
    stock = stock_model(model, BF16)
    hidden_te = torch.randn(run.sizes.tokens, model.config.hidden_size, device=run.device)

    def ours(kind: str, lengths: list[int], layers: int, *, autocast: bool = False) -> None:
        hidden = hidden_te[: sum(lengths)].to(next(models[kind].parameters()).dtype)
        with torch.inference_mode(), torch.autocast(run.device.type, BF16, enabled=autocast):
            run_layers(models[kind].bert.encoder.layer[:layers], hidden, lengths)

    def published(layers: int) -> None:
        hidden = hidden_te[: sum(equal)].to(BF16).unflatten(0, (len(equal), n))
        with torch.no_grad():
            for layer in stock.bert.encoder.layer[:layers]:
                found = layer(hidden)
                hidden = found[0] if isinstance(found, tuple) else found

    ways = {
        "stock, bf16 weights, equal cells": (published, equal),
        "ours, bf16 autocast, equal cells": (partial(ours, "fp32", equal, autocast=True), equal),
        "ours, bf16 autocast, ragged cells": (partial(ours, "fp32", ragged, autocast=True), ragged),
        "ours, bf16 weights, equal cells": (partial(ours, "bf16", equal), equal),
        "ours, fp16 weights, equal cells": (partial(ours, "fp16", equal), equal),
        "ours, fp32, equal cells": (partial(ours, "fp32", equal), equal),
    }
    sides = {name: partial(work, LAYERS) for name, (work, _) in ways.items()}
    for name, timed in in_turns(run, sides, rounds=run.sizes.rounds).items():
        work, lengths = ways[name]
        timed.seconds = [seconds / LAYERS for seconds in timed.seconds]
        more = counts_of_one(run, work, 1, LAYERS, LAYERS - 1) if timed.median else {}
        run.add(f"one layer, {name}", timed, model_flops(model.config, lengths, 1) / 1e12, "TFLOP/s", **more)


# screen


def screen_stages(run: Run, model: Any, readout: str, state_e: torch.Tensor, cell: np.ndarray) -> dict[str, float]:
    """Estimate what deleting each gene of a cell does, as `CellScreener` does; return the seconds of each stage."""
    from geneformer_hf.models.first_order import ScanEstimate
    from geneformer_hf.models.scan import CellScan

    genes, first, stages = genes_of(model.config, len(cell)), readout == "cls", {}
    n, looked_at = genes.stop - genes.start, slice(0, 1) if first else genes

    def stage(name: str, work: Callable[[], Any]) -> Any:
        stages[name], value = by_wall(run, work)
        return value

    def scanned() -> ScanEstimate:
        with torch.no_grad():
            ids = torch.from_numpy(cell).to(run.device)
            scan = CellScan(model.base_model, ids, first_gene=genes.start, to_top=False)
        layers = model.config.num_hidden_layers - 1
        return ScanEstimate(scan, n_genes=n, n_layers=layers, anchors=4, only_first=first)

    path = stage("scan", scanned)
    anchors = stage("anchors", lambda: path.anchor_states)
    original = stage("original", lambda: path.original_states)

    def nearness(hidden_xe: torch.Tensor, weight_x: torch.Tensor) -> torch.Tensor:
        own_e = weight_x[looked_at] @ hidden_xe[looked_at] / weight_x[looked_at].sum()
        return (F.normalize(own_e.float(), dim=0) @ state_e)[None]

    def way(hidden_xe: torch.Tensor) -> torch.Tensor:
        before_xe = F.normalize(original[looked_at].float(), dim=1)
        return (F.normalize(hidden_xe[looked_at].float(), dim=1) - before_xe) / len(before_xe) ** 0.5

    def along(hidden_xe: torch.Tensor, weight_x: torch.Tensor) -> torch.Tensor:
        weight_x1 = 1.0 if first else weight_x[looked_at, None]
        return (directions_kxe * (way(hidden_xe) * weight_x1)).sum((1, 2))

    if readout == "state":
        stage("exact readouts", lambda: [float(nearness(h, h.new_ones(len(h)))) for h in [*anchors, original]])
        stage("slopes", lambda: path.slopes(nearness))
        return stages
    ways_ad = stage("ways", lambda: torch.stack([way(hidden).flatten() for hidden in anchors]))
    found = stage("SVD on the CPU", lambda: torch.linalg.svd(ways_ad.cpu(), full_matrices=False).Vh[:2].to(run.device))
    directions_kxe = found.unflatten(1, original[looked_at].shape)
    stage("slopes", lambda: path.slopes(along))
    return stages


def part_screen(run: Run) -> None:
    model = our_model(run).requires_grad_(False)
    cells = cells_between(model.config, [run.sizes.genes] * run.sizes.screened)
    state_e = F.normalize(torch.randn(model.config.hidden_size, device=run.device), dim=0)
    for readout in ["state", "mean"] + ["cls"] * (model.config.cls_token_id is not None):
        estimate, total = partial(screen_stages, run, model, readout, state_e), Timed()
        first_run(run, total, partial(estimate, cells[0]))
        taken = [estimate(cell) for cell in cells] if total.first is not None else []
        for name in taken[0] if taken else ():
            run.add(f"{readout}, {name}", Timed([stages[name] for stages in taken]))
        total.seconds = [sum(stages.values()) for stages in taken]
        more = busy(run, counts(run, partial(estimate, cells[0])), total.median) if total.median else {}
        run.add(f"{readout}, all stages", total, 1, "cells/s", **more)
        exact = run.variants_per_s.get(readout)
        rates = {"estimates": total.rate(1), "running every gene in fp32": exact / run.sizes.genes if exact else None}
        run.ratio(readout, rates, "estimates", "running every gene in fp32")


# The run


PARTS: dict[str, tuple[Callable[[Run], None], float, float]] = {
    # What is run, its share of the time, and the fewest seconds it is begun with.
    "card": (part_card, 4, 0), "gemm": (part_gemm, 8, 3), "perturb": (part_perturb, 75, 15),
    "pretrain": (part_pretrain, 60, 15), "attention": (part_attention, 60, 10), "embed": (part_embed, 55, 15),
    "layer": (part_layer, 15, 5), "screen": (part_screen, 20, 5),
}  # fmt: skip


def release(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def do_part(run: Run, name: str, shares: dict[str, float]) -> dict[str, Any]:
    """Run one part within its share of the time that is left, and say how that ended."""
    (work, _, fewest), started, status = PARTS[name], time.perf_counter(), "done"
    left = run.ends - started
    if left <= (0 if run.tiny else fewest):
        return {"status": NO_TIME}
    run.part, run.part_ends = name, started + left * shares[name] / sum(shares.values())
    try:
        work(run)
        run.sync()
    except Exception as error:  # noqa: BLE001
        status = reason_of(error)
        print(f"{name} | {status}", flush=True)
    try:
        release(run)
    except RuntimeError as error:
        status = f"error: the device is lost: {reason_of(error)}"
    return {"status": status, "seconds": time.perf_counter() - started}


def shown(value: Any, name: str = "") -> str:
    if name in ("MFU", "busy", "spread"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cells_of(row: dict[str, Any]) -> list[str]:
    """Return a row of the table: part, what, milliseconds, rate, and everything else that is one value."""
    rate = f"{shown(row['rate'])} {row['unit']}" if "rate" in row else row.get("status", "")
    taken = ("part", "what", "ms", "rate", "unit", "status", "repeats")
    rest = [k for k, v in row.items() if k not in taken and isinstance(v, int | float | str)]
    remarks = "; ".join(f"{name} {shown(row[name], name)}" for name in rest)
    cells = [row["part"], row["what"], shown(row.get("ms", "")), rate, remarks]
    return [cell.replace("|", "/") for cell in cells]


def table_of(content: dict[str, Any]) -> str:
    lines = [f"- {name}: {shown(value)}" for name, value in content["about"].items() if not isinstance(value, dict)]
    lines += ["", "| part | what | ms | rate | remarks |", "|---|---|---:|---:|---|"]
    for name, part in content["parts"].items():
        lines += ["| " + " | ".join(cells_of(row)) + " |" for row in part["rows"]]
        if part["status"] != "done":
            lines.append(f"| {name} | | | {part['status'].replace('|', '/')} | |")
    return "\n".join(lines) + "\n"


def save(path: Path, text: str) -> None:
    """Write a file in one step, so that there is always one to read."""
    new = path.with_name(path.name + ".partial")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help="JSON, written again after each part")
    parser.add_argument("--table", type=Path, help="the table in Markdown, which is printed in any case")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all parts together")
    parser.add_argument("--preset", default="Geneformer-V2-104M")
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU unless a device is named")
    args, started = parser.parse_args(argv), time.perf_counter()
    device = resolve_device(args.device or ("cpu" if args.tiny else None))
    if device.type != "cuda" and not args.tiny:
        print("There is no CUDA device here. --tiny runs every part on the CPU, in shapes that say nothing of speed.")
        return 2
    if device.type == "cuda" and device.index is None:
        # Models say where they are with a number, and what is compared with that is this.
        device = torch.device("cuda", torch.cuda.current_device())
    run = Run(device, args.preset, args.tiny, ends=started + args.seconds)
    command = shlex.join(["python", "benchmarks/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, **about(run)}
    content: dict[str, Any] = {"about": facts | {"sizes": asdict(run.sizes)}, "parts": {}}
    shares = {name: PARTS[name][1] for name in args.parts}
    for name in list(shares):
        run.rows = []
        content["parts"][name] = do_part(run, name, shares) | {"rows": run.rows}
        content["about"]["seconds"] = time.perf_counter() - started
        del shares[name]
        if args.out:
            save(args.out, json.dumps(content, indent=1, default=float) + "\n")
    table = table_of(content)
    print(f"\n{table}")
    if args.table:
        save(args.table, table)
    return int(any(part["status"] not in ("done", NO_TIME) for part in content["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
