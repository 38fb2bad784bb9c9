"""Hide a gene of a cell and ask the model which gene it was, with the fill-mask pipeline of transformers.

python examples/predict_hidden_genes.py cells.h5ad geneformer-v2
"""

import sys

import anndata
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import geneformer_hf  # noqa: F401 - registers the Auto classes


def main(cells: str, folder: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    ids = tokenizer(anndata.read_h5ad(cells)[:1])["input_ids"][0]
    genes = [gene for gene in tokenizer.convert_ids_to_tokens(ids) if gene not in tokenizer.all_special_tokens]
    hidden, genes[4] = genes[4], tokenizer.mask_token
    print(f"hidden: {hidden}")
    for guess in pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(" ".join(genes)):
        print(f"{guess['token_str']}  {guess['score']:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
