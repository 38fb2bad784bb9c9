"""The gene tokenizer: a normal fast tokenizer for lists of genes that also takes cells.

Saved as `tokenizer.json` and `tokenizer_config.json`, which transformers loads without this package, and
`gene_table.json`, which holds the medians, symbols and aliases that turn counts into ranked genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast

from ..anndata_objects import matrices_of, of_rna, rows_of, samples_of, sound_matrix, text_columns, texts
from ..errors import CheckpointError, GeneformerError, NotRawCountsError, SettingError, UnknownGeneError, VocabularyMismatchError
from ..gene_ids import GeneFeatures
from ..genes import GeneColumns, GeneTable
from ..input_files import read_json_object
from ..ranking import ENCODING_VERSION, MAX_COLUMNS, TARGET_SUM, check_counts, choose_counts, rank_columns, sum_columns
from .checkpoints import DICTIONARY_PATTERNS
from .dictionaries import find_dictionaries, folder_of_dictionaries, identify, table_of
from .places import HUB_OPTIONS, TOKENIZER_FILES, Place, fetched, place_of

GENE_TABLE_FILE = "gene_table.json"
LEAST_TOKENS = 3
"""Least tokens per cell: `<cls>`, a gene and `<eos>`."""


@dataclass(frozen=True)
class EncodedCells:
    """Ranked cells laid end to end; cell i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: np.ndarray
    """int32 of shape `(t,)`."""
    offsets: np.ndarray
    """int64 of shape `(n + 1,)`."""
    counts: np.ndarray | None = None
    """float64 of shape `(t,)`, if asked for: counts per 10,000 beside each token, 0 at special tokens."""

    def split(self) -> list[np.ndarray]:
        """Return one array per cell."""
        return [self.input_ids[start:stop] for start, stop in pairwise(self.offsets.tolist())]


class GeneformerTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of genes and of cells.

    Args:
        gene_table (`GeneTable`): the vocabulary with its medians; or `gene_table_file`, its JSON file.
        model_max_length (`int`, *optional*, defaults to 2048 without `<cls>` and 4096 with):
            Tokens per cell, special tokens included; lower ranks are cut off.
        cls_token, eos_token (`str`, *optional*): given for vocabularies that have them (V2).

    Called with genes, it is a tokenizer like any other; called with cells (an AnnData, or counts with `gene_ids`), it ranks
    them first:

        >>> table = GeneTable(["ENSG00000000003", "ENSG00000000005", "ENSG00000000419"], [2, 3, 4], [1.0, 1.0, 3.0])
        >>> tokenizer = GeneformerTokenizer(gene_table=table)
        >>> tokenizer(["ENSG00000000419", "ENSG00000000003"], is_split_into_words=True)["input_ids"]
        [4, 2]
        >>> tokenizer(np.array([[4, 0, 9]]), gene_ids=table.ensembl_ids)["input_ids"]
        [[2, 4]]

    Raises:
        UnknownGeneError: for genes that are not in the vocabulary, naming them; there is no unknown token.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "gene_table_file": GENE_TABLE_FILE}  # noqa: RUF012 - the base class declares it so
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any) -> GeneformerTokenizer:
        """Open the tokenizer of a folder, a Hub id or a published checkpoint (`CHECKPOINTS`), as every `from_pretrained` does.

        The published repository has no tokenizer: its dictionaries are read by the restricted reader, and have to have the published hashes.

        Raises:
            CheckpointError: if there is no tokenizer, or the repository cannot be read (`HubError`).
        """
        place = place_of(pretrained_model_name_or_path, subfolder=kwargs.pop("subfolder", None), revision=kwargs.pop("revision", None))
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder, place = fetched(place, TOKENIZER_FILES, **options)
        if (folder / GENE_TABLE_FILE).is_file() or "gene_table" in kwargs or "gene_table_file" in kwargs:
            try:
                opened = super().from_pretrained(str(folder), *init_inputs, **(kwargs | {"local_files_only": True}))
            except GeneformerError:
                raise
            except (TypeError, AttributeError, ValueError, KeyError) as error:
                msg = f"the tokenizer of {place} cannot be opened ({type(error).__name__}: {str(error)[:300]}). Its files are damaged, or hold values of other types; save it again with `save_pretrained`, or download it again."
                raise CheckpointError(msg) from error
            opened.name_or_path = place.name
            return opened
        return cls._of_published(folder, place, **options)

    @classmethod
    def _of_published(cls, folder: Path, place: Place, **options: Any) -> GeneformerTokenizer:
        """Build the tokenizer of a checkpoint in the published layout, which has dictionaries in its place."""
        config = folder / "config.json"
        settings = read_json_object(config, error=CheckpointError) if config.is_file() else {}
        root = folder_of_dictionaries(place, **options) if settings.get("model_type") == "bert" else None
        if root is None or not any(root.rglob(DICTIONARY_PATTERNS["tokens"])):
            msg = f"{place} holds no {GENE_TABLE_FILE}: published checkpoints come without a tokenizer. Run `geneformer-hf convert {place.name} OUTPUT` once and use OUTPUT."
            raise CheckpointError(msg)
        found = find_dictionaries(root, settings["vocab_size"])
        tokenizer = cls.from_dictionaries(found, version=identify(found), model_max_length=settings["max_position_embeddings"])
        if len(tokenizer) != settings["vocab_size"]:
            msg = f"{place} has a vocabulary of {settings['vocab_size']:,} and the dictionaries in {found['tokens'].parent} one of {len(tokenizer):,}. Convert it with its own dictionaries (`geneformer-hf convert … --dictionaries`)."
            raise VocabularyMismatchError(msg)
        return tokenizer

    @classmethod
    def from_dictionaries(cls, found: Mapping[str, Path], *, version: str | None = None, model_max_length: int | None = None) -> GeneformerTokenizer:
        """Build the tokenizer that four published dictionaries stand for; `version` is theirs, None for unknown ones."""
        table, specials = table_of(found, source=f"published {version} dictionaries" if version else "own dictionaries")
        ends = {f"{name}_token": f"<{name}>" for name in ("cls", "eos")} if {"<cls>", "<eos>"} <= set(specials) else {}
        return cls(gene_table=table, model_max_length=model_max_length, **ends)  # type: ignore[arg-type]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keep `tokenizer.json` as it is: transformers would take it apart and could renumber a vocabulary with gaps."""
        return kwargs

    def __init__(
        self,
        gene_table: GeneTable | None = None,
        gene_table_file: str | None = None,
        tokenizer_file: str | None = None,
        tokenizer_object: Tokenizer | None = None,
        pad_token: str = "<pad>",
        mask_token: str = "<mask>",
        cls_token: str | None = None,
        eos_token: str | None = None,
        model_max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if gene_table is None:
            if gene_table_file is None:
                msg = f"GeneformerTokenizer needs a gene table: pass `gene_table=`, or load a folder that holds {GENE_TABLE_FILE} (made by `geneformer-hf convert`)."
                raise CheckpointError(msg)
            gene_table = GeneTable.load(gene_table_file)
        if model_max_length is None:
            model_max_length = 2048 if cls_token is None else 4096
        if not (isinstance(model_max_length, (int, float)) and model_max_length >= LEAST_TOKENS):
            msg = f"model_max_length is {model_max_length!r}; expected a number of tokens per cell, at least {LEAST_TOKENS} (special tokens included)."
            raise ValueError(msg)
        # Traces of how the last from_pretrained was called; kept, they would make two saves of one tokenizer differ.
        for trace in ("is_local", "local_files_only", "_commit_hash"):
            kwargs.pop(trace, None)
        if tokenizer_file is None and tokenizer_object is None:
            specials = [str(token) for token in (pad_token, mask_token, cls_token, eos_token) if token is not None]
            tokenizer_object = _build_backend(gene_table, specials, cls_token, eos_token)
        super().__init__(
            tokenizer_file=tokenizer_file,
            tokenizer_object=tokenizer_object,
            pad_token=pad_token,
            mask_token=mask_token,
            cls_token=cls_token,
            eos_token=eos_token,
            model_max_length=model_max_length,
            **kwargs,
        )
        # Without a gene table given by file the path of the last load would be written into tokenizer_config.json.
        self.init_kwargs.pop("gene_table_file", None)
        self._gene_table = gene_table
        self._require_same_vocabulary()

    def _require_same_vocabulary(self) -> None:
        vocabulary = self.get_vocab()
        table = self._gene_table
        wrong = [g for g, token in zip(table.ensembl_ids, table.token_ids.tolist(), strict=True) if vocabulary.get(g) != token]
        n_genes = len(vocabulary) - len(self.all_special_tokens)
        if wrong or n_genes != len(table):
            msg = (
                f"tokenizer.json holds {n_genes:,} genes and {GENE_TABLE_FILE} {len(table):,}; {len(wrong):,} of them have other ids "
                f"(for instance {', '.join(wrong[:3]) or 'none'}). The two files belong to different vocabularies: convert the checkpoint again."
            )
            raise VocabularyMismatchError(msg)

    @property
    def gene_table(self) -> GeneTable:
        """The genes of the vocabulary: Ensembl ids, token ids, medians, symbols and aliases."""
        return self._gene_table

    def __call__(self, text: Any = None, *args: Any, gene_ids: Any = None, genome: str | None = None, **kwargs: Any) -> BatchEncoding:
        """Encode genes (as any tokenizer) or cells: an AnnData, or counts of shape `(n, g)` with `gene_ids`.

        Cells are ranked, cut to `model_max_length` and padded as `padding` and `return_tensors` ask.
        """
        if hasattr(text, "obs") and hasattr(text, "var"):
            options = {"counts_layer": kwargs.pop("counts_layer", None), "add_special_tokens": kwargs.pop("add_special_tokens", True)}
            return self._pad_cells(self.encode_anndata(text, gene_ids=gene_ids, genome=genome, **options), **kwargs)
        if sp.issparse(text) or (isinstance(text, np.ndarray) and text.dtype.kind in "buif"):
            if gene_ids is None:
                msg = "Counts need the names of their columns: pass `gene_ids=` with one Ensembl id or symbol per column."
                raise ValueError(msg)
            cells = self.encode_counts(text, gene_ids, genome=genome, add_special_tokens=kwargs.pop("add_special_tokens", True))
            return self._pad_cells(cells, **kwargs)
        return super().__call__(text, *args, **kwargs)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self._require_in_vocabulary(new_tokens)
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))

    def add_special_tokens(self, special_tokens_dict: Any, *args: Any, **kwargs: Any) -> int:
        """Give tokens of the vocabulary the part of special ones; others have no weights in any model.

        Raises:
            SettingError: naming the others.
        """
        given = [token for value in special_tokens_dict.values() for token in (value if isinstance(value, (list, tuple)) else [value])]
        self._require_in_vocabulary(given)
        return int(super().add_special_tokens(special_tokens_dict, *args, **kwargs))

    def _require_in_vocabulary(self, tokens: Any) -> None:
        vocabulary = self.get_vocab()
        unknown = [str(token) for token in tokens if str(token) not in vocabulary]
        if unknown:
            msg = f"{', '.join(map(repr, unknown[:5]))} cannot be added: the vocabulary is that of the gene table, which gives each gene its median. Make a gene table with them (`geneformer-hf medians`, `GeneTable`) and a tokenizer of it."
            raise SettingError(msg)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        try:
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        except Exception as error:
            unknown = self._unknown_words(text, text_pair)
            if not unknown:
                raise
            raise UnknownGeneError(self._unknown_message(unknown)) from error

    def _pad_cells(
        self, cells: list[np.ndarray], *, padding: Any = False, max_length: int | None = None, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchEncoding:
        if kwargs.pop("truncation", None) and max_length is not None:
            msg = "Cells are cut to `model_max_length` while they are ranked; set that instead of `truncation` and `max_length`."
            raise ValueError(msg)
        known = ("pad_to_multiple_of", "padding_side", "return_attention_mask", "verbose")
        if unknown := [name for name in kwargs if name not in known]:
            msg = f"{', '.join(unknown)} cannot be used with cells; expected padding, max_length, return_tensors, add_special_tokens, {', '.join(known)}."
            raise SettingError(msg)
        return self.pad({"input_ids": [cell.tolist() for cell in cells]}, padding=padding, max_length=max_length, return_tensors=return_tensors, **kwargs)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return token ids.

        Raises:
            UnknownGeneError: naming every token that is not in the vocabulary.
        """
        ids = super().convert_tokens_to_ids(tokens)
        pairs: Any = [(tokens, ids)] if isinstance(tokens, str) or tokens is None else zip(tokens, ids, strict=True)  # type: ignore[arg-type]
        unknown = [str(token) for token, token_id in pairs if token is not None and token_id is None]
        if unknown:
            raise UnknownGeneError(self._unknown_message(unknown))
        return ids

    def _unknown_words(self, *texts: Any) -> list[str]:
        words: list[str] = []
        stack = list(texts)
        while stack:
            item = stack.pop(0)
            if isinstance(item, str):
                words += item.split()
            elif isinstance(item, (list, tuple)):
                stack += item
        vocabulary = self._gene_table.row_of
        return [word for word in dict.fromkeys(words) if word not in vocabulary and word not in self.all_special_tokens]

    def _unknown_message(self, unknown: list[str]) -> str:
        shown = ", ".join(unknown[:10]) + (f", and {len(unknown) - 10:,} more" if len(unknown) > 10 else "")
        return (
            f"{len(unknown)} genes are not in this vocabulary of {len(self._gene_table):,} Ensembl ids: {shown}. "
            "For symbols, versions or retired ids use `tokenizer.gene_table.token_of([...])`."
        )

    @property
    def n_special_tokens(self) -> int:
        """Special tokens that every cell carries: 2 with `<cls>` and `<eos>`, else 0."""
        return int(self.cls_token_id is not None) + int(self.eos_token_id is not None)

    @property
    def encoding_fingerprint(self) -> str:
        """A short text that changes whenever the same counts could give other tokens."""
        return f"{ENCODING_VERSION}-{self._gene_table.fingerprint}-{self.model_max_length}-{self.cls_token_id}-{self.eos_token_id}"

    def encode_counts(
        self, counts_ng: Any, gene_ids: Sequence[str], totals_n: np.ndarray | None = None, *, genome: str | None = None, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        """Rank cells and return their token ids, special tokens included.

        Args:
            counts_ng (sparse or dense array of shape `(n, g)`): raw counts.
            gene_ids (`Sequence[str]` of length g): Ensembl ids or symbols, matched by the gene table.
            totals_n (`np.ndarray` of shape `(n,)`, *optional*):
                Counts per cell over all genes. They cannot change the order and are only checked against the counts.
            genome (`str`, *optional*): the genome to read where the names carry the prefixes of several; cells of others hold no genes.
            add_special_tokens (`bool`, *optional*, defaults to `True`): `<cls>` and `<eos>` around each cell, where the vocabulary has them.

        Returns:
            `list[np.ndarray]`: int32, one per cell, at most `model_max_length` long. Empty cells hold special tokens only.

        Raises:
            NotRawCountsError, GeneIdError
        """
        counts = rows_of(sound_matrix(counts_ng, "counts_ng"), 0, counts_ng.shape[0])
        if counts.shape[1] != len(gene_ids):
            msg = f"counts have {counts.shape[1]:,} columns and gene_ids {len(gene_ids):,} names; they must be as many."
            raise ValueError(msg)
        check_counts(counts.data, "counts_ng")
        if totals_n is not None and (np.asarray(totals_n) < np.asarray(counts.sum(axis=1)).ravel()).any():
            msg = "totals_n lies below the counts of some cells, so it belongs to another matrix. Pass totals over all genes, or leave it out."
            raise NotRawCountsError(msg)
        return self._encode_features(counts, GeneFeatures({}, list(gene_ids), gene_ids="index", genome=genome), add_special_tokens=add_special_tokens)

    def encode_anndata(
        self, adata: Any, *, gene_ids: str | None = None, counts_layer: str | None = None, genome: str | None = None, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        """Rank the cells of an AnnData: `encode_counts` on the counts and gene ids found by the rules of this package."""
        adata = of_rna(adata)
        matrices = matrices_of(adata)
        name = choose_counts(samples_of(matrices), counts_layer)
        var = adata.raw.var if name == "raw.X" else adata.var
        features = GeneFeatures(text_columns(var), texts(var.index), gene_ids=gene_ids, genome=genome, index_name=var.index.name)
        return self._encode_features(rows_of(sound_matrix(matrices[name], name), 0, adata.n_obs), features, add_special_tokens=add_special_tokens)

    def _encode_features(self, counts_ng: sp.csr_array, features: GeneFeatures, *, add_special_tokens: bool) -> list[np.ndarray]:
        """Rank the genes among the columns of checked counts; cells of other genomes than the one that is read hold none."""
        check_counts(counts_ng.data, "counts_ng")
        columns = self._gene_table.match(features)
        return self.encode_block(features.select(counts_ng)[0], columns, special_tokens=add_special_tokens).split()

    def encode_block(
        self, counts_ng: sp.csr_array, columns: GeneColumns, *, totals_n: np.ndarray | None = None, crop: bool = True, special_tokens: bool = True
    ) -> EncodedCells:
        """Rank a block of checked counts whose columns are matched already; the fast path under everything else.

        Args:
            counts_ng (`scipy.sparse.csr_array` of shape `(n, g)`): raw counts, checked by the caller.
            columns (`GeneColumns`): from `gene_table.resolve`.
            totals_n (`np.ndarray` of shape `(n,)`, *optional*): if given, counts per 10,000 are returned too.
            crop, special_tokens (`bool`, *optional*, defaults to `True`): cut to `model_max_length`; add `<cls>` and `<eos>`.
        """
        if columns.has_merges or not counts_ng.has_canonical_format or counts_ng.shape[1] > MAX_COLUMNS:
            counts_ng = sum_columns(counts_ng, columns.slot_of_column, len(columns.token_ids))
            medians, token_ids = columns.medians, columns.token_ids
        else:
            medians, token_ids = columns.medians_of_column, columns.token_of_column
        front, back = (int(special_tokens and token is not None) for token in (self.cls_token_id, self.eos_token_id))
        most = self.model_max_length - front - back if crop else None
        ranked, offsets = rank_columns(counts_ng, medians, most=most, front=front, back=back)
        input_ids = token_ids[ranked]
        firsts, lasts = offsets[:-1], offsets[1:] - 1
        if front:
            input_ids[firsts] = self.cls_token_id
        if back:
            input_ids[lasts] = self.eos_token_id
        counts = None
        if totals_n is not None:
            scale_n = np.divide(TARGET_SUM, totals_n, out=np.zeros(len(firsts)), where=np.asarray(totals_n) > 0)
            rows = np.repeat(np.arange(len(firsts)), np.diff(offsets))
            genes = np.ones(len(rows), dtype=bool)
            genes[firsts[: len(firsts) * front]] = False
            genes[lasts[: len(lasts) * back]] = False
            counts = np.zeros(len(rows))
            counts[genes] = _lookup(counts_ng, rows[genes], ranked[genes]) * scale_n[rows[genes]]
        return EncodedCells(input_ids, offsets, counts)

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], legacy_format: bool | None = None, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        # The settings of the last call would otherwise be saved with the vocabulary.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + GENE_TABLE_FILE)
        path.write_text(self._gene_table.to_json(), encoding="utf-8")
        return (*file_names, str(path))


def _lookup(counts_ns: sp.csr_array, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return the counts at the given rows and slots, all of which are stored."""
    if not counts_ns.has_sorted_indices:
        counts_ns = counts_ns.sorted_indices()
    width = counts_ns.shape[1]
    keys = np.repeat(np.arange(counts_ns.shape[0], dtype=np.int64), np.diff(counts_ns.indptr)) * width + counts_ns.indices
    return counts_ns.data[np.searchsorted(keys, rows.astype(np.int64) * width + slots)].astype(np.float64)


def _build_backend(table: GeneTable, specials: list[str], cls_token: str | None, eos_token: str | None) -> Tokenizer:
    """Make the backend: special tokens take the ids that the genes leave free, in their order."""
    taken = set(table.token_ids.tolist())
    free = (i for i in range(len(taken) + len(specials)) if i not in taken)
    vocabulary = {token: next(free) for token in specials}
    vocabulary |= dict(zip(table.ensembl_ids, table.token_ids.tolist(), strict=True))
    # Ordered by id, so that the file does not depend on the order of the table.
    vocabulary = {token: vocabulary[token] for token in sorted(vocabulary, key=vocabulary.__getitem__)}
    backend = Tokenizer(WordLevel(vocabulary))
    backend.pre_tokenizer = WhitespaceSplit()
    front, back = (f"{cls_token}:0 " if cls_token else ""), (f" {eos_token}:0" if eos_token else "")
    named = [(token, vocabulary[token]) for token in (cls_token, eos_token) if token]
    backend.post_processor = TemplateProcessing(single=f"{front}$A:0{back}", pair=f"{front}$A:0{back} $B:1", special_tokens=named)
    return backend
