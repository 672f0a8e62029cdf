"""The CNN over the log-Mel equals a loop over its definition; missing frames have no effect."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_cache import AUDIO, VISUAL, Toy, make_cache
from toy_batches import VISUAL_STREAM, toy_batch, toy_model

from vaflow.cache import Cache
from vaflow.cache.schema import LOGMEL
from vaflow.errors import UsageError
from vaflow.train.batch import AUDIO as HEARING
from vaflow.train.batch import Batch, StreamSpec
from vaflow.train.config import TrainConfig, preset, with_aliases
from vaflow.train.config import merge as merge_settings
from vaflow.train.data import load_split
from vaflow.train.evaluate import evaluate_run
from vaflow.train.heads.layers import Spectrogram
from vaflow.train.inputs import resolve
from vaflow.train.run_folder import load_run
from vaflow.train.run_record import RunRecord, new_record
from vaflow.train.train_run import train_run

BANDS = 5


def network(each: int, channels: tuple[int, ...] = (2, 3, 2)) -> Spectrogram:
    torch.manual_seed(0)
    model = Spectrogram(BANDS, each, channels).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return model


def windows(steps: int, each: int, inside: tuple[int, ...] = (), seed: int = 0) -> tuple[torch.Tensor, ...]:
    """frames, valid, inside, time of windows with that many frames inside; a fifth of them missing."""
    draw = torch.Generator().manual_seed(seed)
    count = steps * each
    lengths = torch.tensor(inside or (count, count - each // 2 - 1))
    present = torch.arange(count) < lengths[:, None]
    valid = present & (torch.rand(present.shape, generator=draw) > 0.2)
    frames = torch.randn(*present.shape, BANDS, generator=draw, dtype=torch.float64)
    time = (torch.arange(count) * 0.01 + 0.0125).double().expand(present.shape)
    return frames, valid, present, time


def restated(model: Spectrogram, frames: np.ndarray, present: np.ndarray) -> np.ndarray:
    """One window, [T, bands] and [T] -> [S, width], one number at a time."""
    maps, mask = np.where(present[:, None], frames, 0)[None], present
    for layer, stride in zip(model.layers, model.shrink, strict=True):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[operator]
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
        mask = mask[::stride]
        out = np.zeros((len(weight), len(mask), -(-maps.shape[2] // 2)))
        for o, t, m in np.ndindex(out.shape):
            patch = padded[:, t * stride : t * stride + 3, 2 * m : 2 * m + 3]
            out[o, t, m] = max(0.0, (patch * weight[o]).sum() + bias[o]) * mask[t]
        maps = out
    shrink = int(np.prod(model.shrink))
    rows: list[list[np.ndarray]] = [[] for _ in range(len(present) // model.frames_per_step)]
    for t in np.flatnonzero(mask):
        rows[t * shrink // model.frames_per_step].append(maps[:, t].ravel())
    return np.stack([np.mean(row, axis=0) if row else np.zeros(model.width) for row in rows])


@pytest.mark.parametrize("each", [1, 2, 3, 4, 7, 50])
def test_the_spectrogram_encoder_equals_its_definition(each: int) -> None:
    model = network(each)
    frames, valid, inside, time = windows(3, each)
    with torch.no_grad():
        steps = model(frames, valid, inside, time)
    for b in range(2):
        expected = restated(model, frames[b].numpy(), (valid & inside)[b].numpy())
        np.testing.assert_allclose(steps.value[b].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert steps.value.shape == (2, 3, model.width)


@pytest.mark.parametrize("each", [1, 3, 8])
def test_missing_and_padded_frames_do_not_affect_the_output(each: int) -> None:
    model = network(each)
    frames, valid, inside, time = windows(4, each)
    clean = model(frames, valid, inside, time)
    for junk in (1e6, float("nan"), float("inf")):
        dirty = torch.where((valid & inside).unsqueeze(-1), frames, junk).requires_grad_()
        steps = model(dirty, valid, inside, time)
        assert torch.equal(steps.value, clean.value)
        (gradient,) = torch.autograd.grad(steps.value.sum(), dirty)
        assert (gradient[~(valid & inside)] == 0).all()
        assert (gradient[valid & inside] != 0).any()


def test_more_padding_changes_nothing() -> None:
    model = network(6)
    frames, valid, inside, time = windows(3, 6, inside=(17, 9))
    more = [torch.nn.functional.pad(mask, (0, 12)) for mask in (valid, inside, time)]
    short, long = (
        model(frames, valid, inside, time),
        model(torch.nn.functional.pad(frames, (0, 0, 0, 12), value=9.0), *more),
    )
    for name in ("value", "valid", "inside", "time"):
        assert torch.equal(getattr(long, name)[:, :3], getattr(short, name)), name
    assert not long.valid[:, 3:].any() and not long.inside[:, 3:].any()


def test_steps_are_valid_if_half_of_their_frames_are_valid() -> None:
    model = network(4)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool().view(1, 20)
    frames, _, _, time = windows(5, 4, inside=(20,))
    steps = model(frames, valid, torch.arange(20)[None] < 18, time)
    assert steps.valid.tolist() == [[True, False, True, True, False]]
    assert steps.inside.tolist() == [[True] * 5]
    torch.testing.assert_close(steps.time[0], torch.tensor([0.0275, 0.0675, 0.1075, 0.1475, 0.1875]).double())


def test_a_step_depends_on_its_frames_and_neighbours_only() -> None:
    model = network(20)
    frames, _, inside, time = windows(6, 20, inside=(120,))
    changed = frames.clone()
    changed[0, 50] += 3.0  # step 2
    difference = (
        (model(changed, inside, inside, time).value - model(frames, inside, inside, time).value).abs().sum(-1)[0]
    )
    assert difference[2] > 0 and (difference[[0, 1, 4, 5]] == 0).all()


def test_mismatched_shapes_are_rejected() -> None:
    frames, valid, inside, time = windows(2, 4)
    with pytest.raises(ValueError, match="multiple of 3"):
        network(3)(frames, valid, inside, time)
    with pytest.raises(ValueError, match=r"\[B, T, 5\]"):
        network(4)(frames[..., :2], valid, inside, time)
    with pytest.raises(ValueError, match="positive"):
        Spectrogram(128, 0)


MEL = StreamSpec("log mel", HEARING, 6, frames_per_step=4)


def mel_batch() -> Batch:
    """Three windows with visual frames and log-Mel of 12, 7 and 3 frames."""
    return toy_batch(frames=(6, 4, 2), steps=(12, 7, 3), streams=(VISUAL_STREAM, MEL))


def test_the_model_ignores_missing_spectrogram_frames() -> None:
    model = toy_model((VISUAL_STREAM, MEL), fusion="hierarchical").eval()
    batch = mel_batch()
    present = (batch.valid[MEL.name] & batch.feature_inside[MEL.name]).unsqueeze(-1)
    junk = torch.where(present, batch.features[MEL.name], float("nan"))
    dirty = replace(batch, features={**batch.features, MEL.name: junk})
    assert torch.equal(model(dirty).va, model(batch).va)
    louder = replace(batch, features={**batch.features, MEL.name: 2 * batch.features[MEL.name]})
    assert not torch.equal(model(louder).va, model(batch).va)


def test_spectrograms_are_always_standardised() -> None:
    model = toy_model((VISUAL_STREAM, MEL), normalize="layer").eval()
    assert model.standardized == (MEL.name,)
    assert set(toy_model((VISUAL_STREAM, MEL), normalize="standard").standardized) == {VISUAL_STREAM.name, MEL.name}
    batch, mean, deviation = mel_batch(), torch.arange(6.0), torch.arange(1.0, 7.0)
    plain = model(batch).va
    model.set_statistics(MEL.name, mean, deviation)
    moved = replace(batch, features={**batch.features, MEL.name: batch.features[MEL.name] * deviation + mean})
    torch.testing.assert_close(model(moved).va, plain)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("mel") / "cache", Toy(seconds=(6, 9), logmel=True))


def settings(**more: object) -> TrainConfig:
    return TrainConfig(**{"visual": (VISUAL,), "audio": (AUDIO, LOGMEL), "hidden": 16, "device": "cpu", **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("window_settings", "steps", "each"), [({}, 8, 50), ({"audio_steps": 5}, 5, 80), ({"frames": 100}, 100, 4)]
)
def test_log_mel_windows_equal_cached_frames_at_their_times(
    cache: Cache, window_settings: dict, steps: int, each: int
) -> None:
    config, inputs = resolve(cache, settings(**window_settings))
    mel = inputs.streams[-1]
    assert (mel.steps, mel.frames_per_step, mel.spec.frames_per_step) == (steps * each, each, each)
    loaded = load_split(cache, "val", inputs.streams, config)
    batch = loaded.gather(torch.arange(len(loaded)))
    for clip in loaded.clips:
        stored = cache.read(LOGMEL, clip.item)
        for w in range(clip.first, clip.last):
            start = loaded.sample_time[w, 0]
            valid = batch.valid[LOGMEL][w].numpy()
            times = start + batch.feature_time[LOGMEL][w].numpy()[valid]
            rows = round(start * 100) + np.flatnonzero(valid)
            np.testing.assert_allclose(stored.time[rows], times, atol=0.01)
            np.testing.assert_array_equal(batch.features[LOGMEL][w].numpy()[valid], stored.embedding[rows])
            seconds = min(config.grid.window, clip.duration - start)
            assert abs(valid.sum() - seconds * 100) <= 4, "all frames of the window except for its ends"


def test_presets_accept_other_streams_and_runs_load_again(cache: Cache, tmp_path: Path) -> None:
    aliases = {"resnet50": VISUAL, "vggish": AUDIO}
    small = {"hidden": 16, "epochs": 1, "device": "cpu"}
    config = with_aliases(merge_settings(preset("p2"), small), aliases)
    result = train_run(cache, config, tmp_path / "p2", tensorboard=False, figures=False)
    run = load_run(tmp_path / "p2")
    assert [stream.name for stream in run.record.streams] == [VISUAL, AUDIO, LOGMEL]
    assert run.record.streams[2].frames_per_step == 50
    assert run.model.prompt is None and run.model.fusion is not None and run.model.fusion.width == 3 * 16
    layer = run.model.branches[2].normalize
    assert not torch.equal(layer.mean, torch.zeros(4)), "statistics of the training split are kept with the weights"  # type: ignore[arg-type]
    again = evaluate_run(tmp_path / "p2", cache, device="cpu")
    assert again["ccc"] == result.metrics["ccc"]


def test_the_run_record_stores_the_frame_to_step_mapping(cache: Cache) -> None:
    config, inputs = resolve(cache, settings())
    record = new_record(cache.path, config, inputs)
    assert RunRecord.from_toml(record.to_toml()).streams == record.streams


def test_a_missing_stream_error_prints_the_command_that_adds_it(cache: Cache) -> None:
    with pytest.raises(UsageError, match=r"vaflow extract ROOT --out \S+ --audio vggish --visual none"):
        resolve(cache, settings(audio=("vggish",)))
    with pytest.raises(UsageError, match=r"--visual resnet50 --audio none"):
        resolve(cache, settings(visual=("resnet50",)))
    with pytest.raises(UsageError) as caught:
        resolve(cache, settings(audio=("resnet50",)))
    assert "vaflow extract" not in str(caught.value), "a visual encoder adds no audio stream"
