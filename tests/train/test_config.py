"""Settings: defaults, precedence, types, round trips, refusals."""

import tomllib

import pytest

from vaflow.errors import UsageError
from vaflow.settings import parse_pairs
from vaflow.train import config as configs
from vaflow.train.config import (
    BEFORE_SETTING,
    LEFT_OUT,
    TrainConfig,
    coerce,
    from_toml,
    merge,
    preset,
    read_settings,
    to_toml,
)
from vaflow.train.heads import NORMALIZE
from vaflow.train.heads.fusion import FUSION
from vaflow.train.heads.temporal import TEMPORAL
from vaflow.train.run_record import changed_settings


def test_setting_choices_equal_the_model_choices() -> None:
    assert set(configs.TEMPORAL) == set(TEMPORAL)
    assert set(configs.FUSION) == set(FUSION)
    assert set(configs.NORMALIZE) == set(NORMALIZE)


def test_preset_p1_changes_only_the_streams() -> None:
    published = TrainConfig(visual=("clip-vit-b16",), audio=("ast",), attention_positions="none")
    assert merge(preset("p1")) == published


def test_later_layers_take_precedence() -> None:
    merged = merge({"lr": 1.0, "epochs": 3, "seed": 1}, {"lr": 2, "epochs": 4}, parse_pairs(TrainConfig, ["lr=3e-4"]))
    assert (merged.lr, merged.epochs, merged.seed) == (3e-4, 4, 1)


@pytest.mark.parametrize("name", ["p1", "p2"])
def test_toml_round_trip(name: str) -> None:
    config = merge(preset(name), {"window": 6, "causal": "false", "frames": 7, "seed": "12"})
    again = from_toml(to_toml(config))
    assert again == config
    assert isinstance(again.window, float) and again.causal is False and again.stride is None


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "3e-4", 3e-4),
        ("lr", 1, 1.0),
        ("epochs", "7", 7),
        ("causal", "False", False),
        ("learnable_prompts", "true", True),
        ("visual", "a, b", ("a", "b")),
        ("visual", ["a"], ("a",)),
        ("window", "none", None),
        ("window", "2.5", 2.5),
        ("fusion", "gated", "gated"),
    ],
)
def test_values_are_converted_to_their_type(key: str, text: object, value: object) -> None:
    got = coerce(key, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", "many", "an integer"),
        ("epochs", 1.5, "an integer"),
        ("epochs", True, "an integer"),
        ("lr", "fast", "a number"),
        ("causal", "perhaps", "true or false"),
        ("visual", 3, "names, separated by commas"),
        ("fusion", 3, "must be hierarchical, attention"),
        ("hiden", "3", "Did you mean 'hidden'"),
    ],
)
def test_values_of_another_type_are_rejected(key: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        coerce(key, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal": "gruu"}, "Did you mean 'gru'"),
        ({"region_labels": "medium"}, "soft"),
        ({"epochs": 0}, "--epochs must be an integer >= 1"),
        ({"lr": 0.0}, r"--lr must be a number > 0 .got 0.0."),
        ({"lr": float("nan")}, "--lr must be a number > 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"kl_weight": -1.0}, "--kl-weight"),
        ({"sigma": 0.0}, "sigma"),
        ({"device": "gpu"}, "device"),
        ({"window": 2.0, "stride": 3.0, "frames": 4}, "stride is longer"),
        ({"visual": ("none",), "audio": ("none",)}, "nothing to train on"),
        ({"visual": ("none", "a")}, "excludes other visual streams"),
        ({"audio": ("a", "a")}, "names a stream twice"),
    ],
)
def test_out_of_range_values_are_rejected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_set_accepts_key_and_value() -> None:
    assert parse_pairs(TrainConfig, ["batch-size=4", "text=a=b"]) == {"batch_size": 4, "text": "a=b"}
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_pairs(TrainConfig, ["lr"])


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match=r"p1, p2"):
        preset("p3")


def test_settings_files_can_be_flat_or_written_by_a_run(tmp_path) -> None:
    flat = tmp_path / "flat.toml"
    flat.write_text("lr = 1e-3\nvisual = ['a']\n")
    nested = tmp_path / "config.toml"
    nested.write_text("vaflow = '1'\n[train]\nlr = 1e-3\nvisual = ['a']\n[data.train]\nclips = 3\n")
    assert read_settings(flat) == {"lr": 1e-3, "visual": ["a"]}
    assert read_settings(nested) == {**BEFORE_SETTING, "lr": 1e-3, "visual": ["a"]}


@pytest.mark.parametrize("text", ["lr = ", "learning_rate = 1", "lr = 'x'", "\xff\xfe"])
def test_bad_settings_file(tmp_path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError):
        read_settings(path)
    with pytest.raises(UsageError, match="Cannot read"):
        read_settings(tmp_path / "absent.toml")


def test_differences_list_settings_that_change_training() -> None:
    one = TrainConfig(lr=1e-3, device="cpu")
    assert changed_settings(one, TrainConfig(lr=1e-3, device="cuda")) == []
    assert changed_settings(one, TrainConfig(lr=1e-4, seed=3)) == ["lr: 0.001, not 0.0001", "seed: 0, not 3"]


def test_every_setting_round_trips_through_toml() -> None:
    """Those that are left out at their default are set to another value."""
    left_out = {"uncertainty": "variance", "nll_weight": 0.1, "min_face_quality": 0.2, "speech_mask": True}
    assert left_out.keys() == set(LEFT_OUT)
    config = merge({"window": 10, "stride": 3, "frames": 20, "audio_steps": 20, "finetune_blocks": 2}, left_out)
    assert set(tomllib.loads(to_toml(config))) == set(TrainConfig.__dataclass_fields__)
