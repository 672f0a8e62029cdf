"""Caches on object stores: a local folder that fills as items are read, and puts in the order of the commit protocol.

All other modules work on the local folder. It holds every record and stream of the cache, as they were when it was
opened or the index was refreshed, and the arrays that were read or written here. Objects appear whole, so a record that
is put last commits an item; where the store can create exclusively (S3 can), the first of several writers wins, and
elsewhere the last one does. Credentials come from the environment, as the store's own library finds them.
"""

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from vaflow.cache.names import escape, is_attempt
from vaflow.errors import UsageError, explain
from vaflow.failures import LISTS
from vaflow.files import replace_file

VARIABLE = "VAFLOW_CACHE_DIR"  # where the local folders are kept; without it they go when the program ends
SCHEMES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "memory": ""}
EXTRAS = {"s3fs": "s3"}  # of this package
PULLED = ".pulled.json"  # object -> what it looked like when it was copied
BATCH = 256  # objects asked for at once
_URL = re.compile(r"([a-z0-9]+):/+(.+)", re.DOTALL)


def url_of(path: str | os.PathLike[str]) -> str | None:
    """`s3://bucket/path`, also where `Path` has made one slash of two; None for what is a path."""
    match = _URL.fullmatch(os.fspath(path))
    if match is None or match[1] not in SCHEMES:
        return None
    return f"{match[1]}://{match[2].rstrip('/')}"


@cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vaflow-remote-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def batched(names: Iterable[Any], size: int = BATCH) -> Iterator[list[Any]]:
    """In lists of at most `size`."""
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some


