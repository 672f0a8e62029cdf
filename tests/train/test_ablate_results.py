"""Tables of finished runs: means, differences, bold entries, and the three files."""

import csv
import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from ablation_toys import key_of, made_up_schedule
from PIL import ImageFont

from vaflow.train.ablate.pool import Ended
from vaflow.train.ablate.report import About, csv_text, digits, html_page, markdown, plot
from vaflow.train.ablate.results import Results, collect
from vaflow.train.ablate.tables import Options, Row, Schedule, load_study
from vaflow.train.ablate.workers import read_moments, write_moments
from vaflow.train.config import TrainConfig
from vaflow.train.run_folder import RunFolder

CONTRACT = (
    "table,row,temporal,fusion,visual,audio,centers,sigma,kl_weight,seeds,ccc_valence,ccc_arousal,ccc_mean,std_mean,"
    "paper_valence,paper_arousal,paper_mean"
)
ABOUT = About("a.cache", Options(seeds=2, overrides={"lr": "0.001"}, aliases={"ast": "ast-tiny"}), 4, 2, 61.0)
MINUS = "\N{MINUS SIGN}"
PAPER = (0.4655, 0.6068, 0.5361)


def schedule_of(out: Path, noise: dict[str, float], **options: int) -> Schedule:
    return made_up_schedule(out, {"1": [Row("1", name, paper=PAPER) for name in (*noise, "absent")]}, noise, **options)


def test_means_and_deviations_equal_those_of_the_runs(tmp_path: Path) -> None:
    schedule = schedule_of(tmp_path, {"full": 0.4, "worse": 0.8}, seeds=3)
    full, worse, absent = collect(schedule, tmp_path, {}).tables[0].rows
    for row, name in ((full, "full"), (worse, "worse")):
        scores = []
        for seed in range(3):
            metrics = RunFolder(tmp_path / "runs" / key_of(name, seed)).read_metrics()
            scores.append([metrics["ccc"][k] for k in ("valence", "arousal", "mean")])
        np.testing.assert_allclose(row.mean, np.mean(scores, axis=0))
        np.testing.assert_allclose(row.std, np.std(scores, axis=0, ddof=1))
        assert (row.interval[:, 0] < row.mean).all()
        assert (row.mean < row.interval[:, 1]).all()
    assert full.versus is None
    assert worse.versus is not None
    np.testing.assert_allclose(worse.versus.difference, worse.mean - full.mean)
    assert (worse.versus.high < 0).all()
    assert absent.seeds == 0
    assert np.isnan(absent.mean).all()
    assert absent.versus is None


def test_the_best_row_is_bold_if_it_beats_the_runner_up(tmp_path: Path) -> None:
    clear = schedule_of(tmp_path / "a", {"full": 0.5, "best": 0.3, "worst": 0.9})
    flags = {row.entry.row.name: row.best for row in collect(clear, tmp_path / "a", {}).tables[0].rows}
    assert flags == {"full": (False,) * 3, "best": (True,) * 3, "worst": (False,) * 3, "absent": (False,) * 3}


def test_nothing_is_bold_without_a_significant_difference(tmp_path: Path) -> None:
    close = schedule_of(tmp_path, {"full": 0.5, "near": 0.5, "worst": 0.9}, videos=12)
    results = collect(close, tmp_path, {})
    near = results.tables[0].rows[1]
    assert near.versus is not None
    assert near.versus.low[-1] < 0 < near.versus.high[-1], "the example must be a tie"
    assert not any(row.best[-1] for row in results.tables[0].rows)


def test_identical_rows_have_no_winner(tmp_path: Path) -> None:
    rows = [Row("1", "best", {"lr": 1.0}), Row("1", "best", {"lr": 2.0}), Row("1", "full")]
    schedule = made_up_schedule(tmp_path, {"1": rows}, {"full": 0.9, "best": 0.3})
    assert not any(any(row.best) for row in collect(schedule, tmp_path, {}).tables[0].rows)


