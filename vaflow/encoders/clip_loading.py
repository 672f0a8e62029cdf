"""Building open_clip models for given weights, and the check that they got the activation they were trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vaflow.encoders.hub import hub_file, url_file
from vaflow.errors import WeightsError, explain

QUICK, PLAIN = "quick_gelu", "gelu"
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # facts kept beside OpenAI's tensors


def new_model(model_name: str, quick: bool) -> Any:
    """open_clip's model of that name with random weights, its activation as told."""
    import open_clip

    config = open_clip.get_model_config(model_name)
    config["quick_gelu"] = quick
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if "multimodal_cfg" in config:
        model: Any = open_clip.CoCa(**config)
    else:
        model = open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)
    return model


def activation_of(model: torch.nn.Module) -> str:
    """ "quick_gelu", "gelu", both joined by "+", or "other": what the built model really holds."""
    from open_clip.transformer import QuickGELU

    found = {PLAIN for m in model.modules() if isinstance(m, torch.nn.GELU)}
    found |= {QUICK for m in model.modules() if isinstance(m, QuickGELU)}
    return "+".join(sorted(found)) or "other"


def require_quick_gelu(model: torch.nn.Module, what: str) -> None:
    """Raise a WeightsError unless every activation of the model is QuickGELU."""
    found = activation_of(model)
    if found != QUICK:
        raise WeightsError(
            explain(
                f"{what}: OpenAI's weights need QuickGELU, and give wrong features without any error otherwise",
                expected=QUICK,
                got=found,
                remedy="Name the model with -quickgelu at its end, such as clip:ViT-B-16-quickgelu/FILE",
            )
        )


def says_openai(path: Path, state: Mapping[str, torch.Tensor]) -> bool:
    """OpenAI's own key layout, or a file kept under the name of OpenAI's model in the hub's cache or as downloaded."""
    hub_folder = any(part.startswith("models--") and part.endswith(".openai") for part in path.parts)
    return hub_folder or "openai" in path.name.lower() or any(key in state for key in OPENAI_EXTRAS)


def download(name: str, settings: Mapping[str, Any]) -> Path:
    repo, _, filename = str(settings.get("hf_hub", "")).rpartition("/")
    if repo:
        return hub_file(repo, (filename,) if filename else HUB_NAMES, encoder=name)
    return url_file(str(settings["url"]), encoder=name)


def adapted(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What open_clip itself forgives when it loads: older layouts of the same tensors."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    own = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids") or key in own}
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    return state
