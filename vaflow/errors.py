"""Errors that vaflow raises, exit codes, and how messages are built.

The command prints the message of a `VaflowError` and exits with its `exit_code`. Messages are one paragraph, made by
`explain`: what was expected, what was got, the choices, the remedy.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

# Exit codes; 0 is success.
FAILED, BAD_USAGE, SOME_FAILED, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143

_BREAKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class VaflowError(Exception):
    """Base class of the errors that vaflow raises."""

    exit_code = FAILED


class UsageError(VaflowError, ValueError):
    """A value named by the user is wrong."""

    exit_code = BAD_USAGE


class DataError(VaflowError, ValueError):
    """One item of a data set cannot be used; other items are unaffected."""


class MediaError(DataError):
    """A media file is unreadable, truncated, or lacks the stream that is needed."""


class CacheError(VaflowError):
    """A cache cannot be read, written or extended."""


class SchemaError(CacheError):
    """The cache has a schema that this version does not read."""

    exit_code = BAD_USAGE


class FingerprintError(CacheError):
    """A stream of this name exists and was made with other settings."""

    exit_code = BAD_USAGE


class MissingError(CacheError, LookupError):
    """No such stream or item in the cache."""


class CorruptError(CacheError):
    """Bytes on disk do not match their record."""


class WeightsError(VaflowError):
    """Encoder weights are missing, unreachable, or do not fit the model."""


def explain(
    problem: str,
    *,
    expected: object = None,
    got: object = None,
    choices: Iterable[str] | None = None,
    remedy: str | None = None,
) -> str:
    """Build a message: the problem, then what was expected and got, the choices, and a remedy.

    If `got` is close to one of `choices`, that one is suggested.
    """
    parts = [_sentence(problem)]
    if expected is not None:
        parts.append(_sentence(f"Expected: {expected}"))
    if isinstance(got, OSError) and got.strerror:  # without its number, and without a path that the problem names
        shown = got.filename is None or str(got.filename) in problem
        got = got.strerror if shown else f"{got.strerror}: {got.filename}"
    if got is not None:
        parts.append(_sentence(f"Got: {got}"))
    if choices is not None:
        names = sorted(choices)
        parts.append(_sentence(f"Choices: {', '.join(names) if names else 'none'}"))
        close = get_close_matches(str(got), names, n=1)
        if close and close[0] != got:
            parts.append(f"Did you mean {close[0]!r}?")
    if remedy is not None:
        parts.append(_sentence(remedy))
    return visible(" ".join(parts))


def similar_names(name: str, known: Collection[str], otherwise: str) -> str:
    """Return the remedy that lists the names closest to an unknown one; `otherwise` if none is close."""
    close = get_close_matches(name, known, n=3)
    return f"Similar names: {', '.join(close)}" if close else otherwise


def _sentence(text: str) -> str:
    """`text` with one full stop: messages of other libraries end in one, and so do `...` and the path `..`."""
    return text if text.endswith(".") else f"{text}."


def command(*words: object) -> str:
    """A command of this package to paste into a shell: `command("cache", "info", path)`; paths may have spaces."""
    return shlex.join(["vaflow", *map(str, words)])


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `count(1, "video")` is "1 video", `count(2000, "video")` is "2,000 videos".

    `plural` is needed where it is not the singular with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def examples(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def visible(text: str) -> str:
    """`text` on one line, safe to print: names come from files and may contain escape sequences for the terminal.

    Line breaks and tabs become spaces. Control characters, marks that change the direction of text, invisible
    characters and undecodable bytes become `\\xNN` or `\\uNNNN`.
    """
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], _BREAKS.sub(" ", text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python's, a GPU's, or torch's on the CPU (which has no class)."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)  # `ulimit -v`
    return isinstance(error, MemoryError) or named or unmapped
