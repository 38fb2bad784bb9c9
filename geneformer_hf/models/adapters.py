"""LoRA adapters and 8-bit or 4-bit weights: the only module that knows peft and bitsandbytes.

What an adapter folder of ours holds beyond peft's own two files: `config.json`, with the head, its labels and the quantisation the
adapter was trained under; so one folder says all that is needed to open it again, but for the weights of its base.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from ..device import resolve_device, resolve_dtype
from ..errors import CheckpointError, MissingExtraError, SettingError
from ..input_files import read_json_object
from .places import Place
from .refusals import OPENING
from .weight_checks import hash_of_weights, needed_weights, require_weights

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
QUANTIZATIONS = ("int8", "nf4")
LORA_TARGETS = {"attention": ["query", "value"], "all-linear": r".*encoder\.layer\.\d+\..*(query|key|value|dense)"}
"""Which linear layers get a low-rank update; peft knows no defaults for our model type."""
HEADS = ("classifier", "classifiers", "attention_pool", "bert.pooler", "cls")
"""New in fine-tuning, or tied to the embeddings: never quantised, and trained and saved whole with an adapter."""
TASK_TYPES = {
    "GeneformerForSequenceClassification": "SEQ_CLS",
    "GeneformerForMultiTaskClassification": "SEQ_CLS",
    "GeneformerForTokenClassification": "TOKEN_CLS",
}
BASE_FINGERPRINT = "geneformer_base"
BASE_SUBFOLDER = "geneformer_base_subfolder"
BASE_SHA256 = "geneformer_base_sha256"
"""What peft has no name for, in our config.json."""


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        msg = "Adapters need peft. Install it with `pip install 'geneformer-hf[quantization]'`."
        raise MissingExtraError(msg) from error
    return peft


def name_default_layers() -> None:
    """Tell peft which layers of a Geneformer a LoRA is for, where a user of peft names none."""
    import peft.utils.constants as known

    # Not documented, and what peft consults.
    known.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("geneformer", LORA_TARGETS["attention"])


def quantization_config(kind: str, *, double: bool = True, compute_dtype: str | torch.dtype = "bf16") -> Any:
    """Return how to load the weights of the encoder's linear layers: 8-bit integers, or 4-bit NormalFloat (QLoRA).

    Embeddings, pooler and heads keep their type. `double` quantises the scales as well, and `compute_dtype` is what 4-bit weights are
    computed in; both are for "nf4" alone.

    Raises:
        SettingError: for a kind that is not "int8" or "nf4".
        MissingExtraError: without bitsandbytes.

    Source: Dettmers et al. 2022 (LLM.int8()); Dettmers et al. 2023 (QLoRA).
    """
    if kind not in QUANTIZATIONS:
        msg = f"quantization {kind!r} is not one of {', '.join(map(repr, QUANTIZATIONS))}."
        raise SettingError(msg)
    if importlib.util.find_spec("bitsandbytes") is None:
        msg = f"quantization {kind!r} needs bitsandbytes. Install it with `pip install 'geneformer-hf[quantization]'`, or pass quantization='none' to load an adapter on plain weights."
        raise MissingExtraError(msg)
    from transformers import BitsAndBytesConfig

    # It tells at every layer of every call that 8-bit layers compute in half precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # This list takes the place of transformers' own, which would hold the output head.
    skipped = list(HEADS)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=resolve_dtype(compute_dtype),
        llm_int8_skip_modules=skipped,
    )


def open_weights(
    model_class: Any,
    place: str | Path | Place,
    config: Any,
    *,
    quantization: Any = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> Any:
    """Return a model with the weights at `place`, quantised on the way where a config says so.

    With `quiet`, transformers does not tell which weights are new: for heads that are about to be trained, or come with an adapter.
    """
    if isinstance(place, Place):
        kwargs |= {"subfolder": place.subfolder, "revision": place.revision}
        place = place.name
    if quantization is not None:
        # Weights are packed for one device, so it is decided now.
        kwargs |= {"quantization_config": quantization, "device_map": {"": str(resolve_device(device))}}
    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        # Of parts of bitsandbytes for machines that this is not.
        warnings.filterwarnings("ignore", category=FutureWarning)
        if quiet:
            transformers_logging.set_verbosity_error()
        try:
            found = model_class.from_pretrained(str(place), config=config, **kwargs)
        finally:
            transformers_logging.set_verbosity(verbosity)
    # With `output_loading_info` there are two.
    model = found[0] if isinstance(found, tuple) else found
    for module in model.modules() if getattr(model, "is_loaded_in_4bit", False) else ():
        # Else bitsandbytes repacks weights at their first use in evaluation on some CPUs, into a form that has no gradient (training
        # after an evaluation would silently use wrong ones), cannot be saved, and was measured to be slower.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return found


def is_quantized(model: Any) -> bool:
    """Return whether a model's linear layers hold 8-bit or 4-bit weights."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def count_parameters(model: Any, *, trained: bool = False) -> int:
    """Return how many numbers a model learns or holds: 4-bit ones, which are stored in pairs, each; originals beside trained copies not."""
    n = 0
    for name, p in model.named_parameters():
        if ".original_module." in name or (trained and not p.requires_grad):
            continue
        state = getattr(p, "quant_state", None)
        n += math.prod(state.shape) if state is not None else p.numel()
    return n


