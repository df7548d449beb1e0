"""Every architecture the transformers library has, against it, from random weights.

The library's model is built without a download, its state dict goes through our adapter, and both
must predict the same on padded batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from detr.models.weights.hugging_face import convert

# (height, width) of a canvas and the image sizes on it; the second is no multiple of any stride.
CANVASES = [
    ((128, 192), ((128, 192), (90, 130))),
    ((101, 167), ((70, 167), (101, 111))),
]
SMALL_RESNET = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [8, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
SMALL = {
    "d_model": 256,  # narrower ones have other group norms in ours
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 11,
    "num_labels": 5,
}
DEFORMABLE = {
    "plain": {},
    "refine": {"with_box_refine": True, "tie_word_embeddings": False},
    "two_stage": {
        "with_box_refine": True,
        "two_stage": True,
        "two_stage_num_proposals": 12,
        "tie_word_embeddings": False,
    },
}


def timm_backbone(name: str, *indices: int, **options: Any) -> dict[str, Any]:
    return {
        "model_type": "timm_backbone",
        "backbone": name,
        "out_indices": list(indices),
        "features_only": True,
        "use_pretrained_backbone": False,
        **options,
    }


def randomise(model: torch.nn.Module) -> None:
    """Weights of natural size everywhere, also where training starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point():
                continue
            noise = torch.randn(x.shape, generator=generator)
            if name.endswith("running_var"):
                x.copy_(1 + 0.1 * noise.abs())
            elif x.dim() < 2:
                center = 1.0 if name.endswith("weight") else 0.0  # a norm's
                x.copy_(center + 0.1 * noise)
            else:
                # Queries of natural size: tiny ones are all alike.
                x.copy_(noise if "embedding" in name else noise / x[0].numel() ** 0.5)


def published(kind: str, **options: Any) -> torch.nn.Module:
    config = transformers.CONFIG_MAPPING[kind](**options)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    randomise(model)
    return model.eval()


def assert_same_predictions(model: torch.nn.Module, tolerance: float = 1e-4) -> None:
    state = {name: x.clone() for name, x in model.state_dict().items()}
    ours = convert(model.config.to_dict(), state, "test").detector
    ours = ours.to(torch.get_default_dtype())
    for canvas, sizes in CANVASES:
        images = blobs(len(sizes), canvas)
        mask = torch.zeros(len(sizes), *canvas, dtype=torch.int64)
        for i, (height, width) in enumerate(sizes):
            mask[i, :height, :width] = 1
            images[i] *= mask[i]
        with torch.no_grad():
            theirs = model(pixel_values=images, pixel_mask=mask)
            memory = ours.encode(images, torch.tensor(sizes, dtype=torch.float32))
            output = ours.decode(memory, ours.queries(memory))[0]
        torch.testing.assert_close(output.logits[-1], theirs.logits, atol=tolerance, rtol=0)
        torch.testing.assert_close(output.boxes[-1], theirs.pred_boxes, atol=tolerance, rtol=0)
        spread = theirs.logits.std(1).mean(), theirs.pred_boxes.std(1).mean()
        assert min(spread) > 1e-3, "queries that all say the same prove nothing"


def spread_tokens(model: torch.nn.Module) -> None:
    """Gives the tokens of a dense detector mean 0 and spread 1.

    There is no norm after its projection, and deep random backbones answer alike everywhere.
    """
    projection, seen = model.model.input_projection, []
    handle = projection.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(pixel_values=blobs(1, (128, 192)))
        handle.remove()
        mean, std = seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3)).clamp(min=0.3)
        projection.weight.div_(std[:, None, None, None])
        projection.bias.sub_(mean).div_(std)


def blobs(count: int, canvas: tuple[int, int]) -> torch.Tensor:
    """Coarse noise: every token of fine noise looks like every other."""
    return torch.nn.functional.interpolate(4 * torch.randn(count, 3, 4, 6), canvas)


def share_decoder_heads(model: torch.nn.Module) -> None:
    """Published refined models hold their heads twice."""
    for name in ("bbox_embed", "class_embed"):
        inner = getattr(model.model.decoder, name, None)
        if inner is not None:
            inner.load_state_dict(getattr(model, name).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEFORMABLE)
def test_deformable_detr(kind):
    backbone = {**SMALL_RESNET, "out_features": ["stage2", "stage3", "stage4"]}
    model = published(
        "deformable_detr",
        **SMALL,
        backbone_config=backbone,
        num_feature_levels=4,
        **DEFORMABLE[kind],
    )
    share_decoder_heads(model)
    assert_same_predictions(model)


def dense_backbone(name: str, dilated: bool) -> dict[str, Any]:
    return timm_backbone(name, 4, **({"output_stride": 16} if dilated else {}))


@pytest.mark.slow
@pytest.mark.parametrize("dilated", [False, True], ids=["C5", "DC5"])
@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_dense_detectors(kind, dilated):
    backbone = dense_backbone("resnet50" if dilated else "resnet18", dilated)
    model = published(kind, **SMALL, backbone_config=backbone)
    spread_tokens(model)
    assert_same_predictions(model)


DAB = {"hidden_size": 256, **{k: v for k, v in SMALL.items() if k != "d_model"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"num_patterns": 3}, {"random_refpoints_xy": True}, {"activation_function": "relu"}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_dab_detr(options):
    backbone = {**SMALL_RESNET, "out_features": ["stage4"]}
    model = published("dab-detr", **DAB, backbone_config=backbone, **options)
    model.model.decoder.bbox_embed.load_state_dict(model.bbox_predictor.state_dict())
    spread_tokens(model)
    assert_same_predictions(model)


@pytest.mark.slow
def test_dab_detr_with_a_dilated_backbone():
    model = published("dab-detr", **DAB, backbone_config=dense_backbone("resnet50", True))
    model.model.decoder.bbox_embed.load_state_dict(model.bbox_predictor.state_dict())
    spread_tokens(model)
    assert_same_predictions(model)
    # Larger weights make single precision differ by 1e-4 and more, so without rounding.
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() >= 2 and "backbone" not in name and "embedding" not in name:
                x.mul_(1.5)
    with in_double():
        assert_same_predictions(model.double(), tolerance=1e-9)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Double precision also where a model asks for single by name, as sine codes do."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch, "float32", torch.float64):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_deformable_detr_with_whole_backbones(name):
    model = published(
        "deformable_detr",
        **SMALL,
        backbone_config=timm_backbone(name, 2, 3, 4),
        **DEFORMABLE["refine"],
    )
    share_decoder_heads(model)
    assert_same_predictions(model)
