"""Runs to share: a folder in the layout of the Hugging Face hub, and runs loaded from the hub.

DIR/config.json          the run's `config.toml` as JSON, without paths of the machine; names the other files
    model.safetensors    as in the run, with model-valence and model-arousal where it has them
    README.md            model card
    metrics.json, smoothing.json, uncertainty.json, training_features.safetensors, encoders/   as in the run

The folder can be used in place of a run, and `vaflow.train.pretrained_model.PretrainedModel` loads it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vaflow.encoders.hub import hub_file
from vaflow.errors import CorruptError, UsageError, WeightsError, command, count, explain, visible
from vaflow.files import write_file
from vaflow.train.feature_distance import FILE as TRAINING_FEATURES
from vaflow.train.metrics import DIMENSIONS
from vaflow.train.record import RunRecord
from vaflow.train.runs import CONTEXT, PROTOTYPES, PUBLISHED_CONFIG, RunFolder, load_run, require_record
from vaflow.train.smoothing import FILE as SMOOTHING
from vaflow.train.uncertainty import FILE as CALIBRATION

PREFIX = "hf:"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PUBLISHED_FILE = re.compile(  # files that a configuration may name: no code, nothing outside the folder
    r"model(-valence|-arousal)?\.safetensors|(metrics|smoothing|uncertainty)\.json|training_features\.safetensors"
    r"|encoders/(?!\.)[^/\\\0]+(/(?!\.)[^/\\\0]+)?\.(safetensors|json|txt)"
)


def export_run(run: Path, out: Path) -> list[Path]:
    """Write a finished run as a folder to share; returns its files.

    Raises:
        UsageError: `run` is not a finished run, or `out` holds other files.
        CorruptError: a file of the run is damaged.
    """
    record, folder = require_record(run), RunFolder(run)
    model = load_run(run).model
    if not folder.metrics_file.is_file():
        remedy = f"Resume it: {command('train', record.cache, '--out', run, '--config', folder.config_file)}"
        raise UsageError(explain(f"The run {run} was interrupted before it finished", remedy=remedy))
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / PUBLISHED_CONFIG).is_file()):
        raise UsageError(explain(f"{out} is not empty", expected="a new or empty folder, or that of an earlier export"))
    files = [folder.weights_file, folder.metrics_file, *folder.encoders.glob("**/*")]
    files += [folder.path / name for name in (SMOOTHING, CALIBRATION, TRAINING_FEATURES)]
    if record.config.best == "each":
        files += [folder.each_file(name) for name in DIMENSIONS]
    named = {path.relative_to(folder.path).as_posix(): path for path in files if path.is_file()}
    shared = replace(record, cache="", cache_relative="", config=replace(record.config, init="", text_weights=""))
    config = shared.document() | {"files": sorted(named)}
    weights = model.state_dict()
    config |= {
        key: list(weights[name].shape)
        for key, name in (("prototypes", PROTOTYPES), ("context", CONTEXT))
        if name in weights
    }
    for name, path in named.items():
        write_file(out / name, path.read_bytes())
    write_file(out / PUBLISHED_CONFIG, json.dumps(config, indent=2) + "\n")
    write_file(out / "README.md", model_card(folder.path.resolve().name, record, folder.read_metrics()))
    return [out / name for name in (*named, PUBLISHED_CONFIG, "README.md")]


def model_card(name: str, record: RunRecord, metrics: Mapping[str, Any]) -> str:
    """The text of README.md: facts of the run, its scores, and what its author must add."""
    config = record.config
    lines = ["---", "library_name: vaflow", "tags:", "- valence-arousal", "- affective-computing", "---", ""]
    lines += [
        f"# {_plain(name)}",
        "",
        f"Valence and arousal per video frame, trained with vaflow {record.version}.",
        "",
    ]
    lines += ["```bash", "vaflow predict DIR video.mp4 --out predictions", "```", ""]
    lines += [
        "`DIR` is this folder, or `hf:USER/NAME` on the Hugging Face hub. Weights are safetensors.",
        "",
        "## Model",
        "",
    ]
    lines += [f"- Temporal model {config.temporal}, fusion {config.fusion}, hidden size {config.hidden}"]
    for stream in record.head_streams:
        digest = str(stream.identity.get("weights", "none"))
        lines += [f"- {stream.kind} stream `{_plain(stream.name)}`, {stream.dim} dimensions, weights {_plain(digest)}"]
    lines += [
        f"- Further target: {_plain(target.name)} ({', '.join(map(_plain, target.names))})" for target in record.targets
    ]
    named, default = ("visual", "audio", "text", "init", "text_weights", "device"), type(config)().as_dict()
    changed = {key: value for key, value in config.as_dict().items() if value != default.get(key) and key not in named}
    settings = ", ".join(f"{key} = {value}" for key, value in changed.items())
    lines += [f"- Settings that differ from the defaults: {_plain(settings) or 'none'}", "", "## Training data", ""]
    for split, counts in record.data.items():
        clips = count(counts.get("clips", 0), "clip")
        lines += [f"- Split {_plain(split)}: {clips}, {count(counts.get('labelled_frames', 0), 'labelled frame')}"]
    lines += [
        "- To add: data set, version, number of people; age, gender, language, recording conditions; how it was rated"
    ]
    lines += ["", "## Results", ""]
    if isinstance(metrics.get("ccc"), Mapping):
        videos = count(metrics.get("n_videos", 0), "video")
        split = _plain(str(metrics.get("split")))
        lines += [f"Split {split}, {videos}, {count(metrics.get('n_frames', 0), 'frame')}.", ""]
        lines += ["| | CCC | 95 % interval | RMSE |", "|---|---|---|---|"]
        for row in (*DIMENSIONS, "mean"):
            interval = (metrics.get("ci95") or {}).get(row)
            between = "-" if interval is None else " to ".join(map(_number, interval))
            scores = (_number((metrics.get(key) or {}).get(row)) for key in ("ccc", "rmse"))
            lines += ["| {0} | {1} | {3} | {2} |".format(row, *scores, between)]
    lines += ["", "## Limits", "", "- Estimates what annotators saw and heard, not what a person feels"]
    lines += ["- Not for decisions about people, and not for monitoring at work or school"]
    lines += [
        "- To add: licences of the model, of the encoders' weights and of the training data; intended use; contact"
    ]
    return "\n".join(lines) + "\n"


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _plain(text: str) -> str:
    """A name in Markdown: no line breaks, no markup."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", visible(text))


