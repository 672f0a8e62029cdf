"""Effect of an ignored finding on the CCC, measured on the validation labels of Aff-Wild2.

Source of the figures: the 76 annotation files of the validation split of Aff-Wild2 (ABAW, valence-arousal track;
383,814 rows), scored with perfect or synthetic predictions, so that each figure is the cost of one mistake without any
model. `python scripts/label_costs.py FOLDER` computes them for any folder of label files.
"""

from itertools import pairwise

# Perfect predictions against shifted labels: seconds -> CCC lost in valence and in arousal.
SHIFTS = ((0.0, 0.0, 0.0), (0.5, 0.059, 0.112), (1.0, 0.121, 0.212))

_SHIFTED = (
    "On Aff-Wild2 (validation), labels that are 0.5 s off lower the CCC of perfect predictions by .06 (valence) and "
    ".11 (arousal), 1 s off by .12 and .21"
)
_DRIFT = (
    "With times computed as number / rate, labels drift from frames; on Aff-Wild2 (validation), a drift of 1 s lowers "
    "the CCC of perfect predictions by .12 and .21"
)
_MEANS = (
    "On Aff-Wild2 (validation), predicting each video's mean label scores a CCC of .70 (valence) and .55 (arousal): "
    "a model that has seen the video needs no more"
)

COSTS = {
    "leak": _MEANS,
    "two-splits": _MEANS,
    "duplicate-across-splits": _MEANS,
    "same-name": _MEANS,
    "duplicate": "The clip counts twice, and k-fold may put it on both sides",
    "row-count": _SHIFTED,
    "labels-outlast": _SHIFTED,
    "crops-beyond": _SHIFTED,
    "variable-rate": _DRIFT,
    "rate-claim": _DRIFT,
    "unannotated": (
        "On Aff-Wild2 (validation), a predictor that scores .586 / .447 scores .408 / .316 if -5 is kept as a target"
    ),
    "crops-missing": (
        "Crops read by position instead of number show a later moment than their label after every gap; "
        "frames that are left out of the score are the hardest ones"
    ),
    "unreadable": "Labelled frames of the clip are missing from the score, which is then not comparable",
    "few-videos": (
        "On Aff-Wild2 (76 validation videos), the mean CCC has a standard deviation of .025 over resampled videos"
    ),
    "between-videos": "A model that only tells videos apart scores well; the CCC within videos shows it",
}


def cost_of(code: str) -> str:
    """Return the effect of a kind of finding on the CCC, or "" if none was measured."""
    return COSTS.get(code, "")


def shift_loss(seconds: float) -> tuple[float, float]:
    """CCC loss of perfect predictions in valence and arousal at an offset of `seconds`; constant from 1 s on."""
    for (t0, v0, a0), (t1, v1, a1) in pairwise(SHIFTS):
        if seconds <= t1:
            share = (max(seconds, t0) - t0) / (t1 - t0)
            return v0 + share * (v1 - v0), a0 + share * (a1 - a0)
    return SHIFTS[-1][1:]
