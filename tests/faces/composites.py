"""Composites of real clips with known people at known times."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np

from vaflow.extract.container import frame_times
from vaflow.extract.faces.detection import CenterFace
from vaflow.extract.faces.identity import open_network
from vaflow.extract.faces.people import ClipFaces, People, Sighting
from vaflow.extract.video import frames_at
from vaflow.timeline import nearest

RATE = 10  # frames per second of a composite
HEIGHT, WIDTH = 240, 320  # of a panel
STEP = 0.5  # seconds between two sampled frames
# Part of each clip that shows one person: x0, y0, x1, y1 in shares of the frame. Nobody: no face.
PARTS = {
    "wolfgang": ("wolfgang.mp4", (0.12, 0.0, 0.88, 1.0)),
    "obama": ("obama.mp4", (0.5, 0.1, 1.0, 0.6)),
    "carphone": ("carphone.mp4", (0.0, 0.0, 1.0, 1.0)),
    "single": ("single_face.mp4", (0.1, 0.0, 0.9, 1.0)),
    "nobody": ("no_face.mp4", (0.0, 0.0, 1.0, 1.0)),
}

Image = np.ndarray
Region = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
Drawn = tuple[Image, list[tuple[str, Region]]]  # a frame, and who is where in it


@cache
def panels(folder: Path, name: str) -> list[Image]:
    """The frames of one person at `RATE`, [HEIGHT, WIDTH, 3] each."""
    file, (x0, y0, x1, y1) = PARTS[name]
    times = frame_times(folder / file)
    requested = np.unique(nearest(times, np.arange(0, times[-1], 1 / RATE)))
    made = []
    for _, image in frames_at(folder / file, requested, times):
        height, width = image.shape[:2]
        part = image[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)]
        made.append(np.asarray(cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)))
    return made


def panel(folder: Path, name: str, time: float) -> Image:
    """The person at a time; the clip runs forward and backward without end."""
    frames = panels(folder, name)
    at = round(time * RATE) % (2 * len(frames))
    return frames[at] if at < len(frames) else frames[2 * len(frames) - 1 - at]


def in_a_row(folder: Path, *names: str) -> Callable[[float], Drawn]:
    """People side by side."""

    def draw(time: float) -> Drawn:
        image = np.concatenate([panel(folder, name, time) for name in names], axis=1)
        return image, [(name, (k * WIDTH, 0, (k + 1) * WIDTH, HEIGHT)) for k, name in enumerate(names)]

    return draw


def one_after_another(folder: Path, *shots: tuple[str, float]) -> Callable[[float], Drawn]:
    """Cuts: each person for so many seconds."""

    def draw(time: float) -> Drawn:
        left = time
        shown = shots[-1][0]
        for name, seconds in shots:
            if left < seconds:
                shown = name
                break
            left -= seconds
        return panel(folder, shown, time), [(shown, (0, 0, WIDTH, HEIGHT))]

    return draw


def inset(folder: Path, large: str, small: str) -> Callable[[float], Drawn]:
    """Picture-in-picture: the small clip at a third of the size, in the upper right corner."""

    def draw(time: float) -> Drawn:
        image = np.asarray(cv2.resize(panel(folder, large, time), (3 * WIDTH // 2, 3 * HEIGHT // 2)))
        width, height = image.shape[1] // 3, image.shape[0] // 3
        image[:height, -width:] = cv2.resize(panel(folder, small, time), (width, height))
        corner = (image.shape[1] - width, 0, image.shape[1], height)
        return image, [(small, corner), (large, (0, 0, image.shape[1], image.shape[0]))]

    return draw


def wipe(folder: Path, first: str, second: str, start: float, end: float) -> Callable[[float], Drawn]:
    """A wipe: the second clip pushes the first out to the left."""

    def draw(time: float) -> Drawn:
        edge = round(WIDTH * (1 - np.clip((time - start) / (end - start), 0, 1)))
        both = np.concatenate([panel(folder, first, time), panel(folder, second, time)], axis=1)
        image = both[:, WIDTH - edge : 2 * WIDTH - edge]
        where = [(first, (edge - WIDTH, 0, edge, HEIGHT)), (second, (edge, 0, edge + WIDTH, HEIGHT))]
        return image, [(name, box) for name, box in where if box[2] > 0 and box[0] < WIDTH]

    return draw


def mirrored(draw: Callable[[float], Drawn]) -> Callable[[float], Drawn]:
    """Left and right exchanged."""

    def mirror(time: float) -> Drawn:
        image, who = draw(time)
        width = image.shape[1]
        return np.ascontiguousarray(image[:, ::-1]), [(n, (width - c, b, width - a, d)) for n, (a, b, c, d) in who]

    return mirror


def write(path: Path, draw: Callable[[float], Drawn], seconds: float, *, turned: bool = False) -> Path:
    """Write a composite; `turned`: stored on its side, with the display matrix that turns it back."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18", "preset": "veryfast"})
        stream.time_base = Fraction(1, RATE)
        if turned:
            stream.set_display_rotation(90)
        for number in range(round(seconds * RATE)):
            image = draw(number / RATE)[0]
            image = np.ascontiguousarray(np.rot90(image, -1)) if turned else image
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = number
            if number == 0:
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, source: Path, seconds: float) -> Path:
    """Write the first seconds of a video, without encoding it again."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.pts is not None and packet.pts * packet.time_base < seconds:
                packet.stream = streams[packet.stream.index]
                container.mux(packet)
    return path


def people_of(path: Path, network: str) -> People:
    """Yield the people of a video; their crops can be read inside the context."""
    times = frame_times(path)
    requested = np.unique(nearest(times, np.arange(0.0, times[-1] + 1e-9, STEP)))
    detector = CenterFace()
    with ClipFaces(open_network(network)) as faces:
        for number, image in frames_at(path, requested, times):
            faces.add(number, float(times[number]), image, detector.detect(image))
        return faces.people()


@dataclass(frozen=True)
class Counts:
    """Result of people detection on a composite.

    Attributes:
        people: number found; expected: number shown.
        switches: changes of the true person within one found person.
        right, total: seconds given to the right person, and seconds of all faces.
        missed: seconds of people in whose panel no face was found.
    """

    people: int
    expected: int
    switches: int
    right: float
    total: float
    missed: float


def count(people: People, draw: Callable[[float], Drawn], seconds: float) -> Counts:
    """Compare people with the known composition."""
    named = [[(s.frame, _name(draw, s)) for s in person] for person in people.sightings]
    switches = sum(a[1] != b[1] for person in named for a, b in pairwise(person))
    owners = [Counter(name for _, name in person).most_common(1)[0][0] for person in named]
    # Of several found people who are one true person, only the one seen longest counts as right.
    best = {owners[k]: k for k in sorted(range(len(named)), key=lambda k: len(named[k]))}
    right = sum(name == owner for owner, k in best.items() for _, name in named[k])
    seen = {(round(s.time / STEP), name) for p in people.sightings for s in p for name in [_name(draw, s)]}
    times = np.arange(0.0, seconds - 1 / RATE, STEP)
    shown = {(round(t / STEP), name) for t in times for name in _in_view(*draw(float(t))) if name != "nobody"}
    names = {name for _, name in shown}
    total = sum(map(len, named))
    return Counts(len(named), len(names), switches, right * STEP, total * STEP, len(shown - seen) * STEP)


def _in_view(image: Image, who: list[tuple[str, Region]]) -> list[str]:
    """People of whose panel the middle half is inside the frame."""
    return [n for n, (x0, _, x1, _) in who if x0 + (x1 - x0) / 4 >= 0 and x1 - (x1 - x0) / 4 <= image.shape[1]]


def _name(draw: Callable[[float], Drawn], sighting: Sighting) -> str:
    """The person whose panel covers the middle of a face."""
    x, y = sighting.face.centre
    for name, (x0, y0, x1, y1) in draw(sighting.time)[1]:
        if x0 <= x < x1 and y0 <= y < y1:
            return name
    return "nobody"
