"""`import vaflow`: light, typed functions from videos to predictions."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vaflow
from vaflow.errors import DataError, UsageError

HEAVY = ("torch", "numpy", "av", "cv2", "transformers", "open_clip", "zarr", "matplotlib", "pandas")


def test_importing_vaflow_imports_no_heavy_library() -> None:
    program = "import sys, vaflow; callable(vaflow.extract) or sys.exit(3); vaflow.load; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(run.stdout.split())


def test_extract_and_train_are_callable_packages() -> None:
    for name in ("extract", "train"):
        config = importlib.import_module(f"vaflow.{name}.config")
        package = getattr(vaflow, name)
        assert package.config is config
        assert callable(package)


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(vaflow, "no_such_" + "name")


@pytest.fixture(scope="module")
def run(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> vaflow.Run:
    """A run on two clips, made with `str` paths."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("api")
    root = folder / "videos"
    root.mkdir()
    for name, split in (("single_face", "train"), ("carphone", "val")):
        (root / f"{name}.mp4").symlink_to((clips / f"{name}.mp4").resolve())
        rows = [f"{k},{k % 40 / 80:.3f},{k % 25 / 50 - 0.3:.3f}" for k in range(60)]
        (root / f"{name}.csv").write_text("\n".join(["frame,valence,arousal", *rows]) + "\n")
        with (root / "splits.csv").open("a") as file:
            file.write(("name,split\n" if split == "train" else "") + f"{name},{split}\n")
    cache = str(folder / "cache")
    summary = vaflow.extract(
        str(root), cache, visual=["clip-tiny"], audio=["vggish-tiny"], window=2.0, stride=1.0, frames=4
    )
    assert summary.extracted == 2
    return vaflow.train(cache, str(folder / "run"), epochs=1, hidden=16, device="cpu")


def test_train_returns_the_finished_run(run: vaflow.Run) -> None:
    assert run.metrics["epochs"] == 1
    assert set(run.metrics["ccc"]) == {"valence", "arousal", "mean"}


def test_settings_that_are_paths_may_be_path_objects() -> None:
    with pytest.raises(UsageError, match=r"init requires --finetune\. Got: init=run"):
        vaflow.train("cache", "tuned", init=Path("run"))


def test_evaluate_returns_the_metrics_of_the_command(run: vaflow.Run) -> None:
    assert run.evaluate()["ccc"] == run.metrics["ccc"]


def test_predict_has_a_row_per_frame(run: vaflow.Run, clips: Path) -> None:
    frames = vaflow.load(str(run.path)).predict(str(clips / "obama.mp4"))
    assert list(frames)[:4] == ["frame", "time", "valence", "arousal"]
    assert frames["frame"].tolist() == list(range(len(frames["time"])))
    assert (np.diff(frames["time"]) > 0).all()
    assert (np.abs(frames["valence"]) <= 1).all()


def test_a_prediction_converts_to_a_data_frame(run: vaflow.Run, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    path = tmp_path / "clip.csv"
    path.write_text("frame,time,valence,arousal,face,region\n0,0.0,0.1,-0.2,1,calm\n1,0.04,,0.3,0,tense\n")
    table = vaflow.Table.read_csv(path).to_pandas()
    assert table.dtypes["frame"] == "int64"
    assert table["valence"].isna().tolist() == [False, True]
    assert table["region"].tolist() == ["calm", "tense"]


def test_an_unreadable_video_is_a_data_error(run: vaflow.Run, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"Cannot predict .*broken\.mp4"):
        run.predict(tmp_path / "broken.mp4")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        vaflow.load(tmp_path)


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="windw"):
        vaflow.extract(tmp_path, tmp_path / "cache", windw=3)


def test_settings_have_the_types_of_the_command(run: vaflow.Run) -> None:
    root, cache = run.path.parent / "videos", run.path.parent / "cache"
    same: dict[str, Any] = {"window": 2, "stride": "1", "frames": 4.0, "weights": None}
    assert vaflow.extract(root, cache, visual="clip-tiny", audio=("vggish-tiny",), **same).done == 2
    with pytest.raises(UsageError, match=r"--visual must be .*got None"):
        vaflow.extract(root, cache, visual=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--frames must be .*got 4\.5"):
        vaflow.extract(root, cache, visual=["clip-tiny"], frames=4.5)


def test_a_prediction_is_of_one_video(run: vaflow.Run) -> None:
    with pytest.raises(UsageError, match=r"videos is a folder.*vaflow predict .*--out DIR"):
        run.predict(run.path.parent / "videos")
