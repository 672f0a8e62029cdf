"""CLIP image and text towers through open_clip: one projected image embedding per face crop, not normalised.

OpenAI's weights were trained with QuickGELU. In a model with plain GELU the same keys load without an error and the
features are wrong, so the activation follows from the origin of the weights and is checked on the built model.

Names come from run folders and caches, too. open_clip accepts `local-dir:` and `hf-hub:` in place of a model's name and
then follows a configuration file, which can name remote code. Only names in open_clip's own list are accepted here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.base import LayerChoice, Request, split_layers
from vaflow.encoders.image_models import ImageEncoder, blocks_of, encode_blocks
from vaflow.encoders.preprocessing import Preparation, Preprocessing
from vaflow.encoders.weights import (
    hub_file,
    hub_folder,
    load_strictly,
    read_state_dict,
    state_digest,
    url_file,
    without_initial_weights,
)
from vaflow.errors import UsageError, WeightsError, explain, similar_names
from vaflow.files import write_tensors

QUICK, PLAIN = "quick_gelu", "gelu"
QUICK_SUFFIX = "-quickgelu"
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # metadata beside OpenAI's tensors
TEXT_BATCH = 64
PLACEHOLDER = "x"  # one token of CLIP's vocabulary, whose embedding a context vector replaces
# Files of a transformers tokenizer: the vocabulary (preferred format first), then further files, all optional.
VOCABULARIES = ("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "vocab.txt", "vocab.json")
TOKENIZER_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


class ContextTower:
    """Learned context vectors before the words of a frozen text tower, shared by all texts.

    [count, width] vectors -> [N, D] text embeddings of length one, with gradients to the vectors only. It is no module:
    the tower is neither trained nor saved. Source: Zhou et al. 2022 (CoOp, arXiv 2109.01134).

    Args:
        tokenizer: texts -> [N, L] tokens.
        texts: N descriptions.
        count: vectors between the start token and the words.

    Attributes:
        width: of a vector.

    Raises:
        UsageError: the tower has no token embedding that vectors can replace, or the context is too long.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], torch.Tensor],
        texts: Sequence[str],
        count: int,
        device: torch.device,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        embedding = getattr(getattr(model, "text", model), "token_embedding", None)
        if not isinstance(embedding, torch.nn.Embedding):
            raise UsageError(explain("This text tower does not support context vectors", expected="a CLIP encoder"))
        tokens = tokenizer([f"{PLACEHOLDER} " * count + text for text in texts])
        slots = tokens[:, 1 : 1 + count]
        longest = int((tokens != 0).sum(dim=1).max())
        if count < 1 or slots.shape[1] < count or not (slots == slots[0, 0]).all() or longest >= tokens.shape[1]:
            problem = "The context vectors and the descriptions do not fit into the text tower"
            expected = f"fewer than {tokens.shape[1]} tokens together"
            raise UsageError(explain(problem, expected=expected, got=f"{count} vectors"))
        self._embedding, self._tokens, self._count = embedding, tokens.to(device), count
        self.width = embedding.embedding_dim

    def __call__(self, context: torch.Tensor) -> torch.Tensor:
        """[count, width] -> [N, D] float32.

        Raises:
            ValueError: the context has another shape.
        """
        if tuple(context.shape) != (self._count, self.width):
            raise ValueError(f"expected a context [{self._count}, {self.width}]; got {[*context.shape]}")
        after = 1 + self._count

        def insert(module: torch.nn.Module, tokens: object, words: torch.Tensor) -> torch.Tensor:
            shared = context.to(words.dtype).expand(words.shape[0], -1, -1)
            return torch.cat([words[:, :1], shared, words[:, after:]], dim=1)

        handle = self._embedding.register_forward_hook(insert)
        try:
            embedded: torch.Tensor = self._model.encode_text(self._tokens, normalize=True)
        finally:
            handle.remove()
        return embedded.to(torch.float32)


