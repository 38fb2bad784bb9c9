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


NUMBERS = [np.dtype(code).type(3) for code in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "b1")]


@pytest.mark.parametrize("value", [*NUMBERS, np.array([1.5], dtype=">f8")[0], np.str_("T cell"), np.str_("ß")], ids=repr)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_values_are_what_numpy_reads(value, protocol, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": value}, protocol=protocol))
    assert read_dictionary(tmp_path / "x.pkl") == {"a": value.item()}


@pytest.mark.parametrize(
    ("code", "content"),
    [("O", b"12345678"), ("V8", b"12345678"), ("04", b"1234"), ("f8,f8", b"1" * 16), ("f8", b"1234"), ("U1", b"\xff\xff\xff\xff")],
    ids=["object", "void", "text_that_is_compiled", "record", "bytes_too_few", "no_character"],
)
def test_other_numpy_types_are_refused(code, content, tmp_path):
    """numpy reads the type as a language of its own, and takes the bytes as they are."""
    data = pickle.dumps({"a": np.float64(2.5)}, protocol=3)
    data = data.replace(b"X\x02\x00\x00\x00f8", b"X" + len(code).to_bytes(4, "little") + code.encode())
    data = data.replace(b"C\x08" + np.float64(2.5).tobytes(), b"C" + bytes([len(content)]) + content)
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as a pickled dictionary"):
        read_dictionary(tmp_path / "x.pkl")


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
