"""Checkpoints as ONNX graphs, for runtimes without torch: the encoder and its head, with any number of cells and any length."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from torch import nn

from ..data.dataset_cards import card
from ..errors import CheckpointError, MissingExtraError
from ..models.adapters import base_folders, is_adapter, is_quantized
from ..models.checkpoints import TAGS
from ..models.heads import heads_of
from ..models.loading import load_model, tokenizer_of
from ..models.modeling_geneformer import GeneformerForMaskedLM, GeneformerForTokenClassification, GeneformerModel
from ..models.places import local_folder
from ..outputs import new_folder, require_apart, require_free
from .export import merged_model

ENCODER, HEAD = "encoder.onnx", "head.onnx"
OUTPUTS = ("last_hidden_state", "second_to_last_hidden_state")
TOLERANCE = 1e-4
"""Most that a number of ONNX Runtime may differ from torch's, relative to the largest: they add up in another order."""
SOME_LENGTHS = (2, 37, 64)
# The exporter keeps axes apart by what their sizes are when it looks.
_TRACED = (3, 11)


@dataclass(frozen=True)
class OnnxExport:
    """What an export made, and how it compares with torch on the same cells."""

    output: Path
    files: list[str]
    error: float
    """Largest difference of any output in 32 bit, relative to the largest number of that output."""
    int8_error: float | None
    """The same of the 8-bit encoder's last hidden states: mean over tokens of the relative distance of their vectors."""


def export_onnx(model: str | Path, output: str | Path, *, int8: bool = False, overwrite: bool = False) -> OnnxExport:
    """Write a checkpoint as ONNX: `encoder.onnx`, `head.onnx` where it has a head, tokenizer and configuration.

    The encoder takes `input_ids` and `attention_mask` of shape `(b, l)` and gives `last_hidden_state` and `second_to_last_hidden_state`, `(b, l, e)`.
    The head takes `last_hidden_state` (of cells also the other two) and gives `logits`, of several tasks `logits_TASK`. Both are run with ONNX
    Runtime and compared with torch, on several lengths, before success is reported.

    Args:
        model (`str` or `Path`): folder or Hub id of a Geneformer checkpoint; an adapter is merged into its base.
        output (`str` or `Path`): a new folder.
        int8 (`bool`, *optional*, defaults to `False`): also write `encoder_int8.onnx`, whose linear layers and embeddings hold 8-bit weights, and which quantises
            activations as they come: a quarter of the size, faster on CPUs with large models, less exact.
        overwrite (`bool`, *optional*, defaults to `False`): replace the output if it exists.

    Raises:
        CheckpointError: if the model was saved quantised, or an output differs.
        MissingExtraError: without onnx, onnxscript and onnxruntime.
        OutputExistsError
    """
    _require_packages()
    folder = local_folder(model)
    require_apart(output, [folder, *base_folders(folder)])
    require_free(Path(output), overwrite=overwrite, made_by="export", of=str(folder.resolve()))
    loaded = merged_model(model) if is_adapter(folder) else load_model(model)
    if is_quantized(loaded):
        msg = f"{model} was saved quantised. Export the checkpoint it was made from; `int8=True` (--int8) quantises the ONNX encoder."
        raise CheckpointError(msg)
    loaded = loaded.float()
    loaded.set_attn_implementation("sdpa")
    tokenizer = tokenizer_of(loaded)
    with new_folder(output, made_by="export", of=str(folder.resolve()), overwrite=overwrite) as partial:
        _trace(_Encoder(loaded.base_model), partial / ENCODER, ["input_ids", "attention_mask"], list(OUTPUTS), loaded.config)
        if not isinstance(loaded, GeneformerModel):
            _trace(_Head(loaded), partial / HEAD, _inputs_of_head(loaded), _names_of_logits(loaded), loaded.config)
        error = _require_equal(loaded, partial)
        int8_error = None
        if int8:
            _quantize(partial / ENCODER, partial / "encoder_int8.onnx")
            int8_error = _int8_error(loaded, partial / "encoder_int8.onnx")
        loaded.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        made = {
            "opset": _opset(partial / ENCODER),
            "error": error,
            "int8_error": int8_error,
            "outputs": [*OUTPUTS, *(_names_of_logits(loaded) if (partial / HEAD).is_file() else [])],
        }
        (partial / "README.md").write_text(_card(loaded, Path(model).name, int8_error), encoding="utf-8")
        (partial / "onnx.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        files = sorted(path.name for path in partial.iterdir())
    return OnnxExport(Path(output), files, error, int8_error)


class _Encoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True)
        return found.last_hidden_state, found.hidden_states[-2]


