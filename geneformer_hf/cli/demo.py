"""`geneformer-hf demo`: the whole path on real cells."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, NotRawCountsError
from .command import Command, add_overwrite, add_seed, positive

N_HELD_OUT = 140
LABEL = "cell_type"


class Demo(Command):
    """The whole path on 700 real blood cells, offline: counts, tokens, a tiny model trained from scratch, embeddings, a classifier, pictures.

    The cells are 10x Genomics' 68k PBMC (Zheng et al. 2017) as scanpy carries them, 765 genes with published cell types.
    """

    name = "demo"
    help = "the whole path on real cells, offline, in a few minutes"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--output", type=Path, default=Path("demo_output"), help="new folder (default: demo_output)")
        parser.add_argument("--epochs", type=positive, default=20, help="passes over the training cells (default: 20, a little over a minute on two cores)")
        add_seed(parser, "the model, its training and the pictures")
        add_overwrite(parser)

    def run(self, args: Namespace) -> int:
        from ..outputs import new_folder, require_free

        require_free(args.output, overwrite=args.overwrite, made_by="demo")
        print("1. Real cells: 700 peripheral blood cells from the scanpy package.")
        cells = load_blood_cells()
        with new_folder(args.output, made_by="demo", overwrite=args.overwrite) as folder:
            figures = run_demo(cells, folder, epochs=args.epochs, seed=args.seed)
        print_figures(figures)
        print_files(args.output)
        return 0


def load_blood_cells() -> Any:
    """Return scanpy's PBMC as an AnnData of raw counts, gene symbols and published cell types.

    The file holds log1p of counts per 10,000; the whole numbers come back by inverting that.

    Raises:
        NotRawCountsError: if what comes back is not within 0.1 of whole numbers.
    """
    try:
        import scanpy as sc
    except ModuleNotFoundError as error:
        msg = "The demo needs scanpy, for its cells and UMAP. Install it with `pip install 'geneformer-hf[plot,evaluation]'`."
        raise MissingExtraError(msg) from error
    import anndata
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    published = sc.datasets.pbmc68k_reduced()
    values = np.expm1(sp.csr_array(published.raw.X).toarray().astype(np.float64)) * published.obs["n_counts"].to_numpy()[:, None] / 1e4
    counts = np.rint(values)
    worst = float(np.abs(values - counts).max())
    if worst >= 0.1:
        msg = f"scanpy's pbmc68k_reduced does not invert to whole counts (largest distance {worst:.2f}); this scanpy carries another file."
        raise NotRawCountsError(msg)
    obs = pd.DataFrame(
        {LABEL: published.obs["bulk_labels"].astype(str).to_numpy(), "n_counts": published.obs["n_counts"].to_numpy()}, index=published.obs_names
    )
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=published.raw.var_names))


def run_demo(cells: Any, folder: Path, *, epochs: int, seed: int) -> dict[str, float]:
    """Do everything and return the figures; every file goes into `folder`."""
    import numpy as np

    from ..analysis.embeddings import embed_cells
    from ..data.builder import load_cells
    from ..data.medians import fit_gene_table
    from ..models.configuration_geneformer import GeneformerConfig
    from ..models.modeling_geneformer import GeneformerForMaskedLM
    from ..models.tokenization_geneformer import GeneformerTokenizer
    from ..reports.plots import plot_umap, umap_coordinates
    from ..training.arguments import GeneformerFineTuningArguments, GeneformerPretrainingArguments
    from ..training.finetuning import finetune
    from ..training.pretraining import pretrain

    order = np.random.default_rng(seed).permutation(cells.n_obs)
    train, held_out = np.sort(order[N_HELD_OUT:]), np.sort(order[:N_HELD_OUT])

    table = fit_gene_table(cells[train])
    tokenizer = GeneformerTokenizer(gene_table=table, cls_token="<cls>", eos_token="<eos>", model_max_length=512)
    dataset = load_cells(cells, tokenizer=tokenizer, keep_counts=True)
    report = json.loads(dataset.info.description)["files"][0]
    print(f"2. Genes: {report['genes']}.\n   Medians fitted on {len(train)} training cells; {len(held_out)} cells are held out.")
    lengths = np.array(dataset["length"][:])
    print(f"3. Tokens: {lengths.min()} to {lengths.max()} per cell, for instance {' '.join(tokenizer.convert_ids_to_tokens(dataset[0]['input_ids'][:3]))} …")

    import torch

    torch.manual_seed(seed)
    config = GeneformerConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, max_position_embeddings=512,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cls_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.eos_token_id,
        vocabulary_fingerprint=table.fingerprint,
    )  # fmt: skip
    model = GeneformerForMaskedLM(config)
    print(f"4. Training a masked-gene model of {sum(p.numel() for p in model.parameters()):,} parameters from scratch, {epochs} epochs.")
    untrained = embed_cells(model, dataset, pooling="mean", progress=False)
    arguments = GeneformerPretrainingArguments(
        output_dir=str(folder / "geneformer-demo"), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.05,
        logging_steps=10, save_strategy="no", seed=seed,
    )  # fmt: skip
    with quiet_start():
        run = pretrain(arguments, dataset.select(train), eval_data=dataset.select(held_out), tokenizer=tokenizer, model=model)
    shutil.move(run.folder, folder / "model")
    shutil.rmtree(folder / "geneformer-demo")
    print("5. Embedding all cells, drawing.")
    figures = losses_of(run, tokenizer)
    embeddings = embed_cells(model, dataset, pooling="mean", progress=False)
    figures |= neighbour_accuracies(cells, untrained, embeddings, train, held_out, seed=seed)

    print("6. Fine-tuning the model for cell types, on the training cells; and what other methods make of the same cells.")
    settings = GeneformerFineTuningArguments(
        output_dir=str(folder / "finetuning"), from_checkpoint=str(folder / "model"), label=[LABEL], num_train_epochs=12, learning_rate=1e-3, lr_scheduler_type="cosine",
        warmup_steps=0.1, pooling="mean", save_strategy="no", load_best_model_at_end=False, logging_steps=10, seed=seed,
    )  # fmt: skip
    with quiet_start():
        classifier = finetune(settings, dataset.select(train), test_data=dataset.select(held_out))
    shutil.move(classifier.folder, folder / "classifier")
    shutil.rmtree(folder / "finetuning")
    figures |= classifier_figures(classifier)

    coordinates = umap_coordinates(embeddings, seed=seed)
    annotated = cells.copy()
    annotated.obsm["X_geneformer"], annotated.obsm["X_umap"] = embeddings, coordinates
    annotated.obs["held_out"] = np.isin(np.arange(cells.n_obs), held_out)
    annotated.write_h5ad(folder / "pbmc_geneformer.h5ad")
    plot_umap(
        coordinates,
        cells.obs[LABEL],
        folder / "umap_cell_type.png",
        title="Geneformer demo: 700 blood cells, a model trained for a minute",
        name="published cell type",
    )
    shutil.copy(folder / "model" / "loss.png", folder / "loss.png")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


@contextmanager
def quiet_start() -> Iterator[None]:
    """Leave out what `pretrain` says of the data: the demo has said it."""
    logger = logging.getLogger("geneformer_hf.training")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def losses_of(run: Any, tokenizer: Any) -> dict[str, float]:
    """Return the losses of the model and of the baselines at the same masked genes of held-out cells, in nats; not at those left to be copied."""
    found = run.figures["held_out"]["cells"]
    return {
        "loss_gene_frequency": found["baselines"]["gene_frequency_at_mask"],
        "loss_rank_frequency": found["baselines"]["rank_frequency_at_mask"],
        "loss_model": found["after"]["loss_at_mask"],
        "loss_uniform": math.log(len(tokenizer.gene_table)),
    }


def classifier_figures(run: Any) -> dict[str, float]:
    """Return accuracy and macro F1 of the classifier and its baselines on the held-out cells."""
    found = run.figures["heads"][LABEL]
    names = {"finetuned": "this model", "regression": "logistic regression on expression", "neighbours": "nearest neighbours on PCA"}
    chosen = {key: next(one for name, one in found.items() if name.startswith(start)) for key, start in names.items()}
    return {f"{figure}_{key}": one[figure] for key, one in chosen.items() for figure in ("accuracy", "macro_f1")}


def neighbour_accuracies(cells: Any, untrained: Any, trained: Any, train: Any, held_out: Any, *, seed: int) -> dict[str, float]:
    """Return cell-type accuracies on held-out cells by their nearest training cells in several spaces."""
    import numpy as np

    try:
        from sklearn.decomposition import PCA
    except ModuleNotFoundError as error:
        msg = "The figures of the demo need scikit-learn. Install it with `pip install 'geneformer-hf[plot,evaluation]'`."
        raise MissingExtraError(msg) from error

    from ..reports.baselines import majority_accuracy, neighbour_accuracy

    counts = cells.X.toarray()
    log_normalised = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    pca = PCA(50, random_state=seed).fit(log_normalised[train])
    labels = cells.obs[LABEL].astype(str).to_numpy()
    spaces = {"pca": pca.transform(log_normalised), "untrained": untrained, "trained": trained}
    accuracies = {f"accuracy_{name}": neighbour_accuracy(space[train], labels[train], space[held_out], labels[held_out]) for name, space in spaces.items()}
    return {"accuracy_majority": majority_accuracy(labels[train], labels[held_out])} | accuracies


def print_figures(figures: dict[str, float]) -> None:
    """Print the figures side by side, and what they mean."""
    print(f"""
