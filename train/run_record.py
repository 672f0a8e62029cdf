"""The record of a run, its `config.toml`: settings, streams, cache, counts, environment; and digests of its clips.

The digests detect changed data and splits that share a recording. What a training logs is here, too: the loaded
splits and their labels, a progress bar, the scores of each epoch, and TensorBoard files.
"""

import json
import logging
import os
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import tomli_w
from tqdm import tqdm

from vaflow import __version__
from vaflow.cache import Cache, address
from vaflow.cache.layout import canonical
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS, Record
from vaflow.encoders import warn_of_demonstration
from vaflow.encoders.prompts import region_table
from vaflow.errors import CorruptError, UsageError, count, examples, explain
from vaflow.settings import settings_of
from vaflow.train.batch import TargetSpec
from vaflow.train.config import AUTO, BEFORE_SETTING, TrainConfig, merge
from vaflow.train.inputs import Inputs, InputStream
from vaflow.train.metrics import DIMENSIONS, SCORES, region_occupancy
from vaflow.train.scores import featureless, label_warnings
from vaflow.train.training_loop import Row
from vaflow.train.windows import WindowSet

log = logging.getLogger(__name__)

NO_MEDIA = ("labels", "targets", "time")  # parts of a record's source that are not recordings
_BYTES = "bytes:"


@dataclass(frozen=True)
class ClipDigest:
    """Digests of a clip's contents, from its records.

    Attributes:
        content: digest of all arrays that a run reads of the clip.
        media: digests of the media files that the arrays were made from.
        group: source video or speaker, in which clips may share a file (the people of a video).
    """

    content: str
    media: frozenset[str]
    group: str


def clip_digests(cache: Cache, streams: Iterable[str], items: Iterable[str]) -> dict[str, ClipDigest]:
    """Item -> digest, from the checksums in the cache's records; no array is read.

    Args:
        streams: that a run reads, without the labels, which always count.
    """
    names = sorted({*streams, LABELS})
    return {
        item: _digest(
            [cache.record(name, item) for name in names if cache.has(name, item)],
            str(cache.meta(item).get("group") or item),
        )
        for item in items
    }


def streams_read(config: TrainConfig, cache: Cache) -> list[str]:
    """Streams of a cache that a run reads, without the labels and the prompts."""
    streams = [*config.visual, *config.audio, *config.extra_targets, *((PIXELS, LOGMEL) if config.finetune else ())]
    return [name for name in streams if name in cache.streams()]


def _digest(records: Sequence[Record], group: str) -> ClipDigest:
    contents, media = {}, set()
    for record in records:
        prefix = f"{record.attempt}/"
        files = {path.removeprefix(prefix).replace(record.attempt, ""): facts for path, facts in record.files.items()}
        contents[record.stream] = {"files": files, "arrays": record.arrays, "duration": record.meta.get("duration")}
        for part, identity in record.source.items():
            if part not in NO_MEDIA and isinstance(identity, dict) and isinstance(identity.get("blake2b"), str):
                media.add(identity["blake2b"])
    return ClipDigest(blake2b(canonical(contents), digest_size=16).hexdigest(), frozenset(media), group)


def check_splits_apart(
    train: Mapping[str, ClipDigest], val: Mapping[str, ClipDigest], allow: str = "--set shared_sources=true"
) -> None:
    """Refuse splits that share a recording: validation scores would be those of clips seen in training.

    Args:
        allow: how the user allows it, for the message.

    Raises:
        UsageError: a clip of `train` and one of `val` were made from the same file; pairs are named.
    """
    pairs = _pairs(train, val)
    if pairs:
        problem = "The training and the validation split share recordings"
        remedy = f"Remove one clip of each pair from the cache, or allow it with {allow}"
        raise UsageError(explain(problem, got=_list_pairs(pairs), remedy=remedy))