class ClipEncoder(ImageEncoder):
    """An image encoder with a text tower.

    Args:
        request: name, device and precision.
        model: open_clip's model, both towers.
        tokenizer: returns the tokenizer, loaded at first use.
        preprocessing: from pixels to the network's input.
        identity: plain JSON of everything else that changes the output.
    """

    def __init__(
        self,
        request: Request,
        model: Any,
        tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]],
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
    ) -> None:
        self._model: Any = model.eval().to(request.device, torch.float32)
        self._tokenizer = tokenizer
        super().__init__(request, self._model.visual, preprocessing, identity)

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> NDArray[np.float32]:
        """Return [N, dim] float32 for N texts, each of length one."""
        tokenize = _loaded(self._tokenizer)
        rows = [
            self._model.encode_text(tokenize(texts[i : i + TEXT_BATCH]).to(self.device), normalize=True)
            for i in range(0, len(texts), TEXT_BATCH)
        ]
        result: NDArray[np.float32] = torch.cat(rows).to("cpu", torch.float32).numpy()
        return result

    def save(self, folder: Path, stem: str) -> Path:
        """Write both towers as `folder/stem.safetensors`, which `build_encoder(..., weights=...)` accepts."""
        path = folder / f"{stem}.safetensors"
        write_tensors(path, self._model.state_dict())
        return path

    def context_tower(self, texts: Sequence[str], count: int) -> ContextTower:
        """Return the text tower with `count` learned vectors before each text; freezes the encoder.

        Raises:
            UsageError: the tower does not support such vectors, or they leave no room for the texts.
        """
        return ContextTower(self._model, _loaded(self._tokenizer), texts, count, self.device)


@lru_cache(maxsize=1)
def _loaded(tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]]) -> Callable[[list[str]], torch.Tensor]:
    """Return the tokenizer; the last one is kept, because loading it takes longer than encoding a few texts."""
    return tokenizer()


def build(request: Request) -> ImageEncoder:
    """Return `MODEL/TAG_OR_FILE[@LAYER]`: a tag wins over a file, `request.weights` over either's weights.

    Raises:
        UsageError: open_clip has no such model, tag or layer, and no file has that name.
        WeightsError: the weights are unreachable or do not fit.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, is_pretrained_cfg, list_pretrained_tags_by_model

    named, choice = split_layers(request.name, request.source)
    model_name, _, source = named.partition("/")
    if model_name not in open_clip.list_models():
        remedy = similar_names(model_name, open_clip.list_models(), "open_clip.list_models() lists them")
        raise UsageError(explain("open_clip has no such model", got=model_name, remedy=remedy))
    tag = source if is_pretrained_cfg(model_name, source) else None
    file = request.weights or (None if tag else Path(source).expanduser())
    if tag is None and file is not None and not file.is_file():
        tags = list_pretrained_tags_by_model(model_name)
        problem = f"{source} is neither a file nor a tag of {model_name}"
        raise UsageError(explain(problem, got=source, choices=tags, expected="a tag"))
    settings = get_pretrained_cfg(model_name, tag) if tag else {}
    quick = bool(settings.get("quick_gelu")) or model_name.endswith(QUICK_SUFFIX)
    path = file if file is not None else _download(request.name, settings)
    state = read_state_dict(path)  # before the model is built, which takes seconds: a wrong file fails at once
    with without_initial_weights():
        model = new_model(request.name, model_name, quick)
    state = _converted(state, model)
    if tag == "openai" or _is_openai(path, state):
        require_quick_gelu(model, f"{request.name} with weights from {path}")
    load_strictly(model, {k: v for k, v in state.items() if k not in OPENAI_EXTRAS}, str(path))
    canonical = model_name if not quick or model_name.endswith(QUICK_SUFFIX) else model_name + QUICK_SUFFIX
    preprocessing = preprocessing_of(model_name, settings, model)
    tokenizer = partial(tokenizer_of, request.name, model_name)
    return make_encoder(request, choice, canonical, model, tokenizer, preprocessing)


def make_encoder(
    request: Request,
    choice: LayerChoice,
    model_name: str,
    model: Any,
    tokenizer: Callable[[], Callable[[list[str]], torch.Tensor]],
    preprocessing: Preprocessing,
) -> ImageEncoder:
    """Return the encoder of both towers or, for chosen layers, of the blocks of the image tower.

    Raises:
        UsageError: the image tower has no such layer.
    """
    import open_clip

    identity = {  # independent of the origin of the weights
        "encoder": "clip",
        "model": model_name,
        "weights": state_digest(model.state_dict()),
        "activation": activation_of(model),
        "output": "projected image embedding, not normalised",
        "preprocessing": preprocessing.identity(),
        "library": f"open_clip {open_clip.__version__.split('.')[0]}",
    }
    if choice == LayerChoice():
        return ClipEncoder(request, model, tokenizer, preprocessing, identity)
    if hasattr(model.visual, "trunk"):
        parts = blocks_of(model.visual.trunk)
    else:
        parts = getattr(getattr(model.visual, "transformer", None), "resblocks", None), 1, True
    return encode_blocks(request, model.visual, *parts, choice, preprocessing, identity)


@contextmanager
def _no_remote_code(model_name: str) -> Iterator[None]:
    """Have transformers refuse remote code instead of prompting for permission to run it.

    Raises:
        WeightsError: transformers cannot load the files that open_clip's model of that name requires.
    """
    from transformers import dynamic_module_utils

    limit = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(explain(f"open_clip cannot build {model_name}", got=reason)) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = limit


def new_model(name: str, model_name: str, quick: bool) -> Any:
    """Return open_clip's model of that name with random weights and the given activation.

    A text tower of transformers is built from the folder of its settings, so that transformers downloads nothing.

    Raises:
        WeightsError: the settings of encoder `name`'s text tower cannot be downloaded or used.
    """
    import open_clip

    config = open_clip.get_model_config(model_name)
    config["quick_gelu"] = quick
    text_model = config["text_cfg"].get("hf_model_name")
    custom = config.pop("custom_text", False) or text_model is not None
    if text_model is not None:
        folder = hub_file(text_model, ("config.json",), encoder=name).parent
        config["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with _no_remote_code(model_name):
        model: Any = kind(**config)
    return model


def tokenizer_of(name: str, model_name: str) -> Any:
    """Return a model's tokenizer; one of transformers is loaded from a folder, as its model's settings are."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    text = open_clip.get_model_config(model_name)["text_cfg"]
    if "hf_tokenizer_name" not in text:
        return open_clip.get_tokenizer(model_name)
    folder = hub_folder(text["hf_tokenizer_name"], VOCABULARIES, TOKENIZER_FILES, encoder=name)
    options = {key: text[key] for key in ("context_length", "tokenizer_mode") if key in text}
    with _no_remote_code(model_name):
        return HFTokenizer(str(folder), **options, **text.get("tokenizer_kwargs", {}))


