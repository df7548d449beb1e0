"""A page of pictures with their boxes and masks: people look before they train."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from pydantic import BaseModel

from detr.cli_support import progress
from detr.data.dataset import Annotation, Dataset, evenly_spaced
from detr.data.draw import class_color, draw
from detr.data.findings import Look, depth_findings, look, masks_of, of_the_set
from detr.data.value_range import to_bytes
from detr.errors import UserError
from detr.files import write_atomic
from detr.masks import Mask, Size
from detr.types import ImageArray

_WIDTH = 720


class Card(BaseModel):
    """One picture.

    Attributes:
        title: Its file's name.
        size: ``1242 x 375``; empty where it cannot be read.
        uri: The picture with boxes, or empty.
        counts: Class name and number of objects; regions last.
        findings: What is wrong with it.
    """

    title: str
    size: str
    uri: str
    counts: list[tuple[str, int]]
    findings: list[str]


class Page(BaseModel):
    """What was written.

    Attributes:
        page: The file.
        images: Pictures on it.
    """

    page: Path
    images: int


def show(dataset: Dataset, out: Path, images: int) -> Page:
    """Writes a page of pictures spread evenly over a data set; it needs no other file.

    Args:
        dataset: What is shown.
        out: The page; ``.html`` is added to a name without it.
        images: How many pictures at most.

    Raises:
        UserError: ``data-empty``, ``output-unwritable`` or ``disk-full``.
    """
    indices = evenly_spaced(len(dataset), images)
    if not indices:
        raise UserError("data-empty", f"{dataset.spec}: no images to show")
    looks = [look(dataset, i) for i in indices]
    cards = [_card(dataset, one) for one in progress(looks, "drawing")]
    names = dataset.classes.names
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = templates.get_template("show.html.j2").render(
        data=dataset.spec,
        total=len(dataset),
        cards=cards,
        legend=[(name, "rgb({}, {}, {})".format(*class_color(k))) for k, name in enumerate(names)],
        findings=[f.message for f in of_the_set(dataset) + depth_findings(dataset, looks)],
    )
    page = out if out.suffix.lower() in (".html", ".htm") else out.with_name(f"{out.name}.html")
    write_atomic(page, text)
    return Page(page=page, images=len(cards))


def _card(dataset: Dataset, one: Look) -> Card:
    i = one.index
    names = dataset.classes.names
    counts = [(n, sum(not a.ignore and a.label == k for a in one.annotations)) for k, n in
              enumerate(names)]  # fmt: skip
    counts.append(("ignore regions", sum(a.ignore for a in one.annotations)))
    uri = size = ""
    told = [*one.findings, *masks_of(dataset, one)]
    findings = [f"{f.code}: {f.message}" for f in told]
    try:
        image = to_bytes(dataset.image(i), None)
        scale = min(1.0, _WIDTH / image.shape[1])
        wanted = (round(image.shape[1] * scale), max(1, round(image.shape[0] * scale)))
        small = np.asarray(Image.fromarray(image).resize(wanted, Image.Resampling.LANCZOS))
        boxes = np.array([a.box for a in one.annotations], dtype=np.float64).reshape(-1, 4)
        labels = np.array([-1 if a.ignore else a.label for a in one.annotations], dtype=np.int64)
        ratio = (small.shape[0] / image.shape[0], small.shape[1] / image.shape[1])
        masks = [_scaled(a, ratio, (small.shape[0], small.shape[1])) for a in one.annotations]
        uri = _jpeg(draw(small, boxes * scale, labels, names, masks=masks))
        size = f"{image.shape[1]} x {image.shape[0]}"
    except UserError as error:
        if not any(error.code == f.code for f in one.findings):
            findings.append(f"{error.code}: {error.message}")
    return Card(
        title=dataset.image_path(i).name,
        size=size,
        uri=uri,
        counts=[(name, count) for name, count in counts if count],
        findings=findings,
    )


def _scaled(annotation: Annotation, ratio: tuple[float, float], size: Size) -> Mask | None:
    """The mask on the card; one that cannot be read is a finding already."""
    try:
        return annotation.mask and annotation.mask().moved(ratio, (0, 0), size)
    except UserError:
        return None


def _jpeg(image: ImageArray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
