"""Which tokens of an audio network belong to which step of a window. Exact, and without torch.

A network reads a window and returns tokens; the centre of each token in seconds follows from the network's geometry.
A step is the mean of the tokens centred in it, and its time is the mean of their centres.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vaflow.errors import UsageError, explain


@dataclass(frozen=True)
class TokenGrid:
    """Tokens at regular intervals.

    Attributes:
        first: seconds from the window's start to the centre of the first token.
        interval: seconds between two tokens.
        count: number of tokens.
        limit: seconds of input that the network accepts.
    """

    first: Fraction
    interval: Fraction
    count: int
    limit: Fraction

    def centre(self, token: int) -> Fraction:
        """Return the centre of a token, in seconds after the window's start."""
        return self.first + token * self.interval

    def times(self) -> NDArray[np.float64]:
        """Return [count] seconds after the window's start."""
        return np.array([float(self.centre(token)) for token in range(self.count)])

    def members(self, window: float, steps: int) -> list[list[int]]:
        """Return, for each step k, the tokens centred in [k, k + 1) * window / steps.

        Raises:
            UsageError: a step would have no token: more steps than tokens, or a window beyond the network's input.
        """
        step = Fraction(str(window)) / steps
        groups: list[list[int]] = [[] for _ in range(steps)]
        for token in range(self.count):
            if self.centre(token) < step * steps:
                groups[int(self.centre(token) / step)].append(token)
        empty = [k for k, tokens in enumerate(groups) if not tokens]
        if empty:
            raise UsageError(
                explain(
                    f"Audio step {empty[0]} of {steps} in a window of {window:g} s would have no token of the encoder",
                    expected=f"windows of at most about {float(self.limit):g} s, the encoder's input, and steps of at "
                    f"least {float(self.interval):g} s, the interval of its tokens",
                    got=f"{float(step):g} s per step",
                    remedy="Choose fewer --audio-steps or a shorter --window",
                )
            )
        return groups

    def step_times(self, window: float, steps: int) -> NDArray[np.float64]:
        """Return [steps] seconds after the window's start: the mean centre of each step's tokens."""
        groups = self.members(window, steps)
        return np.array([float(sum(self.centre(t) for t in tokens) / len(tokens)) for tokens in groups])

    def pooling(self, window: float, steps: int) -> NDArray[np.float32]:
        """Return [steps, count] float32: the matrix that averages each step's tokens."""
        matrix = np.zeros((steps, self.count), np.float32)
        for step, tokens in enumerate(self.members(window, steps)):
            matrix[step, tokens] = 1 / len(tokens)
        return matrix
