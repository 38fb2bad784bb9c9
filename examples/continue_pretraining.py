"""Go on from a checkpoint on a new domain, with replay of the old one: python continue_pretraining.py CHECKPOINT NEW OLD OUTPUT"""

import sys

from geneformer_hf import GeneformerPretrainingArguments, pretrain


def main(checkpoint: str, new: str, old: str, output: str) -> None:
    arguments = GeneformerPretrainingArguments(
        output_dir=output,
        from_checkpoint=checkpoint,
        train_data=[new, old],
        train_names=["new", "old"],
        # Of ten cells shown, nine are of the new domain and one of the old; an epoch shows the new one once.
        train_weights=[0.9, 0.1],
        num_train_epochs=3,
        learning_rate=5e-4,
        freeze_layers=1,
        held_out=0.2,
        logging_steps=5,
    )
    run = pretrain(arguments)
    for domain, found in run.figures["held_out"].items():
        print(f"{domain}: held-out loss {found['before']['loss']:.3f} before, {found['after']['loss']:.3f} after")


if __name__ == "__main__":
    main(*sys.argv[1:])
