"""CPU seconds of telling people apart, beside decoding and detection: python scripts/bench_people.py VIDEO..."""

import sys
import time
from pathlib import Path

import cv2
import numpy as np

from vaflow.extract.faces import CenterFace, PersonTracker, align, encode_jpeg
from vaflow.extract.faces.identity import open_network, resolve
from vaflow.extract.faces.people import ClipFaces
from vaflow.extract.video import frame_times, frames_at
from vaflow.timeline import nearest


def main() -> None:
    """Print the CPU seconds of each step, and what everyone costs beyond following one face."""
    cv2.setNumThreads(1)
    network, detector = open_network(resolve("auto")), CenterFace()
    for path in map(Path, sys.argv[1:]):
        times = frame_times(path)
        wanted = np.unique(nearest(times, np.arange(0.0, times[-1] + 1e-9, 0.5)))
        marks = [time.process_time()]
        frames = list(frames_at(path, wanted, times))
        marks.append(time.process_time())
        found = [detector.detect(image) for _, image in frames]
        marks.append(time.process_time())
        tracker = PersonTracker()
        for (number, image), faces in zip(frames, found, strict=True):
            face = tracker.update(faces, float(times[number]))
            if face is not None:
                encode_jpeg(align(image, face))
        marks.append(time.process_time())
        with ClipFaces(network) as everyone:
            for (number, image), faces in zip(frames, found, strict=True):
                everyone.add(number, float(times[number]), image, faces)
            marks.append(time.process_time())
            everyone.people()
        marks.append(time.process_time())
        decode, detect, one, track, join = np.diff(marks).tolist()
        more = (track + join - one) / (decode + detect + one)
        print(f"{path.name}: decode {decode:.2f}, detect {detect:.2f}, one face {one:.2f}, ", end="")
        print(f"all faces {track:.2f}, join {join:.2f} s: {more:+.0%} of reading")


if __name__ == "__main__":
    main()
