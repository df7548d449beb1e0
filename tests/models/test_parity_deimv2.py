"""DEIMv2's folders of the transformers library, read as the network they were trained as.

The library's port norms tokens before it judges them, makes positions anew in every layer and has
ReLU in its heads, none of which the original code has (whose answers test_parity_original.py
holds). Over a gated DINOv3 it has GELU where that has SiLU, and over a distilled one a last norm
that it has not. Put right in these, it answers as ours does, in every decoder layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from detr.errors import UserError
from detr.models.weights.hugging_face import convert, read_folder
from tests.models.test_parity_d_fine import TINY, hgnet
from tests.models.test_parity_rt_detr import images, randomize

HYBRID = {
    **TINY,
    "decoder_activation_function": "silu",
    "decoder_n_points": [3, 6, 3],
    "freeze_backbone_batch_norms": False,
}
B0 = hgnet("b0", [3])
FEMTO = {
    **{key: x[:3] if isinstance(x, list) else x for key, x in B0.items()},
    "stage_num_blocks": [1, 1, 1],
    "stage_names": ["stem", "stage1", "stage2", "stage3"],
    "stage_downsample": [False, True, True],
    "stage_light_block": [False, False, True],
    "stage_kernel_size": [3, 3, 5],
    "depths": [3, 3, 3],
    "out_indices": [3],
}
LITE = {
    **HYBRID,
    "encoder_type": "lite",
    "encoder_layers": 0,
    "feat_strides": [16],
    "num_feature_levels": 2,
    "encoder_in_channels": [512],
    "decoder_in_channels": [32, 32],
    "decoder_n_points": [4, 2],
    "use_gateway": False,
    "share_bbox_head": True,
    "backbone_config": FEMTO,
}
DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "out_indices": [1, 2, 4],
    "num_register_tokens": 2,
}
OVER_DINOV3 = {
    **HYBRID,
    "encoder_in_channels": [32, 32, 32],
    "encoder_has_trailing_conv": False,
    "spatial_tuning_adapter_inplanes": 8,
    "backbone_config": DINOV3,
}
CASES: dict[str, dict[str, Any]] = {
    "dinov3": OVER_DINOV3,
    "gated dinov3": {
        **OVER_DINOV3,
        "backbone_config": {
            **DINOV3,
            "use_gated_mlp": True,
            "apply_layernorm": False,
            "num_register_tokens": 0,
        },
    },
    "hybrid": HYBRID,
    "without last convolutions": {**HYBRID, "encoder_has_trailing_conv": False},
    "lite": LITE,
}


class First(nn.Module):
    """Says to whatever follows what it said first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.said = inner, None

    def forward(self, x: Tensor) -> Tensor:
        self.said = self.inner(x) if self.said is None else self.said
        return self.said

    def forget(self) -> None:
        self.said = None


def named_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """With buffers that no file has."""
    return [*model.named_parameters(), *model.named_buffers()]


def published(case: str) -> Any:
    """The library's detector from random weights, with what its conversion leaves of the norm."""
    config = transformers.CONFIG_MAPPING["deimv2"](**CASES[case])
    model: Any = transformers.AutoModelForObjectDetection.from_config(config).eval()
    fixed = ("decoder.up", "decoder.reg_scale", "num_points_scale", "inv_freq")
    kept = {n: x.clone() for n, x in named_tensors(model) if n.endswith(fixed)}
    randomize(model)
    with torch.no_grad():
        for name, x in named_tensors(model):
            if name in kept:
                x.copy_(kept[name])
        for name, x in model.model.conv_encoder.named_parameters():
            if name.endswith("lab.scale"):
                x.add_(1.0)
            elif x.dim() == 4:
                x.mul_(1.4)
        linear, norm = model.model.enc_output
        linear.weight.copy_(torch.eye(len(linear.weight)))
        norm.weight.fill_(1.0)
        for x in (linear.bias, norm.bias):
            x.zero_()
    for heads in ("class_embed", "bbox_embed"):
        getattr(model, heads).load_state_dict(getattr(model.model.decoder, heads).state_dict())
    return model


