"""The nine regions of the valence-arousal plane: their index, keys, names, and the table of their shares.

Region index = 3 * valence level + arousal level. Prompts, reports and figures all use these names.
"""

from collections.abc import Sequence

LEVELS = ("low", "middle", "high")
REGIONS = tuple((f"v_{valence}", f"a_{arousal}") for valence in LEVELS for arousal in LEVELS)  # keys of a prompt set
REGION_NAMES = tuple(f"{valence} valence, {arousal} arousal" for valence in LEVELS for arousal in LEVELS)


def region_table(shares: Sequence[float]) -> str:
    """Text table of the regions' shares in per cent, 31 columns: valence down (high first), arousal across (low first).

    Args:
        shares: [9] in [0, 1], by region index.
    """
    lines = ["         arousal", "valence" + "".join(f"{level:>8}" for level in LEVELS)]
    for v in reversed(range(3)):
        lines.append(f"{LEVELS[v]:>7}" + "".join(f"{share:>8.1%}" for share in shares[3 * v : 3 * v + 3]))
    return "\n".join(lines)
