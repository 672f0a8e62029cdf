"""Table `encoders`: every stream, every pair and all visual streams of a cache, with a matrix."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache

from vaflow.cache import Cache
from vaflow.cache.costs import Cost, append_costs
from vaflow.cli import main
from vaflow.train.ablate.results import encoder_study


def two_visual_streams(path: Path) -> Cache:
    """The synthetic cache with a second visual stream, of noise."""
    cache = make_cache(path, Toy(splits={"train": 3, "val": 2}, seconds=(8, 10), text=False))
    cache.declare(replace(cache.streams()[VISUAL], name="noise"))
    rng = np.random.default_rng(0)
    for item in cache.items():
        stored = cache.read(VISUAL, item)
        embedding = rng.normal(size=stored.embedding.shape).astype(np.float16)
        cache.write("noise", item, {"embedding": embedding, "time": stored.time, "valid": stored.valid})
    return cache


def test_rows_cover_all_streams_and_pairs(tmp_path: Path) -> None:
    (table,) = encoder_study(two_visual_streams(tmp_path / "cache")).tables
    names = {row.name for row in table.rows}
    assert names == {VISUAL, "noise", AUDIO, f"{VISUAL} + {AUDIO}", f"noise + {AUDIO}", "all visual"}
    (both,) = [row for row in table.rows if row.name == "all visual"]
    assert set(both.settings["visual"]) == {VISUAL, "noise"} and both.settings["audio"] == ["none"]


def test_the_command_writes_a_matrix(tmp_path: Path) -> None:
    cache, out = two_visual_streams(tmp_path / "cache"), tmp_path / "out"
    append_costs(cache, {"noise": Cost("gpu <1>", "float32", 3_000_000, 6.0, 90.0)})
    options = ["--seeds", "1", "--set", "epochs=1", "--set", "hidden=8", "--set", "kl_weight=0"]
    assert main(["ablate", str(cache.path), "--table", "encoders", "--out", str(out), *options]) == 0
    page = (out / "encoders.md").read_text()
    matrix, costs = page.split("| stream |")
    assert matrix.count("| - |") == 1, "every pair but none and none has a score"
    assert f"| noise | {cache.streams()['noise'].dim} | 1 |" in costs
    assert "| 3.0 | 4.00 | gpu <1> | float32 |" in costs, "6 s for 90 s of video"
    assert costs.count("| - | - | - | - |") == 2, "streams without a recorded cost"
    assert "<td>4.00</td><td>gpu &lt;1&gt;</td>" in (out / "results.html").read_text()
    assert "[table.encoders]" in (out / "tables.toml").read_text()
    assert main(["ablate", str(cache.path), "--table", "encoders", "--table", "1", "--out", str(out)]) == 2
