"""Configuration of a Geneformer: a BERT plus what it must know of its vocabulary and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig

from ..errors import CheckpointError, like
from .checkpoint_settings import check_config
from .checkpoints import CHECKPOINTS
from .config_fields import POOLINGS, UPSTREAM_POOLING

# Special tokens of the published vocabularies by their size, which is how a published config.json tells them apart.
CLS_EOS_OF_VOCABULARY = {20_275: (2, 3)}


def _shape(hidden: int, layers: int, heads: int, ffn: int, positions: int, vocabulary: int, dropout: float) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


# Source: config.json of each checkpoint in ctheodoris/Geneformer on the Hub; tdc/Geneformer for the 20-layer model.
PRESETS: dict[str, dict[str, Any]] = {
    "gf-6L-30M-i2048": _shape(256, 6, 4, 512, 2048, 25_426, 0.02),
    "gf-12L-30M-i2048": _shape(512, 12, 8, 1024, 2048, 25_426, 0.02),
    "gf-12L-95M-i4096": _shape(512, 12, 8, 1024, 4096, 20_275, 0.02),
    "gf-12L-95M-i4096-CLcancer": _shape(512, 12, 8, 1024, 4096, 20_275, 0.02),
    "gf-20L-95M-i4096": _shape(896, 20, 14, 1792, 4096, 20_275, 0.02),
    "Geneformer-V1-10M": _shape(256, 6, 4, 512, 2048, 25_426, 0.02),
    "Geneformer-V2-104M": _shape(768, 12, 12, 3072, 4096, 20_275, 0.1),
    "Geneformer-V2-104M_CLcancer": _shape(768, 12, 12, 3072, 4096, 20_275, 0.1),
    "Geneformer-V2-316M": _shape(1152, 18, 18, 4608, 4096, 20_275, 0.1),
}


class GeneformerConfig(BertConfig):
    r"""Configuration of every Geneformer model. The defaults are the shape of Geneformer-V2-104M.

    Args (beyond those of `BertConfig`):
        cls_token_id (`int`, *optional*), eos_token_id (`int`, *optional*):
            Special tokens at either end of a cell. None where the vocabulary has none. If neither is given they follow
            from the size of the published vocabularies (20,275: 2 and 3; 25,426: none).
        pooler (`bool`, *optional*, defaults to `True`): multi-task heads read through BERT's pooler; upstream's do not.
        pooling (`"first"`, `"mean"`, `"attention"` or `"cls"`, *optional*, defaults to `"first"`):
            What the heads of cells read: the first position (published classifiers, whatever stands there), the mean over
            genes, their sum by learnt weights, or `<cls>`.
        vocabulary_fingerprint (`str`, *optional*):
            `GeneTable.fingerprint` of the tokenizer this model belongs to; written by `convert`, checked before use.
        task_labels (`dict[str, list[str]]`, *optional*):
            Multi-task models: class names of each task. Heads are in the sorted order of their names, as a config.json is.
        task_weights (`dict[str, float]`, *optional*): weight of each task in the loss; 1 where not given.
        integrate (`str`, *optional*): column, such as the batch, across which cells of one class are drawn together in training (multi-task models).
        integration_weight (`float`, *optional*, defaults to 1): weight of that in the loss.
        class_weights (`list[float]`, *optional*), task_class_weights (`dict[str, list[float]]`, *optional*): weight of each class in the loss.
        label_columns (`list[str]`, *optional*): columns of obs that a fine-tuned model predicts.
        label_mean (`list[float]`, *optional*), label_scale (`list[float]`, *optional*):
            Regression: mean and standard deviation of each number over the training cells; it is learnt in these units.

    Example:
        >>> config = GeneformerConfig.from_preset("gf-6L-30M-i2048")
        >>> config.hidden_size, config.max_position_embeddings, config.cls_token_id
        (256, 2048, None)
        >>> GeneformerConfig().cls_token_id
        2
    """

    model_type = "geneformer"

    vocab_size: int = 20_275
    hidden_act: str = "relu"
    max_position_embeddings: int = 4096
    cls_token_id: int | None = None
    pooling: str = "first"
    pooler: bool = True
    vocabulary_fingerprint: str | None = None
    task_labels: dict[str, list[str]] | None = None
    task_weights: dict[str, float] | None = None
    integrate: str | None = None
    integration_weight: float = 1.0
    class_weights: list[float] | None = None
    task_class_weights: dict[str, list[float]] | None = None
    label_columns: list[str] | None = None
    label_mean: list[float] | None = None
    label_scale: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.cls_token_id is None and self.eos_token_id is None:
            self.cls_token_id, self.eos_token_id = CLS_EOS_OF_VOCABULARY.get(self.vocab_size, (None, None))
        if self.task_labels is not None:
            self.task_labels = dict(sorted(self.task_labels.items()))
        if self.pooling not in (*POOLINGS, UPSTREAM_POOLING):
            msg = f"pooling {self.pooling!r} is not one of {', '.join(map(repr, POOLINGS))}."
            raise ValueError(msg)
        if self.pooling == "cls" and self.cls_token_id is None:
            msg = "pooling 'cls' needs a vocabulary with a <cls> token, and cls_token_id is None. Use 'mean', or 'first' as the published classifiers do."
            raise ValueError(msg)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GeneformerConfig:
        """Return the configuration of a published model shape by its name; keyword arguments override.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        if name not in PRESETS:
            msg = f"{name!r} is not a published shape.{like(name, PRESETS)} Known: {', '.join(PRESETS)}."
            raise ValueError(msg)
        return cls(**(PRESETS[name] | overrides))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json; the published ones say `model_type: bert`, which becomes `geneformer` here, and have names (`CHECKPOINTS`)."""
        known = CHECKPOINTS.get(str(pretrained_model_name_or_path))
        if known is not None and not Path(pretrained_model_name_or_path).is_dir():
            pretrained_model_name_or_path = known.repository
            kwargs |= {"subfolder": kwargs.get("subfolder") or known.subfolder, "revision": kwargs.get("revision") or known.revision}
        config, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_config(config, f"config.json of {pretrained_model_name_or_path}")
        if config.get("model_type") == "bert":
            config = {**config, "model_type": cls.model_type}
        return config, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of the content of a config.json; the Auto classes come through here.

        Raises:
            CheckpointError: if it names code, an attention function to download, another quantisation than bitsandbytes, or an unknown number type.
        """
        check_config(config_dict, "config.json")
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            msg = f"config.json cannot be read: {' '.join(str(error).split())}. Correct it, or save the model again."
            raise CheckpointError(msg) from error
