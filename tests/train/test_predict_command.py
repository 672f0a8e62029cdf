"""`vaflow predict` through the command line: caches, resumption, faces, summaries."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import Toy, make_cache

import vaflow.predict
from vaflow.cache import create_cache
from vaflow.cli import main
from vaflow.cli.predict import predictions_table
from vaflow.errors import FingerprintError
from vaflow.extract.config import ExtractConfig
from vaflow.files import lock_folder
from vaflow.predict import Predicted, PredictSummary
from vaflow.viewer import find_predictions

SMALL = ["--set", "hidden=8", "--lr", "1e-2", "--batch-size", "8", "--epochs", "1", "--device", "cpu", "-q"]
TINY = ["--visual", "clip-tiny", "--audio", "vggish-tiny"]


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def imported(tmp_path: Path) -> tuple[Path, Path]:
    """A run on imported features, and a cache of the same features without labels."""
    rng = np.random.default_rng(0)
    for folder, clips in (("known", "abcd"), ("new", "xy")):
        (tmp_path / folder).mkdir()
        for clip in clips:
            np.save(tmp_path / folder / f"{clip}.npy", rng.normal(size=(60, 3)).astype(np.float32))
    (tmp_path / "labels").mkdir()
    for k, clip in enumerate("abcd"):
        rows = "".join(f"{t},{np.sin(t + k):.4f},{np.cos(t):.4f}\n" for t in np.arange(0, 29, 0.5))
        (tmp_path / "labels" / f"{clip}.csv").write_text("time,valence,arousal\n" + rows)
    (tmp_path / "labels" / "splits.csv").write_text("name,split\na,train\nb,train\nc,val\nd,val\n")
    options = ["--stream", "mine", "--kind", "visual", "--rate", "2", "-q"]
    cache, new = str(tmp_path / "cache"), str(tmp_path / "new.cache")
    source = ["--from", str(tmp_path / "known"), "--labels", str(tmp_path / "labels")]
    assert main(["cache", "import", cache, *options, *source]) == 0
    assert main(["cache", "import", new, *options, "--from", str(tmp_path / "new")]) == 0
    assert main(["train", cache, "--out", str(tmp_path / "run"), *SMALL, "--kl-weight", "0"]) == 0
    return tmp_path / "run", tmp_path / "new.cache"


def test_a_run_on_imported_features_predicts_a_cache_without_labels(
    imported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = imported
    out = tmp_path / "predictions"
    assert main(["predict", str(run), "--cache", str(cache), "--out", str(out), "--device", "cpu", "--json"]) == 0
    report = {clip["item"]: clip for clip in json.loads(capsys.readouterr().out)}
    assert set(report) == {"x", "y"}
    for clip in report.values():
        rows = table_of(Path(clip["csv"]))
        assert Path(clip["png"]).is_file() and len(rows) == clip["frames"]
        valence = np.array([float(row["valence"]) for row in rows])
        assert clip["valence"] == pytest.approx(valence.mean(), abs=1e-5)
        assert clip["spread"]["valence"] == pytest.approx(valence.std(), abs=1e-5)
        assert sum(clip["regions"].values()) == pytest.approx(1)
        assert clip["seconds_without_face"] == 0 and clip["seconds_without_audio"] is None
    assert cache.is_dir()
    assert main(["predict", str(run), "--cache", str(cache), "--out", str(out), "--device", "cpu"]) == 0
    assert "region (v/a)" in capsys.readouterr().out
    labels = "frame,time,valence,arousal\n0,0.0,0.5,0.5\n"  # such a table beside a video holds labels
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "y.csv").write_text(labels)
    arguments = ["predict", str(run), "--cache", str(cache), "--out", str(tmp_path / "mine"), "--device", "cpu"]
    assert main(arguments) == 2
    assert "mine holds tables that predictions would replace" in capsys.readouterr().err
    assert (tmp_path / "mine" / "y.csv").read_text() == labels


@pytest.mark.parametrize("stds", [{}, {"valence": 0.11, "arousal": 0.12}])
def test_the_table_of_predictions_fits_80_columns(
    stds: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means, spreads = {"valence": -0.25, "arousal": 0.5}, {"valence": 0.1, "arousal": 0.2}
    regions = {"middle valence, high arousal": 1.0, "low valence, low arousal": 0.0}
    far = 1.0 if stds else None
    files = (Path("x.csv"), Path("x.png"))
    clip = Predicted("batch1_trial_012", *files, 7500, means, spreads, regions, 120.25, None, stds, far)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines = predictions_table((clip,)).splitlines()
    assert max(map(len, lines)) <= 80
    end = "0.11 0.12 100%" if stds else "mid/high 100%"
    assert " ".join(lines[2].split()) == f"batch1_trial_012 -0.25 (0.10) +0.50 (0.20) 120.2 s - {end}"


def test_predicting_further_clips_into_a_directory_keeps_the_sources_of_the_others(
    imported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, cache = imported
    out = tmp_path / "predictions"
    for source in (cache, tmp_path / "cache"):
        assert main(["predict", str(run), "--cache", str(source), "--out", str(out), "--device", "cpu", "-q"]) == 0
    assert json.loads((out / "sources.json").read_text())["items"].keys() == set("abcdxy")


def test_clips_that_another_run_predicted_into_a_directory_keep_their_provenance(
    imported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = imported
    other, out = tmp_path / "other", tmp_path / "predictions"
    shutil.copytree(run, other)
    options = ["--out", str(out), "--device", "cpu", "-q"]
    for maker, source in ((run, cache), (other, tmp_path / "cache"), (other, tmp_path / "cache")):
        assert main(["predict", str(maker), "--cache", str(source), *options]) == 0
    capsys.readouterr()
    assert main(["provenance", str(out), "--json"]) == 0
    found = {one["item"]: one for one in json.loads(capsys.readouterr().out)["predictions"]}
    runs = dict.fromkeys("abcd", str(other)) | dict.fromkeys("xy", str(run))
    assert {item: one["run"] for item, one in found.items()} == runs
    assert {one["cache"] for item, one in found.items() if item in "xy"} == {str(cache)}
    assert {one["state"] for one in found.values()} == {"same"}
    assert all(record["state"] == "same" for one in found.values() for record in one["records"].values())
    assert len(json.loads((out / "sources.json").read_text())["earlier"]) == 1
    find_predictions(out)
    assert "another run, or other weights, predicted x, y" in capsys.readouterr().err
    for gone, item in ((run, "x"), (other, "a")):  # first the earlier, then the latest maker
        gone.rename(tmp_path / "moved")
        assert main(["provenance", str(out), item]) == 0
        printed = capsys.readouterr().out
        assert f"with {gone}: missing" in printed and "weights: missing since" in printed
        (tmp_path / "moved").rename(gone)
    shutil.rmtree(run)
    shutil.rmtree(other)
    assert main(["provenance", str(out)]) == 2
    assert f"If it was moved: vaflow provenance RUN --predictions {out}" in capsys.readouterr().err


def test_runs_on_imported_features_cannot_predict_videos(
    imported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert main(["predict", str(imported[0]), str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert "vaflow predict RUN --cache CACHE" in capsys.readouterr().err
    assert main(["predict", str(imported[0]), "--out", str(tmp_path / "out")]) == 2
    assert "Nothing to predict" in capsys.readouterr().err


def test_clips_without_features_are_listed_as_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(tmp_path / "cache", Toy(seconds=(8, 14)))
    assert main(["train", str(cache.path), "--out", str(tmp_path / "run"), *SMALL]) == 0
    out = tmp_path / "out"
    command = ["predict", str(tmp_path / "run"), "--cache", str(cache.path), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    for stream in list(cache.streams()):
        if stream != "labels" and cache.has(stream, "val0"):
            cache.drop(stream, "val0")
    assert main(command) == 3
    assert "Of an earlier prediction: val0.csv" in (out / "failures.jsonl").read_text()
    assert f"{out} keeps earlier predictions of clips that failed now: val0.csv" in capsys.readouterr().err
    shutil.rmtree(out)
    assert main(command) == 3
    assert "earlier" not in (out / "failures.jsonl").read_text()
    assert "1 clip failed" in capsys.readouterr().err and "val0" in (out / "failures.jsonl").read_text()
    assert len(list(out.glob("*.csv"))) == len(cache.items()) - 1


@pytest.fixture(scope="module")
def video_run(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on two real clips, extracted with whole frames."""
    folder = tmp_path_factory.mktemp("predict")
    data = folder / "data"
    data.mkdir()
    for k, name in enumerate(("a", "b")):
        shutil.copy(clips / "obama.mp4", data / f"{name}.mp4")
        with (data / f"{name}.mp4").open(
            "ab"
        ) as file:  # an extra empty MP4 box changes the bytes, so that splits share no source
            file.write(b"\0\0\0\x08free" * k)
        rows = "".join(f"{i},{np.sin(i / 9 + k):.3f},{np.cos(i / 7):.3f}\n" for i in range(40))
        (data / f"{name}.csv").write_text("frame,valence,arousal\n" + rows)
    (data / "splits.csv").write_text("name,split\na,train\nb,val\n")
    extract = ["extract", str(data), "--out", str(folder / "cache"), *TINY, "--faces", "none", "--device", "cpu", "-q"]
    assert main(extract) == 0
    assert main(["train", str(folder / "cache"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run", data


def test_another_face_source_is_rejected_before_encoding(
    video_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = video_run
    monkeypatch.setattr(vaflow.predict, "extract", lambda *_, **__: pytest.fail("extracted"))
    command = ["predict", str(run), str(data / "a.mp4"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--faces", "centerface"]) == 2
    assert "--faces none, which is the default" in capsys.readouterr().err


def test_an_interrupted_prediction_keeps_features_of_finished_clips(
    video_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = video_run
    out = tmp_path / "out"
    command = ["predict", str(run), str(data), "--out", str(out), "--device", "cpu"]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    extract, summaries = vaflow.predict.extract, []

    def remember(*args: Any, **kwargs: Any) -> Any:
        summaries.append(extract(*args, **kwargs))
        return summaries[-1]

    monkeypatch.setattr(vaflow.predict, "extract", remember)
    with monkeypatch.context() as patch:
        patch.setattr(vaflow.predict, "write_clips", interrupt)
        assert main(command) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err
    assert main(command) == 0
    first, second = summaries
    assert first.extracted == 2 and second.extracted == 0  # the second call encodes nothing
    assert sorted(path.name for path in out.glob("*.csv")) == ["a.csv", "b.csv"]
    assert not list(out.glob(".features-*"))


def test_predictions_into_one_folder_do_not_run_at_the_same_time(
    video_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = video_run
    (tmp_path / ".features-other").mkdir()
    summary = PredictSummary((), (), tmp_path / "failures.jsonl", temporary=(tmp_path / ".features-other",))
    with lock_folder(tmp_path, "vaflow predict"):
        assert main(["predict", str(run), str(data), "--out", str(tmp_path), "--device", "cpu"]) == 2
        assert "Another `vaflow predict` is writing to" in capsys.readouterr().err
        summary.discard()
        assert summary.temporary[0].is_dir()
    summary.discard()
    assert not summary.temporary[0].exists()


def test_an_interrupted_prediction_keeps_finished_files(
    video_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = video_run
    combine, calls = vaflow.predict.ensemble_traces, []

    def interrupt_second(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return combine(*args)

    monkeypatch.setattr(vaflow.predict, "CLIPS_AT_A_TIME", 1)
    monkeypatch.setattr(vaflow.predict, "ensemble_traces", interrupt_second)
    assert main(["predict", str(run), str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert [path.name for path in (tmp_path / "out").glob("*.csv")] == ["a.csv"]


def test_regions_without_a_prompt_head_use_the_regions_of_the_run(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", Toy(splits={"train": 2, "val": 2}))
    wide, narrow = (regions_of(cache.path, tmp_path / centers, centers) for centers in ("1.9", "0.001"))
    assert wide == {"v_middle_a_middle"}, "every prediction must be nearer to 0 than to the outer centers"
    assert "v_middle_a_middle" not in narrow


def regions_of(cache: Path, out: Path, centers: str) -> set[str]:
    """Regions in the prediction files of a run without a prompt head."""
    train = ["train", str(cache), "--out", str(out / "run"), "--kl-weight", "0", "--centers", centers, *SMALL]
    assert main(train) == 0
    assert main(["predict", str(out / "run"), "--cache", str(cache), "--out", str(out / "csv"), "--device", "cpu"]) == 0
    rows = [row for path in (out / "csv").glob("*.csv") for row in table_of(path)]
    return {row["region"] for row in rows}


def test_predictions_are_not_written_into_a_cache_or_a_run(
    imported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = imported
    for out, kind in ((cache, "a cache"), (run, "a run directory")):
        (out / "failures.jsonl").write_text("{}\n")
        assert main(["predict", str(run), "--cache", str(cache), "--out", str(out), "--device", "cpu"]) == 2
        assert f"{out} is {kind}." in capsys.readouterr().err
        assert (out / "failures.jsonl").read_text() == "{}\n" and not (out / "x.csv").exists()


def test_a_missing_video_is_reported_before_a_model_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "onnx:none.onnx", "--va", "0,1", "none.mp4", "--out", str(tmp_path / "out")]) == 2
    assert "none.mp4 does not exist." in capsys.readouterr().err


def test_a_cache_without_clips_is_a_usage_error(
    imported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = imported
    empty = create_cache(tmp_path / "empty").path
    for model in ([str(run)], ["onnx:none.onnx", "--va", "0,1"]):
        assert main(["predict", *model, "--cache", str(empty), "--out", str(tmp_path / "out")]) == 2
        assert f"{empty} has no clips to predict." in capsys.readouterr().err
    assert main(["cache", "drop", str(empty), "a"]) == 2
    assert "Its clips are none." in capsys.readouterr().err


def test_features_left_by_other_weights_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existed: list[bool] = []

    def extract(dataset: object, folder: Path, settings: object, *, show_progress: bool) -> None:
        existed.append(folder.exists())
        folder.mkdir(exist_ok=True)
        raise FingerprintError(f"other weights in {folder}")

    monkeypatch.setattr(vaflow.predict, "extract", extract)
    settings, config = ExtractConfig(), vaflow.predict.PredictConfig()
    for expected in ([False], [False, True, False]):  # the second call deletes the folder and extracts again
        with pytest.raises(FingerprintError):
            vaflow.predict.ClipFeatures.of((), settings, tmp_path, config, False)
        assert existed == expected
