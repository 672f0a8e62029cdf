"""Audio Spectrogram Transformer through transformers: log-Mel of a window -> a sequence of vectors in time.

The last hidden state holds special tokens and frequency x time patch tokens, frequency-major. The special tokens are
dropped, frequency is averaged, and the tokens centred in each step are averaged.

Which stretch of sound each token of an Audio Spectrogram Transformer stands for. Exact, and without torch.

Tokens are patches of the [mel, frame] plane, frequency-major. All numbers come from the model's config.

Checkpoints of the Audio Spectrogram Transformer: a folder as save_pretrained writes it, or a hub's model id.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.base import KALDI, FrontEnd, Stretches
from vaflow.encoders.hub import hub_file
from vaflow.encoders.logmel import FRAME, HOP, MEL_BINS, RATE, frame_count
from vaflow.encoders.weights import BROKEN, check_fit, state_digest
from vaflow.errors import UsageError, WeightsError, explain


@dataclass(frozen=True)
class Geometry:
    """Patches of `patch` x `patch` every `frequency_stride` bins and `time_stride` frames of [mel_bins, max_length]."""

    patch: int
    frequency_stride: int
    time_stride: int
    mel_bins: int
    max_length: int

    @property
    def frequency_tokens(self) -> int:
        """Patches along frequency."""
        return (self.mel_bins - self.patch) // self.frequency_stride + 1

    @property
    def time_tokens(self) -> int:
        """Patches along time."""
        return (self.max_length - self.patch) // self.time_stride + 1

    def _centres(self) -> list[Fraction]:
        """Centre of every time token in seconds: halfway between its first frame's start and its last frame's end."""
        half = Fraction((self.patch - 1) * HOP + FRAME, 2)
        return [(token * self.time_stride * HOP + half) / RATE for token in range(self.time_tokens)]

    def token_times(self) -> NDArray[np.float64]:
        """[time_tokens] seconds after the window's start."""
        return np.array([float(centre) for centre in self._centres()])

    def members(self, window: float, steps: int) -> list[list[int]]:
        """For each step k, the time tokens centred in [k, k + 1) * window / steps.

        Raises:
            UsageError: a step would have no token: more steps than tokens, or a window beyond the model's input.
        """
        step = Fraction(str(window)) / steps
        found: list[list[int]] = [[] for _ in range(steps)]
        for token, centre in enumerate(self._centres()):
            if centre < step * steps:
                found[int(centre / step)].append(token)
        empty = [k for k, tokens in enumerate(found) if not tokens]
        if empty:
            seconds = float(Fraction(self.max_length * HOP, RATE))
            raise UsageError(
                explain(
                    f"Audio step {empty[0]} of {steps} in a window of {window:g} s would have no token of the encoder",
                    expected=f"windows of at most about {seconds:g} s, the encoder's input, and steps of at least "
                    f"{self.time_stride * HOP / RATE:g} s, the distance of its tokens",
                    got=f"{float(step):g} s per step",
                    remedy="Choose fewer --audio-steps or a shorter --window",
                )
            )
        return found

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: the mean centre of each step's tokens."""
        centres = self._centres()
        groups = self.members(window, steps)
        return np.array([float(sum(centres[t] for t in tokens) / len(tokens)) for tokens in groups])

    def pooling(self, window: float, steps: int) -> NDArray[np.float32]:
        """[steps, time_tokens] float32: the matrix that averages each step's tokens."""
        matrix = np.zeros((steps, self.time_tokens), np.float32)
        for step, tokens in enumerate(self.members(window, steps)):
            matrix[step, tokens] = 1 / len(tokens)
        return matrix


def window_frames(window: float) -> int:
    """Whole log-Mel frames in a window of that many seconds (998 for 10 s)."""
    return frame_count(int(Fraction(str(window)) * RATE))


DEFAULT_MODEL = "MIT/ast-finetuned-audioset-10-10-0.4593"
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974  # of AudioSet's log-Mel values, used when a checkpoint says none
MODEL_TYPE = "audio-spectrogram-transformer"
CONFIG, FEATURES = "config.json", "preprocessor_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, and the mean and deviation that its input is normalised with: (x - mean) / (2 std)."""

    module: torch.nn.Module
    mean: float
    std: float