def put_right(model: Any) -> Any:
    """The library's detector as the original code has it."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Deimv2MLP" and ".encoder." not in name:
            module.act = nn.SiLU()
        elif type(module).__name__ == "DINOv3ViTGatedMLP":
            module.act_fn = nn.SiLU()
    backbone = getattr(model.model.conv_encoder, "backbone", None)
    if backbone is not None and not backbone.config.apply_layernorm:
        backbone.norm = nn.Identity()
    model.model.enc_output = nn.Identity()
    model.model.decoder.query_pos_head = First(model.model.decoder.query_pos_head)
    model.model.decoder.training = True
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_layer_answers_alike(case: str) -> None:
    model = published(case)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    imported = convert(model.config.to_dict(), state, "test")
    told = {why for why in imported.unused.values() if not why.startswith("a copy of ")}
    told -= {"of the backbone's pretraining", "of a norm that its maps do not go through"}
    assert told == {
        "counts training steps",
        "rows that no label ever reads",
        "follows from the points",
        "the config says it",
        "untrained, of a norm that only the transformers library has",
    }
    ours, theirs_right = imported.detector, put_right(model)
    for canvas in ((128, 128), (160, 160)):
        batch = images(canvas)
        with torch.no_grad():
            theirs_right.model.decoder.query_pos_head.forget()
            theirs = theirs_right(pixel_values=batch)
            memory = ours.encode(batch, torch.tensor([canvas] * 2, dtype=batch.dtype))
            output = ours.decode(memory, ours.queries(memory))[0]
        assert output.first is not None
        logits = torch.stack([output.first.logits, *output.logits], 1)
        boxes = torch.stack([output.first.boxes, *output.boxes], 1)
        edges = torch.stack(output.edges, 1).flatten(-2)
        for mine, wanted in (
            (logits, theirs.intermediate_logits),
            (boxes, theirs.intermediate_reference_points),
            (edges, theirs.intermediate_predicted_corners),
        ):
            torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=0)
        spread = theirs.logits.std(1).mean(), theirs.pred_boxes.std(1).mean()
        assert min(spread) > 1e-2, "queries that all say the same prove nothing"


def test_a_saved_folder_is_read(tmp_path) -> None:
    published("lite").save_pretrained(tmp_path)
    found = read_folder(tmp_path, (320, 320))
    assert found.detector.config.backbone.name == "hgnetv2_femto"
    assert found.family == "deimv2" and found.preprocess.std == (255.0,) * 3


def test_a_dinov3_has_its_images_and_its_license() -> None:
    model = published("dinov3")
    found = convert(model.config.to_dict(), dict(model.state_dict()), "test")
    assert found.preprocess.mean != (0.0,) * 3
    assert any("DINOv3 License" in note for note in found.notes)


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("rope_theta", 10.0, "weights-config"),
        ("num_attention_heads", 4, "weights-config"),
        ("out_indices", [2, 4], "weights-config"),
    ],
)
def test_another_dinov3_is_refused(option: str, value: Any, code: str) -> None:
    document = {**OVER_DINOV3, "backbone_config": {**DINOV3, option: value}}
    with pytest.raises(UserError, match="test: ") as caught:
        convert({"model_type": "deimv2", **document}, {}, "test")
    assert caught.value.code == code


def test_a_trained_norm_is_another_network() -> None:
    model = published("lite")
    with torch.no_grad():
        model.model.enc_output[1].bias.add_(0.1)
    with pytest.raises(UserError, match="was trained; the original DEIMv2 has no") as caught:
        convert(model.config.to_dict(), dict(model.state_dict()), "test")
    assert caught.value.code == "weights-config"


@pytest.mark.parametrize(
    ("option", "value"),
    [("encoder_fuse_op", "cat"), ("layer_scale", 2), ("encoder_type", "heavy")],
)
def test_another_architecture_is_refused(option: str, value: Any) -> None:
    document = {"model_type": "deimv2", **LITE, option: value}
    with pytest.raises(UserError, match=f"test: {option} ") as caught:
        convert(document, {}, "test")
    assert caught.value.code == "weights-config"


def test_another_backbone_is_refused() -> None:
    backbone = {**FEMTO, "stage_num_blocks": [1, 1, 4]}
    document = {"model_type": "deimv2", **LITE, "backbone_config": backbone}
    with pytest.raises(UserError, match="no HGNetv2 of three stages") as caught:
        convert(document, {}, "test")
    assert caught.value.code == "weights-backbone"