def shared_recordings(
    split: str, clips: Mapping[str, ClipDigest], train: Mapping[str, ClipDigest] | None = None
) -> list[str]:
    """Return warnings about clips of a split that share a file with each other, or with clips of `train`.

    Clips of one group may share a file, as the people of a video do, unless they are equal.
    """
    twins = [
        (one, other)
        for one, other in _pairs(clips, clips)
        if one < other and (clips[one].group != clips[other].group or clips[one].content == clips[other].content)
    ]
    warnings = [f"{split} counts recordings twice: {_list_pairs(twins)}"] if twins else []
    if train and (pairs := _pairs(train, clips)):
        shared = _list_pairs(pairs)
        warnings.append(f"{split} shares recordings with the training split; the score is optimistic: {shared}")
    return warnings


def _pairs(one: Mapping[str, ClipDigest], other: Mapping[str, ClipDigest]) -> list[tuple[str, str]]:
    """Clips of `one` and of `other` that were made from the same file, sorted."""
    owners: dict[str, list[str]] = {}
    for item, clip in one.items():
        for media in clip.media:
            owners.setdefault(media, []).append(item)
    shared = ((owner, item) for item, clip in other.items() for media in clip.media for owner in owners.get(media, ()))
    return sorted(set(shared))


def _list_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    names = examples([f"{one} and {other}" for one, other in pairs])
    return f"{count(len(pairs), 'pair')} of clips made from the same file: {names}"


def to_json(splits: Mapping[str, Mapping[str, ClipDigest]]) -> str:
    """The file `clips.json` of a run: split -> item -> digest of its contents."""
    plain = {split: {item: clip.content for item, clip in clips.items()} for split, clips in splits.items()}
    return json.dumps(plain, indent=1) + "\n"


def from_json(text: str, name: str) -> dict[str, dict[str, str]]:
    """Read `clips.json`; `name` is the file's, for errors.

    Raises:
        CorruptError: the file is damaged.
    """
    try:
        document = json.loads(text)
        return {split: dict(clips) for split, clips in document.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(explain(f"{name} cannot be read", got=error)) from error


def changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, ClipDigest]]) -> list[str]:
    """Return the differences between a run's clips and a cache, one phrase per split and kind; empty if equal."""
    phrases = []
    for split in sorted({*old, *new}):
        before = old.get(split, {})
        now = {item: clip.content for item, clip in new.get(split, {}).items()}
        kinds = {
            "changed": [item for item in before if item in now and before[item] != now[item]],
            "added": [item for item in now if item not in before],
            "removed": [item for item in before if item not in now],
        }
        for kind, items in kinds.items():
            if items:
                phrases.append(f"{split}: {kind} {examples(sorted(items))}")
    return phrases


