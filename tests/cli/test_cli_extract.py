"""`vaflow extract` at the command line: exit codes, messages, files; bad input costs itself and nothing else."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from affwild2_tree import build_affwild2, spoil_affwild2, write_video

from vaflow.cache import open_cache
from vaflow.cli import main

TINY = ["--visual", "clip-tiny", "--audio", "ast-tiny", "--device", "cpu"]


def failures(out: Path) -> dict[str, dict[str, str]]:
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {failure["item"]: failure for failure in map(json.loads, lines)}


def test_broken_clips_are_listed_and_the_others_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = build_affwild2(tmp_path / "data")
    whole = set(tree.trials)
    spoil_affwild2(tree)
    out = tmp_path / "cache"
    assert main(["extract", str(tmp_path / "data"), "--out", str(out), *TINY]) == 3
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].endswith(str(out / "failures.jsonl"))

    found = failures(out)
    assert found["novideo"]["stage"] == "open"
    assert "has no video" in found["novideo"]["message"]
    for name in ("text", "cut", "cutfront"):
        assert found[name]["error"] == "MediaError"
        assert f"{name}.mp4" in found[name]["message"]
    assert found["badlabels"]["stage"] == "labels"
    assert "later" in found["badlabels"]["message"]
    assert "7" in found["badlabels"]["message"]
    assert set(found) == {"novideo", "text", "cut", "cutfront", "badlabels"}
    extracted = set(open_cache(out).items())
    assert whole - {"smile"} <= extracted
    assert not extracted & set(found)


def test_a_file_with_sound_only_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with av.open(str(root / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    assert main(["extract", str(root), "--out", str(tmp_path / "cache"), *TINY]) == 1, "every item failed"
    assert "no video stream" in failures(tmp_path / "cache")["song"]["message"]


@pytest.fixture
def one_clip(tmp_path: Path) -> Path:
    root = tmp_path / "one"
    write_video(root / "a.mp4", np.arange(20) / 25, sound=0.8)
    return root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--out", "c"], ["nowhere"]),
        (["{empty}", "--out", "c"], ["Expected"]),
        (["{one}", "--out", "c", "--layout", "affwild2"], ["affwild2"]),
        (["{one}", "--out", "c", "--layout", "affwild"], ["affwild2", "Did you mean"]),
        (["{one}", "--out", "c", "--visual", "clip-vit-b17"], ["clip-vit-b16", "Did you mean"]),
        (["{one}", "--out", "c", "--visual", "ast"], ["another kind", "clip-tiny"]),
        (["{one}", "--out", "c", "--weights", "clip-vit-b16=nowhere.pt"], ["nowhere.pt"]),
        (["{one}", "--out", "c", "--weights", "nopair"], ["NAME=PATH"]),
        (["{one}", "--out", "c", "--stride", "20"], ["stride", "10"]),
        (["{one}", "--out", "c", "--dtype", "float64"], ["float16"]),
        (["{one}", "--out", "c", "--shard", "3/2"], ["I/N"]),
        (["{one}", "--out", "c", "--store", "netcdf", "--visual", "none", "--audio", "none"], ["hdf5", "zarr"]),
        (["{one}", "--out", "{one}/a.mp4", "--visual", "none", "--audio", "none"], ["a.mp4"]),
        (["{one}", "--out", "{one}", "--visual", "none", "--audio", "none"], ["one"]),
        (["{one}"], ["--out"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else str(value),
)
def test_bad_usage_is_one_paragraph_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    one_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = [a.format(one=one_clip, empty=tmp_path / "empty") for a in arguments]
    assert main(["extract", *filled]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_a_cache_of_an_unknown_schema_is_refused(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    nothing = ["--visual", "none", "--audio", "none"]
    assert main(["extract", str(one_clip), "--out", str(out), *nothing]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["schema_version"] = 99
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(["extract", str(one_clip), "--out", str(out), *nothing]) == 2
    assert "99" in capsys.readouterr().err


def test_other_settings_are_refused_naming_the_field(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    base = ["extract", str(one_clip), "--out", str(out), "--visual", "clip-tiny", "--audio", "none"]
    assert main(base) == 0
    assert main([*base, "--window", "8"]) == 2
    assert "sampling.window" in capsys.readouterr().err


def test_json_and_dry_run_are_one_document(one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    base = ["extract", str(one_clip), "--out", str(out), "--visual", "clip-tiny", "--audio", "none", "--json"]
    assert main([*base, "--dry-run"]) == 0
    guess = json.loads(capsys.readouterr().out)
    assert (guess["items"], guess["items_already_there"], guess["frames_to_encode"]) == (1, 0, 2)
    assert not out.exists()
    assert main([*base, "--faces", "none"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["extracted"] == 1
    assert summary["encoded"] == {"clip-tiny": guess["frames_to_encode"]}
    assert main([*base, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["items_already_there"] == 1


def test_summary_says_what_was_there_already(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "none", "--audio", "logmel"]
    assert main(base) == 0
    assert "Extracted 1 item(s)" in capsys.readouterr().out
    assert main(base) == 0
    assert "1 item(s) were there already" in capsys.readouterr().out
    assert main([*base, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_retry_failed_does_only_what_failed(one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one_clip / "b.mp4").write_text("not yet copied")
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "none", "--audio", "none"]
    assert main(base) == 3
    write_video(one_clip / "b.mp4", np.arange(20) / 25, sound=0.8)
    capsys.readouterr()
    assert main([*base, "--retry-failed", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["extracted"], summary["done"]) == (1, 0)
    assert main([*base, "--retry-failed"]) == 2
    assert "listed as failed" in capsys.readouterr().err
