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
Colour = tuple[float, float, float]
Patch = tuple[Points, Colour]
"""A polygon ``[n, 2]`` in pixels and its RGB colour in 0..255."""


@dataclass(frozen=True)
class Light:
    """Sun and haze of one scene.

    Attributes:
        sun: Unit vector towards the sun (X, up, Z).
        ambient: Share of light that comes from everywhere.
        haze: Colour of the far distance.
        visibility: Metres after which a colour is 63 % haze.
    """

    sun: tuple[float, float, float]
    ambient: float
    haze: Colour
    visibility: float

    def shade(self, colour: Colour, normal: Sequence[float], distance: float) -> Colour:
        """The colour of a face with this outward normal at this distance."""
        towards = sum(n * s for n, s in zip(normal, self.sun, strict=True))
        return self.fade(
            scaled(colour, self.ambient + (1 - self.ambient) * max(0.0, towards)), distance
        )

    def fade(self, colour: Colour, distance: float) -> Colour:
        """The colour seen through ``distance`` metres of air."""
        keep = float(np.exp(-distance / self.visibility))
        r, g, b = (keep * c + (1 - keep) * h for c, h in zip(colour, self.haze, strict=True))
        return r, g, b


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour made lighter or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


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

    def sees(self, centre: Points, normal: Points) -> bool:
        """Whether a face is turned towards the camera."""
        eye = np.array([0.0, self.above_ground, 0.0])
        return float((centre - eye) @ normal) < 0


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

    def face(self, local: Points, normal: Points, colour: Colour) -> list[Patch]:
        """One planar face, or nothing where it is turned away."""
        world = self.place.world(local)
        if not self.camera.sees(world.mean(axis=0), normal):
            return []
        return [
            (
                self.camera.project(world),
                self.light.shade(colour, normal.tolist(), float(world[:, 2].mean())),
            )
        ]

    def side(
        self, outline: Sequence[tuple[float, float]], across: float, colour: Colour
    ) -> list[Patch]:
        """A patch on a side plane: outline of (forward, up) at ``across`` metres off the axis."""
        local = np.array([(f, u, across) for f, u in outline])
        return self.face(local, self.place.direction(0, 0, np.sign(across)), colour)

    def end(
        self,
        forward: float,
        facing: int,
        corners: tuple[float, float, float, float],
        colour: Colour,
    ) -> list[Patch]:
        """A rectangle across the vehicle at ``forward``; corners are (across0, up0, across1, up1).

        ``facing`` is 1 for the front and -1 for the rear.
        """
        a0, u0, a1, u1 = corners
        local = np.array(
            [(forward, u0, a0), (forward, u0, a1), (forward, u1, a1), (forward, u1, a0)]
        )
        return self.face(local, self.place.direction(facing, 0, 0), colour)

    def extrude(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: float,
        colours: Sequence[Colour],
        side_colour: Colour,
    ) -> list[Patch]:
        """A convex profile of (forward, up) pulled across the vehicle's width.

        Args:
            profile: Corners, counter-clockwise seen with forward to the right and up upwards.
            half_width: Metres.
            colours: Of the strip from each corner to the next.
            side_colour: Of both sides.
        """
        patches: list[Patch] = []
        following = [*profile[1:], profile[0]]
        for (f0, u0), (f1, u1), colour in zip(profile, following, colours, strict=True):
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
            patches += self.face(local, normal, colour)
        for across in (-half_width, half_width):
            patches += self.side(profile, across, side_colour)
        return patches


def disc(
    centre: tuple[float, float], radius: tuple[float, float], corners: int = 12
) -> list[tuple[float, float]]:
    """An ellipse as a polygon."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return list(
        zip(
            (centre[0] + radius[0] * np.cos(angle)).tolist(),
            (centre[1] + radius[1] * np.sin(angle)).tolist(),
            strict=True,
        )
    )
