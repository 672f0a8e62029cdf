"""File names of streams, items and attempts. No name, however odd, leads outside the cache directory."""

import json
import re
from hashlib import blake2b
from urllib.parse import unquote

from vaflow.errors import UsageError, explain

_LONGEST = 160  # bytes; leaves room for suffixes below the usual limit of 255
_KEPT_WHEN_SHORTENED = 100
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ODD = re.compile(rb"[^A-Za-z0-9._-]")
_FOLDERS = ("streams", "records")


def escape(name: str) -> str:
    """The file name of a stream or item; different names have different file names.

    Bytes (UTF-8) outside [A-Za-z0-9._-] become %XX; so does a leading dot, and the first character of names that
    end in `.json` or `.jsonl` or are `streams` or `records`, which have another meaning in a cache. A result of more
    than 160 characters is cut to its first 100, followed by `~` and the blake2b-128 digest of the whole name.

    Raises:
        UsageError: the name is empty, or has characters that JSON cannot represent.
    """
    if not name:
        raise UsageError(explain("A stream or item needs a name", expected="at least one character", got=repr(name)))
    raw = name.encode("utf-8", "surrogatepass")
    if _PLAIN.fullmatch(name) is None:
        if not name.isascii() and json.loads(json.dumps(name)) != name:
            raise UsageError(
                explain("A stream or item has a name that JSON cannot hold", expected="proper Unicode", got=ascii(name))
            )
        name = _ODD.sub(lambda match: b"%%%02X" % match[0][0], raw).decode("ascii")
    reserved = name.startswith(".") or name in _FOLDERS or name.endswith((".json", ".jsonl"))
    if reserved and not name.startswith("%"):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _LONGEST:
        head = re.sub(r"%.?$", "", name[:_KEPT_WHEN_SHORTENED])
        return f"{head}~{blake2b(raw, digest_size=16).hexdigest()}"
    return name


def unescape(file_name: str) -> str:
    """The name that `escape` made a file name of; the file name itself if it was shortened or is not escaped."""
    name = unquote(file_name, errors="surrogatepass")
    return name if name and escape(name) == file_name else file_name


def is_attempt(name: str) -> bool:
    """Whether `name` is a plain file name, as attempts have: it contains no path."""
    return _PLAIN.fullmatch(name) is not None
