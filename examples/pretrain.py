"""Pretrain a small Geneformer on tokenized cells: python pretrain.py TOKENS TOKENIZER OUTPUT

Run it again after an interruption and it goes on where it was; `torchrun --nproc_per_node 2 pretrain.py …` uses two processes.
"""

import sys

from transformers import AutoModelForMaskedLM

from geneformer_hf import GeneformerPretrainingArguments, pretrain


def main(tokens: str, tokenizer: str, output: str) -> None:
    arguments = GeneformerPretrainingArguments(
        output_dir=output,
        tokenizer=tokenizer,
        train_data=[tokens],
        shape="gf-6L-30M-i2048",
        # The published shape takes days on a GPU; this one shows the way in a minute.
        shape_overrides={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 4096,
            "attention_probs_dropout_prob": 0.0,
        },
        num_train_epochs=5,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        held_out=0.2,
        logging_steps=5,
    )  # fmt: skip
    run = pretrain(arguments)
    found = next(iter(run.figures["held_out"].values()))
    print(f"held-out loss {found['after']['loss']:.2f}; gene frequency {found['baselines']['gene_frequency']:.2f} nats")
    print(f"{type(AutoModelForMaskedLM.from_pretrained(run.folder)).__name__} in {run.folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
