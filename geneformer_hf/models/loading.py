"""Open any Geneformer checkpoint, and the tokenizer that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import CheckpointError, GeneformerError, SettingError, VocabularyMismatchError
from ..pickles import require_content
from .adapters import ADAPTER_WEIGHTS, describe_adapter, is_adapter, load_adapter, open_weights, quantization_config, unwrapped
from .configuration_geneformer import GeneformerConfig
from .modeling_geneformer import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
)
from .tokenization_geneformer import GENE_TABLE_FILE, GeneformerTokenizer

_CLASSES = {
    cls.__name__: cls
    for cls in (
        GeneformerForMaskedLM,
        GeneformerForMultiTaskClassification,
        GeneformerForSequenceClassification,
        GeneformerForTokenClassification,
        GeneformerModel,
    )
}


def model_class_of(config: GeneformerConfig, where: str = "the checkpoint") -> type[PreTrainedModel]:
    """Return the model class that a configuration names; published ones name BERT's.

    Raises:
        CheckpointError: if it names none, or one that is not ours.
    """
    named = (config.architectures or ["(none)"])[0]
    cls = _CLASSES.get(named.replace("Bert", "Geneformer", 1) if named.startswith("Bert") else named)
    if cls is None:
        msg = f"{where}: config.json names the architecture {named!r}; expected one of {', '.join(_CLASSES)} or their BERT counterparts."
        raise CheckpointError(msg)
    return cls


def load_model(model: Any, *, quantization: str | None = None, base: str | Path | None = None, device: Any = None, **kwargs: Any) -> Any:
    """Return a model as it is, or open a checkpoint in a folder or on the Hub: plain, adapter, 8-bit or 4-bit, whatever its head.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`).
        quantization (`"int8"`, `"nf4"` or `"none"`, *optional*):
            load the encoder's linear layers in 8-bit or 4-bit. By default a checkpoint opens as it was saved, and an adapter on its base as it
            was trained; "none" opens it on plain weights.
        base (*optional*): for adapters whose base has moved.
        device (*optional*): for quantised weights, which stay where they were loaded; the best there is otherwise.
        kwargs: passed on to `from_pretrained`: `subfolder`, `revision`, `dtype`.

    Returns:
        a Geneformer in evaluation mode. That of an adapter has it at work inside; `load_peft_model` gives the `PeftModel` around it.

    Raises:
        CheckpointError: if the folder holds no such checkpoint, or git-lfs pointers in place of weights.
    """
    if not isinstance(model, (str, Path)):
        inner = unwrapped(model)
        if not isinstance(getattr(inner, "config", None), GeneformerConfig):
            msg = f"{type(model).__name__} is not a Geneformer model. Open its checkpoint with GeneformerForMaskedLM.from_pretrained, or pass its folder."
            raise CheckpointError(msg)
        if quantization is not None:
            msg = f"quantization={quantization!r} is for checkpoints that are opened, and this model is open already. Pass its folder."
            raise SettingError(msg)
        return inner
    if is_adapter(model):
        return unwrapped(load_peft_model(model, quantization=quantization, base=base, device=device, **kwargs))
    require_checkpoint(Path(model) / kwargs["subfolder"] if kwargs.get("subfolder") and Path(model).is_dir() else model)
    wanted = None if quantization in (None, "none") else quantization_config(str(quantization))
    with refusals(model):
        config = GeneformerConfig.from_pretrained(str(model), **{k: v for k, v in kwargs.items() if k in ("subfolder", "revision")})
        if wanted is not None and getattr(config, "quantization_config", None):
            msg = f"{model} was saved quantised, so quantization={quantization!r} cannot be asked for. Leave it out."
            raise SettingError(msg)
        return open_weights(model_class_of(config, str(model)), model, config, quantization=wanted, device=device, **kwargs).eval()


def load_peft_model(
    folder: str | Path, *, quantization: str | None = None, base: str | Path | None = None, is_trainable: bool = False, device: Any = None, **kwargs: Any
) -> Any:
    """Open an adapter folder as a `peft.PeftModel` on its base; arguments as in `load_model`.

    Raises:
        CheckpointError: if base and adapter are not there, or do not belong together.
    """
    require_content(Path(folder) / ADAPTER_WEIGHTS)
    place = str(base) if base is not None else describe_adapter(folder).base
    if not Path(place).exists() and not is_hub_id(place):
        msg = f"{folder} is an adapter of the model {place}, which is not there. Pass `base=` (--base; folder or Hub id) to say where it is now."
        raise CheckpointError(msg)
    with refusals(folder):
        config = GeneformerConfig.from_pretrained(str(folder))
        return load_adapter(
            folder,
            model_class=model_class_of(config, str(folder)),
            config=config,
            base=base,
            quantization=quantization,
            is_trainable=is_trainable,
            device=device,
            **kwargs,
        )


@contextmanager
def refusals(model: Any) -> Iterator[None]:
    """Turn what transformers says of a checkpoint it cannot open into our error."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"{model} cannot be opened as a Geneformer checkpoint: {str(error).splitlines()[0]}"
        raise CheckpointError(msg) from error


def is_hub_id(name: str | Path) -> bool:
    """Return whether something that is not on this disk can be a repository on the Hub: two parts, the first no folder here."""
    parts = Path(name).parts
    return len(parts) == 2 and not str(name).startswith((".", "/", "~")) and not Path(parts[0]).is_dir()


def require_checkpoint(model: str | Path) -> None:
    """Raise if a local folder cannot be a checkpoint: no config.json, or git-lfs pointers in place of weights."""
    folder = Path(model)
    if not folder.exists():
        if not is_hub_id(model):
            msg = f"{model} does not exist. Give the folder of a converted checkpoint, or a Hub id such as 'name/model'."
            raise CheckpointError(msg)
        return
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"Checkpoints inside: {', '.join(inside)}." if inside else "Give the folder of a converted checkpoint."
        msg = f"{model} holds no config.json, so it is no checkpoint. {hint}"
        raise CheckpointError(msg)
    for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")):
        require_content(path)


def load_tokenizer(folder: Any, **kwargs: Any) -> GeneformerTokenizer:
    """Open the tokenizer of a converted checkpoint.

    Raises:
        CheckpointError: if there is none; published checkpoints carry none until they are converted.
    """
    local = Path(folder)
    if not local.exists() and not is_hub_id(folder):
        # A Hub id has two parts; asking the Hub for anything else only takes time.
        msg = f"{folder} does not exist (looked for in {Path.cwd()}). Give the folder of a tokenizer or converted checkpoint, or a Hub id such as 'name/model'."
        raise CheckpointError(msg)
    if local.is_dir() and not (local / GENE_TABLE_FILE).is_file():
        msg = f"{folder} holds no {GENE_TABLE_FILE}: published checkpoints come without a tokenizer. Run `geneformer-hf convert {folder} OUTPUT` once and use OUTPUT."
        raise CheckpointError(msg)
    require_local: dict[str, Any] = {"local_files_only": True} if local.is_dir() else {}
    try:
        return GeneformerTokenizer.from_pretrained(str(folder), **require_local, **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, (CheckpointError, VocabularyMismatchError)):
            raise
        msg = f"no gene tokenizer at {folder}: {str(error).splitlines()[0]} Convert a published checkpoint first (`geneformer-hf convert`)."
        raise CheckpointError(msg) from error


def tokenizer_of(model: Any) -> GeneformerTokenizer:
    """Return the tokenizer in the folder or Hub repository a model was loaded from.

    Raises:
        CheckpointError: if the model was not loaded from anywhere, or there is no tokenizer there.
    """
    origin = model.config.name_or_path
    if not origin:
        msg = "This model was not loaded from a folder, so its tokenizer is not known. Pass `tokenizer=`."
        raise CheckpointError(msg)
    return load_tokenizer(origin)


def require_same_vocabulary(config: GeneformerConfig, tokenizer: GeneformerTokenizer) -> None:
    """Raise unless a tokenizer encodes for this model.

    Raises:
        VocabularyMismatchError: if sizes, special tokens, lengths or gene tables differ; each difference is named.
    """
    differences = []
    size = max(tokenizer.get_vocab().values()) + 1
    if size != config.vocab_size:
        differences.append(f"the model has {config.vocab_size:,} tokens and the tokenizer {size:,}")
    for name in ("cls_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours != theirs:
            differences.append(f"{name} is {ours} in the model and {theirs} in the tokenizer")
    if tokenizer.model_max_length > config.max_position_embeddings:
        differences.append(f"the tokenizer keeps {tokenizer.model_max_length:,} tokens a cell and the model has {config.max_position_embeddings:,} positions")
    known = config.vocabulary_fingerprint
    if known is not None and known != tokenizer.gene_table.fingerprint:
        differences.append(f"the model was made for gene table {known} and the tokenizer has {tokenizer.gene_table.fingerprint}")
    if differences:
        msg = f"Model and tokenizer do not belong together: {'; '.join(differences)}. Use the tokenizer in the model's own folder."
        raise VocabularyMismatchError(msg)


def fingerprint_of(model: Any) -> str:
    """Return a hash of all weights of a model, adapters included."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(unwrapped(model).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
