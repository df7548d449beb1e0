"""One road scene: a layout, its picture and its KITTI labels.

Solids are painted far to near into a picture and, with their number as color, into a mask of the
same size. The pixels an object still owns in the finished mask, over those it owned when it was
painted, are its visible fraction: that gives KITTI's occlusion level. Brought to the size of the
picture, the same mask tells each object's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from detr.data.synth import people, scenery, vehicles
from detr.data.synth.camera import Camera, Light, Patch, Placement, View, scaled
from detr.data.synth.statistics import CAMERA_HEIGHT, FOCAL, HORIZON, STATISTICS
from detr.masks import Pixels
from detr.types import ImageArray

CLASSES = tuple(STATISTICS)
IGNORED = "DontCare"

SUPERSAMPLE = 2
MIN_HEIGHT = 25 / 375  # in image heights: KITTI's least height for an evaluated box
MIN_VISIBLE = 0.2  # less than this is a DontCare region
MAX_TRUNCATED = 0.75
NEARER = 0.8  # distances are KITTI's times this: a small picture has few pixels for far objects

_SCENERY = 255  # mask value of what hides objects and is none


@dataclass(frozen=True)
class SceneObject:
    """One KITTI label row.

    Attributes:
        type: Class name or ``DontCare``.
        truncated: Share of the box outside the image, 0..1.
        occluded: 0 fully visible, 1 partly, 2 largely hidden.
        box: x0 y0 x1 y1 pixels, clipped to the image.
        size: (height, width, length) in metres.
        place: Where it stands.
        mask: ``[H, W]`` what is seen of it; the masks of a scene do not overlap.
    """

    type: str
    truncated: float
    occluded: int
    box: tuple[float, float, float, float]
    size: tuple[float, float, float]
    place: Placement
    mask: Pixels = field(compare=False, repr=False)


@dataclass(frozen=True)
class Scene:
    """A picture ``[H, W, 3]`` uint8 with its label rows, ``DontCare`` last."""

    image: ImageArray
    objects: tuple[SceneObject, ...]
    above_ground: float


@dataclass(frozen=True)
class _Solid:
    type: str | None
    place: Placement
    size: tuple[float, float, float]
    patches: list[Patch]


class _Canvas:
    """A picture and the mask of who owns each pixel, both supersampled."""

    def __init__(self, background: ImageArray) -> None:
        height, width = background.shape[:2]
        shape = (width * SUPERSAMPLE, height * SUPERSAMPLE)
        self.picture = Image.fromarray(background).resize(shape, Image.Resampling.NEAREST)
        self.mask = Image.new("L", shape, 0)
        self._paint = ImageDraw.Draw(self.picture)
        self._own = ImageDraw.Draw(self.mask)

    def draw(self, patches: list[Patch], owner: int | None = None) -> None:
        for points, color in patches:
            # Pillow's integers would overflow on a point just before the lens.
            outline = np.clip(points * SUPERSAMPLE, -1e6, 1e6).ravel().tolist()
            r, g, b = (min(255, max(0, int(c))) for c in color)
            self._paint.polygon(outline, fill=(r, g, b))
            if owner is not None:
                self._own.polygon(outline, fill=owner)

    def owned(self) -> npt.NDArray[np.int64]:
        """Pixels of each owner 0..255."""
        return np.asarray(self.mask.histogram(), dtype=np.int64)

    def seen(self, owners: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Which of the owners, told from far to near, each pixel of the picture shows.

        One that owns half of a pixel's samples or more; of two halves the nearer. An owner that has
        half of no pixel, though it has samples, gets the pixel in which it has most.
        """
        fine = np.asarray(self.mask)
        of_objects = np.where(fine == _SCENERY, 0, fine)
        steps = range(SUPERSAMPLE)
        samples = np.stack(
            [of_objects[y::SUPERSAMPLE, x::SUPERSAMPLE] for y in steps for x in steps]
        )
        samples.sort(axis=0)
        half = SUPERSAMPLE**2 // 2
        shown: npt.NDArray[np.uint8] = np.zeros(samples.shape[1:], dtype=np.uint8)
        for low, high in zip(samples, samples[half - 1 :], strict=False):  # the largest last
            np.copyto(shown, high, where=low == high)
        pixels, owned = np.bincount(shown.ravel(), minlength=256), self.owned()
        for owner in owners:
            if owned[owner] and not pixels[owner]:
                inside = fine.reshape(len(shown), SUPERSAMPLE, -1, SUPERSAMPLE) == owner
                shown.flat[int(inside.sum((1, 3)).argmax())] = owner
        return shown