class Remote:
    """The objects below one URL, and the local folder that stands for them.

    Raises:
        UsageError: the library for this kind of store is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        kept = os.environ.get(VARIABLE)
        self.local = (Path(kept).expanduser().absolute() if kept else _temporary()) / escape(url)
        self._fs, self._base = _file_system(url)
        self._lists: dict[str, bytes] = {}  # of failures, as they were pulled

    # What is there

    def pull(self) -> None:
        """Bring the manifest, streams, records and lists of failures up to date.

        Raises:
            OSError: the store cannot be reached, or refuses.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        there = self._documents()
        known = self._pulled()
        stale = [name for name, mark in there.items() if known.get(name) != mark or not (self.local / name).is_file()]
        for names in batched(stale):
            for name, data in self._get(names).items():
                self._keep(name, data)
        for path in self._local_documents():
            if path.relative_to(self.local).as_posix() not in there:
                path.unlink(missing_ok=True)
        replace_file(self.local / PULLED, json.dumps(there).encode(), durable=False)
        self._lists = {path.name: path.read_bytes() for path in self.local.glob(LISTS)}

    def _documents(self) -> dict[str, str]:
        """Small file -> what it looks like now."""
        with self._refusals():
            self._fs.invalidate_cache()
            found = self._fs.find(self._base, maxdepth=1, detail=True)
            for folder in ("streams", "records"):
                found |= self._fs.find(f"{self._base}/{folder}", detail=True)
        names = {self._name(key): _mark(info) for key, info in found.items() if info.get("type") != "directory"}
        return {name: mark for name, mark in names.items() if name is not None and name.endswith((".json", ".jsonl"))}

    def names(self) -> list[str]:
        """Of everything directly below the URL. Raises as `pull`."""
        with self._refusals():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._base, detail=False)
            except FileNotFoundError:
                return []
        return [name for key in found if (name := self._name(key)) is not None]

    def _name(self, key: str) -> str | None:
        """The name below the cache; None for what no cache has, and would lead elsewhere."""
        name = key.lstrip("/").removeprefix(self._base.lstrip("/")).lstrip("/")
        return None if not name or {"", ".", ".."} & set(name.split("/")) or "\\" in name else name

    def _local_documents(self) -> Iterator[Path]:
        for pattern in ("manifest.json", LISTS, "streams/*.json", "records/*/*.json"):
            yield from self.local.glob(pattern)

    def _pulled(self) -> dict[str, str]:
        try:
            known = json.loads((self.local / PULLED).read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def look(self, path: Path) -> None:
        """Bring one small file up to date. Raises as `pull`."""
        name = self._below(path)
        data = self._get([name]).get(name)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            self._keep(name, data)

    def fill(self, paths: Iterable[Path], *, again: bool = False) -> None:
        """Download those that are not here yet, or all of them `again`. What is not there is left out."""
        names = [self._below(path) for path in paths if again or not path.is_file()]
        for some in batched(names):
            for name, data in self._get(some).items():
                self._keep(name, data)

    def _get(self, names: Iterable[str]) -> dict[str, bytes]:
        keys = {f"{self._base}/{name}": name for name in names}
        if not keys:
            return {}
        with self._refusals():
            found = self._fs.cat(list(keys), on_error="return")
        got = {}
        for key, name in keys.items():
            data = found.get(key, found.get(key.lstrip("/")))
            if isinstance(data, bytes):
                got[name] = data
            elif isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
                raise OSError(f"{self.url}/{name}: {data}") from data
        return got

    def _keep(self, name: str, data: bytes) -> None:
        path = self.local / name
        if name.startswith("records/"):
            self._forget_attempt(path, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, durable=False)

    def _forget_attempt(self, path: Path, data: bytes) -> None:
        """The arrays of a record that another one takes the place of are of no use here any more."""
        try:
            old, new = (json.loads(text)["attempt"] for text in (path.read_bytes(), data))
        except (OSError, ValueError, KeyError, TypeError):
            return
        if old != new and isinstance(old, str) and is_attempt(old):
            folder = self.local / path.parent.name / path.stem
            shutil.rmtree(folder / old, ignore_errors=True)
            (folder / f"{old}.h5").unlink(missing_ok=True)

    # Writing

    def put(self, paths: Iterable[Path]) -> None:
        """Upload local files, each whole. Raises as `pull`."""
        for some in batched(paths):
            with self._refusals():
                self._fs.pipe({f"{self._base}/{self._below(path)}": path.read_bytes() for path in some})

    def create(self, path: Path, data: bytes) -> bool:
        """Put an object unless there is one: returns False if another writer was first. Raises as `pull`."""
        key = f"{self._base}/{self._below(path)}"
        try:
            with self._refusals():
                self._fs.pipe_file(key, data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, path: Path, data: bytes) -> None:
        """Put an object that replaces another. Raises as `pull`."""
        with self._refusals():
            self._fs.pipe_file(f"{self._base}/{self._below(path)}", data)

    def remove(self, path: Path) -> None:
        """Remove an object, or all below it; nothing happens where there is none. Raises as `pull`."""
        with self._refusals():
            self._fs.invalidate_cache()
            try:
                self._fs.rm(f"{self._base}/{self._below(path)}", recursive=True)
            except FileNotFoundError:
                return

    def push_lists(self) -> None:
        """Upload failure lists that were written here, and remove those that were removed here. Raises as `pull`."""
        lists = {path.name: path.read_bytes() for path in self.local.glob(LISTS)}
        self.put(self.local / name for name, data in lists.items() if data != self._lists.get(name))
        for name in self._lists.keys() - lists.keys():
            self.remove(self.local / name)

    def _below(self, path: Path) -> str:
        return path.relative_to(self.local).as_posix()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What a store's library raises that is no OSError becomes one."""
        try:
            yield
        except _library_errors(self.url) as error:
            raise OSError(f"{self.url}: {error}") from error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, base = fsspec.core.url_to_fs(url)
    except ImportError as error:
        library = SCHEMES[url.partition(":")[0]]
        package = f"-e '.[{EXTRAS[library]}]'  (in the clone)" if library in EXTRAS else library
        problem = f"{url} cannot be opened: {error}"
        raise UsageError(explain(problem, remedy=f"Install it: pip install {package}")) from error
    return fs, str(base).rstrip("/")


def _library_errors(url: str) -> tuple[type[Exception], ...]:
    if not url.startswith("s3"):
        return ()
    from botocore.exceptions import BotoCoreError

    return (BotoCoreError,)


def _mark(info: Mapping[str, Any]) -> str:
    """The members of a listing that change with an object."""
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "etag", "created", "LastModified", "mtime"))
