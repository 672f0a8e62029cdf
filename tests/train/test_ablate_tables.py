"""The tables of `vaflow ablate`: published numbers, settings of each row, file errors."""

from pathlib import Path

import pytest

from vaflow.errors import UsageError
from vaflow.train.ablate.tables import Row, Study, Table, expand, load_study
from vaflow.train.config import TrainConfig, merge, preset, with_aliases

# The published table: number; streams, temporal model, fusion, centres, sigma; CCC.
PUBLISHED = """
1 | clip-vit-b32 logmel gru attention    .66 .45 | .2854 .5054 .3954
1 | clip-vit-b16 ast    gru attention    .66 .45 | .3623 .6115 .4869
2 | clip-vit-b16 ast    tcn attention    .66 .45 | .3068 .5876 .4472
2 | clip-vit-b16 ast    tcn gated        .66 .45 | .3021 .6017 .4519
2 | clip-vit-b16 ast    tcn hierarchical .66 .45 | .4573 .5679 .5126
2 | clip-vit-b16 ast    gru attention    .66 .45 | .3623 .6115 .4869
2 | clip-vit-b16 ast    gru gated        .66 .45 | .3326 .5657 .4491
2 | clip-vit-b16 ast    gru hierarchical .66 .45 | .4655 .6068 .5361
3 | clip-vit-b16 ast    gru hierarchical 1.0 .60 | .3656 .5935 .4795
3 | clip-vit-b16 ast    gru hierarchical .66 .45 | .4655 .6068 .5361
"""


def published() -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for line in PUBLISHED.strip().splitlines():
        table, setting, numbers = (part.split() for part in line.split("|"))
        rows.append((table[0], *setting[:4], *map(float, setting[4:]), tuple(map(float, numbers))))
    return rows


def test_built_in_tables_equal_the_published_tables() -> None:
    study = load_study()
    pairs = []
    for table in study.choose(["1", "2", "3"]):
        for row in table.rows:
            config = study.config(row, {})
            assert config.kl_weight == 0.2
            streams = ("+".join(config.visual), "+".join(config.audio))
            heads = (config.temporal, config.fusion, config.centers, config.sigma)
            pairs.append((table.name, *streams, *heads, row.paper))
    assert pairs == published()


def test_every_published_mean_matches_its_two_scores() -> None:
    rows = [row for table in load_study().tables for row in table.rows if row.paper is not None]
    assert rows
    for row in rows:
        assert row.paper is not None
        valence, arousal, mean = row.paper
        assert mean == pytest.approx((valence + arousal) / 2, abs=6e-5), row.name


def test_the_base_configuration_is_the_published_model() -> None:
    study = load_study()
    published = {"visual": "clip-vit-b16", "audio": "ast", "attention_positions": "none"}
    assert study.config(None, {}) == merge(preset("p1")) == merge(study.base)
    assert study.config(None, {}) == merge(published)  # the defaults of train, except for the positions


def test_the_baseline_row_equals_its_preset() -> None:
    study = load_study()
    (table,) = study.choose(["p2"])
    assert study.config(table.rows[0], {}) == merge(preset("p1"), preset("p2"))


def test_the_extra_table_contains_unpublished_ablations() -> None:
    study = load_study()
    (table,) = study.choose(["extra"])
    configs = {row.name: study.config(row, {}) for row in table.rows if not row.each}
    assert configs["full model"] == study.config(None, {})
    assert configs["no prompt loss"].kl_weight == 0
    assert configs["hard labels"].region_labels == "hard"
    assert configs["visual only"].audio == ("none",)
    assert configs["audio only"].visual == ("none",)
    assert configs["learnable prompt embeddings"].learnable_prompts
    assert len(set(configs.values())) == len(configs), "two rows are the same configuration"


def test_row_settings_override_overrides_override_presets() -> None:
    study = Study({"lr": 1e-3, "epochs": 9}, (), "")
    row = Row("t", "r", {"temporal": "lstm"}, preset="p2")
    config = study.config(row, {"epochs": 2, "temporal": "gru", "fusion": "gated"})
    assert (config.lr, config.epochs, config.temporal, config.fusion) == (1e-3, 2, "lstm", "gated")
    assert config.kl_weight == preset("p2")["kl_weight"]


def test_every_other_prompt_set_has_a_row() -> None:
    table = Table("t", "", (Row("t", "plain"), Row("t", "set {prompts}", {"lr": 0.1}, each="prompts")))
    expanded = expand(table, ["words", "default", "faces"]).rows
    assert [row.name for row in expanded] == ["plain", "set faces", "set words"]
    assert [dict(row.settings) for row in expanded[1:]] == [
        {"lr": 0.1, "prompts": "faces"},
        {"lr": 0.1, "prompts": "words"},
    ]
    assert [row.name for row in expand(table, ["default"]).rows] == ["plain"]


def test_tables_can_be_selected() -> None:
    study = load_study()
    names = [table.name for table in study.tables]
    assert names == ["1", "2", "3", "p2", "extra"]
    assert [t.name for t in study.choose([])] == [t.name for t in study.choose(["2", "all"])] == names
    assert [t.name for t in study.choose(["3", "1"])] == ["1", "3"]
    with pytest.raises(UsageError, match=r"Got: extr\. .*Did you mean 'extra'"):
        study.choose(["extr"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "is not TOML"),
        ("[base]\nlr = 1", "has no tables"),
        ("table = 3", "has no tables"),
        ("[table.all]\n[[table.all.row]]\nname = 'a'", "not understood"),
        ("[table.t]\ntitle = 'T'", "has no rows"),
        ("[[table.t.row]]\nlr = 1", "a row has no name"),
        ("[[table.t.row]]\nname = 'a'\n[[table.t.row]]\nname = 'a'", "two rows of one name"),
        ("[[table.t.row]]\nname = 'a'\nfusoin = 'gated'", "row 'a': Unknown setting.*Did you mean 'fusion'"),
        ("[[table.t.row]]\nname = 'a'\nfusion = 'glue'", "row 'a': Unknown value of --fusion"),
        ("[[table.t.row]]\nname = 'a'\nlr = 'fast'", "row 'a': --lr must be a number"),
        ("[[table.t.row]]\nname = 'a'\nseed = 3", "sets a seed"),
        ("[[table.t.row]]\nname = 'a'\npreset = 'p9'", "row 'a': Unknown preset"),
        ("[[table.t.row]]\nname = 'a'\neach = 'seed'", "unknown value for each"),
        ("[[table.t.row]]\nname = 'a'\npaper = { mean = 0.3 }", "paper is not understood"),
        ("[[table.t.row]]\nname = 'a'\npaper = { valence = 30, arousal = 0.1, mean = 0.2 }", "paper is not understood"),
        ("[base]\nlr = 'fast'\n[[table.t.row]]\nname = 'a'", "--lr must be a number"),
        ("[bass]\n[[table.t.row]]\nname = 'a'", "unknown key.*Did you mean 'base'"),
    ],
)
def test_table_file_errors_name_the_location(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_study(path)
    assert str(path) in str(error.value)


def test_a_missing_table_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read the tables"):
        load_study(tmp_path / "none.toml")


def test_aliases_replace_streams_and_their_prototypes() -> None:
    config = TrainConfig(visual=("a", "b"), audio=("c",), text="a.text")
    other = with_aliases(config, {"a": "x", "c": "none"})
    assert (other.visual, other.audio, other.text) == (("x", "b"), ("none",), "x.text")
    assert with_aliases(config, {}) == config
    with pytest.raises(UsageError, match="names a stream twice"):
        with_aliases(config, {"a": "b"})
