"""Checkpoints of transformers: a folder in the layout of `save_pretrained`, or a model id of the hub.

`hf:REPO_OR_PATH` names a model of one of the `FAMILIES`, whose classes transformers ships; its weights are read from
safetensors.

A folder is data. `from_pretrained` on a folder obeys its files: remote code, quantizers, adapters, kernels,
other weight files. Here the configuration is read as JSON, only fields of a configuration class chosen by this package
are used, the tensors are read by `vaflow.encoders.weights`, and transformers gets both in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vaflow.encoders.base import LayerChoice, Request, split_layers
from vaflow.encoders.weights import BROKEN, check_fit, hub_file, read_state_dict, state_digest
from vaflow.errors import UsageError, WeightsError, explain

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SAFETENSORS, SHARDS, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@dataclass(frozen=True)
class Family:
    """How a model type is built and read.

    Attributes:
        kind: "visual" or "audio".
        config, model: names of transformers' classes.
        pooling: default pooling of tokens; of intermediate layers, `layer_pooling`.
        layer_pooling: "cls" or "mean".
        part: key of the configuration that describes the tower, for models of several towers.
        prefixes: of the keys of the tower in files of larger models.
        special: tokens before the patches, without registers.
        processor: transformers' default image processor.
        options: keyword arguments of the model's class.
    """

    kind: str
    config: str
    model: str
    pooling: str = "mean"
    layer_pooling: str = "mean"
    part: str = ""
    prefixes: tuple[str, ...] = ()
    special: int = 0
    processor: str = ""
    options: tuple[tuple[str, Any], ...] = ()


_NO_POOLER = (("add_pooling_layer", False),)
# fmt: off
FAMILIES: Mapping[str, Family] = {
    "dinov2": Family("visual", "Dinov2Config", "Dinov2Model", "cls", "cls", prefixes=("dinov2.",), special=1,
                     processor="BitImageProcessor"),
    "dinov2_with_registers": Family("visual", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", "cls", "cls",
                                    prefixes=("dinov2_with_registers.",), special=1, processor="BitImageProcessor"),
    "dinov3_vit": Family("visual", "DINOv3ViTConfig", "DINOv3ViTModel", "cls", "cls", special=1,
                         processor="DINOv3ViTImageProcessor"),
    "vit": Family("visual", "ViTConfig", "ViTModel", "cls", "cls", prefixes=("vit.",), special=1,
                  processor="ViTImageProcessor", options=_NO_POOLER),
    "vit_mae": Family("visual", "ViTMAEConfig", "ViTMAEModel", "mean", "mean", prefixes=("vit.",), special=1,
                      processor="ViTImageProcessor"),
    "clip": Family("visual", "CLIPVisionConfig", "CLIPVisionModel", "pooler", "cls", part="vision_config",
                   prefixes=("vision_model.",), special=1, processor="CLIPImageProcessor"),
    "siglip": Family("visual", "SiglipVisionConfig", "SiglipVisionModel", "pooler", "mean", part="vision_config",
                     prefixes=("vision_model.",), processor="SiglipImageProcessor"),
    "convnextv2": Family("visual", "ConvNextV2Config", "ConvNextV2Model", "pooler", "mean", prefixes=("convnextv2.",),
                         processor="ConvNextImageProcessor"),
    "wav2vec2": Family("audio", "Wav2Vec2Config", "Wav2Vec2Model", prefixes=("wav2vec2.",)),
    "hubert": Family("audio", "HubertConfig", "HubertModel", prefixes=("hubert.",)),
    "wavlm": Family("audio", "WavLMConfig", "WavLMModel", prefixes=("wavlm.",)),
    "data2vec-audio": Family("audio", "Data2VecAudioConfig", "Data2VecAudioModel", prefixes=("data2vec_audio.",)),
    "whisper": Family("audio", "WhisperConfig", "WhisperEncoder", prefixes=("model.encoder.", "encoder.")),
}
# fmt: on
TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}  # files of the image tower alone
NAFLEX = ("siglip2", "siglip2_vision_model")  # models of one resolution have the type siglip
LAYER_COUNTS = ("num_hidden_layers", "encoder_layers", "num_adapter_layers", "depths")  # an object is made for each
MOST_LAYERS = 1000
HEADS = ("classifier.", "decoder.", "pooler.", "lm_head.", "projector.", "quantizer.", "project_q.", "project_hid.")


@dataclass(frozen=True)
class LoadedModel:
    """A model of a family with its settings.

    Attributes:
        family: its entry in `FAMILIES`; `model_type`: its key.
        module: the network.
        processor: settings of the image processor or feature extractor.
        choice: layers and pooling.
        settings: the configuration's fields, as JSON.
    """

    model_type: str
    family: Family
    module: Any
    processor: Mapping[str, Any]
    choice: LayerChoice
    settings: Mapping[str, Any]

    def stored(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the layers that are stored on an axis of their own, of the chosen `numbers`."""
        return numbers if len(numbers) > 1 and self.choice.layers != "mean" else ()

    def identity(self, **further: Any) -> dict[str, Any]:
        """Return plain JSON of everything that changes the output, but for stored layers and precision."""
        import transformers

        return {
            "encoder": "hf",
            "model": self.model_type,
            "weights": state_digest(self.module.state_dict()),
            "settings": dict(self.settings),
            "output": self.choice.layers,
            "library": f"transformers {transformers.__version__.split('.')[0]}",
            **further,
        }


