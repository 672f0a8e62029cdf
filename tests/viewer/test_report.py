"""Numbers of the report equal the run files and an independent bootstrap."""

import json
import os
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_runs import ccc, write_run

from vaflow.cache import create_cache
from vaflow.cache.schema import LABELS, StreamInfo
from vaflow.cli import main
from vaflow.errors import CorruptError, UsageError, VaflowError
from vaflow.viewer import find_predictions, list_runs, read_predictions, report
from vaflow.viewer.page import write_viewer
from vaflow.viewer.report import paired_differences, write_report
from vaflow.viewer.run_results import read_run, read_runs


def cells(page: str, run: str, score: str) -> list[str]:
    """The numbers of one row of the table of scores."""
    [row] = re.findall(rf'<tr data-run="{run}" data-score="{score}">(.*?)</tr>', page, re.S)
    return [unescape(cell).replace("\u2212", "-") for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


def test_scores_equal_metrics_json(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "full")
    write_report([tmp_path / "full"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for name in ("valence", "arousal", "mean"):
        score, (low, high) = metrics["ccc"][name], metrics["ci95"][name]
        shown = cells(page, "full", name)
        assert shown[1] == f"{score:.3f}"
        assert shown[2] == f"{low:.3f} to {high:.3f}"
        assert f'data-value="{score}"' in page  # all digits, which sorting uses
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "").replace("https://github.com/leeoniya", "")


def test_predictions_of_other_data_than_the_metrics_are_rejected(tmp_path: Path) -> None:
    write_run(tmp_path / "full")
    write_run(tmp_path / "other", seed=5, noise=0.5)
    shutil.copy(tmp_path / "other/predictions/val/clip0.csv", tmp_path / "full/predictions/val/clip0.csv")
    with pytest.raises(UsageError, match=r"not those that its metrics\.json is about.*vaflow evaluate"):
        read_run(tmp_path / "full")


def test_sums_over_clips_give_the_scores_of_the_run(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "full")
    run = read_run(tmp_path / "full")
    assert run.plane.region[:, 0].sum() == metrics["n_frames"]
    assert run.plane.histogram.sum() == 2 * metrics["n_frames"]
    squared = run.plane.region[:, 1:3].sum(axis=0) / metrics["n_frames"]
    table = np.loadtxt(tmp_path / "full" / "predictions" / "val" / "clip0.csv", delimiter=",", skiprows=1)
    [first] = [clip for clip in run.clips if clip.clip.item == "clip0"]
    assert first.scores.ccc["valence"] == pytest.approx(ccc(table[:, 2], table[:, 4]), abs=1e-12)
    assert first.scores.rmse["arousal"] == pytest.approx(np.sqrt(np.mean((table[:, 3] - table[:, 5]) ** 2)))
    assert np.all(squared > 0)


def test_runs_on_one_dimension_are_reported(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "full")
    metrics["ccc"]["arousal"] = None
    (tmp_path / "full" / "metrics.json").write_text(json.dumps(metrics))
    for file in (tmp_path / "full" / "predictions" / "val").glob("*.csv"):
        header, *rows = file.read_text().splitlines()
        column = header.split(",").index("label_arousal")
        blank = [",".join("" if k == column else x for k, x in enumerate(row.split(","))) for row in rows]
        file.write_text("\n".join([header, *blank]) + "\n")
    write_report([tmp_path / "full"], tmp_path / "report.html")
    assert cells((tmp_path / "report.html").read_text(), "full", "arousal")[1] == "\u2013"


def test_differences_equal_a_bootstrap_by_definition(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", seed=1, noise=0.3), write_run(tmp_path / "two", seed=2, noise=0.05)
    runs = read_runs([tmp_path / "one", tmp_path / "two"])
    [row] = paired_differences(runs)
    difference, low, high, p = row["scores"]["mean"]
    assert difference == pytest.approx(two["ccc"]["mean"] - one["ccc"]["mean"], abs=1e-6)
    tables = [
        [np.loadtxt(p, delimiter=",", skiprows=1) for p in sorted((tmp_path / name / "predictions/val").glob("*.csv"))]
        for name in ("one", "two")
    ]
    rng, drawn = np.random.default_rng(7), []
    for _ in range(600):
        chosen = rng.integers(6, size=6)
        both = [np.concatenate([table[i] for i in chosen]) for table in tables]
        means = [np.mean([ccc(t[:, 2], t[:, 4]), ccc(t[:, 3], t[:, 5])]) for t in both]
        drawn.append(means[1] - means[0])
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert 2**-5 <= p <= 1


def test_runs_on_other_videos_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", clips=["clip0", "other"])
    [difference] = paired_differences(read_runs([tmp_path / "one", tmp_path / "two"]))
    assert "not scored on the same" in difference["problem"]


def test_runs_on_other_labels_are_not_compared(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    for file in (tmp_path / "two" / "predictions" / "val").glob("*.csv"):
        header, *rows = file.read_text().splitlines()
        table = [row.split(",") for row in rows]
        turned = [",".join([*row[:2], *(f"{-float(x):.6f}" for x in row[2:])]) for row in table]
        file.write_text("\n".join([header, *turned]) + "\n")
    [difference] = paired_differences(read_runs([tmp_path / "one", tmp_path / "two"]))
    assert "not scored on the same labels" in difference["problem"]


def test_runs_with_equal_names_are_distinguished(tmp_path: Path) -> None:
    for name in ("a/run", "b/run"):
        write_run(tmp_path / name)
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == ["a/run", "b/run"]


def test_tiny_encoders_mark_the_report_as_a_demonstration(tmp_path: Path) -> None:
    write_run(tmp_path / "real")
    write_run(tmp_path / "tiny", encoder="clip-tiny")
    for name, marked in (("real", False), ("tiny", True)):
        write_report([tmp_path / name], tmp_path / f"{name}.html")
        assert ("Demonstration." in (tmp_path / f"{name}.html").read_text()) == marked


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'&"
    write_run(tmp_path / "run", clips=[hostile, "plain"], encoder="</script><script>alert(2)</script>")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert "<script>alert" not in page
    assert hostile in unescape(page)


@pytest.mark.parametrize("pattern", ["config.toml", "metrics.json", "predictions/*/*.csv"])
def test_named_pipes_in_a_run_do_not_block(tmp_path: Path, pattern: str) -> None:
    write_run(tmp_path / "run")
    file = next((tmp_path / "run").glob(pattern))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(VaflowError, match=r"not a regular file|are not those that its metrics\.json is about"):
        read_run(tmp_path / "run")
    assert len(list(list_runs(tmp_path))) == 1


def test_a_run_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.json").open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(CorruptError, match=r"Cannot read the run.*metrics\.json"):
        read_run(tmp_path / "run")


def test_the_command_writes_the_page_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][0]["ccc"] == metrics["ccc"]
    assert (tmp_path / "report.html").is_file()


def test_a_directory_without_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert "is not a finished run" in capsys.readouterr().err


def test_an_unfinished_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 2
    message = capsys.readouterr().err
    assert "run is not a finished run" in message and "Cannot read" not in message


def test_the_list_of_runs_fits_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = write_run(tmp_path / "study" / "transformer")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["runs", str(tmp_path)]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "valence", "arousal", "mean", "95", "%", "split", "temporal", "seed"]
    low, high = metrics["ci95"]["mean"]
    assert f"  {low:.3f}..{high:.3f}  " in row and len(row) <= 80
    assert main(["runs", str(tmp_path), "-v"]) == 0
    text = capsys.readouterr().out
    assert "  fusion: " in text and "  streams: " in text


def test_runs_lists_finished_unfinished_and_damaged_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = write_run(tmp_path / "study" / "full")
    write_run(tmp_path / "half")
    (tmp_path / "half" / "metrics.json").unlink()
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "metrics.json").write_text("{")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    lines = {line["path"]: line for line in json.loads(capsys.readouterr().out)}
    assert {path: line["status"] for path, line in lines.items()} == {
        "study/full": "done", "half": "not finished", "bad": "damaged",
    }  # fmt: skip
    assert lines["study/full"]["ccc"] == metrics["ccc"]
    assert main(["runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{metrics['ccc']['mean']:.3f}" in text
    assert "half (not finished)  " in text and "bad (damaged)  " in text


def test_smoothed_scores_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = write_run(tmp_path / "runs" / "smooth")
    metrics["smoothing"] = {"kind": "mean", "seconds": 2.0, "chosen_on": "val"}
    (tmp_path / "runs" / "smooth" / "metrics.json").write_text(json.dumps(metrics))
    write_run(tmp_path / "runs" / "plain")
    write_report([tmp_path / "runs" / "smooth"], tmp_path / "report.html")
    line = "smooth: val: 1200 labelled frames of 6 videos; smoothed: mean, 2 s, tuned on this split; the score is"
    assert f"{line} optimistic" in (tmp_path / "report.html").read_text()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    head, _, plain, smooth = capsys.readouterr().out.splitlines()
    assert head.endswith("smoothing") and plain.endswith("none") and smooth.endswith("mean, 2 s, tuned on val")


def test_clips_that_changed_in_the_cache_since_they_were_scored_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = create_cache(tmp_path / "cache")
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {}))
    arrays = {"time": np.arange(2.0), "value": np.zeros((2, 2), np.float32), "valid": np.ones((2, 2), bool)}
    write_run(tmp_path / "run", clips=["same", "changed", "dropped"])
    file = tmp_path / "run/predictions/val/sources.json"
    sources = json.loads(file.read_text()) | {"cache": str(cache.path)}
    for item in ("same", "changed", "dropped"):
        attempt = cache.write(LABELS, item, arrays, meta={"split": "val"}).attempt
        sources["items"][item]["records"][LABELS] |= {"attempt": attempt}
    file.write_text(json.dumps(sources))
    assert read_run(tmp_path / "run").outdated == ()
    assert main(["runs", str(tmp_path)]) == 0
    assert "outdated" not in capsys.readouterr().out
    cache.write(LABELS, "changed", arrays, meta={"split": "val"})
    cache.drop(LABELS, "dropped")
    cache.write(LABELS, "other", arrays, meta={"split": "test"})
    assert read_run(tmp_path / "run").outdated == ("changed", "dropped")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    message = "these clips of split val have changed since it was scored: changed, dropped"
    assert message in (tmp_path / "report.html").read_text()
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "run (outdated)" in printed and f"run: {message}. Score again: vaflow evaluate {tmp_path}" in printed
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["outdated"] == ["changed", "dropped"]
    cache.write(LABELS, "other", arrays, meta={"split": "val"})
    assert read_run(tmp_path / "run").outdated == ("changed", "dropped", "other"), "it joined the split"
    for item in ("same", "changed", "other"):
        cache.drop(LABELS, item)
    cache.write(LABELS, "same", arrays)
    assert [line.outdated for line in list_runs(tmp_path)] == [("same", "changed", "dropped")], "the split is empty"


def test_the_list_of_runs_does_not_connect_to_object_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run")
    file = tmp_path / "run/predictions/val/sources.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cache": "s3://bucket/cache"}))
    monkeypatch.setattr("vaflow.viewer.open_cache", pytest.fail)
    assert [line.outdated for line in list_runs(tmp_path)] == [()]


