"""A model at the papers' sizes: one bundle for landscape images, one for portrait ones.

A graph knows one canvas. ``NAME.bundle/`` then holds ``landscape.bundle`` and ``portrait.bundle``,
each whole in itself, and an image goes to the one whose canvas it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from detr.data.preprocess import Inputs
from detr.errors import UserError
from detr.types import Detections, ImageArray
from engines.base import Engine, RawDetections
from engines.bundle import ORIENTATIONS, Bundle, is_oriented, open_bundle

Open = Callable[[Bundle], Engine]


def open_bundles(path: Path) -> list[Bundle]:
    """The bundle of a folder, or the two of one with a bundle for each orientation.

    Raises:
        UserError: ``bundle-orientations`` where the two are not of one model; what opening them
            raises.
    """
    if not is_oriented(path):
        return [open_bundle(path)]
    bundles = [open_bundle(path / name) for name in ORIENTATIONS]
    first, second = (
        (b.info.source.sha256, b.info.model.classes, b.info.precision, b.info.batch)
        for b in bundles
    )
    if first != second:
        raise UserError(
            "bundle-orientations",
            f"{path}: {' and '.join(ORIENTATIONS)} are not of the same model, precision and batch; "
            "export again",
        )
    return bundles


class OrientedEngine(Engine):
    """Two engines of one kind, for landscape and for portrait images.

    Args:
        engines: In the order of :data:`engines.bundle.ORIENTATIONS`.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        landscape, portrait = engines
        self.engines = landscape, portrait
        self.name = landscape.name
        # What is common to both: the size of an image, on no canvas yet.
        preprocess = landscape.info.preprocess.model_copy(update={"size": None})
        self.info = landscape.info.model_copy(update={"preprocess": preprocess})
        self.artifact = landscape.artifact
        self.versions = landscape.versions
        self.batch_size = landscape.batch_size
        self.on_gpu = landscape.on_gpu

    @property
    def artifacts(self) -> tuple[Path, ...]:
        """See the base class."""
        return tuple(engine.artifact for engine in self.engines)

    def prepare(self, images: Sequence[ImageArray]) -> Inputs:
        """See the base class.

        Raises:
            UserError: ``image-orientations`` where landscape and portrait images are mixed: they
                have no canvas in common. Calling the engine takes them apart.
        """
        engines = {id(engine): engine for engine in map(self._engine_for, images)}
        if len(engines) > 1:
            raise UserError(
                "image-orientations",
                f"{self.artifact.parent.parent}: landscape and portrait images in one batch; "
                "prepare each kind alone",
            )
        return next(iter(engines.values())).prepare(images)

    def __call__(self, images: Sequence[ImageArray]) -> list[Detections]:
        """See the base class; each image on the canvas of its orientation."""
        found: dict[int, Detections] = {}
        for engine in self.engines:
            mine = [i for i, image in enumerate(images) if self._engine_for(image) is engine]
            if mine:
                found |= zip(mine, engine([images[i] for i in mine]), strict=True)
        return [found[i] for i in range(len(images))]

    def _engine_for(self, image: ImageArray) -> Engine:
        portrait = image.ndim > 1 and image.shape[0] > image.shape[1]
        return self.engines[portrait]

    def _infer(self, inputs: Inputs) -> RawDetections:
        height, width = inputs.images.shape[-2:]
        return self.engines[height > width].run(inputs)
