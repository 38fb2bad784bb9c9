"""The model that training starts from: weights of a checkpoint, all of them, under the heads of a task; frozen, adapted, quantised."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError, SettingError
from ..models.adapters import HEADS, add_adapter, is_adapter, open_weights, quantization_config, unwrapped
from ..models.configuration_geneformer import GeneformerConfig
from ..models.loading import load_tokenizer, require_checkpoint, require_same_vocabulary
from ..models.places import Place, fetched_checkpoint, place_of
from ..models.refusals import refusals
from ..models.tokenization_geneformer import GeneformerTokenizer
from .arguments import GeneformerFineTuningArguments
from .settings import TrainingSettings


def open_tokenizer(arguments: TrainingSettings) -> GeneformerTokenizer:
    """Open the tokenizer of a run.

    Raises:
        SettingError, CheckpointError
    """
    where = arguments.tokenizer or arguments.from_checkpoint
    if where is None:
        msg = "No tokenizer: give `tokenizer`, the folder of the one the data were made with (or from_checkpoint, which has one)."
        raise SettingError(msg)
    return load_tokenizer(where)


def open_base(arguments: TrainingSettings, model_class: Any, fields: dict[str, Any], tokenizer: GeneformerTokenizer) -> Any:
    """Return a model of some class with the weights of `from_checkpoint`, and a configuration with some fields set.

    Raises:
        CheckpointError: if the checkpoint is an adapter, or does not hold the whole encoder.
        VocabularyMismatchError: if the tokenizer is of another model.
    """
    where = arguments.from_checkpoint
    if where is None:
        msg = "No model: give `from_checkpoint`, the folder or Hub id of a pretrained model."
        raise SettingError(msg)
    folder, place = fetched_checkpoint(place_of(where))
    if is_adapter(folder):
        msg = f"{where} is an adapter. Merge it with its base first (`geneformer-hf export {where} OUTPUT --format merged`), and start from OUTPUT."
        raise CheckpointError(msg)
    require_checkpoint(folder)
    if place.is_local:
        # An adapter remembers where its base is, and may be opened from another folder.
        place = Place(str(folder.resolve()))
    options = {"double": arguments.double_quantization, "compute_dtype": arguments.compute_dtype}
    quantization = None if arguments.quantization == "none" else quantization_config(arguments.quantization, **options)  # type: ignore[arg-type]
    with refusals(where):
        config = GeneformerConfig.from_pretrained(str(folder))
        if getattr(config, "quantization_config", None):
            msg = f"{where} was saved quantised; training needs the weights as they were. Start from the checkpoint it was made from."
            raise CheckpointError(msg)
        # Attributes of a head that was here before.
        before = dict(config.id2label or {}), config.task_labels
        for name, value in fields.items():
            setattr(config, name, value)
        require_same_vocabulary(config, tokenizer)
        model, info = open_weights(
            model_class, place, config, quantization=quantization, device=arguments.device, quiet=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    is_head = tuple(f"{name}." for name in HEADS)
    lost = [name for name in (*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])) if not name.startswith(is_head)]
    if lost:
        msg = f"{where} does not hold the weights of this encoder: {len(lost)} are missing or of another shape ({', '.join(sorted(lost)[:3])})."
        raise CheckpointError(msg)
    if (dict(config.id2label or {}), config.task_labels) != before:
        # A head of other classes that happens to have the same shape means nothing here.
        for name in ("classifier", "classifiers"):
            for module in getattr(model, name, torch.nn.Module()).modules():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.normal_(module.weight, std=config.initializer_range)
                    torch.nn.init.zeros_(module.bias)
    return model


def start_model(arguments: GeneformerFineTuningArguments, model_class: Any, fields: dict[str, Any], tokenizer: GeneformerTokenizer) -> Any:
    """Return the model to fine-tune, with an adapter where one is asked for, in full precision but for quantised weights."""
    fields = dict(fields)
    if model_class.__name__ != "GeneformerForTokenClassification":
        if arguments.pooling == "cls" and tokenizer.cls_token_id is None:
            msg = "pooling 'cls' needs a <cls> token, and this model's vocabulary has none (V1). Use mean, attention or first."
            raise SettingError(msg)
        fields["pooling"] = arguments.pooling or ("cls" if tokenizer.cls_token_id is not None else "mean")
    if arguments.dropout is not None:
        fields |= {"hidden_dropout_prob": float(arguments.dropout), "classifier_dropout": None}
    if arguments.attention_dropout is not None:
        fields["attention_probs_dropout_prob"] = float(arguments.attention_dropout)
    model = open_base(arguments, model_class, fields, tokenizer)
    if arguments.quantization == "none" and next(model.parameters()).dtype != torch.float32:
        # Sums of small updates are lost in half precision; bf16 is for computing (`bf16: true`).
        model = model.float()
    return adapted(model, arguments)


def adapted(model: Any, arguments: TrainingSettings) -> Any:
    """Return a model with the adapter, or the frozen layers, that the arguments ask for."""
    n_layers = model.config.num_hidden_layers
    if arguments.freeze_layers > n_layers:
        msg = f"freeze_layers is {arguments.freeze_layers}, and the model has {n_layers} layers."
        raise SettingError(msg)
    if arguments.adapter == "none":
        freeze(model, layers=arguments.freeze_layers, embeddings=arguments.freeze_embeddings)
        return model
    if arguments.freeze_layers == n_layers:
        msg = f"freeze_layers is {arguments.freeze_layers}, all layers of the model, so the adapter would have none. Lower it, or leave out the adapter."
        raise SettingError(msg)
    return add_adapter(model, arguments.lora, freeze_layers=arguments.freeze_layers)


def freeze(model: Any, *, layers: int = 0, embeddings: bool = False) -> None:
    """Leave the first layers of the encoder, or its embeddings, as they are."""
    encoder = unwrapped(model).base_model
    frozen = [*encoder.encoder.layer[:layers], *([encoder.embeddings] if embeddings else [])]
    for module in frozen:
        module.requires_grad_(requires_grad=False)
