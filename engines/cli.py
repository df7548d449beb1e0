"""``detr predict``: what a model finds in pictures."""

from __future__ import annotations

import io
from pathlib import Path

import click
from PIL import Image
from pydantic import BaseModel

from detr.cli_support import emit, json_option, progress
from detr.errors import UserError
from detr.files import write_atomic
from detr.types import Detections


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
    """What was found in one picture, best first."""

    image: Path
    width: int
    height: int
    detections: list[Detection]


class Predictions(BaseModel):
    """Everything one call of ``detr predict`` found."""

    model: Path
    engine: str
    predictions: list[Prediction]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--draw", type=click.Path(path_type=Path), help="Write the picture with boxes here.")
@click.option("--score", default=0.3, show_default=True, help="Leave out what scores less.")
@json_option
def predict(
    model: Path, images: tuple[Path, ...], draw: Path | None, score: float, as_json: bool
) -> None:
    """Show what MODEL (a checkpoint, a run directory or a bundle) finds in IMAGES.

    Example: detr predict student.bundle road.png --draw found.png
    """
    # Imported here: --help answers at once, and the engine's own needs are the engine's.
    from detr.data.draw import draw as draw_boxes
    from detr.data.images import read_image
    from engines.open import open_engine

    if draw is not None and len(images) != 1:
        raise UserError("option-draw", f"--draw takes one image, not {len(images)}")
    if draw is not None and draw.suffix.lower() not in {".png", ".jpg", ".jpeg"}:
        raise UserError("option-draw", f"--draw {draw}: the name must end in .png or .jpg")
    if draw is not None and draw.exists() and draw.samefile(images[0]):
        raise UserError("option-draw", f"--draw {draw}: is the image itself, which would be lost")
    engine = open_engine(model)
    names = engine.info.classes.names
    predictions = []
    for path in progress(images, "predict"):
        image = read_image(path, value_range=engine.info.preprocess.range)
        found = engine([image])[0].above(score)
        predictions.append(
            Prediction(
                image=path,
                width=image.shape[1],
                height=image.shape[0],
                detections=_found(found, engine.info.classes.category_ids, names),
            )
        )
        if draw is not None:
            drawn = draw_boxes(image, found.boxes, found.labels, names, found.scores)
            buffer = io.BytesIO()
            Image.fromarray(drawn).save(buffer, "PNG" if draw.suffix.lower() == ".png" else "JPEG")
            write_atomic(draw, buffer.getvalue())
    result = Predictions(model=model, engine=engine.name, predictions=predictions)
    emit(result, as_json, "\n".join(_text(one) for one in predictions))


def _found(
    detections: Detections, category_ids: tuple[int, ...], names: tuple[str, ...]
) -> list[Detection]:
    return [
        Detection(
            label=names[label],
            category_id=category_ids[label],
            score=float(score),
            box=(float(x0), float(y0), float(x1), float(y1)),
        )
        for (x0, y0, x1, y1), score, label in zip(
            detections.boxes, detections.scores, detections.labels.tolist(), strict=True
        )
    ]


def _text(one: Prediction) -> str:
    lines = [f"{one.image}: {len(one.detections)} found"]
    for found in one.detections:
        x0, y0, x1, y1 = found.box
        lines.append(f"  {found.score:.2f}  {found.label:<16} {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}")
    return "\n".join(lines)