def activation_of(model: torch.nn.Module) -> str:
    """Return "quick_gelu", "gelu", both joined by "+", or "other": the activations in the built model."""
    from open_clip.transformer import QuickGELU

    kinds = {PLAIN for m in model.modules() if isinstance(m, torch.nn.GELU)}
    kinds |= {QUICK for m in model.modules() if isinstance(m, QuickGELU)}
    return "+".join(sorted(kinds)) or "other"


def require_quick_gelu(model: torch.nn.Module, what: str) -> None:
    """Raise a WeightsError unless every activation of the model is QuickGELU."""
    activation = activation_of(model)
    if activation != QUICK:
        problem = f"{what}: OpenAI's weights require QuickGELU; with another activation the features are wrong"
        remedy = "Use the model's name with -quickgelu, such as clip:ViT-B-16-quickgelu/FILE"
        raise WeightsError(explain(problem, expected=QUICK, got=activation, remedy=remedy))


def _is_openai(path: Path, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether keys, file name or folder in the hub's cache are those of OpenAI's models."""
    hub_folder = any(part.startswith("models--") and part.endswith(".openai") for part in path.parts)
    return hub_folder or "openai" in path.name.lower() or any(key in state for key in OPENAI_EXTRAS)


def _download(name: str, settings: Mapping[str, Any]) -> Path:
    repo, _, filename = str(settings.get("hf_hub", "")).rpartition("/")
    if repo:
        return hub_file(repo, (filename,) if filename else HUB_NAMES, encoder=name)
    return url_file(str(settings["url"]), encoder=name)


def _converted(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state with the older layouts converted that open_clip itself converts."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    target = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in target:
        state = convert_to_custom_text_state_dict(state)
    state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids") or key in target}
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in target and state[key].numel() == 1:
            state[key] = state[key].reshape(target[key].shape)
    return state


def preprocessing_of(model_name: str, settings: Mapping[str, Any], model: Any) -> Preprocessing:
    """Return the tag's preprocessing; for a file, what all the model's tags share, else CLIP's own."""
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
        raise UsageError(explain(f"{model_name} requires images that are not square", expected="a square", got=size))
    return Preprocessing(Preparation(int(edges.pop()), interpolation, mode), tuple(mean), tuple(std))
