"""What each field of a `config.json` may hold: one table, from which every refusal has the legal range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

POOLINGS = ("first", "mean", "attention", "cls")
UPSTREAM_POOLING = "attention_all"
"""Attention over special tokens as well, as upstream's multi-task models have it; for converted ones alone."""
ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "silu",
    "swish",
    "tanh",
    "sigmoid",
    "mish",
    "relu2",
    "relu6",
    "leaky_relu",
    "linear",
)


@dataclass(frozen=True)
class Rule:
    """What a field may hold."""

    fits: Callable[[Any], bool]
    expected: str
    """In words, after "expected"."""
    may_be_null: bool = False


def _whole(low: int, high: int, *, null: bool = False) -> Rule:
    return Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, f"a whole number from {low:,} to {high:,}", null)


def _number(low: float, high: float, *, null: bool = False) -> Rule:
    return Rule(lambda v: _is_number(v) and low <= v <= high, f"a number from {low:g} to {high:g}", null)


def _decimal(low: float, high: float) -> Rule:
    # BertConfig takes no whole numbers here.
    return Rule(lambda v: isinstance(v, float) and low <= v <= high, f"a number with a decimal point from {low:g} to {high:g}")


def _one_of(*words: str, null: bool = False) -> Rule:
    return Rule(lambda v: isinstance(v, str) and v in words, f"one of {', '.join(words)}", null)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(fits, value))


def _is_map(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) and fits(one) for name, one in value.items())


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value >= 0


_FLAG = Rule(lambda v: isinstance(v, bool), "true or false")
_TEXT = Rule(_is_text, "a text", may_be_null=True)
_TEXTS = Rule(lambda v: _is_list(v, _is_text), "a list of texts", may_be_null=True)
_WEIGHTS = Rule(lambda v: _is_list(v, _is_weight), "a list of numbers of 0 or more", may_be_null=True)
_TOKEN = _whole(0, (1 << 24) - 1, null=True)

FIELDS: dict[str, Rule] = {
    "hidden_size": _whole(1, 1 << 17),
    "num_hidden_layers": _whole(1, 1000),
    "num_attention_heads": _whole(1, 4096),
    "intermediate_size": _whole(1, 1 << 20),
    "max_position_embeddings": _whole(1, 1 << 24),
    "vocab_size": _whole(1, 1 << 24),
    "type_vocab_size": _whole(1, 1 << 16),
    "num_labels": _whole(1, 1 << 20),
    "hidden_act": _one_of(*ACTIVATIONS),
    "hidden_dropout_prob": _number(0, 1),
    "attention_probs_dropout_prob": _number(0, 1),
    "classifier_dropout": _number(0, 1, null=True),
    "layer_norm_eps": _decimal(0, 1),
    "initializer_range": _decimal(0, 1000),
    "position_embedding_type": _one_of("absolute", null=True),
    "problem_type": _one_of("regression", "single_label_classification", "multi_label_classification", null=True),
    "pooling": _one_of(*POOLINGS, UPSTREAM_POOLING),
    "integration_weight": _number(0, 1e9),
    "pad_token_id": _TOKEN,
    "cls_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "sep_token_id": _TOKEN,
    "model_type": _TEXT,
    "vocabulary_fingerprint": _TEXT,
    "integrate": _TEXT,
    "_name_or_path": _TEXT,
    "architectures": _TEXTS,
    "label_columns": Rule(_TEXTS.fits, "a list of names of columns", may_be_null=True),
    "task_labels": Rule(lambda v: _is_map(v, _TEXTS.fits), "an object of columns and lists of names of classes", may_be_null=True),
    "id2label": Rule(
        lambda v: isinstance(v, Mapping) and sorted(map(str, v)) == sorted(map(str, range(len(v)))) and all(map(_is_text, v.values())),
        "an object that names the classes 0, 1, 2 and so on, without gaps",
        may_be_null=True,
    ),
    "label2id": Rule(lambda v: _is_map(v, lambda one: isinstance(one, int)), "an object of names of classes and their numbers", may_be_null=True),
    "class_weights": _WEIGHTS,
    "task_weights": Rule(lambda v: _is_map(v, _is_weight), "an object of columns and numbers of 0 or more", may_be_null=True),
    "task_class_weights": Rule(lambda v: _is_map(v, _WEIGHTS.fits), "an object of columns and lists of numbers of 0 or more", may_be_null=True),
    "label_mean": Rule(lambda v: _is_list(v, _is_number), "a list of numbers", may_be_null=True),
    "label_scale": Rule(lambda v: _is_list(v, lambda one: _is_weight(one) and one > 0), "a list of numbers above 0", may_be_null=True),
    **dict.fromkeys(
        ("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict", "pooler", "gradient_checkpointing"), _FLAG
    ),
}
"""Fields of `GeneformerConfig`, by their names. Fields that are not here are nobody's, and are kept as they are."""
FLAGS_THAT_MAY_BE_NULL = ("output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing")


def check_fields(settings: Mapping[str, Any], where: str) -> None:
    """Refuse fields whose values are of another type or out of range, or do not go together.

    Raises:
        CheckpointError: naming the field, its value and what is legal.
    """
    for name, rule in FIELDS.items():
        if name not in settings:
            continue
        value = settings[name]
        if value is None and (rule.may_be_null or name in FLAGS_THAT_MAY_BE_NULL):
            continue
        if not rule.fits(value):
            _refuse(where, name, value, rule.expected)
    size, heads, vocabulary = (settings.get(name) for name in ("hidden_size", "num_attention_heads", "vocab_size"))
    if size is not None and heads is not None and size % heads:
        _refuse(where, "num_attention_heads", heads, f"a divisor of hidden_size, which is {size:,}")
    if vocabulary is not None:
        for name in ("pad_token_id", "cls_token_id", "eos_token_id"):
            if settings.get(name) is not None and settings[name] >= vocabulary:
                _refuse(where, name, settings[name], f"a token id below vocab_size, which is {vocabulary:,}")
    for name, other in (("label_scale", "label_mean"), ("label_mean", "label_scale")):
        if settings.get(name) is not None and len(settings[name]) != len(settings.get(other) or ()):
            _refuse(where, name, settings[name], f"as many numbers as {other} has ({len(settings.get(other) or ()):,})")


def _refuse(where: str, name: str, value: Any, expected: str) -> None:
    shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}…"
    msg = f"{where}: {name} is {shown}; expected {expected}. Correct config.json, or save the model again."
    raise CheckpointError(msg)
