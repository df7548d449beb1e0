"""Everything in a scene that is not an object: sky, ground, buildings, trees, distractors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from detr.data.synth.camera import Camera, Color, Light, Patch, Placement, View, disc, scaled
from detr.data.synth.vehicles import GLASS, TRIM, paint

FAR = 400.0
NEAR = 1.2


@dataclass(frozen=True)
class Road:
    """Cross-section of the street, X in metres (the camera drives at X = 0).

    Attributes:
        left, right: Kerbs.
        lanes: Lane markings between them.
        parking: Width of the parking strip inside each kerb, 0 for none.
        walk: Width of the pavement outside each kerb.
        crossing: Distance of a crossing street, or None.
        asphalt, verge: Colors.
        houses: Buildings rather than grass and trees beyond the pavement.
    """

    left: float
    right: float
    lanes: tuple[float, ...]
    parking: float
    walk: float
    crossing: float | None
    asphalt: Color
    verge: Color
    houses: bool


def make_road(rng: np.random.Generator) -> Road:
    """A random street."""
    parking = 2.3 if rng.random() < 0.6 else 0.0
    lane = float(rng.uniform(3.1, 3.7))
    oncoming = int(rng.integers(1, 3))
    gray = float(rng.uniform(72, 118))
    houses = bool(rng.random() < 0.6)
    green = np.array((rng.uniform(70, 110), rng.uniform(100, 135), rng.uniform(50, 70)))
    paved = np.array((1.0, 0.96, 0.9)) * rng.uniform(120, 160)
    verge = paved if houses else green
    left, right = -lane * (oncoming + 0.5) - parking, lane / 2 + parking
    lanes = tuple(lane * (0.5 - k) for k in range(0 if parking else 1, oncoming + 1))
    return Road(
        left=left,
        right=right,
        lanes=lanes,
        parking=parking,
        walk=float(rng.uniform(2.0, 3.5)),
        crossing=float(rng.uniform(13, 32)) if rng.random() < 0.4 else None,
        asphalt=(gray, gray * 1.0, gray * 1.03),
        verge=(float(verge[0]), float(verge[1]), float(verge[2])),
        houses=houses,
    )


def sky(camera: Camera, light: Light, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """``[H, W, 3]``: a gradient down to the haze with a few soft clouds."""
    h, w = camera.height, camera.width
    overcast = rng.random()
    zenith = np.array((96, 140, 205)) * (1 - overcast) + np.array((168, 176, 186)) * overcast
    zenith = zenith * rng.uniform(0.75, 1.1)
    t = np.clip(np.arange(h) / max(camera.cy, 1), 0, 1)[:, None, None] ** 1.3
    image = zenith * (1 - t) + np.array(light.haze) * t
    image = np.repeat(image, w, axis=1)
    y, x = np.arange(h), np.arange(w)
    for _ in range(int(rng.integers(0, 7))):
        cx, cy = rng.uniform(0, w), rng.uniform(0, camera.cy * 0.8)
        rx, ry = rng.uniform(0.15, 0.5) * h * 1.6, rng.uniform(0.03, 0.10) * h
        weight = np.outer(np.exp(-(((y - cy) / ry) ** 2)), np.exp(-(((x - cx) / rx) ** 2)))
        weight *= rng.uniform(0.2, 0.6)
        image += (np.array((244, 244, 246)) - image) * weight[:, :, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _ground(
    camera: Camera, light: Light, x: tuple[float, float], z: tuple[float, float], color: Color
) -> list[Patch]:
    """A ground rectangle, in strips so that the haze grows with distance."""
    z0, z1 = max(z[0], NEAR), z[1]
    cuts = [z0, *(c for c in (12.0, 25.0, 45.0, 80.0, 150.0) if z0 < c < z1), z1]
    patches: list[Patch] = []
    for near, far in pairwise(cuts):
        world = np.array([(x[0], 0, near), (x[1], 0, near), (x[1], 0, far), (x[0], 0, far)])
        patches.append((camera.project(world), light.fade(color, min((near + far) / 2, 160))))
    return patches


def ground(camera: Camera, light: Light, road: Road, rng: np.random.Generator) -> list[Patch]:
    """Verge, pavement, asphalt, kerbs, lane marks and the crossing street."""

    def flat(x: tuple[float, float], z: tuple[float, float], color: Color) -> list[Patch]:
        return _ground(camera, light, x, z, color)

    whole = (NEAR, FAR)
    paving: Color = (150, 146, 140)
    patches = flat((-300, 300), whole, road.verge)
    patches += flat((road.left - road.walk, road.right + road.walk), whole, paving)
    for kerb in (road.left, road.right):
        patches += flat((kerb - 0.15, kerb + 0.15), whole, (186, 184, 178))
    patches += flat((road.left, road.right), whole, road.asphalt)
    white: Color = (222, 222, 216)
    if road.crossing is not None:
        z = road.crossing
        patches += flat((-300, 300), (z - 3.6, z + 3.6), road.asphalt)
        if rng.random() < 0.6:
            for x in np.arange(road.left + 0.4, road.right - 0.4, 1.0):
                patches += flat((x, x + 0.5), (z - 6.6, z - 4.2), white)
    start = rng.uniform(0, 6)
    for i, x in enumerate(road.lanes):
        if i == 0 and not road.parking:
            patches += flat((x - 0.07, x + 0.07), whole, white)
            continue
        for z in np.arange(start, 70, 6.0):
            if road.crossing is None or abs(z + 1.5 - road.crossing) > 7:
                patches += flat((x - 0.08, x + 0.08), (z, z + 3.0), white)
    for _ in range(int(rng.integers(0, 5))):  # repairs and manholes
        x, z = rng.uniform(road.left, road.right - 1), rng.uniform(4, 30)
        patches += flat(
            (x, x + rng.uniform(0.5, 1.6)),
            (z, z + rng.uniform(0.6, 5)),
            scaled(road.asphalt, float(rng.uniform(0.75, 1.15))),
        )
    return patches


def hills(camera: Camera, light: Light, rng: np.random.Generator) -> list[Patch]:
    """A ragged band of far trees or roofs along the horizon."""
    n = 60
    height = np.abs(np.cumsum(rng.normal(0, 0.010, n)) + 0.05 + rng.normal(0, 0.006, n))
    x = np.linspace(-10, camera.width + 10, n)
    top = np.stack([x, camera.cy - np.minimum(height, 0.16) * camera.height], axis=1)
    base = np.array([(camera.width + 10, camera.cy + 2), (-10, camera.cy + 2)])
    color = (rng.uniform(70, 110), rng.uniform(90, 120), rng.uniform(75, 105))
    return [(np.concatenate([top, base]), light.fade(color, 110))]


_WALLS: tuple[Color, ...] = (
    (188, 170, 146),
    (164, 110, 88),
    (206, 198, 184),
    (140, 134, 130),
    (196, 158, 110),
    (120, 128, 140),
)


def building(view: View, size: tuple[float, float, float], rng: np.random.Generator) -> list[Patch]:
    """A block with rows of windows; ``size`` is (height, depth off the street, length)."""
    h, deep, ln = size
    wall = scaled(_WALLS[int(rng.integers(len(_WALLS)))], float(rng.uniform(0.75, 1.1)))
    box = [(-ln / 2, 0.0), (ln / 2, 0.0), (ln / 2, h), (-ln / 2, h)]
    patches = view.extrude(box, deep / 2, [wall, wall, scaled(wall, 0.7), wall], wall)
    floors, columns = max(1, int(h / 3.2)), max(2, int(ln / rng.uniform(2.6, 4.0)))
    pane = GLASS if rng.random() < 0.8 else (196, 206, 216)
    street = float(np.sign(view.place.x)) * deep / 2 * 1.001  # yaw is -pi/2: across is -X
    for row in range(floors):
        up = 0.9 + row * 3.2
        for column in range(columns):
            at = -ln / 2 + (column + 0.25) * ln / columns
            wide = ln / columns * 0.5
            patches += view.side(
                [(at, up), (at + wide, up), (at + wide, up + 1.5), (at, up + 1.5)], street, pane
            )
    return patches


def tree(view: View, height: float, rng: np.random.Generator) -> list[Patch]:
    """A trunk under a crown of overlapping blobs, lit from above."""
    foot = view.camera.project(np.array([(view.place.x, 0.0, view.place.z)]))[0]
    scale = view.camera.focal / view.place.z
    z = view.place.z
    patches: list[Patch] = []

    def add(outline: list[tuple[float, float]], color: Color) -> None:
        patches.append((np.array(outline) * (scale, -scale) + foot, view.light.fade(color, z)))

    trunk = rng.uniform(0.12, 0.2)
    add(
        [(-trunk, 0), (trunk, 0), (trunk * 0.7, height * 0.6), (-trunk * 0.7, height * 0.6)],
        (84, 66, 50),
    )
    green = (rng.uniform(40, 84), rng.uniform(76, 116), rng.uniform(34, 56))
    crown = height * rng.uniform(0.22, 0.34)
    for k in range(9):
        tone = 0.65 + 0.06 * k
        at = (rng.normal(0, crown * 0.45), height * 0.68 + (k - 4) * crown * 0.13)
        add(
            disc(at, (crown * rng.uniform(0.45, 0.75), crown * rng.uniform(0.4, 0.6)), 10),
            scaled(green, tone),
        )
    return patches


def bush(view: View, rng: np.random.Generator) -> list[Patch]:
    """A low hedge or shrub."""
    foot = view.camera.project(np.array([(view.place.x, 0.0, view.place.z)]))[0]
    scale = view.camera.focal / view.place.z
    green = (rng.uniform(46, 80), rng.uniform(78, 112), rng.uniform(38, 58))
    wide, high = rng.uniform(0.5, 1.4), rng.uniform(0.4, 0.9)
    patches: list[Patch] = []
    for k in range(7):
        at = (rng.uniform(-wide, wide), high * (0.35 + 0.08 * k))
        outline = disc(at, (wide * 0.4, high * 0.4), 9)
        color = view.light.fade(scaled(green, 0.65 + 0.07 * k), view.place.z)
        patches.append((np.array(outline) * (scale, -scale) + foot, color))
    return patches


def pole(view: View, rng: np.random.Generator) -> list[Patch]:
    """A lamp post, a road sign or a traffic light: upright and thin, as people are."""
    kind = int(rng.integers(3))
    height = (7.0, 2.4, 3.2)[kind]
    foot = view.camera.project(np.array([(view.place.x, 0.0, view.place.z)]))[0]
    scale = view.camera.focal / view.place.z
    shapes: list[tuple[list[tuple[float, float]], Color]] = [
        ([(-0.06, 0), (0.06, 0), (0.06, height), (-0.06, height)], (104, 106, 108))
    ]
    if kind == 0:
        arm = -np.sign(view.place.x) * 1.4
        shapes.append(
            (
                [(0, height), (arm, height + 0.25), (arm, height + 0.1), (0, height - 0.2)],
                (96, 98, 100),
            )
        )
    elif kind == 1:
        sign: Color = ((36, 76, 168), (206, 44, 40), (226, 190, 52))[int(rng.integers(3))]
        shapes.append((disc((0, height), (0.36, 0.36), (3, 4, 12)[int(rng.integers(3))]), sign))
        shapes.append((disc((0, height), (0.2, 0.2), 8), (232, 232, 228)))
    else:
        shapes.append(
            (
                [(-0.17, height - 0.9), (0.17, height - 0.9), (0.17, height), (-0.17, height)],
                (30, 32, 32),
            )
        )
        lamp = int(rng.integers(3))
        for k, color in enumerate(((46, 196, 92), (236, 178, 44), (226, 44, 40))):
            tone = 1.0 if k == lamp else 0.3
            shapes.append(
                (disc((0, height - 0.75 + 0.3 * k), (0.11, 0.11), 8), scaled(color, tone))
            )
    return [
        (np.array(outline) * (scale, -scale) + foot, view.light.fade(color, view.place.z))
        for outline, color in shapes
    ]


def crate(view: View, rng: np.random.Generator) -> list[Patch]:
    """A skip, a kiosk or a bin: a box of a vehicle's size and colors, without wheels or lamps."""
    h, w, ln = rng.uniform(0.9, 2.4), rng.uniform(0.7, 1.9), rng.uniform(0.8, 3.0)
    color = paint(rng)
    box = [(-ln / 2, 0.0), (ln / 2, 0.0), (ln / 2, h), (-ln / 2, h)]
    patches = view.extrude(box, w / 2, [color] * 4, color)
    for across in (-w * 0.502, w * 0.502):
        for k in (0.3, 0.6):
            patches += view.side(
                [
                    (-ln / 2, h * k),
                    (ln / 2, h * k),
                    (ln / 2, h * k + 0.07),
                    (-ln / 2, h * k + 0.07),
                ],
                across,
                scaled(color, 0.6),
            )
    for facing in (-1, 1):
        patches += view.end(facing * ln * 0.502, facing, (-w / 2, h * 0.85, w / 2, h), TRIM)
    return patches