def test_a_cache_that_was_moved_with_its_run_is_compared(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "old/cache")
    cache.declare(StreamInfo(LABELS, "labels", 0, "float32", {}))
    arrays = {"time": np.arange(2.0), "value": np.zeros((2, 2), np.float32), "valid": np.ones((2, 2), bool)}
    write_run(tmp_path / "old/run", clips=["a"])
    for name in ("config.toml", "predictions/val/sources.json"):
        file = tmp_path / "old/run" / name
        file.write_text(file.read_text().replace("/no/such/cache", str(cache.path)))
    sources = json.loads(file.read_text())
    attempt = cache.write(LABELS, "a", arrays, meta={"split": "val"}).attempt
    sources["items"]["a"]["records"][LABELS] |= {"attempt": attempt}
    file.write_text(json.dumps(sources))
    config = tmp_path / "old/run/config.toml"
    config.write_text('cache_relative = "../cache"\n' + config.read_text())
    (tmp_path / "old").rename(tmp_path / "new")
    assert [line.outdated for line in list_runs(tmp_path / "new")] == [()]
    create_cache(tmp_path / "new/cache").write(LABELS, "a", arrays)
    assert [line.outdated for line in list_runs(tmp_path / "new")] == [("a",)]
    assert read_run(tmp_path / "new/run").outdated == ("a",)