Figures on {N_HELD_OUT} held-out cells
  loss at hidden genes (nats, lower is better)      k-nearest-neighbour cell type accuracy
    any gene alike               {figures["loss_uniform"]:6.2f}               most frequent type         {figures["accuracy_majority"]:6.2f}
    gene frequency               {figures["loss_gene_frequency"]:6.2f}               PCA of the counts          {figures["accuracy_pca"]:6.2f}
    gene frequency by rank       {figures["loss_rank_frequency"]:6.2f}               this model, untrained      {figures["accuracy_untrained"]:6.2f}
    this model                   {figures["loss_model"]:6.2f}               this model, trained        {figures["accuracy_trained"]:6.2f}

  cell types by a classifier trained on the same {700 - N_HELD_OUT} cells          accuracy   macro F1
    this model, fine-tuned                                       {figures["accuracy_finetuned"]:6.2f}     {figures["macro_f1_finetuned"]:6.2f}
    logistic regression on expression                            {figures["accuracy_regression"]:6.2f}     {figures["macro_f1_regression"]:6.2f}
    nearest neighbours on PCA                                    {figures["accuracy_neighbours"]:6.2f}     {figures["macro_f1_neighbours"]:6.2f}

{verdict(figures)}""")


def verdict(figures: dict[str, float]) -> str:
    """Say in words what the figures show, whichever way they came out."""
    gain = figures["loss_gene_frequency"] - figures["loss_model"]
    learnt = (
        f"The model predicts hidden genes {gain:.1f} nats better than gene frequency"
        if gain > 0
        else "The model predicts hidden genes no better than gene frequency"
    )
    trained, pca, untrained = (figures[f"accuracy_{name}"] for name in ("trained", "pca", "untrained"))
    better = (
        "PCA of the counts tells cell types better than the model's embeddings"
        if pca > trained
        else "The model's embeddings tell cell types as well as PCA of the counts"
    )
    rival = max(figures["accuracy_regression"], figures["accuracy_neighbours"])
    fine = figures["accuracy_finetuned"]
    classified = f"Fine-tuned for cell types it is right in {fine:.0%} of cells; " + (
        f"plain methods are better ({rival:.0%})." if rival > fine else f"plain methods are not better ({rival:.0%})."
    )
    return f"""{learnt}.
{better}; training moved their accuracy from {untrained:.2f} to {trained:.2f}.
{classified}
A minute on {700 - N_HELD_OUT} cells does not make good embeddings: that takes pretraining on millions. For work, convert a published
checkpoint (below) and fine-tune it."""


def print_files(output: Path) -> None:
    """Print what lies where and what to try next."""
    # As it can be typed here: the full path where the environment is not activated.
    program = "geneformer-hf" if shutil.which("geneformer-hf") else sys.argv[0]
    print(f"""
In {output}/
  pbmc_geneformer.h5ad   the cells: raw counts, published cell types, obsm["X_geneformer"], obsm["X_umap"]
  umap_cell_type.png     the embeddings by published cell type
  loss.png               training loss over all selected genes; lower than above, because a tenth of them stay visible
  model/                 opens with AutoModelForMaskedLM and AutoTokenizer (after `import geneformer_hf`)
  classifier/            the model fine-tuned for cell types; report.html shows how well
  figures.json           the figures above

Try next
  {program} info {output}/pbmc_geneformer.h5ad --model {output}/model
  {program} embed {output}/pbmc_geneformer.h5ad --model {output}/model --output embedded.h5ad --pooling mean --plot {LABEL}
  {program} predict {output}/pbmc_geneformer.h5ad --model {output}/classifier --output predicted.h5ad
  {program} convert Geneformer-V1-10M geneformer-v1      # a published checkpoint, with a network""")
