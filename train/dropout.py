"""Windows without one of their two modalities, as clips in the world are: in training now and then, or a whole split.

With dropout in training the model learns what to say without sound, or without a face, and what the vectors that stand
for missing input should be (that of faces; a window without any sound is what the frames say, whatever the vector of
sound is). Ours: the papers do not do so.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vaflow.errors import UsageError, explain
from vaflow.train.batch import AUDIO, VISUAL, Batch, StreamSpec
from vaflow.train.windows import WindowSet


def drop_modality(batch: Batch, streams: Sequence[StreamSpec], share: float) -> Batch:
    """Mark all streams of one modality as missing in about `share` of the windows; never both modalities.

    Which windows, and which modality (each as likely), is drawn from torch's generator, so it follows from the seed.

    Args:
        batch: B windows.
        streams: what the model reads.
        share: probability that a window loses a modality, in [0, 1).

    Returns:
        The batch with other `valid` masks; the batch itself where the model reads one modality only.
    """
    if not share or {stream.kind for stream in streams} != {VISUAL, AUDIO}:
        return batch
    draw = torch.rand(len(batch.inside), device=batch.inside.device)
    lost = {VISUAL: draw < share / 2, AUDIO: (draw >= share / 2) & (draw < share)}
    valid = {stream.name: batch.valid[stream.name] & ~lost[stream.kind].unsqueeze(1) for stream in streams}
    return replace(batch, valid={**batch.valid, **valid})


def without_modality(windows: WindowSet, modality: str) -> WindowSet:
    """The same windows with every stream of a modality marked as missing: what does the model know without it?

    Raises:
        UsageError: it is no modality, the windows have no stream of it, or no other stream.
    """
    if modality not in (VISUAL, AUDIO):
        raise UsageError(explain("There is no such modality", got=modality, choices=(VISUAL, AUDIO)))
    names = {stream.name for stream in windows.streams if stream.kind == modality}
    if not names or len(names) == len(windows.streams):
        raise UsageError(
            explain(
                f"The run cannot do without {modality}",
                expected="a run that reads a visual and an audio stream",
                got="one that reads " + ", ".join(f"{s.name} ({s.kind})" for s in windows.streams),
            )
        )
    return windows.without(frozenset(names))
