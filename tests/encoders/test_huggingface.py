"""`hf:` encoders equal transformers' processors and models on tiny checkpoints."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_hub import serve
from huggingface_hub import constants
from PIL import Image
from tiny_checkpoints import AUDIO_MODELS, IMAGES
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    DINOv3ViTImageProcessor,
    WhisperFeatureExtractor,
)

from vaflow.cache.schema import StreamInfo
from vaflow.encoders import build_encoder
from vaflow.encoders.base import WAVEFORM
from vaflow.encoders.huggingface import image_preprocessing, whisper_features
from vaflow.encoders.preprocessing import Preparation
from vaflow.errors import UsageError, VaflowError, WeightsError
from vaflow.extract.streams import as_declared


def build(folder: Path, suffix: str = "", kind: str = "") -> Any:
    return build_encoder(f"hf:{folder}{suffix}", kind=kind)


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth images of many sizes, as crops of video are."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = rng.integers(60, 420, 2).tolist()
        coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8)
        made.append(np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))
    return made


def prepared(encoder: Any, images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([encoder.prepare(image) for image in images]))


def waves(count: int, seconds: float) -> np.ndarray:
    """[count, n] float32 at 16 kHz."""
    rng = np.random.default_rng(1)
    time = np.arange(round(16000 * seconds)) / 16000
    tones = [np.sin(2 * np.pi * rng.uniform(100, 900) * time**1.1) * rng.uniform(0.05, 0.5) for _ in range(count)]
    return (np.stack(tones) + rng.normal(scale=0.01, size=(count, time.size))).astype(np.float32)


def rows(samples: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(samples.reshape(len(samples), -1, WAVEFORM.bins))


# --- images


@pytest.mark.parametrize("count", [15, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", IMAGES)
def test_preprocessing_equals_the_processor(checkpoints: Mapping[str, Path], name: str, count: int) -> None:
    """The result equals the Pillow version and DINOv3's float32 version; other tensor versions round differently."""
    encoder = build(checkpoints[name])
    settings = json.loads((checkpoints[name] / "preprocessor_config.json").read_text())
    preprocessing = image_preprocessing("x", settings, "")
    exact = AutoImageProcessor.from_pretrained(checkpoints[name], backend="pil")
    default = AutoImageProcessor.from_pretrained(checkpoints[name])
    assert exact.backend == ("torchvision" if name == "dinov3" else "pil") and default.backend == "torchvision"
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    for image in images(count):
        pixels = encoder.prepare(image).transpose(2, 0, 1)
        pixels = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
        expected = exact(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose((pixels - mean) / std, expected, rtol=1e-6, atol=1e-6)
        tensor = default(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        levels = np.abs((pixels - mean) / std - tensor) * std * 255
        assert levels.mean() < 0.11 and levels.max() < 2.01


@pytest.mark.parametrize(("kernel", "resample"), [("bilinear", 2), ("bicubic", 3)])
def test_float32_resizing_equals_the_processor_for_large_and_small_images(kernel: str, resample: int) -> None:
    """White noise of up to 1,100 pixels: the largest differences that rounding can make."""
    processor = DINOv3ViTImageProcessor(resample=resample, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    preparation = Preparation(224, kernel, "squash", dtype="float32")
    rng = np.random.default_rng(0)
    for height, width in ((1100, 700), (31, 997), (224, 40), (112, 112), (224, 224)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(preparation(image), expected, rtol=1e-6, atol=1e-6)


def test_only_dinov3_declares_float32_resizing(checkpoints: Mapping[str, Path]) -> None:
    """The fingerprints of all other families stay as they were."""
    for name in IMAGES:
        preprocessing = build(checkpoints[name]).identity["preprocessing"]
        assert preprocessing["interpolation"].startswith("float32" if name == "dinov3" else "pillow"), name
    settings = {"image_processor_type": "DINOv3ViTImageProcessor", "resample": 0}
    with pytest.raises(UsageError, match="nearest resampling"):
        image_preprocessing("x", settings, "")


@pytest.mark.parametrize("name", IMAGES)
def test_features_equal_the_hugging_face_model(checkpoints: Mapping[str, Path], name: str) -> None:
    """Reference: `AutoModel` on the processor's pixels, pooled manually."""
    model: Any = AutoModel.from_pretrained(checkpoints[name]).eval()
    model = getattr(model, "vision_model", model)
    encoder = build(checkpoints[name])
    batch = prepared(encoder, images(3))
    scale = 1 if batch.is_floating_point() else 255
    pixels = (batch.permute(0, 3, 1, 2) / scale - encoder._mean) / encoder._std
    options = {"noise": torch.arange(49.0).expand(3, -1)} if name == "vit-mae" else {}
    if name == "vit-mae":
        model.config.mask_ratio = 0.0
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True, **options)
    hidden = output.last_hidden_state
    expected = {
        "vit-mae": lambda: hidden[:, 1:].mean(dim=1),
        "clip": lambda: output.pooler_output,
        "clip-vision": lambda: output.pooler_output,
        "siglip": lambda: output.pooler_output,
        "convnextv2": lambda: output.pooler_output,
    }.get(name, lambda: hidden[:, 0])()
    torch.testing.assert_close(encoder.encode(batch), expected, atol=2e-5, rtol=1e-4)
    assert encoder.dim == expected.shape[1] and not encoder.layers
    middle = build(checkpoints[name], "@2,pool=mean").encode(batch)
    state = output.hidden_states[2]
    special = {"siglip": 0, "dinov2-registers": 5, "dinov3": 5}.get(name, 1)
    by_hand = state.mean(dim=(2, 3)) if state.ndim == 4 else state[:, special:].mean(dim=1)
    torch.testing.assert_close(middle, by_hand, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "convnextv2"])
def test_several_layers_are_stored_in_order(checkpoints: Mapping[str, Path], name: str) -> None:
    encoder = build(checkpoints[name], "@1-3")
    batch = prepared(encoder, images(2))
    together = encoder.encode(batch)
    assert together.shape == (2, 3, encoder.dim) and encoder.layers == (1, 2, 3)
    assert encoder.identity["layers"] == [1, 2, 3]
    for position, layer in enumerate((1, 2, 3)):
        assert torch.equal(together[:, position], build(checkpoints[name], f"@{layer}").encode(batch))
    every = build(checkpoints[name], "@all").encode(batch)
    torch.testing.assert_close(build(checkpoints[name], "@mean").encode(batch), every.mean(dim=1))


def test_masked_patches_are_dropped_and_the_rest_keep_their_order(checkpoints: Mapping[str, Path]) -> None:
    """ViT-MAE draws which patches it masks: two calls must not differ."""
    encoder = build(checkpoints["vit-mae"])
    batch = prepared(encoder, images(2))
    assert torch.equal(encoder.encode(batch), encoder.encode(batch))
    assert encoder.module.model(pixel_values=torch.zeros(1, 3, 224, 224)).last_hidden_state.shape[1] == 1 + 49


def test_integer_sizes_of_older_processors_are_accepted() -> None:
    old = {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    geometry = image_preprocessing("x", old, "CLIPImageProcessor").preparation
    assert (geometry.size, geometry.edge, geometry.resize_mode) == (224, 0, "shortest")
    with pytest.raises(UsageError, match="invalid settings"):
        image_preprocessing("x", {"size": "many"}, "ViTImageProcessor")
    with pytest.raises(UsageError, match="not supported"):
        image_preprocessing("x", {"image_processor_type": "EvilProcessor"}, "ViTImageProcessor")


# --- audio


@pytest.mark.parametrize(
    "change",
    [
        {"crop_size": {"shortest_edge": 224}},
        {"crop_size": {"height": 224, "width": 200}},
        {"crop_size": {"height": 100_000, "width": 100_000}},
        {"crop_size": []},
        {"size": {"shortest_edge": 10**12}},
        {"size": {"shortest_edge": [256]}},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": "x"}},
    ],
    ids=str,
)
def test_invalid_processor_settings_are_reported(change: dict[str, Any]) -> None:
    settings = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}} | change
    with pytest.raises(UsageError, match=r"has invalid settings|does not give squares"):
        image_preprocessing("hf:model", settings, "BitImageProcessor")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dinov2", {"num_hidden_layers": 10**9}),
        ("convnextv2", {"depths": [1, 1, 10**9, 1]}),
        ("wav2vec2", {"num_adapter_layers": 10**9, "add_adapter": True}),
        ("wav2vec2", {"conv_dim": [16] * 10**4}),
    ],
)
def test_configurations_of_too_many_layers_are_rejected_at_once(
    checkpoints: Mapping[str, Path], tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=r"larger model than the weights.*at most 1,000 layers"):
        build(folder)


