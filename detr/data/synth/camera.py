"""The pinhole camera of the scenes, and solids seen through it.

World axes are KITTI's camera axes: X right, Y down, Z forward, metres; the ground is the plane
``Y = camera height``. Points inside the functions here are (X, height above ground, Z).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Color = tuple[float, float, float]
Patch = tuple[Points, Color]
"""A polygon ``[n, 2]`` in pixels and its RGB color in 0..255."""


@dataclass(frozen=True)
class Light:
    """Sun and haze of one scene.

    Attributes:
        sun: Unit vector towards the sun (X, up, Z).
        ambient: Share of light that comes from everywhere.
        haze: Color of the far distance.
        visibility: Metres after which a color is 63 % haze.
    """

    sun: tuple[float, float, float]
    ambient: float
    haze: Color
    visibility: float

    def shade(self, color: Color, normal: Sequence[float], distance: float) -> Color:
        """The color of a face with this outward normal at this distance."""
        towards = sum(n * s for n, s in zip(normal, self.sun, strict=True))
        return self.fade(
            scaled(color, self.ambient + (1 - self.ambient) * max(0.0, towards)), distance
        )

    def fade(self, color: Color, distance: float) -> Color:
        """The color seen through ``distance`` metres of air."""
        keep = float(np.exp(-distance / self.visibility))
        r, g, b = (keep * c + (1 - keep) * h for c, h in zip(color, self.haze, strict=True))
        return r, g, b


def scaled(color: Color, factor: float) -> Color:
    """A color made lighter or darker."""
    return color[0] * factor, color[1] * factor, color[2] * factor


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along the road.

    Attributes:
        height, width: Image size in pixels.
        focal: In pixels.
        cx, cy: Vanishing point in pixels; ``cy`` is the horizon.
        above_ground: Metres.
    """

    height: int
    width: int
    focal: float
    cx: float
    cy: float
    above_ground: float

    def project(self, points: Points) -> Points:
        """``[n, 3]`` (X, height above ground, Z) to ``[n, 2]`` pixels; Z is held above 0.3 m."""
        scale = self.focal / np.maximum(points[:, 2], 0.3)
        x = self.cx + points[:, 0] * scale
        y = self.cy + (self.above_ground - points[:, 1]) * scale
        return np.stack([x, y], axis=1)

    def sees(self, center: Points, normal: Points) -> bool:
        """Whether a face is turned towards the camera."""
        eye = np.array([0.0, self.above_ground, 0.0])
        return float((center - eye) @ normal) < 0


@dataclass(frozen=True)
class Placement:
    """Where a solid stands: ground point and KITTI's ``rotation_y`` (0 faces right, -pi/2 away)."""

    x: float
    z: float
    yaw: float

    def world(self, local: Points) -> Points:
        """``[n, 3]`` (forward, up, left-to-right across) in metres to world points."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        forward, up, across = local.T
        return np.stack(
            [self.x + c * forward + s * across, up, self.z - s * forward + c * across], axis=1
        )

    def direction(self, forward: float, up: float, across: float) -> Points:
        """A local direction in world axes."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([c * forward + s * across, up, -s * forward + c * across])


@dataclass(frozen=True)
class View:
    """A camera, a light and the place of the solid that is being drawn."""

    camera: Camera
    light: Light
    place: Placement

    def face(self, local: Points, normal: Points, color: Color) -> list[Patch]:
        """One planar face, or nothing where it is turned away."""
        world = self.place.world(local)
        if not self.camera.sees(world.mean(axis=0), normal):
            return []
        return [
            (
                self.camera.project(world),
                self.light.shade(color, normal.tolist(), float(world[:, 2].mean())),
            )
        ]

    def side(
        self, outline: Sequence[tuple[float, float]], across: float, color: Color
    ) -> list[Patch]:
        """A patch on a side plane: outline of (forward, up) at ``across`` metres off the axis."""
        local = np.array([(f, u, across) for f, u in outline])
        return self.face(local, self.place.direction(0, 0, np.sign(across)), color)

    def end(
        self,
        forward: float,
        facing: int,
        corners: tuple[float, float, float, float],
        color: Color,
    ) -> list[Patch]:
        """A rectangle across the vehicle at ``forward``; corners are (across0, up0, across1, up1).

        ``facing`` is 1 for the front and -1 for the rear.
        """
        a0, u0, a1, u1 = corners
        local = np.array(
            [(forward, u0, a0), (forward, u0, a1), (forward, u1, a1), (forward, u1, a0)]
        )
        return self.face(local, self.place.direction(facing, 0, 0), color)

    def extrude(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: float,
        colors: Sequence[Color],
        side_color: Color,
    ) -> list[Patch]:
        """A convex profile of (forward, up) pulled across the vehicle's width.

        Args:
            profile: Corners, counter-clockwise seen with forward to the right and up upwards.
            half_width: Metres.
            colors: Of the strip from each corner to the next.
            side_color: Of both sides.
        """
        patches: list[Patch] = []
        following = [*profile[1:], profile[0]]
        for (f0, u0), (f1, u1), color in zip(profile, following, colors, strict=True):
            local = np.array(
                [
                    (f0, u0, -half_width),
                    (f1, u1, -half_width),
                    (f1, u1, half_width),
                    (f0, u0, half_width),
                ]
            )
            length = float(np.hypot(f1 - f0, u1 - u0))
            normal = self.place.direction((u1 - u0) / length, -(f1 - f0) / length, 0)
            patches += self.face(local, normal, color)
        for across in (-half_width, half_width):
            patches += self.side(profile, across, side_color)
        return patches


def disc(
    center: tuple[float, float], radius: tuple[float, float], corners: int = 12
) -> list[tuple[float, float]]:
    """An ellipse as a polygon."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return list(
        zip(
            (center[0] + radius[0] * np.cos(angle)).tolist(),
            (center[1] + radius[1] * np.sin(angle)).tolist(),
            strict=True,
        )
    )
