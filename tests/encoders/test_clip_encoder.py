"""CLIP weights: files, tags, activation, preprocessing, embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from fake_hub import into_cache, serve
from huggingface_hub import constants
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file

from vaflow.encoders import build_encoder
from vaflow.encoders import weights as weights_module
from vaflow.encoders.clip import activation_of, new_model, tokenizer_of
from vaflow.errors import UsageError, WeightsError

OPENAI_REPO = "timm/vit_base_patch16_clip_224.openai"


def build(name: str, **options: Any) -> Any:
    """Return an encoder typed as Any."""
    return build_encoder(name, **options)


def save(model: torch.nn.Module, path: Path, layout: str = "plain", **changes: Any) -> Path:
    """The model's state dict as a file; a change is a tensor to add, or None to leave a key out."""
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    state = {key: value for key, value in (state | changes).items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif layout == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)
    return path


def random_images(edge: int, count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, edge, edge, 3), dtype=np.uint8))


def quick_gelu_embedding(model: Any, images: torch.Tensor) -> np.ndarray:
    """Reference: OpenAI preprocessing and the original model with x * sigmoid(1.702 x)."""
    mean, std = (np.array(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = torch.from_numpy(((images.numpy() / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    for module in model.modules():
        if isinstance(module, open_clip.model.QuickGELU):
            module.forward = lambda x: x * torch.sigmoid(1.702 * x)
    with torch.no_grad():
        return model.encode_image(pixels).numpy()


@pytest.mark.parametrize("layout", ["model.safetensors", "model.pt", "training.pt"])
def test_files_in_openai_layout_load_with_quick_gelu(small_clip: Any, tmp_path: Path, layout: str) -> None:
    path = save(small_clip, tmp_path / layout, layout=layout.split(".")[0])
    encoder = build("clip-vit-b16", weights=path)
    assert activation_of(encoder._model) == "quick_gelu"
    images = random_images(32)
    embedding = encoder.encode(images)
    assert embedding.shape == (3, encoder.dim) == (3, 24)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding.numpy(), quick_gelu_embedding(small_clip, images), atol=2e-5)
    assert not np.allclose(np.linalg.norm(embedding.numpy(), axis=1), 1, atol=0.01), "must not be normalised"


def test_half_precision_files_load_as_float32(small_clip: Any, tmp_path: Path) -> None:
    halves = {key: value.half() for key, value in small_clip.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    encoder = build("clip-vit-b16", weights=tmp_path / "half.safetensors")
    assert {p.dtype for p in encoder.module.parameters()} == {torch.float32}


def test_identity_depends_on_weights_not_on_their_file(small_clip: Any, tmp_path: Path, hub_cache: Path) -> None:
    as_file = build("clip-vit-b16", weights=save(small_clip, tmp_path / "model.pt"))
    into_cache(hub_cache, OPENAI_REPO, save(small_clip, tmp_path / "open_clip_model.safetensors"))
    as_tag = build("clip-vit-b16")
    other_name = build("clip:ViT-B-16/openai")
    assert as_file.identity == as_tag.identity == other_name.identity
    assert other_name.name == "clip:ViT-B-16/openai"
    changed = save(small_clip, tmp_path / "other.pt", logit_scale=torch.tensor(1.0))
    assert build("clip-vit-b16", weights=changed).identity != as_file.identity


@pytest.mark.parametrize("name", ["clip-vit-b16", "clip:ViT-B-16/openai", "clip:ViT-B-16-quickgelu/openai"])
def test_openai_tags_imply_quick_gelu(small_clip: Any, tmp_path: Path, hub_cache: Path, name: str) -> None:
    into_cache(hub_cache, OPENAI_REPO, save(small_clip, tmp_path / "open_clip_model.safetensors"))
    encoder = build(name)
    assert activation_of(encoder._model) == "quick_gelu"
    assert encoder.identity["activation"] == "quick_gelu"
    images = random_images(32)
    np.testing.assert_allclose(
        encoder.encode(images).numpy(),
        quick_gelu_embedding(small_clip, images),
        atol=2e-5,
    )


def test_other_tags_keep_plain_gelu(small_clip: Any, tmp_path: Path, hub_cache: Path) -> None:
    repo = pretrained.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k")["hf_hub"].rstrip("/")
    into_cache(hub_cache, repo, save(small_clip, tmp_path / "open_clip_model.safetensors"))
    encoder = build("clip:ViT-B-16/laion2b_s34b_b88k")
    assert encoder.identity["activation"] == "gelu"
    assert activation_of(encoder._model) == "gelu"


def test_openai_weights_in_a_plain_gelu_model_are_rejected(small_clip: Any, tmp_path: Path) -> None:
    by_name = save(small_clip, tmp_path / "ViT-B-16-openai.pt")
    by_keys = save(small_clip, tmp_path / "model.pt", input_resolution=torch.tensor(32))
    for path in (by_name, by_keys):
        with pytest.raises(WeightsError, match="QuickGELU"):
            build(f"clip:ViT-B-16/{path}")
        encoder = build(f"clip:ViT-B-16-quickgelu/{path}")
        assert activation_of(encoder._model) == "quick_gelu"


def test_other_files_keep_the_activation_of_the_named_model(small_clip: Any, tmp_path: Path) -> None:
    path = save(small_clip, tmp_path / "mine.safetensors")
    assert build(f"clip:ViT-B-16/{path}").identity["activation"] == "gelu"
    assert build(f"clip:ViT-B-16-quickgelu/{path}").identity["activation"] == "quick_gelu"


def test_mismatched_keys_are_listed(small_clip: Any, tmp_path: Path) -> None:
    changes: Any = {"visual.proj": None, "visual.class_embedding": torch.zeros(7)}
    path = save(
        small_clip,
        tmp_path / "model.pt",
        ln_final_extra=torch.zeros(2),
        **changes,
    )
    with pytest.raises(WeightsError) as caught:
        build("clip-vit-b16", weights=path)
    for part in ("1 missing keys: visual.proj", "1 unexpected keys: ln_final_extra", "visual.class_embedding (7,)"):
        assert part in str(caught.value)


def test_only_the_first_ten_keys_are_listed(small_clip: Any, tmp_path: Path) -> None:
    extras: Any = {f"extra.{i:02}": torch.zeros(1) for i in range(14)}
    with pytest.raises(WeightsError, match=r"14 unexpected keys: extra\.00.*extra\.09 and 4 more"):
        build("clip-vit-b16", weights=save(small_clip, tmp_path / "model.pt", **extras))


def test_unknown_model_errors_list_the_choices(small_clip: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ViT-B-16"):
        build("clip:ViT-B-61/openai")
    with pytest.raises(UsageError, match=r"datacomp_xl_s13b_b90k"):
        build("clip:ViT-B-16/datacomp_xl")


SHAPES = [(112, 112), (240, 320), (321, 240), (224, 224), (97, 400), (500, 223), (16, 16), (225, 224)]


@pytest.mark.parametrize("shape", SHAPES)
def test_prepare_equals_the_open_clip_transform_without_normalization(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    image = np.kron(rng.integers(0, 256, (-(-shape[0] // 8), -(-shape[1] // 8), 3)), np.ones((8, 8, 1)))
    image = image[: shape[0], : shape[1]].astype(np.uint8)
    encoder = build("clip-tiny")
    oracle = open_clip.image_transform(224, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = (oracle(Image.fromarray(image)) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(encoder.prepare(image), expected)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_resize_mode_equals_open_clip(mode: str, interpolation: str) -> None:
    from vaflow.encoders.preprocessing import Preparation

    for shape in ((90, 61), (61, 90), (40, 40)):
        image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
        oracle = open_clip.image_transform(
            48, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, interpolation=interpolation
        )
        expected = (oracle(Image.fromarray(image)) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(Preparation(48, interpolation, mode)(image), expected)


def test_files_use_the_preprocessing_common_to_all_tags() -> None:
    from vaflow.encoders.clip import preprocessing_of

    siglip, tag = "ViT-B-16-SigLIP", "webli"
    model = type("M", (), {"visual": type("V", (), {"image_size": (224, 224)})})
    from_tag = preprocessing_of(siglip, pretrained.get_pretrained_cfg(siglip, tag), model)
    from_file = preprocessing_of(siglip, {}, model)
    assert from_tag == from_file
    assert from_tag.preparation.resize_mode == "squash"
    assert from_tag.mean == (0.5, 0.5, 0.5)


def test_images_of_another_size_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"\[B, 224, 224, 3\].*\(2, 3, 224, 224\)"):
        build("clip-tiny").encode(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))


def test_features_carry_gradients_and_encode_does_not(small_clip: Any, tmp_path: Path) -> None:
    encoder = build("clip-vit-b16", weights=save(small_clip, tmp_path / "m.pt"))
    encoder.features(random_images(32)).sum().backward()
    assert all(p.grad is not None for p in encoder.module.parameters())
    assert not encoder.encode(random_images(32)).requires_grad


# --- text towers of transformers


@pytest.fixture
def text_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small roberta-ViT-B-32, and the files of its text tower on the hub."""
    from open_clip import factory
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base", "hf_pooler_type": "mean_pooler"}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": False}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "roberta-ViT-B-32", config)
    tokenizer = Tokenizer(WordLevel({"<pad>": 1, "<unk>": 3, "happy": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    model = {"model_type": "roberta", "vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 90}
    documents = {"config.json": json.dumps(model), "tokenizer_config.json": json.dumps(settings)}
    documents["tokenizer.json"] = tokenizer.to_str()
    return {f"roberta-base/resolve/main/{name}": content.encode() for name, content in documents.items()}


@pytest.fixture
def use_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return use


def test_a_text_tower_of_transformers_is_downloaded_once(
    text_files: dict[str, bytes], use_hub: Callable[[str], None], tmp_path: Path
) -> None:
    name = "clip:roberta-ViT-B-32/laion2b_s12b_b32k"
    with serve(text_files) as address:
        use_hub(address)
        model = new_model(name, "roberta-ViT-B-32", quick=False)
        file = save(model, tmp_path / "m.safetensors")
        with_hub = build(name, weights=file).encode_text(["happy", "sad"])
    without_hub = build(name, weights=file).encode_text(["happy", "sad"])
    np.testing.assert_array_equal(with_hub, without_hub)
    assert with_hub.shape == (2, 16) and not np.array_equal(with_hub[0], with_hub[1])


@pytest.mark.parametrize("stalled", ["config.json", "tokenizer.json"])
def test_a_text_tower_whose_download_stalls_is_reported(
    text_files: dict[str, bytes], use_hub: Callable[[str], None], stalled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STALL", 0.5)
    with serve({key: value for key, value in text_files.items() if key.endswith(stalled)}, stall=True) as address:
        use_hub(address)
        with pytest.raises(WeightsError, match="stopped sending"):
            if stalled == "config.json":
                new_model("clip:x", "roberta-ViT-B-32", quick=False)
            else:
                tokenizer_of("clip:x", "roberta-ViT-B-32")
