"""File names stay inside the cache, never collide and can be decoded."""

import os
import string
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from cache_toys import arrays, assert_same, stream
from hypothesis import given
from hypothesis import strategies as st

from vaflow.cache import create_cache, open_cache
from vaflow.cache.layout import Layout
from vaflow.cache.maintenance import verify
from vaflow.cache.schema import escape
from vaflow.errors import UsageError

ODD = [
    "a/b",
    "a",
    "a/b/c",
    "zarr.json",
    ".zarray",
    "..",
    ".",
    "/etc/passwd",
    "../../escape",
    "a.mp4",
    "a.avi",
    "Trial",
    "trial",
    "records",
    "streams",
    "manifest.json",
    "index.json",
    "failures.jsonl",
    ".tmp-1",
    "%2E.",
    "%",
    "name with spaces",
    " ",
    "trailing.",
    "new\nline",
    "nul\0",
    "é",  # one code point
    "e\u0301",  # two names that look the same
    "视频/一",
    "🎬",
    os.fsdecode(b"latin-\xe9"),
    "x" * 500,
    "x" * 499 + "y",
    "é" * 300,
    "~tilde",
    "back\\slash",
    "C:",
    "*?",
]
NAMES = st.text(min_size=1, max_size=300) | st.sampled_from(ODD)


def can_be_json(name: str) -> bool:
    return not any(0xD800 <= ord(a) < 0xDC00 <= ord(b) < 0xE000 for a, b in pairwise(name))


@given(NAMES)
def test_file_names_are_short_ascii_and_never_hidden_or_reserved(name):
    if not can_be_json(name):
        return
    made = escape(name)
    assert set(made) <= set(string.ascii_letters + string.digits + "._-%~")
    assert len(made) <= 160
    assert not made.startswith(".")
    assert not made.startswith("~")
    assert made not in ("records", "streams")
    for special in (".json", ".jsonl"):
        assert not made.endswith(special) or made.startswith("%")


@given(NAMES, NAMES)
def test_different_names_have_different_file_names(one, other):
    if can_be_json(one) and can_be_json(other):
        assert (escape(one) == escape(other)) == (one == other)


@given(st.text(st.characters(codec="utf-8", exclude_characters="~"), min_size=1, max_size=40))
def test_ordinary_names_are_percent_encoded(name):
    """`urllib.parse.quote` does the same but for the tilde, the leading dot and names with a meaning."""
    if not name.startswith(".") and not name.endswith(("json", "jsonl")) and name not in ("records", "streams"):
        expected = quote(name, safe="")
        if len(expected) <= 160:
            assert escape(name) == expected


def test_long_names_end_in_a_digest_of_the_full_name():
    name = "é" * 100
    digest = blake2b(name.encode(), digest_size=16).hexdigest()
    assert escape(name) == quote("é" * 100)[:99] + "~" + digest  # 100 would cut a %XX


def test_unstorable_names_are_rejected():
    with pytest.raises(UsageError, match="needs a name"):
        escape("")
    with pytest.raises(UsageError, match="JSON cannot hold"):
        escape("\ud83d\ude00")  # a surrogate pair that JSON would combine


@pytest.fixture(params=["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> str:
    """Names become files in the same way in both."""
    return str(request.param)


def test_unusual_item_names_do_not_collide(tmp_path, store):
    path = tmp_path / "deep" / "cache"
    cache = create_cache(path, store=store)
    info, labels = stream("visual"), stream("labels")
    cache.declare(info)
    cache.declare(labels)
    for number, item in enumerate(ODD):
        cache.write("visual", item, arrays(info, 2, seed=number))
        cache.write("labels", item, arrays(labels, 2, seed=number), meta={"number": number})
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(path)]
    assert outside == [tmp_path / "deep"]
    reader = open_cache(path)
    assert reader.items(stream="visual") == sorted(ODD)
    for number, item in enumerate(ODD):
        assert_same(dict(reader.read("visual", item).arrays), arrays(info, 2, seed=number))
        assert reader.meta(item) == {"number": number}
    assert verify(reader) == []
    for item in ODD[::2]:
        cache.drop("visual", item)
    assert open_cache(path).items(stream="visual") == sorted(ODD[1::2])
    assert verify(reader) == []


def test_unusual_stream_names_do_not_collide(tmp_path, store):
    cache = create_cache(tmp_path / "cache", store=store)
    for number, name in enumerate(ODD):
        info = stream("visual", name=name)
        cache.declare(info)
        cache.write(name, "clip", arrays(info, 1, seed=number))
    assert list(cache.streams()) == sorted(ODD)
    for number, name in enumerate(ODD):
        expected = arrays(stream("visual"), 1, seed=number)["embedding"]
        np.testing.assert_array_equal(cache.read(name, "clip").embedding, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert verify(open_cache(cache.path)) == []


@given(NAMES, NAMES)
def test_every_path_stays_below_the_root(stream_name, item):
    if not (can_be_json(stream_name) and can_be_json(item)):
        return
    layout = Layout(Path("/cache"))
    for path, depth in (
        (layout.stream(stream_name), 2),
        (layout.record(stream_name, item), 3),
        (layout.item(stream_name, item), 2),
    ):
        assert len(path.relative_to("/cache").parts) == depth
        assert Path(os.path.normpath(path)) == path
