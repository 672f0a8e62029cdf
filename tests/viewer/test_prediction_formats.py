"""Exported predictions equal the CSV files; hostile names are escaped."""

import csv
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from vaflow.cli import main
from vaflow.encoders.prompts import REGION_NAMES
from vaflow.viewer import prediction_formats

RATE, FRAMES = 10.0, 47
HOSTILE = '=cmd|"a"&<b>\u202e.v1'


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    folder = tmp_path / "predictions"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("clip", HOSTILE):
        va = rng.uniform(-1, 1, (FRAMES, 2))
        rows = [f"{k},{k / RATE:.6f},{v:.6f},{a:.6f},{k % 2},v_high_a_low" for k, (v, a) in enumerate(va)]
        (folder / f"{name}.csv").write_text("\n".join(["frame,time,valence,arousal,face,region", *rows]) + "\n")
    return folder


def columns(file: Path) -> dict[str, np.ndarray]:
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("time", "valence", "arousal")}


def export(source: Path, out: Path, formats: str, *options: str) -> int:
    return main(["export", str(source), str(out), "--format", formats, *options])


def step_means(table: dict[str, np.ndarray], name: str, step: float) -> list[str]:
    number = np.floor(table["time"] / step + 1e-9)
    return [f"{table[name][number == k].mean():+.3f}" for k in np.unique(number)]


def read_textgrid(text: str) -> dict[str, list[tuple[float, float, str]]]:
    """A reader of Praat's text files: only numbers, quoted texts and <flags> count, everything else is a comment."""
    tokens = re.findall(r'"(?:[^"]|"")*"|<exists>|(?<![\w\[.])-?\d+(?:\.\d+)?(?![\w\]])', text)
    values = iter(t[1:-1].replace('""', '"') if t.startswith('"') else t for t in tokens)
    assert (next(values), next(values)) == ("ooTextFile", "TextGrid")
    start, end = float(next(values)), float(next(values))
    assert next(values) == "<exists>"
    tiers = {}
    for _ in range(int(next(values))):
        assert next(values) == "IntervalTier"
        name = next(values)
        assert (float(next(values)), float(next(values))) == (start, end)
        count = int(next(values))
        tiers[name] = [(float(next(values)), float(next(values)), next(values)) for _ in range(count)]
        assert tiers[name][0][0] == start
        assert tiers[name][-1][1] == end
        assert all(one[1] == other[0] for one, other in pairwise(tiers[name]))
    assert next(values, None) is None
    return tiers


def test_textgrid_has_the_means_of_every_step(predictions: Path, tmp_path: Path) -> None:
    assert export(predictions, tmp_path / "out", "textgrid", "--step", "0.5") == 0
    for file in predictions.glob("*.csv"):
        tiers = read_textgrid((tmp_path / "out" / f"{file.stem}.TextGrid").read_text("utf-8"))
        table = columns(file)
        for name in ("valence", "arousal"):
            assert [text for _, _, text in tiers[name]] == step_means(table, name, 0.5)
        assert tiers["region"] == [(0.0, FRAMES / RATE, REGION_NAMES[6])]


def test_textgrid_starts_at_zero_if_the_clip_starts_later(predictions: Path, tmp_path: Path) -> None:
    file = predictions / "clip.csv"
    header, *rows = file.read_text().splitlines()
    late = [re.sub(r"^(\d+),([\d.]+)", lambda m: f"{m[1]},{float(m[2]) + 1.5:.6f}", row) for row in rows]
    file.write_text("\n".join([header, *late]) + "\n")
    assert export(file, tmp_path / "out", "textgrid") == 0
    tiers = read_textgrid((tmp_path / "out" / "clip.TextGrid").read_text())
    assert tiers["valence"][0] == (0.0, 1.5, "")


