"""The GPU benchmark in small shapes on the CPU, in a process where nothing above the models is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"
ABSENT = ("datasets", "anndata", "h5py", "pyarrow", "pandas", "scanpy", "sklearn", "peft", "bitsandbytes")
RUN = f"""
import runpy, sys
for name in {ABSENT!r}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_part_runs_without_datasets_or_anndata(tmp_path):
    arguments = [str(SCRIPT), "--tiny", "--out", str(tmp_path / "gpu.json"), "--table", str(tmp_path / "gpu.md")]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "gpu.md").read_text()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["card", "gemm", "perturb", "pretrain", "attention", "embed", "layer", "screen"]
    rows = [row for part in parts.values() for row in part["rows"]]
    assert not [row for row in rows if str(row.get("status", "")).startswith("error")]
    for name in ("torch", "transformers", "--tiny"):
        assert name in table
    errors = {row["what"]: row["error"] for row in rows if "error" in row and "ours fp32" in row["what"]}
    assert errors
    assert max(errors.values()) < 1e-5
