"""Geneformer models: BERT as transformers implements it, with losses that are exact under accumulation and several processes.

The encoder and the parameter names are BERT's, so published checkpoints load without a change and ours load in plain
`BertForMaskedLM`. What differs is what happens after the encoder: the masked-gene head runs where it is needed, sequence
heads pool as the configuration says, and every loss is a sum divided by `num_items_in_batch`. (transformers' own BERT
heads ignore that number, which multiplies losses and gradients by the number of accumulation steps and processes.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .attention import PACKED_ATTENTION
from .configuration_geneformer import GeneformerConfig

IGNORED = -100
"""Label of a position or task that does not count, as everywhere in transformers."""


def has_fused_loss() -> bool:
    """Return whether the installed torch offers a fused linear layer and cross entropy."""
    return hasattr(F, "linear_cross_entropy")


def _mean_of(total: torch.Tensor, count: torch.Tensor | int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Divide a summed loss by the items of the whole step where Trainer gives them, else by those of this batch."""
    if num_items_in_batch is None:
        return total / max(int(count), 1)
    # A step without any label has a loss of zero, not of zero by zero.
    if isinstance(num_items_in_batch, torch.Tensor):
        return total / num_items_in_batch.to(total.device).clamp(min=1)
    return total / max(num_items_in_batch, 1)


def gene_positions(input_ids_bl: torch.Tensor, attention_mask_bl: torch.Tensor | None, config: GeneformerConfig) -> torch.Tensor:
    """Return a bool tensor of shape `(b, l)`: True where a gene stands.

    Pads are left out always; the first and last token of a cell only where they are `<cls>` and `<eos>`.
    """
    keep: torch.Tensor = attention_mask_bl.bool() if attention_mask_bl is not None else torch.ne(input_ids_bl, config.pad_token_id or 0)
    for special in (config.cls_token_id, config.eos_token_id):
        if special is not None:
            keep = keep & (input_ids_bl != special)
    return keep


def mean_over_genes(hidden_ble: torch.Tensor, genes_bl: torch.Tensor) -> torch.Tensor:
    """Return the mean hidden state over gene positions, of shape `(b, e)`; zero for a cell without genes."""
    weights = genes_bl.to(hidden_ble.dtype).unsqueeze(-1)
    return (hidden_ble * weights).sum(1) / weights.sum(1).clamp(min=1)


class GeneformerModel(BertModel):
    """The bare encoder. `last_hidden_state` has shape `(b, l, e)`."""

    config_class = GeneformerConfig


class GeneformerForMaskedLM(BertForMaskedLM):
    """Geneformer with the masked-gene head it was pretrained with."""

    config_class = GeneformerConfig
    fused_loss = False
    """In training, compute logits and loss in chunks (`torch.nn.functional.linear_cross_entropy`, from torch 2.13): less memory,
    and on a CPU 1.4 times the time of a V1-10M step. Set it on a model; `has_fused_loss` says whether torch offers it."""

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__(config)
        self.bert = GeneformerModel(config, add_pooling_layer=False)
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
        attention = self.config._attn_implementation or ""
        if kwargs.get("cu_seq_lens_q") is not None and attention != PACKED_ATTENTION and not attention.startswith("flash"):
            msg = f"the batch holds packed cells, which the attention function {attention!r} would mix. Call model.set_attn_implementation({PACKED_ATTENTION!r}) first."
            raise ValueError(msg)
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


class GeneformerForSequenceClassification(BertForSequenceClassification):
    """Geneformer with one head per cell: classes, several labels at once, or numbers (`config.problem_type`).

    The head reads what `config.pooling` names, through BERT's pooler (a linear layer and tanh).
    """

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__(config)
        self.bert = GeneformerModel(config)
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
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        pooled_be = _pool(self, input_ids, attention_mask, outputs)
        logits = self.classifier(self.dropout(pooled_be))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        kind = self.config.problem_type
        if kind is None:
            if self.num_labels == 1:
                kind = "regression"
            else:
                kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            total = F.cross_entropy(logits.float(), labels.view(-1), reduction="sum", ignore_index=IGNORED)
            return _mean_of(total, (labels != IGNORED).sum(), num_items_in_batch)
        labels = labels.to(logits.dtype).view_as(logits)
        if kind == "regression":
            total = F.mse_loss(logits, labels, reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return _mean_of(total, labels.numel(), num_items_in_batch)


class GeneformerForTokenClassification(BertForTokenClassification):
    """Geneformer with one head per gene. `logits` has shape `(b, l, num_labels)`."""

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__(config)
        self.bert = GeneformerModel(config, add_pooling_layer=False)
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
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            total = F.cross_entropy(logits.float().view(-1, self.num_labels), labels.view(-1), reduction="sum", ignore_index=IGNORED)
            loss = _mean_of(total, (labels != IGNORED).sum(), num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of a multi-task model."""

    loss: torch.Tensor | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    """One tensor of shape `(b, classes of the task)` per task, in the order of `config.task_labels`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class GeneformerForMultiTaskClassification(BertPreTrainedModel):
    """Geneformer with one classification head per task over a shared encoder; `config.task_labels` names them."""

    config_class = GeneformerConfig

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__(config)
        if not config.task_labels:
            msg = "GeneformerForMultiTaskClassification needs config.task_labels, for instance {'cell_type': ['B', 'T'], 'disease': ['no', 'yes']}."
            raise ValueError(msg)
        self.bert = GeneformerModel(config)
        dropout = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        self.dropout = nn.Dropout(dropout)
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

        The loss is the weighted sum over tasks of the mean cross entropy per cell.
        """
        outputs = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, return_dict=True, **kwargs)
        pooled_be = self.dropout(_pool(self, input_ids, attention_mask, outputs))
        logits = tuple(head(pooled_be) for head in self.classifiers)
        loss = None
        if labels is not None:
            weights = self.config.task_weights or {}
            total = logits[0].new_zeros((), dtype=torch.float32)
            for task, name in enumerate(self.config.task_labels or {}):
                summed = F.cross_entropy(logits[task].float(), labels[:, task], reduction="sum", ignore_index=IGNORED)
                total = total + weights.get(name, 1.0) * summed
            # The items are cells times tasks, the loss is a mean over cells of a sum over tasks.
            loss = _mean_of(total * len(logits), (labels != IGNORED).sum(), num_items_in_batch)
        return MultiTaskOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def _pool(model: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, outputs: Any) -> torch.Tensor:
    """Return what a sequence head reads, of shape `(b, e)`."""
    if model.config.pooling != "mean":
        return outputs.pooler_output
    if input_ids is None:
        msg = "pooling 'mean' leaves out special tokens, so the model needs `input_ids`; it got only embeddings."
        raise ValueError(msg)
    genes_bl = gene_positions(input_ids, attention_mask, model.config)
    pooler = model.bert.pooler
    return pooler.activation(pooler.dense(mean_over_genes(outputs.last_hidden_state, genes_bl)))
