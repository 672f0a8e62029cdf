"""Encoders without downloads satisfy the third-party encoder contract; external families are found."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vaflow import encoders
from vaflow.encoders import build_encoder, encoder_kind
from vaflow.encoders.base import Request
from vaflow.encoders.tiny import build as build_tiny
from vaflow.errors import UsageError
from vaflow.testing import EncoderContract


class TestClip(EncoderContract):
    name = "clip-tiny"

    def changed(self) -> Any:
        return build_encoder("resnet-tiny")


class TestAst(EncoderContract):
    name = "ast-tiny"


@pytest.mark.slow  # as TestLayersOfImages
class TestLayersOfClip(EncoderContract):
    name = "clip-tiny@0-1"


@pytest.mark.slow  # as TestLayersOfSpeech
class TestLayersOfAst(EncoderContract):
    name = "ast-tiny@1-2"


class TestVggish(EncoderContract):
    name = "vggish-tiny"


class TestLayersOfImages(EncoderContract):
    @pytest.fixture(autouse=True)
    def checkpoint(self, checkpoints: Mapping[str, Path]) -> None:
        self.folder = checkpoints["dinov2"]
        self.name = f"hf:{self.folder}@1-2"

    def changed(self) -> Any:
        return build_encoder(f"hf:{self.folder}@2-3")


class TestLayersOfSpeech(EncoderContract):
    @pytest.fixture(autouse=True)
    def checkpoint(self, checkpoints: Mapping[str, Path]) -> None:
        self.name = f"hf:{checkpoints['wavlm']}@all"


def build_outside(request: Request) -> Any:
    """An external encoder: the tiny CLIP under another name."""
    return build_tiny(Request(request.name, "clip", None, request.device, request.precision))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("outside", f"{__name__}:outside", "vaflow.encoders")
    monkeypatch.setattr(encoders, "entry_points", lambda group: EntryPoints([point]))


outside = SimpleNamespace(build=build_outside)


def test_families_of_other_packages_are_registered(installed: None) -> None:
    assert encoder_kind("outside:small") == "any"
    encoder = build_encoder("outside:small")
    assert (encoder.name, encoder.kind) == ("outside:small", "visual")
    assert encoder.identity == build_encoder("clip-tiny").identity


def test_a_family_without_its_package_is_unknown() -> None:
    with pytest.raises(UsageError, match="Unknown encoder"):
        encoder_kind("outside:small")