def load(request: Request) -> LoadedModel:
    """Return the model that a request names, with its settings; raises as `build` does."""
    source, choice = split_layers(request.name, request.source)
    local = request.weights is not None
    place = str(request.weights) if local else source
    folder = open_folder(request.name, place, local=local, weight_files=(SAFETENSORS, SHARDS))
    values = read_json(folder / CONFIG)
    model_type, family = _family(request, folder, values)
    values = values.get(family.part, values) if family.part else values
    if not isinstance(values, dict):
        got = type(values).__name__
        raise WeightsError(_broken(folder, f"a valid {CONFIG}", f"{family.part} is not an object but {got}"))
    config = make_config(_class(family.config), values, folder)
    if model_type == "vit_mae":
        config.mask_ratio = 0.0
    module = load_model(
        _class(family.model),
        config,
        folder,
        _weight_file(request, folder, place),
        ignored=lambda key: key.startswith(HEADS),
        prefixes=family.prefixes,
        **dict(family.options),
    )
    settings = {key: value for key, value in sorted(config.to_dict().items()) if key in values}
    settings.pop("transformers_version", None)  # the installed one, of which `identity` has the part that counts
    processor = read_json(folder / PROCESSOR, optional=True)
    return LoadedModel(model_type, family, module, processor, choice, settings)


def _family(request: Request, folder: Path, values: Mapping[str, Any]) -> tuple[str, Family]:
    model_type = str(values.get("model_type"))
    model_type = TOWERS.get(model_type, model_type)
    family = FAMILIES.get(model_type)
    if model_type in NAFLEX:
        problem = f"{request.name} is a SigLIP 2 NaFlex model, whose images have a variable number of patches"
        remedy = "Use a SigLIP 2 model of one resolution, such as hf:google/siglip2-base-patch16-224"
        raise UsageError(explain(problem, expected="images of one size", remedy=remedy))
    if family is None:
        kind = request.kind or "visual"
        problem = f"The model in {folder} cannot be used as {'an audio' if kind == 'audio' else 'a visual'} encoder"
        expected = "one of the supported model types"
        choices = [name for name, entry in FAMILIES.items() if entry.kind == kind]
        raise UsageError(explain(problem, expected=expected, got=f"model type {model_type}", choices=choices))
    if request.kind and request.kind != family.kind:
        problem = f"{request.name} is {'an audio' if family.kind == 'audio' else 'an image'} model ({model_type})"
        raise UsageError(explain(problem, remedy=f"Pass it with --{family.kind}"))
    return model_type, family


def _class(name: str) -> Any:
    if name == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder
    import transformers

    return getattr(transformers, name)


def _weight_file(request: Request, folder: Path, source: str) -> Path:
    if (folder / SAFETENSORS).is_file():
        return folder / SAFETENSORS
    if not (folder / SHARDS).is_file():
        got = f"only {PICKLE}" if (folder / PICKLE).is_file() else "no weights"
        convert = f"from transformers import AutoModel as M; M.from_pretrained('{source}').save_pretrained('NEW')"
        problem = f"{request.name} has no safetensors weights"
        remedy = f'If you trust the files, convert them: python -c "{convert}"'
        raise WeightsError(explain(problem, expected=f"{SAFETENSORS} in {folder}", got=got, remedy=remedy))
    for name in shard_names(folder / SHARDS):
        if not (folder / name).is_file():
            hub_file(source, (name,), encoder=request.name)
    return folder / SHARDS


def open_folder(name: str, source: str, *, local: bool, weight_files: tuple[str, ...]) -> Path:
    """Return the folder of encoder `name`: `source` itself, or (unless `local`) the hub's model id `source`.

    Args:
        source: a path, or a model id of the hub.
        weight_files: accepted weight files, the preferred one first.

    Raises:
        UsageError: the folder does not exist.
        WeightsError: the hub has no such model, or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    needs = f"a folder (PATH) with {CONFIG}, {PROCESSOR} and {weight_files[0]}"
    if local or source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        option, typed = f"--weights {name}=", f"{name.partition(':')[0]}:"
        expected = f"{needs}, as save_pretrained writes it".replace(" (PATH)", "")
        moved = "" if local else f", or pass {option}FOLDER if the model has moved"
        remedy = f"Check the path after {option if local else typed}{moved}"
        raise UsageError(explain(f"The folder {source} does not exist", expected=expected, remedy=remedy))
    hub_file(source, (CONFIG,), encoder=name, needs=needs)
    hub_file(source, (PROCESSOR, CONFIG), encoder=name, needs=needs)  # some checkpoints have no processor's config
    return hub_file(source, weight_files, encoder=name, needs=needs).parent


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return a JSON object; {} where an optional file is missing.

    Raises:
        WeightsError: the file cannot be read, or is not a JSON object.
    """
    if optional and not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        expected = "JSON, as save_pretrained writes it"
        remedy = "Download the model's folder again"
        raise WeightsError(explain(f"{path} cannot be read", expected=expected, got=error, remedy=remedy)) from error
    if not isinstance(document, dict):
        raise WeightsError(explain(f"{path} has no settings", expected="a JSON object", got=type(document).__name__))
    return document


