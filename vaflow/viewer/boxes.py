"""Face boxes for drawing: those of a cache's stream of faces, or detected again."""

from pathlib import Path

import av
import numpy as np

from vaflow.cache import Cache
from vaflow.cache.schema import FACES
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.video import to_rgb
from vaflow.timeline import Floats

STEP = 0.5  # seconds between detections, as in the default sampling of `vaflow extract`


def stored_boxes(cache: Cache, item: str) -> Floats | None:
    """Return the box of the person whose features a cache holds, as `detect_boxes`; None if it holds no boxes.

    Raises:
        CacheError: an array cannot be read.
    """
    known = cache.streams()
    visual = [name for name, info in known.items() if info.kind in ("visual", "pixels") and cache.has(name, item)]
    if not visual or FACES not in known or not cache.has(FACES, item):
        return None
    made, meta = cache.record(visual[0], item), cache.meta(item)
    person, sides = made.meta.get("person"), [float(meta.get(name) or 0) for name in ("width", "height")]
    if not isinstance(person, int) or "frame" not in made.arrays or not all(sides):
        return None
    samples = cache.read(visual[0], item, ["time", "frame"])
    faces = cache.read(FACES, item, ["frame", "person", "box"])
    box = np.full((len(samples.frame), 4), np.nan)
    mine = np.flatnonzero(faces.person == person)
    if len(mine):
        place = np.minimum(np.searchsorted(faces.frame[mine], samples.frame), len(mine) - 1)
        seen = faces.frame[mine][place] == samples.frame
        box[seen] = faces.box[mine][place][seen]
    return np.column_stack([samples.time, box / (sides * 2)])


def detect_boxes(path: Path, step: float = STEP) -> Floats:
    """Return the box of the person that extraction follows, [T, 5]: seconds, then x0, y0, x1, y1.

    Coordinates are shares of the frame's width and height, NaN where there is no face. Detector and tracker are those
    of `vaflow extract`.

    Raises:
        OSError, av.FFmpegError: the file cannot be opened.
    """
    detector, tracker = CenterFace(), PersonTracker()
    rows: list[tuple[float, ...]] = []
    with av.open(str(path), metadata_errors="replace") as media:
        if not media.streams.video:
            return np.empty((0, 5))
        stream = media.streams.video[0]
        stream.thread_type = "AUTO"
        start = (media.start_time or 0) / av.time_base
        due = -np.inf
        for packet in media.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                if not isinstance(frame, av.VideoFrame) or frame.time is None or frame.time - start < due - 1e-6:
                    continue
                time = frame.time - start
                due = (np.floor(time / step + 1e-6) + 1) * step
                image = to_rgb(frame)
                face = tracker.update(detector.detect(image), time)
                box = np.full(4, np.nan) if face is None else np.asarray(face.box)
                height, width = image.shape[:2]
                rows.append((time, *(box / (width, height, width, height)).tolist()))
    return np.array(rows, np.float64).reshape(-1, 5)
