"""`--person all`: every person of a clip is an item of its own."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from composites import in_a_row, one_after_another, write

from vaflow.cache import Cache, open_cache
from vaflow.cache.maintenance import drop_clips
from vaflow.cli import main
from vaflow.datasets import open_dataset
from vaflow.datasets.clip import Clip, clip_and_person
from vaflow.encoders import build_encoder
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.errors import FingerprintError, UsageError
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.pipeline import extract, extract_with
from vaflow.extract.plan import Summary, absent_clips, check_items, is_divided, make_plan
from vaflow.files import read_failures
from vaflow.predict import items_of

CONFIG = ExtractConfig(
    visual=("clip-tiny",), audio=("vggish-tiny",), device="cpu", workers=1, person="all", pixels=True
)
SECONDS = 4


@pytest.fixture(scope="module")
def tiny_ast() -> object:
    return build_encoder("vggish-tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A clip with two people, with labels of its own and of person 2, and one with nobody."""
    folder = tmp_path_factory.mktemp("everyone") / "data"
    folder.mkdir()
    write(folder / "pair.mp4", in_a_row(clips, "wolfgang", "obama"), SECONDS)
    write(folder / "empty.mp4", one_after_another(clips, ("nobody", SECONDS)), 2)
    for name, valence in (("pair", 0.1), ("pair#2", -0.4)):
        (folder / f"{name}.csv").write_text(f"time,valence,arousal\n0,{valence},0\n{SECONDS},{valence},0\n")
    return folder


def run(data: Path, out: Path, visual: VisualEncoder, audio: AudioEncoder, config: ExtractConfig = CONFIG) -> Summary:
    audios = [audio] if config.audio else []
    return extract_with(open_dataset(data), out, config, [visual], audios, torch.device("cpu"))


@pytest.fixture(scope="module")
def extracted(data: Path, tiny_clip: VisualEncoder, tiny_ast: AudioEncoder) -> tuple[Path, Summary]:
    out = data.parent / "cache"
    return out, run(data, out, tiny_clip, tiny_ast)


@pytest.fixture
def cache(extracted: tuple[Path, Summary]) -> Cache:
    return open_cache(extracted[0])


def test_every_person_is_an_item_of_the_clips_group(cache: Cache) -> None:
    assert cache.items() == ["empty#1", "pair#1", "pair#2"]
    assert {str(cache.meta(item)["group"]) for item in ("pair#1", "pair#2")} == {"pair"}
    assert [cache.meta(f"pair#{k}")["persons"] for k in (1, 2)] == [2, 2]
    one, other = (cache.read("clip-tiny", f"pair#{k}") for k in (1, 2))
    assert one.valid.all() and other.valid.all()
    assert not (one.embedding == other.embedding).all(axis=1).any()
    assert not cache.read("clip-tiny", "empty#1").valid.any()
    assert cache.read("pixels", "pair#2").valid.all()


def test_the_audio_is_encoded_once(cache: Cache, extracted: tuple[Path, Summary]) -> None:
    one, other = (cache.read("vggish-tiny", f"pair#{k}") for k in (1, 2))
    np.testing.assert_array_equal(one.embedding, other.embedding)
    assert extracted[1].extracted == 2, "clips, not people"
    assert extracted[1].several_people == 1


def test_labels_of_a_person_are_read_from_beside_the_video(cache: Cache) -> None:
    first, second = (cache.read("labels", f"pair#{k}") for k in (1, 2))
    assert np.unique(first.value[:, 0]).tolist() == [np.float32(0.1)]
    assert np.unique(second.value[:, 0]).tolist() == [np.float32(-0.4)]
    assert not any(note.code == "table-without-video" for note in open_dataset(cache.path.parent / "data").notes)


def test_person_all_equals_extracting_each_person_by_number(
    cache: Cache, data: Path, tmp_path: Path, tiny_clip: VisualEncoder, tiny_ast: AudioEncoder
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(data / "pair.mp4", tmp_path / "data")
    config = replace(CONFIG, person="id:2", audio=(), pixels=False)
    run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast, config)
    chosen = open_cache(tmp_path / "cache").read("clip-tiny", "pair")
    np.testing.assert_array_equal(chosen.embedding, cache.read("clip-tiny", "pair#2").embedding)


