"""Every kind of adapter that PEFT makes on a Geneformer: saved and opened again it gives the same, or it is refused by name."""

import inspect
import warnings

import pytest
import torch

from geneformer_hf import GeneformerForSequenceClassification, load_model
from geneformer_hf.errors import CheckpointError, SettingError
from tests.conftest import tiny_config

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.slow

WORKS = {
    "LORA": {}, "ADALORA": {"total_step": 10}, "ADAMSS": {}, "DEFT": {}, "GLORA": {}, "PEANUT": {}, "SHIRA": {"r": 1}, "WAVEFT": {"n_frequency": 20}, "BEFT": {}, "BOFT": {}, "C3A": {"block_size": 8}, "DELORA": {}, "FOURIERFT": {"n_frequency": 20}, "FROD": {}, "GRALORA": {}, "HIRA": {}, "HRA": {},
    "IA3": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}, "LILY": {}, "LN_TUNING": {}, "LOHA": {}, "LOKR": {}, "MISS": {"r": 4}, "OFT": {}, "OSF": {}, "PSOFT": {"r": 4},
    "PVERA": {}, "RANDLORA": {}, "ROAD": {"group_size": 8}, "SUPERTUNING": {}, "TINYLORA": {}, "UNILORA": {}, "VBLORA": {"vector_length": 8}, "VERA": {},
}  # fmt: skip
"""With settings that fit a hidden size of 16."""
REFUSED = {
    "PREFIX_TUNING": ({"num_virtual_tokens": 4}, "past_key_values was passed to a Geneformer, as prefix tuning"),
    "PROMPT_TUNING": ({"num_virtual_tokens": 4}, "the field 'prompt_tuning_init' is 'RANDOM'"),
    "P_TUNING": ({"num_virtual_tokens": 4}, "the field 'encoder_reparameterization_type' is 'MLP'"),
}
INPUT = {"input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 3, 0]]), "attention_mask": torch.tensor([[1] * 5, [1] * 4 + [0]])}


@pytest.fixture
def base(tokenizer, tmp_path):
    torch.manual_seed(0)
    GeneformerForSequenceClassification(tiny_config(tokenizer, num_labels=3)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def outputs(name, settings, base, folder):
    """Logits of a trained adapter before and after it was saved."""
    kinds = {str(getattr(kind, "value", kind)): made for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = {"target_modules": ["query", "value"]} if "target_modules" in inspect.signature(kinds[name]).parameters else {}
        model = peft.get_peft_model(GeneformerForSequenceClassification.from_pretrained(base), kinds[name](task_type="SEQ_CLS", **layers | settings))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # As training would leave it: many adapters begin as nothing.
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.eval()
        with torch.no_grad():
            before = model(**INPUT).logits
            model.save_pretrained(folder)
            return before, load_model(folder, base=base)(**INPUT).logits


@pytest.mark.parametrize("name", WORKS)
def test_an_adapter_that_is_opened_again_is_the_same(name, base, tmp_path):
    before, after = outputs(name, WORKS[name], base, tmp_path / "adapter")
    plain = load_model(base)(**INPUT).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert not torch.allclose(after, plain, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_is_not_opened_is_named(name, base, tmp_path):
    settings, words = REFUSED[name]
    with pytest.raises((CheckpointError, SettingError), match=words):
        outputs(name, settings, base, tmp_path / "adapter")