@dataclass(frozen=True)
class RunRecord:
    """The contents of `config.toml`.

    Attributes:
        targets: further targets, predicted beside valence and arousal.
        tuned: of a fine-tuned run, the streams that its encoders make; empty until it is finished.
        cache: address of the cache that it was trained on; cache_relative: the same path from the run's directory.
        groups_relative: path of the file of `fold_groups` from the run's directory; empty: none.
        prompts: digest of what the prompt embeddings were made from; empty: without a prompt head, or not recorded.
        data: split -> {"clips", "windows", "labelled_frames", "labelled_valence", "labelled_arousal"}.
        environment: device, PyTorch version and float32 arithmetic of the training.
        settings: the table of settings as it was read: it lacks settings that were added since; empty in a new record.
    """

    config: TrainConfig
    streams: tuple[InputStream, ...]
    cache: str
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    version: str = __version__
    tuned: tuple[InputStream, ...] = ()
    targets: tuple[TargetSpec, ...] = ()
    cache_relative: str = ""
    groups_relative: str = ""
    prompts: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def head_streams(self) -> tuple[InputStream, ...]:
        """Input streams of the heads; fine-tuned encoders replace the streams of their features."""
        tuned = {stream.name: stream for stream in self.tuned}
        return tuple(tuned.get(stream.name, stream) for stream in self.streams)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Dimensions without labels in the training split: their predictions are meaningless."""
        counts = self.data.get(self.config.train_split, {})
        return tuple(name for name in DIMENSIONS if counts.get(f"labelled_{name}") == 0)

    def to_toml(self) -> str:
        """The record as TOML; see `document`."""
        return tomli_w.dumps(self.document())

    def document(self) -> dict[str, Any]:
        """The record as tables: `train` (settings), `data`, one `stream` each, and one `tuned` each."""
        document: dict[str, Any] = {
            "vaflow": self.version,
            "cache": _path_to_text(self.cache),
            "cache_relative": _path_to_text(self.cache_relative),
            "train": self.config.as_dict(),
            "data": {split: dict(counts) for split, counts in self.data.items()},
            "stream": [_as_table(stream) for stream in self.streams],
        }
        if self.groups_relative:
            document["groups_relative"] = _path_to_text(self.groups_relative)
        if self.prompts:
            document["prompts"] = self.prompts
        if self.targets:
            document["target"] = [{**asdict(target), "names": list(target.names)} for target in self.targets]
        if self.environment:
            document["environment"] = dict(self.environment)
        if self.tuned:
            document["tuned"] = [_as_table(stream) for stream in self.tuned]
        return document

    @classmethod
    def from_toml(cls, text: str) -> "RunRecord":
        """Read the text of `to_toml`.

        Raises:
            ValueError: it is not TOML, or a field is missing or invalid.
        """
        try:
            document = tomllib.loads(text)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "RunRecord":
        """Read a document of `document`; other members are ignored.

        Raises:
            ValueError: it lacks a part, or has one of another type.
        """
        try:
            config = merge(BEFORE_SETTING, document["train"])
            streams, tuned = (
                tuple(InputStream(**{**table, "identity": json.loads(table["identity"])}) for table in tables)
                for tables in (document["stream"], document.get("tuned", ()))
            )
            targets = tuple(
                TargetSpec(table["name"], table["task"], tuple(table["names"])) for table in document.get("target", ())
            )
            return cls(
                config,
                streams,
                _path_from_text(document["cache"]),
                document["data"],
                document["vaflow"],
                tuned,
                targets,
                _path_from_text(document.get("cache_relative", "")),
                _path_from_text(document.get("groups_relative", "")),
                str(document.get("prompts", "")),
                document.get("environment", {}),
                document["train"],
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"a field is invalid ({error})") from error


def _as_table(stream: InputStream) -> dict[str, Any]:
    facts = asdict(stream)
    return facts | {"identity": json.dumps(facts["identity"], sort_keys=True)}  # JSON: TOML has no null


def is_utf8(path: str) -> bool:
    """Whether a path is UTF-8, which TOML and TensorBoard require."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _path_to_text(path: str) -> str:
    """The path, or `bytes:` and its percent-encoded bytes if it is not UTF-8."""
    return path if is_utf8(path) else _BYTES + quote(os.fsencode(path))


def _path_from_text(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text.removeprefix(_BYTES))) if text.startswith(_BYTES) else text


def new_record(cache: Cache | Path | str, config: TrainConfig, inputs: Inputs, run: Path | None = None) -> RunRecord:
    """The record of a run before any clip is read; `run` is its directory."""
    cache_address = address(cache.place if isinstance(cache, Cache) else cache)
    record = RunRecord(config, inputs.streams, cache_address, targets=inputs.targets)
    if isinstance(cache, Cache) and inputs.text:
        facts = [cache.fingerprint(inputs.text), cache.record(inputs.text, config.prompts).source]
        record = replace(record, prompts=blake2b(canonical(facts), digest_size=16).hexdigest())
    if run is None:
        return record
    groups, base = config.fold_groups.rpartition(":")[0], Path(run).resolve()
    relative = "" if "://" in cache_address else os.path.relpath(cache_address, base)
    return replace(record, cache_relative=relative, groups_relative=os.path.relpath(groups, base) if groups else "")


def changed_settings(one: TrainConfig, other: TrainConfig, ignore: Iterable[str] = ("device",)) -> list[str]:
    """Return the settings in which two configs differ, as `key: this, not that`.

    The device is left out by default: it changes speed and rounding, not what is trained.
    """
    names = [field.name for field in fields(TrainConfig) if field.name not in ignore]
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return [f"{name}: {_shown(name, a)!r}, not {_shown(name, b)!r}" for name, a, b in pairs if a != b]


def _shown(name: str, value: Any) -> Any:
    """The word for a special value, such as "auto" of epochs; other values as they are."""
    words = settings_of(TrainConfig)[name].words
    return next((word for word, special in words.items() if special == value), value)


