"""LW-DETR against the transformers library, from random weights, in every decoder layer.

The library's ViT looks at an image's padding, which nobody trained it for: its code fills canvases.
Where images do not, the test hands its attention the mask that it hands to its decoder.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from detr.errors import UserError
from detr.models import Detector
from detr.models.weights.hugging_face import convert
from tests.models.test_parity_rt_detr import images, randomize

# (height, width): the library wants four windows each way, of whole cells.
CANVASES = [(128, 192), (64, 320)]
# (height, width) of the second image inside them; the first fills its canvas.
INSIDE = [(90, 192), (50, 130)]

VIT = {
    "model_type": "lw_detr_vit",
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "window_block_indices": [0, 2],
    "out_indices": [2, 3, 4],
    "pretrain_image_size": 96,
}
TINY = {
    "num_labels": 5,
    "num_queries": 7,
    "group_detr": 3,
    "d_model": 32,
    "decoder_ffn_dim": 48,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 8,
    "decoder_n_points": 2,
    "decoder_layers": 2,
    "projector_scale_factors": [1.0],
    "backbone_config": VIT,
}
PUBLISHED = {
    **VIT,
    "hidden_size": 192,
    "num_attention_heads": 12,
    "pretrain_image_size": 224,
}
CASES: dict[str, dict[str, Any]] = {
    "one level": TINY,
    # As LW-DETR-large; without "narrowed" maps, which need more than 512 channels.
    "two levels": {**TINY, "projector_scale_factors": [2.0, 0.5], "decoder_n_points": 4},
    "narrowed": {
        **TINY,
        "projector_scale_factors": [2.0, 1.0, 0.5],
        "backbone_config": {**VIT, "hidden_size": 528, "out_indices": [2]},
    },
    "windows two each way": {**TINY, "backbone_config": {**VIT, "num_windows": 4}},
    "blocks of no use": {**TINY, "backbone_config": {**VIT, "out_indices": [1, 2]}},
    "LW-DETR-tiny": {
        "num_labels": 91,
        "num_queries": 24,
        "decoder_n_points": 2,
        "projector_scale_factors": [1.0],
        "backbone_config": {
            **PUBLISHED,
            "num_hidden_layers": 6,
            "window_block_indices": [0, 2, 4],
            "out_indices": [2, 4, 6],
        },
    },
    "LW-DETR-large": {
        "num_labels": 91,
        "num_queries": 100,
        "d_model": 384,
        "decoder_self_attention_heads": 12,
        "decoder_cross_attention_heads": 24,
        "decoder_n_points": 4,
        "projector_scale_factors": [2.0, 0.5],
        "backbone_config": {
            **PUBLISHED,
            "hidden_size": 384,
            "num_hidden_layers": 10,
            "window_block_indices": [0, 1, 3, 6, 7, 9],
            "out_indices": [3, 5, 6, 10],
        },
    },
}


def library(kind: str, options: dict[str, Any]) -> Any:
    """The library's detector from random weights."""
    config = transformers.CONFIG_MAPPING[kind](**options)
    model: Any = transformers.AutoModelForObjectDetection.from_config(config).eval()
    randomize(model)
    return model


def look_at_images_only(layers: Any, windows: Tensor, everywhere: Tensor) -> list[Any]:
    """Hands each block's attention a mask of its kind, ``[B, T]`` bool each."""

    def hook(layer: Any) -> Any:
        whole = not getattr(layer, "window", not getattr(layer, "global_attention", False))
        allowed = everywhere if whole else windows
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None, None]

        def before(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
            return arguments, {**named, "attention_mask": mask}

        return layer.attention.register_forward_pre_hook(before, with_kwargs=True)

    return [hook(layer) for layer in layers]


def pixel_mask(canvas: tuple[int, int], inside: tuple[int, int]) -> Tensor:
    mask = torch.zeros(2, *canvas, dtype=torch.long)
    mask[0] = 1
    mask[1, : inside[0], : inside[1]] = 1
    return mask


def window_masks(mask: Tensor, cells: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Which cells of each window, and of all windows in their order, lie in the image."""
    valid = nn.functional.interpolate(mask[None].float(), size=cells)[0].bool()
    height, width = cells[0] // count, cells[1] // count
    found = torch.stack(
        [
            valid[:, y * height : (y + 1) * height, x * width : (x + 1) * width].flatten(1)
            for y in range(count)
            for x in range(count)
        ],
        1,
    )
    windows = found.flatten(0, 1).clone()
    # Nothing to look at would be no number, so a window in the padding looks at its first cell.
    windows[:, 0] = True
    return windows, found.flatten(1)


def check_every_layer(
    model: Any, ours: Detector, batch: Tensor, mask: Tensor, valid: Tensor
) -> None:
    """Logits and boxes within 1e-4 in every decoder layer."""
    with torch.no_grad():
        theirs = model(pixel_values=batch, pixel_mask=mask)
        memory = ours.encode(batch, valid)
        output = ours.decode(memory, ours.queries(memory))[0]
        assert len(output.logits) == len(theirs.intermediate_hidden_states)
        for layer, hidden in enumerate(theirs.intermediate_hidden_states):
            wanted = model.class_embed(hidden)
            torch.testing.assert_close(output.logits[layer], wanted, atol=1e-4, rtol=0)
            step = model.bbox_embed(hidden)
            start = theirs.intermediate_reference_points[-1]
            center = step[..., :2] * start[..., 2:] + start[..., :2]
            wanted = torch.cat((center, step[..., 2:].exp() * start[..., 2:]), -1)
            torch.testing.assert_close(output.boxes[layer], wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.boxes[-1], theirs.pred_boxes, atol=1e-4, rtol=0)
    spread = theirs.logits.std(1).mean(), theirs.pred_boxes.std(1).mean()
    assert min(spread) > 1e-2, "queries that all say the same prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_layer_answers_alike(case: str) -> None:
    model = library("lw_detr", CASES[case])
    state = {name: x.clone() for name, x in model.state_dict().items()}
    imported = convert(model.config.to_dict(), state, "test")
    assert set(imported.unused.values()) <= {
        "counts training steps",
        "of a block after the last map",
        "of a class token, which the detector does not have",
    }
    ours = imported.detector
    count = model.config.backbone_config.num_windows_side
    for canvas, inside in zip(CANVASES, INSIDE, strict=True):
        batch, cells = images(canvas), (canvas[0] // 16, canvas[1] // 16)
        whole = pixel_mask(canvas, canvas)
        check_every_layer(model, ours, batch, whole, torch.tensor([canvas] * 2).float())
        mask = pixel_mask(canvas, inside)
        batch = batch * mask[:, None]
        hooks = look_at_images_only(
            model.model.backbone.backbone.encoder.layer, *window_masks(mask, cells, count)
        )
        check_every_layer(model, ours, batch, mask, torch.tensor([canvas, inside]).float())
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("projector_scale_factors", [], "weights-config"),
        ("projector_scale_factors", [1.0, 2.0], "weights-config"),
        ("activation_function", "relu", "weights-config"),
        ("backbone_config", {**VIT, "mlp_ratio": 2}, "weights-config"),
        ("backbone_config", {**VIT, "out_indices": [0, 4]}, "weights-config"),
        ("backbone_config", {"model_type": "resnet"}, "weights-backbone"),
    ],
)
def test_another_architecture_is_refused(option: str, value: Any, code: str) -> None:
    published = {"model_type": "lw_detr", **TINY, option: value}
    with pytest.raises(UserError, match="test: ") as caught:
        convert(published, {}, "test")
    assert caught.value.code == code
