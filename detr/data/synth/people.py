"""Pedestrians and cyclists as jointed figures that face the camera. Lengths are metres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detr.data.synth.camera import Color, Patch, View, disc, scaled

_SKIN: tuple[Color, ...] = ((224, 182, 150), (198, 150, 116), (140, 96, 70), (92, 62, 46))
_HAIR: tuple[Color, ...] = ((36, 28, 24), (84, 58, 36), (160, 130, 80), (120, 120, 122))
_CLOTH: tuple[Color, ...] = (
    (170, 40, 44),
    (36, 60, 120),
    (40, 110, 76),
    (214, 178, 60),
    (220, 218, 212),
    (46, 46, 52),
    (118, 86, 140),
    (226, 116, 48),
)
_TROUSERS: tuple[Color, ...] = ((40, 48, 76), (36, 36, 38), (104, 92, 74), (78, 82, 90))

Joint = tuple[float, float]


def _pick(rng: np.random.Generator, colors: Sequence[Color]) -> Color:
    r, g, b = (
        float(np.clip(c + rng.normal(0, 9), 8, 244)) for c in colors[int(rng.integers(len(colors)))]
    )
    return r, g, b


def _limb(p: Joint, q: Joint, thick: float) -> list[Joint]:
    """A stick with slightly rounded ends."""
    dx, dy = q[0] - p[0], q[1] - p[1]
    length = float(np.hypot(dx, dy)) or 1e-6
    ux, uy = dx / length * thick / 2, dy / length * thick / 2
    return [
        (p[0] - uy, p[1] + ux),
        (p[0] - ux, p[1] - uy),
        (p[0] + uy, p[1] - ux),
        (q[0] + uy, q[1] - ux),
        (q[0] + ux, q[1] + uy),
        (q[0] - uy, q[1] + ux),
    ]


class _Figure:
    """Collects flat shapes in (across, up) metres around a ground point, facing the camera."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.patches: list[Patch] = []
        camera, place = view.camera, view.place
        self._foot = camera.project(np.array([(place.x, 0.0, place.z)]))[0]
        self._scale = camera.focal / place.z

    def add(self, outline: Sequence[Joint], color: Color) -> None:
        points = np.array(outline) * (self._scale, -self._scale) + self._foot
        lit = self.view.light.shade(color, (0.0, 0.45, -0.89), self.view.place.z)
        self.patches.append((points, lit))


def pedestrian(
    view: View, size: tuple[float, float, float], rng: np.random.Generator
) -> list[Patch]:
    """A head, a torso with arms and two legs in mid-stride."""
    h = size[0]
    figure = _Figure(view)
    shirt, trousers, skin = _pick(rng, _CLOTH), _pick(rng, _TROUSERS), _pick(rng, _SKIN)
    side = abs(float(np.cos(view.place.yaw)))
    stride = (0.05 + 0.20 * side) * rng.uniform(0.5, 1.2) * h / 1.76
    facing = 1.0 if float(np.cos(view.place.yaw)) > 0 else -1.0
    hip, shoulder, half = h * 0.49, h * 0.83, (0.20 - 0.06 * side) * h / 1.76
    for sign, tone in ((-1, 0.72), (1, 1.0)):
        knee = (sign * stride * 0.55 + 0.03 * facing * side, h * 0.27)
        foot = (sign * stride, 0.05)
        root = (sign * half * 0.45, hip)
        figure.add(_limb(root, knee, 0.17), scaled(trousers, tone))
        figure.add(_limb(knee, foot, 0.13), scaled(trousers, tone))
        figure.add(
            _limb(foot, (foot[0] + 0.12 * facing * side + 0.02 * sign, 0.035), 0.08), (30, 28, 28)
        )
        hand = (sign * (half + 0.04) - sign * stride * 0.6 * side, h * 0.47)
        figure.add(
            _limb((sign * half * 0.9, shoulder - 0.05), hand, 0.10),
            scaled(shirt, 0.65 if sign < 0 else 0.88),
        )
        figure.add(disc(hand, (0.05, 0.055), 6), skin)
    figure.add(
        [
            (-half, shoulder),
            (-half * 0.8, hip - 0.04),
            (half * 0.8, hip - 0.04),
            (half, shoulder),
            (half * 0.5, shoulder + 0.06),
            (-half * 0.5, shoulder + 0.06),
        ],
        shirt,
    )
    if rng.random() < 0.35:  # a bag or rucksack
        figure.add(
            _limb(
                (-facing * half * 0.9, shoulder - 0.06), (-facing * half * 0.9, hip + 0.14), 0.18
            ),
            _pick(rng, _CLOTH),
        )
    _head(figure, (0.02 * facing * side, h - 0.125), skin, _pick(rng, _HAIR))
    return figure.patches


