"""Steps of an extraction that every engine shares: encoders, streams, plan, summary."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vaflow.cache import Cache
from vaflow.cache.costs import append_costs
from vaflow.cache.schema import CROPS, FACES, StreamInfo
from vaflow.datasets import Dataset
from vaflow.encoders import build_encoder
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.encoders.prompts import load_prompts
from vaflow.errors import FingerprintError, VaflowError, command, explain
from vaflow.extract.batching import CudaMemory, Encode, FixedBatcher, fitting
from vaflow.extract.config import AUTO, ExtractConfig, Shard
from vaflow.extract.faces.detection_torch import TorchDetector
from vaflow.extract.plan import PendingClip, make_plan
from vaflow.extract.streams import EmbeddedSet, as_declared, embed_prompts, stream_infos
from vaflow.extract.summary import OutcomeRecorder, Summary
from vaflow.items import FailureLog

BATCH_SIZES = {"cpu": {"visual": 16, "audio": 2}, "cuda": {"visual": 256, "audio": 64}}
LARGEST = {"visual": 1024, "audio": 256}  # limit of measured sizes: larger batches gain nothing


def build_encoders(config: ExtractConfig, device: torch.device) -> tuple[list[VisualEncoder], list[AudioEncoder]]:
    """Build every encoder named in the settings: visual ones, audio ones.

    Raises:
        WeightsError: weights are missing or do not fit.
        VaflowError: the settings ask for compiled encoders, and this machine cannot compile.
    """
    named = [(name, "visual") for name in config.visual] + [(name, "audio") for name in config.audio]
    options: dict[str, Any] = {"device": str(device), "precision": config.precision}
    built = [build_encoder(name, weights=config.weights.get(name), kind=kind, **options) for name, kind in named]
    if config.compile:
        for encoder in built:
            compile_network(encoder)
    visual = [encoder for encoder in built if encoder.kind == "visual"]
    audio = [encoder for encoder in built if encoder.kind == "audio"]
    return visual, audio  # type: ignore[return-value]


def compile_network(encoder: VisualEncoder | AudioEncoder) -> None:
    """Have torch compile an encoder's network at its first batch; weights, identity and output shapes do not change.

    Raises:
        VaflowError: this machine cannot compile for the encoder's device.
    """
    parameters = next(encoder.module.parameters(), None)
    if parameters is None:  # an ONNX graph, or openSMILE
        return
    from torch._dynamo.exc import TorchDynamoException

    device = parameters.device
    try:  # a trial function: the networks are compiled only at their first full batch
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        expected = "a C++ compiler" if device.type == "cpu" else "Triton, which comes with torch for CUDA"
        got = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        problem, remedy = f"torch cannot compile for {device} here", "Install it, or run without --compile"
        raise VaflowError(explain(problem, expected=expected, got=got, remedy=remedy)) from error
    encoder.module.compile(dynamic=False)


@dataclass(frozen=True)
class Encoders:
    """Encoders by stream name, each with the batcher that feeds it; and the face detector on their device, if used."""

    visual: dict[str, tuple[VisualEncoder, FixedBatcher]] = field(default_factory=dict)
    audio: dict[str, tuple[AudioEncoder, FixedBatcher]] = field(default_factory=dict)
    detector: TorchDetector | None = None

    @property
    def batchers(self) -> dict[str, FixedBatcher]:
        """Stream name -> batcher, of both kinds."""
        return {name: batcher for name, (_, batcher) in (*self.visual.items(), *self.audio.items())}


def make_encoders(
    config: ExtractConfig, device: torch.device, visual: list[VisualEncoder], audio: list[AudioEncoder]
) -> Encoders:
    """Give each encoder a batcher of the size given by the settings or the device.

    An audio encoder that reads a window in several segments uses the batch size of images: each segment is small.
    """
    sizes = BATCH_SIZES[device.type]
    parts = max(1, len(visual) + len(audio))

    def batcher(encode: Encode, setting: int, kind: str) -> FixedBatcher:
        if setting == AUTO and device.type == "cuda":
            measure = partial(fitting, encode, device, CudaMemory(device), parts=parts, most=LARGEST[kind])
            return FixedBatcher(encode, measure, device)
        return FixedBatcher(encode, sizes[kind] if setting in (0, AUTO) else setting, device)

    def audio_batcher(encoder: AudioEncoder) -> FixedBatcher:
        encode = partial(encoder.encode, window=config.window, steps=config.audio_steps)
        if len(encoder.segments(config.window, config.audio_steps).first) == 1:
            return batcher(encode, config.window_batch, "audio")
        return batcher(encode, config.image_batch, "visual")

    return Encoders(
        {e.name: (e, batcher(e.encode, config.image_batch, "visual")) for e in visual},
        {e.name: (e, audio_batcher(e)) for e in audio},
        TorchDetector(device) if config.detector == "torch" and config.face_source != "none" else None,
    )


@dataclass
class NewStreams:
    """The streams of an extraction by name, and its prompts.

    They are added to the cache with the first commit: if every clip fails, the cache keeps no streams whose settings
    the next extraction would have to repeat.
    """

    infos: dict[str, StreamInfo]
    prompts: tuple[EmbeddedSet, ...]
    created: bool = False

    def create(self, cache: Cache) -> None:
        """Declare every stream and commit the prompts, once.

        Raises:
            FingerprintError: another process has declared one of them with other settings.
        """
        if not self.created:
            for info in self.infos.values():
                cache.declare(info)
            for embedded in self.prompts:
                embedded.commit(cache)
            self.created = True


def prepare(cache: Cache, config: ExtractConfig, visual: list[VisualEncoder], audio: list[AudioEncoder]) -> NewStreams:
    """Compare the streams with those of the cache and embed the prompts; nothing is written.

    Raises:
        FingerprintError: a stream in the cache was made with other settings.
    """
    known = cache.streams()
    infos = {name: as_declared(i, known.get(name)) for name, i in stream_infos(config, visual, audio).items()}
    if FACES in known and CROPS not in known:  # of an earlier version: do not decode every clip again for its crops
        infos.pop(CROPS, None)
    for info in infos.values():
        if CROPS in known and info.name in known:
            _check_person(cache, known[info.name], info)
        if info.name in known or cache.source_stamps(info.name):
            cache.declare(info)
    return NewStreams(infos, tuple(embed_prompts(cache, load_prompts(config.prompts), visual)))


def _check_person(cache: Cache, known: StreamInfo, info: StreamInfo) -> None:
    """Check that a stream has the features of the same people; a cache with another choice needs no video.

    Raises:
        FingerprintError: it has those of another choice.
    """
    stored, now = (one.identity.get("picture", {}).get("faces", {}) for one in (known, info))
    if "person" not in stored or "person" not in now or _choice(stored) == _choice(now):
        return
    again = command("cache", "people", cache.place, "OTHER.cache", "--person", now["person"])
    problem = f"{cache.place} has the features of another choice of people"
    remedy = f"To choose again without the videos: {again}"
    raise FingerprintError(explain(problem, expected=_choice(stored), got=_choice(now), remedy=remedy))


def _choice(faces: dict[str, Any]) -> str:
    return f"--person {faces['person']}" + (" with --choices" if "choices" in faces else "")


def carry_out(
    cache: Cache,
    infos: dict[str, StreamInfo],
    dataset: Dataset,
    shard: Shard,
    work: Callable[[Sequence[PendingClip], OutcomeRecorder], None],
    *,
    rehash: bool = False,
    show_progress: bool = False,
) -> Summary:
    """Plan the extraction, call `work` with its tasks, and return the summary; `work` reports outcomes."""
    began = time.perf_counter()
    plan = make_plan(cache, infos, dataset.clips, shard, rehash=rehash)
    log = FailureLog(cache.path / f"failures{shard.suffix}.jsonl")
    summary = Summary(done=plan.done, failures=log.failures)
    summary.failures_file = cache.layout.named(log.path)
    with cache.indexed():
        if plan.tasks:
            with OutcomeRecorder(summary, log, plan.seconds, show_progress=show_progress) as recorder:
                try:
                    work(plan.tasks, recorder)
                finally:
                    append_costs(cache, summary.costs, shard.suffix)
    failed = {failure.item for failure in log.failures}
    changed = [task for task in plan.tasks if task.changed]
    summary.outdated = sum(not failed.isdisjoint((task.clip.id, task.first_item)) for task in changed)
    summary.changed = len(changed) - summary.outdated
    summary.wall_seconds = time.perf_counter() - began
    return summary
