"""From a checkpoint to a bundle that has been shown to answer like the checkpoint."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import ModelProto
from tqdm import tqdm

from detr.cli_support import progress
from detr.errors import GateError, UserError
from detr.files import output_error, output_folder, sha256, write_atomic
from detr.model_info import BundledInfo
from detr.types import Detections, ImageArray
from engines.base import Engine
from engines.bundle import (
    GOLDEN,
    MODEL,
    SIDECAR,
    Bundle,
    BundleInfo,
    Golden,
    Source,
    is_bundle,
    open_bundle,
    outputs_of,
)
from engines.external_weights import save_with_weights
from engines.msda_function import Lowering
from engines.open import open_engine
from engines.verdict import EngineVerdict
from export.golden import drawn_images
from export.parity.diagnose import island_advice
from export.parity.evidence import ungated_evidence
from export.parity.gate import gate_graph
from export.parity.samples import Samples
from export.precision.apply import PrecisionRequest, write_precision
from export.trace.torch_to_onnx import export_graph

# A protobuf message ends at 2 GiB; beyond this, weights go beside the graph.
_EMBED_BYTES = 2**31 - 2**24
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
# What a bundle is made from, for people.
_SAID = {"torch": "torch", "original": "the original file"}


class RejectedExport(GateError):
    """An export the parity gate rejected: ``export-parity``.

    Args:
        bundle: What was exported, under the name it is left with.
        verdict: Of the engine that rejects it.
        out: The name it did not get.

    Attributes:
        bundle, verdict: Likewise.
    """

    def __init__(self, bundle: Bundle, verdict: EngineVerdict, out: Path) -> None:
        complaint = verdict.complaint()
        advice = "" if bundle.info.precision == "fp32" else island_advice(bundle.info)
        if advice and advice not in complaint:
            complaint = f"{complaint}; {advice}"
        super().__init__("export-parity", f"{bundle.path}: {complaint}; {out} was not written")
        self.bundle, self.verdict = bundle, verdict


def export_bundle(
    checkpoint: Path,
    out: Path,
    opset: int = 17,
    batch: int | Literal["dynamic"] = 1,
    lowering: Lowering = "gridsample",
    images: Sequence[ImageArray] | None = None,
    request: PrecisionRequest | None = None,
    gate: bool = True,
    canvas: tuple[int, int] | None = None,
) -> Bundle:
    """Exports a checkpoint and proves the result in ONNX Runtime before it takes the name ``out``.

    Args:
        checkpoint: ``NAME.safetensors`` or a run directory.
        out: The bundle's folder; an older bundle of that name is replaced at the very end.
        opset: 17 or 18.
        batch: Batch size of the graph, or ``dynamic``.
        lowering: Body of the attention function for runtimes without our kernel.
        images: Golden images; drawn ones where ``None``.
        request: Precision of the graph, float32 by default.
        gate: Whether it has to pass the parity gate.
        canvas: (height, width) of the graph; by default the first of the model's canvases.

    Raises:
        RejectedExport: ONNX Runtime finds other things than torch. The bundle then lies beside
            ``out``, called ``NAME.rejected.bundle``, and what was at ``out`` still is.
        UserError: ``output-exists`` where ``out`` is something other than a bundle, or
            what loading the checkpoint and writing the files raises.
    """
    refuse_output(out)
    output_folder(out.parent)
    torch_engine = open_engine(checkpoint, "torch")
    size = canvas or torch_engine.info.preprocess.canvases[0]
    torch_engine = torch_engine.on_canvas(size)
    with progress(range(3), f"export {out.name}", 3) as bar:
        bar.set_postfix_str("tracing the graph")
        model = export_graph(torch_engine.detector, size, opset, batch, lowering)
        bar.update()
        images = list(images) if images is not None else drawn_images(size)
        write_bundle(model, torch_engine, out, opset, batch, lowering, images, request, gate, bar)
    return open_bundle(out)


def write_bundle(
    model: ModelProto,
    reference: Engine,
    out: Path,
    opset: int,
    batch: int | Literal["dynamic"],
    lowering: Lowering,
    images: Sequence[ImageArray],
    request: PrecisionRequest | None,
    gate: bool,
    bar: tqdm[Any],
) -> None:
    """Puts a float32 graph, in the precision asked for, into a bundle that passes the gate.

    Args:
        model: The graph.
        reference: What it was made from; its ``info`` becomes the bundle's.
        out: The folder.
        opset: Of the graph.
        batch: Of the graph.
        lowering: Body of its attention function.
        images: Golden images.
        request: Precision, float32 by default.
        gate: Whether it has to pass the parity gate.
        bar: Told what is being done.

    Raises:
        RejectedExport: See :func:`export_bundle`.
        UserError: What writing the files raises.
    """
    bar.set_postfix_str(f"finding the golden detections in {_SAID[reference.name]}")
    golden = Golden(list(images), _detect(reference, images, 1))
    bar.set_postfix_str("writing the types")
    request = request or PrecisionRequest()
    precise = write_precision(
        model, reference, lowering, 1 if batch == "dynamic" else batch, images, request
    )
    with replacing(out) as folder:
        files = _write_model(precise.model, folder)
        write_atomic(folder / GOLDEN, golden.to_bytes())
        files[GOLDEN] = sha256(folder / GOLDEN)
        outputs, masks = outputs_of(precise.model)
        draft = BundleInfo(
            model=reference.info,
            opset=opset,
            precision=request.precision,
            island=precise.island,
            precision_report=precise.report,
            lowering=lowering,
            batch=batch,
            outputs=outputs,
            masks=masks,
            files=files,
            source=Source(
                path=str(reference.artifact.resolve()), sha256=sha256(reference.artifact)
            ),
            reference_ap=_reference_ap(reference.info),
            versions={name: version(name) for name in _PACKAGES},
        )
        bundle = Bundle(folder, draft)
        bar.update()
        if gate:
            bar.set_postfix_str(f"comparing it with {_SAID[reference.name]}")
            _pass_gate(bundle, reference, golden, out)
        else:
            ungated_evidence(bundle).write(folder)
            write_atomic(folder / SIDECAR, draft.model_dump_json(indent=2) + "\n")


def refuse_output(out: Path) -> None:
    """Refuses a name that something else than a bundle has.

    Raises:
        UserError: ``output-exists``.
    """
    if out.exists() and not is_bundle(out):
        raise UserError("output-exists", f"{out}: exists and is not a bundle; nothing was written")


def _detect(engine: Engine, images: Sequence[ImageArray], size: int) -> list[Detections]:
    """Runs images in batches of at most ``size``."""
    batches = (images[start : start + size] for start in range(0, len(images), size))
    return [one for batch in batches for one in engine(batch)]


def _pass_gate(bundle: Bundle, reference: Engine, golden: Golden, out: Path) -> None:
    """Compares ONNX Runtime with the golden detections, and writes sidecar and evidence.

    Raises:
        RejectedExport: The bundle got another name.
    """
    verdict = gate_graph(bundle, reference, Samples.of_golden(golden))
    parity = next((e.parity for e in verdict.engines if e.parity is not None), None)
    final = bundle.info.model_copy(update={"parity": parity})
    write_atomic(bundle.path / SIDECAR, final.model_dump_json(indent=2) + "\n")
    if verdict.status == "rejected":
        rejected = out.with_name(f"{out.name.removesuffix('.bundle')}.rejected.bundle")
        shutil.rmtree(rejected, ignore_errors=True)
        bundle.path.rename(rejected)
        raise RejectedExport(Bundle(rejected, final), verdict.worst, out)


def _write_model(model: ModelProto, folder: Path) -> dict[str, str]:
    """Writes the graph, with its weights inside while they fit; returns the files' hashes."""
    try:
        if model.ByteSize() < _EMBED_BYTES:
            onnx.save_model(model, str(folder / MODEL))
            return {MODEL: sha256(folder / MODEL)}
        weights = save_with_weights(model, folder / MODEL)
        return {name: sha256(folder / name) for name in (MODEL, weights)}
    except OSError as error:
        raise output_error(folder / MODEL, error) from error


def _reference_ap(info: BundledInfo) -> float | None:
    ap = info.provenance.get("ap")
    return float(ap) if isinstance(ap, int | float) else None


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the name ``out`` only if the block succeeds.

    Raises:
        UserError: ``disk-full`` or ``output-unwritable``.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            if out.exists():
                out.rename(old)
            try:
                new.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise output_error(out, error) from error
