"""Small ONNX graphs, written by torch's own exporter."""

from pathlib import Path

import torch
from torch import nn


class FaceModel(nn.Module):
    """Ten outputs per image, as the multi-task models of the HSEmotion family have: 8 and 9 are valence and arousal."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 7, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(8, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tanh(3 * self.out(self.features(image)))


class VoiceModel(nn.Module):
    """Samples [B, 8000] -> [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 400, 160)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(samples.unsqueeze(1))).mean(dim=2)


def export(module: nn.Module, example: torch.Tensor, path: Path, *, dynamic: bool = True) -> Path:
    axes = {"input": {0: "batch"}, "output": {0: "batch"}} if dynamic else None
    names: dict[str, object] = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": axes}
    torch.onnx.export(module.eval(), (example,), str(path), dynamo=False, **names)
    return path


def face_model(folder: Path, *, dynamic: bool = True) -> tuple[nn.Module, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = FaceModel()
        return module, export(module, torch.zeros(1, 3, 224, 224), folder / "face.onnx", dynamic=dynamic)


def voice_model(folder: Path) -> tuple[nn.Module, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = VoiceModel()
        return module, export(module, torch.zeros(1, 8000), folder / "voice.onnx")
