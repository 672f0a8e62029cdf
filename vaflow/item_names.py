"""Names of the items of a clip whose people were all extracted: `clip#1`, `clip#2`, ..."""

import re


def person_item(clip: str, number: int) -> str:
    """Return the item of person `number` (from 1) of a clip whose people were all extracted."""
    return f"{clip}#{number}"


def clip_and_person(item: str) -> tuple[str, int]:
    """Return the clip and the number of the person that an item's name states; the item and 0 if it states none."""
    clip, mark, number = item.rpartition("#")
    return (clip, int(number)) if mark and clip and re.fullmatch(r"[1-9]\d*", number) else (item, 0)