def require_savable(model: Any) -> None:
    """Raise if what would be written is not what was loaded: bitsandbytes repacks 4-bit weights at their first use on some CPUs.

    Raises:
        CheckpointError
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    packed = sum(bool(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False)) for p in model.parameters())
    if packed:
        msg = f"{packed} layers of this 4-bit model have been repacked for this CPU when it was first used, and would be read back as other numbers. Save its adapter (PeftModel.save_pretrained), or the checkpoint it was loaded from."
        raise CheckpointError(msg)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank update of an encoder's linear layers.

    Source: Hu et al. 2021, LoRA.
    """

    rank: int = 16
    alpha: float = 32
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.1
    targets: str = "all-linear"
    """`all-linear` (of the encoder), or `attention` (query and value, as the published package)."""

    def __post_init__(self) -> None:
        if self.targets not in LORA_TARGETS:
            msg = f"lora_targets {self.targets!r} is not one of {', '.join(map(repr, LORA_TARGETS))}."
            raise SettingError(msg)
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            msg = f"lora_rank is {self.rank}, lora_alpha {self.alpha} and lora_dropout {self.dropout}; expected a rank and alpha above 0, and a dropout of at least 0 and below 1."
            raise SettingError(msg)


def add_adapter(model: Any, settings: LoraSettings | None = None, *, freeze_layers: int = 0) -> Any:
    """Return a model with a new LoRA adapter: all of it stands still but the update, and the pooler and heads of fine-tuning.

    Args:
        model (`PreTrainedModel`): any Geneformer, quantised or not; it is changed in place.
        freeze_layers (`int`, *optional*, defaults to 0): layers, from the first, that get no update.

    Returns:
        `peft.PeftModel`
    """
    peft = _peft()
    settings = settings or LoraSettings()
    kind, n_layers = type(model).__name__, model.config.num_hidden_layers
    if is_quantized(model):
        with OPENING, warnings.catch_warnings():
            # peft asks transformers by an old name.
            warnings.filterwarnings("ignore", category=FutureWarning)
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    trained_whole = [name.removeprefix("bert.") for name in HEADS if name not in ("cls", "classifiers") and _has(model, name)]
    # peft wraps modules one by one, not lists of them.
    trained_whole += [f"classifiers.{i}" for i in range(len(getattr(model, "classifiers", ())))]
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=LORA_TARGETS[settings.targets],
        layers_to_transform=list(range(freeze_layers, n_layers)) if freeze_layers and settings.targets == "attention" else None,
        modules_to_save=trained_whole or None,
        # Masked genes have no task type in peft.
        task_type=TASK_TYPES.get(kind),
    )
    if freeze_layers and settings.targets != "attention":
        lora.target_modules = rf".*encoder\.layer\.({'|'.join(map(str, range(freeze_layers, n_layers)))})\..*(query|key|value|dense)"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = peft.get_peft_model(model, lora)
    model.config.architectures = [kind]
    return _completing(adapted)


class _CompletingAdapter:
    """A `PeftModel` that writes what peft leaves out, so that what it saves or pushes opens again."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as peft does, and complete the folder."""
        with warnings.catch_warnings():
            # It looks for the base's configuration under the base's name alone.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if (Path(save_directory) / ADAPTER_FILE).is_file():
            complete_adapter(self, Path(save_directory))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push as transformers does.

        Raises:
            CheckpointError: if the base is a folder of this disk.
        """
        base = unwrapped(self).place
        if base is None or base.is_local:
            msg = f"this adapter is of {base or 'a model that was not loaded from anywhere'}, which nobody else has. Push that first, save the adapter, and run push_folder(FOLDER, REPOSITORY, base=…)."
            raise CheckpointError(msg)
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]


def _completing(adapted: Any) -> Any:
    kind = type(adapted)
    if not issubclass(kind, _CompletingAdapter):
        adapted.__class__ = type(kind.__name__, (_CompletingAdapter, kind), {"__module__": kind.__module__})
    return adapted


def _has(model: Any, name: str) -> bool:
    part = model
    for word in name.split("."):
        part = getattr(part, word, None)
    return part is not None


def unwrapped(model: Any) -> Any:
    """Return the Geneformer inside a `PeftModel`, with the adapter at work in it; other models as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_fingerprint(model: Any) -> str:
    """Return a hash of the embeddings and of all norms of an encoder: neither adapters nor quantisation change them."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(unwrapped(model).base_model.named_parameters()):
        if name.startswith("embeddings.") or "LayerNorm" in name:
            digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def save_adapter(model: Any, folder: Path) -> None:
    """Write an adapter: peft's files, and the configuration of the whole model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    complete_adapter(model, folder)


