"""Encoders by name through every command, on real clips: extract, verify, train, evaluate, predict."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import AUDIO_MODELS, IMAGES

from vaflow.cache import open_cache
from vaflow.cache.costs import stream_costs
from vaflow.cache.maintenance import verify
from vaflow.cli import main
from vaflow.encoders.huggingface_checkpoints import LoadedModel

GRID = ["--window", "2", "--stride", "1", "--frames", "4", "--audio-steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled clips with audio, one in each split."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    for name in ("single_face.mp4", "no_face.mp4"):
        (root / name).symlink_to((clips / name).resolve())
        rows = [f"{0.1 * k:.1f},{k % 40 / 80:.3f},{k % 25 / 50 - 0.3:.3f}" for k in range(20)]
        (root / f"{Path(name).stem}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    (root / "splits.csv").write_text("name,split\nsingle_face,train\nno_face,val\n")
    return root


@pytest.fixture(scope="module")
def names(checkpoints: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Every family of transformers, some with several layers."""
    layers = {"dinov2": "@1-3", "wav2vec2": "@all", "vit": "@2"}
    visual, audio = ([f"hf:{checkpoints[n]}{layers.get(n, '')}" for n in family] for family in (IMAGES, AUDIO_MODELS))
    return visual, audio


def test_every_family_works_with_every_command(
    data: Path, names: tuple[list[str], list[str]], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visual, audio = names
    cache, run = tmp_path / "cache", tmp_path / "run"
    chosen = [option for name in visual for option in ("--visual", name)]
    chosen += [option for name in audio for option in ("--audio", name)]
    options = [*chosen, *GRID, "--faces", "none"]
    assert main(["check", str(data)]) == 0
    assert main(["extract", str(data), "--out", str(cache), *options]) == 0
    assert verify(open_cache(cache)) == []
    costs = stream_costs(open_cache(cache))
    assert costs.keys() == {*visual, *audio} and all(cost.seconds > 0 for cost in costs.values())
    assert {cost.precision for cost in costs.values()} == {"float32"} and costs[visual[0]].parameters
    stored = {name: open_cache(cache).read(name, "single_face").embedding.shape for name in (*visual, *audio)}
    assert {len(shape) for name, shape in stored.items() if "@1-3" in name} == {3}
    assert {shape[2] for name, shape in stored.items() if "@all" in name} == {4}
    few = [visual[0], audio[0], audio[-1]]
    trained = ["--visual", few[0], "--audio", few[1], "--audio", few[2], "--epochs", "2", "--device", "cpu"]
    capsys.readouterr()
    assert main(["train", str(cache), "--out", str(run), *trained, "--set", "kl_weight=0", "--set", "hidden=16"]) == 0
    assert capsys.readouterr().out.count("layers of hf:") == 2
    shares = json.loads((run / "metrics.json").read_text())["layer_shares"]
    assert {len(values) for values in shares.values()} == {3, 4}
    assert all(sum(values) == pytest.approx(1) for values in shares.values())
    assert main(["evaluate", str(run), "--cache", str(cache), "--device", "cpu"]) == 0
    out = tmp_path / "predictions"
    media = [str(clips / "single_face.mp4"), "--out", str(out), "--device", "cpu", "--faces", "none"]
    assert main(["predict", str(run), *media]) == 0
    assert (out / "single_face.csv").read_text().count("\n") > 20


@pytest.mark.slow
def test_features_of_an_older_version_of_transformers_are_used(
    data: Path, checkpoints: Mapping[str, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run, identity = tmp_path / "cache", tmp_path / "run", LoadedModel.identity
    vit = ["--visual", f"hf:{checkpoints['vit']}", "--audio", "logmel"]
    command = ["extract", str(data), "--out", str(cache), *vit, *GRID, "--faces", "none"]

    def older(model: LoadedModel, **further: Any) -> dict[str, Any]:
        made = identity(model, **further)
        return made | {"settings": made["settings"] | {"transformers_version": "5.0.0"}}

    with monkeypatch.context() as earlier:
        earlier.setattr(LoadedModel, "identity", older)
        assert main(command) == 0
    trained = ["--epochs", "1", "--device", "cpu", "--set", "kl_weight=0", "--set", "hidden=16"]
    assert main(["train", str(cache), "--out", str(run), *trained]) == 0
    assert main(command) == 0
    media = [str(clips / "single_face.mp4"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", str(run), *media]) == 0


def test_one_option_selects_layers_of_all_transformers(data: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    options = ["--visual", "clip-tiny", "--visual", "resnet-tiny", "--audio", "ast-tiny", *GRID, "--faces", "none"]
    assert main(["extract", str(data), "--out", str(cache), *options, "--layers", "1-2"]) == 0
    stored = open_cache(cache)
    assert stored.read("clip-tiny@1-2", "no_face").embedding.shape[1:] == (2, 128)
    assert stored.read("ast-tiny@1-2", "no_face").embedding.shape[2:] == (2, 128)
    assert stored.read("resnet-tiny", "no_face").embedding.ndim == 2
    trained = ["--visual", "clip-tiny@1-2", "--epochs", "1", "--set", "kl_weight=0", "--set", "hidden=16"]
    assert main(["train", str(cache), "--out", str(run), *trained, "--device", "cpu"]) == 0
    assert json.loads((run / "metrics.json").read_text())["layer_shares"].keys() == {"clip-tiny@1-2", "ast-tiny@1-2"}


def test_results_do_not_depend_on_the_clip_order(data: Path, names: tuple, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in data.glob("no_face*"):
        (alone / file.name).symlink_to(file.resolve())
    options = ["--visual", names[0][0], "--audio", names[1][0], *GRID, "--faces", "none"]
    for root, out in ((data, "both"), (alone, "one")):
        assert main(["extract", str(root), "--out", str(tmp_path / out), *options]) == 0
    for name in (names[0][0], names[1][0]):
        one, both = (open_cache(tmp_path / out).read(name, "no_face").embedding for out in ("one", "both"))
        np.testing.assert_array_equal(one, both)


@pytest.mark.slow  # their features are tested in test_timm_and_opensmile, the commands by the test before
def test_timm_onnx_and_opensmile_work_with_every_command(data: Path, clips: Path, tmp_path: Path) -> None:
    import timm
    from onnx_toys import face_model, voice_model
    from safetensors.torch import save_file

    visual = []
    for name in ("resnet10t", "convnextv2_atto", "vit_tiny_patch16_224"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(timm.create_model(name, pretrained=False).state_dict(), tmp_path / f"{name}.safetensors")
        visual.append(f"timm:{name}/{tmp_path / name}.safetensors")
    (tmp_path / "face.toml").write_text('kind = "visual"\ncolumns = [0, 8]\n')
    (tmp_path / "voice.toml").write_text('kind = "audio"\nlength = 8000\n')
    visual.append(f"onnx:{face_model(tmp_path)[1]}")
    audio = [f"onnx:{voice_model(tmp_path)[1]}", "opensmile:eGeMAPSv02", "opensmile:eGeMAPSv02/functionals"]
    chosen = [option for name in visual for option in ("--visual", name)]
    chosen += [option for name in audio for option in ("--audio", name)]
    cache, run, out = tmp_path / "cache", tmp_path / "run", tmp_path / "predictions"
    options = [*GRID, "--faces", "none", "--dtype", "float32"]
    assert main(["extract", str(data), "--out", str(cache), *chosen, *options]) == 0
    assert verify(open_cache(cache)) == []
    dims = {name: open_cache(cache).streams()[name].dim for name in (*visual[3:], *audio)}
    assert list(dims.values()) == [8, 6, 25, 88]
    trained = [*chosen, "--epochs", "1", "--device", "cpu", "--set", "kl_weight=0", "--set", "hidden=16"]
    assert main(["train", str(cache), "--out", str(run), *trained]) == 0
    assert main(["evaluate", str(run), "--cache", str(cache), "--device", "cpu"]) == 0
    media = [str(clips / "single_face.mp4"), "--out", str(out), "--device", "cpu"]
    assert main(["predict", str(run), *media]) == 0
    assert (out / "single_face.csv").read_text().count("\n") > 20
