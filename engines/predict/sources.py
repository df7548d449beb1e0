"""What ``detr predict`` is given: images, folders, patterns and videos, and the frames in them."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from detr.data.images import SUFFIXES, read_image
from detr.data.names import distinct_names
from detr.data.value_range import ValueRange, to_bytes
from detr.errors import UserError
from detr.types import ImageArray
from engines.bundle import is_bundle
from engines.predict.video import VIDEO_SUFFIXES, Clock, open_video, read_video

_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """A file to look at.

    Attributes:
        path: Of the image or video.
        name: Short, and no other source's.
        frames: How many images it holds; None in a video that does not tell.
    """

    path: Path
    name: str
    frames: int | None = 1

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its name."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """An image to be answered.

    Attributes:
        source: Where it comes from.
        name: The source's, followed by the frame's number in a video.
        pixels: ``[h, w, 3]`` uint8 RGB.
        number: Of a video's frame, from 0.
        clock: When a video's frame is shown.
    """

    source: Source
    name: str
    pixels: ImageArray
    number: int | None = None
    clock: Clock | None = None


class Skipped(BaseModel):
    """A file, or the rest of a video, that could not be read.

    Attributes:
        path: The file.
        code: Of the error.
        message: What is wrong with it.
    """

    path: Path
    code: str
    message: str


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """The images and videos meant by paths; one meant twice is taken once.

    Args:
        paths: Files, folders (with everything below them) and patterns (``"day/**/*.png"``).

    Raises:
        UserError: ``image-missing`` for a file that is not there or a pattern nothing matches,
            ``images-none`` for a folder without images and videos, ``extra-missing`` for a video
            without PyAV.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _files(path):
            found.setdefault(file.resolve(), file)
    names = distinct_names(list(found))
    sources = [
        Source(file, _apart(file, name, names))
        for file, name in zip(found.values(), names, strict=True)
    ]
    return [
        Source(one.path, one.name, _count(one.path)) if one.is_video else one for one in sources
    ]


def _apart(file: Path, name: str, names: Sequence[str]) -> str:
    """A video's name, with its suffix where an image is called like one of its frames."""
    frames = [other.removeprefix(f"{name}_") for other in names if other.startswith(f"{name}_")]
    suffix = file.suffix.lower()
    if suffix in VIDEO_SUFFIXES and any(map(str.isdecimal, frames)):
        return f"{name}_{suffix.lstrip('.')}"
    return name


def _count(video: Path) -> int | None:
    """Frames of a video; one, the error, where it cannot be opened."""
    try:
        with open_video(video) as opened:
            return opened.frames
    except UserError as error:
        if error.code == "extra-missing":
            raise
        return 1


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        suffixes = {*SUFFIXES, *VIDEO_SUFFIXES}
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not inside:
            raise UserError("images-none", f"{path}: {_described(path)}")
        return inside
    if path.exists():
        return [path]
    if _PATTERN & set(str(path)):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise UserError("image-missing", f"{path}: no file has such a name")
        return files
    raise UserError("image-missing", f"{path}: no such image")


def _described(folder: Path) -> str:
    """What a folder without images is instead."""
    if is_bundle(folder):
        return "a bundle, which is a model and no image; it comes first: detr predict MODEL PATH..."
    if (folder / "model.safetensors").is_file():
        return "a run directory, which is a model and no image; it comes first"
    count = sum(1 for file in folder.rglob("*") if file.is_file())
    kinds = ", ".join(suffix.lstrip(".") for suffix in SUFFIXES)
    return (
        "an empty folder" if count == 0
        else f"no image or video among its {count} files ({kinds}; {', '.join(VIDEO_SUFFIXES)})"
    )  # fmt: skip


def read_frames(
    sources: Sequence[Source], value_range: ValueRange | None
) -> Iterator[Frame | Skipped]:
    """Decodes one image after the other; what cannot be read comes out as :class:`Skipped`.

    Args:
        sources: Images and videos.
        value_range: The values of deeper pictures that become 0 and 255.
    """
    for source in sources:
        try:
            if source.is_video:
                for number, (pixels, clock) in enumerate(read_video(source.path)):
                    name = f"{source.name}_{number:06d}"
                    yield Frame(source, name, pixels, number, clock)
            else:
                image = read_image(source.path, value_range=value_range)
                # Here and not in the engine: what has no 8 bits to give is found while reading.
                yield Frame(source, source.name, to_bytes(image, value_range))
        except UserError as error:
            message = error.message.removeprefix(f"{source.path}: ")
            yield Skipped(path=source.path, code=error.code, message=message)
