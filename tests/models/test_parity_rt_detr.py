"""RT-DETR against the transformers library, from random weights, in every decoder layer.

The library looks at no padding, so images fill their canvas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.weights.hugging_face import convert

# (height, width): square, and wide as KITTI is.
CANVASES = [(128, 192), (96, 320)]


def resnet(kind: str, widths: list[int], depths: list[int], stem: int) -> dict[str, Any]:
    return {
        "model_type": "rt_detr_resnet",
        "embedding_size": stem,
        "hidden_sizes": widths,
        "depths": depths,
        "layer_type": kind,
        "out_indices": [2, 3, 4],
    }


TINY = {
    "num_labels": 5,
    "num_queries": 11,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "basic": {
        **TINY,
        "backbone_config": resnet("basic", [16, 24, 32, 64], [1, 1, 1, 1], 16),
        "encoder_in_channels": [24, 32, 64],
        "encoder_hidden_dim": 32,
        "decoder_in_channels": [32, 32, 32],
        "hidden_expansion": 0.5,
        "decoder_n_points": 2,
    },
    # As RT-DETR-R101: an encoder wider than the decoder, without reduction inside.
    "bottleneck, wide encoder": {
        **TINY,
        "backbone_config": resnet("bottleneck", [32, 64, 96, 128], [1, 2, 1, 1], 16),
        "encoder_in_channels": [64, 96, 128],
        "encoder_hidden_dim": 48,
        "decoder_in_channels": [48, 48, 48],
        "encoder_layers": 2,
    },
    "R18": {
        "num_labels": 80,
        "backbone_config": resnet("basic", [64, 128, 256, 512], [2, 2, 2, 2], 64),
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
        "freeze_backbone_batch_norms": False,
    },
    "R50": {"num_labels": 80},
}
MODELS = {
    **{case: ("rt_detr", options) for case, options in CASES.items()},
    "v2, sampling between cells": ("rt_detr_v2", CASES["basic"]),
    "v2, discrete": ("rt_detr_v2", {**CASES["basic"], "decoder_method": "discrete"}),
    "v2, discrete, R18": ("rt_detr_v2", {**CASES["R18"], "decoder_method": "discrete"}),
}


def randomize(model: nn.Module) -> None:
    """Weights of natural size everywhere, also where training starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point() or name.endswith("n_points_scale"):
                continue
            noise = torch.randn(x.shape, generator=generator)
            if name.endswith("running_var"):
                x.copy_(1 + 0.1 * noise.abs())
            elif x.dim() < 2:
                x.copy_(float(name.endswith("weight")) + 0.1 * noise)
            else:
                x.copy_(noise / x[0].numel() ** 0.5)


def images(canvas: tuple[int, int]) -> Tensor:
    """Coarse noise: every token of fine noise looks like every other."""
    coarse = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(4 * coarse, canvas)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_every_layer_answers_alike(case: str) -> None:
    if "discrete" in case:
        # A sample that rounding moves by a cell is another answer; in double precision none is.
        with in_double():
            check_every_layer(case)
    else:
        check_every_layer(case)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Double precision also where a model asks for single by name, as sine codes do."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "float32", torch.float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def check_every_layer(case: str) -> None:
    """Every decoder layer's logits and boxes within 1e-4."""
    kind, options = MODELS[case]
    config = transformers.CONFIG_MAPPING[kind](**options)
    model: Any = transformers.AutoModelForObjectDetection.from_config(config)
    model = model.eval().to(torch.get_default_dtype())
    randomize(model)
    for heads in ("class_embed", "bbox_embed"):  # version 2 has two copies, and uses one
        if hasattr(model, heads):
            getattr(model, heads).load_state_dict(getattr(model.model.decoder, heads).state_dict())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    imported = convert(model.config.to_dict(), state, "test")
    ours = imported.detector.to(torch.get_default_dtype())
    reasons = {"counts training steps", "rows that no label ever reads", "follows from the points"}
    told = {why for why in imported.unused.values() if not why.startswith("a copy of ")}
    assert told <= reasons
    assert ours.config.decoder.cross_attention.discrete == ("discrete" in case)
    for canvas in CANVASES:
        batch = images(canvas)
        with torch.no_grad():
            theirs = model(pixel_values=batch)
            memory = ours.encode(batch, torch.tensor([canvas] * 2, dtype=batch.dtype))
            output = ours.decode(memory, ours.queries(memory))[0]
        for layer, (logits, boxes) in enumerate(zip(output.logits, output.boxes, strict=True)):
            wanted = theirs.intermediate_logits[:, layer]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
            wanted = theirs.intermediate_reference_points[:, layer]
            torch.testing.assert_close(boxes, wanted, atol=1e-4, rtol=0)
        spread = theirs.logits.std(1).mean(), theirs.pred_boxes.std(1).mean()
        assert min(spread) > 1e-2, "queries that all say the same prove nothing"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_feature_levels", 4),
        ("learn_initial_query", True),
        ("encode_proj_layers", [1, 2]),
        ("decoder_method", "cubic"),
    ],
)
def test_another_architecture_is_refused(option: str, value: Any) -> None:
    published = {"model_type": "rt_detr", **CASES["basic"], option: value}
    with pytest.raises(UserError, match=f"test: {option} ") as caught:
        convert(published, {}, "test")
    assert caught.value.code == "weights-config"
