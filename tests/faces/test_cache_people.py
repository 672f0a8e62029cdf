"""`vaflow cache people`: a cache with another choice of people equals a new extraction, and reads no video."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from composites import cut, in_a_row, one_after_another, write

from vaflow.cache import Cache, open_cache
from vaflow.cache.maintenance import verify
from vaflow.cli import main
from vaflow.files import read_failures

OPTIONS = ["--visual", "clip-tiny", "--audio", "vggish-tiny", "--device", "cpu", "--workers", "1", "--pixels", "-q"]
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
    cut(data / "speech.mp4", clips / "obama.mp4", SECONDS)
    for name in ("pair", "speech"):
        (data / f"{name}.csv").write_text(f"time,valence,arousal\n0,0.1,0\n{SECONDS},0.3,0.2\n")
    (data / "splits.csv").write_text("name,split\npair,train\nspeech,val\n")
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


SLOW = [pytest.param(person, marks=pytest.mark.slow) for person in ("left", "right", "id:1", "all")]  # like id:2


@pytest.mark.parametrize("person", ["id:2", "speaking", *SLOW])
def test_another_choice_equals_a_new_extraction(folder: Path, person: str) -> None:
    code = extract(folder, person)
    assert people(folder, "main.fresh", f"{person}.chosen", "--person", person) == code
    assert_same_caches(open_cache(folder / f"{person}.chosen"), open_cache(folder / f"{person}.fresh"))
    assert failed(folder / f"{person}.chosen") == failed(folder / f"{person}.fresh")


@pytest.fixture(scope="module")
def everyone(folder: Path) -> Path:
    assert people(folder, "main.fresh", "everyone", "--person", "all") == 0
    return folder / "everyone"


@pytest.mark.slow  # like any other choice
def test_the_first_choice_can_be_made_again(folder: Path, everyone: Path) -> None:
    assert people(folder, everyone.name, "main.again", "--person", "main") == 0
    assert_same_caches(open_cache(folder / "main.again"), open_cache(folder / "main.fresh"))


def test_only_clips_with_several_people_store_crops(folder: Path, everyone: Path) -> None:
    cache = open_cache(folder / "main.fresh")
    images = {item: cache.read("crops", item).images for item in cache.items()}
    assert {item: len(files) for item, files in images.items() if any(files)}.keys() >= {"pair"}
    assert all(images["pair"]) and len(images["pair"]) == len(cache.read("faces", "pair").time)
    assert not any(images["solo"]) and not any(images["empty"])
    assert set(cache.read("pixels", "pair").images) < set(images["pair"])
    assert not any(open_cache(everyone).read("crops", "pair#2").images), "pair#1 has them"


def test_a_table_chooses_and_leaves_out_clips(
    folder: Path, everyone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "choices.csv"
    table.write_text("clip,person\npair,id:2\nsolo,none\nempty,\n")
    arguments = [
        "cache",
        "people",
        str(folder / "main.fresh"),
        str(tmp_path / "out"),
        "--choices",
        str(table),
        "--json",
    ]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == {"clip-tiny": SECONDS * 2}
    cache, before = open_cache(tmp_path / "out"), open_cache(folder / "main.fresh")
    assert cache.items() == ["empty", "pair", "speech"]
    assert cache.record("clip-tiny", "pair").meta["person"] == 2
    chosen = open_cache(everyone).read("clip-tiny", "pair#2")
    np.testing.assert_array_equal(cache.read("clip-tiny", "pair").embedding, chosen.embedding)
    np.testing.assert_array_equal(
        cache.read("clip-tiny", "speech").embedding, before.read("clip-tiny", "speech").embedding
    )
    assert cache.fingerprint("clip-tiny") != before.fingerprint("clip-tiny")
    assert cache.fingerprint("vggish-tiny") == before.fingerprint("vggish-tiny")
    np.testing.assert_array_equal(cache.read("labels", "pair").value, before.read("labels", "pair").value)
    assert main([*arguments, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 0
    table.write_text("clip,person\npair,id:2\nsolo,none\nspeech,none\n")
    assert main([*arguments, "--device", "cpu"]) == 0
    assert f"vaflow cache drop {tmp_path / 'out'} speech" in capsys.readouterr().err
    table.write_text("clip,person\npair,main\nsolo,none\n")
    assert main([*arguments, "--device", "cpu"]) == 2, "another choice"


def test_a_clip_without_stored_crops_is_listed_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    """As after an extraction in two runs, the second one with --chosen-only."""
    shutil.copytree(folder / "main.fresh", tmp_path / "source")
    open_cache(tmp_path / "source", writable=True).drop("crops", "pair")
    assert people(tmp_path, "source", "out", "--person", "id:2") == 3
    messages = {
        json.loads(line)["item"]: line for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    }
    assert "repeat its extraction without --chosen-only" in messages["pair"]


def test_a_person_of_a_clip_can_be_left_out(everyone: Path, tmp_path: Path) -> None:
    (tmp_path / "choices.csv").write_text("clip,person\npair#1,none\nempty,none\n")
    arguments = ["--choices", str(tmp_path / "choices.csv"), "-q"]
    assert main(["cache", "people", str(everyone), str(tmp_path / "out"), *arguments]) == 0
    cache = open_cache(tmp_path / "out")
    assert "pair#2" in cache.items() and not {"pair#1", "empty#1"} & set(cache.items())
    assert all(cache.read("crops", "pair#2").images), "the first item of the clip has the crops"
    assert cache.fingerprint("clip-tiny") == open_cache(everyone).fingerprint("clip-tiny")
    assert main(["cache", "people", str(tmp_path / "out"), str(tmp_path / "again"), "--person", "id:2", "-q"]) == 3
    assert "pair" in failed(tmp_path / "again"), "the labels of the clip were those of pair#1"


def test_an_interrupted_choice_resumes_without_encoding_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = ["cache", "people", str(folder / "main.fresh"), str(tmp_path / "out"), "--person", "id:2", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("vaflow.extract.people_from_cache.transfer", interrupt)
        assert main([*arguments, "--device", "cpu"]) == 130
    assert open_cache(tmp_path / "out").has("clip-tiny", "pair")
    assert open_cache(tmp_path / "out").items() == []
    capsys.readouterr()
    assert main([*arguments, "--device", "cpu"]) == 3, "the other clips have one person"
    assert json.loads(capsys.readouterr().out)["encoded"] == {}
    assert "pair" in open_cache(tmp_path / "out").items()


def test_a_clip_with_damaged_crops_fails_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "main.fresh", tmp_path / "cache")
    (data,) = (tmp_path / "cache" / "crops" / "pair").glob("*/data/c/0")
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    options = ["--person", "all", "--device", "cpu", "-q"]
    assert main(["cache", "people", str(tmp_path / "cache"), str(tmp_path / "out"), *options]) == 3
    assert "pair#2" in failed(tmp_path / "out")
    assert {"solo#1", "empty#1"} <= set(open_cache(tmp_path / "out").items())


def test_a_duration_that_does_not_fit_the_features_fails_its_clip(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "main.fresh", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", writable=True)
    record, arrays = cache.committed("labels", "pair")
    cache.write("labels", "pair", dict(arrays), source=record.source, meta=record.meta | {"duration": 1.0})
    assert people(tmp_path, "cache", "out", "--person", "all") == 3
    (failure,) = read_failures(tmp_path / "out")
    assert (failure.item, failure.error) == ("pair#2", "CorruptError")
    assert "the duration of 'pair' does not fit its stream 'clip-tiny'" in failure.message


def test_a_clip_with_the_name_of_a_person_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "main.fresh", tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", writable=True)
    record, arrays = cache.committed("labels", "speech")
    cache.write("labels", "pair#2", dict(arrays), source=record.source, meta=record.meta)
    assert people(tmp_path, "cache", "out", "--person", "all") == 2
    assert "names of people of other clips. Expected: a name for one item. Got: pair#2" in capsys.readouterr().err


def test_a_cache_of_the_chosen_people_only_has_no_images_of_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    data = next(path for path in (folder / "data", folder / "away") if path.exists())
    command = ["extract", str(data), "--out", str(out), *OPTIONS]
    for options in (["--chosen-only"], []):  # a later run does not add them
        assert main([*command, *options]) in (0, 3)
        cache = open_cache(out)
        assert "crops" not in cache.streams()
        for stream in ("clip-tiny", "pixels", "faces"):
            assert cache.fingerprint(stream) == open_cache(folder / "main.fresh").fingerprint(stream)
    capsys.readouterr()
    assert main(["cache", "people", str(out), str(tmp_path / "other"), "--person", "id:2"]) == 2
    assert "does not hold the crops of everyone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            None,
            ["--person", "id:9"],
            "No clip has person 9. Expected: a number of a person; people per clip: empty 0, pair 2",
        ),
        (None, ["--person", "largest"], "main, all, left, right, speaking or id:K"),
        (None, [], "Neither --person nor --choices"),
        ("clip,person\npair,id:3\n", [], "'pair' has no such person. Expected: id:1 to id:2. Got: id:3"),
        ("clip,person\npear,id:1\n", [], "Did you mean 'pair'?"),
        ("clip,person\npair,2\n", [], "none, main, left, right, speaking or id:K"),
        ("clip,person\npair,id:2\npair,id:1\n", [], "names a clip twice"),
        ("clip,who\npair,id:2\n", [], "the columns clip,person"),
        ("", [], "Got: an empty file"),
        (None, ["--choices", "missing.csv"], "Cannot read missing.csv. Expected: a table of choices"),
        ("clip; person\npair; id:3\n", [], "'pair' has no such person"),  # separated as in the other tables
        ("clip,person\npair,id:2\n", ["--person", "all"], "none, where every person is an item"),
    ],
)
def test_a_wrong_choice_is_rejected(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: str | None,
    options: list[str],
    message: str,
) -> None:
    if rows is not None:
        (tmp_path / "choices.csv").write_text(rows)
        options = [*options, "--choices", str(tmp_path / "choices.csv")]
    assert main(["cache", "people", str(folder / "main.fresh"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_extract_names_the_command_that_chooses_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = folder / "main.fresh"
    assert main(["extract", str(folder / "away"), "--out", str(cache), "--person", "left", *OPTIONS]) == 2
    assert f"vaflow cache people {cache} OTHER.cache --person left" in capsys.readouterr().err


def test_a_cache_of_an_earlier_version_stays_complete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "main.fresh", tmp_path / "cache")
    for path in ("crops", "records/crops"):
        shutil.rmtree(tmp_path / "cache" / path)
    (tmp_path / "cache" / "streams" / "crops.json").unlink()
    assert main(["extract", str(folder / "away"), "--out", str(tmp_path / "cache"), *OPTIONS[:-1]]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert main(["cache", "people", str(tmp_path / "cache"), str(tmp_path / "out"), "--person", "id:2"]) == 2
    assert "vaflow extract VIDEOS --out OTHER.cache --person id:2" in capsys.readouterr().err


def test_the_page_of_people_needs_no_videos(folder: Path, tmp_path: Path) -> None:
    assert main(["faces", str(folder / "main.fresh"), "--out", str(tmp_path / "faces.html"), "-q"]) == 0
    html = (tmp_path / "faces.html").read_text("utf-8")
    assert "<code>pair,id:2</code>" in html and "<code>pair,none</code>" in html
    assert html.count("data:image/jpeg;base64,") >= SECONDS * 4


def test_the_documented_commands_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "people.md").read_text("utf-8")
    (table,) = re.findall(r"^```\n(clip,person\n.*?)^```", page, flags=re.M | re.S)
    for name, clip in (("interview", "pair"), ("panel", "speech"), ("crowd", "solo")):
        table = table.replace(name, clip)
    (tmp_path / "choices.csv").write_text(table)
    (tmp_path / "videos.cache").symlink_to(folder / "main.fresh")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S)
    for line in block.splitlines():
        assert main([*shlex.split(line)[1:], "-q"]) == 0
    assert open_cache(tmp_path / "chosen.cache").items() == ["empty", "pair", "speech"]


def test_a_run_on_chosen_people_predicts_clips_of_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "choices.csv").write_text("clip,person\npair,id:2\n")
    assert people(folder, "main.fresh", "table", "--choices", str(tmp_path / "choices.csv")) == 0
    tiny = ["--epochs", "1", "--set", "hidden=8", "--device", "cpu", "-q"]
    assert main(["train", str(folder / "table"), "--out", str(tmp_path / "run"), *tiny]) == 0
    arguments = ["--cache", str(folder / "main.fresh"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", str(tmp_path / "run"), *arguments]) == 0
    assert "faces.choices" in capsys.readouterr().err
    assert (tmp_path / "out" / "pair.csv").exists()
