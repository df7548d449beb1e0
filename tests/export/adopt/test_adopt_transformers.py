"""Files that torch's exporters make of the transformers library's detectors become bundles."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from engines.bundle import open_bundle
from engines.open import open_engine
from export.cli import main

pytestmark = pytest.mark.slow

_DECODER = {
    "d_model": 32,
    "num_queries": 20,
    "num_labels": 5,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
}
_HYBRID = _DECODER | {
    "encoder_in_channels": [16, 16, 32],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}
_STAGES = {"out_features": ["stage2", "stage3", "stage4"], "embedding_size": 8}
_RESNET = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def rt_detr(version: str) -> Any:
    backbone = transformers.RTDetrResNetConfig(**_STAGES, **_RESNET)
    config = getattr(transformers, f"RTDetr{version}Config")(backbone_config=backbone, **_HYBRID)
    return getattr(transformers, f"RTDetr{version}ForObjectDetection")(config)


def d_fine() -> Any:
    backbone = transformers.HGNetV2Config(
        **_STAGES,
        hidden_sizes=[16, 16, 16, 32],
        depths=[1, 1, 1, 1],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
    )
    points = [3, 6, 3]  # as the published models have it
    config = transformers.DFineConfig(backbone_config=backbone, decoder_n_points=points, **_HYBRID)
    return transformers.DFineForObjectDetection(config)


def rf_detr() -> Any:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
        patch_size=16,
        num_windows=2,
        out_features=["stage2"],
    )
    heads = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    config = transformers.RfDetrConfig(backbone_config=backbone, group_detr=1, **_DECODER, **heads)
    return transformers.RfDetrForObjectDetection(config)


class _Plain(torch.nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(pixel_values=pixels)
        return found.logits, found.pred_boxes


FILES = {
    "rt-detr": (lambda: rt_detr(""), False),
    "rt-detr-dynamo": (lambda: rt_detr(""), True),
    "rt-detr-v2": (lambda: rt_detr("V2"), False),
    "d-fine": (d_fine, False),
    "rf-detr-dynamo": (rf_detr, True),
}


@pytest.mark.parametrize(("build", "dynamo"), FILES.values(), ids=FILES)
def test_a_file_becomes_an_accepted_bundle(build: Any, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, size = _Plain(build()).eval(), (96, 96)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(1, 3, *size),),
            str(tmp_path / "theirs.onnx"),
            input_names=["pixel_values"],
            output_names=["logits", "pred_boxes"],
            opset_version=18 if dynamo else 16,
            dynamo=dynamo,
            external_data=False,
            verbose=False,
        )
    names = {"names": list("abcde"), "category_ids": [1, 2, 3, 4, 5]}
    (tmp_path / "classes.json").write_text(json.dumps(names))
    out = tmp_path / "ours.bundle"
    command = ["adopt", str(tmp_path / "theirs.onnx"), "--out", str(out), "--size", "96x96"]
    command += ["--classes", str(tmp_path / "classes.json"), "--pixels", "unit", "--json"]
    run = CliRunner().invoke(main, [*command, "--lowering", "gather"], catch_exceptions=False)
    assert run.exit_code == 0, run.stderr
    bundle = open_bundle(out)
    provenance = bundle.info.model.provenance
    assert provenance["attentions"] == 2 and provenance["left"] == []
    assert b"GridSample" not in bundle.model.read_bytes()
    golden = bundle.golden()
    for name in ("onnxruntime", "openvino", "native"):
        engine = open_engine(bundle, name)
        for image, expected in zip(golden.images, golden.detections, strict=True):
            found = engine([image])[0]
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
            # Queries of random weights may tie; their boxes are then in another order.
            order, other = (np.lexsort(x.boxes.T) for x in (found, expected))
            np.testing.assert_allclose(found.boxes[order], expected.boxes[other], atol=1e-2)
