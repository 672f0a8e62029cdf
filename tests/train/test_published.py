"""An exported run predicts like the run, from a directory, the hub and `from_pretrained`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import Toy, make_cache

import vaflow
from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.encoders import weights as weights_module
from vaflow.errors import CorruptError, UsageError, WeightsError
from vaflow.train.run_export import Heads, PretrainedModel
from vaflow.train.run_folder import cache_of, load_run, local_run
from vaflow.train.smoothing import Smoothing, write_smoothing

COMMIT = "1" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(splits={"train": 2, "val": 2}, seconds=(8, 10))
    return make_cache(tmp_path_factory.mktemp("published") / "cache", toy)


@pytest.fixture(scope="module")
def run(cache: Cache) -> Path:
    torch.set_num_threads(1)
    return vaflow.train(cache, cache.path.parent / "a [b] *c*", epochs=1, hidden=16, device="cpu", best="each").path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "exported"
    assert main(["export", str(run), str(out)]) == 0
    return out


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> Iterator[Path]:
    """The local hub cache with the exported run as someone/model, without network access."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights_module, "ask", lambda address: "no network")
    folder = tmp_path / "models--someone--model"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for file in exported.glob("*.*"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    yield snapshot


def predictions(run: Path | str, cache_path: Path, out: Path) -> dict[str, str]:
    assert main(["predict", str(run), "--cache", str(cache_path), "--out", str(out), "-q"]) == 0
    return {file.name: file.read_text() for file in out.glob("*.csv")}


def test_the_export_predicts_like_the_run(
    run: Path, exported: Path, hub_folder: Path, cache: Cache, tmp_path: Path
) -> None:
    expected = predictions(run, cache.path, tmp_path / "run")
    assert expected
    assert predictions(exported, cache.path, tmp_path / "export") == expected
    assert predictions("hf:someone/model", cache.path, tmp_path / "hub") == expected
    assert vaflow.load("hf:someone/model").path == hub_folder
    assert vaflow.load(exported).metrics == vaflow.load(run).metrics


def test_from_pretrained_loads_every_weight(run: Path, exported: Path, tmp_path: Path) -> None:
    model, expected = PretrainedModel.from_pretrained(exported), load_run(run).model
    assert not model.training
    state = model.state_dict()
    assert set(state) == set(expected.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((exported / "config.json").read_text())
    again = PretrainedModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_the_model_card_and_configuration_are_written(run: Path, exported: Path, cache: Cache) -> None:
    card, metrics = (exported / "README.md").read_text(), vaflow.load(run).metrics
    assert r"# a \[b\] \*c\*" in card
    assert f"| mean | {metrics['ccc']['mean']:.3f} |" in card
    assert str(cache.path.parent) not in card + (exported / "config.json").read_text()


def test_onnx_outputs_equal_the_run(run: Path, cache: Cache, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert main(["export", str(run), str(tmp_path / "out"), "--onnx"]) == 0
    loaded = load_run(run)
    heads, frames = Heads(loaded.model, loaded.predictor).eval(), loaded.record.config.frames or 0
    draw = torch.Generator().manual_seed(1)
    for name in ("heads.onnx", "heads-fixed.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / "out" / name)
        inputs = {}
        for one in session.get_inputs():
            sizes = [size if isinstance(size, int) else frames for size in one.shape[1:]]
            boolean = one.type == "tensor(bool)"
            inputs[one.name] = torch.ones(3, *sizes).bool() if boolean else torch.rand(3, *sizes, generator=draw)
        va = session.run(["va"], {key: x.numpy() for key, x in inputs.items()})[0]
        with torch.inference_mode():
            expected = heads(*(inputs[key] for key in heads.input_names))[0]
        np.testing.assert_allclose(va, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hf:model", "hf:a/b/c", "hf:../x"])
def test_an_invalid_repository_id_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="hf:USER/NAME"):
        local_run(name)


def test_an_upload_without_network_suggests_the_local_directory(hub_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"hf:someone/other .* no network.* pass its folder"):
        local_run("hf:someone/other")


@pytest.mark.parametrize("file", ["../../x.safetensors", "run.py", "model.bin", "encoders/../../x.json", 7])
def test_a_configuration_cannot_reference_other_files(file: object, hub_folder: Path) -> None:
    config = json.loads((hub_folder / "config.json").read_text())
    (hub_folder / "config.json").write_text(json.dumps(config | {"files": ["model.safetensors", file]}))
    with pytest.raises(CorruptError, match="names files"):
        local_run("hf:someone/model")


def test_missing_tensors_are_reported(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(exported / "model.safetensors")
    state.pop(next(iter(state)))
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        PretrainedModel.from_pretrained(tmp_path)


def test_a_second_export_leaves_nothing_of_the_first(run: Path, cache: Cache, tmp_path: Path) -> None:
    write_smoothing(run, Smoothing("mean", 3.0))
    try:
        assert main(["export", str(run), str(tmp_path / "hub")]) == 0
    finally:
        write_smoothing(run, None)
    (tmp_path / "hub" / "heads.onnx").touch()
    (tmp_path / "hub" / "LICENSE").touch()
    (tmp_path / "hub" / "encoders").mkdir()
    (tmp_path / "hub" / "encoders" / "mine.txt").touch()
    assert main(["export", str(run), str(tmp_path / "hub")]) == 0
    named = json.loads((tmp_path / "hub" / "config.json").read_text())["files"]
    others = ("config.json", "README.md", "LICENSE", "encoders")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {*named, *others}
    assert (tmp_path / "hub" / "encoders" / "mine.txt").is_file()
    expected = predictions(run, cache.path, tmp_path / "run")
    assert predictions(tmp_path / "hub", cache.path, tmp_path / "export") == expected


def test_an_export_contains_no_paths_of_the_machine(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("item,speaker\n" + "".join(f"{item},{item}\n" for item in cache.items()))
    groups = f"{tmp_path / 'groups.csv'}:speaker"
    run = vaflow.train(cache, tmp_path / "run", epochs=1, hidden=16, device="cpu", folds=2, fold_groups=groups)
    assert main(["export", str(run.path), str(tmp_path / "hub"), "-q"]) == 0
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "hub" / file).read_text()


def test_a_directory_with_other_files_is_not_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    assert main(["export", str(run), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_directory_with_the_config_of_another_program_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "encoders").mkdir()
    for name in ("config.json", "encoders/notes.txt"):
        (tmp_path / name).write_text("{}")
    assert main(["export", str(run), str(tmp_path), "-q"]) == 2
    assert {path.name for path in tmp_path.glob("**/*.*")} == {"config.json", "notes.txt"}


def test_an_exported_run_needs_the_name_of_a_cache(exported: Path) -> None:
    with pytest.raises(UsageError, match=r"is an exported run, which does not name its cache\. Name it with --cache"):
        cache_of(exported)


def test_provenance_of_an_exported_run_states_that_its_cache_is_not_recorded(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["provenance", str(exported)]) == 0
    assert "cache     not recorded: the run was exported" in capsys.readouterr().out
