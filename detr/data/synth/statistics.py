"""A handful of numbers measured on KITTI's object training labels (7,481 frames).

Only these summary numbers are here, no labels. Per class: mean and standard deviation of height,
width and length in metres of unoccluded, untruncated objects, and of the logarithm of their
distance. A pinhole camera with KITTI's focal length then gives back KITTI's box heights and
aspects, and the measured line ``y_bottom = horizon + k * height`` is its horizon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FOCAL = 721.5 / 375  # KITTI's focal length, in image heights
HORIZON = 176 / 375  # where y_bottom meets height 0, in image heights
CAMERA_HEIGHT = 1.65  # metres


@dataclass(frozen=True)
class ClassStatistics:
    """Size in metres and log distance of one class.

    Attributes:
        height, width, length: (mean, standard deviation) in metres.
        log_distance: (mean, standard deviation) of ln(metres).
        per_scene: How many a synthetic scene tries to place on average. Not KITTI's: a set of a
            few hundred scenes must show its rare classes too.
    """

    height: tuple[float, float]
    width: tuple[float, float]
    length: tuple[float, float]
    log_distance: tuple[float, float]
    per_scene: float

    def size(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """A random (height, width, length) in metres, within two standard deviations."""
        h, w, ln = (
            mean + sigma * float(np.clip(rng.normal(), -2, 2))
            for mean, sigma in (self.height, self.width, self.length)
        )
        return h, w, ln


STATISTICS = {
    "Car": ClassStatistics((1.52, 0.13), (1.64, 0.10), (3.86, 0.45), (3.32, 0.57), 2.6),
    "Van": ClassStatistics((2.19, 0.20), (1.91, 0.15), (5.08, 0.60), (3.41, 0.61), 0.9),
    "Truck": ClassStatistics((3.07, 0.35), (2.63, 0.20), (11.17, 2.09), (3.89, 0.47), 0.7),
    "Pedestrian": ClassStatistics((1.76, 0.11), (0.67, 0.14), (0.87, 0.22), (2.69, 0.54), 1.4),
    "Cyclist": ClassStatistics((1.73, 0.09), (0.58, 0.12), (1.78, 0.16), (3.17, 0.56), 1.0),
}
