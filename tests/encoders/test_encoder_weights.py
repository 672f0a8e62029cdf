"""Weights from files and the hub: digests, rejected formats, an unreachable hub."""

import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import into_cache, serve
from huggingface_hub import constants
from safetensors.torch import save_file

from vaflow.encoders import build_encoder
from vaflow.encoders import weights as weights_module
from vaflow.encoders.weights import (
    checked_url,
    hub_file,
    load_strictly,
    read_state_dict,
    state_digest,
    url_file,
    without_initial_weights,
)
from vaflow.errors import WeightsError

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(2.5), "c": torch.tensor([1, 2])}


def build(name: str, **options: Any) -> Any:
    """Return an encoder typed as Any."""
    return build_encoder(name, **options)


# --- digests


def test_a_digest_does_not_depend_on_order_format_or_layout(tmp_path: Path) -> None:
    digest = state_digest(STATE)
    assert state_digest(dict(reversed(STATE.items()))) == digest
    torch.save(STATE, tmp_path / "s.pt")
    save_file(STATE, tmp_path / "s.safetensors")
    assert state_digest(read_state_dict(tmp_path / "s.pt")) == digest
    assert state_digest(read_state_dict(tmp_path / "s.safetensors")) == digest
    assert state_digest({**STATE, "b.weight": STATE["b.weight"].t().contiguous().t()}) == digest


@pytest.mark.parametrize(
    "other",
    [
        {**STATE, "a": torch.tensor(np.nextafter(np.float32(2.5), np.float32(3)))},
        {**STATE, "b.weight": STATE["b.weight"].reshape(3, 2)},
        {**STATE, "c": STATE["c"].to(torch.int32)},
        {("x" if key == "a" else key): value for key, value in STATE.items()},
    ],
    ids=["one bit", "shape", "dtype", "name"],
)
def test_any_difference_changes_the_digest(other: dict[str, torch.Tensor]) -> None:
    assert state_digest(other) != state_digest(STATE)


# --- files


class Evil:
    """Creates a directory when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (Path(self.path),))


def test_a_pickle_with_code_is_rejected_without_running_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": Evil(str(trace))}, tmp_path / "zip.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": Evil(str(trace))}))
    for name in ("zip.pt", "plain.bin"):
        with pytest.raises(WeightsError, match="cannot be read as weights"):
            read_state_dict(tmp_path / name)
    assert not trace.exists()


def test_a_torchscript_archive_is_rejected_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(WeightsError, match=r"TorchScript.*vit_base_patch16_clip_224\.openai"):
        build("clip-vit-b16", weights=path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half an archive"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_of_other_formats_are_rejected(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"w{suffix}"):
        build("clip-vit-b16", weights=path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_are_read_from_paths_that_are_not_utf8(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save = torch.save if suffix == "pt" else save_file
    save(STATE, tmp_path / f"s.{suffix}")
    moved = (tmp_path / f"s.{suffix}").rename(folder / f"s.{suffix}")
    assert state_digest(read_state_dict(moved)) == state_digest(STATE)


def test_empty_and_missing_files_are_rejected(tmp_path: Path) -> None:
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        read_state_dict(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"The weights file .* does not exist"):
        build("clip-vit-b32", weights=tmp_path / "none.pt")


def test_non_finite_weights_are_rejected() -> None:
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), float("nan")), "bias": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"NaN.*weight"):
        load_strictly(module, state, "a file")


# --- the hub


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("clip-vit-b16", "timm/vit_base_patch16_clip_224.openai"),
        ("clip-vit-b32", "timm/vit_base_patch32_clip_224.openai"),
        ("ast", "MIT/ast-finetuned-audioset-10-10-0.4593"),
        ("ast:someone/model", "someone/model"),
    ],
)
def test_an_unreachable_hub_is_reported_within_seconds(hub_cache: Path, name: str, repo: str) -> None:
    began = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        build(name)
    assert time.monotonic() - began < 10
    assert f"--weights {name}=PATH" in str(caught.value)
    assert f"model id {repo}" in str(caught.value)


@pytest.mark.parametrize("silence", ["no such host", "no answer"])
def test_every_kind_of_unresponsive_hub_times_out(
    hub_cache: Path, silence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts connections and sends no data
        deaf_address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        address = deaf_address if silence == "no answer" else "http://hub.invalid"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        began = time.monotonic()
        with pytest.raises(WeightsError, match="cannot be reached"):
            hub_file("someone/model", ("a",), encoder="ast")
        assert time.monotonic() - began < 4


def test_offline_mode_makes_no_request(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights_module, "ask", lambda address: pytest.fail("asked"))
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        hub_file("someone/model", ("a",), encoder="ast")


def test_cached_files_are_used_without_a_request(
    hub_cache: Path, small_ast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "ask", lambda address: pytest.fail("asked"))
    for file in small_ast.iterdir():
        into_cache(hub_cache, "someone/model", file)
    encoder = build("ast:someone/model")
    assert encoder.identity == build("ast", weights=small_ast).identity


def test_a_download_takes_the_first_name_that_exists(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"org/model/resolve/main/second.bin": b"tensors"}) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        path = hub_file("org/model", ("first.bin", "second.bin"), encoder="ast")
        assert path.read_bytes() == b"tensors"
        with pytest.raises(WeightsError, match="none of these files"):
            hub_file("org/model", ("third.bin",), encoder="ast")
    assert hub_file("org/model", ("second.bin",), encoder="ast") == path, "cached files must not need the hub"


def test_a_removed_download_address_is_reported() -> None:
    with pytest.raises(WeightsError, match="clip:ViT-B-16/laion400m_e31=PATH"):
        url_file("http://127.0.0.1:9/vit.pt", encoder="clip:ViT-B-16/laion400m_e31")


def test_a_hub_that_answers_and_then_stalls_is_reported(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "STALL", 1.0)
    with serve({"org/model/resolve/main/a.bin": b"x" * 1000}, stall=True) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        began = time.monotonic()
        with pytest.raises(WeightsError, match="stopped sending"):
            hub_file("org/model", ("a.bin",), encoder="ast")
        assert time.monotonic() - began < 8


def test_a_download_that_stalls_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "STALL", 1.0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with serve({"vggish.pth": b"x" * 1000}, stall=True) as address:
        began = time.monotonic()
        with pytest.raises(WeightsError, match="stopped sending"):
            checked_url(f"{address}/vggish.pth", encoder="vggish")
        assert time.monotonic() - began < 8


def test_networks_are_built_without_random_values_and_keep_the_random_state() -> None:
    state = torch.random.get_rng_state()
    with without_initial_weights():
        layer = torch.nn.Linear(400, 400)
        norm = torch.nn.BatchNorm1d(4)
        torch.nn.init.constant_(layer.weight, 3.0)
        torch.nn.init.normal_(layer.weight)
        torch.rand(1)
    assert bool((layer.weight == 3.0).all())
    assert bool((norm.weight == 1.0).all())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.nn.init.normal_(layer.weight).std() > 0.9, "drawn again afterwards"
