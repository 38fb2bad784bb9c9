"""Look for the settings that do best on validation cells, then fine-tune with them: python search_hyperparameters.py CELLS.h5ad MODEL OUTPUT

Run it again with more trials and it goes on; run it in several shells and they share the trials.
"""

import sys

from geneformer_hf import GeneformerFineTuningArguments, SearchSettings, search


def main(cells: str, model: str, output: str) -> None:
    arguments = GeneformerFineTuningArguments(
        output_dir=output, from_checkpoint=model, train_data=[cells], label=["cell_type"], num_train_epochs=2, baselines=False
    )
    settings = SearchSettings(space={"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "freeze_layers": [0, 1]}, n_trials=3)
    found = search(arguments, settings)
    print(found.trials[["trial", "state", "value", "learning_rate", "freeze_layers"]].to_string(index=False))
    print(f"best {found.best}, refitted in {found.refitted.folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
