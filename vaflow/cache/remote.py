"""Caches on object stores: a local copy that is filled as items are read, and uploads in commit order.

All other modules work on the local copy. It holds every record and stream of the cache, as of the time when the cache
was opened or its index refreshed, and the arrays read or written on this machine. Uploads are atomic, so uploading the
record last commits an item. If the store supports exclusive creation (S3 does), the first of several writers wins,
otherwise the last. Credentials come from the environment, as the library of the store reads them.
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

from vaflow.cache.schema import escape, is_attempt
from vaflow.errors import UsageError, explain
from vaflow.files import LISTS as FAILURES
from vaflow.files import replace_file

LISTS = (FAILURES, "costs*.jsonl")  # small files of extractions, beside the format
VARIABLE = "VAFLOW_CACHE_DIR"  # directory of the local copies; without it they are deleted when the program ends
SCHEMES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "memory": ""}
EXTRAS = {"s3fs": "s3"}  # of this package
MANIFEST = "manifest.json"  # never changes while a cache exists
PULLED = ".pulled.json"  # object -> its mark (see `_mark`) when it was downloaded
BATCH = 256  # objects per request
_URL = re.compile(r"([a-z0-9]+):/+(.+)", re.DOTALL)
_PATTERN = re.compile(r"[*?[]|::")  # fsspec would read, and delete, the objects of other caches that match
_ANY_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # `Path` merges the slashes


def url_of(path: str | os.PathLike[str]) -> str | None:
    """Return the URL `s3://bucket/path`, also if `Path` merged its two slashes; None for a local path."""
    match = _URL.fullmatch(os.fspath(path))
    if match is None or match[1] not in SCHEMES:
        return None
    return f"{match[1]}://{match[2].rstrip('/')}"


def shown_place(path: str | os.PathLike[str]) -> str:
    """A path or URL of a cache as it was typed, for messages and commands: `Path` merges the slashes of a URL."""
    return url_of(path) or os.fspath(path)


def refuse_other_urls(path: str | os.PathLike[str]) -> None:
    """Check that a path is not a URL of another scheme, which would become a folder of this name.

    Raises:
        UsageError: it is one, and the working directory has no such folder.
    """
    text = os.fspath(path)
    match = _ANY_URL.match(text)
    if match is None or match[1] in SCHEMES or Path(f"{match[1]}:").is_dir():
        return
    expected = "a folder, or a URL that begins with s3://, gs://, abfs:// or az://"
    raise UsageError(explain(f"{match[1]}: is not a URL scheme that a cache can have", expected=expected, got=text))


@cache
def temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vaflow-remote-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def batched(names: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists of at most `BATCH` names."""
    rest = iter(names)
    while batch := list(islice(rest, BATCH)):
        yield batch


