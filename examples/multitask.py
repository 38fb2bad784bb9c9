"""Learn several columns of obs at once: python multitask.py CELLS.h5ad MODEL OUTPUT COLUMN COLUMN …"""

import sys

import geneformer_hf
from geneformer_hf import GeneformerFineTuningArguments, finetune


def main(cells: str, model: str, output: str, *columns: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output,
        from_checkpoint=model,
        train_data=[cells],
        label=list(columns),
        pooling="attention",
        num_train_epochs=3,
        learning_rate=1e-3,
        baselines=False,
    )
    run = finetune(arguments)
    for head, figures in run.figures["heads"].items():
        print(f"{head}: accuracy {figures['this model']['accuracy']:.2f}")
    # Heads, pooling, weights and classes are in its configuration: the Auto classes open it.
    from transformers import AutoModelForSequenceClassification

    print(type(AutoModelForSequenceClassification.from_pretrained(run.folder)).__name__, geneformer_hf.load_model(run.folder).config.task_labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
