"""Ratings of several annotators: read, shifted by reaction lag, compared, and fused into labels.

`ratings` is [K, N]: K annotators, N instants of one dimension, without NaN.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vaflow.datasets.files import below
from vaflow.datasets.videos import read_csv
from vaflow.errors import UsageError, count, examples, explain
from vaflow.files import write_file
from vaflow.timeline import Bools, Floats, median_interval
from vaflow.train.metrics import region_of
from vaflow.viewer import DIMENSIONS, find_predictions, read_predictions

FUSIONS = ("mean", "ewe")
FUSED = "fused.json"  # beside fused labels: how they were made
log = logging.getLogger(__name__)
PAUSE = 1.0  # seconds without a row, and three usual intervals, after which an annotator has paused
_ROUNDS = 4  # of aligning every annotator to the mean of the others


def pairwise_ccc(ratings: ArrayLike) -> Floats:
    """Concordance of every pair of annotators, [K, K], population variance; 1 on the diagonal."""
    x = np.asarray(ratings, np.float64)
    mean, spread = x.mean(axis=1), x.var(axis=1)
    covariance = np.atleast_2d(np.cov(x, bias=True))
    below = spread[:, None] + spread[None] + np.square(mean[:, None] - mean[None])
    ccc = np.where(below > 0, 2 * covariance / np.where(below > 0, below, 1), 0.0)
    np.fill_diagonal(ccc, 1.0)
    return ccc


def icc(ratings: ArrayLike) -> dict[str, float]:
    """Intraclass correlations of two-way models; NaN without variance or with fewer than two annotators.

    Returns:
        "ICC(2,1)", "ICC(2,k)": absolute agreement of one annotator and of the mean of all; "ICC(3,1)", "ICC(3,k)":
        consistency of the same.

    Source: Shrout and Fleiss, "Intraclass correlations: uses in assessing rater reliability", 1979.
    """
    x = np.asarray(ratings, np.float64).T  # [N, K]: targets by judges
    n, k = x.shape
    names = ("ICC(2,1)", "ICC(2,k)", "ICC(3,1)", "ICC(3,k)")
    if n < 2 or k < 2:
        return dict.fromkeys(names, float("nan"))
    mean = x.mean()
    targets = k * np.square(x.mean(axis=1) - mean).sum() / (n - 1)
    judges = n * np.square(x.mean(axis=0) - mean).sum() / (k - 1)
    total = np.square(x - mean).sum()
    error = (total - targets * (n - 1) - judges * (k - 1)) / ((n - 1) * (k - 1))
    above = targets - error
    below = (
        targets + (k - 1) * error + k * (judges - error) / n,
        targets + (judges - error) / n,
        targets + (k - 1) * error,
        targets,
    )
    return {name: float(above / b) if b > 0 else float("nan") for name, b in zip(names, below, strict=True)}


def cohen_kappa(one: ArrayLike, other: ArrayLike, categories: int = 9) -> float:
    """Agreement of two sequences of categories beyond chance; NaN where chance alone agrees everywhere."""
    a, b = np.asarray(one, int), np.asarray(other, int)
    table = np.bincount(categories * a + b, minlength=categories**2).reshape(categories, categories) / max(1, a.size)
    chance = float(table.sum(axis=1) @ table.sum(axis=0))
    return float((np.trace(table) - chance) / (1 - chance)) if chance < 1 else float("nan")


def mean_kappa(regions: ArrayLike) -> float:
    """Mean of Cohen's kappa over pairs of annotators; regions [K, N]."""
    table = np.asarray(regions, int)
    values = [cohen_kappa(table[i], table[j]) for i, j in combinations(range(len(table)), 2)]
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def delay(reference: Floats, late: Floats, most: int) -> int:
    """Samples by which `late` follows `reference`, in [-most, most]: where their correlation is highest.

    Args:
        reference, late: [D, N], all dimensions; correlations are averaged over the dimensions that vary.
        most: largest delay that is tried; at least half of the samples overlap.
    """
    length = reference.shape[-1]
    best, lag = -np.inf, 0
    for shift in sorted(range(-min(most, length // 2), min(most, length // 2) + 1), key=abs):
        a = reference[:, max(0, -shift) : length - max(0, shift)]
        b = late[:, max(0, shift) : length - max(0, -shift)]
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        varies = spread > 1e-12
        if varies.any():
            correlation = float(((a * b).sum(axis=1)[varies] / spread[varies]).mean())
            if correlation > best + 1e-12:
                best, lag = correlation, shift
    return lag


def evaluator_weights(ratings: ArrayLike) -> Floats:
    """Weight of each annotator in the evaluator-weighted estimator, [K], sums to 1.

    The weight is the correlation with the mean of all annotators; negative ones count as 0. Equal weights where no
    annotator correlates.

    Source: Grimm and Kroschel, "Evaluation of natural emotions using self assessment manikins", 2005.
    """
    x = np.asarray(ratings, np.float64)
    centred, mean = x - x.mean(axis=1, keepdims=True), x.mean(axis=0) - x.mean()
    below = np.sqrt((centred**2).sum(axis=1) * (mean**2).sum())
    weight = np.maximum(0, np.where(below > 1e-12, centred @ mean / np.where(below > 1e-12, below, 1), 0.0))
    return weight / weight.sum() if weight.sum() > 0 else np.full(len(x), 1 / len(x))


@dataclass(frozen=True)
class AgreeConfig:
    """How ratings are compared.

    Attributes:
        rate: instants per second at which traces are compared and fused.
        max_lag: seconds of reaction lag that are tried; 0: lags are not estimated.
        fusion: "mean" or "ewe", the evaluator-weighted estimator.
        reference: a run or predictions, against which the lag of all annotators is measured.
        centers: of the nine regions.

    Raises:
        UsageError: a value is out of range.
    """

    rate: float = 25.0
    max_lag: float = 0.0
    fusion: str = "mean"
    reference: Path | None = None
    centers: float = 0.66

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise UsageError(explain("Unknown --fuse", got=self.fusion, choices=FUSIONS))
        if not (0.5 <= self.rate <= 1000 and 0 <= self.max_lag <= 60):
            got = f"--rate {self.rate:g}, --max-lag {self.max_lag:g}"
            expected = "a rate from 0.5 to 1000 Hz and a lag from 0 to 60 s"
            raise UsageError(explain("--rate or --max-lag is out of range", expected=expected, got=got))


@dataclass(frozen=True)
class Rating:
    """One annotator's trace of one clip.

    Attributes:
        time: [N] seconds; value: [N, 2], rated in both dimensions.
        pauses: (start, end) seconds between two samples with unrated rows or no rows between them.
    """

    time: Floats
    value: Floats
    pauses: tuple[tuple[float, float], ...] = ()

    def at(self, instants: Floats) -> Floats:
        """[2, M]: linear between samples, also across pauses."""
        return np.stack([np.interp(instants, self.time, column) for column in self.value.T])

    def rated_at(self, instants: Floats) -> Bools:
        """[M]: whether an instant is not within a pause."""
        inside = [(instants > start) & (instants < end) for start, end in self.pauses]
        return ~np.any(inside, axis=0) if inside else np.ones(len(instants), bool)


Ratings = Mapping[str, Mapping[str, Rating]]  # clip -> annotator -> trace


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree.

    Attributes:
        annotators: sorted names; clips: those that all of them rated; seconds: of them together.
        ccc: dimension -> [K, K]; icc: dimension -> ICC by name; kappa: of the regions, mean over pairs.
        lags: annotator -> seconds behind the reference, or behind the fastest annotator.
        weights: dimension -> annotator -> weight of the evaluator-weighted estimator.
    """

    annotators: tuple[str, ...]
    clips: tuple[str, ...]
    seconds: float
    ccc: Mapping[str, Floats]
    icc: Mapping[str, Mapping[str, float]]
    kappa: float
    lags: Mapping[str, float]
    weights: Mapping[str, Mapping[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for NaN."""
        pairs = ~np.eye(len(self.annotators), dtype=bool)
        return {
            "annotators": self.annotators,
            "clips": self.clips,
            "seconds": self.seconds,
            "mean_ccc": {name: float(table[pairs].mean()) for name, table in self.ccc.items()},
            "ccc": {name: table.tolist() for name, table in self.ccc.items()},
            "icc": {
                d: {n: v if np.isfinite(v) else None for n, v in by_name.items()} for d, by_name in self.icc.items()
            },
            "kappa": self.kappa if np.isfinite(self.kappa) else None,
            "lags": dict(self.lags),
            "weights": {name: dict(by_name) for name, by_name in self.weights.items()},
        }


def read_ratings(root: Path) -> dict[str, dict[str, Rating]]:
    """Return the ratings below a directory: `<annotator>/<clip>.csv`, or `<clip>.<annotator>.csv`.

    Raises:
        UsageError: no ratings were found.
        DataError: a file is not a label CSV with times and both dimensions.
    """
    ratings: dict[str, dict[str, Rating]] = {}
    for path in sorted(root.rglob("*.csv")) if root.is_dir() else []:
        parts = path.relative_to(root).as_posix().removesuffix(".csv")
        annotator, slash, clip = parts.partition("/")
        if not slash:
            clip, _, annotator = parts.rpartition(".")
        rating = _read(path) if clip and annotator else None
        if rating is not None:
            ratings.setdefault(clip, {})[annotator] = rating
    if not ratings:
        expected = "ANNOTATOR/CLIP.csv or CLIP.ANNOTATOR.csv with columns time, valence, arousal"
        remedy = "Rate clips in the page of `vaflow view RUN --serve`"
        raise UsageError(explain(f"{root} has no ratings", expected=expected, remedy=remedy))
    return ratings


def _read(path: Path) -> Rating | None:
    """A trace; None where no row is rated in both dimensions."""
    annotation = read_csv(path)
    if annotation.time is None or set(annotation.targets) != set(DIMENSIONS):
        raise UsageError(explain(f"{path} is not a rating", expected="columns time, valence, arousal"))
    rated = np.asarray(np.isfinite(annotation.value).all(axis=1), bool)
    rows = np.flatnonzero(rated)
    gap = max(PAUSE, 3 * median_interval(annotation.time))  # the viewer writes no rows while nobody rates
    apart = np.flatnonzero((np.diff(rows) > 1) | (np.diff(annotation.time[rows]) > gap))
    pauses = tuple((float(annotation.time[rows[k]]), float(annotation.time[rows[k + 1]])) for k in apart)
    return Rating(annotation.time[rated], annotation.value[rated].astype(np.float64), pauses) if rated.any() else None


def compare_ratings(ratings: Ratings, config: AgreeConfig) -> Agreement:
    """Return agreement over the clips that all annotators rated, after removing lags where they are estimated.

    Raises:
        UsageError: fewer than two annotators, no clip that all of them rated, or no instant.
    """
    annotators = tuple(sorted({name for by_annotator in ratings.values() for name in by_annotator}))
    clips = tuple(sorted(clip for clip, by_annotator in ratings.items() if len(by_annotator) == len(annotators)))
    if len(annotators) < 2 or not clips:
        got = f"annotators {', '.join(annotators)}; {count(len(clips), 'clip')} rated by all"
        raise UsageError(explain("Agreement requires two annotators and a clip rated by all of them", got=got))
    lags = reaction_lags({clip: ratings[clip] for clip in clips}, annotators, config)
    tables = []
    for clip in clips:
        _, traces, rated = _fused_clock(ratings[clip], annotators, lags, config.rate)
        tables.append(traces[..., rated])
    table = np.concatenate(tables, axis=-1)  # [K, 2, N]
    if not table.shape[-1]:
        raise UsageError(explain(f"The ratings of {examples(clips)} have no instant that all annotators rated"))
    regions = [region_of(rated.T, config.centers) for rated in table]
    weights = {d: evaluator_weights(table[:, k]) for k, d in enumerate(DIMENSIONS)}
    return Agreement(
        annotators,
        clips,
        table.shape[-1] / config.rate,
        {d: pairwise_ccc(table[:, k]) for k, d in enumerate(DIMENSIONS)},
        {d: icc(table[:, k]) for k, d in enumerate(DIMENSIONS)},
        mean_kappa(regions),
        lags,
        {d: dict(zip(annotators, map(float, w), strict=True)) for d, w in weights.items()},
    )


def _instants(rated: Iterable[tuple[Rating, float]], rate: float) -> Floats:
    """Instants at which all traces, shifted back by their lags, have values."""
    edges = [(rating.time[0] - lag, rating.time[-1] - lag) for rating, lag in rated]
    first, last = max(a for a, _ in edges), min(b for _, b in edges)
    return np.arange(np.ceil(max(0.0, first) * rate - 1e-6) + 0.0, np.floor(last * rate + 1e-6) + 1) / rate


def _fused_clock(
    rated: Mapping[str, Rating], names: Iterable[str], lags: Mapping[str, float], rate: float
) -> tuple[Floats, Floats, Bools]:
    """Common instants [N] of the annotators of one clip, their traces [K, 2, N], and whether all rated it [N]."""
    both = [(rated[name], lags.get(name, 0.0)) for name in names]
    instants = _instants(both, rate)
    traces = np.stack([rating.at(instants + lag) for rating, lag in both])
    return instants, traces, np.all([rating.rated_at(instants + lag) for rating, lag in both], axis=0)


def reaction_lags(ratings: Ratings, annotators: Iterable[str], config: AgreeConfig) -> dict[str, float]:
    """Seconds by which each annotator lags; all 0 where `max_lag` is 0.

    Each annotator is aligned to the mean of the others, repeatedly, by the highest correlation, so lags between
    annotators follow. With a reference the mean lag of all is measured against it; without one the fastest annotator
    has lag 0, because ratings alone do not show when the clip moved.
    """
    names = list(annotators)
    lags = dict.fromkeys(names, 0.0)
    if not config.max_lag:
        return lags
    most = round(config.max_lag * config.rate)
    for _ in range(_ROUNDS):
        for name in names:
            others = [other for other in names if other != name]
            shifts = []
            for rated in ratings.values():
                _, table, _ = _fused_clock(rated, [name, *others], {**lags, name: 0.0}, config.rate)
                if table.shape[-1] > 1:
                    shifts.append((delay(table[1:].mean(axis=0), table[0], most), table.shape[-1]))
            if shifts:
                lags[name] = _weighted_median(shifts) / config.rate
    late = min(lags.values())
    if config.reference is not None:
        late = min(lags.values()) - _lag_of_all(ratings, names, lags, config)
    return {name: lag - late for name, lag in lags.items()}


def _lag_of_all(ratings: Ratings, names: list[str], lags: Mapping[str, float], config: AgreeConfig) -> float:
    """Seconds by which the fastest annotator lags behind the reference's predictions."""
    assert config.reference is not None
    first = min(lags.values())
    shifts = []
    for clip in find_predictions(config.reference).clips:
        if clip.item in ratings:
            predictions = read_predictions(clip.csv)
            both = [(ratings[clip.item][name], lags[name] - first) for name in names]
            instants = _instants([*both, (Rating(predictions.time, predictions.va), 0.0)], config.rate)
            if len(instants) > 1:
                mean = np.mean([rating.at(instants + lag) for rating, lag in both], axis=0)
                reference = Rating(predictions.time, predictions.va).at(instants)
                shifts.append((delay(reference, mean, round(config.max_lag * config.rate)), len(instants)))
    if not shifts:
        raise UsageError(explain(f"{config.reference} predicts none of the rated clips", expected="clips of one name"))
    return _weighted_median(shifts) / config.rate


def _weighted_median(shifts: list[tuple[int, int]]) -> float:
    ordered = sorted(shifts)
    total = np.cumsum([weight for _, weight in ordered])
    return float(ordered[int(np.searchsorted(total, total[-1] / 2))][0])


def fuse_ratings(ratings: Ratings, agreement: Agreement, config: AgreeConfig, out: Path) -> list[Path]:
    """Write one label CSV per clip (time, valence, arousal): the fused trace of all who rated it.

    Cells are empty where one of them did not rate. A clip that has no common instant gets no file. `fused.json` lists
    the annotators of each clip; files that an earlier call listed are replaced or removed, others never.

    Raises:
        UsageError: the directory holds other tables of these names.
        VaflowError: it cannot be written.
    """
    earlier = _fused_before(out)
    foreign = [clip for clip in sorted(ratings) if clip not in earlier and (out / f"{clip}.csv").exists()]
    if foreign:
        problem = f"{out} holds tables that fused labels would replace"
        got = examples([f"{clip}.csv" for clip in foreign])
        raise UsageError(explain(problem, got=got, remedy="Choose another --out"))
    tables: dict[str, str] = {}
    for clip, rated in sorted(ratings.items()):
        names = sorted(rated)
        instants, table, everyone = _fused_clock(rated, names, agreement.lags, config.rate)
        if not everyone.any():
            log.warning("%s: no label, because its annotators rated no common instant: %s", clip, ", ".join(names))
            continue
        if len(names) == 1:
            log.warning("%s: rated by %s alone", clip, names[0])
        weights = np.ones((2, len(names)))
        if config.fusion == "ewe":
            weights = np.array([[agreement.weights[d][name] for name in names] for d in DIMENSIONS])
            weights[weights.sum(axis=1) == 0] = 1
        fused = np.einsum("dk,kdn->nd", weights / weights.sum(axis=1, keepdims=True), table)
        columns = zip(instants, fused.tolist(), everyone, strict=True)
        rows = [f"{t:.6f},{v:.6f},{a:.6f}" if known else f"{t:.6f},," for t, (v, a), known in columns]
        tables[clip] = "\n".join(["time,valence,arousal", *rows]) + "\n"
    document = {"fusion": config.fusion, "rate": config.rate, "lags": agreement.lags}
    clips = {clip: sorted(ratings[clip]) for clip in tables}
    both = document | {"clips": earlier | clips}  # written first, so that an interrupted call can be repeated
    write_file(out / FUSED, json.dumps(both, indent=1) + "\n")
    for clip, text in tables.items():
        write_file(out / f"{clip}.csv", text)
    for clip in earlier.keys() - clips.keys():
        below(out, f"{clip}.csv").unlink(missing_ok=True)
    write_file(out / FUSED, json.dumps(document | {"clips": clips}, indent=1) + "\n")
    return [out / f"{clip}.csv" for clip in tables]


def _fused_before(out: Path) -> dict[str, Any]:
    """Clips that an earlier call has written to `out`, from its list; empty without one that can be read."""
    try:
        clips = json.loads((out / FUSED).read_text("utf-8"))["clips"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return clips if isinstance(clips, dict) else {}
