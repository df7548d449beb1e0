"""D-FINE against the transformers library, from random weights, in every decoder layer.

The library looks at no padding, so images fill their canvas.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from detr.errors import UserError
from detr.models.weights.hugging_face import convert
from tests.models.test_parity_rt_detr import CANVASES, images, in_double, randomize

# Channels of an HGNetv2's stem; within its stages, out of them; their blocks; convolutions of each.
HGNETS: dict[str, tuple[Any, ...]] = {
    "b0": ([3, 16, 16], [16, 32, 64, 128], [64, 256, 512, 1024], [1, 1, 2, 1], 3),
    "b4": ([3, 32, 48], [48, 96, 192, 384], [128, 512, 1024, 2048], [1, 1, 3, 1], 6),
}


def hgnet(name: str, stages: list[int]) -> dict[str, Any]:
    stem, inner, outer, blocks, depth = HGNETS[name]
    return {
        "model_type": "hgnet_v2",
        "stem_channels": stem,
        "stage_in_channels": [stem[-1], *outer[:-1]],
        "stage_mid_channels": inner,
        "stage_out_channels": outer,
        "hidden_sizes": outer,
        "stage_num_blocks": blocks,
        "stage_numb_of_layers": [depth] * 4,
        "use_learnable_affine_block": name == "b0",
        "out_indices": stages,
    }


# Without the map of stride 8, 300 queries need more of the others.
LARGER = [(256, 320), (160, 512)]
TINY = {
    "num_labels": 5,
    "num_queries": 11,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "backbone_config": hgnet("b0", [2, 3, 4]),
    "encoder_in_channels": [256, 512, 1024],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "depth_mult": 0.34,
}
SMALL = {
    "num_labels": 80,
    "backbone_config": hgnet("b0", [2, 3, 4]),
    "encoder_in_channels": [256, 512, 1024],
    "hidden_expansion": 0.5,
    "depth_mult": 0.34,
    "decoder_layers": 3,
    "decoder_n_points": [3, 6, 3],
    "freeze_backbone_batch_norms": False,
}
CASES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    # As D-FINE-X: an encoder wider than the decoder, and other places of edges.
    "wide encoder": {
        **TINY,
        "encoder_hidden_dim": 48,
        "decoder_in_channels": [48, 48, 48],
        "encoder_layers": 2,
        "reg_scale": 8.0,
        "max_num_bins": 16,
        "top_prob_values": 3,
        "lqe_hidden_dim": 24,
    },
    "N": {
        "num_labels": 80,
        "d_model": 128,
        "backbone_config": hgnet("b0", [3, 4]),
        "feat_strides": [16, 32],
        "num_feature_levels": 2,
        "encode_proj_layers": [1],
        "encoder_in_channels": [512, 1024],
        "encoder_hidden_dim": 128,
        "encoder_ffn_dim": 512,
        "decoder_in_channels": [128, 128],
        "decoder_ffn_dim": 512,
        "hidden_expansion": 0.34,
        "depth_mult": 0.5,
        "decoder_layers": 3,
        "decoder_n_points": [6, 6],
        "freeze_backbone_batch_norms": False,
    },
    "S": SMALL,
    "L": {
        "num_labels": 80,
        "backbone_config": hgnet("b4", [2, 3, 4]),
        "decoder_n_points": [3, 6, 3],
    },
}


def published(case: str) -> Any:
    """The library's detector from random weights, in evaluation but for the decoder's outputs."""
    config = transformers.CONFIG_MAPPING["d_fine"](**CASES[case])
    model: Any = transformers.AutoModelForObjectDetection.from_config(config).eval()
    fixed = ("decoder.up", "decoder.reg_scale", "num_points_scale")
    kept = {n: x.clone() for n, x in model.state_dict().items() if n.endswith(fixed)}
    randomize(model)
    model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        # Nothing would be left of the image otherwise.
        for name, x in model.model.backbone.named_parameters():
            if name.endswith("lab.scale"):
                x.add_(1.0)
            elif x.dim() == 4:
                x.mul_(1.4)
    for heads in ("class_embed", "bbox_embed"):
        getattr(model, heads).load_state_dict(getattr(model.model.decoder, heads).state_dict())
    # It answers in every layer in training only; what is inside stays in evaluation.
    model.model.decoder.training = True
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_layer_answers_alike(case: str) -> None:
    if case == "L":
        # So many layers' rounding lets two of its queries change places.
        with in_double():
            check_every_layer(case)
    else:
        check_every_layer(case)


def check_every_layer(case: str) -> None:
    """Every decoder layer's logits, boxes and edges within 1e-4."""
    model = published(case).to(torch.get_default_dtype())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    imported = convert(model.config.to_dict(), state, "test")
    ours = imported.detector.to(torch.get_default_dtype())
    reasons = {
        "counts training steps",
        "rows that no label ever reads",
        "follows from the points",
        "the config says it",
    }
    told = {why for why in imported.unused.values() if not why.startswith("a copy of ")}
    assert told <= reasons
    for canvas in LARGER if case == "N" else CANVASES:
        batch = images(canvas)
        with torch.no_grad():
            theirs = model(pixel_values=batch)
            memory = ours.encode(batch, torch.tensor([canvas] * 2, dtype=batch.dtype))
            output = ours.decode(memory, ours.queries(memory))[0]
        assert output.first is not None
        # The library's first entry is what the first layer says without any distribution.
        layers = zip(
            [output.first.logits, *output.logits], [output.first.boxes, *output.boxes], strict=True
        )
        for layer, (logits, boxes) in enumerate(layers):
            wanted = theirs.intermediate_logits[:, layer]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
            wanted = theirs.intermediate_reference_points[:, layer]
            torch.testing.assert_close(boxes, wanted, atol=1e-4, rtol=0)
        for layer, edges in enumerate(output.edges):
            wanted = theirs.intermediate_predicted_corners[:, layer]
            torch.testing.assert_close(edges.flatten(-2), wanted, atol=1e-4, rtol=0)
        spread = theirs.logits.std(1).mean(), theirs.pred_boxes.std(1).mean()
        assert min(spread) > 1e-2, "queries that all say the same prove nothing"


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_feature_levels", 4), ("eval_idx", 0), ("layer_scale", 2), ("decoder_method", "cubic")],
)
def test_another_architecture_is_refused(option: str, value: Any) -> None:
    document = {"model_type": "d_fine", **TINY, option: value}
    with pytest.raises(UserError, match=f"test: {option} ") as caught:
        convert(document, {}, "test")
    assert caught.value.code == "weights-config"


def test_another_backbone_is_refused() -> None:
    backbone = {**hgnet("b0", [2, 3, 4]), "use_learnable_affine_block": False}
    document = {"model_type": "d_fine", **TINY, "backbone_config": backbone}
    with pytest.raises(UserError, match="none of timm's hgnetv2_b0") as caught:
        convert(document, {}, "test")
    assert caught.value.code == "weights-backbone"


def test_weights_with_other_places_than_the_config_says_are_refused() -> None:
    document = {"model_type": "d_fine", **TINY}
    with pytest.raises(UserError, match="reg_scale 4 and the weights 8") as caught:
        convert(document, {"model.decoder.reg_scale": torch.tensor([8.0])}, "test")
    assert caught.value.code == "weights-config"
