import hashlib
import os
import pickle

import numpy as np
import pytest

from geneformer_hf.errors import CheckpointError, UnsafePickleError
from geneformer_hf.pickles import read_dictionary, sha256


def dump(content, path):
    path.write_bytes(pickle.dumps(content))
    return path


def test_plain_and_numpy_values_become_python(tmp_path):
    path = dump({"a": 1, "b": np.int16(5), "c": np.float64(0.1), "d": "text"}, tmp_path / "x.pkl")
    content = read_dictionary(path)
    assert content == {"a": 1, "b": 5, "c": 0.1, "d": "text"}
    assert [type(v) for v in content.values()] == [int, int, float, str]


def test_numpy_1_spelling_is_read_too(tmp_path):
    new, old = "numpy._core.multiarray", "numpy.core.multiarray"
    data = pickle.dumps({"a": np.float64(2.5)}, protocol=3).replace(new.encode(), old.encode())
    assert old.encode() in data
    (tmp_path / "x.pkl").write_bytes(data)
    assert read_dictionary(tmp_path / "x.pkl") == {"a": 2.5}


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_hostile_pickle_executes_nothing(tmp_path):
    path = dump({"ENSG": Hostile(tmp_path / "pwned")}, tmp_path / "x.pkl")
    with pytest.raises(UnsafePickleError, match=r"x\.pkl: the pickle asks for \w+\.mkdir.*nothing of it was executed"):
        read_dictionary(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [eval, np.ndarray, np.array([1, 2]), {"a": np.array([1])}, complex(1, 2)], ids=["eval", "class", "array", "array_inside", "complex"]
)
def test_anything_but_scalars_is_refused(content, tmp_path):
    with pytest.raises(CheckpointError):
        read_dictionary(dump(content, tmp_path / "x.pkl"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer of 56 bytes"),
        (b"garbage", "cannot be read as a pickled dictionary"),
        (pickle.dumps([1]), "holds a list"),
    ],
    ids=["lfs", "garbage", "list"],
)
def test_other_files_are_named_for_what_they_are(data, words, tmp_path):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_dictionary(tmp_path / "x.pkl")


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
