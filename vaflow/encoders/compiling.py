"""Encoders whose networks are compiled: fused by torch's compiler for the device and the batch size that they meet."""

import torch

from vaflow.encoders.base import AudioEncoder, VisualEncoder
from vaflow.errors import VaflowError, explain


def compile_network(encoder: VisualEncoder | AudioEncoder) -> None:
    """Have an encoder's network compiled when its first batch comes. Its weights, identity and outputs' shapes stay.

    Raises:
        VaflowError: this machine cannot compile for the encoder's device.
    """
    _require_compiler(next(encoder.module.parameters()).device)
    encoder.module.compile(dynamic=False)


def _require_compiler(device: torch.device) -> None:
    """A trial, because the real thing comes late: at the first full batch."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        raise VaflowError(
            explain(
                f"torch cannot compile for {device} here",
                expected="a C++ compiler" if device.type == "cpu" else "Triton, which comes with torch for CUDA",
                got=next((line for line in str(error).splitlines() if line.strip()), type(error).__name__),
                remedy="Install it, or leave --compile out",
            )
        ) from error
