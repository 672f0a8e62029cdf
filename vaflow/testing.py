"""Tests that every encoder must pass, for packages that add encoders: subclass `EncoderContract` and run pytest.

    class TestMine(EncoderContract):
        name = "mine:small"

A package adds a family with an entry point in the group `vaflow.encoders`; see docs/encoders.md.
"""

import json
from typing import Any

import numpy as np
import torch

from vaflow.encoders import build_encoder

BATCH, WINDOWS = 16, 4  # rows of a batch, as extraction has them on a CPU; windows are larger rows


class EncoderContract:
    """What extraction requires of an encoder. Collected by pytest through subclasses only.

    Attributes:
        name: the encoder, as on the command line.
        window, steps: seconds and audio steps that the tests use.
        order_tolerance: largest change of a row that other rows in its batch may cause. 0 keeps extraction bit for bit
            reproducible in any order; models whose matrix sizes are no multiples of the vector width need some float32
            rounding, depending on the number of threads.
    """

    name = ""
    window = 4.0
    steps = 8
    order_tolerance = 0.0

    def build(self) -> Any:
        """Return a new encoder."""
        return build_encoder(self.name)

    def changed(self) -> Any:
        """Return an encoder with other weights or preprocessing; None if only one exists."""
        return None

    def rows(self, encoder: Any) -> torch.Tensor:
        """Return different inputs, as extraction makes them."""
        rng = np.random.default_rng(0)
        if encoder.kind == "visual":
            images = [rng.integers(0, 256, (90 + 20 * k, 140, 3), np.uint8) for k in range(BATCH)]
            return torch.from_numpy(np.stack([encoder.prepare(image) for image in images]))
        segments = encoder.segments(self.window, self.steps)
        count = WINDOWS if len(segments.first) == 1 else BATCH
        values = rng.normal(scale=0.1, size=(count, segments.frames, encoder.front_end.bins))
        return torch.from_numpy(values.astype(np.float32))

    def encode(self, encoder: Any, rows: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output for some rows."""
        options = {} if encoder.kind == "visual" else {"window": self.window, "steps": self.steps}
        output: torch.Tensor = encoder.encode(rows, **options)
        return output

    def test_shapes_and_types(self) -> None:
        encoder = self.build()
        assert encoder.kind in ("visual", "audio") and encoder.name == self.name
        rows = self.rows(encoder)
        output = self.encode(encoder, rows)
        layers = getattr(encoder, "layers", ())
        vector = (len(layers), encoder.dim) if layers else (encoder.dim,)
        expected: tuple[int, ...] = (len(rows), *vector)
        if encoder.kind == "audio":
            expected = (len(rows), self.steps // len(encoder.segments(self.window, self.steps).first), *vector)
        assert tuple(output.shape) == expected, f"expected {expected}, got {tuple(output.shape)}"
        assert output.dtype == torch.float32 and bool(output.isfinite().all())
        assert not output.requires_grad, "encode must not record gradients"

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        encoder = self.build()
        rows = self.rows(encoder)
        output = self.encode(encoder, rows)
        order = list(reversed(range(len(rows))))
        change = float((self.encode(encoder, rows[order]) - output[order]).abs().max())
        assert change <= self.order_tolerance, f"the order of rows changes the output by {change:.1e}"
        others = rows.clone()
        others[1:] = rows[:1]
        assert torch.equal(self.encode(encoder, others)[0], output[0]), "other rows change the output"

    def test_padding_rows_do_not_change_the_others(self) -> None:
        encoder = self.build()
        rows = self.rows(encoder)
        padded = rows.clone()
        padded[-2:] = 0
        assert torch.equal(self.encode(encoder, padded)[:-2], self.encode(encoder, rows)[:-2])

    def test_two_builds_are_the_same_encoder(self) -> None:
        one, other = self.build(), self.build()
        assert one.identity == other.identity
        rows = self.rows(one)
        assert torch.equal(self.encode(one, rows), self.encode(other, rows))
        assert torch.equal(self.encode(one, rows), self.encode(one, rows)), "two calls differ"

    def test_the_identity_is_json_and_covers_the_weights(self) -> None:
        encoder, changed = self.build(), self.changed()
        assert json.loads(json.dumps(encoder.identity)) == encoder.identity
        assert encoder.identity.get("encoder"), 'identity["encoder"] names the family'
        if getattr(encoder, "layers", ()):
            assert encoder.identity["layers"] == list(encoder.layers)
        if changed is not None:
            assert changed.identity != encoder.identity, "other weights or preprocessing need another identity"

    def test_geometry(self) -> None:
        encoder = self.build()
        if encoder.kind == "visual":
            edge = encoder.image_size
            for shape in ((edge, edge), (edge + 31, edge), (edge // 2, 2 * edge)):
                prepared = encoder.prepare(np.zeros((*shape, 3), np.uint8))
                assert prepared.shape == (edge, edge, 3) and prepared.dtype == encoder.preparation.dtype
            return
        segments = encoder.segments(self.window, self.steps)
        assert self.steps % len(segments.first) == 0, "the number of segments must divide the steps"
        times = encoder.step_times(self.window, self.steps)
        assert times.shape == (self.steps,) and (np.diff(times) >= 0).all()
        assert times[0] >= 0 and times[-1] <= self.window, "steps lie within the window"

    def test_input_of_another_device_is_moved(self) -> None:
        encoder = self.build()
        assert self.encode(encoder, self.rows(encoder)).device.type == torch.device(encoder.device).type