def local_run(run: Path | str) -> Path:
    """The folder of a run; `hf:USER/NAME` is taken from the hub's local cache, or downloaded into it.

    Raises:
        UsageError: the name is not USER/NAME.
        WeightsError: the hub cannot be reached or stalls, or the model does not exist or was not made by vaflow.
    """
    name = str(run)
    if not name.startswith(PREFIX):
        return Path(run)
    repository = name.removeprefix(PREFIX)
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            explain("A model of the Hugging Face hub is named by user and name", expected="hf:USER/NAME", got=name)
        )
    remedy = "Download the repository on a machine with a connection and pass its folder"

    def download(file: str) -> Path:
        return hub_file(repository, (file,), encoder=name, remedy=remedy)

    for _ in range(
        2
    ):  # if the repository changed between two downloads, the second round takes the newest of all files
        config = download(PUBLISHED_CONFIG)
        files = _named_files(config)
        if all(download(file) == config.parent / file for file in files):
            return config.parent
    raise WeightsError(explain(f"{name} changed while it was downloaded", remedy="Run the same command again"))


def _named_files(config: Path) -> Iterable[str]:
    try:
        document = json.loads(config.read_text("utf-8"))
        files = document["files"]
        RunRecord.from_document(document)
        wrong = [file for file in files if not isinstance(file, str) or not _PUBLISHED_FILE.fullmatch(file)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        expected = "a model that `vaflow export` wrote"
        raise CorruptError(
            explain(f"{config} does not describe a vaflow model", expected=expected, got=error)
        ) from error
    if wrong or "model.safetensors" not in files:
        got = repr(wrong[0]) if wrong else "no model.safetensors"
        raise CorruptError(explain(f"{config} names files that a vaflow model does not have", got=got))
    return files
