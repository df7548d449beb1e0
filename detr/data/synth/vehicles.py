"""Cars, vans and trucks as shaded solids. Lengths are metres; sizes are (height, width, length)."""

from __future__ import annotations

import numpy as np

from detr.data.synth.camera import Color, Patch, View, disc, scaled

Size = tuple[float, float, float]

GLASS: Color = (58, 74, 92)
TYRE: Color = (24, 24, 26)
RIM: Color = (150, 150, 155)
TRIM: Color = (38, 38, 42)
RED: Color = (215, 32, 28)
HEADLIGHT: Color = (250, 246, 220)
PLATE: Color = (232, 228, 205)

_PAINTS: tuple[Color, ...] = (
    (196, 200, 205),
    (226, 228, 230),
    (44, 46, 52),
    (92, 98, 106),
    (150, 30, 34),
    (40, 66, 128),
    (32, 92, 110),
    (126, 106, 78),
    (64, 100, 62),
    (196, 150, 40),
    (110, 40, 80),
)


_PAINT_SHARE = np.array([5, 5, 5, 5, 3, 3, 2, 1.5, 1.5, 1.5, 1]) / 33.5  # grays lead


def paint(rng: np.random.Generator) -> Color:
    """A car color."""
    base = _PAINTS[int(rng.choice(len(_PAINTS), p=_PAINT_SHARE))]
    r, g, b = (float(np.clip(c + rng.normal(0, 10), 12, 240)) for c in base)
    return r, g, b


def _wheels(view: View, size: Size, radius: float, axles: tuple[float, ...]) -> list[Patch]:
    """Tyres with rims on both sides; a face turned away draws nothing."""
    half = size[1] / 2
    patches: list[Patch] = []
    for axle in axles:
        for across in (-half, half):
            patches += view.side(disc((axle, radius), (radius, radius)), across, TYRE)
            patches += view.side(
                disc((axle, radius), (radius * 0.55, radius * 0.55), 8), across, RIM
            )
    return patches


def _under(view: View, size: Size, clearance: float, radius: float) -> list[Patch]:
    """The dark underside and the tyres seen from the end, drawn before the body."""
    _, w, ln = size
    patches: list[Patch] = []
    for facing in (-1, 1):
        at = facing * ln * 0.42
        for a0, a1 in ((-w / 2, -w / 2 + 0.22), (w / 2 - 0.22, w / 2)):
            patches += view.end(at, facing, (a0, 0, a1, radius * 1.4), TYRE)
        patches += view.end(at, facing, (-w / 2, clearance * 0.6, w / 2, clearance * 1.5), TRIM)
    return patches


def _lights(view: View, size: Size, up: float, lamp: tuple[float, float]) -> list[Patch]:
    """Red lamps and a plate at the rear, white lamps and a grille at the front."""
    _, w, ln = size
    wide, high = lamp
    patches: list[Patch] = []
    for facing, color in ((-1, RED), (1, HEADLIGHT)):
        at = facing * (ln / 2 + 0.01)
        edge = w / 2 - 0.05
        patches += view.end(at, facing, (-edge, up, -edge + wide, up + high), color)
        patches += view.end(at, facing, (edge - wide, up, edge, up + high), color)
        if facing > 0:
            patches += view.end(at, facing, (-w * 0.24, up - 0.05, w * 0.24, up + 0.14), TRIM)
        patches += view.end(at, facing, (-0.27, up - 0.22, 0.27, up - 0.1), PLATE)
    return patches


