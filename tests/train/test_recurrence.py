"""The shared recurrence equals `nn.GRU` and `nn.LSTM` over packed sequences: outputs and gradients."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from toy_batches import inside_mask

from vaflow.train.config import TrainConfig
from vaflow.train.heads.recurrence import run_recurrent
from vaflow.train.heads.temporal import Recurrent, run_together
from vaflow.train.training_loop import make_optimizer

WIDTH, HIDDEN = 6, 5
MASKS = ((4, 4, 4), (4, 1, 2), (1, 1, 1), (3, 4, 0))
cells = pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])


def packed(network: nn.GRU | nn.LSTM, x: Tensor, inside: Tensor) -> Tensor:
    """Reference with packed sequences; zeros at padding."""
    count = inside.sum(dim=1).clamp(min=1)
    sequence = pack_padded_sequence(x, count, batch_first=True, enforce_sorted=False)
    out = pad_packed_sequence(network(sequence)[0], batch_first=True, total_length=x.shape[1])[0]
    return torch.where(inside.unsqueeze(-1), out, 0)


@cells
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masks", list(itertools.combinations_with_replacement(MASKS, 2)))
def test_outputs_and_gradients_equal_pytorch(cell, layers, dtype, masks):
    torch.manual_seed(0)
    networks = [
        cell(WIDTH, HIDDEN, layers, batch_first=True, bidirectional=True, dtype=dtype) for _ in range(len(masks))
    ]
    insides = [inside_mask(lengths, 4 + k) for k, lengths in enumerate(masks)]  # the second sequence is longer
    sequences = [
        (torch.randn(*inside.shape, WIDTH, dtype=dtype) * inside.unsqueeze(-1)).requires_grad_() for inside in insides
    ]
    weights = [torch.randn(*inside.shape, 2 * HIDDEN, dtype=dtype) for inside in insides]
    ours = run_recurrent(networks, sequences, insides)
    ours = [torch.where(inside.unsqueeze(-1), y, 0) for y, inside in zip(ours, insides, strict=True)]
    theirs = [packed(*each) for each in zip(networks, sequences, insides, strict=True)]
    inputs = [*sequences, *(p for network in networks for p in network.parameters())]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), inputs)  # type: ignore[arg-type]
        for outputs in (ours, theirs)
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for one, other in zip([*ours, *gradients[0]], [*theirs, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@cells
def test_batched_branches_equal_separate_branches(cell):
    torch.manual_seed(0)
    models = [Recurrent(cell, WIDTH, 2 * HIDDEN).double() for _ in range(3)]
    insides = [inside_mask(lengths, 4) for lengths in MASKS[:3]]
    sequences = [torch.randn(3, 4, WIDTH, dtype=torch.float64) for _ in insides]
    together = run_together(models, sequences, insides)
    for model, x, inside, y in zip(models, sequences, insides, together, strict=True):
        torch.testing.assert_close(model(x, inside), y)


@cells
def test_weights_are_stored_in_pytorch_layout(cell):
    library = cell(WIDTH, HIDDEN, batch_first=True, bidirectional=True)
    assert set(Recurrent(cell, WIDTH, 2 * HIDDEN).rnn.state_dict()) == set(library.state_dict())


@cells
def test_dropout_between_layers_is_active_in_training_only(cell):
    torch.manual_seed(0)
    network = cell(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=True, dropout=0.5)
    x, inside = torch.randn(3, 4, WIDTH), inside_mask(MASKS[0], 4)
    one, other = (run_recurrent([network], [x], [inside])[0] for _ in range(2))
    assert not torch.equal(one, other)
    network.eval()
    one, other = (run_recurrent([network], [x], [inside])[0] for _ in range(2))
    assert torch.equal(one, other)


def test_the_optimizer_uses_the_fused_kernel():
    model = Recurrent(nn.GRU, WIDTH, 2 * HIDDEN)
    assert make_optimizer(model, TrainConfig()).defaults["fused"]
