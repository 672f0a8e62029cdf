"""What findings cost where they are overlooked, in CCC: figures for the validation videos of Aff-Wild2.

They are scores of perfect or synthetic predictions, so they say what a mistake takes away by itself, without any model.
"""

from itertools import pairwise

# Perfect predictions against labels that are shifted: seconds -> CCC lost in valence and in arousal.
_SHIFTS = ((0.0, 0.0, 0.0), (0.5, 0.059, 0.112), (1.0, 0.121, 0.212))

_SHIFTED = (
    "Labels half a second off take .06 (valence) and .11 (arousal) from the CCC of perfect predictions, "
    "labels a second off .12 and .21"
)
_DRIFT = "By number / rate, labels and pictures drift apart: a second takes .12 and .21 from the CCC"
_LEARNT_BY_HEART = (
    "About half of the variance of the labels lies between videos: whoever knows each video's mean, and nothing else, "
    "scores .70 (valence) and .55 (arousal)"
)

COSTS = {
    "leak": _LEARNT_BY_HEART,
    "two-splits": _LEARNT_BY_HEART,
    "duplicate-across-splits": _LEARNT_BY_HEART,
    "same-name": _LEARNT_BY_HEART,
    "duplicate": "A clip that is there twice counts twice, and in k-fold it may be on both sides",
    "row-count": _SHIFTED,
    "labels-outlast": _SHIFTED,
    "crops-beyond": _SHIFTED,
    "variable-rate": _DRIFT,
    "rate-claim": _DRIFT,
    "unannotated": "With -5 kept as a target, a predictor that scores .586 / .447 comes down to .408 / .316",
    "crops-missing": (
        "Read by position instead of by number, every crop after a gap shows a later moment than its label; "
        "left out of the score, the frames that are hardest do not count"
    ),
    "unreadable": "Labelled frames of a clip that is left out are missing from the score: it is no longer comparable",
    "few-videos": "With 76 videos the mean CCC has a standard deviation of .025 from the choice of videos alone",
    "between-videos": "A model that only tells videos apart looks good; the CCC within videos shows it",
}


def cost_of(code: str) -> str:
    """What a kind of finding costs, or "" where nothing was measured."""
    return COSTS.get(code, "")


def shift_loss(seconds: float) -> tuple[float, float]:
    """CCC that perfect predictions lose in valence and arousal when they are `seconds` off; at most what 1 s costs."""
    for (t0, v0, a0), (t1, v1, a1) in pairwise(_SHIFTS):
        if seconds <= t1:
            share = (max(seconds, t0) - t0) / (t1 - t0)
            return v0 + share * (v1 - v0), a0 + share * (a1 - a0)
    return _SHIFTS[-1][1:]
