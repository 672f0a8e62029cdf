"""`vaflow view`, `report`, `runs`, `faces` and `labels`: pages and tables of predictions, runs, people and ratings."""

from pathlib import Path
from typing import Annotated

import typer

from vaflow.cli.common import Output, check_directory, check_file, echo, interval, loading, number, print_json, table
from vaflow.cli.options import argument, flag, option
from vaflow.errors import FAILED, SOME_FAILED, UsageError, command, count, examples, explain

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare and fuse labels of several annotators.")


Shown = Annotated[Path, argument("RUN|PREDICTIONS", "Run, predictions (directory or CSV), or videos to rate.")]
Clips = Annotated[list[str] | None, argument("CLIP", "Clip ids to show (default: all).")]
ViewOut = Annotated[Path, option("DIR", "Directory for the page and its data.")]
Media = Annotated[
    list[Path] | None,
    option("PATH", "Directory or file with the clips; searched by recorded name and size. Repeatable."),
]
MaskCache = Annotated[Path | None, option("CACHE", "Read masks from this cache (default: the predictions' cache).")]
Copy = Annotated[bool, flag("Copy the clips beside the page, so that it can be moved.", "--copy")]
Boxes = Annotated[bool, flag("Detect faces and draw a box around the person.", "--boxes")]
Serve = Annotated[bool, flag("Serve the page on this machine and save ratings made in it.", "--serve")]
Port = Annotated[int, option("N", "Port for --serve (0: any free one).", min=0, max=65535)]
RatingsOut = Annotated[Path | None, option("DIR", "Directory for ratings of --serve (default: DIR/ratings).")]

ReportedRuns = Annotated[list[Path], argument("RUN", "Finished runs; differences are against the first.")]
ReportOut = Annotated[Path, option("FILE", "The HTML file to write.")]
Viewer = Annotated[Path | None, option("DIR", "Link clips to this page, as written by `vaflow view`.")]
Gates = Annotated[
    bool, flag("Show when the fusion lets audio in and what it attends to (runs the models again).", "--gates")
]

RunsRoot = Annotated[Path, argument("DIR", "Directory that is searched for runs.")]

FacesSource = Annotated[Path, argument("CACHE|MEDIA", "Cache, video, or directory of videos.")]
FacesOut = Annotated[Path, option("FILE", "Page to write; faces.csv is written beside it.")]
Videos = Annotated[
    list[Path] | None, option("PATH", "Directory or file with the videos of a cache, for the crops. Repeatable.")
]
Several = Annotated[bool, flag("Show only clips with several people.", "--several")]
Identity = Annotated[str, option("NAME", "Network that joins tracks, for videos: auto, dlib, onnx:FILE or none.")]

RatingsRoot = Annotated[Path, argument("DIR", "Ratings: ANNOTATOR/CLIP.csv or CLIP.ANNOTATOR.csv.")]
FusedOut = Annotated[Path | None, option("DIR", "Write fused labels here, one CSV per clip.")]
Fuse = Annotated[str, option("HOW", "mean, or ewe (evaluator-weighted estimator).")]
MaxLag = Annotated[float, option("SECONDS", "Estimate and remove reaction lags up to this (0: none).")]
Reference = Annotated[Path | None, option("PREDICTIONS", "Run or predictions that lags are measured against.")]
Rate = Annotated[float, option("HZ", "Instants per second for comparison and fusion.")]


