"""Frames and face crops of one person in one clip, with occlusions."""

import cv2
import numpy as np

from vaflow.demo.curves import Floats
from vaflow.demo.drawing import Colour, Image, Pen, shade
from vaflow.demo.expression import express
from vaflow.demo.face import FaceArtist, draw_room
from vaflow.demo.person import SHIRTS, random_person
from vaflow.demo.scenario import ClipPlan

CROP_SIZE = 112
CROP_SCALE = 64.0  # half a face width in the crop, in pixels
CROP_CENTRE = 0.08  # centre of the crop, in half face widths below that of the head
EASE = 0.25  # seconds until an occlusion covers the face
NOISE_CELL = 8  # size of a noise square in pixels


class Scene:
    """The frames of one trial.

    Args:
        plan: whose.
        mouth: [C] how open the mouth is, at the voice's control rate.
        width, height: of a frame in pixels.
    """

    def __init__(self, plan: ClipPlan, mouth: Floats, width: int, height: int) -> None:
        self.plan = plan
        person = random_person(plan.key)
        self.expression = express(plan.key, person, plan.mood, mouth, plan.times)
        self.artist = FaceArtist(person, self.expression, draw_room(person, plan.key, width, height))
        self.cover: Colour = SHIRTS[plan.key.rng("cover").integers(len(SHIRTS))]
        covered = np.zeros(len(plan.times))
        for begin, end in plan.occlusions:
            rise = np.minimum(plan.times - begin, end - plan.times) / EASE
            covered = np.maximum(covered, np.clip(rise, 0, 1))
        self.covered = covered * covered * (3 - 2 * covered)  # [N] covered part of the face, 0 to 1

    def frame(self, i: int) -> Image:
        """Frame i, [H, W, 3] BGR."""
        image = self.artist.draw(i)
        if self.covered[i] > 0:
            x, y, _ = self.artist.place(i)
            self._hide(Pen(image, (x, y), self.artist.scale, 0.12), float(self.covered[i]))
        return image

    def crop(self, i: int, frame: Image) -> Image:
        """The aligned face crop of frame i, [112, 112, 3] BGR, with the small error of a landmark detector."""
        x, y, turn = self.artist.place(i)
        slip_x, slip_y, slip_scale = self.expression.slip[i]
        unit = self.artist.scale
        ratio = CROP_SCALE / unit * (1 + slip_scale)
        matrix = cv2.getRotationMatrix2D((x, y), np.degrees(turn), ratio)
        matrix[:, 2] += CROP_SIZE / 2 - np.array([x, y]) + np.array([slip_x, slip_y - CROP_CENTRE]) * CROP_SCALE
        return cv2.warpAffine(
            frame, matrix, (CROP_SIZE, CROP_SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def _hide(self, pen: Pen, progress: float) -> None:
        """Draw a book that covers the face from below."""
        y = 3.6 + (0.1 - 3.6) * progress
        w, h = 1.25, 1.65
        book = np.array([[-w, y - h], [w, y - h], [w, y + h], [-w, y + h]])
        pen.fill(book, self.cover)
        pen.line(book, shade(self.cover, 0.7), 0.05, closed=True)
        pen.line(book[[0, 3]] + (0.2, 0), shade(self.cover, 0.8), 0.05)
        title = np.array([[-0.6, y - 0.9], [0.8, y - 0.9], [0.8, y - 0.5], [-0.6, y - 0.5]])
        pen.fill(title, shade(self.cover, 1.35))


class NoiseScene:
    """Noise frames without information, of the same size and times as those of `plan`."""

    def __init__(self, plan: ClipPlan, width: int, height: int) -> None:
        self.rng = plan.key.rng("noise picture")
        self.width, self.height = width, height

    def frame(self, i: int) -> Image:
        """A frame of random coloured squares."""
        cells = self.rng.integers(0, 256, (-(-self.height // NOISE_CELL), -(-self.width // NOISE_CELL), 3), np.uint8)
        large = cv2.resize(cells, None, fx=NOISE_CELL, fy=NOISE_CELL, interpolation=cv2.INTER_NEAREST)
        return np.ascontiguousarray(large[: self.height, : self.width])

    def crop(self, i: int, frame: Image) -> Image:
        """The centre of the frame."""
        left, top = (self.width - CROP_SIZE) // 2, (self.height - CROP_SIZE) // 2
        return np.ascontiguousarray(frame[max(top, 0) :, max(left, 0) :][:CROP_SIZE, :CROP_SIZE])
