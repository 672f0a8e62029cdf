"""The overlay video: frames at their times, cursor and point at the predictions, audio kept."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_clip import HEIGHT, WIDTH, write_clips

from vaflow.cli import main
from vaflow.errors import MediaError
from vaflow.predict import Predicted, PredictSummary
from vaflow.viewer import read_predictions
from vaflow.viewer.video import LABEL, MARGIN, PANEL, PREDICTION, TEXT, TRACE, write_overlay


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shorter clips than those of the pages: every frame is encoded."""
    return write_clips(tmp_path_factory.mktemp("short"), 60, 60)


def near(image: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> np.ndarray:
    return np.asarray(np.abs(image.astype(int) - color).max(axis=-1) < tolerance)


@pytest.mark.parametrize("clip", ["constant", "variable"])
def test_the_overlay_shows_the_prediction_of_every_frame(numbered: Path, tmp_path: Path, clip: str) -> None:
    table = read_predictions(numbered / "predictions" / f"{clip}.csv")
    write_overlay(numbered / "media" / f"{clip}.mp4", table, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as media:
        assert media.streams.audio[0].codec_context.name == "aac"
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in media.decode(video=0)]
    assert len(frames) == len(table.time)
    assert np.abs(np.array([time for time, _ in frames], float) - table.time).max() < 0.003
    top = max(HEIGHT, PANEL)
    for row in (10, 30, 50):
        image = frames[row][1]
        cursor = np.flatnonzero(near(image[top : top + 2 * TRACE, MARGIN:], TEXT, 60).mean(axis=0) > 0.8)
        x = table.time[row] / table.time[-1] * (image.shape[1] - MARGIN - 8)
        assert cursor.mean() == pytest.approx(x, abs=2)
        dot = np.argwhere(near(image[:PANEL, WIDTH:], PREDICTION))
        v, a = table.va[row]
        expected = np.array([16 + (1 - a) / 2 * (PANEL - 44), 28 + (v + 1) / 2 * (PANEL - 44)])
        assert np.linalg.norm(dot - expected, axis=1).min() < 3


def test_labels_between_rows_without_a_label_are_drawn(numbered: Path, tmp_path: Path) -> None:
    table = read_predictions(numbered / "predictions" / "constant.csv")
    label = np.where(np.arange(len(table.time))[:, None] % 6 == 1, -table.va, np.nan)
    write_overlay(numbered / "media" / "constant.mp4", replace(table, label=label), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as media:
        image = next(media.decode(video=0)).to_ndarray(format="rgb24")
    assert near(image[max(HEIGHT, PANEL) :, MARGIN:], LABEL).sum() > 60


def test_a_box_is_drawn_at_its_position(numbered: Path, tmp_path: Path) -> None:
    table = read_predictions(numbered / "predictions" / "constant.csv")
    boxes = np.array([[0.0, 100, 90, 200, 150], [2.0, np.nan, np.nan, np.nan, np.nan]])
    boxes[:, 1:] /= [WIDTH, HEIGHT, WIDTH, HEIGHT]
    write_overlay(numbered / "media" / "constant.mp4", table, tmp_path / "out.mp4", boxes=boxes)
    with av.open(str(tmp_path / "out.mp4")) as media:
        frames = [frame.to_ndarray(format="rgb24") for frame in media.decode(video=0)]
    yellow = lambda image: near(image[85:155, 95:205], (255, 212, 0), 90).sum()  # noqa: E731
    assert yellow(frames[5]) > 200
    assert yellow(frames[50]) == 0


def test_a_clip_without_video_is_rejected(tmp_path: Path, numbered: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\0" * 3200)
    table = read_predictions(numbered / "predictions" / "constant.csv")
    with pytest.raises(MediaError, match="has no video"):
        write_overlay(tmp_path / "a.wav", table, tmp_path / "out.mp4")


def test_predict_writes_the_page_and_the_overlays(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = numbered / "predictions" / "constant.csv"

    def predicted(run: Path, media: list[Path], out: Path, *_: object, **__: object) -> PredictSummary:
        out.mkdir()
        (out / "constant.csv").write_bytes(table.read_bytes())
        both = {"valence": 0.0, "arousal": 0.0}
        one = Predicted("constant", out / "constant.csv", out / "constant.png", 60, both, both, {"middle": 1.0})
        return PredictSummary((one,), (), out / "failures.jsonl")

    monkeypatch.setattr("vaflow.predict.predict_media", predicted)
    media, out = numbered / "media" / "constant.mp4", tmp_path / "out"
    assert main(["predict", "run", str(media), "--out", str(out), "--html", "--video"]) == 0
    assert (out / "view" / "index.html").is_file()
    with av.open(str(out / "constant.overlay.mp4")) as opened:
        assert opened.streams.video[0].frames == 60
    assert "Page:" in capsys.readouterr().out
