"""`vaflow extract`: media -> cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vaflow.cli.common import JsonFlag, Quiet, Verbose, print_json, set_up, show_bars, summary_json, table, weight_pairs
from vaflow.errors import UsageError, explain

if TYPE_CHECKING:
    from vaflow.cache import Cache
    from vaflow.extract.pipeline import Summary

SOME_FAILED = 3


def extract(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Root of the data set.")],
    out: Annotated[Path, typer.Option(metavar="CACHE", help="The cache to write; made if it is not there.")],
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="auto, affwild2, afew-va, recola, sewa, muse, videos.")
    ] = "auto",
    visual: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Visual encoder, or none. Repeatable. [clip-vit-b16]")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Audio encoder, or none. Repeatable. [ast]")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Local weights instead of the hub. Repeatable.")
    ] = None,
    window: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds per window.")] = 10.0,
    stride: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds between window starts.")] = 3.0,
    frames: Annotated[int, typer.Option(metavar="N", help="Frames per window.")] = 20,
    audio_steps: Annotated[int, typer.Option(metavar="N", help="Audio steps per window.")] = 20,
    store: Annotated[str, typer.Option(metavar="STORE", help="zarr or hdf5.")] = "zarr",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float16 or float32, of stored embeddings.")] = "float16",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda[:N].")] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Of the encoders: auto (float32), bfloat16, or float16 (CUDA only).")
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Have torch compile the encoders: slower to start, then faster.")
    ] = False,
    faces: Annotated[
        str, typer.Option(metavar="HOW", help="auto (crops if there are any, else detection), centerface, none.")
    ] = "auto",
    pixels: Annotated[bool, typer.Option("--pixels", help="Keep the face crops (JPEG) for fine-tuning.")] = False,
    decoder: Annotated[
        str, typer.Option(metavar="NAME", help="Of pictures: pyav, or nvdec (on the GPU, through torchcodec).")
    ] = "pyav",
    detector: Annotated[
        str, typer.Option(metavar="NAME", help="Of faces: opencv, or torch (in batches, on the encoders' device).")
    ] = "opencv",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of prompt templates and descriptions.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Do part I of N of the data set.")] = "1/1",
    engine: Annotated[str, typer.Option(metavar="NAME", help="local, or ray: all nodes of a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Ray cluster to join, as auto or HOST:PORT; else RAY_ADDRESS, else a local Ray."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Decoding processes (with ray: per actor); 0 chooses by machine.")
    ] = 0,
    item_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Give a clip up when its decoder shows no sign of life so long; 0: never."
        ),
    ] = 300.0,
    image_batch: Annotated[
        str, typer.Option(metavar="N", help="Images per batch; 0 chooses by device, auto by a GPU's free memory.")
    ] = "0",
    window_batch: Annotated[str, typer.Option(metavar="N", help="Audio windows per batch; as --image-batch.")] = "0",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Only the items that the last run listed as failed.")
    ] = False,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Compare file contents, not only sizes and times, with the cache.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went, and the bottleneck.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    json: JsonFlag = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Encode a data set once: per-frame and per-window embeddings in a cache. Run it again to resume.

    Example: vaflow extract /data/affwild2 --out affwild2.cache --visual clip-vit-b16 --audio ast

    On many machines: the same with --shard 3/8 on the third of eight, or with --engine ray (docs/clusters.md).
    """
    set_up(verbose, quiet)
    from vaflow.datasets import log_left_out, open_dataset
    from vaflow.extract.config import ENGINES, ExtractConfig, Shard, batch_size

    if engine not in ENGINES:
        raise UsageError(explain("Unknown engine", got=engine, choices=ENGINES))
    if ray_address is not None and engine != "ray":
        raise UsageError(explain("--ray-address is for --engine ray", got=f"--engine {engine}"))
    part = Shard.parse(shard)
    config = ExtractConfig(
        visual=_names(visual, ("clip-vit-b16",), "visual"),
        audio=_names(audio, ("ast",), "audio"),
        weights=weight_pairs(weights or []),
        window=window,
        stride=stride,
        frames=frames,
        audio_steps=audio_steps,
        dtype=dtype,
        face_source=faces,
        pixels=pixels,
        decoder=decoder,
        detector=detector,
        prompts=prompts,
        device=device,
        precision=precision,
        compile=compile,
        image_batch=batch_size("--image-batch", image_batch),
        window_batch=batch_size("--window-batch", window_batch),
        workers=workers,
        item_timeout=item_timeout,
    )
    dataset = open_dataset(root, layout)
    log_left_out(dataset)
    if retry_failed:
        from vaflow.extract.failures import only_failed

        dataset = only_failed(dataset, out)
    if dry_run:
        from vaflow.extract.estimate import estimate

        guess = estimate(dataset, out, config, part, show_progress=show_bars(quiet))
        print_json(guess) if json else typer.echo(_pairs(guess))
        return 0
    from vaflow.cache import open_cache
    from vaflow.extract.pipeline import extract as run

    summary = run(
        dataset,
        out,
        config,
        store=store,
        shard=part,
        rehash=rehash,
        engine=engine,
        ray_address=ray_address,
        show_progress=show_bars(quiet),
    )
    if json:
        print_json(_as_json(summary))
    elif not quiet:
        typer.echo(_describe(summary, open_cache(out)))
    if profile and summary.stages and not json:
        typer.echo(_stages(summary.stages))
    return _exit_code(summary)


