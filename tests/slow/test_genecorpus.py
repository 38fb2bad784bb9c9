"""Does it learn? Pretraining on 450 real Genecorpus cells, 50 held out, against the baselines; and what cannot be learnt is not."""

import datasets
import numpy as np
import pytest

from geneformer_hf import GeneformerPretrainingArguments, GeneformerTokenizer, pretrain
from geneformer_hf.data.masking import GeneMasker
from geneformer_hf.data.mixtures import EVALUATION
from geneformer_hf.models.dictionaries import find_dictionaries
from geneformer_hf.models.heads import IGNORED
from tests.tolerances import EQUALS_FREQUENCY

pytestmark = [pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(2400)]
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    from tests.conftest import shared_folder

    folder, data = tmp_path_factory.mktemp("genecorpus"), shared_folder() / "data"
    tokenizer = GeneformerTokenizer.from_dictionaries(find_dictionaries(data / "geneformer_dicts_v1", 25_426), model_max_length=2048)
    cells = datasets.Dataset.from_parquet(str(data / "genecorpus30m_500" / "genecorpus_500_samples.parquet"), cache_dir=str(folder / "cache"))

    def go(name, epochs):
        arguments = GeneformerPretrainingArguments(
            output_dir=str(folder / name), shape="gf-6L-30M-i2048", shape_overrides=SHAPE, per_device_train_batch_size=2, num_train_epochs=epochs, learning_rate=3e-3,
            lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.01, held_out=50, save_strategy="no", eval_strategy="no", disable_tqdm=True, bf16=True,
        )  # fmt: skip
        return pretrain(arguments, cells, tokenizer=tokenizer).figures["held_out"]["cells"]

    return cells, go


def test_the_model_beats_both_baselines_by_a_tenth_of_a_nat(train):
    found = train[1]("learning", 4)
    assert found["baselines"]["hidden_genes"] > 15_000
    # So that the bar is a fair one: frequency by rank knows more than frequency.
    assert found["baselines"]["rank_frequency"] < found["baselines"]["gene_frequency"] - 0.1
    assert found["after"]["loss"] < found["baselines"]["rank_frequency"] - 0.1
    # Much of that is copying genes that were chosen and left standing; of those it cannot see it knows more than their frequency, and after four minutes hardly
    # more than their frequency at that rank (8.32 against 8.34 nats when it was measured).
    assert found["after"]["loss_at_mask"] < found["baselines"]["gene_frequency_at_mask"] - 0.1


def test_with_shuffled_labels_it_learns_gene_frequency_and_no_more(train, monkeypatch):
    cells, go = train
    everything = np.concatenate(cells.with_format("numpy")["input_ids"][:])
    rng, hide = np.random.default_rng(0), GeneMasker.hide

    def hide_and_shuffle(self, ids, lengths, keys):
        ids, labels = hide(self, ids, lengths, keys)
        if keys[0].showing != EVALUATION:
            # The gene of any cell, at any rank, in place of the one that was hidden.
            labels[labels != IGNORED] = rng.choice(everything, int((labels != IGNORED).sum()))
        return ids, labels

    monkeypatch.setattr(GeneMasker, "hide", hide_and_shuffle)
    found = go("shuffled", 2)
    assert abs(found["after"]["loss"] - found["baselines"]["gene_frequency"]) < EQUALS_FREQUENCY