def complete_adapter(model: Any, folder: Path) -> None:
    """Put beside peft's files what they lack to open the adapter again: the configuration of the whole model."""
    # peft's own is a template of things to fill in.
    (folder / "README.md").unlink(missing_ok=True)
    inner = unwrapped(model)
    base = getattr(inner, "base_place", None) or inner.place
    config = inner.config.to_dict() | {"_name_or_path": "", BASE_FINGERPRINT: base_fingerprint(model), "architectures": [type(inner).__name__]}
    if base is not None and base.is_local:
        config[BASE_SHA256] = hash_of_weights(Path(base.name) / (base.subfolder or ""))
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if base is not None:
        # The commit it was trained on, whatever the repository holds by then.
        for name, text in with_base(folder, base).items():
            (folder / name).write_text(text, encoding="utf-8")


def with_base(folder: Path, base: Place) -> dict[str, str]:
    """Return the settings of an adapter folder, by the names of their files, as they are when its base is at some place."""
    said = {
        ADAPTER_FILE: {"base_model_name_or_path": base.name, "revision": base.revision},
        "config.json": {BASE_SUBFOLDER: base.subfolder, "_name_or_path": ""},
    }
    found = {name: read_json_object(folder / name, error=CheckpointError) for name in said if (folder / name).is_file()}
    return {name: json.dumps(settings | said[name], indent=2) + "\n" for name, settings in found.items()}


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says of itself."""

    base: str
    """Folder or Hub id of the model it belongs to, or name of a published checkpoint."""
    base_revision: str | None
    """Commit of the base, if it is on the Hub."""
    base_subfolder: str | None
    """Where in its repository."""
    rank: int
    targets: str
    heads: list[str]
    """Modules that are saved whole."""
    n_bytes: int
    quantization: str | None
    """What it was trained on: "int8", "nf4", or None."""
    base_sha256: str | None = None
    """Of the weights of a base that was a folder of the disk it was trained on, as `hash_of_weights` gives it."""

    @property
    def base_place(self) -> Place:
        """Where its base is."""
        return Place(self.base, self.base_subfolder, self.base_revision)


def is_adapter(place: str | Path) -> bool:
    """Return whether a local folder holds an adapter."""
    return (Path(place) / ADAPTER_FILE).is_file()


def describe_adapter(folder: str | Path) -> AdapterInfo:
    """Return what an adapter folder says of itself, without opening any weights.

    Raises:
        CheckpointError: if it is none, or incomplete.
    """
    folder = Path(folder)
    try:
        settings = read_json_object(folder / ADAPTER_FILE, error=CheckpointError)
        n_bytes = (folder / ADAPTER_WEIGHTS).stat().st_size
        config = read_json_object(folder / "config.json", error=CheckpointError) if (folder / "config.json").is_file() else {}
    except OSError as error:
        msg = f"{folder} is not a whole adapter: {error}. Expected {ADAPTER_FILE} and {ADAPTER_WEIGHTS}."
        raise CheckpointError(msg) from error
    targets, trained_on = settings.get("target_modules"), config.get("quantization_config") or {}
    return AdapterInfo(
        base=str(settings.get("base_model_name_or_path")),
        base_revision=settings.get("revision"),
        base_subfolder=config.get(BASE_SUBFOLDER),
        rank=int(settings.get("r") or 0),
        targets=next(
            (name for name, known in LORA_TARGETS.items() if known == targets or (isinstance(targets, list) and sorted(targets) == known)), str(targets)
        ),
        heads=_saved_whole(folder / ADAPTER_WEIGHTS),
        n_bytes=n_bytes,
        quantization="nf4" if trained_on.get("load_in_4bit") else "int8" if trained_on.get("load_in_8bit") else None,
        base_sha256=config.get(BASE_SHA256),
    )


def base_folders(folder: str | Path) -> list[Path]:
    """Return the folder of the base of an adapter, if that is on this disk; nothing for other checkpoints."""
    base = describe_adapter(folder).base if is_adapter(folder) else ""
    return [Path(base)] if base and Path(base).is_dir() else []


def config_on_base(folder: Path, config: Any) -> Any:
    """Return the configuration of an adapter that came without one, as peft alone pushes them: that of its base, with the head it has.

    Names of classes are not known then.
    """
    task = read_json_object(folder / ADAPTER_FILE, error=CheckpointError).get("task_type")
    own = (config.architectures or [""])[0]
    # Two of our heads are of one task to peft; an adapter of a model that has one of them has the same.
    kind = own if TASK_TYPES.get(own) == task else next((name for name, known in TASK_TYPES.items() if known == task), None)
    if kind is not None:
        config.architectures = [kind]
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            heads = [file.get_slice(key).get_shape() for key in [*file.keys()] if key.endswith("classifier.weight")]
        if heads:
            config.num_labels = int(heads[0][0])
    return config


def _saved_whole(path: Path) -> list[str]:
    """Return the modules whose weights lie in an adapter; peft's own list names some that no model of ours has."""
    with safe_open(path, framework="pt") as file:
        names = {key.removeprefix("base_model.model.").removeprefix("bert.") for key in [*file.keys()] if ".lora_" not in key}
    return sorted({".".join(name.split(".")[: 2 if name.startswith("classifiers.") else 1]) for name in names})


