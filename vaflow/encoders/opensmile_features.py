"""openSMILE's eGeMAPS as an audio encoder: `opensmile:eGeMAPSv02[/functionals]`.

Requires `pip install -e '.[opensmile]'`.

openSMILE is free for research and private use only; commercial use needs a licence of audEERING. The feature set:
Eyben et al. 2016, IEEE Transactions on Affective Computing 7(2).

The 25 low-level descriptors (every 10 ms) of a window are averaged in each audio step; with `/functionals`, all steps
of a window have its 88 functionals. Nothing is downloaded.
"""

from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaflow.encoders.base import WAVEFORM, FrontEnd, Request, Segments, TokenGrid, samples_of, whole_window
from vaflow.encoders.logmel import RATE
from vaflow.errors import UsageError, explain

SETS = {"eGeMAPSv02": False, "eGeMAPSv02/functionals": True}


class OpenSmileEncoder:
    """An audio encoder; see `vaflow.encoders.base.AudioEncoder`.

    Args:
        request: its source is a key of `SETS`.
    """

    kind: ClassVar[str] = "audio"
    front_end: ClassVar[FrontEnd] = WAVEFORM

    def __init__(self, request: Request, smile: Any) -> None:
        import opensmile

        self.name = request.name
        self.device = torch.device(request.device)
        self.module: torch.nn.Module = torch.nn.Identity()
        self.functionals = SETS[request.source]
        self.dim = len(smile.feature_names)
        self._smile = smile
        self.identity: dict[str, Any] = {
            "encoder": "opensmile",
            "features": request.source,
            "names": list(smile.feature_names),
            "output": "functionals of the window" if self.functionals else "descriptors averaged in each step",
            "library": f"opensmile {opensmile.__version__}",
        }

    def segments(self, window: float, steps: int) -> Segments:
        """Return one segment with all samples of the window."""
        return whole_window(window)

    def tokens(self, window: float) -> TokenGrid:
        """Return where the descriptors of a window are: one every 10 ms, centred on 20 ms of audio."""
        return TokenGrid(Fraction(1, 100), Fraction(1, 100), whole_window(window).frames, Fraction(str(window)))

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start; the window's middle for functionals."""
        if self.functionals:
            return np.full(steps, float(Fraction(str(window)) / 2))
        return self.tokens(window).step_times(window, steps)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor, *, window: float, steps: int) -> torch.Tensor:
        """Waveform rows [B, F, 160] -> [B, steps, dim] float32; features that openSMILE leaves undefined are 0."""
        rows = []
        members = [] if self.functionals else self.tokens(window).members(window, steps)
        for samples in samples_of(self.name, frames, window).cpu().numpy():
            values = np.nan_to_num(self._smile.process_signal(samples, RATE).to_numpy(np.float32))
            if self.functionals:
                rows.append(np.repeat(values[:1], steps, axis=0))
            else:  # fewer descriptors than intervals of 10 ms: the last one is repeated up to the window's end
                last = len(values) - 1
                rows.append(np.stack([values[np.minimum(tokens, last)].mean(axis=0) for tokens in members]))
        return torch.from_numpy(np.stack(rows)).to(self.device)


def build(request: Request) -> OpenSmileEncoder:
    """Return the encoder of a feature set.

    Raises:
        UsageError: openSMILE is not installed, or has no such feature set.
    """
    request.refuse_weights("it has no weights")
    if request.source not in SETS:
        raise UsageError(explain("Unknown openSMILE feature set", got=request.source, choices=SETS))
    try:
        import opensmile
    except ImportError as error:
        remedy = "pip install -e '.[opensmile]' (research and private use only; see openSMILE's licence)"
        raise UsageError(explain(f"{request.name} requires openSMILE", remedy=remedy)) from error
    level = opensmile.FeatureLevel.Functionals if SETS[request.source] else opensmile.FeatureLevel.LowLevelDescriptors
    return OpenSmileEncoder(request, opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, level))