@pytest.mark.parametrize("change", [{"vision_config": 3}, {"vision_config": {"num_attention_heads": -1}}], ids=str)
def test_invalid_configurations_are_reported(checkpoints: Mapping[str, Path], tmp_path: Path, change: dict) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    if isinstance(change["vision_config"], dict):
        change = {"vision_config": config["vision_config"] | change["vision_config"]}
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=r"does not load|does not encode images of 224 pixels"):
        build(folder)


def test_the_identity_does_not_depend_on_the_minor_version_of_transformers(checkpoints: Mapping[str, Path]) -> None:
    identity = json.dumps(build(checkpoints["vit"]).identity)
    assert transformers.__version__ not in identity
    assert f"transformers {transformers.__version__.split('.')[0]}" in identity


@pytest.mark.parametrize("name", AUDIO_MODELS)
def test_steps_average_the_tokens_of_the_model(checkpoints: Mapping[str, Path], name: str) -> None:
    """Reference: feature extractor per window, `AutoModel`, tokens per step selected manually."""
    extractor = AutoFeatureExtractor.from_pretrained(checkpoints[name])
    model: Any = AutoModel.from_pretrained(checkpoints[name]).eval()
    model = model.encoder if name == "whisper" else model
    encoder, samples = build(checkpoints[name]), waves(2, 4.0)
    for number, wave in enumerate(samples):
        inputs = extractor(wave, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            hidden = model(inputs["input_features" if name == "whisper" else "input_values"]).last_hidden_state[0]
        first = 0.0 if name == "whisper" else 0.0125
        centres = first + 0.02 * np.arange(len(hidden))
        encoded = encoder.encode(rows(samples[number : number + 1]), window=4, steps=8)[0]
        times = encoder.step_times(4, 8)
        for step in range(8):
            inside = np.flatnonzero((centres >= 0.5 * step - 1e-9) & (centres < 0.5 * (step + 1) - 1e-9))
            torch.testing.assert_close(encoded[step], hidden[inside].mean(dim=0), atol=3e-4, rtol=1e-3)
            assert times[step] == pytest.approx(centres[inside].mean())


@pytest.mark.parametrize("instant", [0.31, 1.5125, 2.77, 3.6])
def test_an_impulse_changes_the_token_centred_on_it(checkpoints: Mapping[str, Path], instant: float) -> None:
    encoder = build(checkpoints["hubert"])
    quiet = torch.zeros(1, 4 * 16000)
    loud = quiet.clone()
    loud[0, round(instant * 16000)] = 1.0
    with torch.no_grad():
        difference = encoder.module.feature_extractor.conv_layers
        before, after = quiet[:, None], loud[:, None]
        for layer in difference:  # without their normalisation over time, which mixes all tokens
            before, after = layer.conv(before), layer.conv(after)
    strength = (after - before)[0].abs().amax(dim=0).numpy()
    reached = np.flatnonzero(strength > 0)
    centres = encoder.tokens(4).times()
    assert len(strength) == len(centres) == encoder.tokens(4).count
    covering = np.flatnonzero((centres - 0.0125 - 1e-9 <= instant) & (instant < centres + 0.0125 - 1e-9))
    assert reached.tolist() == covering.tolist()


def test_whisper_features_equal_the_feature_extractor() -> None:
    extractor = WhisperFeatureExtractor()
    filters = torch.from_numpy(extractor.mel_filters).float()
    samples = waves(2, 3.5)
    expected = extractor(list(samples), sampling_rate=16000, return_tensors="pt")["input_features"]
    together = whisper_features(torch.from_numpy(samples), filters)
    torch.testing.assert_close(together, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(whisper_features(torch.from_numpy(samples[1:]), filters)[0], together[1])


def test_incompatible_windows_and_steps_are_rejected(checkpoints: Mapping[str, Path]) -> None:
    with pytest.raises(UsageError, match="at most about 30 s"):
        build(checkpoints["whisper"]).step_times(40, 20)
    with pytest.raises(UsageError, match="would have no token"):
        build(checkpoints["hubert"]).step_times(1, 60)
    with pytest.raises(UsageError, match=r"multiple of 0\.01 s"):
        build(checkpoints["hubert"]).segments(1.005, 4)
    with pytest.raises(ValueError, match=r"expected a waveform \[B, 400, 160\]"):
        build(checkpoints["hubert"]).encode(torch.zeros(1, 399, 160), window=4, steps=8)


# --- batches


@pytest.mark.parametrize("name", [*IMAGES, *AUDIO_MODELS])
def test_a_row_does_not_depend_on_its_batch(checkpoints: Mapping[str, Path], name: str) -> None:
    encoder = build(checkpoints[name])
    if name in IMAGES:
        batch, encode = prepared(encoder, images(4)), encoder.encode
    else:
        batch = rows(waves(4, 2.0))

        def encode(batch: torch.Tensor) -> torch.Tensor:
            return encoder.encode(batch, window=2, steps=4)

    order = [2, 0, 3, 1]
    assert torch.equal(encode(batch)[order], encode(batch[order]))
    others = batch.clone()
    others[1:] = batch.flip(0)[:3]
    assert torch.equal(encode(batch)[0], encode(others)[0])


# --- rejected input


def test_a_missing_layer_is_rejected(checkpoints: Mapping[str, Path]) -> None:
    for name in ("vit", "wav2vec2", "whisper"):
        with pytest.raises(UsageError, match=r"no such layer.*0 \(embeddings\) to 3"):
            build(checkpoints[name], "@4")
    with pytest.raises(UsageError, match="different widths"):
        build(checkpoints["convnextv2"], "@1-2")
    with pytest.raises(UsageError, match=r"unknown pooling.*Choices: cls, mean, pooler"):
        build(checkpoints["vit"], "@2,pool=max")
    with pytest.raises(UsageError, match="no such pooling"):
        build(checkpoints["siglip"], "@pool=cls")


def test_a_model_of_another_kind_is_rejected(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match=r"cannot be used as a visual encoder.*bert.*dinov2"):
        build(tmp_path / "bert", kind="visual")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(UsageError, match=r"NaFlex.*variable number of patches.*siglip2-base-patch16-224"):
        build(tmp_path / "bert", kind="visual")
    with pytest.raises(UsageError, match=r"is an audio model \(wav2vec2\)\. Pass it with --audio"):
        build(checkpoints["wav2vec2"], kind="visual")
    with pytest.raises(UsageError, match=r"is an image model \(vit\)\. Pass it with --visual"):
        build(checkpoints["vit"], kind="audio")


def test_a_stride_of_zero_is_rejected(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["wav2vec2"], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["conv_stride"][-1] = 0
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"does not load.*strides >= 1.*conv_stride \[5, 2, 2, 2, 2, 2, 0\]"):
        build_encoder(f"hf:{folder}")


def test_pickled_weights_are_rejected(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    for file in checkpoints["vit"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no safetensors weights.*only pytorch_model\.bin.*save_pretrained"):
        build(tmp_path)


def test_missing_and_restricted_repositories_are_reported(hub_cache: Path) -> None:
    with pytest.raises(WeightsError, match=r"--weights hf:someone/model=PATH"):
        build_encoder("hf:someone/model")
    with pytest.raises(UsageError, match=r"The folder .* does not exist.*pass --weights hf:/nowhere/at/all=FOLDER"):
        build_encoder("hf:/nowhere/at/all")


@pytest.mark.parametrize(
    ("error", "message"), [("GatedRepo", "licence must be accepted.*HF_TOKEN"), ("RepoNotFound", "no such model id")]
)
def test_hub_errors_are_reported(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    with serve({}, error=error) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(WeightsError, match=message):
            build_encoder("hf:someone/model")


def test_repository_code_is_not_run(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    """Every family, with modules and mappings planted beside genuine weights."""
    for name, folder in checkpoints.items():
        copy = tmp_path / name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / "evil.py").write_text(f"import os\nos.makedirs({str(tmp_path / 'ran')!r}, exist_ok=True)\n")
        for document in ("config.json", "preprocessor_config.json"):
            values = json.loads((copy / document).read_text())
            hostile = {"AutoModel": "evil.E", "AutoConfig": "evil.E", "AutoImageProcessor": "evil.E"}
            values |= {"auto_map": hostile, "trust_remote_code": True, "use_kernels": True}
            (copy / document).write_text(json.dumps(values))
        assert build(copy).identity["weights"] == build(folder).identity["weights"]
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
        with pytest.raises(VaflowError):
            build(copy)
    assert not (tmp_path / "ran").exists()


def test_streams_of_an_older_version_of_transformers_are_added_to() -> None:
    made = StreamInfo("hf:x", "visual", 4, "float16", {"encoder": "hf", "settings": {"hidden_size": 4}})
    older = replace(made, identity={"encoder": "hf", "settings": {"hidden_size": 4, "transformers_version": "5.0.0"}})
    assert as_declared(made, older) == older
    other = replace(older, identity={"encoder": "hf", "settings": {"hidden_size": 8, "transformers_version": "5.0.0"}})
    assert as_declared(made, other) == made
