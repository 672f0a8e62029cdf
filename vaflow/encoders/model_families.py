"""The model types of transformers that are built as encoders, `hf:REPO_OR_PATH[@LAYER]`, and how they are loaded.

Only the families listed here are built, from classes that transformers ships; weights are read from safetensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaflow.encoders.base import Request
from vaflow.encoders.checkpoints import (
    CONFIG,
    PICKLE,
    PROCESSOR,
    SAFETENSORS,
    SHARDS,
    load_model,
    make_config,
    open_folder,
    read_json,
    shard_names,
)
from vaflow.encoders.hub import hub_file
from vaflow.encoders.layers import LayerChoice, split_layers
from vaflow.encoders.weights import state_digest
from vaflow.errors import UsageError, WeightsError, explain


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
    processor = read_json(folder / PROCESSOR, optional=True)
    return LoadedModel(model_type, family, module, processor, choice, settings)


def _family(request: Request, folder: Path, values: Mapping[str, Any]) -> tuple[str, Family]:
    model_type = str(values.get("model_type"))
    model_type = TOWERS.get(model_type, model_type)
    family = FAMILIES.get(model_type)
    if model_type in NAFLEX:
        raise UsageError(
            explain(
                f"{request.name} is a SigLIP 2 NaFlex model, whose images have a variable number of patches",
                expected="images of one size",
                remedy="Use a SigLIP 2 model of one resolution, such as hf:google/siglip2-base-patch16-224",
            )
        )
    if family is None:
        kind = request.kind or "visual"
        raise UsageError(
            explain(
                f"The model in {folder} cannot be used as {'an audio' if kind == 'audio' else 'a visual'} encoder",
                expected="one of the supported model types",
                got=f"model type {model_type}",
                choices=[name for name, entry in FAMILIES.items() if entry.kind == kind],
            )
        )
    if request.kind and request.kind != family.kind:
        raise UsageError(
            explain(
                f"{request.name} is {'an audio' if family.kind == 'audio' else 'an image'} model ({model_type})",
                remedy=f"Pass it with --{family.kind}",
            )
        )
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
        raise WeightsError(
            explain(
                f"{request.name} has no safetensors weights",
                expected=f"{SAFETENSORS} in {folder}",
                got=got,
                remedy=f'If you trust the files, convert them: python -c "{convert}"',
            )
        )
    for name in shard_names(folder / SHARDS):
        if not (folder / name).is_file():
            hub_file(source, (name,), encoder=request.name)
    return folder / SHARDS
