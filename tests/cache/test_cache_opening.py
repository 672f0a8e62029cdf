"""Creating and opening caches, and the rejected inputs."""

import json
import re

import pytest
from cache_toys import small_cache

from vaflow.cache import create_cache, open_cache
from vaflow.cache.schema import STORES
from vaflow.errors import SchemaError, UsageError


def test_create_opens_an_existing_cache(tmp_path, store):
    first = small_cache(tmp_path / "cache", store)
    again = create_cache(tmp_path / "cache", store=store)
    assert again.items() == first.items()
    assert (again.store, again.writable, again.path) == (store, True, tmp_path / "cache")
    other = next(name for name in STORES if name != store)
    with pytest.raises(UsageError, match=f"Expected: {other}. Got: {store}"):
        create_cache(tmp_path / "cache", store=other)


def test_create_accepts_only_an_empty_directory(tmp_path, store):
    (tmp_path / "empty").mkdir()
    assert create_cache(tmp_path / "empty", store=store).items() == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(SchemaError, match=r"neither empty nor a cache.*thesis\.txt.*another folder"):
        create_cache(tmp_path / "full", store=store)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="is not a folder"):
        create_cache(tmp_path / "full" / "thesis.txt" / "cache", store=store)
    with pytest.raises(UsageError, match="Choices: hdf5, zarr"):
        create_cache(tmp_path / "x", store="sqlite")


def test_opening_a_directory_without_a_cache_states_the_remedy(tmp_path):
    with pytest.raises(UsageError, match=r"The folder does not exist\. Make one: vaflow extract"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"It has no manifest\.json"):
        open_cache(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_versions_are_refused(tmp_path, store, version):
    cache = small_cache(tmp_path / "cache", store)
    manifest = json.loads(cache.layout.manifest.read_bytes())
    cache.layout.manifest.write_text(json.dumps({**manifest, "schema_version": version}))
    for opening in (open_cache, lambda path: create_cache(path, store=store)):
        with pytest.raises(SchemaError, match=re.escape(f"Expected: 1. Got: {version!r}.")):
            opening(cache.path)


def test_files_and_run_directories_are_named_as_such(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    for path, kind in ((tmp_path / "run", "a run directory"), (tmp_path / "run/config.toml", "a file")):
        with pytest.raises(UsageError, match=rf"is not a cache\. Got: {kind}\. Check the path\."):
            open_cache(path)
