"""Geneformer models: BERT as transformers implements it, with losses that are exact under accumulation and several processes.

The encoder and the parameter names are BERT's, so published checkpoints load without a change and ours load in plain
`BertForMaskedLM`. What differs is what happens after the encoder: the masked-gene head runs where it is needed, sequence
heads pool as the configuration says, and every loss is a sum divided by `num_items_in_batch`. (transformers' own BERT
heads ignore that number, which multiplies losses and gradients by the number of accumulation steps and processes.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.bert.modeling_bert import BertOnlyMLMHead, BertPreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..errors import CheckpointError, SettingError
from ..input_files import read_json_object
from .adapters import is_adapter, require_savable
from .attention import PACKED_ATTENTION
from .checkpoints import PUBLISHED_TABLES, REPOSITORY, TAGS
from .configuration_geneformer import GeneformerConfig
from .contrast import contrast_across
from .heads import IGNORED
from .places import HUB_OPTIONS, Place, fetched_checkpoint, place_of
from .pooling import GeneAttention, pool_cells
from .refusals import OPENING, refusals
from .weight_checks import encoder_weights, is_wrapped, read_weights, require_no_more, require_shapes, require_weights, without_wrappers, wrapper_names

logger = logging.getLogger(__name__)


def has_fused_loss() -> bool:
    """Return whether the installed torch offers a fused linear layer and cross entropy."""
    return hasattr(F, "linear_cross_entropy")


def _head_dropout(config: GeneformerConfig) -> float:
    return config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob


def _mean_of(total: torch.Tensor, count: torch.Tensor | int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Divide a summed loss by the items of the whole step where Trainer gives them, else by those of this batch."""
    if num_items_in_batch is None:
        return total / max(int(count), 1)
    # A step without any label has a loss of zero, not of zero by zero.
    if isinstance(num_items_in_batch, torch.Tensor):
        return total / num_items_in_batch.to(total.device).clamp(min=1)
    return total / max(num_items_in_batch, 1)


def _require_unmixed(config: Any, borders: torch.Tensor | None) -> None:
    """Raise if packed cells come to an attention function that would mix them.

    Raises:
        ValueError
    """
    attention = config._attn_implementation or ""
    if borders is not None and attention != PACKED_ATTENTION and not attention.startswith("flash"):
        msg = f"the batch holds packed cells, which the attention function {attention!r} would mix. Call model.set_attn_implementation({PACKED_ATTENTION!r}) first."
        raise ValueError(msg)


def _cross_entropy(logits_bc: torch.Tensor, labels_b: torch.Tensor, class_weights: list[float] | None) -> torch.Tensor:
    """Return the summed cross entropy, each item weighed by its class; items labelled -100 do not count."""
    weights = None if class_weights is None else torch.tensor(class_weights, device=logits_bc.device, dtype=torch.float32)
    return F.cross_entropy(logits_bc.float(), labels_b, weight=weights, reduction="sum", ignore_index=IGNORED)


