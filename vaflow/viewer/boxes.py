"""Face boxes for drawing, detected again: a cache keeps aligned crops, but not where they were in the frame."""

from pathlib import Path

import av
import numpy as np

from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.video import to_rgb
from vaflow.timeline import Floats

STEP = 0.5  # seconds between detections, as in the default sampling of `vaflow extract`


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
