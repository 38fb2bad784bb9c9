"""The Trainer of labels: of cells, and of genes in cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..data.collators import DataCollatorForCells, DataCollatorForGenes
from ..data.mixtures import KeyedCells, Mixture
from ..models.adapters import unwrapped
from ..models.attention import PACKED_ATTENTION
from ..models.heads import IGNORED
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.classification import figures_of
from .arguments import GeneformerFineTuningArguments
from .planned import CELLS, PlannedTrainer, layout_of
from .tasks import CellTask, GeneScores, GeneTask


class GeneformerFineTuner(PlannedTrainer):
    """Trainer for labels.

    Args:
        model (`PreTrainedModel` or `PeftModel`, or None with `model_init`)
        args (`GeneformerFineTuningArguments`)
        mixture (`Mixture`): one corpus; its held-out rows are not trained on.
        task (`CellTask` or `GeneTask`)
        validation: rows of cells (of genes, for a `GeneTask`) that are evaluated on while training.
        train_genes: for a `GeneTask`, the genes that are learnt.
    """

    args: GeneformerFineTuningArguments

    def __init__(
        self, model: Any, args: GeneformerFineTuningArguments, *, mixture: Mixture, task: CellTask | GeneTask, tokenizer: GeneformerTokenizer,
        validation: np.ndarray, train_genes: np.ndarray | None = None, identity: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (), model_init: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.validation = task, validation
        layout, multiple = layout_of(args), 64 if args.torch_compile else None
        collate: Any = DataCollatorForCells(tokenizer, layout=layout, pad_to_multiple_of=multiple)
        if isinstance(task, GeneTask):
            collate = DataCollatorForGenes(tokenizer, task.classes.of_tokens(task.vocab_size, train_genes), layout=layout, pad_to_multiple_of=multiple)
        self._layout_alone = DataCollatorForCells(tokenizer, layout=layout, pad_to_multiple_of=multiple)
        dataset = KeyedCells(mixture.corpora, task.learnt if isinstance(task, CellTask) else None)
        super().__init__(
            model, args, mixture=mixture, dataset=dataset, collate=collate, tokenizer=tokenizer, eval_dataset=validation if len(validation) else None,
            identity=identity, callbacks=callbacks, model_init=model_init,
        )  # fmt: skip

    def call_model_init(self, trial: Any = None) -> Any:
        """Make the model of a trial of a search.

        Trainer makes it before it takes up what the trial tries, so settings of the model would be those of the trial before.
        """
        if trial is not None:
            tried = trial if isinstance(trial, dict) else self.hp_space(trial)  # type: ignore[misc]
            for name, value in tried.items():
                before = getattr(self.args, name, None)
                setattr(self.args, name, value if before is None else type(before)(value))
        model = super().call_model_init(trial)
        if self.layout == "packed":
            unwrapped(model).set_attn_implementation(PACKED_ATTENTION)
        return model

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches, planned by the arguments as they are now: a search changes them."""
        self.make_plan()
        return super().get_train_dataloader()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return loss and figures on the validation cells or genes."""
        if isinstance(self.task, CellTask):
            logits, loss = self.predict_rows(self.validation, desc="Evaluating")
            found = {"loss": loss, **self.task.metrics(logits, self.validation)}
        else:
            found = self._gene_metrics(self.task)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _gene_metrics(self, task: GeneTask) -> dict[str, float]:
        scores = self.score_genes(self.cell_rows, task.classes.of_tokens(task.vocab_size, self.validation), desc="Evaluating")
        tokens = task.classes.token_ids[self.validation]
        seen = scores.n_cells_v[tokens] > 0
        figures = figures_of(task.head, task.classes.class_ids[self.validation][seen], scores.means(tokens[seen]))
        chosen = scores.probabilities_mc[np.arange(len(scores.classes_m)), scores.classes_m]
        loss = float(-np.log(np.clip(chosen, 1e-30, None)).mean())
        return {"loss": loss} | {name: figures[name] for name in ("accuracy", "macro_f1", "roc_auc")}

    @property
    def cell_rows(self) -> np.ndarray:
        """The rows of cells to train on."""
        corpus = self.mixture.corpora[0]
        return corpus.train_rows(np.arange(corpus.n_train))

    def predict_rows(self, rows: np.ndarray, *, desc: str) -> tuple[np.ndarray, float]:
        """Return the logits of some cells, float32 of shape `(m, all heads)`, and their mean loss."""
        position = {row: place for place, row in enumerate(rows.tolist())}
        found: list[tuple[list[int], np.ndarray, float, int]] = []
        for keys, batch in self._batches(rows, self.keyed_collator.collate, desc):
            labels = batch["labels"]
            output = self._model_output(batch)
            logits = torch.cat(output.logits, dim=1) if isinstance(output.logits, tuple) else output.logits
            counted = int((labels != IGNORED).sum())
            found.append(([position[key.row] for key in keys], logits.float().cpu().numpy(), float(output.loss) * counted, counted))
        if self.args.world_size > 1:
            found = gather_object(found)
        out = np.empty((len(rows), found[0][1].shape[1]), dtype=np.float32)
        for places, logits, _, _ in found:
            out[places] = logits
        return out, sum(total for _, _, total, _ in found) / max(sum(n for *_, n in found), 1)

    def score_genes(self, rows: np.ndarray, class_of_token: np.ndarray, *, desc: str) -> GeneScores:
        """Return what the model says of the genes with a class, wherever some cells express them."""
        n_classes = len(self.task.head.names)  # type: ignore[union-attr]
        scores = GeneScores.empty(len(class_of_token), n_classes)
        parts = []
        for _, batch in self._batches(rows, self._layout_alone, desc):
            ids = batch["input_ids"]
            classes = torch.from_numpy(class_of_token).to(ids.device)[ids]
            asked = classes != IGNORED
            logits = self._model_output(batch).logits[asked]
            parts.append((ids[asked].cpu().numpy(), classes[asked].cpu().numpy(), F.softmax(logits.float(), -1).cpu().numpy()))
        if self.args.world_size > 1:
            parts = gather_object(parts)
        for tokens, _, probabilities in parts:
            np.add.at(scores.sums_vc, tokens, probabilities.astype(np.float64))
            np.add.at(scores.n_cells_v, tokens, 1)
        if parts:
            scores.classes_m = np.concatenate([classes for _, classes, _ in parts]).astype(np.int16)
            scores.probabilities_mc = np.concatenate([probabilities for *_, probabilities in parts])
        return scores

    def _batches(self, rows: np.ndarray, collate: Any, desc: str) -> Any:
        """Yield keys and batches of this process, the model in evaluation mode."""
        model = self.model
        assert model is not None
        was_training = model.training
        model.eval()
        progress = not self.args.disable_tqdm and self.is_world_process_zero()
        with torch.no_grad():
            for keys, counts in tqdm(self.dealt_batches(0, rows), desc=desc, disable=None if progress else True, leave=False, unit=" batches"):
                batch = self._prepare_inputs(collate(self.train_dataset.__getitems__(keys)))  # type: ignore[union-attr]
                batch.pop(CELLS, None)
                if isinstance(self.task, CellTask) and self.task.batches is not None:
                    # Without the column of batches: the loss of an evaluation does not depend on which cells come together.
                    batch["labels"] = batch["labels"][:, :-1]
                if counts:
                    yield keys, batch
                else:
                    # Another process has one batch more, and layers may be shared.
                    self._model_output(batch)
        model.train(was_training)

    def _model_output(self, batch: dict[str, Any]) -> Any:
        with self.compute_loss_context_manager():
            return self.model(**batch)  # type: ignore[misc]