class Remote:
    """The objects below one URL, and their local copy.

    Raises:
        UsageError: the library for this kind of store is not installed, or fsspec would read the URL as a pattern.
    """

    def __init__(self, url: str) -> None:
        if _PATTERN.search(url):
            problem = "The URL of a cache contains a wildcard or `::`"
            raise UsageError(explain(problem, expected="none of * ? [ and ::", got=url))
        self.url = url
        kept = os.environ.get(VARIABLE)
        self.local = (Path(kept).expanduser().absolute() if kept else temporary_folder()) / escape(url)
        self._fs, self._base = _file_system(url)
        self._lists: dict[str, bytes] = {}  # lists as downloaded

    # Reading

    def pull(self) -> None:
        """Update the local manifest, streams, records and lists of failures and costs.

        Raises:
            OSError: the store cannot be reached, or denies access.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        marks = self._documents()
        try:
            known = json.loads((self.local / PULLED).read_bytes())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        if known.get(MANIFEST, marks.get(MANIFEST)) != marks.get(MANIFEST):  # another cache at this URL
            shutil.rmtree(self.local)
            self.local.mkdir(parents=True)
            known = {}
        stale = [name for name, mark in marks.items() if known.get(name) != mark or not (self.local / name).is_file()]
        for names in batched(stale):
            for name, data in self._get(names).items():
                self._keep(name, data)
        for pattern in (MANIFEST, *LISTS, "streams/*.json", "records/*/*.json"):
            for path in self.local.glob(pattern):
                if self._below(path) not in marks:
                    path.unlink(missing_ok=True)
        replace_file(self.local / PULLED, json.dumps(marks).encode(), durable=False)
        self._lists = {path.name: path.read_bytes() for pattern in LISTS for path in self.local.glob(pattern)}

    def _documents(self) -> dict[str, str]:
        """Return small file -> its current mark."""
        with self._errors():
            self._fs.invalidate_cache()
            listing = self._fs.find(self._base, maxdepth=1, detail=True)
            for folder in ("streams", "records"):
                listing |= self._fs.find(f"{self._base}/{folder}", detail=True)
        names = {self._name(key): _mark(info) for key, info in listing.items() if info.get("type") != "directory"}
        return {name: mark for name, mark in names.items() if name is not None and name.endswith((".json", ".jsonl"))}

    def names(self) -> list[str]:
        """Return the names of everything directly below the URL. Raises as `pull`."""
        with self._errors():
            self._fs.invalidate_cache()
            try:
                keys = self._fs.ls(self._base, detail=False)
            except FileNotFoundError:
                return []
        return [name for key in keys if (name := self._name(key)) is not None]

    def _name(self, key: str) -> str | None:
        """Return the name below the cache; None if it would lead outside the cache."""
        name = key.lstrip("/").removeprefix(self._base.lstrip("/")).lstrip("/")
        return None if not name or {"", ".", ".."} & set(name.split("/")) or "\\" in name else name

    def look(self, path: Path) -> None:
        """Update one small file of the local copy. Raises as `pull`."""
        name = self._below(path)
        data = self._get([name]).get(name)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            self._keep(name, data)

    def fill(self, paths: Iterable[Path], *, again: bool = False) -> None:
        """Download missing files, or with `again` all of them. Missing objects are skipped."""
        names = [self._below(path) for path in paths if again or not path.is_file()]
        for batch in batched(names):
            for name, data in self._get(batch).items():
                self._keep(name, data)

    def read_range(self, path: Path, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, in one request; nothing is kept. Raises as `pull`."""
        with self._errors():
            return bytes(self._fs.cat_file(f"{self._base}/{self._below(path)}", start=start, end=stop))

    def _get(self, names: Iterable[str]) -> dict[str, bytes]:
        keys = {f"{self._base}/{name}": name for name in names}
        if not keys:
            return {}
        with self._errors():
            contents = self._fs.cat(list(keys), on_error="return")
        got = {}
        for key, name in keys.items():
            data = contents.get(key, contents.get(key.lstrip("/")))
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
        """Delete the local arrays of the record at `path` if the record `data` that replaces it has another attempt."""
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
        """Upload local files, each atomically. Raises as `pull`."""
        for batch in batched(paths):
            with self._errors():
                self._fs.pipe({f"{self._base}/{self._below(path)}": path.read_bytes() for path in batch})

    def create(self, path: Path, data: bytes) -> bool:
        """Create an object if it does not exist; returns False if another writer was first. Raises as `pull`."""
        key = f"{self._base}/{self._below(path)}"
        try:
            with self._errors():
                self._fs.pipe_file(key, data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, path: Path, data: bytes) -> None:
        """Create or replace an object. Raises as `pull`."""
        with self._errors():
            self._fs.pipe_file(f"{self._base}/{self._below(path)}", data)

    def remove(self, path: Path) -> None:
        """Remove an object and all objects below it, if any exist. Raises as `pull`."""
        with self._errors():
            self._fs.invalidate_cache()
            try:
                self._fs.rm(f"{self._base}/{self._below(path)}", recursive=True)
            except FileNotFoundError:
                return

    def push_lists(self) -> None:
        """Upload changed lists of failures and costs; remove those removed locally. Raises as `pull`."""
        lists = {path.name: path.read_bytes() for pattern in LISTS for path in self.local.glob(pattern)}
        self.put(self.local / name for name, data in lists.items() if data != self._lists.get(name))
        for name in self._lists.keys() - lists.keys():
            self.remove(self.local / name)

    def _below(self, path: Path) -> str:
        return path.relative_to(self.local).as_posix()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the store's library that are not OSErrors into OSErrors."""
        errors: tuple[type[Exception], ...] = ()
        if self.url.startswith("s3"):
            from botocore.exceptions import BotoCoreError

            errors = (BotoCoreError,)
        try:
            yield
        except errors as error:
            raise OSError(f"{self.url}: {error}") from error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, base = fsspec.core.url_to_fs(url)
    except ImportError as error:
        library = SCHEMES[url.partition(":")[0]]
        package = f"-e '.[{EXTRAS[library]}]'" if library in EXTRAS else library
        where = " in the clone" if library in EXTRAS else ""
        problem = f"{url} cannot be opened: {error}"
        raise UsageError(explain(problem, remedy=f"Install the library{where}: pip install {package}")) from error
    return fs, str(base).rstrip("/")


def _mark(info: Mapping[str, Any]) -> str:
    """Return the members of a listing entry that change when the object changes."""
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "etag", "created", "LastModified", "mtime"))
