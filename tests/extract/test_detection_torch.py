"""`--detector torch` equals OpenCV's network; failed detection requests fail only their clip."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_extraction import CONFIG, assert_same_arrays, run

from vaflow.cache import Cache, open_cache
from vaflow.cli import main
from vaflow.datasets import Clip, open_dataset
from vaflow.errors import FingerprintError, VaflowError, WeightsError
from vaflow.extract.config import ExtractConfig, Shard
from vaflow.extract.container import frame_times
from vaflow.extract.decoding_pool import Detect, Done, Failed, Job, Message, WorkerPool
from vaflow.extract.faces import detection_torch
from vaflow.extract.faces.crops import align, decode_jpeg
from vaflow.extract.faces.detection import HELD_BYTES, Cells, CenterFace, decode_cells, find_faces, model_path, shrunk
from vaflow.extract.faces.detection_torch import TorchDetector
from vaflow.extract.loop import DETECTING, DETECTING_ON_DEVICE, ON_DEVICE, bottleneck, idle_share
from vaflow.extract.plan import make_plan
from vaflow.extract.ray_engine import Member
from vaflow.extract.streams import faces_identity, tracker_identity
from vaflow.extract.video import frames_at
from vaflow.extract.worker import run_job

CPU = torch.device("cpu")
TORCH = replace(CONFIG, detector="torch", pixels=True, window=4.0, stride=2.0, frames=8)


@pytest.fixture(scope="module")
def detector(tiny_pair: tuple) -> TorchDetector:
    """A detector with small batches on one thread."""
    return TorchDetector(CPU, 3)


@pytest.fixture(scope="module")
def images(clips: Path) -> list[np.ndarray]:
    """Images of many sizes: four real clips and a photograph of five people."""
    loaded = [np.asarray(Image.open(clips / "multi_face.jpg").convert("RGB"))]
    for name in ("obama.mp4", "carphone.mp4", "wolfgang.mp4", "park.mp4"):
        times = frame_times(clips / name)
        loaded += [image for _, image in frames_at(clips / name, np.array([0, len(times) // 2]), times)]
    return loaded


def test_detection_maps_equal_opencv(images: list[np.ndarray]) -> None:
    """To 1e-4 of the largest value of each map."""
    import cv2

    theirs = cv2.dnn.readNetFromONNX(str(model_path()))
    ours = detection_torch.load_centerface()
    for image in images:
        smaller, _ = shrunk(image)
        theirs.setInput(cv2.dnn.blobFromImage(smaller))
        expected = np.concatenate(theirs.forward(["537", "538", "539", "540"]), axis=1)
        with torch.inference_mode():
            grid = ours(torch.from_numpy(smaller[None])).numpy()
        assert grid.shape == expected.shape
        off = np.abs(grid - expected).max(axis=(0, 2, 3)) / np.abs(expected).max(axis=(0, 2, 3))
        assert off.max() < 1e-4


def test_faces_and_crops_equal_opencv(images: list[np.ndarray], detector: TorchDetector) -> None:
    opencv, detected = CenterFace(), 0
    for image in images:
        expected = opencv.detect(image)
        ((_, _, faces),) = find_faces([(0, image)], detector.detect, 1)
        assert len(faces) == len(expected)
        for face, other in zip(faces, expected, strict=True):
            np.testing.assert_allclose(face.box, other.box, atol=0.01)
            np.testing.assert_allclose(face.landmarks, other.landmarks, atol=0.01)
            assert face.score == pytest.approx(other.score, abs=1e-4)
            difference = np.abs(align(image, face).astype(int) - align(image, other))
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.01
        detected += len(faces)
    assert detected > 10


def same(one: Cells, other: Cells) -> bool:
    return one.places.tobytes() == other.places.tobytes() and one.values.tobytes() == other.values.tobytes()


def test_detections_do_not_depend_on_the_batch(images: list[np.ndarray], detector: TorchDetector) -> None:
    """Detections are bit-identical for any batch composition and position."""
    image, _ = shrunk(images[1])
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    (alone,) = detector.detect([image])
    assert len(alone.places)
    for batch in ([image, noise], [noise, image], [noise, noise, image], [image] * 3):
        detections = detector.detect(batch)
        for cells, shown in zip(detections, batch, strict=True):
            assert same(cells, alone) == (shown is image)


def test_out_of_memory_halves_the_detection_batch(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = shrunk(images[3])
    whole = TorchDetector(CPU, 4)
    (expected,) = whole.detect([image])
    forward = detection_torch.CenterFaceNetwork.forward
    room = 2

    def fits(self: detection_torch.CenterFaceNetwork, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(detection_torch.CenterFaceNetwork, "forward", fits)
    (cells,) = whole.detect([image])
    assert cells.places.tolist() == expected.places.tolist()
    np.testing.assert_allclose(cells.values, expected.values, atol=1e-4)
    room = 0
    with pytest.raises(VaflowError, match="too little memory for a batch of one row"):
        whole.detect([image])


def test_another_network_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = detection_torch.centerface_weights()
    for wrong in (weights[:-1], [(*weights[0][:1], np.zeros(7, np.float32)), *weights[1:]]):
        monkeypatch.setattr(detection_torch, "centerface_weights", lambda wrong=wrong: wrong)
        with pytest.raises(WeightsError, match="another network"):
            detection_torch.load_centerface()


def nothing(images: Sequence[object]) -> list[Cells]:
    return [Cells(np.zeros((0, 2), np.int64), np.zeros((15, 0), np.float32))] * len(images)


def test_detection_batches_are_bounded_and_of_one_size() -> None:
    batch_shapes: list[tuple[int, ...]] = []

    def find(batch: Sequence[np.ndarray]) -> list[Cells]:
        batch_shapes.append((len(batch), *batch[0].shape[:2]))
        return nothing(batch)

    small, wide = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 130, 3), np.uint8)
    shown = [small] * 5 + [wide] + [small] * 2
    results = list(find_faces(enumerate(shown), find, 4))
    assert [number for number, _, _ in results] == list(range(8))
    assert all(image is expected for (_, image, _), expected in zip(results, shown, strict=True))
    assert batch_shapes == [(4, 64, 96), (1, 64, 96), (1, 64, 160), (2, 64, 96)]
    batch_shapes.clear()
    huge = np.zeros((5000, 4000, 3), np.uint8)
    list(find_faces(enumerate([huge] * 4), find, 16))
    assert [count for count, *_ in batch_shapes] == [-(-HELD_BYTES // huge.nbytes), 1]


def test_cells_without_faces_yield_no_detection() -> None:
    assert decode_cells(nothing([0])[0], 0.5) == []


# -- a whole extraction ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extracted(two_clips: Path, tiny_pair: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    arrays = {}
    for name in ("opencv", "torch"):
        out = tmp_path_factory.mktemp(name) / "cache"
        summary = run(open_dataset(two_clips, "videos"), out, tiny_pair, replace(TORCH, detector=name))
        assert (summary.extracted, summary.failures) == (2, [])
        assert (DETECTING in summary.stages) == (DETECTING_ON_DEVICE in summary.stages) == (name == "torch")
        arrays[name] = open_cache(out)
    return arrays


@pytest.mark.slow  # the crops are compared above
def test_crops_and_embeddings_equal_opencv(extracted: dict[str, Cache]) -> None:
    """The same samples; the stored pictures equal but for a grey level here and there, before JPEG."""
    opencv, ours = extracted["opencv"], extracted["torch"]
    assert_same_arrays(opencv, ours, ["labels", "logmel", "ast-tiny"])
    for item in opencv.items():
        a, b = opencv.read("clip-tiny", item), ours.read("clip-tiny", item)
        assert a.valid.any()
        for name in ("valid", "time", "frame"):
            assert a.arrays[name].tolist() == b.arrays[name].tolist()
        for one, other in zip(opencv.read("pixels", item).images, ours.read("pixels", item).images, strict=True):
            assert bool(one) == bool(other)
            if one:
                difference = np.abs(decode_jpeg(one).astype(int) - decode_jpeg(other))
                assert difference.mean() < 0.1
        scale = np.abs(a.embedding).max()
        np.testing.assert_allclose(a.embedding.astype(float), b.embedding.astype(float), atol=0.01 * scale)
    left = ours.read("clip-tiny", "face_noface").valid
    assert left.any()
    assert not left.all()


@pytest.mark.slow  # two extractions with an experimental detector
def test_the_fingerprint_includes_the_detector_for_face_streams(
    extracted: dict[str, Cache], two_clips: Path, tiny_pair: tuple
) -> None:
    import cv2

    opencv, ours = (extracted[name].streams() for name in ("opencv", "torch"))
    assert {name for name in ours if ours[name].identity != opencv[name].identity} == {
        "clip-tiny",
        "crops",
        "faces",
        "pixels",
    }
    runtime, usual = (streams["clip-tiny"].identity["picture"]["faces"] for streams in (ours, opencv))
    tracker = tracker_identity("main", "auto")
    assert usual == {"source": "auto", **faces_identity(tracker=tracker)}
    assert usual["runtime"] == f"opencv {cv2.__version__}"
    assert runtime == usual | {"runtime": f"torch {torch.__version__.partition('+')[0]}, opencv {cv2.__version__}"}
    with pytest.raises(FingerprintError, match=r"torch .*opencv"):
        run(open_dataset(two_clips, "videos"), extracted["torch"].path, tiny_pair, replace(TORCH, detector="opencv"))


@pytest.mark.slow  # as with any detector
def test_detection_is_identical_for_one_worker_and_a_resumed_run(
    extracted: dict[str, Cache], two_clips: Path, tiny_pair: tuple, tmp_path: Path
) -> None:
    dataset = open_dataset(two_clips, "videos")
    alone = replace(TORCH, workers=1)
    assert run(replace(dataset, clips=dataset.clips[1:]), tmp_path / "cache", tiny_pair, alone).extracted == 1
    assert run(dataset, tmp_path / "cache", tiny_pair, alone).extracted == 1
    assert_same_arrays(extracted["torch"], open_cache(tmp_path / "cache"), ["labels", "logmel", "clip-tiny", "pixels"])


@pytest.mark.slow  # the actor runs the same loop
def test_detection_is_identical_on_a_cluster(extracted: dict[str, Cache], two_clips: Path, tmp_path: Path) -> None:
    dataset = open_dataset(two_clips, "videos")
    member = Member(str(tmp_path / "cache"), "zarr", TORCH, 2)
    infos = member.prepare().infos
    assert infos is not None
    plan = make_plan(open_cache(tmp_path / "cache"), infos, dataset.clips, Shard())
    report = member.exchange(plan.tasks, last=True)
    while not report.ended:
        report = member.exchange((), last=True)
    assert report.error is None
    assert_same_arrays(extracted["torch"], open_cache(tmp_path / "cache"), ["labels", "clip-tiny", "pixels"])


# -- detection requests of workers


def asking(clips: Path, *names: str) -> list[Job]:
    grid = ExtractConfig(window=4.0, stride=2.0, frames=4).grid
    paths = [clips / name for name in names]
    clips_made = [Clip(path.stem, None, path.stem, path) for path in paths]
    return [Job(n, clip, grid, False, True, "centerface", (), False, ask=4) for n, clip in enumerate(clips_made)]


def questions(pool: WorkerPool) -> Iterator[tuple[Message, int]]:
    """All messages, and for a request's last image the number of its faces."""
    count = 0
    for message in pool:
        count += isinstance(message, Detect)
        last = isinstance(message, Detect) and message.last
        yield message, count if last else 0
        count = 0 if last else count