class _Checkpoint:
    """Opens from where checkpoints are, and refuses to write what would be read back as something else."""

    place: Place | None = None
    """Where the weights are from."""
    hub_options: dict[str, Any] | None = None
    """How the Hub was asked, for the tokenizer that lies beside them."""
    model_tags: list[str] | None = TAGS
    """What `push_to_hub` writes into a new card."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a checkpoint as transformers does: from a folder, a Hub id, or by the name of a published one (`CHECKPOINTS`).

        What comes from the Hub is fetched whole and its hashes are compared before any of it is read.

        Args (beyond those of transformers):
            allow_missing_weights (`bool`, *optional*, defaults to `False`): draw weights of the encoder at random where the checkpoint lacks them.

        Raises:
            CheckpointError: if there is no such place, the repository cannot be read (`HubError`), or weights of the encoder are missing.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)  # type: ignore[misc]
        place = place_of(pretrained_model_name_or_path, subfolder=kwargs.pop("subfolder", None), revision=kwargs.pop("revision", None))
        kwargs.pop("_commit_hash", None)
        named = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
        if named is not None and (not Path(named).is_dir() or str(named) != str(pretrained_model_name_or_path)):
            # The Auto classes have found an adapter, and put the base that it names in its place. Which base may be opened is decided here.
            is_here = Path(named).is_dir()
            place = place_of(named, subfolder=None if is_here else place.subfolder, revision=None if is_here else kwargs["adapter_kwargs"].get("revision"))
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        allow_missing_weights = kwargs.pop("allow_missing_weights", False)
        folder, place = fetched_checkpoint(place, variant=kwargs.get("variant"), **options)
        if is_adapter(folder) and not any(folder.glob("model*.safetensors")):
            passed: dict[str, Any] = {name: kwargs[name] for name in ("dtype", "torch_dtype", "attn_implementation") if name in kwargs}
            passed["allow_missing_weights"] = allow_missing_weights
            model = cls._from_adapter(place, device=kwargs.get("device_map"), **passed, **options)
            return (model, {key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}) if kwargs.get("output_loading_info") else model
        wants_info = kwargs.pop("output_loading_info", False)
        with OPENING, refusals(place):
            try:
                model, info = super().from_pretrained(str(folder), *args, **kwargs, output_loading_info=True)  # type: ignore[misc]
            except RuntimeError:
                # transformers logs a table of the weights, and says no more than that there is one.
                given = kwargs.get("config")
                require_shapes(cls, given if given is not None else cls.config_class.from_pretrained(str(folder)), folder, str(place))  # type: ignore[attr-defined]
                raise
        if is_wrapped(info["missing_keys"], info["unexpected_keys"]):
            model, info = cls._without_wrappers(folder, place, info, args, kwargs | {"config": model.config})
        if not allow_missing_weights:
            require_weights(encoder_weights(info["missing_keys"]), str(place), of=" of its encoder")
            said = read_json_object(folder / "config.json", error=CheckpointError).get("num_hidden_layers")
            # Whoever passes a number wants the first layers.
            if said == model.config.num_hidden_layers and "num_hidden_layers" not in kwargs:
                require_no_more(info["unexpected_keys"], model.config.num_hidden_layers, str(place))
        found = (model, info) if wants_info else model
        model.place = replace(place, name=str(Path(place.name).resolve())) if place.is_local else place
        model.hub_options = {name: value for name, value in options.items() if name != "force_download"}
        # Not the folder in the cache of this machine: what is made from this model will say that it is from there.
        model.name_or_path = model.config.name_or_path = place.name if not place.is_local else str(folder.resolve())
        if place.name == REPOSITORY and model.config.vocabulary_fingerprint is None:
            model.config.vocabulary_fingerprint = PUBLISHED_TABLES.get(model.config.vocab_size)
        return found

    @classmethod
    def _without_wrappers(cls, folder: Path, place: Place, info: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Open a checkpoint whose weights carry the prefixes of wrapped or compiled models, which are taken off."""
        state = {without_wrappers(name): tensor for name, tensor in read_weights(folder).items()}
        logger.warning(
            "%s: the names of its weights carry %s, of a wrapped or compiled model, which was taken off.", place, wrapper_names(info["unexpected_keys"])
        )
        with OPENING:
            return super().from_pretrained(None, *args, **(kwargs | {"state_dict": state}), output_loading_info=True)  # type: ignore[misc]

    @classmethod
    def _from_adapter(cls, place: Place, *, device: Any, **options: Any) -> Any:
        """Open an adapter, with the classes in its config.json: transformers would take that for the whole model's."""
        # It knows this module.
        from .loading import load_model

        model = load_model(
            place.name, subfolder=place.subfolder, revision=place.revision, device=device if isinstance(device, str) and device != "auto" else None, **options
        )  # fmt: skip
        if issubclass(cls, BertModel):
            return model.base_model
        if not isinstance(model, cls):
            msg = f"{place} is an adapter of a {type(model).__name__}, and cannot be opened as a {cls.__name__}."
            raise CheckpointError(msg)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does; 4-bit weights that were repacked, and models with an adapter inside, are refused.

        Raises:
            CheckpointError
        """
        require_savable(self)
        if not getattr(self, "_hf_peft_config_loaded", False) and any(hasattr(module, "lora_A") for module in self.modules()):  # type: ignore[attr-defined]
            msg = "this model has an adapter at work inside, and would be written with names that no model reads. Save the adapter (load_peft_model(…).save_pretrained), or merge it (merge_adapter)."
            raise CheckpointError(msg)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


class GeneformerModel(_Checkpoint, BertModel):
    """The bare encoder. `last_hidden_state` has shape `(b, l, e)`."""

    config_class = GeneformerConfig

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Return hidden states as `BertModel` does.

        Raises:
            SettingError: for `past_key_values`, which prefix tuning passes: it goes around the heads of a Geneformer.
        """
        if past_key_values is not None:
            msg = (
                "past_key_values was passed to a Geneformer, as prefix tuning (peft) does. It calls the encoder directly, so pooling, label units and class weights "
                "of the head would not be applied. Use another adapter, such as LoRA (`add_adapter`)."
            )
            raise SettingError(msg)
        return super().forward(*args, **kwargs)


