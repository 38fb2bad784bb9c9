"""The house rules of CONTRIBUTING.md, checked on the syntax tree."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "geneformer_hf"
LAYER = {"errors": -1, "device": 0, "outputs": 0, "input_files": -0.5, "escaping": -0.5, "_version": 0, "genes": 1, "gene_ids": 0.5, "anndata_objects": 0.5, "feature_types": 0, "ranking": 1, "pickles": 1, "pickle_bounds": 0, "resources": 1, "models": 2, "data": 3,
         "reports": 4, "training": 5, "analysis": 5, "hub": 5, "pipelines": 6, "registration": 6.5, "transfer_tasks": 6, "cli": 7, "__main__": 8}  # fmt: skip
HEAVY = {"anndata": 3, "datasets": 3, "h5py": 3, "pyarrow": 3, "transformers": 2, "torch": 0}
EXTRAS = (
    "tensorboard",
    "scanpy",
    "matplotlib",
    "sklearn",
    "seaborn",
    "peft",
    "bitsandbytes",
    "optuna",
    "ray",
    "dask",
    "distributed",
    "skimage",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scib_metrics",
    "igraph",
    "networkx",
    "bionemo",
    "tiledbsoma",
    "cellxgene_census",
)
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "build_human_genes.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool):
    """Yield (room or None for other packages, name, line) of every import."""
    tree = ast.parse(path.read_text())
    guarded = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) for n in ast.walk(block)}
    nodes = tree.body if top_level else ast.walk(tree)
    package = path.relative_to(PACKAGE).parent.parts
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield None, alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            for alias in node.names:
                full = [part for part in (*target, alias.name) if part]
                yield full[0], ".".join(full), node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield None, (node.module or "").split(".")[0], node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_from_lower_layers_alone(path):
    here = room(path)
    if here == "__init__":
        return
    for target, name, line in imports(path, top_level=False):
        if target is not None and target != here:
            assert target in LAYER, f"{path}:{line} imports {name}"
            assert LAYER[target] < LAYER[here], f"{path}:{line} ({here}, layer {LAYER[here]}) imports {name} (layer {LAYER[target]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_layer_and_extras_inside_functions(path):
    here = LAYER.get(room(path), 2)
    for target, name, line in imports(path, top_level=True):
        if target is None:
            assert name not in EXTRAS, f"{path}:{line} imports the extra {name} at the top"
            assert here >= HEAVY.get(name, -1), f"{path}:{line} imports {name} in layer {here}"
    if here == 1:
        assert not re.search(r"^(import|from) torch", path.read_text(), re.M)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    here = room(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "exit"):
            assert here == "cli", f"{path}:{node.lineno} calls {node.func.id}"
    if path.name != "pickles.py":
        assert not re.search(r"^\s*(?:import|from) pickle\b", text, re.M)
    if path.name != "device.py":
        assert not re.search(r"[\"']cuda", text)
    if path.name != "adapters.py":
        assert not re.search(r"^\s*(?:import|from) (peft|bitsandbytes)", text, re.M)
    # Code from a repository never runs, and pickles of weights are read as tensors alone.
    assert not re.search(r"trust_remote_code\s*=\s*True", text.replace("trust_remote_code: bool", ""))
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text))
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert text.count("\n") <= 600


def test_every_room_has_a_layer():
    assert {room(p) for p in MODULES} - {"__init__"} <= set(LAYER)