def render(size: tuple[int, int], seed: int, index: int) -> Scene:
    """Scene ``index`` of a seed; it does not depend on how many others are made.

    Args:
        size: (height, width) in pixels.
        seed: Of the set.
        index: Of the scene in the set.
    """
    rng = np.random.default_rng((seed, index))
    camera, light = _camera(size, rng), _light(rng)
    road = scenery.make_road(rng)
    canvas = _Canvas(scenery.sky(camera, light, rng))
    canvas.draw(scenery.hills(camera, light, rng))
    canvas.draw(scenery.ground(camera, light, road, rng))
    if road.houses:
        for place, dimensions in scenery.place_buildings(road, rng):
            canvas.draw(scenery.building(View(camera, light, place), dimensions, rng))
    solids = _objects(camera, light, road, rng) + _distractors(camera, light, road, rng)
    solids.sort(key=lambda solid: -solid.place.z)
    kept: list[tuple[int, _Solid, int]] = []
    for solid in solids:
        owner = _SCENERY if solid.type is None else len(kept) + 1
        if solid.size[1] > 0:
            outline, _ = scenery.shadow(View(camera, light, solid.place), solid.size[1:])
            canvas.draw([(outline, light.fade(scaled(road.asphalt, 0.42), solid.place.z))])
        canvas.draw(solid.patches, owner)
        if solid.type is not None:
            kept.append((owner, solid, int(canvas.owned()[owner])))
    after = canvas.owned()
    seen = canvas.seen([owner for owner, _, _ in kept])
    objects = [
        label
        for owner, solid, drawn in kept
        if (label := _label(solid, seen == owner, drawn, int(after[owner]))) is not None
    ]
    objects = [o for o in objects if o.type != IGNORED] + [o for o in objects if o.type == IGNORED]
    return Scene(_finish(canvas, camera, rng), tuple(objects), camera.above_ground)


def _camera(size: tuple[int, int], rng: np.random.Generator) -> Camera:
    height, width = size
    return Camera(
        height=height,
        width=width,
        focal=FOCAL * height,
        cx=width * (0.5 + float(rng.uniform(-0.07, 0.07))),
        cy=height * (HORIZON + float(rng.uniform(-0.03, 0.03))),
        above_ground=CAMERA_HEIGHT + float(rng.uniform(-0.1, 0.1)),
    )


def _light(rng: np.random.Generator) -> Light:
    azimuth, altitude = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
    level = rng.uniform(190, 226)
    return Light(
        sun=(
            float(np.cos(azimuth) * np.cos(altitude)),
            float(np.sin(altitude)),
            float(np.sin(azimuth) * np.cos(altitude)),
        ),
        ambient=float(rng.uniform(0.55, 0.75)),
        haze=(level, level * 1.01, level * 1.03),
        visibility=float(rng.uniform(110, 320)),
    )


_DRAW: dict[str, Callable[[View, tuple[float, float, float], np.random.Generator], list[Patch]]]
_DRAW = {
    "Car": vehicles.car,
    "Van": vehicles.van,
    "Truck": vehicles.truck,
    "Pedestrian": people.pedestrian,
    "Cyclist": people.cyclist,
}


