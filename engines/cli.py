"""``detr predict``: what a model finds in images and videos."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image
from pydantic import BaseModel
from tqdm import tqdm

from detr.cli_support import Number, counted, json_option, threads_option
from detr.config import ClassMap
from detr.data.draw import draw as draw_boxes
from detr.errors import UserError
from detr.files import write_atomic
from detr.types import Detections
from engines.open import ENGINES, open_engine
from engines.predict.outputs import KINDS, PICTURE_SCORE, Kind, Results, check_new
from engines.predict.run import Answer, SkipLimit, answers
from engines.predict.sources import Frame, Skipped, Source, find_sources


class Detection(BaseModel):
    """One detection.

    Attributes:
        label: Class name.
        category_id: The data set's id of the class.
        score: In [0, 1].
        box: x0 y0 x1 y1 in pixels of the picture.
    """

    label: str
    category_id: int
    score: float
    box: tuple[float, float, float, float]


class Prediction(BaseModel):
    """What was found in one image or one frame of a video, best first."""

    image: Path
    frame: int | None = None
    width: int
    height: int
    detections: list[Detection]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument(
    "images", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--engine", metavar="NAME", help=f"Runtime ({', '.join(ENGINES)}); the best at hand by default."
)
@threads_option
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for what --save names."
)
@click.option(
    "--save",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="What to write: annotated pictures (and videos), a COCO results file, KITTI result files, "
    "YOLO txt; may be repeated; pictures by default.",
)
@click.option(
    "--draw", type=click.Path(path_type=Path), help="Write the one image with boxes and masks here."
)
@click.option(
    "--score",
    type=Number(min=0),
    help=f"Leave out what scores less; {PICTURE_SCORE} by default, but nothing is left out of coco "
    "and kitti files, which AP is computed from.",
)
@click.option(
    "--max-skipped",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Stop when more files than this cannot be read.",
)
@json_option
def predict(
    model: Path,
    images: tuple[Path, ...],
    engine: str | None,
    threads: int | None,
    out: Path | None,
    kinds: tuple[Kind, ...],
    draw: Path | None,
    score: float | None,
    max_skipped: int,
    as_json: bool,
) -> None:
    """Find objects with MODEL (a checkpoint, a run directory or a bundle).

    PATHs are images, videos, folders with them (and everything below) or quoted patterns. A file
    that cannot be read is told, counted, listed and skipped.

    Example: detr predict student.bundle day1 clip.mp4 --out found --save pictures --save coco
    """
    if kinds and out is None:
        raise UserError("option-save", "--save: say where to with --out")
    if out is not None:
        check_new(out)
    sources = find_sources(images)
    if draw is not None:
        _check_draw(draw, sources)
    opened = open_engine(model, engine, threads)
    classes = opened.info.classes
    results = None if out is None else Results(out, kinds or ("pictures",), sources, classes, score)
    shown = PICTURE_SCORE if score is None else score
    limit, count, objects = SkipLimit(max_skipped), 0, 0
    with contextlib.ExitStack() as stack:
        if results is not None:
            stack.callback(results.close)
        said = _Said(model, opened.name, classes, as_json, quiet=out is not None)
        stack.callback(said.close, limit.skipped)
        for one in answers(opened, sources):
            if isinstance(one, Skipped):
                tqdm.write(f"skipped {one.path}: {one.message}", file=sys.stderr)
                if results is not None:
                    results.skip(one)
                limit.add(one)
                continue
            seen = one.found.above(shown)
            count, objects = count + 1, objects + len(seen)
            said.answer(one.frame, seen)
            if results is not None:
                results.write(one.frame, one.found)
            if draw is not None:
                _draw(draw, one, seen, classes.names)
    limit.check_answered(count)
    if out is not None and not as_json:
        told = f"{counted(count, 'image')}, {counted(objects, 'object')} found"
        click.echo(f"{told} (score >= {shown:g})")
    if limit.skipped:
        where = "" if out is None else f"; {out / 'skipped.csv'} lists them"
        click.echo(f"{counted(len(limit.skipped), 'file')} skipped{where}", err=True)
    if out is not None:
        click.echo(f"wrote {out} (images.csv says which image is which)", err=True)


class _Said:
    """Standard output, written as the answers come: text, or one JSON document."""

    def __init__(
        self, model: Path, engine: str, classes: ClassMap, as_json: bool, quiet: bool
    ) -> None:
        self._classes, self._json, self._quiet = classes, as_json, quiet
        self._first = True
        if as_json:
            head = json.dumps({"model": str(model), "engine": engine})
            click.echo(head[:-1] + ', "predictions": [', nl=False)

    def answer(self, frame: Frame, found: Detections) -> None:
        """Adds what was found in an image."""
        if not self._json and self._quiet:
            return
        one = Prediction(
            image=frame.source.path,
            frame=frame.number,
            width=frame.pixels.shape[1],
            height=frame.pixels.shape[0],
            detections=_found(found, self._classes),
        )
        if not self._json:
            click.echo(_text(one))
            return
        click.echo("\n" if self._first else ",\n", nl=False)
        click.echo(one.model_dump_json(), nl=False)
        self._first = False

    def close(self, skipped: Sequence[Skipped]) -> None:
        """Closes the JSON document, also after a call that was ended early."""
        if self._json:
            rows = [one.model_dump(mode="json") for one in skipped]
            click.echo(f'], "skipped": {json.dumps(rows)}}}')


def _check_draw(draw: Path, sources: Sequence[Source]) -> None:
    if len(sources) != 1 or sources[0].is_video:
        given = "a video" if len(sources) == 1 else str(len(sources))
        raise UserError("option-draw", f"--draw takes one image, not {given}; see --out")
    if draw.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise UserError("option-draw", f"--draw {draw}: the name must end in .png or .jpg")
    if draw.exists() and draw.samefile(sources[0].path):
        raise UserError("option-draw", f"--draw {draw}: is the image itself, which would be lost")


def _draw(draw: Path, answer: Answer, found: Detections, names: Sequence[str]) -> None:
    drawn = draw_boxes(
        answer.frame.pixels, found.boxes, found.labels, names, found.scores, found.masks
    )
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "PNG" if draw.suffix.lower() == ".png" else "JPEG")
    write_atomic(draw, buffer.getvalue())


def _found(detections: Detections, classes: ClassMap) -> list[Detection]:
    return [
        Detection(
            label=classes.names[label],
            category_id=classes.category_ids[label],
            score=float(score),
            box=(float(x0), float(y0), float(x1), float(y1)),
        )
        for (x0, y0, x1, y1), score, label in zip(
            detections.boxes, detections.scores, detections.labels.tolist(), strict=True
        )
    ]


def _text(one: Prediction) -> str:
    frame = "" if one.frame is None else f" frame {one.frame}"
    lines = [f"{one.image}{frame}: {len(one.detections)} found"]
    for found in one.detections:
        x0, y0, x1, y1 = found.box
        lines.append(f"  {found.score:.2f}  {found.label:<16} {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}")
    return "\n".join(lines)
