"""What ``detr predict`` leaves in its folder, written as the answers come."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, get_args

import numpy as np
from PIL import Image

from detr.config import ClassMap
from detr.data.draw import draw
from detr.data.kitti_rows import UNKNOWN_3D
from detr.data.outline import single_polygon
from detr.errors import UserError
from detr.files import output_error, output_folder
from detr.metrics.coco_ap import to_results
from detr.types import Detections, ImageArray, ImageId
from engines.predict.sources import Frame, Skipped, Source
from engines.predict.video import VideoWriter

Kind = Literal["pictures", "coco", "kitti", "yolo"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PICTURE_SCORE = 0.3
_JPEG_QUALITY = 90


class Output(ABC):
    """Takes answers one after the other.

    Attributes:
        score: Detections below are left out.
    """

    score: float

    @abstractmethod
    def write(self, frame: Frame, found: Detections) -> None:
        """Writes the answer to an image."""

    def close(self) -> None:
        """Finishes what is open."""
        return


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


class _Stream:
    """A file that grows under another name and takes its own when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _writing(path):
            descriptor, self._temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            self._file: IO[str] = os.fdopen(descriptor, "w", encoding="utf-8", newline="")

    def write(self, text: str) -> None:
        with _writing(self._path):
            self._file.write(text)

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self._temporary, 0o666 & ~mask)
            os.replace(self._temporary, self._path)


class CsvFile:
    """A table that is written row by row.

    Args:
        path: Where to.
        head: Names of the columns.
    """

    def __init__(self, path: Path, head: Sequence[str]) -> None:
        self._stream = _Stream(path)
        self.row(head)

    def row(self, values: Sequence[object]) -> None:
        """Adds a row."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self._stream.write(line.getvalue())

    def close(self) -> None:
        """Gives the table its name."""
        self._stream.close()


class Pictures(Output):
    """``pictures/NAME.jpg`` with boxes and masks drawn, and a video for a video.

    Args:
        folder: Where to.
        names: Class names.
        score: Detections below are not drawn.
    """

    def __init__(self, folder: Path, names: Sequence[str], score: float) -> None:
        self.score = score
        self._folder, self._names = folder / "pictures", names
        self._video: tuple[Source, VideoWriter] | None = None
        output_folder(self._folder)

    def write(self, frame: Frame, found: Detections) -> None:
        """See the base class."""
        if self._video is not None and self._video[0] is not frame.source:
            self.close()
        drawn = draw(
            frame.pixels, found.boxes, found.labels, self._names, found.scores, found.masks
        )
        if frame.clock is None:
            path = self._folder / f"{frame.name}.jpg"
            with _writing(path):
                path.write_bytes(_jpeg(drawn))
            return
        if self._video is None:
            writer = VideoWriter(self._folder / f"{frame.source.name}.mp4")
            self._video = frame.source, writer
        self._video[1].write(np.asarray(drawn, dtype=np.uint8), frame.clock)

    def close(self) -> None:
        """See the base class."""
        if self._video is not None:
            writer, self._video = self._video[1], None
            writer.close()


def _jpeg(image: ImageArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


class CocoResults(Output):
    """``coco.json``, a COCO results file.

    Args:
        folder: Where to.
        classes: Category ids.
        ids: Image ids.
        score: Detections below are left out.
    """

    def __init__(self, folder: Path, classes: ClassMap, ids: ImageIds, score: float) -> None:
        self.score = score
        self._classes, self._ids = classes, ids
        self._stream = _Stream(folder / "coco.json")
        self._separator = "[\n"

    def write(self, frame: Frame, found: Detections) -> None:
        """See the base class."""
        for entry in to_results(self._ids(frame), found, self._classes):
            self._stream.write(self._separator + json.dumps(entry))
            self._separator = ",\n"

    def close(self) -> None:
        """See the base class."""
        self._stream.write("[]\n" if self._separator == "[\n" else "\n]\n")
        self._stream.close()


class KittiResults(Output):
    """``kitti/NAME.txt``, KITTI result files of 16 columns; 2-D only.

    Args:
        folder: Where to.
        names: Class names.
        score: Detections below are left out.

    Raises:
        UserError: ``convert-name`` for a class name of more than one word.
    """

    def __init__(self, folder: Path, names: Sequence[str], score: float) -> None:
        for name in names:
            if len(name.split()) != 1:
                raise UserError(
                    "convert-name", f"class {name!r}: a KITTI row ends a name at a space"
                )
        self.score = score
        self._folder, self._names = folder / "kitti", names
        output_folder(self._folder)

    def write(self, frame: Frame, found: Detections) -> None:
        """See the base class."""
        rows = [
            f"{self._names[label]} -1 -1 -10 {' '.join(map(repr, box))} {UNKNOWN_3D} {score!r}\n"
            for box, score, label in _plain(found)
        ]
        path = self._folder / f"{frame.name}.txt"
        with _writing(path):
            path.write_text("".join(rows))


class YoloLabels(Output):
    """``labels/NAME.txt``: class, center and size in shares of the image, confidence.

    Of a model that finds masks: class, x and y of each corner of one polygon that fills the mask's
    pixels, confidence. An empty mask has no polygon, and its detection no row.

    Args:
        folder: Where to.
        score: Detections below are left out.
    """

    def __init__(self, folder: Path, score: float) -> None:
        self.score = score
        self._folder = folder / "labels"
        output_folder(self._folder)

    def write(self, frame: Frame, found: Detections) -> None:
        """See the base class."""
        height, width = frame.pixels.shape[:2]
        rows = []
        for k, ((x0, y0, x1, y1), score, label) in enumerate(_plain(found)):
            center = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
            share = [*center, (x1 - x0) / width, (y1 - y0) / height]
            if found.masks is not None:
                corners = single_polygon(found.masks[k], (height, width)) / (width, height)
                share = corners.ravel().tolist()
            if share:
                rows.append(f"{label} {' '.join(f'{v:.6f}' for v in share)} {score:.6f}\n")
        path = self._folder / f"{frame.name}.txt"
        with _writing(path):
            path.write_text("".join(rows))


def _plain(found: Detections) -> Iterator[tuple[list[float], float, int]]:
    return zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)


class ImageIds:
    """Image ids of results: the number a name is, as data sets without ids of their own have it.

    Where two names are the same number (``1.png``, ``001.png``), the names are the ids.

    Args:
        sources: Everything that is answered.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        numbers = [int(one.name) for one in sources if one.name.isdecimal()]
        self._by_number = len(set(numbers)) == len(numbers)

    def __call__(self, frame: Frame) -> ImageId:
        """The id of an image or of a video's frame."""
        return int(frame.name) if self._by_number and frame.name.isdecimal() else frame.name