def load_adapter(
    folder: str | Path,
    *,
    model_class: Any,
    config: Any,
    base: Place,
    quantization: str | None = None,
    is_trainable: bool = False,
    device: str | torch.device | None = None,
    allow_missing_weights: bool = False,
    **kwargs: Any,
) -> Any:
    """Return a `PeftModel`: the base, loaded as the adapter was trained unless `quantization` says otherwise, with the adapter on it.

    Args:
        quantization (`"int8"`, `"nf4"` or `"none"`, *optional*).
        base (`Place`): where the model is that the adapter was trained on.

    Raises:
        CheckpointError: if the base is missing, or not the one the adapter was trained on, or weights of either are missing.
    """
    peft, info = _peft(), describe_adapter(folder)
    kind = info.quantization if quantization is None else quantization
    saved = config.to_dict().get("quantization_config") or {}
    expected = getattr(config, BASE_FINGERPRINT, None)
    for leftover in ("quantization_config", BASE_FINGERPRINT, BASE_SUBFOLDER, BASE_SHA256):
        # The configuration is of the base from here on, which is not quantised where it lies.
        config.__dict__.pop(leftover, None)
    wanted = None
    if kind not in (None, "none"):
        options = {"double": saved["bnb_4bit_use_double_quant"], "compute_dtype": str(saved["bnb_4bit_compute_dtype"])} if saved.get("load_in_4bit") else {}
        wanted = quantization_config(kind, **options)
    try:
        kwargs |= {"allow_missing_weights": allow_missing_weights, "output_loading_info": True}
        model, loaded = open_weights(model_class, base, config, quantization=wanted, device=device, quiet=True, **kwargs)
    except RuntimeError as error:
        # Weights of another shape, which transformers has told of.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        msg = f"{base} cannot be the base of {folder}: its weights have other shapes. Pass `base=`, the checkpoint it was trained on."
        raise CheckpointError(msg) from error
    found = base_fingerprint(model)
    if expected is not None and found != expected:
        msg = f"{folder} was trained on another base: its embeddings have the fingerprint {expected}, and those of {base} {found}. Pass `base=`, the checkpoint it was trained on."
        raise CheckpointError(msg)
    try:
        with OPENING, warnings.catch_warnings():
            # peft asks transformers by an old name.
            warnings.filterwarnings("ignore", category=FutureWarning)
            # What is missing is named below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except KeyError as error:
        # A module that is saved as a whole, such as a head, is not among the weights.
        require_weights([str(error.args[0])], f"the adapter in {folder}")
        raise
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        msg = f"the adapter in {folder} does not fit {base}: {str(error).splitlines()[0]} Use the base it was trained on."
        raise CheckpointError(msg) from error
    if not allow_missing_weights:
        _require_complete(peft, adapted, model, loaded["missing_keys"], Path(folder), base)
    adapted = _completing(adapted)
    return adapted if is_trainable else adapted.eval()


def _require_complete(peft: Any, adapted: Any, model: Any, missing_in_base: Any, folder: Path, base: Place) -> None:
    """Raise unless the adapter fills each of its places in the model, holds nothing else, and base and adapter hold all weights together.

    Raises:
        CheckpointError
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        held = {*file.keys()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        expected = {*peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    require_weights(expected - held, f"the adapter in {folder}")
    inside = {f"base_model.model.{name}" for name in model.state_dict()}
    astray = sorted(held - expected - inside)
    if astray:
        msg = f"the adapter in {folder} holds {len(astray):,} weights that have no place in {base}, for instance {astray[0]}. It belongs to another model, or its weights were renamed; save it again."
        raise CheckpointError(msg)
    given = {name.removeprefix("base_model.model.") for name in held}
    missing = [name for name in needed_weights(model, missing_in_base) if name not in given]
    require_weights(missing, f"{folder} on {base}", of=", which neither the base nor the adapter holds")
