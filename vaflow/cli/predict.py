"""`vaflow predict`, `submit`, `export` and `provenance`: results of a trained run, and their origin."""

from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vaflow.cli.common import (
    Output,
    check_directory,
    check_file,
    echo,
    loading,
    print_json,
    report_failures,
    table,
    weight_pairs,
)
from vaflow.cli.options import (
    Device,
    ModelOutputs,
    MovedCache,
    RunOrEnsemble,
    RunOrPredictions,
    Weights,
    argument,
    flag,
    option,
)
from vaflow.errors import UsageError, count, examples, explain, visible

if TYPE_CHECKING:
    from vaflow.predict import Predicted

Media = Annotated[
    list[Path] | None, argument("[MEDIA]...", "Videos, or folders of videos; none: the clips of --cache.")
]
PredictionsOut = Annotated[Path, option("DIR", "Output directory: one CSV and one PNG per clip.")]
Faces = Annotated[
    str | None, option("SOURCE", "Source of the faces, as for `vaflow extract`.", default="as in the run's cache")
]
Person = Annotated[
    str | None,
    option(
        "WHO",
        "Person to predict, as for `vaflow extract`; all: a CSV file per person.",
        default="as in the run's cache",
    ),
]
FeatureCache = Annotated[
    Path | None, option("CACHE", "Keep the features in this cache; without MEDIA, predict its clips.")
]
Html = Annotated[bool, flag("Write a page of the clips: DIR/view/index.html.", "--html")]
Video = Annotated[bool, flag("Write each clip with its traces burnt in: DIR/<stem>.overlay.mp4.", "--video")]

Sample = Annotated[Path, option("FILE", "The challenge's sample submission.")]
Submission = Annotated[Path, option("FILE", "The submission to write.")]
TrialCache = Annotated[Path | None, option("CACHE", "Where the trials' features are; the run's cache.")]
Hold = Annotated[int, option("N", "Most rows after a clip's last frame that repeat its last prediction.", min=0)]

Source = Annotated[Path, argument("SOURCE", "A run; with --format also a folder of predictions.")]
ExportOut = Annotated[Path, argument("DIR", "Output directory.")]
Formats = Annotated[
    str | None, option("NAMES", "Export predictions: csv, eaf, parquet, textgrid, separated by commas.", "--format")
]
Onnx = Annotated[bool, flag("Also write the heads as ONNX: heads.onnx and heads-fixed.onnx.", "--onnx")]
Step = Annotated[float, option("SECONDS", "Length of the intervals in ELAN and Praat files.")]


def predict(
    output: Output,
    run: RunOrEnsemble,
    media: Media = None,
    *,
    out: PredictionsOut,
    weights: Weights = None,
    faces: Faces = None,
    person: Person = None,
    device: Device = "auto",
    cache: FeatureCache = None,
    va: ModelOutputs = None,
    html: Html = False,
    video: Video = False,
) -> int:
    """Predict valence and arousal for every frame of new videos, or of the clips of a cache, labelled or not.

    Writes DIR/CLIP.csv and DIR/CLIP.png. Frames without a face or audio are predicted from the other modality and from
    their context. After an interruption, the same command resumes: files and features of finished clips are kept.

    Example: vaflow predict runs/full interview.mp4 --out predictions

    Example: vaflow predict runs/full --cache new.cache --out predictions

    Example: vaflow predict onnx:hsemotion.onnx --va 8,9 interview.mp4 --out predictions
    """
    with loading(output):
        from vaflow.predict import PredictConfig, predict_media

    config = PredictConfig(device, weight_pairs(weights or []), faces, cache, person, keep_features=html or video)
    bars = output.bars
    if str(run).startswith("onnx:"):
        from vaflow.external_models import Columns, predict_model

        columns = Columns.parse(va, str(run))
        summary = predict_model(str(run), columns, media or [], out, config, show_progress=bars)
    else:
        summary = predict_media(run, media or [], out, config, show_progress=bars)
    if output.json:
        print_json([_document(clip) for clip in summary.predicted])
    elif not output.quiet and summary.predicted:
        echo(predictions_table(summary.predicted))
    if (html or video) and summary.predicted:
        _show(out, media or [], cache or summary.cache, html, video, output)
    summary.discard()
    return report_failures(summary, summary.predicted)


def _document(clip: "Predicted") -> dict[str, Any]:
    """One clip as `--json` prints it."""
    return {
        "item": clip.item,
        "csv": str(clip.csv),
        "png": str(clip.png),
        **clip.means,
        "frames": clip.frames,
        "spread": dict(clip.spreads),
        "regions": dict(clip.regions),
        "seconds_without_face": clip.without_face,
        "seconds_without_audio": clip.without_audio,
        "mean_std": dict(clip.stds) or None,
        "share_far_from_training": clip.far,
        "share_interpolated": clip.interpolated,
    }