def car(view: View, size: Size, rng: np.random.Generator) -> list[Patch]:
    """A low body with a narrower glass cabin on it."""
    h, w, ln = size
    body = paint(rng)
    belt, floor = h * 0.60, 0.20
    estate = rng.random() < 0.4
    bonnet, boot = belt * 0.90, belt * (1.0 if estate else 0.94)
    hull = [
        (-ln / 2, floor),
        (ln / 2, floor),
        (ln / 2, bonnet),
        (ln * 0.22, belt),
        (-ln * 0.40, belt),
        (-ln / 2, boot),
    ]
    rear = -ln * (0.48 if estate else 0.38)
    cabin = [(rear, belt), (ln * 0.24, belt), (ln * 0.08, h), (rear + ln * 0.09, h)]
    patches = _under(view, size, floor, 0.3)
    patches += view.extrude(hull, w / 2, [TRIM, body, body, body, body, body], body)
    patches += view.extrude(cabin, w * 0.45, [body, GLASS, body, GLASS], body)
    top, low = h - 0.07, belt + 0.04
    mid = (rear + ln * 0.24) / 2
    for across in (-w * 0.451, w * 0.451):
        patches += view.side(
            [(rear + 0.18, low), (mid - 0.05, low), (mid - 0.05, top), (rear + ln * 0.11, top)],
            across,
            GLASS,
        )
        patches += view.side(
            [(mid + 0.05, low), (ln * 0.21, low), (ln * 0.08, top), (mid + 0.05, top)],
            across,
            GLASS,
        )
    for across in (-w / 2, w / 2):
        patches += view.side(
            [(-ln / 2, floor), (ln / 2, floor), (ln / 2, floor + 0.14), (-ln / 2, floor + 0.14)],
            across,
            scaled(body, 0.6),
        )
    patches += _wheels(view, size, 0.32, (-ln * 0.31, ln * 0.32))
    return patches + _lights(view, size, belt * 0.68, (0.34, 0.17))


def van(view: View, size: Size, rng: np.random.Generator) -> list[Patch]:
    """One tall box with a short sloping nose; a delivery van has few windows."""
    h, w, ln = size
    white = rng.random() < 0.5
    body: Color = (224, 226, 226) if white else paint(rng)
    floor, belt = 0.24, h * 0.52
    nose = ln / 2 - ln * 0.06
    hull = [
        (-ln / 2, floor),
        (ln / 2, floor),
        (ln / 2, belt * 0.86),
        (nose, belt),
        (ln / 2 - ln * 0.20, h),
        (-ln / 2, h),
    ]
    patches = _under(view, size, floor, 0.34)
    patches += view.extrude(hull, w / 2, [TRIM, body, body, GLASS, body, body], body)
    low, top = belt + 0.08, h - 0.22
    windows = [(ln * 0.14, ln * 0.27)]
    if rng.random() < 0.5:
        windows += [(-ln * 0.15, ln * 0.10), (-ln * 0.44, -ln * 0.19)]
    for across in (-w * 0.502, w * 0.502):
        for f0, f1 in windows:
            patches += view.side([(f0, low), (f1 + 0.22, low), (f1, top), (f0, top)], across, GLASS)
        patches += view.side(
            [(-ln / 2, floor), (ln / 2, floor), (ln / 2, floor + 0.2), (-ln / 2, floor + 0.2)],
            across,
            scaled(body, 0.55),
        )
        patches += view.side(
            [
                (-ln * 0.16, floor),
                (-ln * 0.14, floor),
                (-ln * 0.14, h - 0.1),
                (-ln * 0.16, h - 0.1),
            ],
            across,
            scaled(body, 0.7),
        )
    back = -ln / 2 - 0.01
    for a0, a1 in ((-w * 0.42, -w * 0.04), (w * 0.04, w * 0.42)):
        patches += view.end(back, -1, (a0, h * 0.60, a1, h * 0.88), GLASS)
    patches += view.end(back, -1, (-0.02, floor, 0.02, h - 0.05), scaled(body, 0.6))
    for a0, a1 in ((-w / 2, -w / 2 + 0.16), (w / 2 - 0.16, w / 2)):
        patches += view.end(back - 0.01, -1, (a0, h * 0.33, a1, h * 0.54), RED)
    patches += view.end(back - 0.01, -1, (-w / 2, floor, w / 2, floor + 0.2), TRIM)
    patches += _wheels(view, size, 0.35, (-ln * 0.30, ln * 0.33))
    front = ln / 2 + 0.01
    for a0, a1 in ((-w * 0.46, -w * 0.26), (w * 0.26, w * 0.46)):
        patches += view.end(front, 1, (a0, belt * 0.52, a1, belt * 0.76), HEADLIGHT)
    return patches + view.end(front, 1, (-w * 0.22, belt * 0.42, w * 0.22, belt * 0.72), TRIM)


