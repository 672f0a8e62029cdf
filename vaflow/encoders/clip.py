"""CLIP image and text towers through open_clip: one projected image embedding per face crop, not normalised.

OpenAI's weights were trained with QuickGELU. In a model with plain GELU the same keys load without complaint and the
features are wrong, so the activation follows from where the weights come from, and is checked on the built model.

Building open_clip models for given weights, and the check that they got the activation they were trained with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders import Request
from vaflow.encoders.context_vectors import ContextTower
from vaflow.encoders.hub import hub_file, url_file
from vaflow.encoders.images import Picture, Preparation
from vaflow.encoders.weights import load_strictly, read_state_dict, state_digest, write_state_dict
from vaflow.errors import UsageError, WeightsError, explain

QUICK, PLAIN = "quick_gelu", "gelu"
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # facts kept beside OpenAI's tensors


def new_model(model_name: str, quick: bool) -> Any:
    """open_clip's model of that name with random weights, its activation as told."""
    import open_clip

    config = open_clip.get_model_config(model_name)
    config["quick_gelu"] = quick
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        model: Any = open_clip.CoCa(**config)
    else:
        model = open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)
    return model


def activation_of(model: torch.nn.Module) -> str:
    """ "quick_gelu", "gelu", both joined by "+", or "other": what the built model really holds."""
    from open_clip.transformer import QuickGELU

    found = {PLAIN for m in model.modules() if isinstance(m, torch.nn.GELU)}
    found |= {QUICK for m in model.modules() if isinstance(m, QuickGELU)}
    return "+".join(sorted(found)) or "other"


def require_quick_gelu(model: torch.nn.Module, what: str) -> None:
    """Raise a WeightsError unless every activation of the model is QuickGELU."""
    found = activation_of(model)
    if found != QUICK:
        raise WeightsError(
            explain(
                f"{what}: OpenAI's weights need QuickGELU, and give wrong features without any error otherwise",
                expected=QUICK,
                got=found,
                remedy="Name the model with -quickgelu at its end, such as clip:ViT-B-16-quickgelu/FILE",
            )
        )


def says_openai(path: Path, state: Mapping[str, torch.Tensor]) -> bool:
    """OpenAI's own key layout, or a file kept under the name of OpenAI's model in the hub's cache or as downloaded."""
    hub_folder = any(part.startswith("models--") and part.endswith(".openai") for part in path.parts)
    return hub_folder or "openai" in path.name.lower() or any(key in state for key in OPENAI_EXTRAS)


def download(name: str, settings: Mapping[str, Any]) -> Path:
    repo, _, filename = str(settings.get("hf_hub", "")).rpartition("/")
    if repo:
        return hub_file(repo, (filename,) if filename else HUB_NAMES, encoder=name)
    return url_file(str(settings["url"]), encoder=name)


def adapted(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What open_clip itself forgives when it loads: older layouts of the same tensors."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    own = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids") or key in own}
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    return state


QUICK_SUFFIX = "-quickgelu"
TEXT_BATCH = 64


@dataclass(frozen=True)
class Preprocessing:
    """From pixels to network input: the geometry, then (x / 255 - mean) / std per channel."""

    preparation: Preparation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def identity(self) -> dict[str, Any]:
        """Plain JSON of every setting."""
        geometry = self.preparation
        return {
            "image_size": geometry.size,
            "interpolation": f"pillow {geometry.interpolation}",
            "resize_mode": geometry.resize_mode,
            "mean": list(self.mean),
            "std": list(self.std),
        }


class ClipEncoder:
    """A visual encoder with a text tower; see `vaflow.encoders.base.VisualEncoder`.

    Attributes:
        preparation: what `prepare` does, as a value that can be sent to another process.
        precision: "float32", or the autocast type on CUDA.
    """

    kind: ClassVar[str] = "visual"

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]],
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.precision = precision
        self.preparation = preprocessing.preparation
        self.image_size = self.preparation.size
        self.identity = dict(identity)
        self.device = torch.device(device)
        self._model: Any = model.eval().to(self.device, torch.float32)
        self.module: torch.nn.Module = self._model.visual
        self._tokenizer = tokenizer
        self._mean = torch.tensor(preprocessing.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=self.device).view(1, 3, 1, 1)
        self.dim = self._probe()

    def _probe(self) -> int:
        with torch.no_grad():
            empty = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return int(self.features(empty).shape[-1])

    def prepare(self, image: Picture) -> Picture:
        """RGB [H, W, 3] uint8 of any size -> [S, S, 3] uint8: open_clip's inference transform before ToTensor."""
        return self.preparation(image)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """As `encode`, with gradients: [B, S, S, 3] uint8 -> [B, dim] float32.

        Raises:
            ValueError: the images have another shape.
        """
        edge = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (edge, edge, 3):
            raise ValueError(f"{self.name}: expected images [B, {edge}, {edge}, 3], got {tuple(images.shape)}")
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        pixels = (pixels - self._mean) / self._std
        if self.precision == "float32":
            return self.module(pixels).to(torch.float32)
        with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
            return self.module(pixels).to(torch.float32)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B, S, S, 3] uint8, prepared, on any device -> [B, dim] float32: projected, not normalised."""
        return self.features(images)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """N texts -> [N, dim] float32, each of length one."""
        tokenize = self._tokenizer()
        rows = [
            self._model.encode_text(tokenize(texts[i : i + TEXT_BATCH]).to(self.device), normalize=True)
            for i in range(0, len(texts), TEXT_BATCH)
        ]
        result: NDArray[np.float32] = torch.cat(rows).to("cpu", torch.float32).numpy()
        return result

    def save(self, folder: Path, stem: str) -> Path:
        """Write both towers as `folder/stem.safetensors`, which `build_encoder(..., weights=...)` takes."""
        return write_state_dict(folder / f"{stem}.safetensors", self._model.state_dict())

    def context_tower(self, texts: Sequence[str], count: int) -> ContextTower:
        """The text tower, to be read with `count` learned vectors before each text; freezes the encoder.

        Raises:
            UsageError: the tower takes no such vectors, or they leave no room for the texts.
        """
        return ContextTower(self._model, self._tokenizer(), texts, count, self.device)


def build_openai(request: Request, model_name: str) -> ClipEncoder:
    """OpenAI's weights in the `-quickgelu` model `model_name`, from the hub or from `request.weights`."""
    return _build(request, model_name, "openai", request.weights)


