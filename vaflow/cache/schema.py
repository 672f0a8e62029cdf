"""Types, constants and file names of the cache format, as specified in `cache_schema.md`. No I/O.

A cache is a folder of named *streams*; a stream holds arrays for *items* (clips, or prompt sets); an item of a stream
is committed by a *record*. Validators return every problem as text; the caller raises one error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal, Protocol
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import UsageError, explain

SCHEMA_VERSION = 1
FORMAT = "vaflow-cache"
STORES = ("zarr", "hdf5")  # that can be written item by item

Kind = Literal["visual", "audio", "logmel", "pixels", "faces", "crops", "labels", "targets", "text"]
StoreName = Literal["zarr", "hdf5", "packed"]
Array = NDArray[Any]
Json = dict[str, Any]
Blob = NDArray[np.uint8]  # bytes of one file; writable, so that arrays made of them are writable

LABELS = "labels"  # the stream that every clip has: its frame clock, split, group and annotation
LOGMEL = "logmel"
PIXELS = "pixels"
FACES = "faces"
CROPS = "crops"
PACKED: StoreName = "packed"  # read-only: the rows of all clips in a few large arrays

FLOAT = ("float16", "float32")

_PART = 2**20  # bytes


class Rows(Protocol):
    """The part of the array interface that checks and stores use: NumPy arrays and `scratch.LongArray` have it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Array: ...


@dataclass(frozen=True)
class ArraySpec:
    """One array of a stream kind: the names of its axes (equal names have equal lengths) and its allowed dtypes."""

    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    required: bool = True


# fmt: off
KINDS: Mapping[str, Mapping[str, ArraySpec]] = {
    # one embedding per grid sample of the clip
    "visual": {
        "embedding": ArraySpec(("sample", "dim"), FLOAT),
        "time":      ArraySpec(("sample",), ("float64",)),         # seconds: the grid instant
        "valid":     ArraySpec(("sample",), ("bool",)),            # a face was detected
        "frame":     ArraySpec(("sample",), ("int64",), False),    # 0-based number of the video frame used
    },
    # a sequence of embeddings per window of the clip
    "audio": {
        "embedding": ArraySpec(("window", "step", "dim"), FLOAT),
        "time":      ArraySpec(("window", "step"), ("float64",)),  # seconds: mean centre of the step's tokens
        "valid":     ArraySpec(("window", "step"), ("bool",)),     # the step has audio samples
        "start":     ArraySpec(("window",), ("float64",)),         # seconds: where the window begins
    },
    # Kaldi filter banks of the whole clip, unnormalised, frame i covering [0.01 i, 0.01 i + 0.025) s
    "logmel": {
        "embedding": ArraySpec(("frame", "mel"), FLOAT),
        "time":      ArraySpec(("frame",), ("float64",)),          # seconds: the frame's centre
        "valid":     ArraySpec(("frame",), ("bool",)),             # all its samples came from the file
        "speech":    ArraySpec(("frame",), ("bool",), False),      # there is speech where the frame begins
    },
    # the face crop of every visual sample, as JPEG files laid end to end
    "pixels": {
        "data":      ArraySpec(("byte",), ("uint8",)),
        "offset":    ArraySpec(("sample+1",), ("int64",)),  # image i: data[offset[i]:offset[i + 1]], empty if invalid
        "time":      ArraySpec(("sample",), ("float64",)),
        "valid":     ArraySpec(("sample",), ("bool",)),
        "frame":     ArraySpec(("sample",), ("int64",), False),
    },
    # every face found in the sampled frames, in order of time, and the shot boundaries between them
    "faces": {
        "time":      ArraySpec(("face",), ("float64",)),           # seconds: presentation time of the frame
        "frame":     ArraySpec(("face",), ("int64",)),             # 0-based number of the video frame
        "box":       ArraySpec(("face", "edge"), ("float32",)),    # x0, y0, x1, y1 in pixels of the frame
        "landmarks": ArraySpec(("face", "point", "axis"), ("float32",)),  # x, y of eyes, nose tip, mouth corners
        "score":     ArraySpec(("face",), ("float32",)),           # of the detector, 0 to 1
        "size":      ArraySpec(("face",), ("float32",)),           # pixels: edge of a square as large as the box
        "sharpness": ArraySpec(("face",), ("float32",)),           # gray levels
        "yaw":       ArraySpec(("face",), ("float32",)),           # degrees; positive: to the viewer's right
        "mouth":     ArraySpec(("face",), ("float32",)),           # gray levels: motion of the mouth
        "track":     ArraySpec(("face",), ("int64",)),             # number of the track, from 0
        "person":    ArraySpec(("face",), ("int64",)),             # number of the person, from 1
        "cut":       ArraySpec(("cut",), ("float64",)),            # seconds: first sampled frame after a cut
    },
    # the crop of every face of the item's `faces`, as JPEG files laid end to end; none are stored for one person
    "crops": {
        "data":      ArraySpec(("byte",), ("uint8",)),
        "offset":    ArraySpec(("face+1",), ("int64",)),    # image i: data[offset[i]:offset[i + 1]]
    },
    # the frame clock and its annotation: one row per video frame or annotation row, whichever is more
    "labels": {
        "time":      ArraySpec(("row",), ("float64",)),            # seconds: presentation time
        "value":     ArraySpec(("row", "target"), ("float32",)),   # valence, arousal; NaN where not annotated
        "valid":     ArraySpec(("row", "target"), ("bool",)),
    },
    # further annotation, as expression classes or action units; identity: "task" ("classes" or "binary") and "names"
    "targets": {
        "time":  ArraySpec(("row",), ("float64",)),                # seconds: presentation time
        "value": ArraySpec(("row", "name"), ("float32",)),         # share of each class, or 1 if a unit is active
        "valid": ArraySpec(("row", "name"), ("bool",)),
    },
    # prompt prototypes; items are prompt sets, not clips
    "text": {
        "embedding": ArraySpec(("region", "dim"), ("float32",)),   # mean of the normalised template embeddings
        "template":  ArraySpec(("template", "region", "dim"), ("float32",)),  # each of them, normalised
    },
}
# fmt: on


