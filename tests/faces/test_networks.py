"""Face-recognition networks: dlib's, run in NumPy, and ONNX files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vaflow.errors import UsageError, WeightsError
from vaflow.extract.faces.identity import DLIB, FaceResNet, dlib_path, network_identity, open_network, resolve


@pytest.fixture(scope="module")
def weights() -> Path:
    path = dlib_path()
    if path is None:
        pytest.skip("dlib's weights are not installed: pip install -e '.[identity]'")
    return path


def test_the_numpy_network_equals_dlib(weights: Path) -> None:
    dlib = pytest.importorskip("dlib")
    network, reference = FaceResNet(weights), dlib.face_recognition_model_v1(str(weights))
    rng = np.random.default_rng(0)
    for cells in (4, 30):
        chip = np.asarray(cv2.resize(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8), (150, 150)))
        np.testing.assert_allclose(network(chip), np.asarray(reference.compute_face_descriptor(chip)), atol=1e-5)


@pytest.mark.parametrize("end", [0, 100, 20_000_000])
def test_a_damaged_file_is_rejected(weights: Path, tmp_path: Path, end: int) -> None:
    damaged = tmp_path / weights.name
    damaged.write_bytes(weights.read_bytes()[:end])
    with pytest.raises(WeightsError, match="is not dlib's face-recognition network"):
        FaceResNet(damaged)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that takes the mean color of four quarters of the face."""
    pytest.importorskip("onnx")

    class Quarters(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(image, 56).flatten(1)

    path = tmp_path_factory.mktemp("network") / "quarters.onnx"
    torch.onnx.export(Quarters(), (torch.zeros(1, 3, 112, 112),), str(path), dynamo=False)
    return path


def test_an_onnx_network_distinguishes_faces(exported: Path) -> None:
    network = open_network(resolve(f"onnx:{exported}"))
    assert network is not None and network.dim == 12
    face = np.full((224, 224, 3), 128, np.uint8)
    face[:101], face[101:, :112] = (250, 20, 20), (20, 20, 250)
    lighter, other = np.clip(face.astype(int) + 5, 0, 255).astype(np.uint8), np.ascontiguousarray(face[:, ::-1])
    same, alike, different = network.embed([face, lighter, other])
    np.testing.assert_allclose(np.linalg.norm(network.embed([face]), axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(same - alike) < network.limit / 4
    assert np.linalg.norm(same - different) > 0.5 * network.limit


def test_the_fingerprint_names_the_file(exported: Path) -> None:
    identity = network_identity(f"onnx:{exported}")
    assert identity["network"] == "quarters"
    assert len(identity["model"]) == 32


def test_an_invalid_onnx_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(WeightsError, match="is not a face-recognition network"):
        open_network(f"onnx:{tmp_path / 'text.onnx'}")


def test_a_missing_file_is_rejected() -> None:
    with pytest.raises(UsageError, match="names a file that does not exist"):
        resolve("onnx:missing.onnx")


def test_the_fingerprint_names_dlib(weights: Path) -> None:
    assert resolve("auto") == DLIB
    assert network_identity(DLIB)["runtime"] == "numpy"
