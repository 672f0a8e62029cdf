"""CPU seconds of telling people apart: python scripts/bench_people.py VIDEO...

For each video: decoding, detection, one followed face, all followed faces, joining them to people. For all together: a
whole extraction with the tiny encoders, once of the largest face and once with everyone told apart.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from vaflow.datasets import Dataset
from vaflow.datasets.clip import Clip
from vaflow.encoders import build_encoder
from vaflow.extract.config import ExtractConfig
from vaflow.extract.container import frame_times
from vaflow.extract.faces.crops import align, encode_jpeg
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.identity import open_network, resolve
from vaflow.extract.faces.people import ClipFaces
from vaflow.extract.faces.tracking import PersonTracker
from vaflow.extract.pipeline import extract_with
from vaflow.extract.video import frames_at
from vaflow.timeline import nearest


def main() -> None:
    """Print the CPU seconds of each step, and what everyone costs beyond following one face."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    videos = [Path(name) for name in sys.argv[1:]]
    network, detector = open_network(resolve("auto")), CenterFace()
    for path in videos:
        times = frame_times(path)
        wanted = np.unique(nearest(times, np.arange(0.0, times[-1] + 1e-9, 0.5)))
        marks = [time.process_time()]
        frames = list(frames_at(path, wanted, times))
        marks.append(time.process_time())
        detections = [detector.detect(image) for _, image in frames]
        marks.append(time.process_time())
        tracker = PersonTracker()
        for (number, image), faces in zip(frames, detections, strict=True):
            face = tracker.update(faces, float(times[number]))
            if face is not None:
                encode_jpeg(align(image, face))
        marks.append(time.process_time())
        with ClipFaces(network) as everyone:
            for (number, image), faces in zip(frames, detections, strict=True):
                everyone.add(number, float(times[number]), image, faces)
            marks.append(time.process_time())
            everyone.people()
        marks.append(time.process_time())
        decode, detect, one, track, join = np.diff(marks).tolist()
        more = (track + join - one) / (decode + detect + one)
        print(f"{path.name}: decode {decode:.2f}, detect {detect:.2f}, one face {one:.2f}, ", end="")
        print(f"all faces {track:.2f}, join {join:.2f} s: {more:+.0%} of reading")
    encoders = build_encoder("clip-tiny"), build_encoder("ast-tiny")
    clips = tuple(Clip(path.stem, None, path.stem, path.absolute(), path.absolute()) for path in videos)
    dataset = Dataset(Path(), "videos", clips)
    seconds: dict[str, list[float]] = {"largest": [], "main": []}
    for _ in range(3):
        for person, taken in seconds.items():
            config = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), person=person, device="cpu", workers=1)
            before = os.times()
            with tempfile.TemporaryDirectory() as folder:
                visual, audio = encoders
                extract_with(dataset, Path(folder), config, [visual], [audio], torch.device("cpu"))  # type: ignore[list-item]
            after = os.times()
            taken.append(sum(after[:4]) - sum(before[:4]))  # user and system, of this process and its children
    one, everyone_seconds = min(seconds["largest"]), min(seconds["main"])
    print(f"extraction: {one:.2f} s of the largest face, {everyone_seconds:.2f} s of everyone: ", end="")
    print(f"{everyone_seconds / one - 1:+.0%}")


if __name__ == "__main__":
    main()