def cache_places(run: Path, record: RunRecord) -> list[str]:
    """Addresses where a run's training cache can be: the recorded one, and the same path relative to the run."""
    places = [record.cache] if record.cache else []  # a published run has none
    if record.cache_relative:
        places.append(str((Path(run).resolve() / record.cache_relative).resolve()))
    return places


def describe(config: TrainConfig, train: WindowSet, val: WindowSet) -> None:
    """Log the sizes of both splits, missing features, unused windows and the distribution of the labels."""
    warn_of_demonstration((*config.visual, *config.audio))
    for split, windows in ((config.train_split, train), (config.val_split, val)):
        left_out = len(windows) - len(windows.trainable)
        sizes = len(windows.clips), len(windows), windows.labelled_rows
        log.info("%s: %d clips, %d windows, %d labelled frames", split, *sizes)
        if windows is train and left_out:
            log.info("%s: %d windows without any label are left out of training", split, left_out)
        for stream in windows.streams:
            lacking = sum(stream.name in clip.missing for clip in windows.clips)
            if lacking:
                log.warning("%s: %d of %d clips have no %s", split, lacking, len(windows.clips), stream.name)
        if featureless(windows):
            log.warning("%s: %d clips have no features at all", split, len(featureless(windows)))
    log.info("%s", describe_labels(train, config.centers))
    if config.text and config.kl_weight and not any(clip.valid.all(axis=1).any() for clip in train.clips):
        log.warning(
            "%s: no frame is labelled in both dimensions, so the prompt loss is 0; leave the prompt head out with "
            "--kl-weight 0",
            config.train_split,
        )
    warn_of_labels(config, train)


def describe_labels(windows: WindowSet, centers: float) -> str:
    """Percentages of labelled frames per region, as a table: valence in rows, arousal in columns."""
    value = np.concatenate([clip.value for clip in windows.clips])
    valid = np.concatenate([clip.valid for clip in windows.clips])
    share = region_occupancy(np.where(valid, value, 0), valid, centers)
    if not np.isfinite(share).all():
        return "No frame is labelled in both dimensions: the labels have no regions"
    return f"Share of labelled frames per region:\n{region_table(share.tolist())}"


def warn_of_labels(config: TrainConfig, train: WindowSet) -> list[str]:
    """Log warnings about nearly constant labels and return them."""
    label = np.concatenate([clip.value for clip in train.clips])
    valid = np.concatenate([clip.valid for clip in train.clips])
    warnings = [f"{config.train_split}: {warning}" for warning in label_warnings(label, valid)]
    for warning in warnings:
        log.warning("%s", warning)
    return warnings


def reporter(config: TrainConfig, bar: "tqdm[Any]", write: Callable[[Row], None] | None) -> Callable[[Row], None]:
    """A function that reports an epoch to the progress bar, the log and TensorBoard."""

    def score(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.3f}"  # a dimension can lack labels

    def report(row: Row) -> None:
        bar.n = int(row["epoch"])
        bar.set_postfix_str(f"val CCC {row['val_ccc_mean']:.3f}")
        scores = "  ".join(f"{name} {score(row[f'val_ccc_{name}'])}" for name in SCORES)
        last = "" if config.epochs == AUTO else f"/{config.epochs}"
        # fits a terminal of 80 columns
        log.info("epoch %2d%s  loss %.3f  val CCC  %s", row["epoch"], last, row["loss_total"], scores)
        if write is not None:
            write(row)

    return report


@contextmanager
def tensorboard_writer(folder: Path) -> Iterator[Callable[[Row], None]]:
    """A function that writes the values of one epoch to event files of TensorBoard, which is imported here."""
    from torch.utils.tensorboard import SummaryWriter

    hook = threading.excepthook

    def failed(arguments: threading.ExceptHookArgs) -> None:
        """Silence a write error of the event thread: the next epoch raises it again."""
        if arguments.exc_type is None or not issubclass(arguments.exc_type, OSError):
            hook(arguments)

    def add(row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))

    threading.excepthook = failed
    try:
        with closing(SummaryWriter(str(folder))) as writer:
            yield add
    finally:
        threading.excepthook = hook
