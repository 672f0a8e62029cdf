"""Stage one: encode a data set into a cache, with the local engine or on a Ray cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaflow.cache import create_cache
from vaflow.datasets import Dataset
from vaflow.device import choose_device
from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.extract.config import ExtractConfig, Shard, default_workers
from vaflow.extract.plan import OutcomeRecorder, PendingClip, Summary, carry_out, check_items
from vaflow.extract.streams import prepare
from vaflow.extract.video import require_nvdec
from vaflow.process import check_engine, exit_if_script_runs_again

if TYPE_CHECKING:
    import torch


def extract(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    *,
    store: str = "zarr",
    shard: Shard | None = None,
    rehash: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
    show_progress: bool = False,
) -> Summary:
    """Encode a data set into the cache at `out`; run again to resume. Items that fail do not stop the others.

    Args:
        rehash: compare the contents of source files even where their sizes and times agree with the cache.
        engine: "local", this machine; "ray", every node of a Ray cluster (`vaflow.extract.ray_engine`).
        ray_address: of the cluster, as `ray.init` takes it.

    Raises:
        UsageError: a name or path is wrong, two clips would write the same item, or Ray is not installed or cannot be
            reached.
        FingerprintError: a stream in the cache was made with other settings.
        WeightsError: weights are missing or do not fit.
        CacheError: the cache cannot be written to any more (a full disk, say); what was committed stays.
    """
    exit_if_script_runs_again()
    check_engine(engine, ray_address)
    check_items(dataset.clips, config.person, config.face_source)
    options: dict[str, Any] = {"store": store, "shard": shard, "rehash": rehash, "show_progress": show_progress}
    if engine == "ray":
        from vaflow.extract.ray_engine import extract_on_ray

        return extract_on_ray(dataset, out, config, address=ray_address, **options)
    from vaflow.extract.encoding import build_encoders

    device = choose_device(config.device)
    if config.decoder == "nvdec":
        require_nvdec(str(device))
    visual, audio = build_encoders(config, device)
    return extract_with(dataset, out, config, visual, audio, device, **options)


def extract_with(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    visual: list[VisualEncoder],
    audio: list[AudioEncoder],
    device: "torch.device",
    *,
    store: str = "zarr",
    shard: Shard | None = None,
    rehash: bool = False,
    show_progress: bool = False,
) -> Summary:
    """As `extract` on this machine, with encoders that the caller has built."""
    from vaflow.extract.encoding import make_encoders
    from vaflow.extract.loop import Extraction

    cache = create_cache(out, store=store)
    streams = prepare(cache, config, visual, audio)
    encoders = make_encoders(config, device, visual, audio)
    workers = config.workers or default_workers(device.type)

    def work(tasks: Sequence[PendingClip], recorder: OutcomeRecorder) -> None:
        Extraction(cache, config, streams, encoders, min(workers, len(tasks)), recorder).run(tasks)

    return carry_out(cache, streams.infos, dataset, shard or Shard(), work, rehash=rehash, show_progress=show_progress)
