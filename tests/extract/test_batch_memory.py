"""`--image-batch auto` selects the largest power of two that fits into a simulated memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vaflow.cli import main
from vaflow.errors import UsageError
from vaflow.extract.config import AUTO, ExtractConfig
from vaflow.extract.encoding import BATCH_SIZES, SHARE, FixedBatcher, fitting, make_encoders
from vaflow.settings import coerce

CPU = torch.device("cpu")


class Card:
    """Simulated memory use: `fixed` bytes per batch plus `each` per row of the largest batch."""

    def __init__(self, free: int, fixed: int, each: int) -> None:
        self._free, self._fixed, self._each = free, fixed, each
        self.rows = 0

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        self.rows = len(batch)
        if self._fixed + self._each * len(batch) > self._free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.float()

    def free(self) -> int:
        return self._free

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return self._fixed + self._each * self.rows


ROW = np.zeros((2, 3), np.uint8)


@pytest.mark.parametrize("free", [1_000, 10_000, 123_456, 10**9])
@pytest.mark.parametrize(("fixed", "each"), [(0, 7), (300, 5), (0, 40)])
@pytest.mark.parametrize("parts", [1, 3])
def test_batch_size_is_the_largest_power_of_two_that_fits(free: int, fixed: int, each: int, parts: int) -> None:
    card = Card(free, fixed, each)
    size = fitting(card.encode, CPU, card, ROW, parts=parts, most=1024)
    fits = [n for n in (2**k for k in range(11)) if fixed + each * n <= SHARE * free / parts]
    assert size == max(fits, default=1)


def test_slightly_less_memory_gives_the_same_batch_size() -> None:
    sizes = {fitting((c := Card(free, 0, 10)).encode, CPU, c, ROW, parts=1, most=256) for free in range(9000, 9900, 50)}
    assert len(sizes) == 1


def test_a_trial_batch_out_of_memory_falls_back_to_a_small_batch() -> None:
    card = Card(60, 0, 10)
    assert fitting(card.encode, CPU, card, ROW, parts=1, most=1024) == 4


def test_batch_size_is_determined_once_from_the_first_row() -> None:
    shapes: list[tuple[int, ...]] = []
    sizes: list[int] = []

    def measure(row: np.ndarray) -> int:
        shapes.append(row.shape)
        return 4

    def encode(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.float()

    batcher = FixedBatcher(encode, measure, CPU)
    got: list[int] = []
    for _ in range(9):
        batcher.add(ROW, lambda _: got.append(batcher.delivering))
    batcher.flush()
    assert shapes == [(2, 3)]
    assert sizes == [4, 4, 4]
    assert got == [4] * 9, "every row must state the size of its batch"


def test_auto_uses_a_fixed_batch_size_on_cpu(tiny_pair: tuple) -> None:
    visual, audio = tiny_pair
    sizes = []
    for batch in (0, AUTO):
        config = ExtractConfig(visual=("clip-tiny",), audio=("ast-tiny",), image_batch=batch, window_batch=batch)
        batchers = make_encoders(config, CPU, [visual], [audio]).batchers
        batchers["clip-tiny"].add(np.zeros((224, 224, 3), np.uint8), lambda _: None)
        batchers["clip-tiny"].flush()
        sizes.append(batchers["clip-tiny"].delivering)
    assert sizes == [BATCH_SIZES["cpu"]["visual"]] * 2


def test_batch_size_option_accepts_a_number_or_auto(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert (coerce(ExtractConfig, "image_batch", "auto"), coerce(ExtractConfig, "image_batch", "32")) == (AUTO, 32)
    for text in ("-1", "many", "", "1.5"):
        with pytest.raises(UsageError, match="auto"):
            ExtractConfig(image_batch=coerce(ExtractConfig, "image_batch", text))
    assert main(["extract", str(tmp_path), "--out", "x", "--image-batch", "lots"]) == 2
    assert "--image-batch" in capsys.readouterr().err
