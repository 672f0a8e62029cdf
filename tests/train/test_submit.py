"""The submission file, read by an independent reader: prediction files, rows, frame numbers."""

import csv
import json
from pathlib import Path

import pytest
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.cli import main
from vaflow.errors import DataError, FingerprintError, UsageError
from vaflow.train.config import TrainConfig
from vaflow.train.submit import read_sample, submit_run
from vaflow.train.train_run import train_run

HEADER = "image_location,valence,arousal"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("submit") / "cache")


@pytest.fixture(scope="module")
def unlabelled(cache: Cache) -> Cache:
    """The same features without annotation."""
    return make_cache(cache.path.parent / "unlabelled", Toy(targets=()))


@pytest.fixture(scope="module")
def run(cache: Cache) -> Path:
    out = cache.path.parent / "run"
    train_run(cache, TrainConfig(hidden=8, epochs=2), out, tensorboard=False, figures=False)
    return out


@pytest.fixture(scope="module")
def predicted(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Trial -> (valence, arousal) of every frame, from the run's prediction files of its labelled split."""
    tables = {}
    for path in sorted((run / "predictions" / "val").glob("*.csv")):
        with path.open(newline="") as file:
            tables[path.stem] = [(float(row["valence"]), float(row["arousal"])) for row in csv.DictReader(file)]
    return tables


def sample_file(folder: Path, rows: list[str], *, header: str = HEADER, end: str = "\n") -> Path:
    path = folder / "sample.txt"
    path.write_bytes(end.join([header, *rows, ""]).encode())
    return path


def read(path: Path) -> list[tuple[str, float, float]]:
    first, *lines = path.read_text().split("\n")
    assert first == HEADER
    assert lines.pop() == "", "the file ends with a newline"
    return [(location, float(v), float(a)) for location, v, a in (line.split(",") for line in lines)]


def check(path: Path, rows: list[str], predicted: dict[str, list[tuple[float, float]]]) -> None:
    """Assert that every row of the sample, in order, has the prediction at its frame number."""
    rows_read = read(path)
    assert [location for location, _, _ in rows_read] == [row.split(",")[0] for row in rows]
    for location, valence, arousal in rows_read:
        trial, name = location.split("/")
        expected = predicted[trial][int(name.split(".")[0]) - 1]
        assert (valence, arousal) == pytest.approx(expected, abs=2e-6)


def test_submission_rows_follow_the_sample_order(
    cache: Cache, run: Path, predicted: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    assert len(predicted) == 3
    rows = [f"{trial}/{k:05d}.jpg,-5,-5" for trial in ("val2", "val0") for k in (7, 3, 1, 100, 2)]
    rows += [f"val1/{k:05d}.jpg,0,0" for k in range(1, len(predicted["val1"]) + 1)]
    rows.append("val0/00050.jpg,0.1,0.1")
    done = submit_run(run, cache, sample_file(tmp_path, rows), tmp_path / "out.txt")
    assert (done.rows, done.trials, done.held) == (len(rows), 3, 0)
    check(tmp_path / "out.txt", rows, predicted)


def test_labels_are_not_required(
    unlabelled: Cache, run: Path, predicted: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    rows = [f"{trial}/{k:05d}.jpg,0,0" for trial in predicted for k in range(1, len(predicted[trial]) + 1)]
    submit_run(run, unlabelled, sample_file(tmp_path, rows), tmp_path / "out.txt")
    check(tmp_path / "out.txt", rows, predicted)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_samples_with_other_line_endings_are_read(
    cache: Cache, run: Path, predicted: dict[str, list[tuple[float, float]]], tmp_path: Path, end: str
) -> None:
    rows = ["val1/00002.jpg,,", "val1/00001.jpg,0,0"]
    path = sample_file(tmp_path, [*rows, "", ""], header="\ufeffimage_location, valence, arousal", end=end)
    submit_run(run, cache, path, tmp_path / "out.txt")
    check(tmp_path / "out.txt", rows, predicted)


def test_frame_numbers_are_parsed_as_integers(tmp_path: Path) -> None:
    (row,) = read_sample(sample_file(tmp_path, ["a/b_left/00010.jpg,0,0"]))
    assert (row.location, row.trial, row.number) == ("a/b_left/00010.jpg", "a/b_left", 10)


def test_unknown_trials_are_counted(cache: Cache, run: Path, tmp_path: Path) -> None:
    rows = [f"nobody{i}/{k:05d}.jpg,0,0" for i in range(7) for k in (1, 2)] + ["val0/00001.jpg,0,0"]
    with pytest.raises(DataError, match=r"14 of 15 rows .* 14 rows of 7 trials not in the cache: .*nobody4 and 2 more"):
        submit_run(run, cache, sample_file(tmp_path, rows), tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()


def test_a_sample_with_only_unknown_trials_is_rejected(cache: Cache, run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 1 rows"):
        submit_run(run, cache, sample_file(tmp_path, ["nobody/00001.jpg,0,0"]), tmp_path / "out.txt")


def test_trials_without_features_are_counted(run: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    for stream in (VISUAL, AUDIO):
        cache.drop(stream, "val1")
    rows = ["val1/00001.jpg,0,0", "val1/00002.jpg,0,0", "val0/00001.jpg,0,0"]
    with pytest.raises(DataError, match=r"2 of 3 rows .*1 trial without any features: val1.*Extract these"):
        submit_run(run, cache, sample_file(tmp_path, rows), tmp_path / "out.txt")


def test_frames_beyond_the_end_are_counted_or_held(
    cache: Cache, run: Path, predicted: dict[str, list[tuple[float, float]]], tmp_path: Path
) -> None:
    last = len(predicted["val0"])
    rows = [f"val0/{k:05d}.jpg,0,0" for k in range(last - 1, last + 3)]
    sample, out = sample_file(tmp_path, rows), tmp_path / "out.txt"
    with pytest.raises(DataError, match=rf"2 of 4 rows .*\({last} frames\).*--hold 2 repeats"):
        submit_run(run, cache, sample, out, hold=0)
    with pytest.raises(DataError, match="1 of 4 rows"):
        submit_run(run, cache, sample, out)  # one row is held by default
    assert submit_run(run, cache, sample, out, hold=2).held == 2
    assert submit_run(run, cache, sample_file(tmp_path, rows[:3]), out).held_in == {"val0": 1}
    assert submit_run(run, cache, sample_file(tmp_path, rows), out, hold=2).held_in == {"val0": 2}
    longer = {"val0": predicted["val0"] + predicted["val0"][-1:] * 2}
    check(out, rows, longer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["val0/00001.jpg,0,0", "val0,0,0", "val0/x.jpg,0,0"], "2 malformed lines.*line 3: 'val0,0,0', line 4"),
        (["val0/00000.jpg,0,0"], "1 malformed line"),
        (["val0/00001.jpg,0"], "1 malformed line"),
        (["val0/00001.jpg 0 0"], "1 malformed line"),
        (["val0/00001.jpg,0,0", "", "val0/00002.jpg,0,0"], "1 malformed line.*line 3"),
        (["val0/00001.jpg,0,0", "val0/00002.jpg,0,0", "val0/00001.jpg,1,1"], "1 row more than once.*val0/00001.jpg"),
        ([], "has no rows"),
    ],
)
def test_sample_errors_name_the_line(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_sample(sample_file(tmp_path, rows))


def test_other_files_are_rejected_as_sample(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read"):
        read_sample(tmp_path / "none.txt")
    with pytest.raises(UsageError, match=r"the header image_location,valence,arousal.*Got: valence,arousal"):
        read_sample(sample_file(tmp_path, ["0,0"], header="valence,arousal"))
    (tmp_path / "sample.txt").write_text("")
    with pytest.raises(UsageError, match="an empty file"):
        read_sample(tmp_path / "sample.txt")


def test_features_of_another_encoder_are_rejected(run: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "cache", Toy(widths=(13, 10)))
    with pytest.raises(FingerprintError, match="other settings"):
        submit_run(run, other, sample_file(tmp_path, ["val0/00001.jpg,0,0"]), tmp_path / "out.txt")


def test_command(cache: Cache, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample, out = sample_file(tmp_path, ["val0/00001.jpg,0,0", "val1/00002.jpg,0,0"]), tmp_path / "new" / "out.txt"
    options = ["--sample", str(sample), "--out", str(out)]
    assert main(["submit", str(run), "--cache", str(cache.path), *options]) == 0
    assert f"2 rows of 2 trials: {out}" in capsys.readouterr().out
    first = out.read_bytes()
    assert main(["submit", str(run), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 2, "trials": 2, "held": 0, "file": str(out)}
    assert out.read_bytes() == first
    sample_file(tmp_path, ["nobody/00001.jpg,0,0"])
    assert main(["submit", str(run), *options]) == 1
    assert "1 of 1 rows" in capsys.readouterr().err
    assert out.read_bytes() == first, "a failure must keep the existing file"
    sample_file(tmp_path, ["nobody"])
    assert main(["submit", str(run), *options]) == 2
    assert main(["submit", str(tmp_path), *options]) == 2


def test_the_sample_is_not_overwritten(cache: Cache, run: Path, tmp_path: Path) -> None:
    sample = sample_file(tmp_path, ["val0/00001.jpg,-5,-5"])
    before = sample.read_bytes()
    with pytest.raises(UsageError, match="is the sample"):
        submit_run(run, cache, sample, tmp_path / "." / "sample.txt")
    assert sample.read_bytes() == before


@pytest.mark.parametrize("name", ["run/config.toml", "run/metrics.json", "other-sample.txt"])
def test_only_a_submission_is_overwritten(
    cache: Cache, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    sample = sample_file(tmp_path, ["val0/00001.jpg,0,0"])
    out = run.parent / name
    if not out.exists():
        out.write_bytes(sample.read_bytes())
    before = out.read_bytes()
    assert main(["submit", str(run), "--sample", str(sample), "--out", str(out)]) == 2
    assert f"--out {out} is not a submission" in capsys.readouterr().err
    assert out.read_bytes() == before
