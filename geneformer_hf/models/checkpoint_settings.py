"""Settings of a checkpoint (`config.json`, `adapter_config.json`, …) checked before transformers or PEFT act on them.

Both libraries resolve some fields by importing a module, opening a file or downloading code. Such fields are refused by
name; nothing that a file of settings says is imported or fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from ..input_files import read_json_object, require_regular
from .attention import PACKED_ATTENTION
from .config_fields import check_fields

ATTENTION = (None, "eager", "sdpa", "flex_attention", PACKED_ATTENTION)
"""Attention functions that a file may name: those that are part of transformers and of this package."""
NUMBER_TYPES = (None, "float32", "float16", "bfloat16", "float64", "auto")
QUANTIZATION_TEXTS = {
    "quant_method": ("bitsandbytes",),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("float32", "float16", "bfloat16"),
    "bnb_4bit_quant_storage": ("uint8", "float32", "float16", "bfloat16"),
}
LARGEST_RANK = 8192
"""Rank of an adapter, beyond which it is larger than any base."""
CODE_FIELDS = ("auto_map", "custom_pipelines", "transformers_weights", "use_kernels", "kernel_config", "custom_generate")
"""Fields of `config.json` and `tokenizer_config.json` that name code, or files of weights elsewhere."""

PREFIX_TUNERS = ("PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT")
"""Adapters that go around the heads of a Geneformer: pooling, label units and class weights would not be applied."""
MODULE_PATTERNS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters", "feedforward_modules"),
    "trainable_token_indices",
)
"""Fields of `adapter_config.json` that name layers of the model."""
LAYER_NUMBERS = ("rank_pattern", "alpha_pattern")
"""Fields that give numbers to layers by their names."""
MOST_PATTERN = 300
MOST_QUANTIFIERS = 4
MOST_GROUPS = 3
"""Characters, repeats and groups of an expression that names layers: matching it against a name then takes no time to speak of."""
_CHOICES = {
    "peft_type": re.compile(r"[A-Z0-9_]{1,40}"),
    "task_type": re.compile(r"[A-Z0-9_]{1,40}"),
    "peft_version": re.compile(r"[\w.+@-]{1,60}"),
    "revision": re.compile(r"(?!.*\.\.)[\w.-]{1,100}(/[\w.-]{1,100}){0,3}"),
    "bias": re.compile(r"none|all|[a-z0-9]{1,20}_only"),
    "init_lora_weights": re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,4})?"),
    "init_weights": re.compile(r"[a-z_]{1,40}"),
    "megatron_core": re.compile(r"megatron\.core"),
    # Words that choose a branch of PEFT's own code: DEFT, GLoRA, PSOFT, RoAd, SHiRA, WaveFT, Peanut.
    "decomposition_method": re.compile(r"relu|qr"),
    "config_A_B": re.compile(r"lora|vector|constant|none"),
    "config_C": re.compile(r"lora|vector|none"),
    "config_D_E": re.compile(r"vector|constant|none"),
    "ab_svd_init": re.compile(r"psoft_init|pissa_init"),
    "psoft_svd": re.compile(r"full|lowrank"),
    "variant": re.compile(r"road_[124]"),
    "mask_type": re.compile(r"random"),
    "wavelet_family": re.compile(r"[a-z]{1,10}\d{0,3}(\.\d)?"),
    "act_fn": re.compile(r"[a-z]\w{0,30}"),
}
_PARENT_LIBRARIES = ("geneformer_hf.models.modeling_geneformer", "transformers.models.bert.modeling_bert")
_QUANTIFIER = re.compile(r"[*+{]|(?<!\()\?")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def check_folder(folder: Path) -> None:
    """Check the settings files that a checkpoint folder holds.

    Raises:
        CheckpointError: naming the file, the field, its value and what is expected.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        # Weights among them: opening a pipe would wait without end.
        require_regular(path, error=CheckpointError)
    for name, check in (
        ("config.json", check_config),
        ("tokenizer_config.json", check_code_fields),
        ("adapter_config.json", check_adapter_config),
        ("tokenizer.json", _check_nothing_more),
        ("special_tokens_map.json", _check_nothing_more),
        ("added_tokens.json", _check_nothing_more),
    ):
        if (folder / name).exists():
            check(read_json_object(folder / name, error=CheckpointError), str(folder / name))
    for index in sorted(folder.glob("*.index.json")):
        names = read_json_object(index, error=CheckpointError).get("weight_map")
        values = names.values() if isinstance(names, dict) else ["no weight_map"]
        outside = [v for v in values if not isinstance(v, str) or PurePosixPath(v).name != v or "\0" in v or "\\" in v]
        if outside:
            msg = f"{index}: weight_map names the file {outside[0]!r}; expected plain names of files in the same folder. Nothing was opened; save the model again with save_pretrained."
            raise CheckpointError(msg)
    if (folder / "adapter_config.json").exists() and any(folder.glob("model*.safetensors")):
        msg = f"{folder} holds a complete model (model*.safetensors) and an adapter (adapter_config.json), so it is not clear which is meant. Move one of them to a folder of its own."
        raise CheckpointError(msg)


