"""`geneformer-hf info`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import CellFileError, CheckpointError, NotRawCountsError
from .command import Command, add_reading


class Info(Command):
    """Say what a model, a tokenized dataset or a file of cells is."""

    name = "info"
    help = "what a model, dataset or file is"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("what", metavar="MODEL|DATASET|FILE", help="checkpoint (folder, Hub id or preset name), dataset folder, or file of cells")
        parser.add_argument("--model", help="for a file: also say how many of its genes this model's tokenizer knows")
        add_reading(parser)

    def run(self, args: Namespace) -> int:
        from ..data.anndata_files import split_modality
        from ..data.files import KINDS, is_cells_folder
        from ..data.tenx import is_tenx_matrix
        from ..input_files import require_regular
        from ..models.configuration_geneformer import PRESETS

        path = Path(args.what)
        require_regular(path)
        if path.is_file() or is_cells_folder(path) or split_modality(path)[1]:
            self._file(path, args)
        elif path.suffix in KINDS and not path.exists():
            msg = f"{path} does not exist; expected a file of cells."
            raise CellFileError(msg)
        elif (path / "dataset_info.json").is_file():
            self._dataset(path)
        elif (path / "gene_table.json").is_file() and not (path / "config.json").is_file():
            self._tokenizer(args.what)
        elif path.is_dir() and not (path / "config.json").is_file():
            inside = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json")))
            cells = sorted(p.name for p in path.iterdir() if p.suffix in KINDS or is_cells_folder(p) or is_tenx_matrix(p))
            if cells:
                msg = f"{path} is a folder of {len(cells):,} files of cells, which tokenize, qc and medians take as a whole. Name one of them: {', '.join(cells[:5])}{', …' if len(cells) > 5 else ''}."
                raise CellFileError(msg)
            msg = f"{path} is neither a checkpoint (no config.json) nor a dataset (no dataset_info.json)." + (
                f" Checkpoints inside: {inside}." if inside else ""
            )
            raise CheckpointError(msg)
        elif args.what in PRESETS:
            self._preset(args.what)
        else:
            self._model(args.what)
        return 0

    def _file(self, path: Path, args: Namespace) -> None:
        import numpy as np

        from ..data.anndata_files import AnnDataFileSource, split_modality, stored_matrices
        from ..data.frames import open_frame
        from ..data.readers import kind_of, open_cells
        from ..data.stores import open_store
        from ..gene_ids import is_ensembl_id, species_of
        from ..models.loading import load_tokenizer

        if path.suffix == ".json":
            from ..genes import GeneTable

            table = GeneTable.load(path)
            print(
                f"Gene table: {len(table):,} {table.species} genes, token ids {table.token_ids.min():,} to {table.token_ids.max():,}, {len(table.aliases):,} aliases; {f'{table.source}; ' if table.source else ''}fingerprint {table.fingerprint}"
            )
            return
        try:
            source = open_cells(path, gene_ids=args.gene_ids, counts_layer=args.counts_layer, genome=args.genome)
        except NotRawCountsError:
            # What there is helps to find the right layer; the error follows.
            if kind_of(path) is AnnDataFileSource:
                file, modality = split_modality(path)
                with open_store(file) as whole:
                    store = whole[f"mod/{modality}"] if modality else whole
                    obs, var = (open_frame(store, key, str(path)) for key in ("obs", "var"))
                    print(f"Cells: {len(obs):,} x {len(var):,} genes; matrices: {', '.join(stored_matrices(store))}")
                    print(f"obs: {', '.join(obs.columns) or 'no columns'}")
            raise
        print(f"Cells: {source.n_cells:,} x {len(source.gene_names):,} genes")
        print(f"Raw counts: in {source.counts_described}, stored as {source.layout}")
        species = f"{species_of(source.gene_names)} Ensembl ids in " if is_ensembl_id(source.gene_names[0]) else ""
        print(f"Genes: {species}{source.gene_names_from}, for instance {', '.join([name for name in source.gene_names[:100] if name.strip()][:3])}")
        described, is_plain = source.describe_genes()
        if not is_plain:
            print(f"Read as genes: {described}")
        print(f"obs: {', '.join(source.obs_columns) or 'no columns'}")
        if source.passing is not None:
            print(f"filter_pass: {int(np.sum(source.passing)):,} of {source.n_cells:,} cells")
        if args.model is not None:
            tokenizer = load_tokenizer(args.model)
            print(f"With {args.model}: {source.match_genes(tokenizer.gene_table).report.describe()}")

    def _dataset(self, path: Path) -> None:
        from ..data.dataset_folders import SPLITS, splits_of
        from ..data.tokenized import open_tokenized, report_of
        from .tokenize import print_files, print_left_out

        if (path / SPLITS).is_file():
            sizes = [f"{name} ({len(open_tokenized(path / name)):,} cells)" for name in splits_of(path)]
            print("Dataset with the splits " + ", ".join(sizes))
            return
        dataset = open_tokenized(path)
        print(f"Tokenized dataset: {len(dataset):,} cells; columns {', '.join(dataset.column_names)}")
        if "length" in dataset.column_names and len(dataset):
            lengths = dataset.with_format("numpy")["length"][:]
            print(f"Tokens per cell: {int(lengths.min()):,} to {int(lengths.max()):,}, mean {lengths.mean():,.0f}")
        report = report_of(dataset)
        if "encoding" in report:
            print(f"Encoding: {report['encoding']}")
            print_files(report)
            print_left_out(report)

    def _preset(self, name: str) -> None:
        from ..models.checkpoints import CHECKPOINTS
        from ..models.configuration_geneformer import GeneformerConfig

        known = CHECKPOINTS[name]
        print(f"Published checkpoint: {known.repository}, {known.subfolder}, {known.version}")
        self._config(GeneformerConfig.from_preset(name))
        print(f"Get it: geneformer-hf convert {name} FOLDER")

    def _model(self, model: str) -> None:
        from ..models.adapters import count_parameters, describe_adapter, is_adapter
        from ..models.heads import heads_of
        from ..models.loading import load_model, load_tokenizer, require_same_vocabulary
        from ..models.modeling_geneformer import GeneformerForMaskedLM, GeneformerForTokenClassification, GeneformerModel
        from ..models.places import local_folder

        folder = local_folder(model)
        if is_adapter(folder):
            about = describe_adapter(folder)
            print(
                f"LoRA adapter of {about.base_place}: rank {about.rank} on {about.targets}; saved whole: {', '.join(about.heads) or 'nothing'}; {about.n_bytes / 1e6:,.1f} MB"
            )
            print(f"Trained on {f'{about.quantization} weights' if about.quantization else 'plain weights'}")
        loaded = load_model(model)
        n = count_parameters(loaded)
        print(f"{type(loaded).__name__}, {n:,} parameters, {loaded.get_memory_footprint() / 1e6:,.1f} MB in memory")
        self._config(loaded.config)
        if not isinstance(loaded, (GeneformerForMaskedLM, GeneformerModel)):
            for head in heads_of(loaded.config):
                shown = ", ".join(head.names[:30]) + (f", … ({len(head.names)})" if len(head.names) > 30 else "")
                print(f"Predicts {'a class of each gene' if isinstance(loaded, GeneformerForTokenClassification) else head.name}: {shown}")
        try:
            require_same_vocabulary(loaded.config, load_tokenizer(model))
        except CheckpointError as error:
            print(f"Tokenizer: none. {error}")
            return
        self._tokenizer(model)

    def _tokenizer(self, model: str) -> None:
        from ..models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        table = tokenizer.gene_table
        print(
            f"Tokenizer: {len(table):,} {table.species} genes, {len(table.aliases):,} aliases; {f'{table.source}; ' if table.source else ''}fingerprint {table.fingerprint}"
        )

    def _config(self, config: object) -> None:
        names = {
            "num_hidden_layers": "layers",
            "hidden_size": "hidden",
            "num_attention_heads": "heads",
            "intermediate_size": "feed-forward",
            "max_position_embeddings": "tokens per cell",
            "vocab_size": "vocabulary",
        }
        print("; ".join(f"{label} {getattr(config, key):,}" for key, label in names.items()))
        specials = {"<pad>": "pad_token_id", "<cls>": "cls_token_id", "<eos>": "eos_token_id"}
        print("Special tokens: " + ", ".join(f"{token} {getattr(config, key)}" for token, key in specials.items() if getattr(config, key) is not None))
