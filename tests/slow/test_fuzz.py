"""The restricted reader against files nobody meant well: whatever the bytes, it returns a dictionary or refuses, and runs nothing."""

import contextlib
import io
import os
import pickle
import pickletools
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geneformer_hf.errors import CheckpointError
from geneformer_hf.pickles import read_dictionary, read_raw_values
from tests.conftest import ensembl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MANY = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
READERS = (read_dictionary, read_raw_values)
watching = []
seen = []


def watch(event, arguments):
    """What Python itself reports: whatever runs, imports or touches the system while a file is read."""
    if watching and (event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.")) or event in ("exec", "compile", "import")):
        seen.append((event, str(arguments)[:100]))


sys.addaudithook(watch)


def published() -> list[bytes]:
    contents = [
        {ensembl(i): np.int16(i) for i in range(20)} | {"<pad>": 0},
        {ensembl(i): np.float64(i / 7) for i in range(20)},
        {f"SYM{i}": ensembl(i) for i in range(20)},
        {(3, "cell_emb"): [0.5, np.float32(0.25)]},
    ]
    return [pickle.dumps(content, protocol=protocol) for content in contents for protocol in range(6)]


def problems(content, tmp_path):
    """What is wrong with how the readers take a file: another outcome than a dictionary or a refusal, or anything that ran."""
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(content)
    found = []
    for reader in READERS:
        # Twice: what Python imports once for good is imported by then.
        for _ in range(2):
            seen.clear()
            watching.append(True)
            try:
                outcome = reader(path)
            except Exception as error:  # noqa: BLE001 - judged below
                outcome = error
            finally:
                watching.clear()
            ran = [what for what in seen if what[0] != "import"]
            is_fine = isinstance(outcome, dict) or (isinstance(outcome, CheckpointError) and str(path) in str(outcome))
            found += [] if is_fine else [f"{reader.__name__} gave {outcome!r}"]
            found += [f"{reader.__name__}: {what}" for what in ran]
        found += [f"{reader.__name__}: {what}" for what in seen if what[0] == "import"]
    return found


@MANY
@given(st.binary(max_size=400))
def test_any_bytes(tmp_path, content):
    assert problems(content, tmp_path) == []


@MANY
@given(st.sampled_from(published()), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8), st.integers(0, 10_000))
def test_published_files_with_changed_bytes(tmp_path, content, changes, cut):
    content = bytearray(content)
    for place, value in changes:
        content[place % len(content)] = value
    assert problems(bytes(content[: cut % len(content)] if cut % 3 == 0 else content), tmp_path) == []


NAMES = [
    ("os", "system"), ("posix", "mkdir"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"), ("subprocess", "Popen"), ("numpy", "load"),
    ("numpy", "memmap"), ("numpy", "fromfile"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "dtype"), ("numpy._core.multiarray", "scalar"), ("collections", "defaultdict"),
    ("builtins", "list"), ("numpy", "dtype.__class__"), ("numpy", "core.multiarray.scalar"), ("pickle", "loads"), ("geneformer_hf.pickles", "pickle.loads"), ("shutil", "rmtree"), ("socket", "socket"),
]  # fmt: skip
NAMES_OF_OPCODES = [code for code in pickletools.opcodes if code.arg is None and code.name != "STOP"]


@st.composite
def programs(draw):
    """Pickles that are programs: globals, arguments, calls and attributes in any order."""
    out = io.BytesIO()
    out.write(b"\x80" + bytes([draw(st.integers(0, 5))]))
    for _ in range(draw(st.integers(1, 25))):
        kind = draw(st.integers(0, 7))
        if kind <= 1:
            module, name = draw(st.sampled_from(NAMES))
            out.write(f"c{module}\n{name}\n".encode())
        elif kind == 2:
            module, name = draw(st.sampled_from(NAMES))
            for word in (module, name):
                out.write(b"\x8c" + bytes([len(word)]) + word.encode())
            out.write(b"\x93")
        elif kind == 3:
            text = draw(st.sampled_from(["touch pwned", "pwned", "i4", "O", "V8", "__import__('os').mkdir('pwned')", ensembl(1)]))
            out.write(b"\x8c" + bytes([len(text)]) + text.encode())
        elif kind == 4:
            out.write(
                draw(
                    st.sampled_from(
                        [
                            b"(",
                            b")",
                            b"t",
                            b"\x85",
                            b"\x86",
                            b"\x87",
                            b"R",
                            b"R",
                            b"b",
                            b"\x81",
                            b"\x92",
                            b"i" + b"os\nsystem\n",
                            b"o",
                            b"}",
                            b"s",
                            b"u",
                            b"]",
                            b"a",
                        ]
                    )
                )
            )
        elif kind == 5:
            out.write(draw(st.sampled_from(NAMES_OF_OPCODES)).code.encode("latin-1"))
        elif kind == 6:
            out.write(b"K" + bytes([draw(st.integers(0, 255))]))
        else:
            out.write(b"C\x04" + draw(st.binary(min_size=4, max_size=4)))
    out.write(b".")
    return out.getvalue()


@MANY
@given(programs())
def test_programs(tmp_path, content):
    with contextlib.chdir(tmp_path):
        assert problems(content, tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["dictionary.pkl"]


def test_the_watch_sees_what_runs(tmp_path):
    """The tests above can fail: an unrestricted reader is caught."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    content = pickle.dumps({ensembl(1): Hostile()})
    seen.clear()
    watching.append(True)
    pickle.loads(content)
    watching.clear()
    assert seen
    (tmp_path / "pwned").rmdir()
    assert problems(content, tmp_path) == []
    assert not (tmp_path / "pwned").exists()