def _check_nothing_more(settings: Mapping[str, Any], where: str) -> None:
    """Accept any object: that the file holds one of bounded size and depth is what matters."""


def check_code_fields(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that name code or files elsewhere.

    Raises:
        CheckpointError
    """
    for name in CODE_FIELDS:
        if settings.get(name):
            msg = f"{where}: the field {name!r} ({_short(settings[name])}) names code or files outside the checkpoint, which are never run or opened. Remove the field if you trust the rest."
            raise CheckpointError(msg)


def check_config(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a `config.json` that names code, an attention kernel to download, another quantisation than bitsandbytes, or an unknown number type.

    Raises:
        CheckpointError
    """
    check_code_fields(settings, where)
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        value = settings.get(name)
        if not _is_one_of(value, ATTENTION):
            msg = (
                f"{where}: {name} is {_short(value)}, which may be downloaded as code; expected one of {_listed(ATTENTION)}. "
                "Remove the field; to use another function, pass `attn_implementation=` to from_pretrained."
            )
            raise CheckpointError(msg)
    for name in ("dtype", "torch_dtype"):
        value = settings.get(name)
        if not _is_one_of(str(value).removeprefix("torch.") if value is not None else None, NUMBER_TYPES):
            msg = f"{where}: {name} is {_short(value)}; expected one of {_listed(NUMBER_TYPES)}. Remove the field, or name the type of the weights."
            raise CheckpointError(msg)
    check_fields(settings, where)
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if settings.get(name):
            msg = f"{where}: {name} is {_short(settings[name])}; expected false. A Geneformer is an encoder: each gene sees all others."
            raise CheckpointError(msg)
    quantization = settings.get("quantization_config")
    if quantization is not None:
        _check_quantization(quantization if isinstance(quantization, Mapping) else getattr(quantization, "to_dict", lambda: quantization)(), where)


def _check_quantization(settings: Any, where: str) -> None:
    if not isinstance(settings, Mapping):
        msg = f"{where}: quantization_config is {_short(settings)}; expected an object of bitsandbytes settings."
        raise CheckpointError(msg)
    for name, value in settings.items():
        if isinstance(value, Enum):
            value = value.value  # noqa: PLW2901 - the text that a file would hold
        if name in QUANTIZATION_TEXTS:
            allowed: tuple[Any, ...] = (None, *QUANTIZATION_TEXTS[name])
            fits = _is_one_of(str(value).removeprefix("torch.") if value is not None else None, allowed)
        elif name == "llm_int8_skip_modules":
            fits = value is None or (isinstance(value, list) and all(isinstance(v, str) and re.fullmatch(r"[\w.]{1,200}", v) for v in value))
        else:
            fits = value is None or isinstance(value, (bool, int, float))
        if not fits:
            expected = _listed(QUANTIZATION_TEXTS.get(name, ("a number or boolean",)))
            msg = f"{where}: quantization_config.{name} is {_short(value)}; expected {expected}. Only models quantised by bitsandbytes are opened."
            raise CheckpointError(msg)
    if not (settings.get("quant_method") or settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        msg = f"{where}: quantization_config names no method; expected quant_method 'bitsandbytes'. Only models quantised by bitsandbytes are opened."
        raise CheckpointError(msg)


def check_adapter_config(settings: Mapping[str, Any], where: str) -> None:
    """Refuse an `adapter_config.json` with a field that names modules of Python, classes, files or other repositories.

    Numbers, booleans and lists of them pass, text only in fields that are known to hold the names of layers or one of a few
    words. The base model that it names is looked at where it is opened.

    Raises:
        CheckpointError
    """
    kind = settings.get("peft_type")
    if kind in PREFIX_TUNERS:
        msg = (
            f"{where}: peft_type is {kind!r}. Such adapters go around the head of a Geneformer, so pooling, label units and class weights would not be applied. "
            "Train a LoRA adapter (`add_adapter`, `finetune --adapter`)."
        )
        raise CheckpointError(msg)
    pattern = settings.get("rank_pattern")
    ranks = {name: settings.get(name) for name in ("r", "init_r", "target_r", "num_virtual_tokens")} | (dict(pattern) if isinstance(pattern, Mapping) else {})
    for name, rank in ranks.items():
        if rank is not None and not (isinstance(rank, int) and 0 <= rank <= LARGEST_RANK):
            msg = f"{where}: {name} is {_short(rank)}; expected a whole number from 0 to {LARGEST_RANK:,}. Save the adapter again."
            raise CheckpointError(msg)
    for name, value in settings.items():
        if name == "base_model_name_or_path":
            if value is not None and (not isinstance(value, str) or "\0" in value or len(value) > 1000):
                msg = f"{where}: base_model_name_or_path is {_short(value)}; expected the name of a model as text."
                raise CheckpointError(msg)
        elif name == "auto_mapping":
            _check_auto_mapping(value, where)
        elif not _is_plain(name, value):
            msg = (
                f"{where}: the field {name!r} is {_short(value)}, which PEFT may resolve by importing a module, opening a file or downloading another repository. "
                "Expected a number, a boolean, null or, for names of layers, a short pattern. Remove the field, or save the adapter again with its defaults."
            )
            raise CheckpointError(msg)


def _check_auto_mapping(value: Any, where: str) -> None:
    if value is None:
        return
    library = value.get("parent_library") if isinstance(value, Mapping) else value
    cls = value.get("base_model_class") if isinstance(value, Mapping) else None
    if library not in _PARENT_LIBRARIES or not isinstance(cls, str) or not re.fullmatch(r"(Geneformer|Bert)\w{1,60}", cls) or len(value) > 2:
        msg = f"{where}: auto_mapping is {_short(value)}, which names a module to import; expected null or a class of {_listed(_PARENT_LIBRARIES)}. Remove the field; it is not needed."
        raise CheckpointError(msg)


def _is_plain(name: str, value: Any) -> bool:
    """Return whether a field holds what cannot be resolved to anything outside the adapter."""
    if value is None or isinstance(value, bool) or _is_number(value) or value in ({}, []):
        return True
    if name in MODULE_PATTERNS:
        names = value if isinstance(value, list) else [*value] if isinstance(value, Mapping) else [value]
        numbers = value.values() if isinstance(value, Mapping) else ()
        return all(_is_number(v) or (isinstance(v, str) and _is_pattern(v)) for v in names) and all(_is_plain("", v) for v in numbers)
    if isinstance(value, str):
        return name in _CHOICES and _CHOICES[name].fullmatch(value) is not None
    if isinstance(value, list):
        return all(_is_plain("", v) for v in value)
    return name in LAYER_NUMBERS and isinstance(value, Mapping) and all(isinstance(k, str) and _is_pattern(k) and _is_plain("", v) for k, v in value.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_pattern(text: str) -> bool:
    """Return whether a text can be the name of layers: short, no path, no expression that takes forever to match."""
    if len(text) > MOST_PATTERN or "/" in text or "\0" in text or len(_QUANTIFIER.findall(text)) > MOST_QUANTIFIERS or text.count("(") > MOST_GROUPS:
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return _REPEATED_GROUP.search(text) is None


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return value is None or (isinstance(value, str) and value in allowed)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values if value is not None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
