"""`vaflow cache export`: Parquet files with the numbers of the cache."""

import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from cache_toys import arrays, small_cache, stream

from vaflow.cache import create_cache
from vaflow.cli import main

parquet = pytest.importorskip("pyarrow.parquet")


def test_every_array_is_read_back_from_parquet(tmp_path: Path, store: str) -> None:
    cache = small_cache(tmp_path / "cache", store)
    assert main(["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out")]) == 0
    rows = 0
    for file in (tmp_path / "out").glob("*/*.parquet"):
        stream = unquote(file.parent.name)
        table = parquet.read_table(file)
        for row in table.to_pylist():
            rows += 1
            stored = cache.read(stream, row["clip"])
            for name in set(row) - {"clip", "split"}:
                np.testing.assert_array_equal(np.array(row[name]), stored.arrays[name])
    assert rows == sum(len(cache.items(stream=name)) for name in cache.streams())


def test_clips_may_have_different_step_counts(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "cache")
    info = stream("audio")
    for one in (info, stream("labels")):
        cache.declare(one)
    for item, steps in (("few", 4), ("many", 7)):
        made = arrays(info, 3)
        sized = {
            name: np.resize(made[name], (3, steps, *made[name].shape[2:])) for name in ("embedding", "time", "valid")
        }
        cache.write("audio", item, made | sized)
        cache.write("labels", item, arrays(stream("labels"), 3))
    assert main(["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out")]) == 0
    rows = parquet.read_table(next((tmp_path / "out").glob("audio/*.parquet"))).to_pylist()
    assert {row["clip"]: np.array(row["embedding"]).shape[:2] for row in rows} == {"few": (3, 4), "many": (3, 7)}


def test_the_dataset_card_lists_every_file(tmp_path: Path) -> None:
    small_cache(tmp_path / "cache", "zarr")
    out = tmp_path / "out"
    assert main(["cache", "export", str(tmp_path / "cache"), str(out)]) == 0
    lines = (out / "README.md").read_text().splitlines()
    named = {json.loads(line.split(": ", 1)[1]) for line in lines if line.strip().startswith("path: ")}
    assert named == {file.relative_to(out).as_posix() for file in out.glob("*/*.parquet")}


def test_a_non_empty_directory_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_cache(tmp_path / "cache", "zarr")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert main(["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_object_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_cache(tmp_path / "cache", "zarr")
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "export", "cache", "s3://bucket/out"]) == 2
    assert "s3://bucket/out is on an object store. Expected: a local folder. Export into" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()


def test_stream_names_cannot_lead_outside_the_directory(tmp_path: Path) -> None:
    cache = create_cache(tmp_path / "cache")
    for one in (stream("visual", name=".."), stream("labels")):
        cache.declare(one)
        cache.write(one.name, "clip", arrays(one))
    (tmp_path / "unsplit.parquet").write_text("mine")
    assert main(["cache", "export", str(tmp_path / "cache"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "unsplit.parquet").read_text() == "mine"
    assert len(list((tmp_path / "out").glob("*/*.parquet"))) == 2