def _objects(
    camera: Camera, light: Light, road: scenery.Road, rng: np.random.Generator
) -> list[_Solid]:
    """Random objects on the street, none inside another, and sometimes a far group."""
    wanted = [name for name, s in STATISTICS.items() for _ in range(rng.poisson(s.per_scene))]
    rng.shuffle(wanted)
    solids: list[_Solid] = []
    for name in wanted:
        size = STATISTICS[name].size(rng)
        for _ in range(6):  # tries to find a free place
            place = _place(name, size, camera, road, rng)
            if place is not None and all(_apart(place, size, s.place, s.size) for s in solids):
                solids.append(_solid(name, place, size, camera, light, rng))
                break
    if rng.random() < 0.35:
        center = Placement(float(rng.uniform(road.left, road.right)), float(rng.uniform(58, 90)), 0)
        for _ in range(int(rng.integers(2, 5))):
            name = "Car" if rng.random() < 0.7 else "Pedestrian"
            place = Placement(
                center.x + float(rng.uniform(-4, 4)),
                center.z + float(rng.uniform(-4, 12)),
                -np.pi / 2,
            )
            solids.append(_solid(name, place, STATISTICS[name].size(rng), camera, light, rng))
    return solids


def _solid(
    name: str,
    place: Placement,
    size: tuple[float, float, float],
    camera: Camera,
    light: Light,
    rng: np.random.Generator,
) -> _Solid:
    return _Solid(name, place, size, _DRAW[name](View(camera, light, place), size, rng))


def _place(
    name: str,
    size: tuple[float, float, float],
    camera: Camera,
    road: scenery.Road,
    rng: np.random.Generator,
) -> Placement | None:
    """A ground point for this class, or None where its distance is out of range."""
    mean, sigma = STATISTICS[name].log_distance
    z = NEARER * float(np.exp(mean + sigma * rng.normal()))
    furthest = camera.focal * size[0] / (MIN_HEIGHT * camera.height) * 1.05
    away, towards = -np.pi / 2, np.pi / 2
    wobble = float(rng.normal(0, 0.06))
    person = name in ("Pedestrian", "Cyclist")
    if not 3.2 + (0 if person else size[2] / 2) < z < furthest:
        return None
    if name == "Pedestrian":
        if rng.random() < 0.25:  # crosses the street
            return Placement(
                float(rng.uniform(road.left, road.right)), z, float(rng.choice([0, np.pi])) + wobble
            )
        side = road.left - road.walk / 2 if rng.random() < 0.5 else road.right + road.walk / 2
        yaw = float(rng.choice([away, towards, rng.uniform(-np.pi, np.pi)]))
        return Placement(side + float(rng.uniform(-0.45, 0.45)) * road.walk, z, yaw)
    if road.crossing is not None and rng.random() < 0.35:
        yaw = float(rng.choice([0.0, np.pi]))
        depth = road.crossing + (1.7 if yaw == 0 else -1.7)
        if depth < furthest:
            reach = depth * camera.width / camera.focal * 0.5
            return Placement(float(rng.uniform(-reach, reach)), depth, yaw + wobble)
    if name == "Cyclist":
        yaw = away if rng.random() < 0.5 else towards
        edge = road.right - road.parking if yaw == away else road.left + road.parking
        inward = -1 if yaw == away else 1
        turn = float(rng.normal(0, 0.5))
        return Placement(edge + inward * float(rng.uniform(0.3, 1.3)), z, yaw + turn)
    if road.parking and rng.random() < 0.5:
        left = rng.random() < 0.5
        x = road.left + 1.15 if left else road.right - 1.15
        return Placement(
            x + float(rng.normal(0, 0.1)), z, (towards if left else away) + wobble * 0.5
        )
    lane = float(rng.integers(0, 2 + (road.left + road.parking < -6)))
    wide = (road.right - road.parking) * 2
    x = -lane * wide + float(rng.normal(0, 0.25))
    return Placement(x, z, (away if lane == 0 else towards) + wobble)


def _apart(
    a: Placement,
    a_size: tuple[float, float, float],
    b: Placement,
    b_size: tuple[float, float, float],
) -> bool:
    """Whether the axis-aligned footprints of two solids do not touch."""

    def half(place: Placement, size: tuple[float, float, float]) -> tuple[float, float]:
        c, s = abs(np.cos(place.yaw)), abs(np.sin(place.yaw))
        return (c * size[2] + s * size[1]) / 2 + 0.15, (s * size[2] + c * size[1]) / 2 + 0.3

    (ax, az), (bx, bz) = half(a, a_size), half(b, b_size)
    return abs(a.x - b.x) > ax + bx or abs(a.z - b.z) > az + bz