def truck(view: View, size: Size, rng: np.random.Generator) -> list[Patch]:
    """A driver's cab and, behind a gap, a high cargo box with a stripe of its own color."""
    h, w, ln = size
    cab = paint(rng)
    tones: tuple[Color, ...] = (
        (216, 214, 206),
        (188, 196, 204),
        (206, 176, 112),
        (96, 128, 166),
        (156, 74, 58),
        (104, 140, 104),
    )
    cargo = tones[int(rng.integers(len(tones)))]
    stripe = paint(rng)
    bed, split = 1.05, ln / 2 - 2.3
    box = [(-ln / 2, bed), (split - 0.35, bed), (split - 0.35, h), (-ln / 2, h)]
    head = [
        (split, 0.45),
        (ln / 2, 0.45),
        (ln / 2, h * 0.52),
        (ln / 2 - 0.25, h * 0.86),
        (split, h * 0.86),
    ]
    patches: list[Patch] = []
    solids = [
        view.extrude(box, w / 2, [TRIM, cargo, cargo, cargo], cargo)
        + _cargo_marks(view, size, bed, split, stripe),
        view.extrude(head, w * 0.48, [TRIM, cab, GLASS, cab, cab], cab)
        + _cab_marks(view, size, split, cab),
    ]
    # Yaw pi/2 faces the camera: then the cab is the nearer of the two and is painted last.
    ordered = solids if float(np.sin(view.place.yaw)) > 0 else solids[::-1]
    frame = [(-ln / 2, 0.5), (ln / 2 - 0.3, 0.5), (ln / 2 - 0.3, bed), (-ln / 2, bed)]
    patches += _under(view, size, 0.5, 0.5)
    patches += view.extrude(frame, w * 0.42, [TRIM] * 4, TRIM)
    for drawn in ordered:
        patches += drawn
    axles = (-ln * 0.40, -ln * 0.40 + 1.15, ln / 2 - 1.2)
    return patches + _wheels(view, size, 0.5, axles)


def _cargo_marks(view: View, size: Size, bed: float, split: float, stripe: Color) -> list[Patch]:
    h, w, ln = size
    back = -ln / 2 - 0.01
    low, high = bed + (h - bed) * 0.40, bed + (h - bed) * 0.62
    patches: list[Patch] = []
    for across in (-w * 0.502, w * 0.502):
        patches += view.side(
            [(-ln / 2 + 0.3, low), (split - 0.7, low), (split - 0.7, high), (-ln / 2 + 0.3, high)],
            across,
            stripe,
        )
    patches += view.end(back, -1, (-0.03, bed, 0.03, h), TRIM)
    for a0, a1 in ((-w * 0.46, -w * 0.44), (w * 0.44, w * 0.46)):
        patches += view.end(back, -1, (a0, bed, a1, h), TRIM)
    patches += view.end(back, -1, (-w / 2, bed - 0.32, w / 2, bed), TRIM)
    for a0, a1 in ((-w / 2, -w / 2 + 0.5), (w / 2 - 0.5, w / 2)):
        patches += view.end(back - 0.01, -1, (a0, bed - 0.28, a1, bed - 0.04), RED)
    return patches


def _cab_marks(view: View, size: Size, split: float, cab: Color) -> list[Patch]:
    h, w, ln = size
    front = ln / 2 + 0.01
    patches: list[Patch] = []
    for across in (-w * 0.482, w * 0.482):
        patches += view.side(
            [
                (split + 0.7, h * 0.52),
                (ln / 2 - 0.12, h * 0.52),
                (ln / 2 - 0.3, h * 0.80),
                (split + 0.7, h * 0.80),
            ],
            across,
            GLASS,
        )
    patches += view.end(front, 1, (-w * 0.38, 0.75, w * 0.38, h * 0.44), scaled(cab, 0.55))
    for a0, a1 in ((-w * 0.46, -w * 0.28), (w * 0.28, w * 0.46)):
        patches += view.end(front + 0.01, 1, (a0, 0.62, a1, 0.92), HEADLIGHT)
    return patches