def check_new(folder: Path) -> None:
    """Refuses a folder with results of an earlier call: they would be taken for one's own.

    Raises:
        UserError: ``output-exists``.
    """
    for name in ("images.csv", "pictures", "coco.json", "kitti", "labels"):
        if (folder / name).exists():
            raise UserError(
                "output-exists", f"{folder / name}: is of an earlier call; choose another --out"
            )


class Results:
    """The folder of one call: its outputs, which image is which, and what was skipped.

    Args:
        folder: See :func:`check_new`.
        kinds: What to write.
        sources: Everything that is answered.
        classes: The model's.
        score: Least score of everything; by default 0.3 in pictures and labels, none in files that
            AP is computed from.

    Raises:
        UserError: ``output-unwritable``, ``convert-name``.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[Kind],
        sources: Sequence[Source],
        classes: ClassMap,
        score: float | None,
    ) -> None:
        output_folder(folder)
        seen = PICTURE_SCORE if score is None else score
        every = 0.0 if score is None else score
        self._ids = ImageIds(sources)
        self._outputs: list[Output] = []
        if "pictures" in kinds:
            self._outputs.append(Pictures(folder, classes.names, seen))
        if "coco" in kinds:
            self._outputs.append(CocoResults(folder, classes, self._ids, every))
        if "kitti" in kinds:
            self._outputs.append(KittiResults(folder, classes.names, every))
        if "yolo" in kinds:
            self._outputs.append(YoloLabels(folder, seen))
        self._images = CsvFile(
            folder / "images.csv", ("name", "image_id", "width", "height", "frame", "path")
        )
        self._skipped = CsvFile(folder / "skipped.csv", ("path", "code", "message"))

    def write(self, frame: Frame, found: Detections) -> None:
        """Writes the answer to an image."""
        for output in self._outputs:
            output.write(frame, found.above(output.score))
        height, width = frame.pixels.shape[:2]
        number = "" if frame.number is None else frame.number
        self._images.row((frame.name, self._ids(frame), width, height, number, frame.source.path))

    def skip(self, skipped: Skipped) -> None:
        """Lists what could not be read."""
        self._skipped.row((skipped.path, skipped.code, skipped.message))

    def close(self) -> None:
        """Finishes all files, also after a call that was ended early."""
        for output in self._outputs:
            output.close()
        self._images.close()
        self._skipped.close()
