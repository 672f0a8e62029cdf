"""Write short videos with audio and labels, in the layout `videos`."""

from pathlib import Path

import numpy as np
from affwild2_tree import write_video


def write_media(root: Path, count: int) -> Path:
    """Write `count` clips of about two seconds, a third of them in the validation split."""
    for k in range(count):
        times = np.arange(40 + 5 * k) / 20
        write_video(root / f"clip{k}.mp4", times, audio_seconds=1.5 + 0.25 * k)
        rows = [f"{t},{np.sin(t + k):.4f},{np.cos(t * (k + 1)):.4f}" for t in times]
        (root / f"clip{k}.csv").write_text("\n".join(["time,valence,arousal", *rows]) + "\n")
    names = [f"clip{k},{'val' if k % 3 == 2 else 'train'}" for k in range(count)]
    (root / "splits.csv").write_text("\n".join(["name,split", *names]) + "\n")
    return root