DTYPES = frozenset(dtype for specs in KINDS.values() for spec in specs.values() for dtype in spec.dtypes)


@dataclass(frozen=True)
class StreamInfo:
    """Settings of a stream. Items made with different settings never share a stream.

    Attributes:
        name: as used on the command line and on disk, e.g. "clip-vit-b16".
        kind: a key of `KINDS`.
        dim: the last axis of `embedding` (0 for pixels, faces, crops, labels and targets).
        dtype: of `embedding` ("uint8" for pixels and crops, "float32" for faces, labels and targets).
        identity: plain JSON of every setting that changes the values: encoder, weights digest, preprocessing, sampling,
            output layer, decoder backend and version. The fingerprint is a digest of it.
    """

    name: str
    kind: Kind
    dim: int
    dtype: str
    identity: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The completion record of one item of one stream: `records/<stream>/<item>.json`.

    Attributes:
        arrays: name -> {"shape": [...], "dtype": "..."}.
        files: path below `<stream>/<item>/` -> {"size": bytes, "crc32c": unsigned}; every file of the attempt.
        source: identity of the source files; a changed source is re-extracted.
        meta: facts about the item (split, group, duration, audio status, face share ...). Not needed to read arrays.
    """

    stream: str
    item: str
    attempt: str
    arrays: Mapping[str, Json]
    files: Mapping[str, Json]
    source: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    created: str = ""
    schema_version: int = SCHEMA_VERSION
    fingerprint: str = ""  # of the stream when it was made


_LONGEST = 160  # bytes; leaves room for suffixes below the usual limit of 255 bytes
_KEPT_WHEN_SHORTENED = 100
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_ODD = re.compile(rb"[^A-Za-z0-9._-]")
_FOLDERS = ("streams", "records")


def escape(name: str) -> str:
    """Return the file name of a stream or item; different names have different file names.

    Bytes (UTF-8) outside [A-Za-z0-9._-] become %XX; so does a leading dot, and the first character of names that
    end in `.json` or `.jsonl` or are `streams` or `records`, which are reserved in a cache. A result of more
    than 160 characters is cut to its first 100, followed by `~` and the blake2b-128 digest of the whole name.

    Raises:
        UsageError: the name is empty, or has characters that JSON cannot represent.
    """
    if not name:
        raise UsageError(explain("A stream or item needs a name", expected="at least one character", got=repr(name)))
    raw = name.encode("utf-8", "surrogatepass")
    if _PLAIN.fullmatch(name) is None:
        if not name.isascii() and json.loads(json.dumps(name)) != name:
            problem = "A stream or item has a name that JSON cannot hold"
            raise UsageError(explain(problem, expected="proper Unicode", got=ascii(name)))
        name = _ODD.sub(lambda match: b"%%%02X" % match[0][0], raw).decode("ascii")
    reserved = name.startswith(".") or name in _FOLDERS or name.endswith((".json", ".jsonl"))
    if reserved and not name.startswith("%"):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _LONGEST:
        head = re.sub(r"%.?$", "", name[:_KEPT_WHEN_SHORTENED])
        return f"{head}~{blake2b(raw, digest_size=16).hexdigest()}"
    return name


def unescape(file_name: str) -> str:
    """Invert `escape`; returns the file name itself if it was shortened or is not escaped."""
    name = unquote(file_name, errors="surrogatepass")
    return name if name and escape(name) == file_name else file_name


def is_attempt(name: str) -> bool:
    """Return whether `name` can name an attempt: a plain file name without a path."""
    return _PLAIN.fullmatch(name) is not None


def parts(array: Rows) -> Iterator[slice]:
    """Yield slices that cover the array in order, each of at least one row and of at most 1 MiB if possible."""
    step = max(1, _PART * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


def stored_layers(info: StreamInfo) -> int:
    """Return the number of encoder layers stored per sample; 0 if the stream has no layer axis."""
    layers = info.identity.get("layers") if info.kind in ("visual", "audio") else None
    return len(layers) if isinstance(layers, list) else 0


def array_problems(info: StreamInfo, arrays: Mapping[str, Rows]) -> list[str]:
    """Return every reason why `arrays` are not a valid item of the stream `info`; empty if they are."""
    specs = dict(KINDS[info.kind])
    layers = stored_layers(info)
    if layers:  # one vector per layer of the encoder: an axis before the last
        spec = specs["embedding"]
        specs["embedding"] = replace(spec, axes=(*spec.axes[:-1], "layer", spec.axes[-1]))
    problems = [f"array {name!r} is missing" for name, spec in specs.items() if spec.required and name not in arrays]
    problems += [f"array {name!r} is not part of a {info.kind} stream" for name in arrays if name not in specs]
    lengths = {"layer": layers} if layers else {}
    for name in specs:
        if name in arrays:
            problems += _one_array_problems(name, specs[name], arrays[name], lengths)
    embedding = arrays.get("embedding")
    if embedding is not None and embedding.ndim and embedding.shape[-1] != info.dim:
        problems.append(f"embedding has {embedding.shape[-1]} dimensions, the stream says {info.dim}")
    if embedding is not None and str(embedding.dtype) != info.dtype:
        problems.append(f"embedding is {embedding.dtype}, the stream says {info.dtype}")
    return problems or _value_problems(info, arrays)


def _one_array_problems(name: str, spec: ArraySpec, array: Rows, lengths: dict[str, int]) -> list[str]:
    problems = []
    if str(array.dtype) not in spec.dtypes:
        problems.append(f"{name} is {array.dtype}, not {' or '.join(spec.dtypes)}")
    if array.ndim != len(spec.axes):
        return [*problems, f"{name} has shape {array.shape}, not [{', '.join(spec.axes)}]"]
    for axis, length in zip(spec.axes, array.shape, strict=True):
        base, plus_one = axis.removesuffix("+1"), axis.endswith("+1")
        known = lengths.setdefault(base, length - plus_one)
        if length - plus_one != known:
            problems.append(f"{name} has {length} along {axis!r}, other arrays have {known + plus_one}")
    return problems


def _value_problems(info: StreamInfo, arrays: Mapping[str, Any]) -> list[str]:
    problems = []
    time = arrays.get("time")
    if time is not None and not np.isfinite(time).all():
        problems.append("time holds values that are not finite")
    elif time is not None and time.ndim == 1 and (np.diff(time) < 0).any():
        problems.append("time does not ascend")
    embedding = arrays.get("embedding")
    if embedding is not None and not all(np.isfinite(embedding[rows]).all() for rows in parts(embedding)):
        problems.append("embedding holds NaN or infinity")
    if info.kind == "labels":
        value, valid = arrays["value"], arrays["valid"]
        if not (np.abs(value[valid]) <= 1).all():  # NaN fails this comparison too
            problems.append("labels marked valid are not all within [-1, 1]")
    if info.kind == "targets":
        known = arrays["value"][arrays["valid"]]
        if not ((known >= 0) & (known <= 1)).all():
            problems.append("targets marked valid are not all within [0, 1]")
    if info.kind in ("pixels", "crops"):
        offset = arrays["offset"]
        if offset.size and (offset[0] != 0 or offset[-1] != arrays["data"].size or (np.diff(offset) < 0).any()):
            problems.append(f"{info.kind} offsets do not run from 0 to the size of the data")
    return problems


@dataclass(frozen=True)
class Item:
    """The arrays of one item of one stream; each is also an attribute: `item.embedding`, `item.time`, `item.valid`.

    Attributes:
        stream: name of the stream; item: id of the item.
        arrays: name -> array, as the stream's kind in `KINDS` says.
        meta: facts about the item, from its record.
    """

    stream: str
    item: str
    arrays: Mapping[str, Array]
    meta: Json

    def __getattr__(self, name: str) -> Array:
        arrays: Mapping[str, Array] = self.__dict__.get("arrays", {})  # not yet set while a copy is being made
        if name in arrays:
            return arrays[name]
        raise AttributeError(f"array {name!r} of {self.__dict__.get('item')!r} is not loaded; loaded: {sorted(arrays)}")

    @property
    def images(self) -> list[bytes]:
        """Pixels and crops: one JPEG file per sample or face, empty where there is none."""
        data = self.data
        return [data[start:end].tobytes() for start, end in pairwise(self.offset.tolist())]