def _exit_code(summary: "Summary") -> int:
    """Whether all, some or no item succeeded; where the failures are listed."""
    if summary.failures:
        typer.echo(f"{len(summary.failures)} item(s) failed: {summary.failures_file}", err=True)
        return SOME_FAILED if summary.extracted or summary.done else 1
    return 0


def _names(given: list[str] | None, default: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Encoder names of one kind; "none" alone means none of it.

    Raises:
        UsageError: an unknown encoder, or one of the other kind.
    """
    from vaflow.encoders import ENCODERS, encoder_kind

    names = tuple(dict.fromkeys(given or default))
    if names == ("none",):
        return ()
    if kind == "audio":
        names = tuple(name for name in names if name != "logmel")  # always kept, whatever is named
    for name in names:
        if encoder_kind(name) != kind:
            raise UsageError(
                explain(
                    f"--{kind} names an encoder of another kind",
                    got=name,
                    choices=[n for n in ENCODERS if encoder_kind(n) == kind],
                )
            )
    return names


def _describe(summary: "Summary", cache: "Cache") -> str:
    """What a person wants to know at the end: what is there now, what this run did, how fast."""
    info = cache.info()
    rows = [
        (name, s["kind"], s["items"], f"{s['bytes'] / 1e6:.1f}", summary.encoded.get(name, 0))
        for name, s in info["streams"].items()
    ]
    lines = [table(rows, ("stream", "kind", "items", "MB", "encoded now")), ""]
    if summary.done:
        lines.append(f"{summary.done} item(s) were there already.")
    if summary.changed:
        lines.append(f"{summary.changed} item(s) were redone because their source has changed.")
    speed = summary.media_seconds / max(summary.wall_seconds, 1e-9)
    lines.append(
        f"Extracted {summary.extracted} item(s), {summary.media_seconds / 60:.1f} min of video, "
        f"in {summary.wall_seconds:.1f} s ({speed:.1f} times real time)."
    )
    return "\n".join(lines)


def _stages(stages: dict[str, float]) -> str:
    from vaflow.extract.profile import bottleneck

    rows = [(stage, f"{seconds:.1f}") for stage, seconds in stages.items()]
    return f"\n{table(rows, ('stage', 'seconds'))}\n{bottleneck(stages)}"


def _as_json(summary: "Summary") -> dict[str, object]:
    return summary_json(summary)


def _pairs(values: dict[str, object]) -> str:
    return table([(key.replace("_", " "), value) for key, value in values.items()], ("would do", ""))
