"""Medians, collators, baselines, plots, outputs, devices."""

import numpy as np
import pytest
import torch

from geneformer_hf import GeneformerTokenizer, fit_gene_table, load_cells
from geneformer_hf.data.collators import DataCollatorForMaskedGenes
from geneformer_hf.device import resolve_device, run_with_backoff
from geneformer_hf.errors import GeneIdError, OutputExistsError
from geneformer_hf.outputs import MARK, new_file, new_folder
from geneformer_hf.reports.baselines import GeneFrequencyBaseline, RankFrequencyBaseline, majority_accuracy, neighbour_accuracy
from geneformer_hf.reports.plots import plot_heatmap, plot_training, plot_umap, umap_coordinates
from tests.conftest import make_cells


def test_medians_of_symbols_and_of_mice():
    cells = make_cells(["TP53", "GAPDH", "notagene"], 5)
    cells.X = np.ones((5, 3), dtype=np.float32)
    assert fit_gene_table(cells).symbols == ("GAPDH", "TP53")
    mouse = make_cells(["ENSMUSG00000059552", "ENSMUSG00000057666"], 3)
    mouse.X = np.ones((3, 2), dtype=np.float32)
    assert fit_gene_table(mouse).species == "mouse"
    with pytest.raises(GeneIdError, match="none of its genes"):
        fit_gene_table(make_cells(["x1", "x2"], 3))


def test_a_new_vocabulary_tokenizes(cells):
    tokenizer = GeneformerTokenizer(gene_table=fit_gene_table(cells), cls_token="<cls>", eos_token="<eos>")
    dataset = load_cells(cells, tokenizer=tokenizer)
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in dataset)


def test_masking_hides_genes_alone_in_the_published_shares(tokenizer):
    rng = np.random.default_rng(0)
    rows = [{"input_ids": [2, *rng.integers(4, 64, 300).tolist(), 3]} for _ in range(400)]
    batch = DataCollatorForMaskedGenes(tokenizer, seed=1)(rows)
    original = np.array([row["input_ids"] for row in rows])
    ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    chosen = labels != -100
    n = chosen.sum()
    assert not chosen[:, [0, -1]].any()
    np.testing.assert_array_equal(labels[chosen], original[chosen])
    np.testing.assert_array_equal(ids[~chosen], original[~chosen])
    # Four standard deviations of a binomial.
    assert abs(n / (400 * 300) - 0.15) < 4 * (0.15 * 0.85 / 120_000) ** 0.5
    assert abs((ids[chosen] == 1).mean() - 0.8) < 4 * (0.16 / n) ** 0.5
    other = (ids[chosen] != 1) & (ids[chosen] != original[chosen])
    assert abs(other.mean() - 0.1 * 59 / 60) < 4 * (0.09 / n) ** 0.5
    assert ids[chosen][other].min() >= 4


def test_masking_pads_and_repeats_with_its_seed(tokenizer):
    rows = [{"input_ids": [2, 5, 6, 7, 8, 9, 3]}, {"input_ids": [2, 5, 3]}]
    a, b, c = (DataCollatorForMaskedGenes(tokenizer, seed=s, mask_probability=0.5)(rows) for s in (0, 0, 1))
    assert a["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert a["input_ids"][1, 3:].tolist() == [0] * 4
    assert (a["labels"][1, 3:] == -100).all()
    assert torch.equal(a["input_ids"], b["input_ids"])
    assert not torch.equal(a["input_ids"], c["input_ids"])
    with pytest.raises(ValueError, match=r"mask_probability is 1\.5"):
        DataCollatorForMaskedGenes(tokenizer, mask_probability=1.5)


def test_baselines_by_hand():
    cells = [[0, 1], [0, 2]]
    frequency = GeneFrequencyBaseline(cells, 4)
    np.testing.assert_allclose(frequency.shares, np.array([3, 2, 2, 1]) / 8)
    assert frequency.loss(np.array([0, 3]), np.array([0, 0])) == pytest.approx(-np.log([3 / 8, 1 / 8]).mean())
    by_rank = RankFrequencyBaseline(cells, 4, width=1, prior=2.0)
    assert by_rank.loss(np.array([0]), np.array([0])) == pytest.approx(-np.log((2 + 2 * 3 / 8) / 4))
    assert by_rank.loss(np.array([2]), np.array([1])) == pytest.approx(-np.log((1 + 2 * 2 / 8) / 4))
    assert majority_accuracy(["a", "a", "b"], ["a", "b", "b", "b"]) == 0.25
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert neighbour_accuracy(points, ["l", "l", "h", "h"], np.array([[0.4], [10.4], [0.2]]), ["l", "h", "h"], k=2) == pytest.approx(2 / 3)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    embeddings = np.concatenate([rng.normal(0, 1, (30, 5)), rng.normal(8, 1, (30, 5))]).astype(np.float32)
    embeddings[4] = np.nan
    coordinates = umap_coordinates(embeddings)
    assert np.isnan(coordinates[4]).all()
    assert np.array_equal(np.nan_to_num(coordinates), np.nan_to_num(umap_coordinates(embeddings))), "the same seed, the same picture"
    kinds = {"classes": ["a"] * 30 + [None] * 30, "numbers": list(range(60)), "many": [f"class {i}" for i in range(60)]}
    for name, values in kinds.items():
        plot_umap(coordinates, values, tmp_path / f"umap_{name}.png", title="t", name=name)
        plot_heatmap(embeddings, values, tmp_path / f"heat_{name}.png", title="t", name=name)
    plot_training([1, 2, 3], [3.0, 2.0, 1.0], tmp_path / "loss.png", held_out={"a": [(3, 2.2)], "b": []}, references={"a": {"baseline": 2.5}})
    assert len([p for p in tmp_path.iterdir() if p.stat().st_size > 5000]) == 7
    assert np.isnan(umap_coordinates(embeddings[:2])).all()


@pytest.mark.slow
def test_pictures_of_many_cells_are_drawn():
    """Beyond 8,192 cells scanpy would take neighbours that it cannot read."""
    cells = np.random.default_rng(0).normal(size=(8_300, 4)).astype(np.float32)
    assert np.isfinite(umap_coordinates(cells)).all()


def test_outputs_are_whole_or_not_there(tmp_path):
    with new_folder(tmp_path / "a", made_by="test") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a", made_by="test", overwrite=True) as folder:
        (folder / "x").write_text("2")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "1"
    with new_folder(tmp_path / "a", made_by="test", overwrite=True) as folder:
        (folder / "y").write_text("3")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [MARK, "y"]
    with pytest.raises(OutputExistsError, match="--overwrite"), new_file(tmp_path / "a"):
        pass
    with new_file(tmp_path / "f") as path:
        path.write_text("1")
    with pytest.raises(RuntimeError), new_file(tmp_path / "f", overwrite=True) as path:
        path.write_text("2")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


def test_devices(monkeypatch):
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device().type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"device '{name}' was asked for"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device().type == "cuda"


def test_backoff_halves_until_it_fits():
    tried = []

    def run(items):
        tried.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return sum(items)

    assert run_with_backoff(run, list(range(10))) == [0 + 1, 2 + 3 + 4, 5 + 6, 7 + 8 + 9]
    assert tried == [10, 5, 2, 3, 5, 2, 3]

    def never(items):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_with_backoff(never, [1, 2])
