"""Open any Geneformer checkpoint, and the tokenizer that belongs to it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel

from ..errors import CheckpointError, CheckpointFilesError, GeneformerError, SettingError, VocabularyMismatchError
from ..pickles import require_content
from .adapters import ADAPTER_WEIGHTS, config_on_base, describe_adapter, is_adapter, load_adapter, open_weights, quantization_config, unwrapped
from .checkpoints import CHECKPOINTS
from .configuration_geneformer import GeneformerConfig
from .modeling_geneformer import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
)
from .places import HUB_OPTIONS, Place, fetched_checkpoint, is_hub_id, place_of
from .refusals import refusals
from .tokenization_geneformer import GeneformerTokenizer
from .weight_checks import hash_of_weights, needed_weights, require_no_more, require_weights

logger = logging.getLogger(__name__)

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


def load_model(
    model: Any, *, quantization: str | None = None, base: str | Path | None = None, device: Any = None, allow_missing_weights: bool = False, **kwargs: Any
) -> Any:
    """Return a model as it is, or open a checkpoint: in a folder, on the Hub, or by the name of a published one; plain, adapter, 8-bit or 4-bit.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`).
        quantization (`"int8"`, `"nf4"` or `"none"`, *optional*):
            load the encoder's linear layers in 8-bit or 4-bit. By default a checkpoint opens as it was saved, and an adapter on its base as it
            was trained; "none" opens it on plain weights.
        base (*optional*): for adapters whose base has moved.
        device (*optional*): for quantised weights, which stay where they were loaded; the best there is otherwise.
        allow_missing_weights (`bool`, *optional*, defaults to `False`):
            draw weights that the checkpoint lacks at random, such as a new head. By default they are named and the checkpoint is refused;
            a pooler that no head reads does not count.
        kwargs: passed on to `from_pretrained`: `subfolder`, `revision`, `token`, `dtype`.

    Returns:
        a Geneformer in evaluation mode. That of an adapter has it at work inside; `load_peft_model` gives the `PeftModel` around it.

    Raises:
        CheckpointError: if the folder holds no such checkpoint, git-lfs pointers in place of weights, or not all weights.
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
    place = place_of(model, subfolder=kwargs.pop("subfolder", None), revision=kwargs.pop("revision", None))
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    folder, place = fetched_checkpoint(place, **hub)
    # Once is enough.
    hub.pop("force_download", None)
    if is_adapter(folder):
        options = {"quantization": quantization, "is_trainable": False, "device": device, "allow_missing_weights": allow_missing_weights}
        return unwrapped(_open_adapter(folder, place, base=base, **options, **hub, **kwargs))
    require_checkpoint(folder)
    wanted = None if quantization in (None, "none") else quantization_config(str(quantization))
    with refusals(place):
        config = GeneformerConfig.from_pretrained(str(folder))
        if wanted is not None and getattr(config, "quantization_config", None):
            msg = f"{place} was saved quantised, so quantization={quantization!r} cannot be asked for. Leave it out."
            raise SettingError(msg)
        kwargs |= {"allow_missing_weights": allow_missing_weights, "output_loading_info": True}
        opened, info = open_weights(model_class_of(config, str(place)), place, config, quantization=wanted, device=device, **hub, **kwargs)
        if not allow_missing_weights:
            require_weights(needed_weights(opened, info["missing_keys"]), str(place))
            require_no_more(info["unexpected_keys"], config.num_hidden_layers, str(place))
        return opened.eval()


def load_peft_model(
    folder: str | Path, *, quantization: str | None = None, base: str | Path | None = None, is_trainable: bool = False, device: Any = None, **kwargs: Any
) -> Any:
    """Open an adapter in a folder or on the Hub as a `peft.PeftModel` on its base; arguments as in `load_model`.

    Raises:
        CheckpointError: if base and adapter are not there, or do not belong together.
    """
    place = place_of(folder, subfolder=kwargs.pop("subfolder", None), revision=kwargs.pop("revision", None))
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    local, place = fetched_checkpoint(place, **hub)
    hub.pop("force_download", None)
    return _open_adapter(local, place, base=base, quantization=quantization, is_trainable=is_trainable, device=device, **hub, **kwargs)


def _open_adapter(folder: Path, place: Place, *, base: str | Path | None, **options: Any) -> Any:
    require_content(folder / ADAPTER_WEIGHTS)
    where = place_of(base) if base is not None else _named_base(folder, place)
    logger.warning("%s is an adapter of the model %s, which is opened with it.", place, where)
    with refusals(place):
        if (folder / "config.json").is_file():
            config = GeneformerConfig.from_pretrained(str(folder))
        else:
            config = config_on_base(
                folder, GeneformerConfig.from_pretrained(str(fetched_checkpoint(where, **{name: options[name] for name in HUB_OPTIONS if name in options})[0]))
            )
        opened = load_adapter(folder, model_class=model_class_of(config, str(place)), config=config, base=where, **options)
    inner = unwrapped(opened)
    inner.place = replace(place, name=str(Path(place.name).resolve())) if place.is_local else place
    inner.base_place = where
    inner.hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    inner.config.name_or_path = place.name if not place.is_local else str(folder)
    return opened


def _named_base(folder: Path, place: Place) -> Place:
    """Return the model that an adapter names as its base, if it may be opened without being asked for.

    An adapter from elsewhere may name any folder of this disk. A local base is opened if its weights are those that our run
    recorded; an adapter from the Hub names a repository on the Hub.

    Raises:
        CheckpointError: naming the base, why it is not opened, and `--base`.
    """
    about = describe_adapter(folder)
    named, remedy = about.base_place, "Say which model it belongs to with `load_model(…, base=…)` (--base; folder or Hub id)."
    is_here = Path(named.name).exists()
    if not is_here and (named.name in CHECKPOINTS or is_hub_id(named.name)):
        return place_of(named.name, subfolder=named.subfolder, revision=named.revision)
    if not is_here:
        msg = f"{place} is an adapter of the model {named.name}, which is not there. {remedy}"
        raise CheckpointError(msg)
    if not place.is_local:
        msg = f"{place} is an adapter from the Hub and names the base {named.name}, which is a folder of this disk. {remedy}"
        raise CheckpointError(msg)
    base = place_of(named.name, subfolder=named.subfolder)
    found = hash_of_weights(Path(named.name) / (named.subfolder or "")) if about.base_sha256 is not None else ""
    if about.base_sha256 is None or about.base_sha256 != found:
        recorded = (
            "records no hash of its weights"
            if about.base_sha256 is None
            else f"records the hash {about.base_sha256[:12]}… of its weights, and those there have {found[:12]}…"
        )
        msg = f"{place} names the base {named.name}, a folder of this disk, and {recorded}, so it may be another model. {remedy}"
        raise CheckpointError(msg)
    return base


def require_checkpoint(folder: Path) -> None:
    """Raise if a folder cannot be a checkpoint: no config.json, or git-lfs pointers in place of weights."""
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"Checkpoints inside: {', '.join(inside)}." if inside else "Give the folder of a converted checkpoint."
        msg = f"{folder} holds no config.json, so it is no checkpoint. {hint}"
        raise CheckpointError(msg)
    for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")):
        if not path.is_file():
            msg = f"{path} is {'a folder' if path.is_dir() else f'a link to {path.readlink()}, which is not there'}; expected a file of weights. Save the model again, or download it again."
            raise CheckpointFilesError(msg)
        require_content(path)


def load_tokenizer(folder: Any, **kwargs: Any) -> GeneformerTokenizer:
    """Open the tokenizer of a checkpoint, wherever that is.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return GeneformerTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, GeneformerError):
            raise
        msg = f"no gene tokenizer at {folder}: {str(error).splitlines()[0]} Convert a published checkpoint first (`geneformer-hf convert`)."
        raise CheckpointError(msg) from error


def tokenizer_of(model: Any) -> GeneformerTokenizer:
    """Return the tokenizer that lies beside the weights of a model: in the same folder, or the same commit of a repository.

    Raises:
        CheckpointError: if the model was not loaded from anywhere, or there is no tokenizer there.
    """
    place = getattr(unwrapped(model), "place", None)
    if place is not None:
        return load_tokenizer(place.name, subfolder=place.subfolder, revision=place.revision, **(unwrapped(model).hub_options or {}))
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
    if not isinstance(tokenizer, GeneformerTokenizer):
        msg = f"tokenizer is a {type(tokenizer).__name__} of {len(tokenizer):,} tokens, no gene tokenizer. AutoTokenizer makes such a thing of a published folder: use GeneformerTokenizer.from_pretrained, or convert the checkpoint first."
        raise VocabularyMismatchError(msg)
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


def untrained_encoder(config: GeneformerConfig, seed: int) -> GeneformerModel:
    """Return an encoder of this shape with random weights: what a checkpoint has to beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GeneformerModel(GeneformerConfig.from_dict({**config.to_dict(), "quantization_config": None})).eval()
