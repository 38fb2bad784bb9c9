"""The Trainer of masked genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..data.collators import DataCollatorForMaskedGenes
from ..data.mixtures import Corpus, KeyedCells, Mixture
from ..errors import SettingError
from ..models.adapters import unwrapped
from ..models.heads import IGNORED
from ..models.modeling_geneformer import has_fused_loss
from ..models.tokenization_geneformer import GeneformerTokenizer
from ..reports.metrics import MaskedGeneScores
from .arguments import GeneformerPretrainingArguments
from .planned import PlannedTrainer, layout_of


class GeneformerPretrainer(PlannedTrainer):
    """Trainer for masked genes.

    Args:
        model (`GeneformerForMaskedLM`, or a `PeftModel` of one)
        args (`GeneformerPretrainingArguments`)
        mixture (`Mixture`): the cells; those held out are evaluated on.
        tokenizer (`GeneformerTokenizer`)
        identity (`dict`): what the numbers depend on; written with each checkpoint.
    """

    args: GeneformerPretrainingArguments

    def __init__(
        self, model: Any, args: GeneformerPretrainingArguments, *, mixture: Mixture, tokenizer: GeneformerTokenizer, identity: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:  # fmt: skip
        if args.fused_loss:
            if not has_fused_loss():
                msg = f"fused_loss needs torch 2.13 or later; this is torch {torch.__version__}."
                raise SettingError(msg)
            unwrapped(model).fused_loss = True
        self._require_metric(args, mixture)
        super().__init__(
            model, args, mixture=mixture, dataset=KeyedCells(mixture.corpora), collate=_collator(args, tokenizer), tokenizer=tokenizer,
            eval_dataset=[corpus for corpus in mixture.corpora if corpus.n_held_out] or None, identity=identity, callbacks=callbacks,
        )  # fmt: skip

    def _require_metric(self, args: GeneformerPretrainingArguments, mixture: Mixture) -> None:
        """Raise if the figure that tells the best checkpoint is not among those that will be measured."""
        names = list(MaskedGeneScores().figures())
        judged = [corpus.name for corpus in mixture.corpora if corpus.n_held_out]
        known = [*names, *(f"{corpus}_{name}" for corpus in judged for name in names if len(judged) > 1)]
        wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if wanted not in known:
            msg = f"metric_for_best_model {args.metric_for_best_model!r} is not one of {', '.join(known)}."
            raise SettingError(msg)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return loss, perplexity and accuracies at hidden genes of held-out cells, of each corpus and of all.

        The hidden genes are the same each time.
        """
        corpora: list[Corpus] = eval_dataset or self.eval_dataset or []  # type: ignore[assignment]
        metrics: dict[str, float] = {}
        total = MaskedGeneScores()
        for corpus in corpora:
            scores = self.score_held_out(corpus)
            if len(corpora) > 1:
                metrics |= {f"{metric_key_prefix}_{corpus.name}_{name}": value for name, value in scores.figures().items()}
            total += scores
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in total.figures().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_held_out(self, corpus: Corpus) -> MaskedGeneScores:
        """Return the scores of the model as it is now on the held-out cells of one corpus."""
        model, collate = self.model, self.keyed_collator.collate
        mask = collate.masker.mask_token_id
        assert model is not None
        was_training = model.training
        model.eval()
        scores, batches = MaskedGeneScores(), self.dealt_batches(self.mixture.corpora.index(corpus), corpus.held_out_rows)
        dataset, progress = KeyedCells(self.mixture.corpora), not self.args.disable_tqdm and self.is_world_process_zero()
        with torch.no_grad(), self.compute_loss_context_manager():
            for keys, counts in tqdm(batches, desc=f"Evaluating on {corpus.name}", disable=None if progress else True, leave=False, unit=" batches"):
                batch = self._prepare_inputs(collate(dataset.__getitems__(keys)))
                logits_mv = model(**batch, full_logits=False).logits
                if counts:
                    asked = batch["labels"] != IGNORED
                    scores.add(logits_mv, batch["labels"][asked], batch["input_ids"][asked] == mask)
        model.train(was_training)
        if self.args.world_size > 1:
            scores.merge(self.accelerator.reduce, self.args.device)
        return scores


def _collator(args: GeneformerPretrainingArguments, tokenizer: GeneformerTokenizer) -> DataCollatorForMaskedGenes:
    rates = args.rates
    return DataCollatorForMaskedGenes(
        tokenizer, mask_probability=rates.chosen, mask_share=rates.masked, random_share=rates.random, seed=args.order_seed, layout=layout_of(args),
        # Fixed shapes, so that compiled code is not compiled anew for every length.
        pad_to_multiple_of=64 if args.torch_compile else None,
    )  # fmt: skip
