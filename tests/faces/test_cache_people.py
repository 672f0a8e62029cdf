"""`vaflow cache people`: a cache with another choice of people equals a new extraction, and reads no video."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from composites import in_a_row, one_after_another, write

from vaflow.cache import Cache, open_cache
from vaflow.cache.verify import verify
from vaflow.cli import main

OPTIONS = ["--visual", "clip-tiny", "--audio", "ast-tiny", "--device", "cpu", "--workers", "1", "--pixels", "-q"]
SECONDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Videos of two people, of one and of nobody, and their cache with the main person. The videos are moved away."""
    folder = tmp_path_factory.mktemp("people")
    data = folder / "data"
    data.mkdir()
    write(data / "pair.mp4", in_a_row(clips, "wolfgang", "obama"), SECONDS)
    write(data / "solo.mp4", one_after_another(clips, ("wolfgang", SECONDS)), 2)
    write(data / "empty.mp4", one_after_another(clips, ("nobody", SECONDS)), 2)
    shutil.copy(clips / "obama.mp4", data / "speech.mp4")
    (data / "pair.csv").write_text(f"time,valence,arousal\n0,0.1,0\n{SECONDS},0.1,0\n")
    (data / "splits.csv").write_text("name,split\npair,train\nsolo,val\n")
    assert extract(folder, "main") in (0, 3)
    data.rename(folder / "away")
    return folder


def extract(folder: Path, person: str) -> int:
    """Extract the videos into a new cache, wherever they are now."""
    data = next(path for path in (folder / "data", folder / "away") if path.exists())
    return main(["extract", str(data), "--out", str(folder / f"{person}.fresh"), "--person", person, *OPTIONS])


def people(folder: Path, source: str, out: str, *options: str) -> int:
    return main(["cache", "people", str(folder / source), str(folder / out), "--device", "cpu", "-q", *options])


def assert_same_caches(got: Cache, expected: Cache) -> None:
    """Same streams, fingerprints, items, arrays and facts."""
    assert got.streams() == expected.streams()
    assert {name: sorted(got.source_stamps(name)) for name in got.streams()} == {
        name: sorted(expected.source_stamps(name)) for name in expected.streams()
    }
    for stream in got.streams():
        for item in expected.source_stamps(stream):
            (one, arrays), (other, wanted) = got.committed(stream, item), expected.committed(stream, item)
            assert (one.meta, one.source, one.fingerprint) == (other.meta, other.source, other.fingerprint)
            assert arrays.keys() == wanted.keys()
            for name, array in wanted.items():
                np.testing.assert_array_equal(arrays[name], array, err_msg=f"{stream} {item} {name}", strict=True)
    assert not list(verify(got))


def failed(cache: Path) -> set[str]:
    path = cache / "failures.jsonl"
    return {json.loads(line)["item"] for line in path.read_text().splitlines()} if path.exists() else set()


@pytest.mark.parametrize("person", ["id:2", "all", "left", "right", "speaking", "id:1"])
def test_another_choice_equals_a_new_extraction(folder: Path, person: str) -> None:
    code = extract(folder, person)
    assert people(folder, "main.fresh", f"{person}.chosen", "--person", person) == code
    assert_same_caches(open_cache(folder / f"{person}.chosen"), open_cache(folder / f"{person}.fresh"))
    assert failed(folder / f"{person}.chosen") == failed(folder / f"{person}.fresh")
