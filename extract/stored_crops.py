"""Reads the crops of one person from a cache instead of a video; part of a decoding process."""

from collections.abc import Callable
from functools import cache

import numpy as np

from vaflow.cache import Cache, open_cache
from vaflow.cache.schema import CROPS, FACES
from vaflow.errors import MediaError, explain
from vaflow.extract.faces import decode_jpeg
from vaflow.extract.messages import Clock, Face, FacesEnd, Job, Message
from vaflow.process import beat


class StoredReader:
    """Sends the crops of a person as messages, as `ClipReader` does for a video.

    Args:
        job: with the person, as `stored`.
        send: takes each message.
    """

    stage = "faces"

    def __init__(self, job: Job, send: Callable[[Message], None]) -> None:
        self._job, self._send = job, send

    def run(self) -> None:
        """Read the crops.

        Raises:
            VaflowError: the cache is damaged, or does not hold the crops.
        """
        job, stored = self._job, self._job.stored
        assert stored is not None
        source = _opened(stored.cache)
        duration = float(source.meta(stored.item)["duration"])
        self._send(Clock(job.number, {}, duration, source.record(stored.stream, stored.item).source))
        frame = source.read(stored.stream, stored.item, ["frame"]).frame
        faces = source.read(FACES, stored.item, ["frame", "person"])
        images = source.read(CROPS, stored.item).images
        count = 0
        for row in np.flatnonzero(faces.person == stored.person).tolist():
            beat()
            if not images[row]:
                raise MediaError(explain(f"{stored.cache} has no crops of person {stored.person} of {stored.item!r}"))
            image = decode_jpeg(images[row])
            prepared = {preparation: preparation(image) for preparation in job.preparations}
            for sample in np.flatnonzero(frame == faces.frame[row]).tolist():
                self._send(Face(job.number, sample, prepared, images[row] if job.keep_jpeg else None))
                count += 1
        self._send(FacesEnd(job.number, frame, stored.facts | {"samples": int(frame.size), "faces": count}))


@cache
def _opened(path: str) -> Cache:
    """One instance per process."""
    return open_cache(path)
