"""Mark cells of low quality in an AnnData and look at the reasons; tokenizing leaves out what does not pass.

python examples/filter_cells.py cells.h5ad checked.h5ad
"""

import sys

import anndata

from geneformer_hf import QualityRules, assess_quality


def main(cells: str, output: str) -> None:
    adata = anndata.read_h5ad(cells)
    quality = assess_quality(adata, rules=QualityRules(n_sd=3, min_genes=7, doublets=False))
    verdict = quality.cells()
    print(quality.summary.T.to_string())
    print(verdict["filter_reason"].value_counts().to_string())
    adata.obs["filter_pass"] = verdict["filter_pass"].to_numpy()
    adata.obs["filter_reason"] = verdict["filter_reason"].to_numpy()
    adata.write_h5ad(output)
    print(f"{verdict['filter_pass'].sum():,} of {adata.n_obs:,} cells pass -> {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