def _head(figure: _Figure, at: Joint, skin: Color, hair: Color) -> None:
    figure.add(_limb((at[0], at[1] - 0.18), at, 0.10), scaled(skin, 0.8))
    figure.add(disc(at, (0.10, 0.125)), skin)
    figure.add(
        [
            (at[0] - 0.10, at[1] + 0.02),
            *disc((at[0], at[1] + 0.03), (0.105, 0.1))[:7],
            (at[0] - 0.06, at[1] + 0.05),
        ],
        hair,
    )


def cyclist(view: View, size: tuple[float, float, float], rng: np.random.Generator) -> list[Patch]:
    """A rider leaning over a frame between two thin wheels; end-on, one wheel below a rider."""
    h, _, ln = size
    figure = _Figure(view)
    shirt, trousers, skin = _pick(rng, _CLOTH), _pick(rng, _TROUSERS), _pick(rng, _SKIN)
    frame = _pick(rng, _CLOTH)
    along = float(np.cos(view.place.yaw))  # the share of the length that is seen
    wheel = 0.33
    reach = (ln / 2 - wheel) * along
    flat = max(0.10, abs(along))
    for at in (-reach, reach):
        figure.add(disc((at, wheel), (wheel * flat, wheel), 14), (26, 26, 28))
        if flat > 0.3:
            figure.add(disc((at, wheel), (wheel * flat * 0.76, wheel * 0.76), 12), (136, 138, 136))
            figure.add(
                _limb((at - wheel * flat * 0.7, wheel), (at + wheel * flat * 0.7, wheel), 0.025),
                (60, 60, 62),
            )
    saddle, bars, crank = (-0.22 * along, 0.94), (0.40 * along, 1.04), (0.0, 0.33)
    for p, q in (
        (saddle, crank),
        ((-reach, wheel), crank),
        (crank, bars),
        (saddle, bars),
        (bars, (reach, wheel)),
        (saddle, (-reach, wheel)),
    ):
        figure.add(_limb(p, q, 0.055), frame)
    across = 0.20 * (1 - 0.6 * abs(along))
    shoulder = (saddle[0] + 0.34 * along, h * 0.82)
    phase = rng.uniform(-0.12, 0.12)
    for sign, tone in ((-1, 0.7), (1, 1.0)):
        knee = (sign * across + 0.22 * along, 0.66 + sign * phase)
        foot = (sign * across * 0.8 + 0.02 * along, 0.24 + sign * phase)
        hip = (saddle[0] + sign * across * 0.6, saddle[1] + 0.03)
        figure.add(_limb(hip, knee, 0.17), scaled(trousers, tone))
        figure.add(_limb(knee, foot, 0.12), scaled(trousers, tone))
        hand = (bars[0] + sign * across * 1.4, bars[1])
        figure.add(
            _limb((shoulder[0] + sign * across * 0.9, shoulder[1] - 0.03), hand, 0.10),
            scaled(shirt, 0.65 if sign < 0 else 0.85),
        )
    wide = 0.17 + 0.13 * (1 - abs(along))
    figure.add(
        _limb((saddle[0], saddle[1] + 0.06), (shoulder[0], shoulder[1] - 0.02), wide * 1.15), shirt
    )
    helmet = _pick(rng, _CLOTH) if rng.random() < 0.6 else _pick(rng, _HAIR)
    _head(figure, (shoulder[0] + 0.07 * along, h - 0.125), skin, helmet)
    return figure.patches
