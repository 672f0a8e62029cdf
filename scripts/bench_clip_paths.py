"""Time of the same CLIP image tower through `clip:` (open_clip) and `hf:` (transformers), as a ratio.

    python scripts/bench_clip_paths.py [--model ViT-B-32] [--batch 16] [--rounds 9] [--device cpu]

Both have random weights, which do not affect the speed. The paths take turns, so that other work on the machine slows
both; each round gives one ratio, and the median is reported.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_weights import random_clip

from vaflow.encoders import build_encoder

GOAL = 1.05


def hugging_face_clip(model: str, clip: Any, device: str, folder: Path) -> Any:
    """The image tower of open_clip's `model` as `hf:` builds it, from a folder of random weights."""
    import open_clip
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision, size = open_clip.get_model_config(model)["vision_cfg"], clip.image_size
    config = CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=4 * vision["width"],
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision.get("head_width", 64),
        image_size=size,
        patch_size=vision["patch_size"],
        projection_dim=clip.dim,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return build_encoder(f"hf:{folder}", device=device, kind="visual")


def seconds(encoder: Any, images: torch.Tensor) -> float:
    """Time of one batch: of the processor on the CPU, which other work hardly changes, else of the clock."""
    clock = time.process_time if encoder.device.type == "cpu" else time.perf_counter
    began = clock()
    encoder.encode(images).cpu()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of clip: and hf: on one network.")
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="open_clip's name")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        clip = random_clip(arguments.device, "float32", Path(temporary), arguments.model)
        other = hugging_face_clip(arguments.model, clip, arguments.device, Path(temporary) / "hf")
    shape = (arguments.batch, clip.image_size, clip.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    pairs = []
    for number in range(arguments.rounds + 1):
        order = (clip, other) if number % 2 else (other, clip)
        times = {encoder.name: seconds(encoder, images) for encoder in order}
        if number:  # the first round allocates
            pairs.append((times[clip.name], times[other.name]))
    ratio = statistics.median(hf / built_in for built_in, hf in pairs)
    built_in, hf = (statistics.median(column) / arguments.batch for column in zip(*pairs, strict=True))
    result = {"model": arguments.model, "clip_seconds_per_image": built_in, "hf_seconds_per_image": hf}
    print(json.dumps(result | {"hf_time_over_clip_time": ratio, "goal": GOAL, "reached": ratio <= GOAL}, indent=2))


if __name__ == "__main__":
    main()