def build_named(request: Request) -> ClipEncoder:
    """`clip:MODEL/TAG_OR_FILE`: a tag wins over a file of the same name, and `request.weights` over either's weights.

    Raises:
        UsageError: open_clip has no such model, or the rest is neither one of its tags nor a file.
    """
    import open_clip
    from open_clip.pretrained import is_pretrained_cfg, list_pretrained_tags_by_model

    model_name, _, source = request.name.removeprefix("clip:").partition("/")
    if open_clip.get_model_config(model_name) is None:
        close = get_close_matches(model_name, open_clip.list_models(), n=3)
        hint = f"Near to it: {', '.join(close)}" if close else "open_clip.list_models() lists them"
        raise UsageError(explain("open_clip has no such model", got=model_name, remedy=hint))
    if is_pretrained_cfg(model_name, source):
        return _build(request, model_name, source, request.weights)
    file = request.weights or Path(source).expanduser()
    if file.is_file():
        return _build(request, model_name, None, file)
    tags = list_pretrained_tags_by_model(model_name)
    raise UsageError(
        explain(f"{source} is neither a file nor a tag of {model_name}", got=source, choices=tags, expected="a tag")
    )


def _build(request: Request, model_name: str, tag: str | None, file: Path | None) -> ClipEncoder:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    settings = get_pretrained_cfg(model_name, tag) if tag else {}
    quick = bool(settings.get("quick_gelu")) or model_name.endswith(QUICK_SUFFIX)
    path = file if file is not None else download(request.name, settings)
    state = read_state_dict(path)  # first: building a model takes seconds, and a wrong file should be told at once
    model = new_model(model_name, quick)
    state = adapted(state, model)
    if tag == "openai" or says_openai(path, state):
        require_quick_gelu(model, f"{request.name} with weights from {path}")
    load_strictly(model, {k: v for k, v in state.items() if k not in OPENAI_EXTRAS}, str(path))
    canonical = model_name if not quick or model_name.endswith(QUICK_SUFFIX) else model_name + QUICK_SUFFIX
    preprocessing = preprocessing_of(model_name, settings, model)
    identity = make_identity(canonical, model, preprocessing, request.precision)
    return ClipEncoder(
        request.name,
        model,
        lambda: open_clip.get_tokenizer(model_name),
        preprocessing,
        identity,
        request.device,
        request.precision,
    )


def preprocessing_of(model_name: str, settings: Mapping[str, Any], model: Any) -> Preprocessing:
    """Of the tag; for a file, what the model's published weights agree on, else CLIP's own."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.transform import PreprocessCfg

    keys = ("mean", "std", "interpolation", "resize_mode")
    plain = PreprocessCfg()
    known = (
        [settings]
        if settings
        else [get_pretrained_cfg(model_name, t) for t in list_pretrained_tags_by_model(model_name)]
    )
    options = {tuple(tag.get(key, getattr(plain, key)) for key in keys) for tag in known}
    mean, std, interpolation, mode = options.pop() if len(options) == 1 else (getattr(plain, key) for key in keys)
    size = getattr(model.visual, "image_size", plain.size)
    edges = set(size) if isinstance(size, tuple | list) else {size}
    if len(edges) != 1:
        raise UsageError(explain(f"{model_name} reads pictures that are not square", expected="a square", got=size))
    return Preprocessing(Preparation(int(edges.pop()), interpolation, mode), tuple(mean), tuple(std))


def make_identity(model_name: str, model: Any, preprocessing: Preprocessing, precision: str) -> dict[str, Any]:
    """Plain JSON of everything that changes the numbers; the same weights are the same wherever they came from."""
    import open_clip

    identity: dict[str, Any] = {
        "encoder": "clip",
        "model": model_name,
        "weights": state_digest(model.state_dict()),
        "activation": activation_of(model),
        "output": "projected image embedding, not normalised",
        "preprocessing": preprocessing.identity(),
        "library": f"open_clip {open_clip.__version__.split('.')[0]}",
    }
    if precision != "float32":
        identity["precision"] = precision
    return identity
