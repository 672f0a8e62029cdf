"""Extraction settings are validated before any file is read."""

import pytest

from vaflow.errors import UsageError
from vaflow.extract.config import ExtractConfig, Shard


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float64"},
        {"face_source": "mtcnn"},
        {"audio_steps": 0},
        {"workers": -1},
        {"window": 0.0},
        {"window": 1e308},
        {"stride": 1e-320},
        {"frames": 10**9},
        {"device": "gpu"},
        {"stride": 11.0},
        {"weights": {"clip-vit-b32": "x"}},
    ],
    ids=str,
)
def test_impossible_settings_are_usage_errors(settings: dict) -> None:
    with pytest.raises(UsageError):
        ExtractConfig(**settings)


def test_shards_are_numbered_from_one() -> None:
    assert Shard.parse("2/8") == Shard(2, 8)
    assert Shard.parse("1/1").suffix == ""
    assert Shard.parse("2/8").suffix == "-2-of-8"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3"])
def test_an_invalid_shard_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="I/N"):
        Shard.parse(text)