def shadow(view: View, size: tuple[float, float]) -> Patch:
    """The outline on the ground of the shadow below a solid of (width, length)."""
    wide, ln = size[0] / 2 + 0.12, size[1] / 2 + 0.12
    local = np.array(
        [
            (f * ln, 0.0, a * wide)
            for f, a in (
                (-1, -0.9),
                (-0.95, -1),
                (0.95, -1),
                (1, -0.9),
                (1, 0.9),
                (0.95, 1),
                (-0.95, 1),
                (-1, 0.9),
            )
        ]
    )
    return view.camera.project(view.place.world(local)), (0, 0, 0)


def place_buildings(
    road: Road, rng: np.random.Generator
) -> list[tuple[Placement, tuple[float, float, float]]]:
    """Rows of houses on both sides, far ones first."""
    found: list[tuple[Placement, tuple[float, float, float]]] = []
    for side, edge in ((-1.0, -road.left + road.walk), (1.0, road.right + road.walk)):
        z = rng.uniform(-4, 8)
        while z < 130:
            ln, h, deep = rng.uniform(8, 20), rng.uniform(4, 13), 10.0
            blocked = road.crossing is not None and abs(z + ln / 2 - road.crossing) < ln / 2 + 5
            if not blocked and z > 2:
                x = side * (edge + rng.uniform(0.5, 3) + deep / 2)
                found.append((Placement(x, z + ln / 2, -np.pi / 2), (h, deep, ln)))
            z += ln + (rng.uniform(2, 10) if rng.random() < 0.4 else 0.3)
    return sorted(found, key=lambda item: -item[0].z)