def predictions_table(clips: "tuple[Predicted, ...]") -> str:
    """A row per clip: mean and standard deviation of both dimensions, commonest region, time of missing input.

    Runs with a variance head have the mean predicted standard deviations and the share of frames far from training
    instead of the region, so that the table fits 80 columns.
    """

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} s"

    header = ["clip", "valence (sd)", "arousal (sd)", "no face", "no audio"]
    header += ["std (v a)", "far"] if any(clip.stds for clip in clips) else ["region (v/a)"]
    rows = []
    for clip in clips:
        both = (f"{clip.means[name]:+.2f} ({clip.spreads[name]:.2f})" for name in clip.means)
        row = [clip.item, *both, seconds(clip.without_face), seconds(clip.without_audio)]
        if "far" in header:
            row.append(" ".join(f"{value:.2f}" for value in clip.stds.values()) or "-")
            row.append("-" if clip.far is None else f"{clip.far:.0%}")
        else:
            region = max(clip.regions, key=lambda name: clip.regions[name])
            levels = [word[:3] if word == "middle" else word for word in region.split()[::2]]
            row.append(f"{'/'.join(levels)} {clip.regions[region]:.0%}")
        rows.append(row)
    return table(rows, header)


def _show(out: Path, media: list[Path], cache: Path | None, html: bool, video: bool, output: Output) -> None:
    """Write the page and the overlays of new predictions."""
    from vaflow.viewer.page import ViewConfig, write_viewer
    from vaflow.viewer.video import write_overlays

    for item, file, problem in write_overlays(out, media, cache) if video else ():
        if file is None:
            echo(f"No overlay of {item}: {problem}", err=True)
        elif not (output.json or output.quiet):
            echo(f"Overlay of {item}: {file}")
    if html:
        page = write_viewer(out, out / "view", config=ViewConfig(media, cache, boxes=True)).page
        if not (output.json or output.quiet):
            echo(f"Page: {page}")


def submit(
    output: Output,
    run: RunOrEnsemble,
    sample: Sample,
    out: Submission,
    cache: TrialCache = None,
    hold: Hold = 1,
    device: Device = "auto",
) -> int:
    """Write a submission to the ABAW challenge: a prediction for every row of its sample, in the sample's order.

    Nothing is written if a row of the sample has no prediction. FILE.sources.json records what the file was made from.
    Annotation often has one row more than the video has frames: such rows repeat the last prediction (--hold).

    Example: vaflow submit runs/full --cache affwild2.cache --sample VA_test_set_sample.txt --out predictions.txt
    """
    check_file(out, "--out", "submission")
    from vaflow.cache import open_cache

    with loading(output):
        from vaflow.train.ensemble import members_of
        from vaflow.train.run_folder import cache_of
        from vaflow.train.submit import submit_run

    path = cache if cache is not None else cache_of(members_of(run)[0][0])
    done = submit_run(run, open_cache(path), sample, out, hold=hold, device=device, show=output.bars)
    if output.json:
        print_json({"rows": done.rows, "trials": done.trials, "held": done.held, "file": str(out)})
    elif not output.quiet:
        echo(f"Wrote {count(done.rows, 'row')} of {count(done.trials, 'trial')}: {out}")
        if done.held:
            trials = examples([f"{trial} ({rows})" for trial, rows in done.held_in.items()])
            echo(f"Held: {count(done.held, 'row')} after the last frame repeat its prediction, in {trials}")
    return 0


def export(
    output: Output, source: Source, out: ExportOut, formats: Formats = None, onnx: Onnx = False, step: Step = 0.5
) -> int:
    """Export a run to share in the layout of the Hugging Face hub; or, with --format, predictions.

    `vaflow predict DIR` uses an exported run: config.json, model.safetensors and README.md, a model card to complete.

    Formats: `csv` writes clips.csv, a row per clip; `parquet` predictions.parquet, the frames of all clips; `eaf` and
    `textgrid` one file per clip, for ELAN and Praat.

    Example: vaflow export runs/full shared

    Example: vaflow export predictions tables --format csv,eaf,textgrid
    """
    check_directory(out, "DIR")
    if formats is not None:
        from vaflow.viewer.prediction_formats import export_predictions

        if onnx:
            raise UsageError(explain("--onnx exports a run, --format predictions", remedy="Use two commands"))
        names = [name.strip() for name in formats.split(",") if name.strip()]
        files = export_predictions(source, out, names, step)
    else:
        with loading(output):
            from vaflow.train.run_export import export_onnx, export_run

        files = export_run(source, out)
        if onnx:
            files += export_onnx(source, out)
    if output.json:
        print_json([str(file) for file in files])
    elif not output.quiet:
        echo(f"Wrote {count(len(files), 'file')}: {visible(str(out))}")
    return 0


DIGITS = 12  # of digests; --json and -v print them whole


Item = Annotated[str | None, argument("[ITEM]", "One clip.", default="all")]
DataRoot = Annotated[Path | None, option("DIR", "Data set whose files are read again and compared.")]
Predictions = Annotated[
    Path | None, option("PATH", "Output of `vaflow predict` or `vaflow submit`.", default="the run's own")
]


