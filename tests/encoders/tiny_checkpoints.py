"""Tiny checkpoints in genuine layout: a folder of every supported model type, as `save_pretrained` writes it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT: dict[str, Any] = SIZES | {"intermediate_size": 48, "image_size": 224, "patch_size": 32}
DINO: dict[str, Any] = SIZES | {"mlp_ratio": 2, "image_size": 224, "patch_size": 32}
TEXT: dict[str, Any] = SIZES | {"intermediate_size": 48, "vocab_size": 99}
SPEECH: dict[str, Any] = SIZES | {
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MAE: dict[str, Any] = VIT | {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def bit() -> Any:
    return hf.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})


IMAGES: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "dinov2": lambda: (hf.Dinov2Model(hf.Dinov2Config(**DINO)), bit()),
    "dinov2-registers": lambda: (
        hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO | {"image_size": 448})),
        bit(),
    ),
    "dinov3": lambda: (
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=4)),
        hf.DINOv3ViTImageProcessor(),
    ),
    "vit": lambda: (hf.ViTForImageClassification(hf.ViTConfig(**VIT)), hf.ViTImageProcessor()),
    "vit-mae": lambda: (hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**MAE)), hf.ViTImageProcessor()),
    "clip": lambda: (hf.CLIPModel(hf.CLIPConfig(vision_config=VIT, text_config=TEXT)), hf.CLIPImageProcessor()),
    "clip-vision": lambda: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), hf.CLIPImageProcessor()),
    "siglip": lambda: (hf.SiglipModel(hf.SiglipConfig(vision_config=VIT, text_config=TEXT)), hf.SiglipImageProcessor()),
    "convnextv2": lambda: (
        hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
        hf.ConvNextImageProcessor(size={"shortest_edge": 224}),
    ),
}
AUDIO_MODELS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "wav2vec2": lambda: (hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH)), hf.Wav2Vec2FeatureExtractor()),
    "hubert": lambda: (hf.HubertModel(hf.HubertConfig(**SPEECH)), hf.Wav2Vec2FeatureExtractor(do_normalize=False)),
    "wavlm": lambda: (hf.WavLMModel(hf.WavLMConfig(**SPEECH)), hf.Wav2Vec2FeatureExtractor()),
    "data2vec": lambda: (hf.Data2VecAudioModel(hf.Data2VecAudioConfig(**SPEECH)), hf.Wav2Vec2FeatureExtractor()),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        hf.WhisperFeatureExtractor(),
    ),
}


class Checkpoints(Mapping[str, Path]):
    """Key of `IMAGES` or `AUDIO_MODELS` -> folder of its checkpoint, written at first use. Tests must not change it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        folder = self._folder / name
        return folder if folder.is_dir() else write_checkpoint(name, folder)

    def __iter__(self) -> Iterator[str]:
        return iter([*IMAGES, *AUDIO_MODELS])

    def __len__(self) -> int:
        return len(IMAGES) + len(AUDIO_MODELS)


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a key of `IMAGES` or `AUDIO_MODELS`; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = (IMAGES | AUDIO_MODELS)[name]()  # type: ignore[operator]
        with torch.no_grad():  # biases and norms that are not the identity; tokens that differ
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
