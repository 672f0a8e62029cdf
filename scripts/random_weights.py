"""Real-size encoders with random weights, for measuring speed where the real weights cannot be had."""

from pathlib import Path

from vaflow.encoders.ast import AUDIOSET_MEAN, AUDIOSET_STD, AstEncoder
from vaflow.encoders.base import Request
from vaflow.encoders.clip import build
from vaflow.encoders.image_models import ImageEncoder


def random_clip(device: str, precision: str, folder: Path, model: str = "ViT-B-16-quickgelu") -> ImageEncoder:
    """open_clip's model as `clip:` builds it, through the same loading code, from a file of random weights."""
    import open_clip
    from safetensors.torch import save_file

    path = folder / "random-clip.safetensors"
    save_file(open_clip.create_model(model, pretrained=None).state_dict(), path)
    source = f"{model}/{path}"
    return build(Request(f"clip:{source}", source, None, device, precision))


def random_ast(device: str, precision: str) -> AstEncoder:
    """AST of the AudioSet checkpoint's size (the class's default configuration)."""
    from transformers import ASTConfig, ASTModel

    module = ASTModel(ASTConfig(attn_implementation="sdpa"))
    return AstEncoder(Request("ast", "", None, device, precision), module, AUDIOSET_MEAN, AUDIOSET_STD)