def provenance(
    output: Output,
    run: RunOrPredictions,
    item: Item = None,
    root: DataRoot = None,
    cache: MovedCache = None,
    predictions: Predictions = None,
) -> int:
    """Print what a prediction was made from (run, weights, cache, records, source files) and what has changed since.

    Example: vaflow provenance runs/full trial_12 --root /data/affwild2

    Example: vaflow provenance submission.txt test_7

    Example: vaflow provenance runs/full --json
    """
    from vaflow.provenance import find_provenance

    document = find_provenance(run, item, cache=cache, root=root, predictions=predictions)
    if output.json:
        print_json(document)
    elif not output.quiet:
        lines = run_lines(document, whole=output.verbose)
        echo("\n".join(lines))
        if item is not None:
            for entry in document["predictions"]:
                echo("\n".join(prediction_lines(entry, whole=output.verbose)))
        else:
            echo(f"\n{provenance_table(document['predictions'])}")
    return 0


@wraps(provenance, assigned=["__annotations__"])
def trace(**arguments: Any) -> int:
    """Old name of `vaflow provenance`; works in this version only.

    Example: vaflow trace runs/full
    """
    echo("warning: `vaflow trace` is now `vaflow provenance`; the old name will be removed.", err=True)
    return provenance(**arguments)


def run_lines(document: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """The run or ensemble, its weights, its cache and its streams."""
    cache = document["cache"]
    if "runs" in document["run"]:
        yield f"ensemble  {document['run']['path']}"
    for run in document["run"].get("runs", [document["run"]]):
        share = "".join(f", {value:.3f} of {name}" for name, value in run.get("weight", {}).items())
        settings = _short(run["settings_digest"], whole)
        yield f"run       {run['path']} (vaflow {run['vaflow']}), settings {settings}{share}"
        for name, digest in run["weights"].items():
            yield f"weights   {name} {_short(digest, whole)}"
    place = f"{cache['path']} ({cache.get('store', cache['state'])})"
    exported = "not recorded: the run was exported, without its cache; name it with --cache"
    yield f"cache     {place if cache['path'] else exported}"
    for stream in document["streams"]:
        facts = [f"prompt set {stream['set']!r}"] if "set" in stream else []
        facts += [f"fingerprint {_short(stream['fingerprint'], whole)}"] if "fingerprint" in stream else []
        weights = stream.get("identity", {}).get("weights")
        facts += [f"weights {_short(weights, whole)}"] if isinstance(weights, str) else []
        yield f"stream    {stream['name']}: {', '.join(facts) or '-'}: {stream['state']}"


def provenance_table(entries: list[dict[str, Any]]) -> str:
    """A row per prediction, with the states of its records and source files, and its run if there are several."""

    def states(parts: Any) -> str:
        return ", ".join(dict.fromkeys(part["state"] for part in parts)) or "-"

    several = len({e["run"] for e in entries if "run" in e}) > 1
    rows = [
        [e["item"], Path(e["folder"]).name, e["state"], states(e["records"].values()), states(e["sources"])]
        + [e.get("run", "-")] * several
        for e in entries
    ]
    header = ["clip", "predictions", "state", "features", "source files"] + ["run"] * several
    return table(rows, header) if rows else "no predictions"


def prediction_lines(entry: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """One prediction: what has changed, its records and its source files."""
    yield ""
    made = f", made {entry['made']} by vaflow {entry['vaflow']} with {entry['run']}" if "made" in entry else ""
    yield f"{entry['csv']}{made}: {entry['state']}"
    for part in ("csv", "weights", "settings"):
        if entry.get(f"{part}_state", "same") != "same":
            yield f"  {part}: {entry[f'{part}_state']} since"
    rows = [
        (stream, facts["attempt"], facts["created"], facts["vaflow"] or "-", facts["state"])
        for stream, facts in entry["records"].items()
    ]
    if rows:
        yield table(rows, ("stream", "attempt", "made", "vaflow", "state"))
    parts = [(one["part"], *_identity(one["identity"], whole), one["state"]) for one in entry["sources"]]
    if parts:
        yield ""
        yield table(parts, ("source", "name", "content", "state"))


def _identity(identity: Any, whole: bool) -> tuple[str, str]:
    """Name and content identity of a source file."""
    if not isinstance(identity, dict):
        return "-", str(identity)
    digest = identity.get("blake2b") or identity.get("listing")
    if isinstance(digest, str):
        size = f"{identity['size']} bytes" if "size" in identity else f"{identity.get('count')} files"
        return str(identity.get("name", "-")), f"{size}, {_short(digest, whole)}"
    names = [str(one.get("name")) for one in identity.values() if isinstance(one, dict)]
    return ", ".join(names) or "-", f"{len(identity)} files"


def _short(digest: str, whole: bool) -> str:
    return digest if whole else digest[:DIGITS]
