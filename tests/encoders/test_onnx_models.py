"""`onnx:` encoders equal the exported networks; invalid sidecars are rejected."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_toys import face_model, voice_model
from PIL import Image

from vaflow.cache import open_cache
from vaflow.cli import main
from vaflow.encoders import build_encoder
from vaflow.errors import UsageError, WeightsError

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
FACE = 'kind = "visual"\nsize = 224\nmean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]\norder = "BGR"\n'
VOICE = 'kind = "audio"\nlength = 8000\nscale = 2.0\n'


def build(path: Path, **options: Any) -> Any:
    return build_encoder(f"onnx:{path}", **options)


@pytest.fixture
def face(tmp_path: Path) -> tuple[Any, Path]:
    module, path = face_model(tmp_path)
    path.with_suffix(".toml").write_text(FACE)
    return module, path


def random_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (150, 120 + k, 3), np.uint8) for k in range(count)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_image_graph_equals_its_network(tmp_path: Path, dynamic: bool) -> None:
    module, path = face_model(tmp_path, dynamic=dynamic)
    path.with_suffix(".toml").write_text(FACE)
    encoder = build(path, kind="visual")
    images = np.stack([encoder.prepare(array) for array in random_images(3)])
    resized = [Image.fromarray(p).resize((224, 224), Image.Resampling.BILINEAR) for p in random_images(3)]
    expected = np.stack([np.asarray(image) for image in resized])
    np.testing.assert_array_equal(images, expected)
    pixels = torch.from_numpy((expected[..., ::-1] / 255 - 0.5) / 0.25).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(torch.from_numpy(images)), module(pixels), atol=1e-5, rtol=1e-5)
    assert encoder.dim == 10 and encoder.kind == "visual"
    order = [2, 0, 1]
    assert torch.equal(encoder.encode(torch.from_numpy(images))[order], encoder.encode(torch.from_numpy(images[order])))


def test_an_audio_graph_reads_a_window_around_each_step(tmp_path: Path) -> None:
    module, path = voice_model(tmp_path)
    path.with_suffix(".toml").write_text(VOICE + "columns = [1, 4]\n")
    encoder = build(path, kind="audio")
    segments = encoder.segments(4.0, 8)
    assert segments.frames == 50 and len(segments.first) == 8
    middles = (np.array(segments.first) + 25) * 0.01
    np.testing.assert_allclose(middles, encoder.step_times(4.0, 8), atol=0.0051)
    samples = np.random.default_rng(0).normal(size=(3, 8000)).astype(np.float32)
    encoded = encoder.encode(torch.from_numpy(samples.reshape(3, 50, 160)), window=4.0, steps=8)
    with torch.no_grad():
        expected = module(torch.from_numpy(2 * samples))[:, 1:4]
    torch.testing.assert_close(encoded[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_both_files_are_part_of_the_identity(face: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = face
    before = build(path).identity
    path.with_suffix(".toml").write_text(FACE.replace("BGR", "RGB"))
    assert build(path).identity != before
    path.with_suffix(".toml").write_text(FACE)
    other = tmp_path / "other"
    other.mkdir()
    (other / "face.toml").write_text(FACE)
    (other / "face.onnx").write_bytes(path.read_bytes() + b"\x52\x00")  # an empty field at the end
    assert build(path).identity == before
    assert build(other / "face.onnx").identity != before


@pytest.mark.parametrize("location", ["weights.bin", f"{'w' * 200}.bin"])
def test_weights_files_of_any_name_are_part_of_the_identity(face: tuple[Any, Path], location: str) -> None:
    _, path = face
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=0)
    before, weights = build(path).identity, path.parent / location
    weights.write_bytes((1.5 * np.fromfile(weights, np.float32)).tobytes())
    assert build(path).identity["weights"] != before["weights"]


def test_bytes_like_the_name_of_a_weights_file_are_ignored(face: tuple[Any, Path]) -> None:
    _, path = face
    name = b"\n\x08location\x12\xe8\x07" + b"x" * 1000
    field = b"\xc2\x3e" + bytes([len(name) % 128 + 128, len(name) // 128]) + name  # number 1000, which ONNX has not
    path.write_bytes(path.read_bytes() + field)
    assert build(path).identity["weights"]


def test_graphs_in_the_format_of_onnxruntime_are_read(face: tuple[Any, Path]) -> None:
    _, path = face
    before, options = build(path), onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(path), options)
    images = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    torch.testing.assert_close(build(path.with_suffix(".ort")).encode(images), before.encode(images))


def test_a_missing_sidecar_error_prints_a_template(face: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = face
    path.with_suffix(".toml").unlink()
    with pytest.raises(UsageError, match="no sidecar") as caught:
        build(path)
    template = str(caught.value).split("\n\n", 1)[1]
    values = tomllib.loads(template)
    assert (values["kind"], values["size"], values["input"], values["output"]) == ("visual", 224, "input", "output")
    path.with_suffix(".toml").write_text(template)
    assert build(path).dim == 10
    _, voice = voice_model(tmp_path)
    with pytest.raises(UsageError) as caught:
        build(voice)
    assert tomllib.loads(str(caught.value).split("\n\n", 1)[1])["length"] == 8000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "size = 224",
            "size = 112",
        ),
        ('order = "BGR"', 'order = "BGR"\nlayout = "NHWC"'),
    ],
)
def test_a_sidecar_contradicting_the_graph_is_rejected(face: tuple[Any, Path], change: str, message: str) -> None:
    path = face[1]
    path.with_suffix(".toml").write_text(FACE.replace(change, message))
    with pytest.raises(UsageError, match=r"contradicts the graph's input input.*'batch', 3, 224, 224"):
        build(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('input = "picture"', "names an input that the graph lacks.*picture.*input"),
        ('output = "logits"', "names an output that the graph lacks"),
        ("columns = [8, 12]", "columns that the output lacks.*0 to 10"),
        ("columns = [0.0, 8]", "columns that the output lacks"),
        ("colour = 1", "colour is unknown"),
        ('interpolation = "fast"', "interpolation is 'fast', not one of"),
        ("edge = 2.5", "edge is 2.5"),
        ("edge = -1", "pixels up to 4096"),
        ("edge = 100000", "pixels up to 4096"),
        ('kind = "text"', "cannot be read"),
    ],
)
def test_an_invalid_sidecar_is_reported_in_one_message(face: tuple[Any, Path], line: str, message: str) -> None:
    path = face[1]
    path.with_suffix(".toml").write_text(FACE + line + "\n")
    with pytest.raises(UsageError, match=message):
        build(path)


def test_invalid_onnx_files_are_rejected(face: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not fit.*Pass it with --visual"):
        build(face[1], kind="audio")
    with pytest.raises(UsageError, match=r"The ONNX file .* does not exist"):
        build(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        build(tmp_path / "broken.onnx")
    _, voice = voice_model(tmp_path)
    voice.with_suffix(".toml").write_text(VOICE.replace("8000", "1600"))
    with pytest.raises(UsageError, match="contradicts"):
        build(voice)
    voice.with_suffix(".toml").write_text(VOICE.replace("8000", "8001"))
    with pytest.raises(UsageError, match="multiple of 160"):
        build(voice)


# --- models that output valence and arousal, as baselines


@pytest.fixture
def labelled(clips: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "single_face.mp4").symlink_to((clips / "single_face.mp4").resolve())
    rows = [f"{0.1 * k:.1f},{np.sin(k):.3f},{np.cos(k):.3f}" for k in range(20)]
    (root / "single_face.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    (root / "splits.csv").write_text("name,split\nsingle_face,val\n")
    return root


def test_a_pretrained_model_predicts_and_is_scored(
    face: tuple[Any, Path], labelled: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = face
    name, out, cache = f"onnx:{path}", tmp_path / "out", tmp_path / "cache"
    assert main(["predict", name, "--va", "8,9", str(clips / "single_face.mp4"), "--out", str(out)]) == 0
    table = np.genfromtxt(out / "single_face.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(table) > 40 and (out / "single_face.png").is_file()
    assert not list(out.glob(".features-*"))  # no --cache keeps them
    sampled = ["--dtype", "float32", "--audio", "none"]
    assert main(["extract", str(labelled), "--out", str(cache), "--visual", name, *sampled]) == 0
    stored = open_cache(cache).read(name, "single_face")
    assert stored.embedding.shape[1] == 10
    values = stored.embedding[stored.valid][:, [8, 9]]
    times = stored.time[stored.valid]
    for k, dimension in enumerate(("valence", "arousal")):
        expected = np.interp(table["time"], times, values[:, k])
        np.testing.assert_allclose(table[dimension], expected, atol=2e-3)
    other = path.parent / "other.onnx"
    other.write_bytes(path.read_bytes())
    other.with_suffix(".toml").write_text(path.with_suffix(".toml").read_text().replace("BGR", "RGB"))
    exchanged = ["--weights", f"{name}={other}", "--out", str(tmp_path / "exchanged")]
    assert main(["predict", name, "--va", "8,9", str(clips / "single_face.mp4"), *exchanged]) == 0
    capsys.readouterr()
    assert main(["evaluate", name, "--va", "8,9", "--cache", str(cache), "--json"]) == 0
    assert '"n_frames"' in capsys.readouterr().out
    smoothing = ["--smooth", "mean", "--smooth-seconds", "1"]
    assert main(["evaluate", name, "--va", "8,9", "--cache", str(cache), *smoothing]) == 0
    assert "smoothed: mean, 1 s" in capsys.readouterr().out
    assert main(["evaluate", name, "--va", "8,9", "--cache", str(cache), "--without", "visual"]) == 2
    sidecar = path.with_suffix(".toml")
    sidecar.write_text(sidecar.read_text().replace("BGR", "RGB"))
    for command in (["evaluate"], ["predict", "--out", str(tmp_path / "other")]):
        assert main([*command, name, "--va", "8,9", "--cache", str(cache)]) == 2
        assert "is not the model that made its stream" in capsys.readouterr().err


def test_unreadable_baselines_are_rejected(face: tuple[Any, Path], clips: Path, tmp_path: Path, capsys: Any) -> None:
    name, clip = f"onnx:{face[1]}", str(clips / "single_face.mp4")
    for options, message in (
        ([], "no --va"),
        (["--va", "8"], "such as --va 8,9"),
        (["--va", "8,10"], "columns 0 to 9"),
    ):
        assert main(["predict", name, *options, clip, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", name, "--va", "8,9"]) == 2
    assert "--cache CACHE" in capsys.readouterr().err
