"""Shards: every clip in exactly one, balanced by duration, deterministic."""

import itertools
import os
from pathlib import Path

import av
import numpy as np
import pytest
from make_media import VideoTrack, write_media

from vaflow.datasets.clip import Clip
from vaflow.extract import plan
from vaflow.extract.config import Shard
from vaflow.extract.durations import header_seconds, lengths
from vaflow.extract.plan import shard_clips


def clips_of(seconds: list[float]) -> tuple[list[Clip], dict[str, float]]:
    clips = [Clip(f"clip{k:03d}", None, f"clip{k:03d}", None) for k in range(len(seconds))]
    return clips, {clip.id: length for clip, length in zip(clips, seconds, strict=True)}


def deal(clips: list[Clip], count: int) -> list[list[str]]:
    return [[clip.id for clip in shard_clips(clips, Shard(k, count))] for k in range(1, count + 1)]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shards_differ_by_less_than_one_clip(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound of greedy assignment; longest-first is within 4/3 of the optimum."""
    seconds = np.random.default_rng(seed).lognormal(3, 1.2, 60).round(3).tolist()
    clips, known = clips_of(seconds)
    monkeypatch.setattr(plan, "lengths", lambda _: known)
    parts = deal(clips, count)
    assert sorted(itertools.chain(*parts)) == sorted(known), "each clip is in one part"
    loads = [sum(known[item] for item in part) for part in parts]
    assert max(loads) - min(loads) <= max(seconds) + 1e-6
    assert max(loads) <= (4 / 3 - 1 / (3 * count)) * _best(seconds, count)


def _best(seconds: list[float], count: int) -> float:
    """No assignment has a smaller maximum; small sets are compared with all assignments (below)."""
    longest = sorted(seconds, reverse=True)
    pairs = longest[count - 1] + longest[count] if len(longest) > count else 0.0  # two of them share a part
    return max(sum(seconds) / count, longest[0], pairs)


@pytest.mark.parametrize("seed", range(5))
def test_longest_first_is_close_to_the_best_assignment(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = np.random.default_rng(seed).uniform(1, 100, 8).round(3).tolist()
    clips, known = clips_of(seconds)
    monkeypatch.setattr(plan, "lengths", lambda _: known)
    deals = itertools.product(range(3), repeat=len(seconds))
    best = min(max(np.bincount(d, seconds, minlength=3)) for d in deals)
    assert max(sum(known[item] for item in part) for part in deal(clips, 3)) <= (4 / 3 - 1 / 9) * best + 1e-6


def test_shards_do_not_depend_on_the_dataset_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clips, known = clips_of([5.0] * 7 + [2.0] * 6)
    monkeypatch.setattr(plan, "lengths", lambda _: known)
    assert deal(clips, 3) == deal(clips[::-1], 3)


def test_shards_are_balanced_by_duration_not_bytes(tmp_path: Path) -> None:
    """Two long small files and two short large ones: balancing by bytes would put both long clips into one shard."""
    for name in ("long1", "long2"):
        write_media(tmp_path / f"{name}.mp4", VideoTrack(tuple(range(0, 60_000, 6000))))
    for name in ("short1", "short2"):
        write_media(tmp_path / f"{name}.mp4", VideoTrack(tuple(range(0, 2000, 40)), noise=60))
    paths = sorted(tmp_path.glob("*.mp4"))
    clips = [Clip(path.stem, None, path.stem, path) for path in paths]
    sizes = {path.stem: path.stat().st_size for path in paths}
    assert min(sizes["short1"], sizes["short2"]) > 2 * max(sizes["long1"], sizes["long2"])
    first, second = deal(clips, 2)
    assert {name.rstrip("12") for name in first} == {name.rstrip("12") for name in second} == {"long", "short"}


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi"])
def test_header_durations_equal_ffmpeg(name: str, tmp_path: Path) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    rate = 25 if name == "a.avi" else None
    times = tuple(range(0, 7000, 200)) if rate is None else tuple(range(0, 7000, 40))
    path = write_media(tmp_path / name, VideoTrack(times, codec=codec, rate=rate))
    with av.open(str(path)) as container:
        assert header_seconds(path) == pytest.approx((container.duration or 0) / 1e6, abs=0.25)


def test_header_durations_of_real_clips_equal_ffmpeg(clips: Path) -> None:
    for path in [*clips.glob("*.mp4"), *clips.glob("*.mov")]:
        with av.open(str(path)) as container:
            assert header_seconds(path) == pytest.approx((container.duration or 0) / 1e6, abs=0.05)


def test_a_broken_file_is_weighted_by_its_size(tmp_path: Path, clips: Path) -> None:
    good = tmp_path / "good.mp4"
    good.write_bytes((clips / "obama.mp4").read_bytes())
    broken = {"text.mp4": b"text", "empty.mp4": b"", "noise.mkv": b"\x1a\x45\xdf\xa3" + os.urandom(5000)}
    broken |= {f"cut{n}.mp4": good.read_bytes()[:n] for n in (8, 30, 50, 1000)}
    broken |= {"loop.mp4": b"\0\0\0\x08free" * 100_000, "zero.mp4": b"\0\0\0\0ftyp" * 10}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        assert header_seconds(tmp_path / name) is None, name
    weights = lengths([Clip(p.name, None, p.name, p) for p in [*tmp_path.iterdir(), tmp_path / "absent.mp4"]])
    assert weights["good.mp4"] == pytest.approx(8.71, abs=0.01)
    assert weights["absent.mp4"] == weights["empty.mp4"] == 0
    assert weights["cut1000.mp4"] == pytest.approx(1000 / good.stat().st_size * weights["good.mp4"])
