"""Files of the LW-DETR and RF-DETR repositories are read as the library's are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from detr.config import AnyVitConfig
from detr.errors import UserError
from detr.models.weights import hugging_face
from detr.models.weights.cli import weights
from detr.models.weights.original import convert
from tests.models.test_parity_lw_detr import TINY, VIT, library
from tests.models.test_parity_rf_detr import DINO

# In the repositories' heads: 32 channels each, in deformable attention 16; a ViT has 12 heads.
COMMON = {**TINY, "decoder_self_attention_heads": 1, "decoder_cross_attention_heads": 2}
# Published depths, since nothing in a file's tensors tells which blocks have windows.
LW = {**VIT, "num_hidden_layers": 6, "num_attention_heads": 12}
LW |= {"window_block_indices": [0, 2, 4], "out_indices": [2, 4, 6]}
RF = {**DINO, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 1}
RF |= {"patch_size": 16, "image_size": 96, "out_indices": [3, 6, 9, 12]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lw_detr": ("lw_detr", {**COMMON, "backbone_config": LW}),
    "lw_detr, two levels": (
        "lw_detr",
        {**COMMON, "backbone_config": LW, "projector_scale_factors": [2.0, 0.5]},
    ),
    "rf_detr": (
        "rf_detr",
        {**COMMON, "backbone_config": RF, "layer_norm_eps": 1e-6, "dropout": 0.0},
    ),
}
CASES["rf_detr"][1].pop("projector_scale_factors")
VIT_NAMES = (
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.intermediate\.", r"blocks.\1.mlp."),
    (r"encoder\.layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.([qv])_proj\.bias", r"blocks.\1.attn.\2_bias"),
    (r"encoder\.layer\.(\d+)\.(gamma_[12])", r"blocks.\1.\2"),
)
DINO_NAMES = (
    (r"(encoder\.layer\.\d+)\.attention\.q_proj\.", r"encoder.\1.attention.attention.query."),
    (r"(encoder\.layer\.\d+)\.attention\.k_proj\.", r"encoder.\1.attention.attention.key."),
    (r"(encoder\.layer\.\d+)\.attention\.v_proj\.", r"encoder.\1.attention.attention.value."),
    (r"(encoder\.layer\.\d+)\.attention\.o_proj\.", r"encoder.\1.attention.output.dense."),
    ("", "encoder."),
)
NAMES = (
    (r"(.+)\.projector_layer\.conv(\d)\.", r"\1.0.cv\2."),
    (r"(.+)\.projector_layer\.bottlenecks\.(\d)\.conv(\d)\.", r"\1.0.m.\2.cv\3."),
    (r"(.+)\.layer_norm\.", r"\1.1."),
)
DECODER = (
    (r"self_attn_layer_norm\.", "norm1."),
    (r"cross_attn_layer_norm\.", "norm2."),
    (r"layer_norm\.", "norm3."),
    (r"mlp\.fc", "linear"),
    (r"self_attn\.o_proj\.", "self_attn.out_proj."),
)


def original(name: str, kind: str) -> str:
    """A tensor of the library's as the repositories call it, but for joined projections."""
    if (inner := name.removeprefix("model.backbone.backbone.")) != name:
        table = VIT_NAMES if kind == "lw_detr" else DINO_NAMES
        return "backbone.0.encoder." + first(inner, table)
    if (inner := name.removeprefix("model.backbone.projector.")) != name:
        inner = inner if inner.startswith("scale_layers.") else f"scale_layers.0.{inner}"
        sampled = re.sub(
            r"scale_layers\.(\d)\.sampling_layers\.(\d)\.layers", r"stages_sampling.\1.\2", inner
        )
        if sampled == inner:
            sampled = first(re.sub(r"scale_layers\.", "stages.", inner), NAMES)
        return "backbone.0.projector." + re.sub(
            r"((?:cv\d|stages_sampling\.\d\.\d\.\d))\.norm\.", r"\1.bn.", sampled
        )
    if found := re.match(r"model\.(decoder\.layers\.\d+\.)(.+)", name):
        return f"transformer.{found[1]}" + first(found[2], DECODER)
    name = name.replace("model.decoder.layernorm.", "transformer.decoder.norm.")
    name = name.replace("model.reference_point_embed.", "refpoint_embed.")
    name = name.replace("model.query_feat.", "query_feat.")
    return re.sub(r"^model\.", "transformer.", name)