def test_a_single_row_is_not_marked_best(tmp_path: Path) -> None:
    schedule = made_up_schedule(tmp_path, {"1": [Row("1", "full")]}, {"full": 0.3})
    assert not any(collect(schedule, tmp_path, {}).tables[0].rows[0].best)


def test_a_failed_seed_is_excluded_and_reported(tmp_path: Path) -> None:
    schedule = schedule_of(tmp_path, {"full": 0.4, "worse": 0.8})
    failed = {key_of("worse", 1): Ended(error="DataError", message="it broke")}
    _, worse, _ = collect(schedule, tmp_path, failed).tables[0].rows
    assert worse.seeds == 1
    assert worse.problem == "1 of 2 runs failed: it broke"
    assert np.isnan(worse.std).all()


def test_runs_are_compared_on_their_common_videos(tmp_path: Path) -> None:
    schedule = schedule_of(tmp_path, {"full": 0.4, "worse": 0.8}, videos=20)
    run = tmp_path / "runs" / key_of("worse", 0)
    moments = read_moments(run)
    del moments["v3"]
    write_moments(run, moments)
    results = collect(schedule, tmp_path, {})
    assert results.uneven
    assert results.videos == 19
    assert "Not every run" in markdown(results, ABOUT)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    nasty = "<script>alert('x')</script> | a*b & \"c\""
    rows = {"1": [Row("1", "full", paper=PAPER), Row("1", nasty)], "</style>": [Row("</style>", "best")]}
    schedule = made_up_schedule(tmp_path, rows, {"full": 0.5, nasty: 0.3})
    return collect(schedule, tmp_path, {})


def test_csv_starts_with_the_documented_columns(results: Results) -> None:
    text = csv_text(results)
    assert text.splitlines()[0].startswith(CONTRACT + ",")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["table"] for row in rows] == ["1", "1", "</style>"]
    full, nasty, absent = rows
    assert float(full["ccc_mean"]) == pytest.approx(results.tables[0].rows[0].mean[-1], rel=1e-5)
    assert [float(full[f"paper_{name}"]) for name in ("valence", "arousal", "mean")] == list(PAPER)
    assert (full["seeds"], full["ours"], full["temporal"], full["fusion"]) == (
        "2",
        "frozen cache",
        "gru",
        "hierarchical",
    )
    assert full["diff_mean"] == full["p_value"] == ""
    assert float(nasty["diff_mean"]) > 0
    assert nasty["paper_mean"] == ""
    assert (absent["seeds"], absent["ccc_mean"], absent["std_mean"]) == ("0", "", "")


def test_markdown_escapes_and_marks_the_best(results: Results) -> None:
    text = markdown(results, ABOUT)
    assert "<script>" not in text.replace("\\<script\\>", "")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(columns) == 1, "a row name must not create columns"
    best = results.tables[0].rows[1].mean[-1]
    assert f"**{digits(best)}**" in text
    assert ".4655" in text
    assert "ast\\-tiny" not in text
    assert "ast-tiny for ast" in text
    assert "lr = 0.001" in text


def test_tuned_encoders_are_marked(results: Results) -> None:
    first, *others = results.tables
    full = first.rows[0]
    tuned = replace(full, entry=replace(full.entry, config=TrainConfig(finetune=True)))
    mixed = replace(results, tables=(replace(first, rows=(tuned, *first.rows[1:])), *others))
    rows = list(csv.DictReader(io.StringIO(csv_text(mixed))))
    assert [row["ours"] for row in rows] == ["fine-tuned", "frozen cache", "frozen cache"]
    assert "Ours: frozen cache and fine-tuned" in markdown(mixed, ABOUT)
    assert "trained as well in: full." in Page(html_page(mixed, ABOUT)).text