class GeneformerForMaskedLM(_Checkpoint, BertForMaskedLM):
    """Geneformer with the masked-gene head it was pretrained with."""

    config_class = GeneformerConfig
    fused_loss = False
    """In training, compute logits and loss in chunks (`torch.nn.functional.linear_cross_entropy`, from torch 2.13): less memory,
    and on a CPU 1.4 times the time of a V1-10M step. Set it on a model; `has_fused_loss` says whether torch offers it."""

    def __init__(self, config: GeneformerConfig) -> None:
        # BERT's own constructor would build an encoder of its own first, and take `config.gradient_checkpointing` for it.
        super(BertForMaskedLM, self).__init__(config)
        self.bert = GeneformerModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        full_logits: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict genes from their context.

        Args (beyond those of `BertForMaskedLM`):
            labels (`torch.LongTensor` of shape `(b, l)`, *optional*): gene ids to predict; -100 elsewhere.
            num_items_in_batch (`int`, *optional*): predicted positions in the whole optimiser step; Trainer passes it.
            full_logits (`bool`, *optional*):
                True: logits of shape `(b, l, vocabulary)`, as without labels. False: the head runs at the labelled positions
                alone and logits have shape `(labelled positions, vocabulary)`. By default True in evaluation, and in training with
                labels the head runs at the labelled positions and logits are None.
            kwargs: with `cu_seq_lens_q` and `position_ids` cells come packed, see `models.attention.packed_attention`.
        """
        _require_unmixed(self.config, kwargs.get("cu_seq_lens_q"))
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_ble = outputs.last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.cls(hidden_ble), hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        chosen = labels != IGNORED
        targets = labels[chosen]
        logits = None
        if full_logits or (full_logits is None and not self.training):
            logits = self.cls(hidden_ble)
            total = F.cross_entropy(logits[chosen].float(), targets, reduction="sum")
        elif full_logits is None and self.fused_loss:
            total = self._fused_loss(hidden_ble[chosen], targets)
        elif full_logits is False:
            # In single precision whatever the rest is computed in: among thousands of genes, half of it makes ties.
            with torch.autocast(hidden_ble.device.type, enabled=False):
                logits = self.cls(hidden_ble[chosen].to(self.cls.predictions.decoder.weight.dtype)).float()
            total = F.cross_entropy(logits, targets, reduction="sum")
        else:
            total = F.cross_entropy(self.cls(hidden_ble[chosen]).float(), targets, reduction="sum")
        loss = _mean_of(total, len(targets), num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _fused_loss(self, hidden_me: torch.Tensor, targets_m: torch.Tensor) -> torch.Tensor:
        """Return the summed loss without ever holding all logits: torch computes them and their gradient in chunks."""
        head = self.cls.predictions
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
        transformed_me = head.transform(hidden_me)
        weight, bias = head.decoder.weight.to(transformed_me.dtype), head.decoder.bias.to(transformed_me.dtype)
        # Summed here: torch 2.13 would add up thousands of losses in bfloat16.
        losses_m = F.linear_cross_entropy(transformed_me, weight, targets_m, linear_bias=bias, reduction="none", options=options)  # type: ignore[attr-defined]
        return losses_m.float().sum()


class GeneformerForSequenceClassification(_Checkpoint, BertForSequenceClassification):
    """Geneformer with one head per cell: classes, several labels at once, or numbers (`config.problem_type`).

    The head reads what `config.pooling` names, through BERT's pooler (a linear layer and tanh). Numbers are learnt in standard
    deviations (`config.label_mean`, `config.label_scale`); `logits` and `labels` are in the units of the labels.
    """

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super(BertForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = GeneformerModel(config)
        self.attention_pool = GeneAttention(config.hidden_size) if config.pooling in ("attention", "attention_all") else None
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify cells. `logits` has shape `(b, num_labels)`; `labels` is `(b,)` of class ids, or `(b, num_labels)`."""
        borders = kwargs.get("cu_seq_lens_q")
        _require_unmixed(self.config, borders)
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        logits = self.head(outputs.last_hidden_state, input_ids, attention_mask, borders)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def head(
        self, hidden_ble: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None, borders: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of cells from the last hidden states, of shape `(cells, num_labels)`; packed cells come with their borders."""
        logits = self.classifier(self.dropout(_read(self, _pool(self, hidden_ble, input_ids, attention_mask, borders))))
        scale, mean = self._units(logits)
        return logits if scale is None else logits * scale + mean

    def _units(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.config.label_scale is None:
            return None, None
        return logits.new_tensor(self.config.label_scale), logits.new_tensor(self.config.label_mean)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        kind = self.config.problem_type
        if kind is None:
            if self.num_labels == 1:
                kind = "regression"
            else:
                kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            total = _cross_entropy(logits, labels.view(-1), self.config.class_weights)
            return _mean_of(total, (labels != IGNORED).sum(), num_items_in_batch)
        logits, labels = logits.float(), labels.float().view_as(logits)
        if kind == "regression":
            scale, _ = self._units(logits)
            total = ((logits - labels) / (1.0 if scale is None else scale)).square().sum()
        else:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return _mean_of(total, labels.numel(), num_items_in_batch)


class GeneformerForTokenClassification(_Checkpoint, BertForTokenClassification):
    """Geneformer with one head per gene. `logits` has shape `(b, l, num_labels)`."""

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super(BertForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = GeneformerModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify genes in their cells. `labels` has shape `(b, l)`; -100 where a gene has no label."""
        _require_unmixed(self.config, kwargs.get("cu_seq_lens_q"))
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            total = _cross_entropy(logits.flatten(0, 1), labels.flatten(), self.config.class_weights)
            loss = _mean_of(total, (labels != IGNORED).sum(), num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def head(self, hidden_ble: torch.Tensor) -> torch.Tensor:
        """Return the logits of genes from the last hidden states: `(..., num_labels)` from `(..., e)`."""
        return self.classifier(self.dropout(hidden_ble))


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of a multi-task model."""

    loss: torch.Tensor | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    """One tensor of shape `(b, classes of the task)` per task, in the order of `config.task_labels`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GeneformerForMultiTaskClassification(_Checkpoint, BertPreTrainedModel):
    """Geneformer with one classification head per task over a shared encoder; `config.task_labels` names them.

    With `config.integrate`, such as the batch a cell is from, cells of one class are drawn together across it while training (see `contrast_across`).
    """

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__(config)
        if not config.task_labels:
            msg = "GeneformerForMultiTaskClassification needs config.task_labels, for instance {'cell_type': ['B', 'T'], 'disease': ['no', 'yes']}."
            raise ValueError(msg)
        self.bert = GeneformerModel(config, add_pooling_layer=config.pooler)
        self.attention_pool = GeneAttention(config.hidden_size) if config.pooling in ("attention", "attention_all") else None
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifiers = nn.ModuleList(nn.Linear(config.hidden_size, len(names)) for names in config.task_labels.values())
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultiTaskOutput:
        """Classify cells for every task. `labels` has shape `(b, tasks)`; -100 where a cell has no label for a task.

        The loss is the weighted sum over tasks of the cross entropies, divided by labels per task (cells, where all have all labels). One more column of
        labels says of which batch a cell is, for `config.integrate`; its contrast is by the classes of the first task.
        """
        borders = kwargs.get("cu_seq_lens_q")
        _require_unmixed(self.config, borders)
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        pooled_be = _pool(self, outputs.last_hidden_state, input_ids, attention_mask, borders)
        logits = self._logits(pooled_be)
        loss = None
        if labels is not None:
            weights, class_weights = self.config.task_weights or {}, self.config.task_class_weights or {}
            total = logits[0].new_zeros((), dtype=torch.float32)
            for task, name in enumerate(self.config.task_labels or {}):
                total = total + weights.get(name, 1.0) * _cross_entropy(logits[task], labels[:, task], class_weights.get(name))
            if self.training and labels.shape[1] > len(logits):
                total = total + self.config.integration_weight * contrast_across(pooled_be, labels[:, 0], labels[:, -1])
            # The items are cells times columns, the loss is a mean over cells of a sum over tasks.
            loss = _mean_of(total * labels.shape[1], (labels != IGNORED).sum(), num_items_in_batch)
        return MultiTaskOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def head(
        self, hidden_ble: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None, borders: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the logits of each task from the last hidden states; packed cells come with their borders."""
        return self._logits(_pool(self, hidden_ble, input_ids, attention_mask, borders))

    def _logits(self, pooled_be: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read_be = self.dropout(_read(self, pooled_be))
        return tuple(classifier(read_be) for classifier in self.classifiers)


def _pool(
    model: Any, hidden_ble: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, borders: torch.Tensor | None
) -> torch.Tensor:
    """Return the embeddings of cells, of shape `(cells, e)`, by `config.pooling`."""
    return pool_cells(hidden_ble, input_ids, attention_mask, borders, config=model.config, attention=model.attention_pool)


def _read(model: Any, pooled_be: torch.Tensor) -> torch.Tensor:
    """Return what the heads of cells read: embeddings through BERT's pooler, where there is one."""
    if model.bert.pooler is None:
        return pooled_be
    # Called as a module, because adapters put a trainable copy in its place.
    return model.bert.pooler(pooled_be.unsqueeze(1))
