"""From a traced float32 graph to the precision asked for, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import ModelProto

from detr.config import ClassMap
from detr.data import Dataset, open_dataset
from detr.data.dataset import evenly_spaced
from detr.errors import UserError
from detr.types import ImageArray
from engines.bundle import Precision
from engines.msda_function import Lowering
from engines.torch_engine import TorchEngine
from export.parity.budget import default_budget
from export.parity.samples import Samples
from export.precision import cost as verdict
from export.precision.half import DEFAULT_ISLAND, Ranges, Typed, finish_half, to_half
from export.precision.int8 import calibrate, quantise
from export.precision.island_search import Search, search_islands
from export.precision.node_kinds import Network, part_names
from export.precision.ranges import value_ranges
from export.precision.trial import half_judge

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
class Written:
    """A graph in its final types.

    Attributes:
        model: The graph.
        island: See :class:`export.precision.half.Typed`.
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
    scales: dict[str, float] = field(default_factory=dict)  # of int8, once they are known

    def run(self) -> Written:
        samples = self._samples(_SEARCHED[0])
        seen = [*self.images, *self.request.calibration]
        seen += [samples.image(k) for k in range(len(samples))] if samples else []
        config = self.reference.info.preprocess
        ranges = value_ranges(self.model, seen, config, self.batch)
        if self.request.precision == "int8":
            self.scales = calibrate(
                self.model, self.request.calibration, config, self.batch, ranges
            )
        if samples is None:
            return self._plain(ranges)
        return self._searched(ranges, samples)

    def _plain(self, ranges: Ranges) -> Written:
        """The default island, measured where there are data."""
        name = self.request.precision
        typed = self._write(DEFAULT_ISLAND, ranges)
        if self.request.data is None:
            return Written(typed.model, typed.island)
        measured = self._measure({name: typed.model}, ranges)
        return Written(
            typed.model, typed.island, verdict=measured.keep(name, default_budget(name).ap)
        )

    def _searched(self, ranges: Ranges, samples: Samples) -> Written:
        """The smallest island that holds on the images of the proof, or the default one."""
        name = self.request.precision
        default, found = f"{name} default island", f"{name} searched island"
        typed = {default: self._write(DEFAULT_ISLAND, ranges)}
        while True:
            search = self._search(ranges, samples)
            typed[found] = self._write(search.island, ranges)
            measured = self._measure({key: one.model for key, one in typed.items()}, ranges)
            more = self._samples(_SEARCHED[1])
            # A few images cannot tell what all of them can, nor half precision what int8 does.
            if not measured.over(found) or more is None or len(more) <= len(samples):
                break
            samples = more
        kept, note = found, ""
        if measured.over(found):
            kept = default
            note = (
                f"the searched island is over the budget on {measured.images} images "
                f"({', '.join(measured.over(found))}): the default island is kept"
            )
        final = typed[kept]
        worth = default_budget(name).ap
        return Written(final.model, final.island, search, measured.keep(kept, worth, note))

    def _measure(self, typed: Mapping[str, ModelProto], ranges: Ranges) -> verdict.Verdict:
        """Graphs of the precision asked for against float32 and what else is to be had.

        The request has data.
        """
        assert self.request.data is not None
        variants = {"fp32": self.model}
        if self.request.precision == "int8":
            variants["fp16"] = self._half(DEFAULT_ISLAND, ranges).model
        elif self.request.search:
            variants["fp16 no island"] = self._half((), ranges).model
        variants |= typed
        return verdict.measure(
            variants, self.reference.info, self.request.data, self.batch, self.lowering
        )

    def _samples(self, most: int) -> Samples | None:
        """Images to search the island on, if it is to be searched."""
        if not self.request.search or self.request.data is None:
            return None
        return Samples.of_dataset(self.request.data, most)

    def _write(self, island: Sequence[str], ranges: Ranges) -> Typed:
        """The graph in the precision asked for."""
        write = self._int8 if self.request.precision == "int8" else self._half
        return write(island, ranges)

    def _half(self, island: Sequence[str], ranges: Ranges) -> Typed:
        typed = to_half(self.model, island, ranges)
        finish_half(typed.model, self.reference.info.detector, self.lowering)
        return typed

    def _int8(self, island: Sequence[str], ranges: Ranges) -> Typed:
        model = ModelProto()
        model.CopyFrom(self.model)
        typed = to_half(model, island, ranges, quantise(model, self.scales))
        finish_half(typed.model, self.reference.info.detector, self.lowering)
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
        UserError: What :func:`search_islands` and reading the images raise.
    """
    if request.precision == "fp32":
        return Written(model)
    return _Job(model, reference, lowering, batch, images, request).run()
