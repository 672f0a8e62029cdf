"""The feature cache between the stages, which `cache_schema.md` specifies: create and open caches, read manifests."""

import json
import os
from pathlib import Path
from typing import Any

from vaflow import files
from vaflow.cache.cache import Cache
from vaflow.cache.layout import Layout, manifest_document, seal, unseal
from vaflow.cache.packed import PackedCache, refuse_writing
from vaflow.cache.remote import Remote, refuse_other_urls, url_of
from vaflow.cache.schema import FORMAT, PACKED, SCHEMA_VERSION, STORES, Item, StoreName
from vaflow.errors import SchemaError, UsageError, command, examples, explain
from vaflow.files import TEMPORARY

__all__ = ["Cache", "Item", "address", "create_cache", "is_cache", "open_cache"]


PathLike = str | os.PathLike[str]


def create_cache(path: PathLike, *, store: str = "zarr") -> Cache:
    """Create a cache, or open an existing one for writing.

    Args:
        path: a folder that is empty, missing, or a cache.
        store: "zarr" or "hdf5".

    Raises:
        UsageError: unknown store, the cache has another store, or the directory is not writable.
        SchemaError: the directory has other contents, or a cache of another schema version.
        CorruptError: its manifest is damaged.
    """
    if store not in STORES:
        raise UsageError(explain("Unknown store", got=store, choices=STORES))
    layout = layout_of(path)
    try:
        _create_manifest(layout, store)
    except FileExistsError as error:
        raise _unwritable(layout, f"{error.filename} is not a folder") from error
    except OSError as error:
        raise _unwritable(layout, str(error)) from error
    cache = _open(layout, writable=True)
    if cache.store != store:
        problem = f"The cache {cache.place} has another store"
        remedy = f"Use --store {cache.store}, or another folder"
        raise UsageError(explain(problem, expected=store, got=cache.store, remedy=remedy))
    return cache


def open_cache(path: PathLike, *, writable: bool = False) -> Cache:
    """Open an existing cache.

    Raises:
        UsageError: not a cache, or not writable.
        SchemaError: its schema version is not supported.
        CorruptError: its manifest is damaged.
    """
    return _open(_pulled_layout(path), writable=writable)


def _pulled_layout(path: PathLike) -> Layout:
    """Return the layout of a cache; on an object store, with an updated local copy."""
    layout = layout_of(path)
    try:
        if layout.remote is not None:
            layout.remote.pull()
    except OSError as error:
        raise _unreadable(layout, error) from error
    return layout


def _open(layout: Layout, *, writable: bool) -> Cache:
    try:
        store = read_manifest(layout)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_cache(layout) from None
    except OSError as error:
        raise _unreadable(layout, error) from error
    if store == PACKED:
        if writable:
            raise refuse_writing(layout)
        return PackedCache(layout)
    if writable and not os.access(layout.root, os.W_OK | os.X_OK):
        raise _unwritable(layout, "no write access")
    return Cache(layout, store, writable=writable)


def is_cache(path: PathLike) -> bool:
    """Return whether `path` is a cache, of any schema version.

    Raises:
        UsageError: an object store cannot be reached.
    """
    return _pulled_layout(path).manifest.exists()


def address(path: PathLike) -> str:
    """Return the canonical name of a cache: its URL, or its directory with links resolved."""
    return url_of(path) or str(Path(path).resolve())


def layout_of(path: PathLike) -> Layout:
    """Return the layout of a cache: a directory, or a URL of an object store (`s3://bucket/path`).

    Raises:
        UsageError: the library for this kind of store is not installed, or no such kind is known.
    """
    url = url_of(path)
    if url is None:
        refuse_other_urls(path)
        return Layout(Path(os.path.abspath(os.path.expanduser(path))))  # noqa: PTH100, PTH111 - does not resolve links
    remote = Remote(url)
    return Layout(remote.local, remote)


def _create_manifest(layout: Layout, store: str) -> None:
    files.make_folder(layout.root)
    if layout.remote is not None:
        layout.remote.pull()
    if layout.manifest.exists():
        return
    names = [p.name for p in layout.root.iterdir()] if layout.remote is None else layout.remote.names()
    others = sorted(name for name in names if not name.startswith(TEMPORARY))
    if others and not layout.manifest.exists():  # another writer may have created it meanwhile
        problem = f"{layout.place} is neither empty nor a cache"
        expected = "an empty or missing folder, or one with a manifest.json"
        raise SchemaError(explain(problem, expected=expected, got=examples(others), remedy="Choose another folder"))
    layout.create(layout.manifest, seal(manifest_document(store)))


def read_manifest(layout: Layout) -> StoreName:
    """Return the cache's store, after checking schema version and checksum.

    Raises:
        OSError: the manifest is missing or unreadable.
        SchemaError, CorruptError: see `open_cache`.
    """
    try:
        data = files.read_document(layout.root, layout.manifest)
    except ValueError as error:
        raise layout.corrupt(layout.manifest, str(error)) from error
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise layout.corrupt(layout.manifest, f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SchemaError(explain(f"{layout.manifest} is not the manifest of a cache", expected=f"format {FORMAT!r}"))
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:  # compared before the checksum, which other versions may compute differently
        problem = f"The cache {layout.place} has an unsupported schema version"
        remedy = "Use the release of vaflow that wrote it, or extract into a new folder"
        raise SchemaError(explain(problem, expected=SCHEMA_VERSION, got=repr(version), remedy=remedy))
    try:
        store = unseal(data)["store"]
    except (ValueError, KeyError) as error:
        raise layout.corrupt(layout.manifest, str(error)) from error
    if store not in (*STORES, PACKED):
        choices = (*STORES, PACKED)
        raise SchemaError(explain(f"The cache {layout.place} has an unknown store", got=store, choices=choices))
    name: StoreName = store
    return name


def _no_cache(layout: Layout) -> UsageError:
    kind = "a file" if layout.root.is_file() else "a run directory" if (layout.root / "config.toml").is_file() else ""
    if kind:
        return UsageError(explain(f"{layout.place} is not a cache", got=kind, remedy="Check the path"))
    gone = layout.remote is None and not layout.root.exists()
    empty = layout.remote is not None or gone or (layout.root.is_dir() and not any(layout.root.iterdir()))
    what = "The folder does not exist" if gone else "It has no manifest.json"
    data, out = ("DATA", layout.place) if empty else (layout.place, f"{layout.place}.cache")
    extract = command("extract", data, "--out", out)
    problem = f"{layout.place} is not a cache. {what}"
    return UsageError(explain(problem, remedy=f"Make one: {extract}, or check the path"))


def _unreadable(layout: Layout, error: OSError) -> UsageError:
    return UsageError(explain(f"The cache {layout.place} cannot be read: {error}"))


def _unwritable(layout: Layout, why: str) -> UsageError:
    problem = f"The cache {layout.place} cannot be written: {why}"
    return UsageError(explain(problem, remedy="Choose another folder, or give write access"))