def no_faces(count: int) -> tuple[Cells, ...]:
    return tuple(nothing(range(count)))


def the_worker() -> multiprocessing.process.BaseProcess:
    (process,) = multiprocessing.active_children()
    return process


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_worker_killed_while_waiting_fails_only_its_clip(clips: Path, seconds: float) -> None:
    """The answer arrives before or after the death is detected."""
    ends: list[Done | Failed] = []
    with WorkerPool(asking(clips, "obama.mp4", "carphone.mp4"), 1, run_job) as pool:
        for message, count in questions(pool):
            if count:
                if message.job == 0:
                    the_worker().kill()
                    time.sleep(seconds)
                pool.answer(message.job, no_faces(count))
            elif isinstance(message, Done | Failed):
                ends.append(message)
    failed, done = ends
    assert isinstance(failed, Failed)
    assert (failed.job, failed.error) == (0, "WorkerDied")
    assert done == Done(1)


def test_a_worker_waiting_for_a_detection_is_not_a_hang(clips: Path) -> None:
    waited = 0
    with WorkerPool(asking(clips, "carphone.mp4"), 1, run_job, item_timeout=1.0) as pool:
        for message, count in questions(pool):
            if count:
                time.sleep(0 if waited else 3.0)
                waited += 1
                pool.answer(message.job, no_faces(count))
    assert isinstance(message, Done)
    assert waited > 1


