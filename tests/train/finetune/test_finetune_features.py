"""Backbones read the inputs of the cache; frozen backbones reproduce its features."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_ready import SETTINGS, Loaded, copied
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vaflow.cache import Cache
from vaflow.cache.schema import LABELS, LOGMEL, PIXELS
from vaflow.errors import DataError, FingerprintError, UsageError
from vaflow.train.finetune.backbones import (
    Augment,
    StoredImages,
    build_backbones,
    check_sources,
    choose_trained,
    load_sources,
    recompute,
    tunable,
)
from vaflow.train.finetune.step import TunedModel, encode_split, gather, share_units
from vaflow.train.run_folder import build_model

HALF = 2.0**-10  # relative distance of two neighbours in float16, at most


@pytest.mark.parametrize(
    "windows", [pytest.param({}, marks=pytest.mark.slow), {"window": 3.0, "stride": 1.0, "frames": 3}]
)
def test_frozen_backbones_equal_the_cached_pipeline(pixels_cache: Cache, windows: dict) -> None:
    ready = Loaded(pixels_cache, replace(SETTINGS, finetune_blocks=0, **windows))
    torch.manual_seed(0)
    heads = build_model(ready.config, ready.inputs.specs, ready.inputs.prototypes)
    model = TunedModel(heads, ready.backbones).eval()
    assert not any(choose_trained(backbone, 0) for backbone in ready.backbones)
    train = ready.data.train
    with torch.no_grad():
        for ids in train.in_order(3):
            cached = heads(train.gather(ids))
            output = model(gather(train, ready.sources, ready.backbones, ids))
            torch.testing.assert_close(output[..., :2], cached.va, rtol=4 * HALF, atol=4 * HALF)
            torch.testing.assert_close(output[..., 2:], cached.region_logits, rtol=16 * HALF, atol=16 * HALF)


@pytest.mark.slow  # like the test above
def test_re_encoding_a_split_equals_the_cache(loaded: Loaded) -> None:
    train = loaded.data.train
    again = encode_split(train, loaded.sources, loaded.backbones)
    for name, table in train.tables.items():
        read = torch.unique(table.index).long()
        assert len(read) > 8, "the clips must have faces and audio"
        mine, theirs = again.tables[name].rows[read].double(), table.rows[read].double()
        torch.testing.assert_close(mine, theirs, rtol=HALF, atol=2.0**-12)
        assert (mine == theirs).double().mean() > 0.95  # the same batch size: nearly always the same bits
    parts = [encode_split(train, loaded.sources, loaded.backbones, rank=rank, ranks=3) for rank in range(3)]
    for name in train.tables:
        assert torch.equal(torch.stack([part.tables[name].rows for part in parts]).sum(0), again.tables[name].rows)


def test_a_split_without_audio_is_encoded(loaded: Loaded) -> None:
    val = loaded.data.val
    assert not val.tables["ast-tiny"].index.any(), "the clip must have no audio"
    again = encode_split(val, load_sources(loaded.cache, val, loaded.backbones), loaded.backbones)
    assert not again.tables["ast-tiny"].rows.any()
    assert again.tables["clip-tiny"].rows.any()


def test_frames_are_read_from_the_stored_files(loaded: Loaded) -> None:
    source, train = loaded.sources["clip-tiny"], loaded.data.train
    assert isinstance(source, StoredImages)
    images = [image for clip in train.clips for image in loaded.cache.read(PIXELS, clip.item).images]
    units = [k for k, image in enumerate(images) if image]
    decoded = [np.array(Image.open(BytesIO(images[k])).convert("RGB")) for k in units]
    expected = np.stack([loaded.backbones[0].encoder.prepare(image) for image in decoded])
    np.testing.assert_array_equal(source.read(torch.tensor(units)).numpy(), expected)


def test_audio_windows_are_slices_of_the_log_mel(loaded: Loaded) -> None:
    expected = []
    for clip in loaded.data.train.clips:
        mel = loaded.cache.read(LOGMEL, clip.item).embedding.astype(np.float32)
        for start in loaded.cache.read("ast-tiny", clip.item).start:
            row = np.zeros((398, 128), np.float32)  # 4 s minus an incomplete frame
            part = mel[round(start * 100) :][:398]
            row[: len(part)] = part
            expected.append(row)
    source = loaded.sources["ast-tiny"]
    np.testing.assert_array_equal(source.read(torch.arange(len(expected))).numpy(), np.stack(expected))


@given(
    rows=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5), per=st.integers(1, 4)
)
def test_every_input_is_read_once_for_all_rows(rows: list[list[int]], per: int) -> None:
    index = torch.tensor(rows)
    units, position = share_units(index, per)
    assert units.tolist() == sorted({(row - 1) // per for line in rows for row in line if row})
    held = [0] + [1 + unit * per + k for unit in units.tolist() for k in range(per)]  # rows in the encoder's result
    assert [[held[k] for k in line] for line in position.tolist()] == rows


def test_overlapping_windows_share_inputs(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    train, decode = loaded.data.train, StoredImages.decode
    reads: list[int] = []

    def count(images: StoredImages, unit: int) -> np.ndarray:
        reads.append(unit)
        return decode(images, unit)

    monkeypatch.setattr(StoredImages, "decode", count)
    gather(train, loaded.sources, loaded.backbones, torch.arange(len(train)), Augment((0,)))
    read = train.tables["clip-tiny"].index
    assert len(reads) == len(set(reads)) == len(torch.unique(read[read > 0])) < int((read > 0).sum())


def test_a_cache_without_encoder_inputs_states_the_remedy(pixels_cache: Cache, tmp_path: Path) -> None:
    streams = tunable(Loaded(pixels_cache, SETTINGS).inputs.streams)
    with pytest.raises(UsageError, match=r"has no pixels.*--visual clip-tiny --audio ast-tiny --pixels"):
        check_sources(copied(pixels_cache, tmp_path / "a", pixels=None), streams)
    sampling = {"window": 8.0, "stride": 2.0, "frames": 4, "audio_steps": 8}
    with pytest.raises(UsageError, match=r"not the inputs that clip-tiny was encoded from.*8\.0.*--pixels"):
        check_sources(copied(pixels_cache, tmp_path / "b", pixels={"sampling": sampling}), streams)


def test_clips_without_stored_frames_are_listed(pixels_cache: Cache, tmp_path: Path) -> None:
    cache = copied(pixels_cache, tmp_path / "a", leave=(PIXELS, "obama"))
    with pytest.raises(DataError, match=r"1 clips have clip-tiny but no pixels: obama"):
        Loaded(cache, SETTINGS)
    assert cache.has(LABELS, "obama")


def test_encoders_must_match_the_cache(changeable: Loaded, tmp_path: Path) -> None:
    streams = tunable(changeable.inputs.streams)
    clip = changeable.backbones[0].encoder
    with torch.no_grad():
        clip.module.ln_post.bias += 1
    path = clip.save(tmp_path, "other")
    with pytest.raises(FingerprintError, match=r"--weights clip-tiny=PATH"):
        build_backbones(streams, {"clip-tiny": path}, torch.device("cpu"))
    with pytest.raises(UsageError, match="not fine-tuned"):
        build_backbones(streams, {"clip-vit-b16": path}, torch.device("cpu"))


def test_the_last_blocks_and_later_layers_are_trained(changeable: Loaded) -> None:
    expected = {"clip-tiny": {"transformer.resblocks.1", "ln_post", "proj"}, "ast-tiny": {"layers.1", "layernorm"}}
    for backbone in changeable.backbones:
        names = {name for name, _ in backbone.module.named_parameters()}
        choose_trained(backbone, 1)
        learning = {name for name, parameter in backbone.module.named_parameters() if parameter.requires_grad}
        heads = expected[backbone.stream.name]
        assert learning == {n for n in names if any(n == head or n.startswith(f"{head}.") for head in heads)}
        assert len(choose_trained(backbone, None)) == len(names)
        with pytest.raises(UsageError, match="<= 2"):
            choose_trained(backbone, 3)


def test_activation_checkpointing_changes_no_gradient(changeable: Loaded) -> None:
    for backbone in changeable.backbones:
        inputs = changeable.sources[backbone.stream.name].read(torch.tensor([0, 1]))
        gradients = []
        for again in (False, True):
            if again:
                recompute(backbone)
            backbone.module.zero_grad()
            backbone.features(inputs).square().mean().backward()
            gradients.append([p.grad.clone() for p in backbone.module.parameters() if p.grad is not None])
        for before, after in zip(*gradients, strict=True):
            torch.testing.assert_close(after, before)
        assert len(gradients[0]) > 10


def test_a_subset_of_the_streams_can_be_tuned(loaded: Loaded) -> None:
    assert set(load_sources(loaded.cache, loaded.data.val, loaded.backbones[1:])) == {"ast-tiny"}
