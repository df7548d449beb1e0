"""From a traced float32 graph to the precision asked for, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto

from bench.run import spread
from detr.config import ClassMap
from detr.data import Dataset, open_dataset
from detr.errors import UserError
from detr.types import ImageArray
from engines.bundle import Precision
from engines.msda_function import Lowering
from engines.torch_engine import TorchEngine
from export import verdict
from export.budget import default_budget
from export.islands import Search, search_islands
from export.judge import half_judge
from export.parts import Network, part_names
from export.precision import DEFAULT_ISLAND, Ranges, Typed, finish_half, to_half
from export.quantise import calibrate, quantise
from export.ranges import value_ranges
from export.samples import Samples

# Enough for a dozen detections each to speak; every trial runs them all.
_SEARCHED = 16


@dataclass(frozen=True)
class PrecisionRequest:
    """What precision a graph is to have and how that is found.

    Attributes:
        precision: Types of the graph.
        calibration: Real images the scales of int8 are taken from.
        search: Whether to search the smallest island, on some of the data.
        data: Where the cost of the precision is measured, if anywhere.
    """

    precision: Precision = "fp32"
    calibration: Sequence[ImageArray] = ()
    search: bool = False
    data: Dataset | None = None


def check_request(
    precision: Precision, data: str | None, search: bool, calibration: str | None
) -> None:
    """Refuses a precision that lacks its images, before anything is loaded.

    Args:
        precision: Types of the graph.
        data: Data set to search and to measure on.
        search: Whether to search the smallest island.
        calibration: Data set int8 is calibrated on.

    Raises:
        UserError: ``precision-data``.
    """
    if precision == "int8" and calibration is None:
        raise UserError(
            "precision-data",
            "--precision int8 takes its scales from real images: give --calibration DATA",
        )
    if precision != "int8" and calibration is not None:
        raise UserError("precision-data", "--calibration is for --precision int8")
    if search and (data is None or precision == "fp32"):
        raise UserError(
            "precision-data",
            "--search-islands needs real images (--data DATA) and --precision fp16 or int8",
        )


def request_precision(
    precision: Precision,
    classes: ClassMap,
    data: str | None,
    search: bool,
    calibration: str | None,
    count: int,
) -> PrecisionRequest:
    """Loads what a precision needs.

    Args:
        precision: Types of the graph.
        classes: Of the model.
        data: Data set to search and to measure on.
        search: Whether to search the smallest island.
        calibration: Data set int8 is calibrated on.
        count: How many images of it.

    Raises:
        UserError: ``data-empty`` or what opening a data set raises.
    """
    dataset = None if data is None else open_dataset(data, classes)
    return PrecisionRequest(
        precision=precision,
        calibration=_some(open_dataset(calibration, classes), count) if calibration else (),
        search=search,
        data=dataset if precision == "int8" or search else None,
    )


def _some(dataset: Dataset, count: int) -> list[ImageArray]:
    """Images spread evenly over a data set.

    Raises:
        UserError: ``data-empty``, or what reading an image raises.
    """
    indices = spread(len(dataset), count)
    if not indices:
        raise UserError("data-empty", f"{dataset.spec}: no images")
    return [dataset.image(i) for i in indices]


@dataclass(frozen=True)
class Written:
    """A graph in its final types.

    Attributes:
        model: The graph.
        island: See :class:`export.precision.Typed`.
        search: The search for the island, if there was one.
        verdict: The comparison with the other precisions, if there was one.
    """

    model: ModelProto
    island: tuple[str, ...] = ()
    search: Search | None = None
    verdict: verdict.Verdict | None = None

    def report(self) -> dict[str, Any]:
        """What the bundle keeps of the measurements."""
        found = {"search": self.search, "verdict": self.verdict}
        return {name: part.model_dump() for name, part in found.items() if part is not None}


@dataclass
class _Job:
    """One graph on its way; ``images`` show how large its values get."""

    model: ModelProto
    reference: TorchEngine
    lowering: Lowering
    batch: int
    images: Sequence[ImageArray]
    request: PrecisionRequest

    def run(self) -> Written:
        request, precision = self.request, self.request.precision
        searched = self._samples()
        seen = [*self.images, *request.calibration]
        seen += [searched.image(k) for k in range(len(searched))] if searched else []
        ranges = value_ranges(self.model, seen, self.reference.info.preprocess, self.batch)
        search = self._search(ranges, searched) if searched else None
        write = self._int8 if precision == "int8" else self._half
        default = f"{precision} default island" if search else precision
        typed = {default: write(DEFAULT_ISLAND, ranges)}
        variants = {"fp32": self.model}
        if precision == "int8":
            variants["fp16"] = self._half(DEFAULT_ISLAND, ranges).model
        elif search is not None:
            variants["fp16 no island"] = self._half((), ranges).model
        if search is not None:
            typed[f"{precision} searched island"] = write(search.island, ranges)
        kept = list(typed)[-1]
        if request.data is None:
            return Written(typed[kept].model, typed[kept].island, search)
        variants |= {name: one.model for name, one in typed.items()}
        measured = verdict.measure(variants, self.reference.info, request.data, self.batch)
        note = ""
        if search is not None and measured.over(kept):
            # A few images cannot tell what all of them can, nor half precision what int8 does.
            note = (
                f"the searched island is over the budget on {measured.images} images "
                f"({', '.join(measured.over(kept))}): the default island is kept"
            )
            kept = default
        worth = default_budget(precision).ap
        final = typed[kept]
        return Written(final.model, final.island, search, measured.keep(kept, worth, note))

    def _samples(self) -> Samples | None:
        """The images the island is searched on, if it is."""
        if not self.request.search or self.request.data is None:
            return None
        return Samples.of_dataset(self.request.data, _SEARCHED)

    def _half(self, island: Sequence[str], ranges: Ranges) -> Typed:
        typed = to_half(self.model, island, ranges)
        finish_half(typed.model, self.reference.info.detector, self.lowering)
        return typed

    def _int8(self, island: Sequence[str], ranges: Ranges) -> Typed:
        info, images = self.reference.info, self.request.calibration
        scales = calibrate(self.model, images, info.preprocess, self.batch, ranges)
        model = ModelProto()
        model.CopyFrom(self.model)
        typed = to_half(model, island, ranges, quantise(model, scales))
        finish_half(typed.model, info.detector, self.lowering)
        return typed

    def _search(self, ranges: Ranges, samples: Samples) -> Search:
        budget = default_budget("fp16")
        judge = half_judge(
            self.model,
            self.reference.info,
            self.lowering,
            ranges,
            samples,
            [self.reference([samples.image(k)])[0] for k in range(len(samples))],
            self.batch,
            budget,
        )
        parts = {part for part in part_names(Network(self.model)) if part is not None}
        return search_islands(parts, judge, budget)


def write_precision(
    model: ModelProto,
    reference: TorchEngine,
    lowering: Lowering,
    batch: int,
    images: Sequence[ImageArray],
    request: PrecisionRequest,
) -> Written:
    """Gives a graph the precision asked for.

    Args:
        model: The float32 graph.
        reference: The torch model it was traced from.
        lowering: Body of the attention function.
        batch: Images per run: the graph's, or any where it is dynamic.
        images: Images that show how large values get, besides those of the request.
        request: What is wanted.

    Raises:
        UserError: What :func:`export.islands.search_islands` and reading the images raise.
    """
    if request.precision == "fp32":
        return Written(model)
    return _Job(model, reference, lowering, batch, images, request).run()
