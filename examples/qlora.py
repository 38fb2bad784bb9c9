"""Fine-tune an adapter on 4-bit weights, and predict with 8-bit ones: python qlora.py CELLS.h5ad MODEL OUTPUT"""

import sys

from geneformer_hf import GeneformerFineTuningArguments, finetune, load_model, predict


def main(cells: str, model: str, output: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output, from_checkpoint=model, train_data=[cells], label=["cell_type"], adapter="lora", quantization="nf4", num_train_epochs=2, learning_rate=1e-3,
        baselines=False,
    )  # fmt: skip
    run = finetune(arguments)
    for quantization in ("nf4", "int8", "none"):
        opened = load_model(run.folder, quantization=quantization)
        found = predict(run.folder, cells, quantization=quantization, progress=False)["cell_type"].probabilities
        print(f"{quantization:4}  {opened.get_memory_footprint() / 1e6:.2f} MB  first cell: {found[0].round(3).tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
