"""Small finished runs on disk, with scores computed by this file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def ccc(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Concordance by its definition."""
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))


def write_run(
    path: Path, *, seed: int = 0, noise: float = 0.2, clips: list[str] | None = None, encoder: str = "clip-vit-b16"
) -> dict[str, Any]:
    """Write a run of some clips of 20 s; returns its metrics. Labels do not depend on the seed."""
    clips = clips or [f"clip{k}" for k in range(6)]
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99)
    rows, items = [], {}
    (path / "predictions" / "val").mkdir(parents=True)
    for item in clips:
        time = np.arange(200) / 10
        label = 0.7 * np.sin(time[:, None] / truth.uniform(2, 5, 2) + truth.uniform(0, 6, 2))
        va = np.clip(0.8 * label + rng.normal(0, noise, 2) + rng.normal(0, 0.05, label.shape), -1, 1)
        shown = [f"{x:.6f}" for x in label.ravel()]
        lines = ["frame,time,valence,arousal,label_valence,label_arousal"]
        lines += [
            f"{k},{t:.6f},{v:.6f},{a:.6f},{shown[2 * k]},{shown[2 * k + 1]}"
            for k, (t, (v, a)) in enumerate(zip(time, va, strict=True))
        ]
        (path / "predictions" / "val" / f"{item}.csv").write_text("\n".join(lines) + "\n")
        items[item] = {"csv": "", "records": {"labels": {"source": {"group": item}}}, "media": None}
        rows.append((va, label))
    va, label = (np.concatenate(x) for x in zip(*rows, strict=True))
    scores = [ccc(va[:, k], label[:, k]) for k in range(2)]
    both = dict(zip(("valence", "arousal", "mean"), [*scores, float(np.mean(scores))], strict=True))
    metrics: dict[str, Any] = {
        "split": "val",
        "n_frames": len(va),
        "n_videos": len(clips),
        "n_clips": len(clips),
        "ccc": both,
        "ci95": {name: [value - 0.05, value + 0.05] for name, value in both.items()},
        "within_video_ccc": both,
        "rmse": both,
        "pearson": both,
        "warnings": [],
        "missing": {"clips": [], "frames": 0, "streams": {}},
        "best_epoch": 2,
        "epochs": 3,
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "history.csv").write_text(
        "epoch,loss_total,val_ccc_valence,val_ccc_arousal,val_ccc_mean\n1,1.0,0.1,0.2,0.15\n2,0.8,0.3,,0.3\n3,0.7,0.2,0.3,0.25\n"
    )
    (path / "config.toml").write_text(
        f'vaflow = "0.1.0"\ncache = "/no/such/cache"\n[train]\ntemporal = "gru"\nfusion = "gated"\nseed = {seed}\n'
        f"centers = 0.66\nsigma = 0.45\n[data.val]\nclips = {len(clips)}\n"
        f'[[stream]]\nname = {json.dumps(encoder)}\nkind = "visual"\n'
    )
    sources = {"cache": "/no/such/cache", "streams": {encoder: {"kind": "visual"}}, "items": items}
    (path / "predictions" / "val" / "sources.json").write_text(json.dumps(sources))
    return metrics
