"""Fine-tune with a LoRA adapter, open it with PEFT, merge it: python lora.py CELLS.h5ad MODEL OUTPUT"""

import sys

from geneformer_hf import GeneformerFineTuningArguments, embed_cells, finetune, load_peft_model, merge_adapter


def main(cells: str, model: str, output: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output,
        from_checkpoint=model,
        train_data=[cells],
        label=["cell_type"],
        adapter="lora",
        lora_rank=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        baselines=False,
    )
    run = finetune(arguments)
    print(f"{run.figures['trained_parameters']:,} of {run.figures['parameters']:,} parameters were trained")
    # Every analysis takes the adapter's folder; so does PEFT.
    print(f"embeddings {embed_cells(run.folder, cells, progress=False).shape}; a {type(load_peft_model(run.folder)).__name__}")
    print(f"merged with its base: {merge_adapter(run.folder, f'{output}-merged')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
