"""`vaflow extract`: exit codes, messages, files; a bad clip affects only itself."""

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from affwild2_tree import build_affwild2, spoil_affwild2, write_video

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.extract import plan

TINY = ["--visual", "clip-tiny", "--audio", "vggish-tiny", "--device", "cpu"]


def failures(out: Path) -> dict[str, dict[str, str]]:
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {failure["item"]: failure for failure in map(json.loads, lines)}


def test_broken_clips_are_listed_and_the_others_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = build_affwild2(tmp_path / "data")
    whole = set(tree.trials)
    spoil_affwild2(tree)
    out = tmp_path / "cache"
    assert main(["extract", str(tmp_path / "data"), "--out", str(out), *TINY]) == 3
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1].endswith(str(out / "failures.jsonl"))

    listed = failures(out)
    assert listed["novideo"]["stage"] == "open"
    assert "has no video" in listed["novideo"]["message"]
    for name in ("text", "cut", "cutfront"):
        assert listed[name]["error"] == "MediaError"
        assert f"{name}.mp4" in listed[name]["message"]
    assert listed["badlabels"]["stage"] == "labels"
    assert "later" in listed["badlabels"]["message"]
    assert "7" in listed["badlabels"]["message"]
    assert set(listed) == {"novideo", "text", "cut", "cutfront", "badlabels"}
    extracted = set(open_cache(out).items())
    assert whole - {"smile"} <= extracted
    assert not extracted & set(listed)


