"""Faces found by the pipeline, on its device, for a decoding process that has no torch: `--detector torch`.

The process shrinks and pads the pictures, as it would for its own detector, and makes faces of the answer. It holds a
few whole frames meanwhile: they are cut once it is known where.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from vaflow.extract.faces.detection import Cells, Face, Image, decode_cells, shrunk

HELD_BYTES = 128 * 2**20  # of whole frames: 6 of 4K, more of 1080p than are asked for at once

Frame = tuple[int, Image]  # its number in the clip, [H, W, 3] RGB
Find = Callable[[Sequence[Image]], Sequence[Cells]]  # pictures of one size, prepared for the network -> of each


def find_faces(frames: Iterable[Frame], find: Find, most: int) -> Iterator[tuple[int, Image, list[Face]]]:
    """Every frame with its faces, in order; up to `most` are asked for at once. On one thread, as `CenterFace`."""
    import cv2

    cv2.setNumThreads(1)
    held: list[tuple[int, Image, Image, float]] = []
    for number, image in frames:
        picture, scale = shrunk(image)
        if held and held[-1][2].shape != picture.shape:
            yield from _found(held, find)
            held = []
        held.append((number, image, picture, scale))
        if len(held) == most or sum(whole.nbytes for _, whole, _, _ in held) >= HELD_BYTES:
            yield from _found(held, find)
            held = []
    if held:
        yield from _found(held, find)


def _found(held: list[tuple[int, Image, Image, float]], find: Find) -> Iterator[tuple[int, Image, list[Face]]]:
    answers = find([picture for _, _, picture, _ in held])
    for (number, image, _, scale), cells in zip(held, answers, strict=True):
        yield number, image, decode_cells(cells, scale)
