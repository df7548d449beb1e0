"""Times RT-DETR-R18 exported: our default CPU engine against the transformers library's export.

python -m tools.exports_against_transformers --threads 2

One process, same weights and image, in turns: our bundle in the engine that is the default on a
CPU, and the library's model, traced by torch's exporter, in ONNX Runtime and in OpenVINO. Before
anything is timed, what they find is compared. Ours goes on to boxes in pixels, theirs ends with
logits and boxes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from torch import Tensor, nn

from detr.config import ClassMap, SigmoidClassesConfig
from detr.data.cli import parse_size
from detr.data.preprocess import Inputs
from detr.model_info import ModelInfo
from detr.models import detections, save_model
from detr.models.weights.hugging_face import convert
from engines.open import open_engine
from export.bundle import export_bundle
from tools.against_transformers import rt_detr
from tools.turns import in_turns

Run = Callable[[], tuple[Any, ...]]


class Predictions(nn.Module):
    """The library's model, as far as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes."""
        found = self.model(pixel_values=images)
        return found.logits, found.pred_boxes


def contenders(size: tuple[int, int], threads: int, folder: Path) -> dict[str, Run]:
    """What each of the three runs, on the same image."""
    theirs = rt_detr().eval()
    # Fresh heads answer alike everywhere.
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "class_embed" in name or "bbox_embed" in name or "sampling_offsets" in name:
                x.add_(0.1 * torch.randn_like(x))
    imported = convert(theirs.config.to_dict(), theirs.state_dict(), "random weights")
    config = imported.detector.config
    names = tuple(f"class-{i}" for i in range(config.num_classes))
    info = ModelInfo(
        detector=config,
        classes=ClassMap(names=names, category_ids=tuple(range(len(names)))),
        preprocess=imported.preprocess.replace(size=size),
    )
    save_model(folder / "ours.safetensors", imported.detector, info)
    bundle = export_bundle(folder / "ours.safetensors", folder / "ours.bundle", gate=False)
    engine = open_engine(bundle.path, threads=threads)
    print(f"ours: {engine.name}, {engine.versions}", flush=True)

    images = torch.rand(1, 3, *size)
    torch.onnx.export(
        Predictions(theirs),
        (images,),
        str(folder / "theirs.onnx"),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(folder / "theirs.onnx"), options, providers=["CPUExecutionProvider"]
    )
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(str(folder / "theirs.onnx")),
        "CPU",
        {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
    )
    request = compiled.create_infer_request()
    array = images.numpy()
    sizes = np.array([size], np.float32)
    inputs = Inputs(array, sizes, sizes)

    def ours() -> tuple[Any, ...]:
        raw = engine.run(inputs)
        return raw.boxes, raw.scores

    def in_onnxruntime() -> tuple[Any, ...]:
        return tuple(session.run(None, {"images": array}))

    def in_openvino() -> tuple[Any, ...]:
        request.infer({"images": array})
        return tuple(request.get_output_tensor(i).data.copy() for i in range(2))

    boxes, scores = ours()
    for run in (in_onnxruntime, in_openvino):
        logits, relative = (torch.from_numpy(x) for x in run())
        wanted = detections(
            logits, relative, torch.from_numpy(sizes), SigmoidClassesConfig(), config.detections
        )
        apart = np.abs(wanted[0].numpy() - boxes)[:, :100].max()
        print(f"{run.__name__}: best 100 boxes within {apart:.1e} pixels of ours", flush=True)
        np.testing.assert_allclose(wanted[1].numpy(), scores, atol=1e-4)
    return {
        "ours": ours,
        "theirs in ONNX Runtime": in_onnxruntime,
        "theirs in OpenVINO": in_openvino,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", default="416x1344")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.size}, {arguments.threads} threads, {arguments.rounds} rounds in turns")
    with tempfile.TemporaryDirectory() as scratch:
        runs = contenders(parse_size(arguments.size), arguments.threads, Path(scratch))
        found = in_turns(runs, arguments.rounds)
    for label, seconds in found.items():
        for name, (median, least) in seconds.items():
            print(
                f"{label:10}{name:24} {median * 1e3:7.0f} ms (least {least * 1e3:.0f}), "
                f"ours is {seconds['ours'].median / median:.2f} of it",
                flush=True,
            )


if __name__ == "__main__":
    main()