def test_eaf_has_the_structure_of_elan_3(predictions: Path, tmp_path: Path) -> None:
    assert export(predictions, tmp_path / "out", "eaf", "--step", "1") == 0
    for file in predictions.glob("*.csv"):
        root = ElementTree.parse(tmp_path / "out" / f"{file.stem}.eaf").getroot()
        assert root.tag == "ANNOTATION_DOCUMENT"
        assert {"AUTHOR", "DATE", "FORMAT", "VERSION"} <= set(root.attrib)
        order = [child.tag for child in root]
        assert order == ["HEADER", "TIME_ORDER", *["TIER"] * 3, "LINGUISTIC_TYPE", *["CONSTRAINT"] * 4]
        slots = {slot.get("TIME_SLOT_ID"): int(slot.get("TIME_VALUE", "")) for slot in root.iter("TIME_SLOT")}
        assert list(slots.values()) == sorted(set(slots.values()))
        types = {kind.get("LINGUISTIC_TYPE_ID") for kind in root.iter("LINGUISTIC_TYPE")}
        ids = [one.get("ANNOTATION_ID") for one in root.iter("ALIGNABLE_ANNOTATION")]
        assert len(set(ids)) == len(ids)
        for tier in root.iter("TIER"):
            assert tier.get("LINGUISTIC_TYPE_REF") in types
            for one in tier.iter("ALIGNABLE_ANNOTATION"):
                assert slots[one.get("TIME_SLOT_REF1")] < slots[one.get("TIME_SLOT_REF2")]
        valence = root.find("TIER[@TIER_ID='valence']")
        assert valence is not None
        assert [v.text for v in valence.iter("ANNOTATION_VALUE")] == step_means(columns(file), "valence", 1.0)


def test_parquet_has_every_row_of_every_clip(predictions: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export(predictions, tmp_path / "out", "parquet") == 0
    table = parquet.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    for file in predictions.glob("*.csv"):
        name = file.stem.replace("\u202e", "\\u202e")
        rows = [k for k, clip in enumerate(table["clip"]) if clip == name]
        assert len(rows) == FRAMES
        np.testing.assert_allclose(np.array(table["arousal"])[rows], columns(file)["arousal"])


def test_the_clip_table_is_safe_for_spreadsheets(predictions: Path, tmp_path: Path) -> None:
    (predictions / "-dQw4w9WgXcQ.csv").write_text((predictions / "clip.csv").read_text())
    assert export(predictions, tmp_path / "out", "csv") == 0
    with (tmp_path / "out" / "clips.csv").open(newline="") as file:
        rows = {row["clip"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"clip", "-dQw4w9WgXcQ", "'" + HOSTILE.replace("\u202e", "\\u202e")}
    mean = columns(predictions / "clip.csv")["valence"].mean()
    assert float(rows["clip"]["valence_mean"]) == pytest.approx(mean, abs=1e-6)
    assert (rows["clip"]["seconds"], rows["clip"]["face_share"]) == ("4.700", f"{23 / 47:.4f}")


def test_an_unknown_format_is_rejected(predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(predictions, tmp_path / "out", "textgird") == 2
    assert "Did you mean 'textgrid'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_unchanged_exports_are_replaced(
    predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert export(predictions, out, "csv,eaf") == export(predictions, out, "csv,eaf,textgrid", "--step", "1") == 0
    annotated = (out / "clip.eaf").read_text().replace("<TIER ", "<TIER X='by hand' ", 1)
    (out / "clip.eaf").write_text(annotated)
    table = (out / "clips.csv").read_bytes()
    (predictions / "clip.csv").write_text((predictions / "clip.csv").read_text() + "47,4.7,0,0,0,\n")
    capsys.readouterr()
    assert export(predictions, out, "csv,eaf") == 2
    assert "holds files that no export wrote, or that were changed since. Got: clip.eaf." in capsys.readouterr().err
    assert (out / "clip.eaf").read_text() == annotated and (out / "clips.csv").read_bytes() == table
    (out / "clip.eaf").unlink()
    write = prediction_formats.write_file

    def interrupted(path: Path, content: str | bytes) -> None:
        if path.suffix == ".eaf":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(prediction_formats, "write_file", interrupted)
    assert export(predictions, out, "csv,eaf") == 130
    monkeypatch.undo()
    assert export(predictions, out, "csv,eaf") == 0 and (out / "clips.csv").read_bytes() != table


def test_tables_of_the_user_are_not_replaced(
    predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips.csv").write_text("mine")
    assert export(predictions, tmp_path, "csv,textgrid") == 2
    assert "Got: clips.csv." in capsys.readouterr().err
    assert (tmp_path / "clips.csv").read_text() == "mine" and not list(tmp_path.glob("*.TextGrid"))
