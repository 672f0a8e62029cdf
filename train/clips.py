"""Read one clip's labels, features and further targets from a cache, and check them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, Item
from vaflow.errors import DataError, explain
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train.batch import VISUAL, TargetSpec
from vaflow.train.index_tables import NO_AUDIO, NO_FRAMES, AudioTimes, FrameTimes
from vaflow.train.inputs import LOGMEL_INTERVAL, InputStream, interval_of, sampling
from vaflow.train.quality import EVERYTHING, InputMasks
from vaflow.train.targets import ExtraRows, read_rows

LONGEST = 24 * 3600.0  # seconds of a clip whose arrays have fewer than one row per window


@dataclass(frozen=True)
class ClipFeatures:
    """One stream of a clip: embedding rows [T, D] (no rows if the stream lacks the clip) and their times."""

    rows: np.ndarray
    times: FrameTimes | AudioTimes


@dataclass(frozen=True)
class Clip:
    """One clip as cached.

    Attributes:
        item, group: names of the clip and of its source video.
        duration: seconds.
        time: [R] presentation times of the labels; value, valid: [R, 2], NaN and False where not annotated.
        features: stream name -> its rows and times.
        missing: streams that lack the clip.
        extra: name -> its further targets.
    """

    item: str
    group: str
    duration: float
    time: Floats
    value: Floats
    valid: Bools
    features: Mapping[str, ClipFeatures]
    missing: tuple[str, ...]
    extra: Mapping[str, ExtraRows]


def read_clip(
    cache: Cache,
    item: str,
    streams: Sequence[InputStream],
    targets: Sequence[TargetSpec],
    window: float,
    masks: InputMasks = EVERYTHING,
) -> Clip:
    """Read every array of a clip once.

    Args:
        cache: holds the clip.
        item: clip id.
        streams: features to read.
        targets: further targets to read.
        window: seconds of a training window; bounds the duration.
        masks: valid inputs to leave out.

    Raises:
        DataError: valid features hold NaN or infinity, labels are outside [-1, 1], or times are not credible.
        CacheError: an array cannot be read.
        UsageError: the cache does not hold what the masks require.
    """
    labels = cache.read(LABELS, item)
    outside = np.count_nonzero(~(np.abs(labels.value[labels.valid]) <= 1))
    if outside:
        raise DataError(
            explain(
                f"Clip {item!r} has labels outside [-1, 1]",
                expected="valence and arousal within [-1, 1] wherever they are marked valid",
                got=f"{outside} values that are not",
            )
        )
    arrays = {stream.name: cache.read(stream.name, item) for stream in streams if cache.has(stream.name, item)}
    return Clip(
        item=item,
        group=str(labels.meta.get("group") or item),
        duration=_duration([labels, *arrays.values()], window),
        time=labels.time,
        value=np.where(labels.valid, labels.value, np.nan).astype(np.float64),
        valid=labels.valid,
        features={stream.name: _features(cache, stream, arrays.get(stream.name), masks) for stream in streams},
        missing=tuple(stream.name for stream in streams if stream.name not in arrays),
        extra={spec.name: read_rows(cache, spec, item) for spec in targets},
    )


def _duration(arrays: Sequence[Item], window: float) -> float:
    """Return the duration of the labels' record in seconds, limited to one window more than the arrays cover.

    A record can claim any duration, and windows are laid over all of it: unbounded, 3 MB of cache took 8 GB of memory.
    """
    labels = arrays[0]
    times = [np.sort(data.time, axis=None) for data in arrays if data.time.size]
    covered = max((float(time[-1] + median_interval(time)) for time in times), default=0.0)
    claimed = labels.meta.get("duration")
    duration = covered
    if isinstance(claimed, int | float) and np.isfinite(claimed) and claimed >= 0:
        duration = min(float(claimed), covered + window)
    rows = max(map(len, times), default=0)
    if duration > max(LONGEST, rows * window):
        raise DataError(
            explain(
                f"The times of clip {labels.item!r} are not credible",
                expected=f"at most {LONGEST:.0f} s, or a row in every window of {window:g} s",
                got=f"{duration:.0f} s with {rows} rows",
            )
        )
    return duration


def _features(cache: Cache, stream: InputStream, data: Item | None, masks: InputMasks) -> ClipFeatures:
    """Rows and times of one stream; `data` is None if the stream lacks the clip."""
    interval = interval_of(stream.kind, stream.identity)
    if data is None:
        return ClipFeatures(np.zeros((0, stream.dim)), NO_FRAMES if stream.kind == VISUAL else NO_AUDIO)
    rows: np.ndarray = data.embedding.reshape(-1, stream.dim)
    unusable = data.valid.ravel() & ~np.isfinite(rows).all(axis=1)
    if unusable.any():
        first = float(data.time.ravel()[np.flatnonzero(unusable)[0]])
        raise DataError(
            explain(
                f"Clip {data.item!r} has features in stream {stream.name!r} that are NaN or infinite",
                expected="finite numbers wherever the input is valid",
                got=f"{int(unusable.sum())} of {len(rows)} vectors that are not, the first at {first:.2f} s",
                remedy="Make the features of this clip again",
            )
        )
    kept = masks.valid(cache, stream.name, stream.kind, data)
    if stream.kind == VISUAL:
        return ClipFeatures(rows, FrameTimes(data.time, kept, interval))
    if stream.kind != "audio":  # log-Mel: one sequence over the whole clip, frame i for the i-th hop
        hops: Floats = (np.arange(len(data.time), dtype=np.float64) + 0.5) * LOGMEL_INTERVAL
        return ClipFeatures(rows, AudioTimes(np.zeros(1), hops[None], kept[None], None, LOGMEL_INTERVAL))
    interval = interval or median_interval(data.time[:1].ravel())
    start = data.arrays.get("start")
    if start is None:
        return ClipFeatures(rows, AudioTimes(data.time[:, 0], data.time, kept, None, interval))
    window = sampling(stream.identity).get("window")
    return ClipFeatures(rows, AudioTimes(start, data.time, kept, window, interval))
