"""dlib's face-recognition ResNet in NumPy: an aligned face -> 128 numbers, without dlib itself.

dlib's wheels run the network with generic code, about 75 ms per face; matrix products of NumPy take a tenth of that,
and the vectors agree to about 1e-6. Only numbers are read from the weights' file.

Source: King, dlib_face_recognition_resnet_model_v1 (github.com/davisking/dlib-models), public domain; layers as in
dlib's examples/dnn_face_recognition_ex.cpp, file format as in dlib's serialize.h and dnn/tensor_tools.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vaflow.errors import WeightsError, explain

Floats = NDArray[np.float32]

SIZE, DIM = 150, 128  # pixels of the input's edge; length of a vector
_MEAN = np.array([122.782, 117.001, 104.298], np.float32)  # of R, G, B
_SCALE = 256.0
_CHANNELS = (32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256)  # of the residual blocks, from the input on
# A layer's tag -> the bytes of settings before its parameters.
_TAGS = {b"\x01\x05con_4": 0, b"\x01\x07affine_": 0, b"\x01\x04fc_2": 5}


class FaceResNet:
    """The network.

    Args:
        path: the file dlib_face_recognition_resnet_model_v1.dat.

    Raises:
        WeightsError: the file does not hold this network.
    """

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
            raise WeightsError(
                explain(f"{path} is not dlib's face-recognition network", got=f"{len(data)} bytes: {error}")
            ) from error

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