class Page(HTMLParser):
    """Tags, attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained(results: Results) -> None:
    page = html_page(results, ABOUT)
    assert "http:" not in page and "https:" not in page
    assert "url(" not in page
    assert "@import" not in page
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in parsed.attributes}
    assert parsed.tags.count("svg") == len(results.tables) + 4, "a picture per table, and the legend's marks"


def test_the_page_escapes_and_shows_all_text(results: Results) -> None:
    page = html_page(results, ABOUT)
    name = results.tables[0].rows[1].entry.row.name
    assert page.count("</style>") == 1
    parsed = Page(page)
    assert name in parsed.text
    assert "Table </style>" in parsed.text
    best = results.tables[0].rows[1].mean[-1]
    assert f"<b>{digits(best)}</b>" in page
    for word in ("ours: frozen cache", "ast-tiny for ast", ".4655", "lr = 0.001"):
        assert word in parsed.text


def test_the_figure_places_marks_at_their_values(results: Results) -> None:
    page = html_page(results, ABOUT)
    svg = page[page.index('<svg class="plot"') :]
    ticks = re.findall(rf'<text class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([{MINUS}.\d]+)</text>', svg)
    (x0, v0), (x1, v1) = [(float(x), float(v.replace(MINUS, "-"))) for x, v in ticks[:2]]
    rows = results.tables[0].rows
    means = [float(x) for x in re.findall(r'<circle class="mean" cx="([\d.]+)"', svg)][: len(rows)]
    for x, row in zip(means, rows, strict=True):
        assert v0 + (x - x0) * (v1 - v0) / (x1 - x0) == pytest.approx(row.mean[-1], abs=1e-3)


@pytest.mark.parametrize("trained", [True, False])
def test_row_names_fit_beside_the_figure(results: Results, trained: bool) -> None:
    """Text width in DejaVu Sans, which is wider than the default font of most browsers."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)
    table = results.tables[0]
    built_in = [row.name for table in load_study().tables for row in table.rows]
    for name in (*built_in, "ResNet-152 + VGGish + Wav2Vec2, TCN, cross-modal attention"):
        one = table.rows[0]
        row = replace(one, entry=replace(one.entry, row=replace(one.entry.row, name=name)))
        if not trained:
            row = replace(row, scores=row.scores[:0])
        (label,) = re.findall(
            r'<text class="name" x="([0-9.]+)"[^>]*>(.*?)</text>', plot(replace(table, rows=(row,)), row)
        )
        shown = unescape(re.sub("<[^>]*>", "", label[1]))
        assert font.getlength(shown) < float(label[0]), shown
        assert name.startswith(shown.removeprefix("not trained: ").removesuffix("…"))


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0.1234, ".123"),
        (-0.1234, f"{MINUS}.123"),
        (1.0, "1.000"),
        (-0.0001, ".000"),
        (float("nan"), "-"),
        (10.5, "10.500"),
    ],
)
def test_numbers_are_formatted(number: float, shown: str) -> None:
    assert digits(number) == shown


def test_signed_numbers_are_formatted() -> None:
    assert [digits(x, sign=True) for x in (0.05, -0.05, 0.0)] == ["+.050", f"{MINUS}.050", ".000"]


def test_the_full_model_is_added_to_the_csv(tmp_path: Path) -> None:
    schedule = made_up_schedule(tmp_path, {"mine": [Row("mine", "other")]}, {"full": 0.3, "other": 0.5})
    rows = list(csv.DictReader(io.StringIO(csv_text(collect(schedule, tmp_path, {})))))
    assert [row["table"] for row in rows] == ["mine", "base"]
    assert float(rows[1]["ccc_mean"]) > float(rows[0]["ccc_mean"]) and rows[1]["within_mean"]


def test_csv_and_terminal_names_are_escaped(tmp_path: Path) -> None:
    names = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\x1b[31mred")
    schedule = made_up_schedule(tmp_path, {"1": [Row("1", "full"), *(Row("1", name) for name in names)]}, {"full": 0.3})
    results = collect(schedule, tmp_path, {})
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert [row["row"] for row in rows[1:5]] == [f"'{name}" for name in names[:4]]
    assert rows[5]["row"] == "\\x1b[31mred"
    for text in (markdown(results, ABOUT), html_page(results, ABOUT)):
        assert "\x1b" not in text and "x1b" in text


def test_the_score_within_videos_is_shown(results: Results) -> None:
    shown = digits(results.tables[0].rows[0].within_mean)
    assert shown in markdown(results, ABOUT) and shown in Page(html_page(results, ABOUT)).text
