"""A run's diagnosis as one HTML page with its curves and pictures within, nothing from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detr.data import Dataset
from detr.data.value_range import to_bytes
from detr.models import SampledAttention, cxcywh_to_xyxy
from detr.plot import Axis
from detr.types import ImageArray
from distill.analysis.diagnosis import Curve, Diagnosis, Subject
from distill.methods.parts.attended_cells import attended_map
from distill.query_owners import Answer, layer_owners

# Images shown; each is as wide as a third of the page.
SHOWN_IMAGES = 3
_WIDTH = 520
_COLORS = {"student": "#3b82c4", "baseline": "#d97a1e", "teacher": "#2f9e7a", "average": "#c2559d"}
_STYLE = """
:root { --ground: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6677; --line: #dfe3e9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #11151b; --card: #1a2029; --ink: #e7ebf0; --soft: #9aa6b5; --line: #2d3642; }
}
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 6px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px; }
.soft { color: var(--soft); font-size: 13px; margin: 0 0 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 20px; }
.plots section { margin-top: 0; }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .line { fill: none; stroke-width: 2.5; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
.shots { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.shots img { width: 100%; border-radius: 6px; display: block; }
.shots figure { margin: 0; } figcaption { font-size: 12px; color: var(--soft); }
"""


def render(result: Diagnosis, subjects: Sequence[Subject], dataset: Dataset) -> str:
    """The page."""
    unstable = {m.name: list(m.unstable.values()) for m in result.models}
    layers = max((list(m.unstable) for m in result.models), key=len, default=[])
    sections = [
        _section(
            "Average precision",
            "COCO AP at each validation, percent.",
            curves(result.ap, "finished steps", "AP"),
        ),
        _section("Training loss", "All terms together.", curves(result.loss, "finished steps", "")),
        _section(
            "Instability between validations",
            "Queries per image that stand for another object than at the validation before "
            "(DN-DETR's IS), in the last layer. Lower is steadier.",
            curves(result.instability, "finished steps", "queries")
            or "<p>The run kept the matches of fewer than two validations; "
            "<code>validation.every</code> makes more.</p>",
        ),
        _section(
            "Student and its average",
            "Objects that both match with the same query, percent (OD-DETR, figure 5).",
            curves({"average": result.average_consistency}, "finished steps", "%")
            or "<p>The run kept no matches of a weight average.</p>",
        ),
        _section(
            "Instability between layers",
            "Objects whose query changes from one decoder layer to the next, percent "
            "(Stable-DINO's unstable score): " + ", ".join(layers) + ".",
            curves(
                {name: list(enumerate(values, 1)) for name, values in unstable.items()},
                "layer step",
                "%",
            ),
        ),
        _section(
            "Queries per object",
            "Queries whose best object it is, by least generalized IoU (QSKD, table 1).",
            _table(result),
        ),
    ]
    title = f"Diagnosis of {result.run}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p class='soft'>{result.images} images of "
        f"{escape(result.data)}, {result.objects} objects.</p>"
        f'<div class="plots">{"".join(sections)}</div>{_pictures(subjects, dataset)}'
        "</main></body></html>\n"
    )


def _section(title: str, about: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="soft">{escape(about)}</p>{body}</section>'


def _table(result: Diagnosis) -> str:
    heads = list(result.models[0].queries_per_object)
    rows = [f"<tr><th>GIoU above</th>{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr>"]
    for model in result.models:
        cells = "".join(f"<td>{v:.1f}</td>" for v in model.queries_per_object.values())
        rows.append(f"<tr><th>{model.name}</th>{cells}</tr>")
    told = [
        f"<p>{m.name}: {m.consistency:.1f} % of objects are matched with the query of the same "
        "number as the teacher's.</p>"
        for m in result.models
        if m.consistency is not None
    ]
    return f"<table>{''.join(rows)}</table>{''.join(told)}"


def curves(lines: Mapping[str, Curve], x_title: str, y_title: str) -> str:
    """An SVG of named curves; empty where there is nothing to draw."""
    known = {name: line for name, line in lines.items() if line}
    if not known:
        return ""
    steps = [step for line in known.values() for step, _ in line]
    values = [value for line in known.values() for _, value in line]
    top = max(values) * 1.1 or 1.0
    low = min(0, min(steps)) if max(steps) > 20 else min(steps)
    x = Axis(low, max(steps) if max(steps) > low else low + 1, 48, 500)
    y = Axis(min(0.0, min(values)), top, 210, 12)
    parts = ['<svg viewBox="0 0 520 262" role="img">']
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="48" x2="500" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="42" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks():
        if tick == int(tick):
            parts.append(f'<text x="{x(tick):.1f}" y="228" text-anchor="middle">{int(tick)}</text>')
    parts.append(f'<text x="500" y="246" text-anchor="end">{escape(x_title)}</text>')
    parts.append(f'<text x="52" y="12">{escape(y_title)}</text>')
    for i, (name, line) in enumerate(known.items()):
        color = _COLORS[name]
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(f'<polyline class="line" style="stroke:{color}" points="{points}"/>')
        parts += [
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}">'
            f"<title>{escape(name)}, {step}: {value:.3g}</title></circle>"
            for step, value in (line if len(line) < 40 else [])
        ]
        parts.append(
            f'<circle cx="{54 + 96 * i}" cy="254" r="4" fill="{color}"/>'
            f'<text x="{62 + 96 * i}" y="258">{escape(name)}</text>'
        )
    return "".join(parts) + "</svg>"


def _pictures(subjects: Sequence[Subject], dataset: Dataset) -> str:
    """Where the models look: attention of the matched queries, and one query's sampling points."""
    parts = []
    for shot in range(min(SHOWN_IMAGES, len(subjects[0].shown[0].indices))):
        figures = []
        for draw, words in ((_attention, "attention"), (_samples, "sampling points")):
            for subject in subjects:
                answer = subject.shown[0]
                image = dataset.image(answer.indices[shot])
                made = draw(image, answer, shot)
                if made is None:
                    continue
                figures.append(
                    f'<figure><img alt="{words} of the {subject.name}" src="{_embedded(made)}">'
                    f"<figcaption>{subject.name}, {words}</figcaption></figure>"
                )
        parts.append(
            f'<div class="shots" style="grid-template-columns:repeat({len(subjects)},1fr)">'
            f"{''.join(figures)}</div>"
        )
    about = (
        "Last decoder layer. Above: attention of all queries that are matched to an object, over "
        "heads and levels. Below: sampling points of the query matched to the largest object, "
        "larger and brighter with their weight (OD-DETR, figure 7); white is the object, yellow "
        "the prediction."
    )
    return _section("Where the models look", about, "<br>".join(parts))


def _shown(image: ImageArray) -> Image.Image:
    height = round(image.shape[0] * _WIDTH / image.shape[1])
    return Image.fromarray(to_bytes(image, None)).resize(
        (_WIDTH, height), Image.Resampling.BILINEAR
    )


def _attention(image: ImageArray, answer: Answer, shot: int) -> Image.Image | None:
    """The image under a map of the matched queries' attention."""
    queries = [q for q in layer_owners(answer)[-1][shot] if q >= 0]
    weights = torch.zeros(answer.output.boxes[-1].shape[:2])
    weights[shot, queries] = 1.0
    memory = answer.memory
    looks = attended_map(answer.output.attention[-1], memory.shapes, weights)[shot]
    picture = _shown(image)
    height, width = answer.valid_sizes[shot].tolist()
    heat = np.zeros((picture.height, picture.width), dtype=np.float32)
    start = 0
    for rows, columns in memory.shapes:
        level = looks[start : start + rows * columns].reshape(rows, columns)
        start += rows * columns
        heat += _stretched(level, answer.canvas, (height, width), picture.size)
    heat = np.sqrt(heat / max(float(heat.max()), 1e-9))[..., None]
    warm = np.concatenate((np.ones_like(heat), 0.85 * heat, 0.1 * heat), -1) * 255
    mixed = np.asarray(picture) * (1 - 0.75 * heat) + warm * 0.75 * heat
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _stretched(
    level: Tensor, canvas: tuple[int, int], valid: tuple[float, float], size: tuple[int, int]
) -> np.ndarray:
    """A level's map over the canvas, cut to the image and stretched to a size (width, height)."""
    flat = Image.fromarray(level.cpu().numpy().astype(np.float32))
    sy, sx = level.shape[0] / canvas[0], level.shape[1] / canvas[1]
    box = (0.0, 0.0, valid[1] * sx, valid[0] * sy)
    stretched = np.asarray(flat.resize(size, Image.Resampling.BILINEAR, box=box))
    # A coarse cell covers more of the picture: spread its weight over that.
    return stretched * (level.shape[0] * level.shape[1])


def _samples(image: ImageArray, answer: Answer, shot: int) -> Image.Image | None:
    """The sampling points of the query matched to the largest object."""
    attention, target = answer.output.attention[-1], answer.targets[shot]
    owners = layer_owners(answer)[-1][shot]
    if not isinstance(attention, SampledAttention) or not owners:
        return None
    largest = int(target.boxes[:, 2:].prod(-1).argmax())
    query = owners[largest]
    if query < 0:
        return None
    picture = _shown(image)
    pen = ImageDraw.Draw(picture, "RGBA")
    for boxes, color in (
        (target.boxes[largest], (255, 255, 255, 255)),
        (answer.output.boxes[-1][shot, query], (255, 221, 51, 255)),
    ):
        corners = cxcywh_to_xyxy(boxes.cpu()) * torch.tensor(picture.size * 2)
        pen.rectangle(_ordered(corners.tolist()), outline=color, width=2)
    points = attention.locations[shot, query].reshape(-1, 2).cpu()
    weights = attention.weights[shot, query].flatten().cpu()
    filled = torch.tensor(answer.canvas) / answer.valid_sizes[shot].cpu()
    scale = filled.flip(0) * torch.tensor(picture.size)
    strongest = float(weights.max())
    for (px, py), weight in zip((points * scale).tolist(), weights.tolist(), strict=True):
        share = weight / strongest
        radius = 1.5 + 3.5 * share
        pen.ellipse(
            (px - radius, py - radius, px + radius, py + radius),
            fill=(255, int(60 + 120 * share), 40, int(70 + 185 * share)),
        )
    return picture


def _ordered(corners: list[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = corners
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _embedded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
