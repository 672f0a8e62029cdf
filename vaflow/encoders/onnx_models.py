"""ONNX graphs as encoders, `onnx:FILE`. Requires `pip install -e '.[onnx]'`.

A graph does not say how its input is prepared. `FILE` with the suffix .toml, beside it, does; see `SidecarImage` and
`SidecarAudio`. Both files are part of the stream's fingerprint. Graphs run on the CPU, in float32.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaflow.encoders.audio_models import ExampleEncoder
from vaflow.encoders.base import WAVEFORM, FrontEnd, Request
from vaflow.encoders.image_models import ImageEncoder
from vaflow.encoders.logmel import HOP, RATE
from vaflow.encoders.preprocessing import KERNELS, LARGEST, Preparation, Preprocessing
from vaflow.errors import UsageError, WeightsError, explain

NUMPY = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
NUMPY |= {"tensor(int32)": np.int32}
DATA = (".data", "_data")  # suffixes of files with a graph's weights
LONGEST_NAME = 255  # bytes, of a file
LOCATION = re.compile(rb"\n\x08location\x12([\x80-\xff]?)([\x00-\x7f])")  # before their names in the graph's file


@dataclass(frozen=True)
class SidecarImage:
    """The sidecar of an image model.

    Attributes:
        input, output: names in the graph; "" is the only or first one.
        size: edge of the square input; `edge` before the centre crop, 0: `size`.
        resize: "shortest", "longest" or "squash"; interpolation: a key of `preprocessing.KERNELS`.
        divide_by, mean, std: pixels 0 to 255 become (x / divide_by - mean) / std.
        order: "RGB" or "BGR"; layout: "NCHW" or "NHWC".
        columns: [first, last + 1] of the output that are features; empty: all.
    """

    kind: str = "visual"
    input: str = ""
    output: str = ""
    size: int = 224
    edge: int = 0
    resize: str = "squash"
    interpolation: str = "bilinear"
    divide_by: float = 255.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    order: str = "RGB"
    layout: str = "NCHW"
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class SidecarAudio:
    """The sidecar of an audio model, which reads one example of `length` samples around every audio step.

    Attributes:
        input, output: names in the graph; "" is the only or first one.
        rate: samples per second: 16000.
        length: samples of an example, a multiple of 160.
        scale: samples in [-1, 1] are multiplied by it.
        front: file name of a graph that turns samples [B, length] into frames, or "".
        front_scale, front_offset: its output becomes x * scale + offset, cut to the frames that the graph reads.
        constants: further inputs by name: a number for all their elements.
        columns: [first, last + 1] of the output that are features; empty: all.
    """

    kind: str = "audio"
    input: str = ""
    output: str = ""
    rate: int = RATE
    length: int = 16_000
    scale: float = 1.0
    front: str = ""
    front_scale: float = 1.0
    front_offset: float = 0.0
    constants: Mapping[str, float] = field(default_factory=dict)
    columns: tuple[int, ...] = ()


S = TypeVar("S", SidecarImage, SidecarAudio)
CHOICES = {"resize": ("shortest", "longest", "squash"), "interpolation": tuple(KERNELS), "order": ("RGB", "BGR")}
CHOICES |= {"layout": ("NCHW", "NHWC")}


def build(request: Request) -> "ImageEncoder | OnnxAudioEncoder":
    """Return the encoder of a graph and its sidecar.

    Raises:
        UsageError: onnxruntime is not installed, a file does not exist, or the sidecar contradicts the graph.
        WeightsError: the file is not an ONNX graph.
    """
    path = request.weights or Path(request.source).expanduser()
    graph = Graph(request.name, path)
    values = _read_sidecar(request, path, graph)
    kind = values.get("kind")
    if kind not in ("visual", "audio") or (request.kind and kind != request.kind):
        remedy = f"Pass it with --{kind}" if kind in ("visual", "audio") else None
        raise UsageError(explain(f'"kind" of {path.with_suffix(".toml")} does not fit', got=kind, remedy=remedy))
    if kind == "visual":
        return _image_encoder(request, graph, _parse(SidecarImage, values, path))
    return OnnxAudioEncoder(request, graph, _parse(SidecarAudio, values, path))


class Graph:
    """A graph in a file.

    Raises:
        UsageError: onnxruntime is not installed, or the file does not exist.
        WeightsError: the file is not an ONNX graph.
    """

    def __init__(self, name: str, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            remedy = "pip install -e '.[onnx]'"
            raise UsageError(explain(f"{name} requires onnxruntime", remedy=remedy)) from error
        if not path.is_file():
            raise UsageError(explain(f"The ONNX file {path} does not exist", remedy="Check the path after onnx:"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _errors() as error:
            got = str(error).splitlines()[0]
            raise WeightsError(explain(f"{path} cannot be loaded as an ONNX graph", got=got)) from error
        self.name, self.path = name, path
        self.library = f"onnxruntime {onnxruntime.__version__.split('.')[0]}"
        self.inputs = {node.name: (list(node.shape), node.type) for node in self._session.get_inputs()}
        self.outputs = {node.name: list(node.shape) for node in self._session.get_outputs()}

    @property
    def parameter_count(self) -> int | None:
        """Number of weights in the graph; None without the package `onnx`, or in ONNX Runtime's own format."""
        try:
            import onnx
            from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        except ImportError:
            return None
        try:
            model = onnx.load(str(self.path), load_external_data=False)
        except DecodeError:
            return None
        return sum(prod(tensor.dims) for tensor in model.graph.initializer)

    @property
    def digest(self) -> str:
        """BLAKE2b of the file, and of the files with its weights."""
        content = self.path.read_bytes()
        digest = hashlib.blake2b(content, digest_size=16)
        usual = [self.path.with_name(self.path.name + suffix) for suffix in DATA]
        named = {self.path.parent / name for name in _weights_files(content)}
        for path in (*usual, *sorted(named - set(usual))):
            if path.is_file():
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def choose(self, name: str, among: Mapping[str, Any], what: str) -> str:
        """Return the named input or output, or the first one for "".

        Raises:
            UsageError: the graph has none of that name.
        """
        if name and name not in among:
            problem = f"The sidecar of {self.path} names an {what} that the graph lacks"
            raise UsageError(explain(problem, got=name, choices=among))
        return name or next(iter(among))

    def run(self, inputs: Mapping[str, NDArray[Any]], output: str) -> NDArray[np.float32]:
        """Return an output; a graph whose batch size is 1 runs once per row.

        Raises:
            UsageError: the graph rejects the shapes.
        """
        (main, values), *constants = inputs.items()
        one = self.inputs[main][0][:1] == [1]
        batches = [values[row : row + 1] for row in range(len(values))] if one else [values]
        try:
            results = [self._session.run([output], {main: batch, **dict(constants)})[0] for batch in batches]
        except _errors() as error:
            got = f"{[*values.shape]}: {str(error).splitlines()[0]}"
            expected = f"{main} {self.inputs[main][0]}"
            raise UsageError(explain(f"{self.path} rejects its input", expected=expected, got=got)) from error
        return np.concatenate(results).astype(np.float32, copy=False)


