"""Encoder names are resolved without torch; errors list the choices."""

import subprocess
import sys
from pathlib import Path

import pytest

from vaflow.encoders import ENCODERS, build_encoder, encoder_kind
from vaflow.errors import UsageError


def test_names_and_kinds_need_no_heavy_library() -> None:
    code = (
        "import sys; from vaflow.encoders import ENCODERS, encoder_kind;"
        "from vaflow.encoders.prompts import load_prompts;"
        "from vaflow.encoders.logmel import frame_times; from vaflow.encoders.preprocessing import Preparation;"
        "load_prompts(); print([encoder_kind(name) for name in ENCODERS]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'open_clip', 'torchaudio', 'cv2')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip-vit-b16", "visual"),
        ("clip-vit-b32", "visual"),
        ("clip-tiny", "visual"),
        ("clip:ViT-L-14/openai", "visual"),
        ("clip:ViT-B-16//data/weights.pt", "visual"),
        ("ast", "audio"),
        ("ast-tiny", "audio"),
        ("ast:MIT/ast-finetuned-audioset-10-10-0.4593", "audio"),
        ("logmel", "logmel"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert encoder_kind(name) == kind


@pytest.mark.parametrize("name", ["clip-vit-b61", "clip_vit_b16", "", "clip", "bert:base", "resnet"])
def test_unknown_names_list_the_choices(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        encoder_kind(name)
    for choice in (*ENCODERS, "clip:MODEL/TAG_OR_FILE", "ast:PATH_OR_HUB_ID"):
        assert choice in str(caught.value)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UsageError, match="Did you mean 'clip-vit-b16'"):
        encoder_kind("clip-vitb16")


@pytest.mark.parametrize("name", ["clip:", "clip:ViT-B-16", "clip:/openai", "clip:ViT-B-16/", "ast:"])
def test_incomplete_names_show_the_form(name: str) -> None:
    with pytest.raises(UsageError, match=r"clip:MODEL/TAG_OR_FILE|ast:PATH_OR_HUB_ID"):
        encoder_kind(name)


def test_invalid_combinations_are_rejected() -> None:
    with pytest.raises(UsageError, match="no network to build"):
        build_encoder("logmel")
    with pytest.raises(UsageError, match="seeded"):
        build_encoder("resnet-tiny", weights=Path("x.pt"))
    with pytest.raises(UsageError, match="bfloat16"):
        build_encoder("clip-tiny", precision="bfloat")
    with pytest.raises(UsageError, match="CUDA"):
        build_encoder("clip-tiny", precision="float16", device="cpu")