def test_predictions_outside_of_a_run_have_its_region_centers(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    folder = tmp_path / "run/predictions/val"
    sources = json.loads((folder / "sources.json").read_text())
    for stated, expected in (
        ({}, (0.66, 0.45)),
        ({"centers": 1, "sigma": 0.6}, (1, 0.6)),
        ({"centers": "x"}, (0.66, 0.45)),
    ):
        (folder / "sources.json").write_text(json.dumps(sources | stated))
        found = find_predictions(folder)
        assert (found.centers, found.sigma) == expected


def test_predictions_of_an_earlier_run_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(tmp_path / "run", clips=["a", "b", "c"])
    folder = tmp_path / "run/predictions/val"
    find_predictions(folder)
    assert not caplog.messages
    sources = json.loads((folder / "sources.json").read_text())
    del sources["items"]["b"]
    (folder / "sources.json").write_text(json.dumps(sources))
    find_predictions(folder)
    assert caplog.messages == [
        f"{folder / 'sources.json'} does not list b: another run, or an earlier version of this one, predicted them"
    ]
    with pytest.raises(UsageError, match=r"has no predictions.*Got: no such file or directory"):
        find_predictions(tmp_path / "none")


def test_labels_between_rows_without_a_label_are_drawn(tmp_path: Path, open_page: Any) -> None:
    lines = [f"{k},{k / 25:.2f},0.5,0.5,{',' if k % 5 != 1 else '-0.5,-0.5'}" for k in range(101)]
    (tmp_path / "a.csv").write_text("\n".join(["frame,time,valence,arousal,label_valence,label_arousal", *lines]))
    table = read_predictions(tmp_path / "a.csv")
    assert table.label is not None
    assert report._path(table.label[:12, 0]) == "M27.3 37.0h2M163.6 37.0h2M300.0 37.0h2"
    page = open_page(write_viewer(tmp_path / "a.csv", tmp_path / "view").page)
    page.wait_for_selector("html[data-ready]")
    drawn = """() => {
        const canvas = document.querySelector('[data-trace=valence] canvas'), context = canvas.getContext('2d');
        const [r, g, b] = vaflow.color('label').match(/[0-9a-f]{2}/gi).map((text) => parseInt(text, 16));
        const { data } = context.getImageData(0, canvas.height / 2, canvas.width, canvas.height / 2 - 22);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) {
            const off = Math.max(Math.abs(data[i] - r), Math.abs(data[i + 1] - g), Math.abs(data[i + 2] - b));
            count += off < 40;
        }
        return count;
    }"""
    assert page.evaluate(drawn) > 100
