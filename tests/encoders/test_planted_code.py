"""Code planted in a checkpoint, run or cache is never run: it would create a marker file."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from fake_hub import into_cache
from safetensors.torch import save_file

from vaflow.cache import Cache, create_cache
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.cli import main
from vaflow.encoders import build_encoder
from vaflow.encoders.prompts import load_prompts
from vaflow.encoders.weights import read_state_dict
from vaflow.errors import UsageError, VaflowError, WeightsError

EVIL = "clip:local-dir:planted/weights.safetensors"
SAMPLING = {"window": 4.0, "stride": 2.0, "frames": 4, "audio_steps": 4}
MODULES = ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil")
AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModel": "modeling_evil.EvilModel",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", None],
    "AutoImageProcessor": "processing_evil.EvilProcessor",
    "AutoFeatureExtractor": "processing_evil.EvilProcessor",
}


class Bomb:
    """Creates a directory when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of files that run code in permissive loaders; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")  # answers every prompt with yes
    folder, marker = tmp_path / "planted", tmp_path / "ran"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n")
    hostile = {"auto_map": AUTO_MAP, "trust_remote_code": True, "tokenizer_class": "EvilTokenizer"}
    documents: dict[str, Any] = {
        "config.json": {"model_type": "evil", "architectures": ["EvilModel"]} | hostile,
        "tokenizer_config.json": hostile,
        "preprocessor_config.json": {"sampling_rate": 16000} | hostile,
        "adapter_config.json": {"base_model_name_or_path": str(folder)},
        "open_clip_config.json": open_clip_config(folder),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb(marker)}))
    torch.save({"a": Bomb(marker)}, folder / "weights.pt")
    save_file(open_clip.CLIP(**documents["open_clip_config.json"]["model_cfg"]).state_dict(), "weights.safetensors")
    return folder


def open_clip_config(folder: Path) -> dict[str, Any]:
    small = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    text |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"trust_remote_code": True}}
    return {"model_cfg": {"embed_dim": 16, "vision_cfg": small, "text_cfg": text}, "preprocess_cfg": {}}


@pytest.fixture
def ran(planted: Path) -> Callable[[], bool]:
    return (planted.parent / "ran").exists


@pytest.fixture
def cache(planted: Path) -> Cache:
    """A cache that verifies clean, whose visual stream names the planted folder."""
    cache = create_cache(planted.parent / "cache")
    identity = {"encoder": "clip", "weights": "0", "sampling": SAMPLING, "picture": {"faces": {"source": "none"}}}
    cache.declare(StreamInfo(EVIL, "visual", 16, "float32", identity))
    cache.declare(StreamInfo(f"{EVIL}.text", "text", 16, "float32", {"encoder": "clip", "weights": "0"}))
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {"encoder": LABELS}))
    source = {"prompts": load_prompts().identity()}
    template = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    cache.write(f"{EVIL}.text", "default", {"embedding": template.mean(0), "template": template}, source=source)
    for number, split in enumerate(("train", "train", "val")):
        rng = np.random.default_rng(number)
        time, value = np.arange(0, 8, 0.5), rng.uniform(-1, 1, (16, 2)).astype(np.float32)
        embedding = rng.normal(size=(16, 16)).astype(np.float32)
        cache.write(EVIL, f"c{number}", {"embedding": embedding, "time": time, "valid": np.ones(16, bool)})
        meta = {"split": split, "group": f"c{number}", "duration": 8.0, "frames": 16, "rows": 16}
        labels = {"time": time, "value": value, "valid": np.ones((16, 2), bool)}
        cache.write(LABELS, f"c{number}", labels, meta=meta)
    return cache


@pytest.mark.parametrize(
    "name",
    [
        EVIL,
        "clip:local-dir:./planted/weights.safetensors",
        "clip:local-dir:/planted/weights.safetensors",
        "clip:hf-hub:someone/model/weights.safetensors",
        "clip:hf-hub:planted/x",
        "clip:planted/weights.safetensors",
        "clip:ViT-B-16/planted/weights.pt",
        "clip:ViT-B-16/planted/pytorch_model.bin",
        "ast:planted",
        "ast:./planted",
    ],
)
def test_no_encoder_name_runs_planted_code(planted: Path, ran: Callable[[], bool], name: str) -> None:
    with pytest.raises(VaflowError):
        build_encoder(name)
    assert not ran()


@pytest.mark.parametrize("file", ["weights.pt", "pytorch_model.bin", ""])
@pytest.mark.parametrize("name", ["clip-vit-b16", "clip-tiny", "resnet50", "vggish", "ast", "ast-tiny"])
def test_no_local_weights_run_planted_code(planted: Path, ran: Callable[[], bool], name: str, file: str) -> None:
    with pytest.raises(VaflowError):
        build_encoder(name, weights=planted / file)
    assert not ran()


def test_planted_files_in_a_valid_directory_are_not_run(
    planted: Path, ran: Callable[[], bool], small_ast: Path
) -> None:
    expected = build_encoder("ast", weights=small_ast).identity
    for file in planted.iterdir():
        if not (small_ast / file.name).exists():
            (small_ast / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "preprocessor_config.json"):
        document = json.loads((small_ast / name).read_text())
        hostile = {"auto_map": AUTO_MAP, "trust_remote_code": True, "attn_implementation": "someone/kernel"}
        hostile |= {"transformers_weights": "pytorch_model.bin", "fusion_config": {"patch_embeddings": True}}
        (small_ast / name).write_text(json.dumps(document | hostile))
    assert build_encoder("ast", weights=small_ast).identity == expected
    assert not ran()


