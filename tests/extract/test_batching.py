"""Fixed batches: every row is returned once to its receiver, independent of its neighbours."""

from functools import partial

import numpy as np
import pytest
import torch

from vaflow.errors import VaflowError
from vaflow.extract.encoding import FixedBatcher

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_every_row_is_delivered_to_its_receiver(rows: int) -> None:
    sizes: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.float() * 2

    batcher = FixedBatcher(encode, 4, CPU)
    got: dict[int, np.ndarray] = {}
    for k in range(rows):
        batcher.add(np.full((2,), k, np.uint8), partial(got.__setitem__, k))
    batcher.flush()

    assert sorted(got) == list(range(rows))
    assert all((got[k] == 2 * k).all() for k in got)
    assert set(sizes) == {4}, "every batch has the fixed size"
    assert batcher.rows == rows


def test_the_last_batch_is_padded_with_zeros() -> None:
    batches: list[torch.Tensor] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        batches.append(batch.clone())
        return batch.float()

    batcher = FixedBatcher(encode, 3, CPU)
    for k in range(1, 5):
        batcher.add(np.full((1,), k, np.uint8), lambda _: None)
    batcher.flush()
    assert batches[1].flatten().tolist() == [4, 0, 0]


def test_flushing_an_empty_batch_encodes_nothing() -> None:
    batcher = FixedBatcher(lambda batch: pytest.fail("nothing to encode"), 2, CPU)
    batcher.flush()
    assert batcher.rows == 0


def test_a_batch_too_large_for_memory_is_encoded_in_halves(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.float() + 1

    batcher = FixedBatcher(encode, 8, CPU)
    got: dict[int, np.ndarray] = {}
    for k in range(12):
        batcher.add(np.array([k], np.float32), partial(got.__setitem__, k))
    batcher.flush()
    assert {k: float(row[0]) for k, row in got.items()} == {k: k + 1 for k in range(12)}
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2], "the reduced size must be kept"
    assert "batches of 2" in caplog.text


def test_a_row_too_large_for_memory_is_an_error() -> None:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    batcher = FixedBatcher(encode, 2, CPU)
    batcher.add(np.array([1], np.float32), lambda _: None)
    with pytest.raises(VaflowError, match="batch of one row"):
        batcher.flush()
