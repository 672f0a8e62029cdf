"""Hostile arrays and tensors: NumPy files, safetensors, pickles."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_documents import LEAF, VALUE
from fuzz_tables import read_file_of_features
from hypothesis import strategies as st

from vaflow.errors import VaflowError
from vaflow.extract.importing.feature_files import find_features

DESCR = st.sampled_from(
    ("<f4", "<f2", ">f8", "|i1", "|b1", "|O", "<U4", "<c8", "<M8[s]", "|V0", "|S0", "<f16", "nonsense", "")
)
SHAPE = st.lists(st.sampled_from((0, 1, 2, 4, 8, -1, 2**31, 2**62, 2**63)), max_size=4).map(tuple)
HEADER = st.fixed_dictionaries({"descr": DESCR, "fortran_order": st.booleans() | LEAF, "shape": SHAPE | VALUE}).map(
    repr
)
NPY = st.tuples(HEADER | st.text(max_size=60), st.binary(max_size=300), st.integers(0, 3)).map(
    lambda parts: b"\x93NUMPY" + bytes([parts[2], 0]) + _sized(parts[0], parts[2]) + parts[1]
)  # fmt: skip


def _sized(header: str, version: int) -> bytes:
    raw = (header + "\n").encode("utf-8", "surrogatepass")
    return struct.pack("<H" if version < 2 else "<I", len(raw)) + raw


def whole_npy(array: Any) -> bytes:
    """The file of an array."""
    from io import BytesIO

    file = BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


ROWS = st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), max_size=6).map(
    lambda rows: whole_npy(np.array(rows, np.float32).reshape(-1, 2))
)
TIMES = st.lists(st.floats(), max_size=6).map(whole_npy)


def try_arrays(folder: Path, example: tuple[bytes, bytes | None]) -> None:
    features, times = example
    (folder / "a.npy").write_bytes(features)
    if times is not None:
        (folder / "a.time.npy").write_bytes(times)
    (file,) = find_features(folder)
    read_file_of_features(file)


def try_tensors(folder: Path, data: bytes) -> None:
    from vaflow.encoders.weights import read_state_dict
    from vaflow.files import read_tensors

    (folder / "a.safetensors").write_bytes(data)
    (folder / "a.pt").write_bytes(data)
    problems = []
    for read, name in ((read_tensors, "a.safetensors"), (read_state_dict, "a.safetensors"), (read_state_dict, "a.pt")):
        try:
            read(folder / name)
        except VaflowError as error:
            problems.append(error)
    if problems:
        raise problems[0]


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "F16", "I64", "X", "")),
        "shape": st.lists(st.sampled_from((0, 1, 2, 4, 2**31, 2**63)), max_size=3) | LEAF,
        "data_offsets": st.lists(st.sampled_from((0, 4, 8, 16, 2**63)), min_size=2, max_size=2) | LEAF,
    }
)
TENSORS = st.tuples(st.dictionaries(st.text(max_size=4), TENSOR | LEAF, max_size=2), st.binary(max_size=32)).map(
    lambda pair: (lambda head: struct.pack("<Q", len(head)) + head + pair[1])(json.dumps(pair[0]).encode())
)
PICKLES = st.sampled_from(
    (
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x04N.",
        b"PK\x03\x04",
    )
)