def view(
    output: Output,
    path: Shown,
    clips: Clips = None,
    out: ViewOut = Path("view"),
    media: Media = None,
    cache: MaskCache = None,
    copy: Copy = False,
    boxes: Boxes = False,
    serve: Serve = False,
    port: Port = 0,
    ratings: RatingsOut = None,
) -> int:
    """Write a page that plays clips with their predicted traces; it opens from disk without a network.

    Example: vaflow view runs/full --media affwild2/raw_videos --out view
    """
    with loading(output):
        from vaflow.viewer.page import ViewConfig, ViewerServer, write_viewer

    viewer = write_viewer(path, out, clips or (), ViewConfig(tuple(media or ()), cache, copy, boxes))
    document = {"page": str(viewer.page), "clips": [clip.facts for clip in viewer.clips]}
    output.result(lambda: document, lambda: f"{count(len(viewer.clips), 'clip')}: {viewer.page}")
    if serve:
        with ViewerServer(viewer, ratings or out / "ratings", port) as server:
            echo(f"Serving {server.address} until Ctrl-C; ratings go to {server.ratings}", err=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                echo("Stopped", err=True)
    return 0


def report(
    output: Output,
    runs: ReportedRuns,
    out: ReportOut = Path("report.html"),
    viewer: Viewer = None,
    gates: Gates = False,
) -> int:
    """Write one HTML file about runs: scores with intervals, learning curves, clips, errors in the plane.

    Example: vaflow report runs/full runs/visual --out report.html
    """
    check_file(out, "--out")
    with loading(output):
        from vaflow.viewer.report import paired_differences, write_report

    shown = write_report(runs, out, viewer, gates=gates)
    scores = [{"run": str(run.path), "ccc": run.metrics["ccc"], "ci95": run.metrics.get("ci95")} for run in shown]
    output.result(
        lambda: {"page": str(out), "runs": scores, "differences": paired_differences(shown)},
        lambda: f"{count(len(shown), 'run')}: {out}",
    )
    return 0


def runs(output: Output, root: RunsRoot = Path()) -> int:
    """List the runs below a directory with their scores.

    Valence, arousal and mean are the CCC on the split that was scored, 95 % the interval of the mean. A smoothing that
    was tuned on that split makes its score optimistic. A run is outdated if its clips were extracted or labelled
    again, dropped from the cache, or moved into or out of the split since it was scored; caches on object stores are
    not read. -v adds the fusion and the streams.

    Example: vaflow runs runs
    """
    from vaflow.viewer import list_runs

    lines = list(list_runs(root))
    if output.json:
        print_json([vars(line) for line in lines])
        return 0
    rows = []
    smoothed = any(line.smoothing for line in lines)
    for line in lines:
        status = "outdated" if line.outdated else line.status
        name = line.path if status == "done" else f"{line.path} ({status})"
        scores = [number(line.ccc.get(dimension)) for dimension in ("valence", "arousal", "mean")]
        edges = interval(line.ci95.get("mean") or [None])
        row = [name, *scores, edges, line.split, line.temporal, number(line.seed, "d")]
        rows.append(row + [line.smoothing or "none"] * smoothed + [line.fusion, line.streams] * output.verbose)
    header = ["run", "valence", "arousal", "mean", "95 %", "split", "temporal", "seed"]
    header += ["smoothing"] * smoothed + ["fusion", "streams"] * output.verbose
    echo(table(rows, header) if rows else f"No runs below {root}")
    for line in lines:
        if line.outdated:
            clips, again = examples(line.outdated), command("evaluate", root / line.path)
            changed = f"these clips of split {line.split} have changed since it was scored: {clips}"
            echo(f"\n{line.path}: {changed}. Score again: {again}")
    return 0


def faces(
    output: Output,
    path: FacesSource,
    out: FacesOut = Path("faces.html"),
    media: Videos = None,
    several: Several = False,
    identity: Identity = "auto",
) -> int:
    """Write a page with every person of each clip: crops over time, quality, gaps and cuts; and all boxes as CSV.

    Example: vaflow faces affwild2.cache --media affwild2/raw_videos --out faces.html
    """
    from vaflow.cache.remote import url_of

    if url_of(path) is None and not path.exists():
        raise UsageError(explain(f"{path} does not exist", expected="a cache, a video, or a directory of videos"))
    check_file(out, "--out")
    with loading(output):
        from vaflow.viewer.people import write_people
    page = write_people(path, out, media or (), several=several, identity=identity, show_progress=output.bars)
    people = sum(len(clip.people) > 1 for clip in page.clips)
    output.result(
        lambda: {"page": str(out), "table": str(page.table), "clips": page.facts(), "unreadable": page.unreadable},
        lambda: f"{count(len(page.clips), 'clip')}, {people} with several people: {out}, {page.table}",
    )
    if page.unreadable:
        echo(f"Not readable: {', '.join(page.unreadable)}", err=True)
        return SOME_FAILED if page.clips or several else FAILED
    return 0


def agree(
    output: Output,
    root: RatingsRoot,
    out: FusedOut = None,
    fuse: Fuse = "mean",
    max_lag: MaxLag = 0.0,
    reference: Reference = None,
    rate: Rate = 25.0,
) -> int:
    """Print how far annotators agree (CCC, ICC, Cohen's kappa of regions), and fuse their labels.

    Example: vaflow labels agree ratings --max-lag 4 --fuse ewe --out labels
    """
    from vaflow.viewer.ratings import AgreeConfig, compare_ratings, fuse_ratings, read_ratings

    config = AgreeConfig(rate, max_lag, fuse, reference)
    if out is not None and root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(explain(f"--out {out} is inside the ratings", expected=f"a directory outside {root}"))
    if out is not None:
        check_directory(out)
    ratings = read_ratings(root)
    agreement = compare_ratings(ratings, config)
    written = fuse_ratings(ratings, agreement, config, out) if out is not None else []
    document = agreement.as_dict()
    if output.json:
        print_json({**document, "labels": [str(path) for path in written]})
    if output.json or output.quiet:
        return 0
    names = list(agreement.icc["valence"])
    rows = [
        (d, f"{document['mean_ccc'][d]:.3f}", *(f"{agreement.icc[d][name]:.3f}" for name in names))
        for d in agreement.icc
    ]
    echo(
        f"{count(len(agreement.clips), 'clip')}, {agreement.seconds:.0f} s, "
        f"rated by all {len(agreement.annotators)} annotators"
    )
    echo(table(rows, ("dimension", "mean CCC", *names)))
    echo(f"Cohen's kappa of the nine regions, mean over pairs: {agreement.kappa:.3f}")
    weights = [[f"{agreement.weights[d][name]:.3f}" for d in agreement.weights] for name in agreement.annotators]
    lines = [(n, f"{agreement.lags[n]:.2f}", *w) for n, w in zip(agreement.annotators, weights, strict=True)]
    echo(table(lines, ("annotator", "lag (s)", "weight valence", "weight arousal")))
    if out is not None:
        echo(f"{count(len(written), 'fused label file')}: {out}")
    return 0