def test_prompts_of_a_planted_stream_are_rejected(cache: Cache, ran: Callable[[], bool], capsys: Any) -> None:
    prompts = Path(load_prompts.__code__.co_filename).with_name("prompts.toml")
    Path("mine.toml").write_bytes(prompts.read_bytes())
    for choice in ([], ["--visual", EVIL]):
        assert main(["cache", "prompts", str(cache.path), "--prompts", "mine.toml", *choice]) != 0
    assert "open_clip has no such model" in capsys.readouterr().err
    assert not ran()


def test_context_vectors_on_a_planted_stream_are_rejected(cache: Cache, ran: Callable[[], bool], capsys: Any) -> None:
    options = ["--audio", "none", "--epochs", "1", "--set", "prompt_context=2", "--set", "kl_weight=1.0"]
    assert main(["train", str(cache.path), "--out", "run", "--device", "cpu", *options]) != 0
    assert "open_clip has no such model" in capsys.readouterr().err
    assert not ran()


def test_predict_rejects_a_run_of_a_planted_stream(
    cache: Cache, ran: Callable[[], bool], clips: Path, capsys: Any
) -> None:
    options = ["--audio", "none", "--epochs", "1", "--set", "kl_weight=0"]
    assert main(["train", str(cache.path), "--out", "run", "--device", "cpu", *options]) == 0
    capsys.readouterr()
    assert main(["predict", "run", str(clips / "carphone.mp4"), "--out", "predictions", "--device", "cpu"]) != 0
    assert "open_clip has no such model" in capsys.readouterr().err
    assert not ran()


def test_a_text_tower_is_not_read_from_the_working_directory(
    planted: Path, ran: Callable[[], bool], hub_cache: Path
) -> None:
    """open_clip's model list refers to hub models that a local directory could impersonate."""
    from vaflow.encoders.clip import new_model

    planted.rename("roberta-base")
    with pytest.raises(WeightsError, match=r"config\.json of the Hugging Face model id roberta-base"):
        new_model("clip:roberta-ViT-B-32/x", "roberta-ViT-B-32", quick=False)
    assert not ran()


def test_remote_code_of_a_text_tower_is_rejected_without_a_prompt(
    planted: Path, ran: Callable[[], bool], hub_cache: Path
) -> None:
    from vaflow.encoders.clip import new_model

    for file in planted.iterdir():
        into_cache(hub_cache, "roberta-base", file)
    with pytest.raises(WeightsError, match="cannot build roberta-ViT-B-32"):
        new_model("clip:roberta-ViT-B-32/x", "roberta-ViT-B-32", quick=False)
    assert not ran()


# --- resources


def test_an_archive_larger_than_declared_is_rejected(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    assert read_state_dict(tmp_path / "plain.pt")["a"].numel() == 4_000_000
    with pytest.raises(WeightsError, match="compressed archive"):
        read_state_dict(tmp_path / "bomb.pt")
    with (tmp_path / "bomb.pt").open("ab") as file:
        file.write(b"PK\x05\x06")  # hides the end record from Python's zipfile, not from torch
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        read_state_dict(tmp_path / "bomb.pt")


@pytest.mark.parametrize("claim", [{"hidden_size": 60_000}, {"num_hidden_layers": 10**8}, {"intermediate_size": 10**9}])
def test_a_configuration_larger_than_its_weights_is_rejected(small_ast: Path, claim: dict) -> None:
    config = json.loads((small_ast / "config.json").read_text())
    (small_ast / "config.json").write_text(json.dumps(config | claim))
    with pytest.raises(WeightsError, match="larger model than the weights"):
        build_encoder("ast", weights=small_ast)


def test_a_quantized_model_is_rejected(small_ast: Path) -> None:
    config = json.loads((small_ast / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (small_ast / "config.json").write_text(json.dumps(config | quantized))
    with pytest.raises(UsageError, match="quantized"):
        build_encoder("ast", weights=small_ast)


@pytest.mark.parametrize("change", [{"hidden_size": "many"}, {"hidden_act": "evil"}, {"num_attention_heads": 0}])
def test_settings_of_a_wrong_type_are_reported_in_one_message(small_ast: Path, change: dict) -> None:
    config = json.loads((small_ast / "config.json").read_text())
    (small_ast / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(VaflowError, match=r"does not load|larger model"):
        build_encoder("ast", weights=small_ast)


def test_shards_outside_the_directory_are_rejected(small_ast: Path, tmp_path: Path) -> None:
    from vaflow.encoders.huggingface_checkpoints import load_model, make_config, read_json

    config_class, model_class = _ast_classes()
    index = small_ast / "model.safetensors.index.json"
    (small_ast / "model.safetensors").rename(tmp_path / "outside.safetensors")
    config = make_config(config_class, read_json(small_ast / "config.json"), small_ast)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(WeightsError, match="names no shards"):
        load_model(model_class, config, small_ast, index, ignored=lambda key: False)
    (tmp_path / "outside.safetensors").rename(small_ast / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    load_model(model_class, config, small_ast, index, ignored=lambda key: key.startswith("classifier."))


def _ast_classes() -> tuple[Any, Any]:
    from transformers import ASTConfig, ASTModel

    return ASTConfig, ASTModel