def test_an_interrupted_clip_is_extracted_again_without_leftover_people(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path, clips: Path, tiny_clip: VisualEncoder, tiny_ast: object
) -> None:
    """The labels of person 1 are committed last. Then a version of the video with one person replaces the first."""
    shutil.copytree(extracted[0], tmp_path / "cache")
    shutil.copytree(data, tmp_path / "data")
    assert run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast).done == 2  # type: ignore[arg-type]
    cache = open_cache(tmp_path / "cache", writable=True)
    cache.drop("labels", "pair#1")
    assert run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast).extracted == 1  # type: ignore[arg-type]
    assert "pair#1" in open_cache(tmp_path / "cache").items()
    write(tmp_path / "data" / "pair.mp4", one_after_another(clips, ("wolfgang", 2)), 2)
    summary = run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast)  # type: ignore[arg-type]
    assert (summary.extracted, summary.changed) == (1, 1)
    after = open_cache(tmp_path / "cache")
    assert after.items() == ["empty#1", "pair#1"]
    assert not after.has("clip-tiny", "pair#2")


def test_a_person_removed_from_every_stream_is_extracted_again(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path
) -> None:
    """As by a repair of damage in every stream."""
    cache = open_cache(shutil.copytree(extracted[0], tmp_path / "cache"), writable=True)
    drop_clips(cache, ["pair#2"])
    infos = {name: info for name, info in cache.streams().items() if info.kind != "text"}
    (task,) = make_plan(cache, infos, open_dataset(data).clips, Shard()).tasks
    assert (task.clip.id, task.people, set(task.streams)) == ("pair", 2, set(infos))


def test_a_clip_whose_crops_arrive_replaces_its_people(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path, tiny_clip: VisualEncoder, tiny_ast: AudioEncoder
) -> None:
    """With crops the clip is one item. Without them, its people are items again."""
    shutil.copytree(extracted[0], tmp_path / "cache")
    dataset = open_dataset(data)
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "00001.jpg").write_bytes(open_cache(extracted[0]).read("pixels", "pair#1").images[0])
    cropped = [replace(clip, crops=(tmp_path / "crops",)) if clip.id == "pair" else clip for clip in dataset.clips]
    for clips, items in ((tuple(cropped), ["empty#1", "pair"]), (dataset.clips, ["empty#1", "pair#1", "pair#2"])):
        version = replace(dataset, clips=clips)
        extract_with(version, tmp_path / "cache", CONFIG, [tiny_clip], [tiny_ast], torch.device("cpu"))
        assert open_cache(tmp_path / "cache").items() == items
        assert open_cache(tmp_path / "cache").items(stream="clip-tiny") == items


def test_another_clip_that_is_named_like_a_person_is_kept(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path, clips: Path, tiny_clip: VisualEncoder, tiny_ast: object
) -> None:
    shutil.copytree(extracted[0], tmp_path / "cache")
    shutil.copytree(data, tmp_path / "data")
    cache = open_cache(tmp_path / "cache", writable=True)
    meta = {key: value for key, value in cache.meta("pair#2").items() if key != "clip"}
    cache.write("labels", "pair#2", cache.read("labels", "pair#2").arrays, meta=meta)
    write(tmp_path / "data" / "pair.mp4", one_after_another(clips, ("wolfgang", 2)), 2)
    run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast)  # type: ignore[arg-type]
    assert open_cache(tmp_path / "cache").has("labels", "pair#2")


def test_labels_of_a_person_whom_the_clip_does_not_show_are_named(
    extracted: tuple[Path, Summary],
    data: Path,
    tmp_path: Path,
    tiny_clip: VisualEncoder,
    tiny_ast: AudioEncoder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(extracted[0], tmp_path / "cache")
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data / "pair#2.csv", tmp_path / "data" / "pair#7.csv")
    run(tmp_path / "data", tmp_path / "cache", tiny_clip, tiny_ast)
    assert "pair: 2 people found; labels not used: pair#7.csv" in caplog.text


def test_all_unusable_label_files_of_a_clip_are_named(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "pair.mp4", tmp_path)
    for number in range(1, 6):
        (tmp_path / f"pair#{number}.csv").write_text("bad\n")
    arguments = [str(tmp_path), "--out", str(tmp_path / "cache"), "--person", "all", "--visual", "clip-tiny", "-q"]
    assert main(["extract", *arguments, "--audio", "none", "--device", "cpu"]) == 1
    message = read_failures(tmp_path / "cache")[0].message
    assert [f"pair#{number}.csv cannot be used" in message for number in range(1, 6)] == [True] * 3 + [False] * 2
    assert message.endswith("And 2 more files.")