class _Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: torch.Tensor) -> Any:
        if isinstance(self.model, GeneformerForMaskedLM):
            return self.model.cls(given[0])
        return self.model.head(*given)


def _inputs_of_head(model: Any) -> list[str]:
    return (
        ["last_hidden_state"]
        if isinstance(model, (GeneformerForMaskedLM, GeneformerForTokenClassification))
        else ["last_hidden_state", "input_ids", "attention_mask"]
    )


def _names_of_logits(model: Any) -> list[str]:
    heads = [] if isinstance(model, (GeneformerForMaskedLM, GeneformerForTokenClassification, GeneformerModel)) else heads_of(model.config)
    return [f"logits_{head.name}" for head in heads] if model.config.task_labels else ["logits"]


def _some_cells(config: Any, n: int, length: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return cells of random genes, the later ones shorter and padded."""
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, config.vocab_size, (n, length), generator=draw)
    lengths = torch.tensor([max(2, length - 3 * i) for i in range(n)]).clamp(max=length)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    for token, places in ((config.cls_token_id, torch.zeros(n, dtype=torch.long)), (config.eos_token_id, lengths - 1)):
        if token is not None:
            input_ids[torch.arange(n), places] = token
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, config.pad_token_id), "attention_mask": attention_mask}


def _trace(module: nn.Module, path: Path, inputs: Sequence[str], outputs: Sequence[str], config: Any) -> None:
    """Write the graph of a module."""
    cells = _some_cells(config, *_TRACED)
    given: dict[str, torch.Tensor] = {**cells, "last_hidden_state": torch.randn(*_TRACED, config.hidden_size)}
    axes = {0: torch.export.Dim("cells", min=1), 1: torch.export.Dim("length", min=2, max=config.max_position_embeddings)}
    arguments = tuple(given[name] for name in inputs)
    # The head takes its inputs as they come.
    dynamic: Any = (tuple(axes for _ in inputs),) if isinstance(module, _Head) else tuple(axes for _ in inputs)
    verbosity = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), torch.no_grad():
        # Of its own workings.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                module.eval(), arguments, str(path), input_names=list(inputs), output_names=list(outputs), dynamic_shapes=dynamic, dynamo=True, verbose=False, external_data=_is_large(module)
            )  # fmt: skip
        finally:
            logging.getLogger("torch.onnx").setLevel(verbosity)


def _is_large(module: nn.Module) -> bool:
    """Return whether the weights may not fit into one file of the format, which ends at 2 GiB."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) > 1_900_000_000


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, given: dict[str, Any]) -> dict[str, np.ndarray]:
    names = {one.name for one in session.get_inputs()}
    arrays = {name: np.asarray(value) for name, value in given.items() if name in names}
    return dict(zip((one.name for one in session.get_outputs()), session.run(None, arrays), strict=True))


