"""`cache_schema.md` matches the code: tables, readers, definitions."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from cache_toys import arrays, assert_same, stream
from hypothesis import given
from hypothesis import strategies as st

from vaflow.cache import create_cache
from vaflow.cache.layout import crc32c, seal, unseal
from vaflow.cache.schema import FORMAT, KINDS, SCHEMA_VERSION, STORES, Kind, Record, StreamInfo, escape
from vaflow.cache.stores import LARGEST_CHUNK

PAGE = (Path(__file__).parents[2] / "cache_schema.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#|\Z)", PAGE, flags=re.M | re.S))


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of the first table in `text`, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def members(title: str) -> set[str]:
    """The members that the page lists for a JSON file."""
    text = PAGE.split(f"**{title}**")[1].split("\n\n")[1]
    return {name for cells in rows(text) for name in re.findall(r"`(\w+)`", cells[0])}


def bitwise_crc32c(data: bytes) -> int:
    """The definition, bit by bit: polynomial 0x1EDC6F41, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def plain_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def test_the_page_lists_every_kind():
    after = PAGE.split("## Kinds of streams")[1].split("\n## ")[0]
    assert re.findall(r"^### (\w+)$", after, flags=re.M) == list(KINDS) == list(get_args(Kind))


@pytest.mark.parametrize("kind", KINDS)
def test_documented_tables_match_the_types(kind):
    documented = {
        cells[0].strip("`"): (tuple(cells[1].split(", ")), tuple(cells[2].split(", ")), cells[3] == "yes")
        for cells in rows(SECTIONS[kind])
    }
    assert documented == {name: (spec.axes, spec.dtypes, spec.required) for name, spec in KINDS[kind].items()}


def test_the_page_lists_every_member_of_every_file(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(stream("labels"))
    cache.write("labels", "clip", arrays(stream("labels")))
    for title, path in (
        ("manifest.json", cache.layout.manifest),
        ("streams/\\<stream\\>.json", cache.layout.stream("labels")),
        ("records/\\<stream\\>/\\<item\\>.json", cache.layout.record("labels", "clip")),
    ):
        assert members(title) == set(json.loads(path.read_bytes())), title
    assert members("streams/\\<stream\\>.json") >= {field.name for field in fields(StreamInfo)}
    assert members("records/\\<stream\\>/\\<item\\>.json") == {field.name for field in fields(Record)} | {"crc32c"}


def test_the_page_states_the_version_and_the_stores():
    assert f"# The cache, schema version {SCHEMA_VERSION}" in PAGE
    assert f"| `format` | string | `{FORMAT}` |" in PAGE
    assert all(f"**{name}**:" in SECTIONS["Stores"] for name in STORES)
    assert f"up to {LARGEST_CHUNK // 2**20} MiB" in SECTIONS["Stores"]


def test_the_documented_readers_read_every_kind(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    for kind in get_args(Kind):
        cache.declare(stream(kind))
        cache.write(kind, "a/b", arrays(stream(kind), seed=1), meta={"split": "val"})
        cache.write(kind, "empty", arrays(stream(kind), 0))
    (cache.layout.records("visual") / ".tmp-1.json").write_text("half")
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS["Reading it"], flags=re.S)
    reader = {name: code for code in blocks for name in ("zarr", "h5py") if f"import {name}" in code}
    assert all(len(code.strip().splitlines()) <= 11 for code in reader.values())
    space: dict[str, Any] = {}
    exec(reader["zarr" if store == "zarr" else "h5py"], space)
    read = {(record["stream"], record["item"]): (record, got) for record, got in space["items"](cache.path)}
    assert read.keys() == {(kind, item) for kind in KINDS for item in ("a/b", "empty")}
    for (kind, item), (record, got) in read.items():
        length, seed = (5, 1) if item == "a/b" else (0, 0)
        assert_same(got, arrays(stream(kind), length, seed=seed))
        assert record["meta"] == ({"split": "val"} if item == "a/b" else {})


def test_the_documented_escapes_match_the_code():
    table = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(SECTIONS["Escaped names"])}
    assert len(table) >= 6
    assert {name: escape(name) for name in table} == table


@given(st.binary(max_size=200))
def test_checksums_match_their_documented_definition(data):
    assert crc32c(data) == bitwise_crc32c(data)
    assert crc32c(np.frombuffer(bytearray(data), np.uint8)) == bitwise_crc32c(data)


def test_files_and_documents_contain_the_documented_checksum(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    cache.declare(stream("labels"))
    cache.write("labels", "é", arrays(stream("labels")))
    for path in (cache.layout.manifest, cache.layout.stream("labels"), cache.layout.record("labels", "é")):
        document = json.loads(path.read_bytes())
        assert path.read_bytes() == plain_json(document) + b"\n"
        assert document.pop("crc32c") == bitwise_crc32c(plain_json(document))
    record = cache.record("labels", "é")
    folder = cache.path / "labels" / "%C3%A9"
    on_disk = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert record.files == {name: {"size": len(data), "crc32c": bitwise_crc32c(data)} for name, data in on_disk.items()}


def test_fingerprints_match_their_documented_definition(tmp_path):
    cache = create_cache(tmp_path / "cache")
    info = stream("visual")
    cache.declare(info)
    document = json.loads(cache.layout.stream("visual").read_bytes())
    body = {name: document[name] for name in ("name", "kind", "dim", "dtype", "identity")}
    expected = blake2b(plain_json(body), digest_size=16).hexdigest()
    assert document["fingerprint"] == cache.fingerprint("visual") == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "crc32c"), JSON, max_size=5))
def test_sealed_documents_round_trip(document):
    expected = json.loads(json.dumps(document))
    assert unseal(seal(expected)) == expected


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3), st.data())
def test_every_flipped_bit_of_a_sealed_document_is_detected(document, data):
    document.pop("crc32c", None)
    sealed = bytearray(seal(document))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="it "):
        unseal(bytes(sealed))