def test_a_file_with_audio_only_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    write_video(root / "a.mp4", np.arange(20) / 25, audio_seconds=0.8)
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
def test_usage_errors_print_one_paragraph_and_exit_with_2(
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
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def test_an_unknown_schema_version_is_rejected(
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


def test_changed_settings_are_rejected_naming_the_field(
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
    assert main([*base, "--faces", "none", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["items_already_there"] == 1


def test_the_summary_counts_items_extracted_before(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "none", "--audio", "logmel"]
    assert main(base) == 0
    assert "Extracted 1 clip in" in capsys.readouterr().out
    assert main(base) == 0
    again = capsys.readouterr().out
    assert "1 clip already extracted." in again
    assert "Nothing to do." in again
    assert "times real time" not in again, "nothing was encoded"
    assert main([*base, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_changed_clip_that_fails_is_not_counted_as_extracted_again(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "none", "--audio", "logmel"]
    assert main(base) == 0
    (one_clip / "a.csv").write_text("time,valence\n0,high\n")
    capsys.readouterr()
    assert main(base) == 1
    printed = capsys.readouterr()
    assert "1 clip could not be extracted again: the cache holds earlier versions." in printed.out
    assert "extracted again: source files" not in printed.out


def test_retry_failed_extracts_only_failed_clips(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one_clip / "b.mp4").write_text("not yet copied")
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "none", "--audio", "none"]
    assert main(base) == 3
    write_video(one_clip / "b.mp4", np.arange(20) / 25, audio_seconds=0.8)
    capsys.readouterr()
    assert main([*base, "--retry-failed", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["extracted"], summary["done"]) == (1, 0)
    assert main([*base, "--retry-failed"]) == 2
    assert "listed as failed" in capsys.readouterr().err


def test_clips_removed_from_the_dataset_are_listed(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    base = ["extract", str(one_clip), "--out", str(out), "--visual", "none", "--audio", "none"]
    assert main(base) == 0
    (one_clip / "a.mp4").rename(one_clip / "renamed.mp4")
    capsys.readouterr()
    assert main(base) == 0
    error = capsys.readouterr().err
    assert f"1 clip of {out} is not in {one_clip}: a" in error
    assert f"vaflow cache drop {out} --absent {one_clip}" in error
    assert main([*base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["absent"] == ["a"]


@pytest.mark.slow
def test_urls_in_commands_keep_both_slashes(one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{tmp_path.name}/cache"
    base = ["extract", str(one_clip), "--out", url, "--visual", "none", "--audio", "none"]
    assert main(base) == 0
    (one_clip / "a.mp4").rename(one_clip / "renamed.mp4")
    capsys.readouterr()
    assert main(base) == 0
    error = capsys.readouterr().err
    assert f"1 clip of {url} is not in {one_clip}: a" in error
    assert f"vaflow cache drop {url} --absent {one_clip}" in error
    assert main([*base, "--retry-failed"]) == 2
    assert f"is listed as failed in {url}. Expected" in capsys.readouterr().err


def test_a_rerun_without_work_prints_no_speed(
    one_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["extract", str(one_clip), "--out", str(tmp_path / "cache"), "--visual", "clip-tiny", "--audio", "none"]
    assert main([*base, "--faces", "none"]) == 0
    assert "times real time" in capsys.readouterr().out
    (one_clip / "a.csv").write_text("frame,valence,arousal\n0,0.1,0.1\n")
    assert main([*base, "--faces", "none"]) == 0
    again = capsys.readouterr().out
    assert "1 clip extracted again" in again
    assert "nothing to encode" in again
    assert "times real time" not in again


EARLY_ERRORS = (
    ["--store", "netcdf"],
    ["--window", "0"],
    ["--window", "0.05", "--stride", "0.05"],
    ["--window", "1e308"],
    ["--device", "gpu"],
    ["--visual", "clip-vit-b17"],
    ["--out", "{one}"],
    ["--out", "{one}/a.mp4/cache"],
    ["--prompts", "{one}/a.mp4"],
)
ONE_INTERPRETER = """
import json, sys
from vaflow.cli import main
for arguments in json.loads(sys.argv[1]):
    print(json.dumps([main(arguments), "torch" in sys.modules]), flush=True)
"""


def test_arguments_are_validated_before_torch_is_imported(one_clip: Path) -> None:
    base = ["extract", str(one_clip), "--out", str(one_clip.parent / "c")]
    commands = [[*base, *(argument.format(one=one_clip) for argument in arguments)] for arguments in EARLY_ERRORS]
    missing = ["no-cache", "--out", str(one_clip.parent / "run")]
    training = (["train", *missing], ["ablate", *missing], ["search", *missing, "--space", "space.toml"])
    commands += training
    program = [sys.executable, "-c", ONE_INTERPRETER, json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    expected = {" ".join(arguments): [2, False] for arguments in (*EARLY_ERRORS, *training)}
    assert dict(zip(expected, results, strict=True)) == expected, done.stderr


def test_an_audio_file_is_a_clip_without_faces(tmp_path: Path) -> None:
    """Labels keep their times; the visual stream exists without valid samples."""
    root, out = tmp_path / "data", tmp_path / "cache"
    root.mkdir()
    with wave.open(str(root / "talk.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        tone = np.sin(np.arange(48000) * 0.2) * 8000
        file.writeframes(tone.astype("<i2").tobytes())
    (root / "talk.csv").write_text("time,valence,arousal\n0,0.1,0.1\n1.5,0.2,0.2\n2.5,0.3,0.3\n")
    assert main(["extract", str(root), "--out", str(out), "--pixels", *TINY]) == 0
    cache = open_cache(out)
    assert cache.items() == ["talk"]
    assert not cache.read("clip-tiny", "talk").valid.any()
    assert cache.read("vggish-tiny", "talk").valid.sum() >= 6  # of 20 steps in 10 s
    assert cache.read("labels", "talk").time.tolist() == [0.0, 1.5, 2.5]
    assert main(["cache", "verify", str(out)]) == 0


@pytest.mark.parametrize("limit", [700_000, 3_000_000], ids="{} KiB".format)
def test_an_address_space_limit_is_reported_in_one_message(one_clip: Path, tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-m", "vaflow", "extract", str(one_clip), "--out", str(tmp_path / "c"), *TINY]
    shell = f'ulimit -v {limit}; exec "$@"'
    done = subprocess.run(["bash", "-c", shell, "bash", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "memory" in done.stderr.lower()


@pytest.mark.parametrize(("level", "code"), [("1", 0), ("2", 2)])
def test_optimized_python_works_or_is_rejected(level: str, code: int) -> None:
    """PYTHONOPTIMIZE=1 removes assertions; 2 also removes docstrings, which transformers requires."""
    command = [sys.executable, "-m", "vaflow", "extract", "--help"]
    environment = os.environ | {"PYTHONOPTIMIZE": level}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("PYTHONOPTIMIZE=1" in done.stderr) == (code == 2)


def test_labels_that_may_not_belong_to_their_clips_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {
        "a": ["frame,time,valence", *(f"{k},{k / 25},0.1" for k in range(20))],
        "b": ["frame,time,valence", *(f"{k},{k / 10},0.1" for k in range(20))],
        "milliseconds": ["time,valence", *(f"{40 * k},0.1" for k in range(20))],
        "rows": ["frame,valence", *(f"{k},0.1" for k in range(25))],
    }
    for name, lines in tables.items():
        write_video(tmp_path / f"data/{name}.mp4", np.arange(20) / 25, audio_seconds=0.8)
        (tmp_path / f"data/{name}.csv").write_text("\n".join(lines) + "\n")
    command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--visual", "none"]
    assert main([*command, "--audio", "none"]) == 0
    warnings = capsys.readouterr().err
    assert "The label columns frame and time contradict each other, and frame is used: b\n" in warnings
    assert "The labels continue after the end of the clip: milliseconds\n" in warnings
    assert "The number of label rows does not fit the number of frames: rows\n" in warnings
    assert f"vaflow check {tmp_path / 'data'}" in warnings
    assert open_cache(tmp_path / "cache").meta("b").keys() == open_cache(tmp_path / "cache").meta("a").keys()


def test_an_extraction_without_a_commit_adds_no_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.mp4").write_text("no video")
    out = tmp_path / "cache"
    command = ["extract", str(tmp_path / "data"), "--out", str(out), *TINY]
    assert main(command) == 1
    assert capsys.readouterr().out == "No clip was extracted.\n"
    assert "a.mp4" in failures(out)["a"]["message"] and open_cache(out).streams() == {}
    assert main(["cache", "info", str(out)]) == 0 and main(["cache", "verify", str(out)]) == 0
    write_video(tmp_path / "data/a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    assert main([*command, "--dtype", "float32", "--window", "8"]) == 0, "the settings of the first try are gone"
    assert {"clip-tiny", "clip-tiny.text", "labels"} < open_cache(out).streams().keys()


def test_streams_of_another_process_are_compared_again_at_the_first_commit(
    one_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    command = ["extract", str(one_clip), "--out", str(out), "--visual", "none", "--audio", "none"]
    make_plan = plan.make_plan

    def plan_while_another_process_extracts(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(plan, "make_plan", make_plan)
        assert main([*command, "--dtype", "float32"]) == 0
        return make_plan(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "make_plan", plan_while_another_process_extracts)
    monkeypatch.setattr(plan.Cache, "source_stamps", lambda *_: {})
    assert main(command) == 2
    assert "dtype: cache has 'float32', now 'float16'" in capsys.readouterr().err


def test_labels_that_only_person_all_reads_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "data/a.mp4", np.arange(20) / 25, audio_seconds=0.8)
    (tmp_path / "data/a#1.csv").write_text("frame,valence\n0,0.5\n")
    for person, warned in (("main", True), ("all", False)):
        command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / person), "--dry-run"]
        assert main([*command, "--visual", "clip-tiny", "--audio", "none", "--person", person]) == 0
        assert ("none of the clip: a. Extract them with --person all" in capsys.readouterr().err) == warned