def _weights_files(content: bytes) -> set[str]:
    """Return the names that a graph's file gives to the files with its weights, relative to its folder."""
    names = set()
    for match in LOCATION.finditer(content):
        high, low = match.groups()  # the name's length, 7 bits per byte, the lowest first
        length = high[0] % 128 + 128 * low[0] if high else low[0]
        name = content[match.end() : match.end() + length].decode(errors="surrogateescape").replace("\0", "?")
        names |= {name} if length <= LONGEST_NAME else set()
    return names


def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of onnxruntime, which have no common class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), state.RuntimeException, RuntimeError, ValueError)


def template(graph: Graph) -> str:
    """Return a sidecar with the names and sizes of a graph, to be completed."""
    name, (shape, _) = next(iter(graph.inputs.items()))
    output = next(iter(graph.outputs))
    comments = [f"# inputs:  {graph.inputs}", f"# outputs: {graph.outputs}"]
    sidecar: SidecarImage | SidecarAudio
    if len(shape) == 4 and 3 in shape:
        layout = "NHWC" if shape[-1] == 3 else "NCHW"
        edge = shape[1] if layout == "NHWC" else shape[2]
        size = edge if isinstance(edge, int) else 224
        sidecar = SidecarImage(input=name, output=output, size=size, layout=layout)
    else:
        length = shape[-1] if isinstance(shape[-1], int) and shape[-1] % HOP == 0 else 16_000
        others = dict.fromkeys(list(graph.inputs)[1:], 0.0)
        sidecar = SidecarAudio(input=name, output=output, length=length, constants=others)
    return "\n".join([*comments, *(f"{key} = {_toml(value)}" for key, value in asdict(sidecar).items())])


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {item}" for key, item in value.items()) + " }"
    if isinstance(value, tuple | list):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _read_sidecar(request: Request, path: Path, graph: Graph) -> dict[str, Any]:
    sidecar = path.with_suffix(".toml")
    if not sidecar.is_file():
        problem = explain(
            f"{request.name} has no sidecar that describes its input",
            expected=str(sidecar),
            remedy="Complete this one and save it there:",
        )
        raise UsageError(f"{problem.rstrip('.')}\n\n{template(graph)}")
    try:
        return tomllib.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(explain(f"{sidecar} cannot be read", expected="TOML", got=error)) from error