def load_checkpoint(name: str, source: str, *, local: bool) -> Checkpoint:
    """Load the model of encoder `name` from a folder, or (unless `local`) from the hub's model id `source`.

    Raises:
        WeightsError: the folder or the hub has no such model, or its weights do not fit.
        UsageError: the model is of another kind, or reads another kind of log-Mel.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(name, source, local)
    config, features = _read_json(folder / CONFIG), _read_json(folder / FEATURES, optional=True)
    _check_config(folder, config, features)
    module = _load_module(folder)
    if features.get("do_normalize") is False:
        return Checkpoint(module, 0.0, 0.5)  # (x - 0) / (2 * 0.5): the values stay as they are
    return Checkpoint(module, float(features.get("mean", AUDIOSET_MEAN)), float(features.get("std", AUDIOSET_STD)))


def save_checkpoint(module: Any, mean: float, std: float, folder: Path) -> Path:
    """Write a model as `load_checkpoint` reads it. The folder appears whole, in the place of an older one.

    Raises:
        WeightsError: the disk refuses.
    """
    new = folder.with_name(f".{folder.name}.{token_hex(4)}")
    features = {"sampling_rate": RATE, "num_mel_bins": MEL_BINS, "do_normalize": True, "mean": mean, "std": std}
    try:
        with _quiet():
            module.save_pretrained(str(new))
        (new / FEATURES).write_text(json.dumps(features, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    except OSError as error:
        raise WeightsError(explain(f"Cannot write {folder}", got=error.strerror)) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _fetch(name: str, source: str, local: bool) -> Path:
    """The hub cache's folder with the model's files, downloaded if need be."""
    if local or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise WeightsError(
            explain(
                f"There is no folder {source}",
                expected=f"a folder with {CONFIG}, {FEATURES} and {WEIGHT_FILES[0]}, as save_pretrained writes it",
                remedy=f"Download the model id {DEFAULT_MODEL} and pass --weights {name}=FOLDER",
            )
        )
    needs = f"a folder (PATH) with {CONFIG}, {FEATURES} and {WEIGHT_FILES[0]}"
    hub_file(source, (CONFIG,), encoder=name, needs=needs)
    hub_file(source, (FEATURES, CONFIG), encoder=name, needs=needs)  # some checkpoints have no preprocessor's config
    return hub_file(source, WEIGHT_FILES, encoder=name, needs=needs).parent


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            explain(
                f"{path} cannot be read",
                expected="JSON, as save_pretrained writes it",
                got=error,
                remedy="Download the model's folder again",
            )
        ) from error
    if not isinstance(document, dict):
        raise WeightsError(explain(f"{path} holds no settings", expected="a JSON object", got=type(document).__name__))
    return document


def _check_config(folder: Path, config: Mapping[str, Any], features: Mapping[str, Any]) -> None:
    wrong = []
    if config.get("model_type") != MODEL_TYPE:
        wrong.append(f"model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
    if config.get("num_mel_bins", MEL_BINS) != MEL_BINS:
        wrong.append(f"num_mel_bins is {config['num_mel_bins']}, the log-Mel stream has {MEL_BINS}")
    if features.get("sampling_rate", RATE) != RATE:
        wrong.append(f"sampling_rate is {features['sampling_rate']}, the sound is kept at {RATE}")
    if wrong:
        raise UsageError(
            explain(
                f"The model in {folder} cannot be used as an audio encoder: {'; '.join(wrong)}",
                remedy=f"Use an Audio Spectrogram Transformer such as {DEFAULT_MODEL}",
            )
        )


def _load_module(folder: Path) -> torch.nn.Module:
    from safetensors import SafetensorError
    from transformers import ASTModel

    try:
        with _quiet():
            module, info = ASTModel.from_pretrained(
                str(folder),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                attn_implementation="sdpa",
                dtype=torch.float32,
            )
    except (*BROKEN, SafetensorError) as error:
        raise WeightsError(
            explain(
                f"The weights in {folder} do not load",
                expected=f"an Audio Spectrogram Transformer's {' or '.join(WEIGHT_FILES)}",
                got=(str(error).strip() or type(error).__name__).splitlines()[0],
                remedy="Download the model's folder again",
            )
        ) from error
    check_fit(
        str(folder),
        missing=info["missing_keys"],
        # A checkpoint for classification has a head, which this encoder does not use.
        unexpected=[key for key in info["unexpected_keys"] if not key.startswith("classifier.")],
        misshapen=[_name_shapes(key) for key in info["mismatched_keys"]],
    )
    loaded: torch.nn.Module = module
    return loaded


def _name_shapes(mismatch: Any) -> str:
    key, found, expected = mismatch
    return f"{key} {tuple(found)} instead of {tuple(expected)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports keys and progress on standard error; what matters of it becomes an error of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


SPECIAL_TOKENS = 2  # class and distillation


class AstEncoder:
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`."""

    kind: ClassVar[str] = "audio"
    front_end: ClassVar[FrontEnd] = KALDI

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        geometry: Geometry,
        mean: float,
        std: float,
        identity: Mapping[str, Any],
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.geometry = geometry
        self.precision = precision
        self.identity = dict(identity)
        self.mel_bins = geometry.mel_bins
        self.device = torch.device(device)
        self.module: torch.nn.Module = module.eval().to(self.device, torch.float32)
        self.dim = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._mean, self._std = mean, std

    def window_frames(self, window: float) -> int:
        """How many 10-ms log-Mel frames a window of that many seconds has before padding (998 for 10 s)."""
        return window_frames(window)

    def stretches(self, window: float, steps: int) -> Stretches:
        """All frames of the window in one stretch."""
        return Stretches((0,), self.window_frames(window))

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """[steps] seconds after the window's start: the mean centre of the tokens pooled into each step.

        Raises:
            UsageError: a step would get no token.
        """
        return self.geometry.step_times(window, steps)

    def features(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """As `encode`, with gradients.

        Raises:
            ValueError: the log-Mel has another shape, or more frames than the window.
            UsageError: a step would get no token.
        """
        tokens = self._time_tokens(self._padded(logmel, window))
        pooling = torch.from_numpy(self.geometry.pooling(window, steps)).to(self.device)
        return torch.einsum("st,btd->bsd", pooling, tokens)

    @torch.no_grad()
    def encode(self, logmel: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """[B, frames, mel_bins] float32, unnormalised -> [B, steps, dim] float32 on the encoder's device.

        Windows shorter than the model's input are padded with zeros before normalisation, as Hugging Face does; what
        is longer than its input is cut.
        """
        return self.features(logmel, window=window, steps=steps)

    def save(self, folder: Path, stem: str) -> Path:
        """Write the folder `folder/stem`, which `build_encoder(..., weights=...)` takes."""
        return save_checkpoint(self.module, self._mean, self._std, folder / stem)

    def _padded(self, logmel: torch.Tensor, window: float) -> torch.Tensor:
        """[B, frames, mel] -> [B, max_length, mel], normalised, on the device."""
        most = self.window_frames(window)
        if logmel.ndim != 3 or logmel.shape[2] != self.mel_bins or logmel.shape[1] > most:
            raise ValueError(
                f"{self.name}: expected log-Mel [B, at most {most}, {self.mel_bins}] for a window of {window:g} s, "
                f"got {tuple(logmel.shape)}"
            )
        length = self.geometry.max_length
        mel = logmel[:, :length].to(self.device, torch.float32)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, length - mel.shape[1]))
        return (mel - self._mean) / (2 * self._std)

    def _time_tokens(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, max_length, mel] normalised -> [B, time tokens, dim], the mean over frequency."""
        if self.precision == "float32":
            hidden = self.module(mel).last_hidden_state
        else:
            with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
                hidden = self.module(mel).last_hidden_state
        patches = hidden[:, SPECIAL_TOKENS:].to(torch.float32)
        shape = (self.geometry.frequency_tokens, self.geometry.time_tokens)
        return patches.unflatten(1, shape).mean(dim=1)


def build_default(request: Request) -> AstEncoder:
    """The AudioSet model, from the hub or from the folder `request.weights`."""
    return _load(request, DEFAULT_MODEL if request.weights is None else str(request.weights))


def build_named(request: Request) -> AstEncoder:
    """`ast:PATH_OR_HUB_ID`: a folder wins over a model id of the same name, and `request.weights` over either."""
    source = request.name.removeprefix("ast:")
    return _load(request, source if request.weights is None else str(request.weights))


def _load(request: Request, source: str) -> AstEncoder:
    checkpoint = load_checkpoint(request.name, source, local=request.weights is not None)
    return make_encoder(request, checkpoint.module, checkpoint.mean, checkpoint.std)


def make_encoder(request: Request, module: torch.nn.Module, mean: float, std: float) -> AstEncoder:
    """An encoder around a built model."""
    geometry = geometry_of(module)
    identity = _identity(module, geometry, mean, std, request.precision)
    return AstEncoder(request.name, module, geometry, mean, std, identity, request.device, request.precision)


def geometry_of(module: torch.nn.Module) -> Geometry:
    """Where a model's tokens lie: from its config, never from literals."""
    config: Any = module.config
    return Geometry(
        patch=config.patch_size,
        frequency_stride=config.frequency_stride,
        time_stride=config.time_stride,
        mel_bins=config.num_mel_bins,
        max_length=config.max_length,
    )


def _identity(module: torch.nn.Module, geometry: Geometry, mean: float, std: float, precision: str) -> dict[str, Any]:
    import transformers

    config: Any = module.config
    identity: dict[str, Any] = {
        "encoder": "ast",
        "weights": state_digest(module.state_dict()),
        "heads": config.num_attention_heads,
        "activation": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "patch": geometry.patch,
        "strides": [geometry.frequency_stride, geometry.time_stride],
        "input": [geometry.max_length, geometry.mel_bins],
        "mean": mean,
        "std": std,
        "padding": "zeros before normalisation",
        "output": "last hidden state, mean over frequency, mean over the tokens centred in a step",
        "library": f"transformers {transformers.__version__.split('.')[0]}",
    }
    if precision != "float32":
        identity["precision"] = precision
    return identity