def test_a_worker_that_does_not_read_its_detection_is_a_hang(clips: Path) -> None:
    """The worker stops reading while an answer larger than the pipe is sent; killing it releases the sender."""
    large = Cells(np.zeros((10**5, 2), np.int64), np.zeros((15, 10**5), np.float32))
    with WorkerPool(asking(clips, "carphone.mp4"), 1, run_job, item_timeout=1.0) as pool:
        for message, count in questions(pool):
            if count:
                os.kill(the_worker().pid or 0, signal.SIGSTOP)
                pool.answer(message.job, (large,) * count)
    assert isinstance(message, Failed)
    assert message.error == "WorkerHung"


@pytest.mark.slow  # the pool alone is tested above
def test_a_worker_death_during_a_request_fails_one_clip(
    two_clips: Path, tiny_pair: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = TorchDetector.detect
    requests: list[int] = []

    def deadly(self: TorchDetector, images: Sequence[np.ndarray]) -> tuple[Cells, ...]:
        if not requests:
            the_worker().kill()
        requests.append(len(images))
        return detect(self, images)

    monkeypatch.setattr(TorchDetector, "detect", deadly)
    dataset = open_dataset(two_clips, "videos")
    summary = run(dataset, tmp_path / "cache", tiny_pair, replace(TORCH, workers=1))
    assert [failure.error for failure in summary.failures] == ["WorkerDied"]
    assert summary.extracted == 1
    assert max(requests) == detection_torch.QUESTION
    assert run(dataset, tmp_path / "cache", tiny_pair, replace(TORCH, workers=1)).extracted == 1


def test_ask_jobs_are_answered_only_by_the_detector(clips: Path) -> None:
    """OpenCV detections must not be stored under torch's fingerprint."""
    (job,) = asking(clips, "carphone.mp4")
    with pytest.raises(RuntimeError, match="without `ask`"):
        run_job(job, lambda message: None)


def test_the_profile_lists_detection_time() -> None:
    stages = {DETECTING: 8.0, "encoding clip": 2.0, DETECTING_ON_DEVICE: 5.0, ON_DEVICE: 1.0}
    assert "face detection is the bottleneck" in bottleneck(stages)
    assert idle_share(stages) == pytest.approx(0.4)


def test_the_command_line_option_works(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "carphone.mp4").symlink_to((clips / "carphone.mp4").resolve())
    command = ["extract", str(tmp_path / "data"), "--out", str(tmp_path / "cache"), "--audio", "none", "--pixels"]
    command += ["--visual", "none", "--frames", "4", "--device", "cpu"]
    assert main([*command, "--detector", "cuda"]) == 2
    assert "opencv, torch" in capsys.readouterr().err
    assert main([*command, "--detector", "torch", "--profile"]) == 0
    assert DETECTING in capsys.readouterr().out
    assert main([*command]) == 2
    assert "runtime" in capsys.readouterr().err
    assert open_cache(tmp_path / "cache").read("pixels", "carphone").valid.all()