def _parse(kind: type[S], values: Mapping[str, Any], path: Path) -> S:
    """Return the sidecar; every key and type is checked."""
    known = {item.name: item for item in fields(kind)}
    default = kind()
    problems = [f"{key} is unknown" for key in values if key not in known]
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            continue
        like = getattr(default, key)
        if isinstance(like, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        numbers = value if isinstance(value, tuple) else value.values() if isinstance(value, Mapping) else ()
        if not isinstance(value, type(like)) and not (isinstance(like, Mapping) and isinstance(value, Mapping)):
            problems.append(f"{key} is {value!r}")
        elif any(not isinstance(number, int | float) for number in numbers):
            problems.append(f"{key} must be numbers")
        elif key in CHOICES and value not in CHOICES[key]:
            problems.append(f"{key} is {value!r}, not one of {', '.join(CHOICES[key])}")
        parsed[key] = value
    if problems:
        problem = f"{path.with_suffix('.toml')} is not a sidecar: {'; '.join(problems)}"
        raise UsageError(explain(problem, choices=list(known)))
    return kind(**parsed)


def _check_shape(graph: Graph, name: str, shape: tuple[int, ...]) -> None:
    """Raise a UsageError unless an input of the graph accepts [batch, *shape]."""
    declared = graph.inputs[name][0]
    fits = len(declared) == len(shape) + 1 and all(
        not isinstance(size, int) or size == want for size, want in zip(declared[1:], shape, strict=True)
    )
    if not fits or (isinstance(declared[0], int) and declared[0] != 1):
        problem = f"The sidecar of {graph.path} contradicts the graph's input {name}"
        got = f"[batch, {', '.join(map(str, shape))}]"
        raise UsageError(explain(problem, expected=f"{declared}, with a batch size of 1 or any", got=got))


def _columns(graph: Graph, columns: tuple[int, ...], dim: int) -> slice:
    if not columns:
        return slice(None)
    whole = all(type(column) is int for column in columns)
    if not whole or len(columns) != 2 or not 0 <= columns[0] < columns[1] <= dim:
        problem = f"The sidecar of {graph.path} names columns that the output lacks"
        raise UsageError(explain(problem, expected=f"columns = [first, last + 1] within 0 to {dim}", got=columns))
    return slice(*columns)


class OnnxNetwork(nn.Module):
    """An image graph as a module: [B, 3, S, S] normalised -> [B, dim]."""

    def __init__(self, graph: Graph, sidecar: SidecarImage) -> None:
        super().__init__()
        self.graph, self.sidecar = graph, sidecar
        self.input = graph.choose(sidecar.input, graph.inputs, "input")
        self.output = graph.choose(sidecar.output, graph.outputs, "output")
        planes = (3, sidecar.size, sidecar.size)
        _check_shape(graph, self.input, planes if sidecar.layout == "NCHW" else (*planes[1:], 3))
        self.columns = slice(None)
        self.columns = _columns(graph, sidecar.columns, int(self(torch.zeros(1, *planes)).shape[1]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, dim] float32."""
        if self.sidecar.order == "BGR":
            pixels = pixels.flip(1)
        if self.sidecar.layout == "NHWC":
            pixels = pixels.permute(0, 2, 3, 1)
        values = self.graph.run({self.input: pixels.cpu().contiguous().numpy()}, self.output)
        return torch.from_numpy(values.reshape(len(pixels), -1)[:, self.columns]).to(pixels.device)


def _identity(graph: Graph, sidecar: SidecarImage | SidecarAudio, **further: Any) -> dict[str, Any]:
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(sidecar).items()}
    return {"encoder": "onnx", "weights": graph.digest, "sidecar": settings, "library": graph.library, **further}


def _image_encoder(request: Request, graph: Graph, sidecar: SidecarImage) -> ImageEncoder:
    if len(sidecar.mean) != 3 or len(sidecar.std) != 3 or not all(sidecar.std) or sidecar.divide_by <= 0:
        raise UsageError(explain(f"The sidecar of {graph.path} requires three values of mean and std, std not 0"))
    if not 0 < sidecar.size <= LARGEST or not 0 <= sidecar.edge <= LARGEST:
        got, expected = f"size = {sidecar.size}, edge = {sidecar.edge}", f"pixels up to {LARGEST}, edge 0 for size"
        raise UsageError(explain(f"The sidecar of {graph.path} is not supported", expected=expected, got=got))
    network = OnnxNetwork(graph, sidecar)
    factor = sidecar.divide_by / 255  # pixels are divided by 255 first
    mean, std = (tuple(value * factor for value in values) for values in (sidecar.mean, sidecar.std))
    preparation = Preparation(sidecar.size, sidecar.interpolation, sidecar.resize, sidecar.edge)
    request = replace(request, precision="float32")
    encoder = ImageEncoder(request, network, Preprocessing(preparation, mean, std), _identity(graph, sidecar))
    encoder.parameter_count = graph.parameter_count
    return encoder


class OnnxAudioEncoder(ExampleEncoder):
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`.

    Raises:
        UsageError: the sidecar contradicts the graph.
    """

    front_end: ClassVar[FrontEnd] = WAVEFORM

    def __init__(self, request: Request, graph: Graph, sidecar: SidecarAudio) -> None:
        if sidecar.rate != RATE or sidecar.length % HOP or sidecar.length <= 0:
            expected = f"rate = {RATE} and length a multiple of {HOP}"
            got = f"rate = {sidecar.rate}, length = {sidecar.length}"
            raise UsageError(explain(f"The sidecar of {graph.path} is not supported", expected=expected, got=got))
        self.name, self.device = request.name, torch.device(request.device)
        self.module: nn.Module = nn.Identity()
        self.parameter_count = graph.parameter_count
        self.example, self.middle = sidecar.length // HOP, Fraction(sidecar.length, 2 * RATE)
        self._graph, self._sidecar = graph, sidecar
        self._front = Graph(request.name, graph.path.with_name(Path(sidecar.front).name)) if sidecar.front else None
        self._input = graph.choose(sidecar.input, graph.inputs, "input")
        self._output = graph.choose(sidecar.output, graph.outputs, "output")
        unknown = [name for name in graph.inputs if name != self._input and name not in sidecar.constants]
        if unknown or any(name not in graph.inputs for name in sidecar.constants):
            problem = f"The sidecar of {graph.path} must name every further input in constants"
            raise UsageError(explain(problem, expected=unknown or list(graph.inputs), got=list(sidecar.constants)))
        if self._front is None:
            _check_shape(graph, self._input, (1,) * (len(graph.inputs[self._input][0]) - 2) + (sidecar.length,))
        self._columns = slice(None)
        blank = np.zeros((1, sidecar.length), np.float32)
        self._columns = _columns(graph, sidecar.columns, self._vectors(blank).shape[1])
        self.dim = self._vectors(blank).shape[1]
        self.identity = _identity(graph, sidecar, **({"front": self._front.digest} if self._front else {}))

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """Waveform rows [B, length / 160, 160], one example each -> [B, 1, dim] float32.

        Raises:
            ValueError: the rows have another shape.
        """
        samples = frames.to(torch.float32).cpu().flatten(1).numpy()
        if samples.shape[1] != self._sidecar.length:
            raise ValueError(f"{self.name}: expected {self._sidecar.length} samples, got {samples.shape[1]}")
        return torch.from_numpy(self._vectors(samples)).to(self.device).unsqueeze(1)

    def _vectors(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[B, length] -> [B, dim]."""
        values = samples * np.float32(self._sidecar.scale)
        declared = self._graph.inputs[self._input][0]
        if self._front is not None:
            first = next(iter(self._front.inputs))
            # One example at a time: a front end may lay a batch's frames end to end.
            rows = [self._front.run({first: row[None]}, next(iter(self._front.outputs))).reshape(-1) for row in values]
            needed = prod(size for size in declared[1:] if isinstance(size, int))
            if rows[0].size < needed:
                problem = f"{self._front.path} gives too few frames for {self._graph.path}"
                remedy = "Increase length in the sidecar"
                raise UsageError(explain(problem, expected=needed, got=rows[0].size, remedy=remedy))
            values = np.stack([row[:needed] for row in rows])
            values = values * np.float32(self._sidecar.front_scale) + np.float32(self._sidecar.front_offset)
            values = values.reshape(len(rows), *declared[1:])
        else:
            values = values.reshape(len(values), *(1,) * (len(declared) - 2), -1)
        inputs: dict[str, NDArray[Any]] = {self._input: values}
        for name, value in self._sidecar.constants.items():
            shape, kind = self._graph.inputs[name]
            sizes = [size if isinstance(size, int) else len(values) for size in shape]
            inputs[name] = np.full(sizes, value, NUMPY.get(kind, np.float32))
        output = self._graph.run(inputs, self._output)
        flat: NDArray[np.float32] = output.reshape(len(samples), -1)[:, self._columns]
        return flat