@pytest.mark.parametrize("person", ["main", "left", "largest"])
def test_new_streams_of_another_choice_are_rejected(
    person: str, extracted: tuple[Path, Summary], data: Path, tiny_clip: VisualEncoder, tiny_ast: AudioEncoder
) -> None:
    """The stream of another encoder is new, so that its own settings cannot differ."""
    other = build_encoder("clip-tiny")
    other.name = "clip-other"
    config = replace(CONFIG, visual=("clip-other",), person=person, pixels=False)
    with pytest.raises(FingerprintError, match=f"another choice of people.*--person all.*--person {person}"):
        run(data, extracted[0], other, tiny_ast, config)  # type: ignore[arg-type]
    assert "clip-other" not in open_cache(extracted[0]).streams()


def test_clips_and_their_people_are_not_mixed(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path, tiny_clip: VisualEncoder, tiny_ast: AudioEncoder
) -> None:
    cpu, audio_only = torch.device("cpu"), replace(CONFIG, visual=(), pixels=False, person="main")
    with pytest.raises(FingerprintError, match=r"an item of every person.*--visual clip-tiny --person all"):
        extract_with(open_dataset(data), extracted[0], audio_only, [], [tiny_ast], cpu)
    extract_with(open_dataset(data), tmp_path / "cache", audio_only, [], [tiny_ast], cpu)
    with pytest.raises(FingerprintError, match="an item of every clip"):
        run(data, tmp_path / "cache", tiny_clip, tiny_ast)
    assert open_cache(tmp_path / "cache").items() == ["empty", "pair"]


def test_people_are_absent_only_if_their_clip_is_absent(cache: Cache) -> None:
    assert absent_clips(cache, {"pair", "empty"}) == {}
    assert list(absent_clips(cache, {"empty"})) == ["pair#1", "pair#2"]


def test_items_of_a_clip_are_its_people(cache: Cache) -> None:
    assert items_of(cache, ["pair", "empty"]) == ["pair#1", "pair#2", "empty#1"]


def test_predict_writes_a_file_per_person(
    extracted: tuple[Path, Summary], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "splits.csv").write_text("name,split\npair#1,train\npair#2,val\n")
    shutil.copytree(extracted[0], tmp_path / "cache")
    assert main(["cache", "splits", str(tmp_path / "cache"), str(tmp_path / "splits.csv")]) == 0
    tiny = ["--epochs", "1", "--set", "hidden=8", "--set", "shared_sources=true", "--device", "cpu"]
    assert main(["train", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), *tiny]) == 0
    arguments = [str(tmp_path / "run"), str(data / "pair.mp4"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["predict", *arguments, "--person", "all"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.csv")) == ["pair#1.csv", "pair#2.csv"]


@pytest.mark.parametrize(
    ("clip", "divided"),
    [
        (Clip("a", None, "a", Path("a.mp4"), Path("a.mp4")), True),
        (Clip("a", None, "a", None, Path("a.wav")), False),
        (Clip("a_left", None, "a", Path("a.mp4"), Path("a.mp4"), side="left"), False),
        (Clip("a", None, "a", Path("a.mp4"), Path("a.mp4"), crops=(Path("a"),)), False),
    ],
)
def test_only_clips_with_detected_faces_become_one_item_per_person(clip: Clip, divided: bool) -> None:
    assert is_divided(clip, "auto") == divided


@pytest.mark.parametrize(
    ("item", "parts"), [("a#2", ("a", 2)), ("a#0", ("a#0", 0)), ("a#b", ("a#b", 0)), ("#1", ("#1", 0)), ("a", ("a", 0))]
)
def test_an_items_name_states_clip_and_person(item: str, parts: tuple[str, int]) -> None:
    assert clip_and_person(item) == parts


@pytest.mark.parametrize("settings", [{"face_source": "none"}, {"visual": (), "pixels": False}])
def test_person_all_requires_face_detection(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--person all requires faces"):
        replace(CONFIG, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_clip_with_the_name_of_a_person_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    for name in ("talk.mp4", "talk#2.wav", "other#2.wav"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    arguments = [str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--person", "all", "--visual", "clip-tiny"]
    assert main(["extract", *arguments, *more]) == 2
    assert "Got: 'talk#2', a person of 'talk' and a clip. Rename" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="'talk#2'"):
        extract(open_dataset(tmp_path / "data"), tmp_path / "cache", CONFIG)


def test_a_clip_with_the_name_of_a_person_may_be_divided_itself() -> None:
    names = [Clip(name, None, name, Path(f"{name}.mp4")) for name in ("talk", "talk#2")]
    check_items(names, "all", "auto")  # talk#1, talk#2 and talk#2#1
