"""A network of attention as files: AnnData, GraphML, tables, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from .._version import __version__
from ..reports.csv_files import write_csv
from ..reports.gene_plots import NAMED_GENES, plot_heads, plot_network, plot_received
from ..reports.html import Page, Section, Table, write_page
from .attention_networks import AttentionNetwork

PICTURES = "pictures"


def write_attention(
    network: AttentionNetwork, folder: Path, *, title: str, settings: Mapping[str, Any], regulators: pd.DataFrame | None = None, names: Sequence[str] = ()
) -> None:
    """Write `network.h5ad`, `network.graphml`, `centrality.csv`, `received.csv`, `regulators.csv` (where there are some), `report.html` and `pictures/`.

    Args:
        regulators (`DataFrame`, *optional*): as `regulator_centrality` returns it.
        names: Ensembl ids or symbols of the regulators, to set off.
    """
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    network.to_anndata().write_h5ad(folder / "network.h5ad", compression="gzip")
    network.write_graphml(folder / "network.graphml")
    central, known = network.centrality(), set(names)
    write_csv(central, folder / "centrality.csv")
    write_csv(network.received, folder / "received.csv")
    marked = [gene in known or symbol in known for gene, symbol in zip(central.index, central["symbol"], strict=True)]
    plot_received(central, pictures / "received.png", title="Genes that receive most attention, mean of all heads", marked=marked, marked_name="regulator")
    top = [list(network.genes.index).index(gene) for gene in central.index[:NAMED_GENES]]
    symbols = [str(network.genes["symbol"].iloc[i] or network.genes.index[i]) for i in top]
    unit = "times uniform" if network.relative else "weight"
    plot_network(network.mean.tocsr()[top][:, top].toarray(), symbols, pictures / "network.png", title="Attention between them, mean of all heads", what=unit)
    sections = [
        Section(
            "Network",
            lines=[
                f"{len(network.genes):,} genes, the {network.mean.nnz:,} strongest pairs of the mean; one network for each layer and head is in network.h5ad. Weights are attention in {unit}, mean over the cells that hold both genes."
            ],
            pictures=[pictures / "received.png", pictures / "network.png"],
            further=[
                Table(
                    [{"gene": row["symbol"] or gene} | _plain(row.drop("symbol")) for gene, row in central.head(NAMED_GENES).iterrows()], title="Most attended"
                )
            ],
        )
    ]
    if regulators is not None:
        write_csv(regulators, folder / "regulators.csv", index=False)
        sections.insert(0, _regulator_section(regulators, pictures / "regulators.png"))
    sections.append(Section("Settings", settings=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)))
    write_page(
        Page(title, f"Attention of {network.n_cells:,} cells; {len(network.received):,} genes. geneformer-hf {__version__}.", sections), folder / "report.html"
    )


def _regulator_section(table: pd.DataFrame, picture: Path) -> Section:
    heads = table[table["layer"] >= 0]
    values = heads.pivot(index="layer", columns="head", values="auc_matched")
    plot_heads(
        values.to_numpy(dtype=float), values.index.tolist(), picture, title="Do regulators receive more than genes of like rank?", what="chance (0.5: as much)"
    )
    return Section(
        "Regulators",
        verdict=regulators_in_words(table),
        pictures=[picture],
        further=[Table(table.to_dict("records"), title="By layer and head (-1: mean of all)")],
    )


def regulators_in_words(table: pd.DataFrame) -> str:
    """Say whether regulators receive more attention than other genes of like rank."""
    overall, heads = table[table["layer"] < 0].iloc[0], table[table["layer"] >= 0]
    above = int(((heads["auc_matched"] > 0.5) & (heads["p_matched"] * len(heads) <= 0.05)).sum())
    below = int(((heads["auc_matched"] < 0.5) & (heads["p_matched"] * len(heads) <= 0.05)).sum())
    return (
        f"A regulator receives more attention than another gene of like rank with chance {overall['auc_matched']:.3f} in the mean of all heads (p {overall['p_matched']:.2g}); "
        f"in {above} of {len(heads)} heads more, in {below} less (p ≤ 0.05 after Bonferroni). Whatever their rank: {overall['auc']:.3f}. {int(overall['n_regulators']):,} regulators, {int(overall['n_others']):,} other genes."
    )


def _plain(row: pd.Series) -> dict[str, Any]:
    return {str(name): int(value) if float(value).is_integer() and name == "n_cells" else float(np.float64(value)) for name, value in row.items()}
