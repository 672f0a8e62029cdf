"""Every frame of a video as a JPEG of 112 x 112 pixels named by its number, as Aff-Wild2 ships its faces."""

from dataclasses import replace
from pathlib import Path

import av

from vaflow.datasets import Dataset

EDGE = 112


def with_crops(dataset: Dataset, folder: Path) -> Dataset:
    """The same clips, each with a folder of crops of all its frames."""
    clips = []
    for clip in dataset.clips:
        place = folder / clip.id
        place.mkdir(parents=True)
        with av.open(str(clip.video)) as container:
            for number, frame in enumerate(container.decode(video=0), 1):
                frame.to_image(width=EDGE, height=EDGE).save(place / f"{number:05d}.jpg", quality=95)
        clips.append(replace(clip, crops=(place,)))
    return replace(dataset, clips=tuple(clips))