def _require_equal(model: Any, folder: Path) -> float:
    """Run both graphs beside torch on cells of several lengths; return the largest relative difference.

    Raises:
        CheckpointError: if it is too large.
    """
    encoder, head = _session(folder / ENCODER), _session(folder / HEAD) if (folder / HEAD).is_file() else None
    worst, reference = 0.0, _Encoder(model.base_model).eval()
    for n, length in enumerate(SOME_LENGTHS, start=1):
        cells = _some_cells(model.config, n, min(length, model.config.max_position_embeddings), seed=n)
        with torch.inference_mode():
            expected = dict(zip(OUTPUTS, reference(**cells), strict=True))
            if head is not None:
                inputs = [({**cells, **expected})[name] for name in _inputs_of_head(model)]
                logits = _Head(model).eval()(*inputs)
                expected |= dict(zip(_names_of_logits(model), logits if isinstance(logits, tuple) else (logits,), strict=True))
        found = _run(encoder, cells)
        if head is not None:
            found |= _run(head, {**cells, **found})
        real = cells["attention_mask"].bool().numpy()
        for name, tensor in expected.items():
            ours, theirs = found[name], tensor.numpy()
            if ours.shape != theirs.shape:
                msg = f"{name} has the shape {ours.shape} in ONNX Runtime and {theirs.shape} in torch. Nothing was written; please report this."
                raise CheckpointError(msg)
            # What stands at pads means nothing.
            per_token = ours.ndim == 3
            difference = np.abs(ours - theirs)[real] if per_token else np.abs(ours - theirs)
            worst = max(worst, float(difference.max() / max(np.abs(theirs).max(), 1e-12)))
    if not worst < TOLERANCE:
        msg = f"outputs of ONNX Runtime differ from torch's by {worst:.1e} of the largest number, more than {TOLERANCE:.0e}. Nothing was written; please report this."
        raise CheckpointError(msg)
    return worst


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    # It advises on the root logger.
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            use_external_data_format=(source.parent / f"{source.name}.data").is_file(),
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)


def _int8_error(model: Any, path: Path) -> float:
    """Return the mean over tokens of how far the 8-bit vectors lie from torch's, relative to their length."""
    cells = _some_cells(model.config, 4, min(64, model.config.max_position_embeddings), seed=7)
    with torch.inference_mode():
        expected = _Encoder(model.base_model).eval()(**cells)[0].numpy()
    found = _run(_session(path), cells)[OUTPUTS[0]]
    real = cells["attention_mask"].bool().numpy()
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1))[real].mean())


def _card(model: Any, name: str, int8_error: float | None) -> str:
    logits = ", ".join(f"`{one}`" for one in _names_of_logits(model))
    lines = [
        f"# {name} (ONNX)",
        "",
        f"A {type(model).__name__} of geneformer_hf for ONNX Runtime. `{ENCODER}`: `input_ids` and `attention_mask` in, {' and '.join(f'`{one}`' for one in OUTPUTS)} out.",
        *([f"`{HEAD}`: {', '.join(f'`{one}`' for one in _inputs_of_head(model))} in, {logits} out."] if not isinstance(model, GeneformerModel) else []),
        *([f"`encoder_int8.onnx`: the encoder in 8 bits; its vectors lie {int8_error:.1%} off, on random cells."] if int8_error is not None else []),
        "",
        "```python",
        "import onnxruntime",
        "from geneformer_hf import GeneformerTokenizer",
        "",
        'cells = GeneformerTokenizer.from_pretrained("FOLDER")(adata, padding=True, return_tensors="np")',
        f'session = onnxruntime.InferenceSession("FOLDER/{ENCODER}")',
        'last, second_to_last = session.run(None, {"input_ids": cells["input_ids"], "attention_mask": cells["attention_mask"]})',
        "```",
    ]
    return card(ModelCardData(library_name="onnx", tags=[*TAGS, "onnx"]), "\n".join(lines))


def _opset(path: Path) -> int:
    import onnx

    return int(onnx.load(str(path), load_external_data=False).opset_import[0].version)


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"ONNX needs {', '.join(missing)}. Install with `pip install 'geneformer-hf[onnx]'`."
        raise MissingExtraError(msg)