def make_config(config_class: Any, values: Mapping[str, Any], folder: Path) -> Any:
    """Return a configuration from the fields that the class itself defines; every other key is ignored.

    Raises:
        UsageError: the model is quantized.
        WeightsError: a value has a wrong type or is out of range.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PreTrainedConfig

    if values.get("quantization_config") is not None:
        problem = f"The model in {folder} is quantized, which is not supported"
        remedy = "Use the model's original weights in float32, float16 or bfloat16"
        raise UsageError(explain(problem, expected=f"{CONFIG} without quantization_config", remedy=remedy))
    general = {field.name for field in fields(PreTrainedConfig)}
    known = {field.name for field in fields(config_class) if field.init} - general
    chosen = {key: value for key, value in values.items() if key in known}
    counts: list[float] = [len(value) for value in chosen.values() if isinstance(value, list)]
    for key in LAYER_COUNTS:
        value = chosen.get(key, 0)
        counts += [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int | float)]
    if max(counts) > MOST_LAYERS:
        problem = f"{CONFIG} in {folder} describes a larger model than the weights beside it"
        raise WeightsError(explain(problem, expected=f"at most {MOST_LAYERS:,} layers", got=f"{max(counts):,}"))
    try:
        return config_class(**chosen)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise WeightsError(_broken(folder, f"a valid {CONFIG}", error)) from error


def load_model(
    model_class: Any,
    config: Any,
    folder: Path,
    weights: Path,
    ignored: Callable[[str], bool],
    prefixes: tuple[str, ...] = (),
    **options: Any,
) -> torch.nn.Module:
    """Return a model of `model_class` in float32 with the weights of a file in `folder`; every key must match.

    Args:
        model_class: a class of transformers, chosen by this package.
        weights: a weight file, or a safetensors index.
        ignored: whether an unexpected key is one that the encoder does not use, such as a classifier's.
        prefixes: of the encoder's keys in files of larger models; the first one that occurs is removed.

    Raises:
        WeightsError: the file cannot be read, or does not fit the configuration.
    """
    files = [weights.parent / name for name in shard_names(weights)] if weights.name == SHARDS else [weights]
    state = {key: tensor for file in files for key, tensor in read_state_dict(file).items()}
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)), "")
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    _require_size(model_class, config, state, folder)
    attention = "sdpa" if model_class._supports_sdpa else "eager"
    try:
        with quiet_transformers():
            module, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                attn_implementation=attention,
                dtype=torch.float32,
                **options,
            )
    except BROKEN as error:
        raise WeightsError(_broken(folder, f"weights of {model_class.__name__}", error)) from error
    check_fit(
        str(folder),
        missing=info["missing_keys"],
        unexpected=[key for key in info["unexpected_keys"] if not ignored(key)],
        misshapen=[f"{key} {tuple(got)} instead of {tuple(want)}" for key, got, want in info["mismatched_keys"]],
    )
    loaded: torch.nn.Module = module
    return loaded


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' reports on standard error; the relevant ones become errors of this package."""
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


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that a safetensors index lists.

    Raises:
        WeightsError: the index lists none, or files outside its folder.
    """
    names = read_json(index).get("weight_map")
    files = sorted(set(names.values())) if isinstance(names, dict) and all(map(_is_shard, names.values())) else []
    if not files:
        problem = f"{index} names no shards"
        raise WeightsError(explain(problem, expected='"weight_map" with names of .safetensors files'))
    return files


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _require_size(model_class: Any, config: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise a WeightsError if the configuration describes a much larger model than the weights: it is not allocated."""
    layers = getattr(config, "num_hidden_layers", 0)
    stored = sum(tensor.numel() for tensor in state.values())
    described = -1
    if isinstance(layers, int) and layers <= len(state):
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), quiet_transformers():
                described = sum(parameter.numel() for parameter in model_class(config).parameters())
        except BROKEN as error:
            raise WeightsError(_broken(folder, f"a valid {CONFIG}", error)) from error
    if described < 0 or described > 2 * stored + 1_000_000:
        problem = f"{CONFIG} in {folder} describes a larger model than the weights beside it"
        got = f"{layers} layers" if described < 0 else f"{described:,} parameters"
        remedy = "Download the model's folder again"
        raise WeightsError(explain(problem, expected=f"about {stored:,} parameters", got=got, remedy=remedy))


def _broken(folder: Path, expected: str, error: Exception | str) -> str:
    problem = f"The model in {folder} does not load"
    got = (str(error).strip() or type(error).__name__).splitlines()[0]
    return explain(problem, expected=expected, got=got, remedy="Download the model's folder again")
