"""From a traced float32 graph to the precision asked for, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx import ModelProto

from detr.config import ClassMap
from detr.data import Dataset, open_dataset
from detr.data.dataset import evenly_spaced
from detr.errors import UserError
from detr.model_info import BundledInfo
from detr.types import ImageArray
from engines.base import Engine
from engines.bundle import Precision
from engines.msda_function import Lowering
from engines.precision_report import IslandSearch, PrecisionComparison, PrecisionReport
from export.parity.budget import default_budget
from export.parity.samples import Samples
from export.precision.cost import compare_precisions, concluded
from export.precision.half import DEFAULT_ISLAND, Ranges, TypedGraph, finish_half, to_half
from export.precision.int8 import calibrate, quantize
from export.precision.island_search import search_islands
from export.precision.node_kinds import Network, part_names
from export.precision.ranges import value_ranges
from export.precision.trial import half_comparator

# Images of a search; every trial runs them all. The second number is for islands that hold on the
# few images of the first search and not on those of the proof.
_SEARCHED = (16, 96)


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
    indices = evenly_spaced(len(dataset), count)
    if not indices:
        raise UserError("data-empty", f"{dataset.spec}: no images")
    return [dataset.image(i) for i in indices]


@dataclass(frozen=True)
class PreciseGraph:
    """A graph in the precision asked for.

    Attributes:
        model: The graph.
        island: See :class:`export.precision.half.TypedGraph`.
        report: What was measured on the way.
    """

    model: ModelProto
    island: tuple[str, ...] = ()
    report: PrecisionReport = field(default_factory=PrecisionReport)


def write_precision(
    model: ModelProto,
    reference: Engine,
    lowering: Lowering,
    batch: int,
    images: Sequence[ImageArray],
    request: PrecisionRequest,
) -> PreciseGraph:
    """Gives a graph the precision asked for.

    Args:
        model: The float32 graph.
        reference: What it was made from: the torch model, or the file it was adopted from.
        lowering: Body of the attention function.
        batch: Images per run: the graph's, or any where it is dynamic.
        images: Images that show how large values get, besides those of the request.
        request: What is wanted.

    Raises:
        UserError: What :func:`search_islands` and reading the images raise.
    """
    if request.precision == "fp32":
        return PreciseGraph(model)
    samples = _samples(request, reference.info, _SEARCHED[0])
    typical = [*images, *request.calibration]
    typical += [samples.image(k) for k in range(len(samples))] if samples else []
    config = reference.info.preprocess
    ranges = value_ranges(model, typical, config, batch)
    scales: Mapping[str, float] = {}
    if request.precision == "int8":
        scales = calibrate(model, request.calibration, config, batch, ranges)
    writer = _Writer(model, reference, lowering, batch, request, ranges, scales)
    return writer.default() if samples is None else writer.searched(samples)


def _samples(request: PrecisionRequest, info: BundledInfo, most: int) -> Samples | None:
    """Images to search the island on, if it is to be searched."""
    if not request.search or request.data is None:
        return None
    return Samples.of_dataset(request.data, most, info.preprocess)


@dataclass(frozen=True)
class _Writer:
    """Writes types into one float32 graph; ``scales`` are those of int8."""

    model: ModelProto
    reference: Engine
    lowering: Lowering
    batch: int
    request: PrecisionRequest
    ranges: Ranges
    scales: Mapping[str, float]

    def default(self) -> PreciseGraph:
        """The default island, measured where there are data."""
        name = self.request.precision
        typed = self._typed(DEFAULT_ISLAND)
        if self.request.data is None:
            return PreciseGraph(typed.model, typed.island)
        comparison = concluded(self._compared({name: typed.model}), name, default_budget(name).ap)
        return PreciseGraph(typed.model, typed.island, PrecisionReport(comparison=comparison))

    def searched(self, samples: Samples) -> PreciseGraph:
        """The smallest island that holds on the images of the proof, or the default one."""
        precision = self.request.precision
        default, smallest = f"{precision} default island", f"{precision} searched island"
        typed = {default: self._typed(DEFAULT_ISLAND)}
        while True:
            search = self._search(samples)
            typed[smallest] = self._typed(search.island)
            comparison = self._compared({key: one.model for key, one in typed.items()})
            more = _samples(self.request, self.reference.info, _SEARCHED[1])
            # A few images cannot tell what all of them can, nor half precision what int8 does.
            if not comparison.violations(smallest) or more is None or len(more) <= len(samples):
                break
            samples = more
        exported, note = smallest, ""
        if comparison.violations(smallest):
            exported = default
            note = (
                f"the searched island is over the budget on {comparison.images} images "
                f"({', '.join(comparison.violations(smallest))}): the default island is kept"
            )
        comparison = concluded(comparison, exported, default_budget(precision).ap, note)
        final = typed[exported]
        report = PrecisionReport(search=search, comparison=comparison)
        return PreciseGraph(final.model, final.island, report)

    def _compared(self, typed: Mapping[str, ModelProto]) -> PrecisionComparison:
        """Graphs of the precision asked for against float32 and what else is to be had.

        The request has data.
        """
        assert self.request.data is not None
        variants = {"fp32": self.model}
        if self.request.precision == "int8":
            variants["fp16"] = self._half(DEFAULT_ISLAND).model
        elif self.request.search:
            variants["fp16 no island"] = self._half(()).model
        variants |= typed
        return compare_precisions(
            variants, self.reference.info, self.request.data, self.batch, self.lowering
        )

    def _typed(self, island: Sequence[str]) -> TypedGraph:
        """The graph in the precision asked for."""
        write = self._int8 if self.request.precision == "int8" else self._half
        return write(island)

    def _half(self, island: Sequence[str]) -> TypedGraph:
        typed = to_half(self.model, island, self.ranges)
        finish_half(typed.model, self.reference.info, self.lowering)
        return typed

    def _int8(self, island: Sequence[str]) -> TypedGraph:
        model = ModelProto()
        model.CopyFrom(self.model)
        typed = to_half(model, island, self.ranges, quantize(model, self.scales))
        finish_half(typed.model, self.reference.info, self.lowering)
        return typed

    def _search(self, samples: Samples) -> IslandSearch:
        budget = default_budget("fp16")
        comparator = half_comparator(
            self.model,
            self.reference.info,
            self.lowering,
            self.ranges,
            samples,
            [self.reference([samples.image(k)])[0] for k in range(len(samples))],
            self.batch,
            budget,
        )
        parts = {part for part in part_names(Network(self.model)) if part is not None}
        return search_islands(parts, comparator, budget)