def _distractors(
    camera: Camera, light: Light, road: scenery.Road, rng: np.random.Generator
) -> list[_Solid]:
    """Poles, signs, trees, bushes and boxes beside the street; they hide objects too."""
    solids: list[_Solid] = []
    for _ in range(int(rng.integers(3, 11))):
        z = float(np.exp(rng.uniform(np.log(6), np.log(70))))
        left = rng.random() < 0.5
        edge, out = (road.left, -1) if left else (road.right, 1)
        kind = rng.random()
        near_kerb = edge + out * float(rng.uniform(0.35, 0.7))
        behind = edge + out * (road.walk + float(rng.uniform(0.5, 1.0 if road.houses else 9)))
        if kind < 0.35:
            view = View(camera, light, Placement(near_kerb, z, 0))
            patches, size = scenery.pole(view, rng), (2.0, 0.0, 0.0)
        elif kind < 0.6:
            view = View(camera, light, Placement(near_kerb if road.houses else behind, z, 0))
            patches, size = scenery.tree(view, float(rng.uniform(4, 9)), rng), (2.0, 0.0, 0.0)
        elif kind < 0.8:
            view = View(camera, light, Placement(behind, z, 0))
            patches, size = scenery.bush(view, rng), (2.0, 0.0, 0.0)
        else:
            view = View(camera, light, Placement(behind, z, float(rng.uniform(-0.2, 0.2))))
            patches, size = scenery.crate(view, rng), (2.0, 1.2, 1.6)
        solids.append(_Solid(None, view.place, size, patches))
    return solids


def _label(solid: _Solid, seen: Pixels, drawn: int, left: int) -> SceneObject | None:
    """The label row of a painted object; None where none of it can be seen."""
    if left == 0 or solid.type is None:
        return None
    height, width = seen.shape
    points = np.concatenate([outline for outline, _ in solid.patches])
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    clipped = (max(0.0, x0), max(0.0, y0), min(width - 1.0, x1), min(height - 1.0, y1))
    cw, ch = clipped[2] - clipped[0], clipped[3] - clipped[1]
    if cw < 1 or ch < 1:
        return None
    truncated = float(np.clip(1 - cw * ch / ((x1 - x0) * (y1 - y0)), 0, 1))
    visible = left / drawn
    unclear = visible < MIN_VISIBLE or truncated > MAX_TRUNCATED or ch < MIN_HEIGHT * height
    occluded = 0 if visible > 0.85 else 1 if visible > 0.5 else 2
    name = IGNORED if unclear else solid.type
    return SceneObject(name, truncated, occluded, clipped, solid.size, solid.place, seen)


def _finish(canvas: _Canvas, camera: Camera, rng: np.random.Generator) -> ImageArray:
    """Down to the final size, with ground texture, exposure, tint, vignette and sensor noise."""
    image = np.asarray(canvas.picture.reduce(SUPERSAMPLE), dtype=np.float32)
    free = np.asarray(canvas.mask.reduce(SUPERSAMPLE)) == 0
    height, width = camera.height, camera.width
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None, :]
    depth = camera.focal * camera.above_ground / np.maximum(rows - camera.cy, 0.5)
    across = (columns - camera.cx) * depth / camera.focal
    coarse = rng.normal(0, 1, (64, 64)).astype(np.float32)
    fine = rng.normal(0, 1, (128, 128)).astype(np.float32)
    texture = (
        coarse[(depth * 0.7).astype(int) % 64, (across * 0.7).astype(int) % 64] * 3
        + fine[(depth * 6).astype(int) % 128, (across * 9).astype(int) % 128] * 4
    )
    texture *= free & (rows > camera.cy + 1)
    image += texture[:, :, None]
    gain = rng.uniform(0.8, 1.2) * (1 + rng.normal(0, 0.025, 3))
    fall = 1 - rng.uniform(0, 0.22) * (
        ((columns / width - 0.5) * 2) ** 2 * 0.7 + ((rows / height - 0.5) * 2) ** 2 * 0.3
    )
    image *= (gain * fall[:, :, None]).astype(np.float32)
    noise = rng.uniform(1.5, 5.0)
    image += rng.normal(0, noise, (height, width, 1)).astype(np.float32)
    image += rng.normal(0, noise * 0.5, (height, width, 3)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)
