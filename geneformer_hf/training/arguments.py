"""Arguments of pretraining and fine-tuning: those of transformers' Trainer and ours."""

# ruff: noqa: RUF009  (about is dataclasses.field with a help text)

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..data.masking import MaskingRates
from ..models.configuration_geneformer import POOLINGS, PRESETS
from ..models.heads import PROBLEM_TYPES
from .settings import RANGES, SHARE, WHOLE, TrainingSettings, about, suggestion

METRICS = ("loss", "loss_at_mask", "perplexity", "accuracy_top1", "accuracy_top10")


@dataclass
class GeneformerPretrainingArguments(TrainingSettings):
    """How to pretrain: every argument of `transformers.TrainingArguments`, and these.

    The batch size of a recipe is in cells: `per_device_train_batch_size` times `gradient_accumulation_steps` times the number of
    processes. Same product, same numbers.

    Example:
        >>> arguments = GeneformerPretrainingArguments(output_dir="run", shape="gf-6L-30M-i2048", tokenizer="geneformer-v1", train_data=["tokens"])
        >>> arguments.mask_probability, arguments.batch_layout
        (0.15, 'auto')
    """

    command: ClassVar[str] = "pretrain"
    lists: ClassVar[tuple[str, ...]] = ("train_data", "train_names", "eval_data")
    mappings: ClassVar[tuple[str, ...]] = ("shape_overrides",)
    ranges: ClassVar[dict[str, tuple[float, Any, str]]] = RANGES | {
        "held_out": (0, (int, float), "a share below 1, or a number of cells"),
        "mask_probability": (0, (int, float), "a share between 0 and 1"),
        "mask_share": (0, (int, float), "a share"),
        "random_share": (0, (int, float), "a share"),
    }

    shape: str | None = about(f"shape of a new model with random weights: {', '.join(PRESETS)}")
    shape_overrides: dict | str | None = about('fields of the configuration to change, as JSON: {"hidden_size": 128}')
    from_checkpoint: str | None = about("go on from the weights of this checkpoint (folder or Hub id) instead")
    train_data: list[str] | None = about("tokenized datasets to train on; with several, the first is the new domain")
    train_names: list[str] | None = about("what logs call them (default: the names of their folders)")
    train_weights: list[float] | None = about("share of each dataset among the cells shown (default: all cells once an epoch)")
    eval_data: list[str] | None = about("tokenized datasets to evaluate on, one for each of train_data, for instance of other donors")
    held_out: float = about("without eval_data, cells of each dataset kept for evaluation: a share below 1, or a number", 0.01)
    mask_probability: float = about("share of genes the model is asked for", MaskingRates.chosen)
    mask_share: float = about("of those, the share that becomes <mask>", MaskingRates.masked)
    random_share: float = about("of those, the share that becomes a random gene; the rest stays", MaskingRates.random)
    fused_loss: bool = about("compute logits and loss in chunks: less memory, slower on a CPU", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        MaskingRates(self.mask_probability, self.mask_share, self.random_share)

    def out_of_range(self) -> list[str]:
        """Return what is not a value that the setting takes."""
        wrong = super().out_of_range()
        weights = self.train_weights
        if weights is not None and not (
            isinstance(weights, (list, tuple)) and all(isinstance(w, (int, float)) and math.isfinite(w) and w > 0 for w in weights)
        ):
            wrong.append(f"train_weights is {weights!r}; expected one number above 0 for each dataset")
        if not any(text.startswith("held_out") for text in wrong) and self.held_out > 1 and self.held_out != int(self.held_out):
            wrong.append(f"held_out is {self.held_out}; expected a share below 1, or a whole number of cells")
        return wrong

    def contradictions(self) -> list[tuple[bool, str]]:
        """Return what contradicts what, each with whether it holds."""
        return [
            (self.shape is not None and self.from_checkpoint is not None, "shape makes a new model and from_checkpoint goes on from one; give one of them"),
            (self.shape_overrides is not None and self.shape is None, "shape_overrides changes a new model; give shape as well"),
            (self.shape is not None and self.shape not in PRESETS, f"shape {self.shape!r} is not one of {', '.join(PRESETS)}{suggestion(self.shape or '', PRESETS)}"),
            (self.adapter != "none" and self.shape is not None, "an adapter adds to a model that has learnt something; give from_checkpoint in place of shape"),
            (self.label_smoothing_factor > 0, "label_smoothing_factor needs all logits at all positions, which pretraining never computes"),
            ((self.metric_for_best_model or "loss").removeprefix("eval_").split("_")[-1] not in [name.split("_")[-1] for name in METRICS],
             f"metric_for_best_model {self.metric_for_best_model!r} is not one of {', '.join(METRICS)}"),
            *super().contradictions(),
        ]  # fmt: skip

    @property
    def rates(self) -> MaskingRates:
        """How genes are hidden."""
        return MaskingRates(self.mask_probability, self.mask_share, self.random_share)


CLASS_WEIGHTS = ("none", "balanced")
MISSING = ("refuse", "leave_out")


@dataclass
class GeneformerFineTuningArguments(TrainingSettings):
    """How to fine-tune: every argument of `transformers.TrainingArguments`, and these.

    Example:
        >>> arguments = GeneformerFineTuningArguments(output_dir="run", from_checkpoint="model", train_data=["cells.h5ad"], label=["cell_type"])
        >>> arguments.num_train_epochs, arguments.test_share
        (10, 0.1)
    """

    command: ClassVar[str] = "finetune"
    lists: ClassVar[tuple[str, ...]] = ("train_data", "validation_data", "test_data", "label", "balance_columns")
    mappings: ClassVar[tuple[str, ...]] = ("leave_out", "keep_only", "task_weights")
    ranges: ClassVar[dict[str, tuple[float, Any, str]]] = RANGES | {
        "validation_share": (0, (int, float), SHARE),
        "test_share": (0, (int, float), SHARE),
        "n_folds": (2, int, "a whole number of at least 2"),
        "split_trials": (1, int, WHOLE),
        "rare_threshold": (0, (int, float), "a share below 1, or a number of cells"),
        "max_cells": (1, int, WHOLE),
        "max_cells_per_class": (1, int, WHOLE),
        "dropout": (0, (int, float), SHARE),
        "attention_dropout": (0, (int, float), SHARE),
        "integration_weight": (0, (int, float), "a number of at least 0"),
    }

    train_data: list[str] | None = about("files of cells (.h5ad, .zarr, .loom, 10x) or tokenized datasets, with their labels")
    validation_data: list[str] | None = about("files of cells or datasets to choose the best epoch by (default: validation_share of train_data)")
    test_data: list[str] | None = about("files of cells or datasets for the final figures, for instance of another study (default: test_share of train_data)")
    label: list[str] | None = about(
        "column of obs to predict; with several, one head each (one head for problem_type multi_label_classification or regression)"
    )
    problem_type: str = about(f"{', '.join(PROBLEM_TYPES)}", PROBLEM_TYPES[0])
    gene_classes: str | None = about("classify genes instead: a table of genes and classes (.csv, .tsv, or .json of class: [genes])")
    leave_out: dict | str | None = about('cells not to use, as column: values: {"cell_type": ["unassigned"]}')
    keep_only: dict | str | None = about("cells to use, as column: values")
    missing_labels: str = about("cells without a label: refuse, or leave_out (several heads take them as they are)", MISSING[0])
    rare_threshold: float = about("leave out classes with fewer cells than this: a share below 1, or a number", 0)
    max_cells_per_class: int | None = about("use so many cells of each class, drawn by the seed")
    max_cells: int | None = about("use so many cells, drawn by the seed")
    class_weights: str = about("balanced: rare classes weigh as much as frequent ones", CLASS_WEIGHTS[0])
    task_weights: dict | str | None = about("weight of each head in the loss, as column: weight (default: 1 each)")
    integrate: str | None = about("column, such as the batch or study, across which the embeddings of cells of one class are drawn together")
    integration_weight: float = about("weight of that in the loss", 1.0)
    group_column: str | None = about("column whose values, such as donors, are each wholly on one side of every split")
    validation_share: float | None = about("cells to choose the best epoch on (default: 0.1; with n_folds or gene_classes, 0)")
    test_share: float = about("cells for the final figures", 0.1)
    n_folds: int | None = about("cross-validation: every cell, or gene, is tested once; the final model is then trained on all of them")
    stratify: bool = about("the same shares of classes on all sides, as far as groups allow", True)
    balance_columns: list[str] | None = about(
        "columns whose values shall not differ between training and test cells; of split_trials splits the one with the least difference is taken"
    )
    split_trials: int = about("splits to choose from with balance_columns", 100)
    pooling: str | None = about(f"what heads of cells read: {', '.join(POOLINGS)} (default: cls where the vocabulary has it, else mean)")
    dropout: float | None = about("dropout of hidden states and heads (default: the checkpoint's)")
    attention_dropout: float | None = about("dropout of attention; on a CPU, 0 is several times faster (default: the checkpoint's)")
    gene_ids: str | None = about("column of var with Ensembl ids or symbols, or 'index' (default: found by itself)")
    counts_layer: str | None = about("layer with the raw counts (default: found by itself)")
    genome: str | None = about("genome to read of a file that mixes several, such as hg19 or human")
    baselines: bool = about("compare with majority class, logistic regression, nearest neighbours and the untrained encoder", True)

    # Other defaults than transformers': those of the published classifier where it names any.
    num_train_epochs: float = about("passes over the training cells", 10)
    per_device_train_batch_size: int = about("cells in a step, on each process", 12)
    per_device_eval_batch_size: int = about("cells at a time in evaluation", 32)
    weight_decay: float = about("weight decay of AdamW", 0.001)
    save_strategy: str = about("when to write a checkpoint: epoch, steps, best or no", "epoch")
    save_total_limit: int | None = about("checkpoints to keep, beside the best", 1)
    logging_steps: float = about("steps between two logs", 10)
    load_best_model_at_end: bool = field(default=True, metadata={"help": "keep the epoch that does best on validation cells"})

    def __post_init__(self) -> None:
        if "no" in [str(getattr(value, "value", value)) for value in (self.eval_strategy, self.save_strategy)]:
            # Nothing to choose the best epoch by, or from.
            self.load_best_model_at_end = False
        asked = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        # Trainer would say "loss"; which figure it is depends on what is predicted.
        self.metric_for_best_model, self.greater_is_better = asked

    def out_of_range(self) -> list[str]:
        """Return what is not a value that the setting takes."""
        wrong = super().out_of_range()
        for name, choices in (
            ("problem_type", PROBLEM_TYPES),
            ("class_weights", CLASS_WEIGHTS),
            ("missing_labels", MISSING),
        ):
            value = getattr(self, name)
            if value not in choices:
                wrong.append(f"{name} is {value!r}; expected {' or '.join(choices)}{suggestion(str(value), choices)}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            wrong.append(f"pooling is {self.pooling!r}; expected {' or '.join(POOLINGS)}")
        for name in ("validation_share", "test_share", "dropout", "attention_dropout"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value >= 1:
                wrong.append(f"{name} is {value}; expected {SHARE}")
        for name in ("leave_out", "keep_only"):
            wrong += [
                f"{name}: {column!r} has {values!r}; expected a list of values"
                for column, values in (getattr(self, name) or {}).items()
                if not isinstance(values, list)
            ]
        saved, evaluated = (str(getattr(value, "value", value)) for value in (self.save_strategy, self.eval_strategy))
        if self.load_best_model_at_end and saved not in (evaluated, "best"):
            wrong.append(f"load_best_model_at_end needs the same save_strategy and eval_strategy, which are {saved} and {evaluated}")
        weights = (self.task_weights or {}).values()  # type: ignore[union-attr]
        if not all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) and w > 0 for w in weights):
            wrong.append(f"task_weights is {self.task_weights!r}; expected a number above 0 for each column")
        return wrong

    def contradictions(self) -> list[tuple[bool, str]]:
        """Return what contradicts what, each with whether it holds."""
        labels, several = self.label or [], len(self.label or []) > 1 and self.problem_type == PROBLEM_TYPES[0]
        of_cells = ("group_column", "validation_data", "test_data", "balance_columns", "integrate", "task_weights", "pooling", "max_cells_per_class")
        return [
            (bool(labels) == bool(self.gene_classes), "give label, a column of obs to predict, or gene_classes, a table of genes; one of them"),
            (len(set(labels)) != len(labels), f"label names a column twice: {', '.join(labels)}"),
            *((bool(self.gene_classes) and getattr(self, name) is not None, f"{name} is for cells, and gene_classes is about genes") for name in of_cells),
            (bool(self.gene_classes) and self.problem_type != PROBLEM_TYPES[0], f"gene_classes has classes, and problem_type is {self.problem_type}"),
            (bool(self.gene_classes) and self.rare_threshold > 0, "rare_threshold is for classes of cells, and gene_classes is about genes"),
            (bool(self.task_weights) and not several, "task_weights is for several columns of label"),
            (bool(self.integrate) and (len(labels) != 1 or self.problem_type != PROBLEM_TYPES[0]), "integrate is for one column of classes"),
            (self.integrate in labels, f"integrate names {self.integrate!r}, the column to predict; expected what it shall not depend on, such as the batch"),
            (self.problem_type != PROBLEM_TYPES[0] and self.class_weights != "none", f"class_weights are for classes, and problem_type is {self.problem_type}"),
            (self.problem_type != PROBLEM_TYPES[0] and self.max_cells_per_class is not None, f"max_cells_per_class is for classes, and problem_type is {self.problem_type}"),
            (self.problem_type != PROBLEM_TYPES[0] and self.rare_threshold > 0, f"rare_threshold is for classes, and problem_type is {self.problem_type}"),
            (several and self.max_cells_per_class is not None, "max_cells_per_class is for one column of label"),
            *((name not in labels, f"task_weights names {name!r}, which is not a column of label") for name in self.task_weights or {}),
            (self.n_folds is not None and (self.validation_data is not None or self.test_data is not None), "n_folds makes the test cells itself; leave out validation_data and test_data"),
            (self.test_data is not None and self.balance_columns is not None, "balance_columns chooses among splits, and test_data is given"),
            (self.label_smoothing_factor > 0, "label_smoothing_factor is not applied by our heads"),
            *super().contradictions(),
        ]  # fmt: skip