def first(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name, count=1)
    return name


def as_original(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A state dict with projections stacked as the repositories stack them."""
    out = {original(name, kind): x for name, x in state.items()}
    for name in [n for n in out if n.endswith("self_attn.q_proj.weight")]:
        owner = name.removesuffix("q_proj.weight")
        for part in ("weight", "bias"):
            stacked = [out.pop(f"{owner}{letter}_proj.{part}") for letter in "qkv"]
            out[f"{owner}in_proj_{part}"] = torch.cat(stacked)
    for name in [n for n in out if re.search(r"backbone\.0\.encoder\..+q_proj\.weight", n)]:
        number = re.findall(r"layer\.(\d+)", name)[0]
        owner = name.removesuffix("q_proj.weight")
        stacked = [out.pop(f"{owner}{letter}_proj.weight") for letter in "qkv"]
        out[f"backbone.0.encoder.blocks.{number}.attn.qkv.weight"] = torch.cat(stacked)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_as_the_librarys_folder(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    model = library(kind, options)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    folder = hugging_face.convert(model.config.to_dict(), dict(state), "folder")
    wanted = folder.detector
    tensors = as_original(state, kind)
    found = convert(tensors, "file")
    assert found.detector.config == wanted.config
    own = wanted.state_dict()
    for name, tensor in found.detector.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert not found.notes
    # The published files' size: RF-DETR's is as large as it has positions.
    assert found.preprocess.size == ((96, 96) if kind == "rf_detr" else (640, 640))
    assert folder.preprocess == found.preprocess

    # What the training's options tell comes before what sizes do.
    numbers, taps = ([0, 3, 5], (1, 4, 6)) if kind == "lw_detr" else ([1, 4, 9, 12], (1, 4, 9, 12))
    other = convert(tensors, "file", {"out_feature_indexes": numbers})
    assert isinstance(other.detector.config.backbone, AnyVitConfig)
    assert other.detector.config.backbone.taps == taps

    path = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors}, path)
    out = tmp_path / "ours.safetensors"
    arguments = ["import", str(path), "--out", str(out), "--size", "96x160", "--json"]
    result = CliRunner().invoke(weights, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(out.with_suffix(".json").read_text())["preprocess"]["size"] == [96, 160]


def test_weights_under_another_license_say_so() -> None:
    """Roboflow's XL and 2XL: DINOv2 of width 768 under a decoder of width 512."""
    backbone = {**RF, "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    backbone |= {"out_indices": [1], "patch_size": 20, "image_size": 40}
    options = {
        "num_labels": 5,
        "num_queries": 3,
        "group_detr": 1,
        "decoder_layers": 1,
        "decoder_ffn_dim": 8,
        "backbone_config": backbone,
    }
    for width, free in ((512, False), (384, True)):
        heads = {
            "decoder_self_attention_heads": width // 32,
            "decoder_cross_attention_heads": width // 16,
        }
        model = library("rf_detr", {**options, **heads, "d_model": width})
        found = hugging_face.convert(model.config.to_dict(), dict(model.state_dict()), "folder")
        assert any("Platform Model License" in note for note in found.notes) != free


@pytest.mark.parametrize(
    ("change", "reason", "code"),
    [
        ({"segmentation_head.x": torch.zeros(1)}, "segmentation head", "weights-config"),
        ({"backbone.0.encoder.pos_embed": None}, "no ViT and no DINOv2", "weights-backbone"),
        (
            {"backbone.0.encoder.blocks.6.gamma_1": torch.ones(24)},
            "no published size has 7 blocks",
            "weights-config",
        ),
    ],
)
def test_what_cannot_be_read_is_told(change: dict[str, Any], reason: str, code: str) -> None:
    kind, options = CASES["lw_detr"]
    tensors = as_original(dict(library(kind, options).state_dict()), kind)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    with pytest.raises(UserError, match=reason) as caught:
        convert(tensors, "file")
    assert caught.value.code == code
