"""Cost of encoding the streams of a cache: `costs*.jsonl`, a line per extraction run and encoder.

The files are optional and beside the format: no fingerprint, record or checksum covers them. Each shard appends to a
file of its own; copies and joins of caches collect the lines of their sources.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from vaflow.cache.cache import Cache
from vaflow.files import append_line, read_document, replace_file

LISTS = "costs*.jsonl"
CARRIED = "costs-carried.jsonl"  # lines of other caches


@dataclass(frozen=True)
class Cost:
    """Cost of encoding a stream.

    Attributes:
        device: name of the device; precision: of the network.
        parameters: of the network; None where they cannot be counted.
        seconds: of encoding, without the share of padding rows.
        media_seconds: duration of the clips that were encoded.
    """

    device: str
    precision: str
    parameters: int | None
    seconds: float
    media_seconds: float

    @property
    def seconds_per_minute(self) -> float:
        """Seconds of encoding per minute of video; NaN without video."""
        return 60 * self.seconds / self.media_seconds if self.media_seconds else math.nan

    def __add__(self, other: "Cost") -> "Cost":
        seconds, media_seconds = self.seconds + other.seconds, self.media_seconds + other.media_seconds
        return replace(self, seconds=seconds, media_seconds=media_seconds)


def append_costs(cache: Cache, costs: Mapping[str, Cost], suffix: str = "") -> None:
    """Append a line per stream to `costs{suffix}.jsonl`; streams without an encoded clip are left out.

    Raises:
        CacheError: the disk refuses.
    """
    run = token_hex(8)  # tells equal lines of two runs apart
    try:
        for stream, cost in costs.items():
            if cost.media_seconds:
                line = {"run": run, "stream": stream, "fingerprint": cache.fingerprint(stream), **asdict(cost)}
                append_line(cache.path / f"costs{suffix}.jsonl", json.dumps(line))
    except OSError as error:
        raise cache.layout.cannot_write(error) from error


def stream_costs(cache: Cache) -> dict[str, Cost]:
    """Return stream -> the sum of its runs on the device and in the precision that encoded most of it.

    Lines of other settings than the stream's, and damaged ones, are skipped.
    """
    sums: dict[str, dict[tuple[str, str], Cost]] = defaultdict(dict)
    streams = cache.streams()
    for line in _lines(cache.path):
        stream = line.get("stream")
        if stream not in streams or line.get("fingerprint") != cache.fingerprint(stream):
            continue
        cost = _parse(line)
        if cost is not None:
            key = cost.device, cost.precision
            sums[stream][key] = sums[stream][key] + cost if key in sums[stream] else cost
    return {stream: max(costs.values(), key=lambda cost: cost.media_seconds) for stream, costs in sums.items()}


def carry_costs(target: Cache, sources: Iterable[Cache]) -> None:
    """Add the lines of other caches to `costs-carried.jsonl`, each once. Raises OSError."""
    known = {json.dumps(line, sort_keys=True) for line in _lines(target.path)}
    texts = (json.dumps(line, sort_keys=True) for cache in sources for line in _lines(cache.path))
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        path = target.path / CARRIED
        before = path.read_bytes() if path.is_file() else b""
        replace_file(path, before + "".join(f"{text}\n" for text in new).encode())


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob(LISTS)):
        try:
            texts = read_document(folder, path).splitlines()
        except (OSError, ValueError):  # such as a symlink; not worth an error
            continue
        for text in texts:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line


def _parse(line: Mapping[str, Any]) -> Cost | None:
    try:
        parameters = None if line["parameters"] is None else int(line["parameters"])
        seconds, media = float(line["seconds"]), float(line["media_seconds"])
        cost = Cost(str(line["device"]), str(line["precision"]), parameters, seconds, media)
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return cost if math.isfinite(seconds) and seconds >= 0 and 0 < media < math.inf else None
