"""Configuration, models and tokenizer. Importing this package registers them with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .checkpoints import CHECKPOINTS
from .configuration_geneformer import PRESETS, GeneformerConfig
from .modeling_geneformer import (
    GeneformerForMaskedLM,
    GeneformerForMultiTaskClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
    GeneformerModel,
)
from .tokenization_geneformer import GeneformerTokenizer

__all__ = [
    "CHECKPOINTS",
    "PRESETS",
    "GeneformerConfig",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "GeneformerTokenizer",
]

AutoConfig.register(GeneformerConfig.model_type, GeneformerConfig, exist_ok=True)
AutoModel.register(GeneformerConfig, GeneformerModel, exist_ok=True)
AutoModelForMaskedLM.register(GeneformerConfig, GeneformerForMaskedLM, exist_ok=True)
AutoModelForPreTraining.register(GeneformerConfig, GeneformerForMaskedLM, exist_ok=True)
AutoModelForTokenClassification.register(GeneformerConfig, GeneformerForTokenClassification, exist_ok=True)
# One Auto class, two models: transformers picks by the `architectures` of the checkpoint, the first where there is none.
AutoModelForSequenceClassification.register(GeneformerConfig, (GeneformerForSequenceClassification, GeneformerForMultiTaskClassification), exist_ok=True)
AutoTokenizer.register(GeneformerConfig, tokenizer_class=GeneformerTokenizer, exist_ok=True)
