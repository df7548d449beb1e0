"""DEIMv2's DINOv3 backbones as the transformers library and the original repository have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detr.config import DetectorConfig, Dinov3BackboneConfig
from detr.errors import UserError
from detr.models.backbones.dinov3 import rotation_periods
from detr.models.weights.lw_detr import taps_of
from detr.models.weights.original_rt_detr import depth
from detr.models.weights.renaming import Rule
from detr.models.weights.rt_detr import check_options

# Where the tensors of both are put before the rules are asked.
_HERE = "model.conv_encoder.backbone."
_WB = "(weight|bias)"
_NORM = "(weight|bias|running_mean|running_var)"
# Options of config.json that would make another architecture, and what they are in ours.
_PLAIN: dict[str, Any] = {
    "num_channels": 3,
    "query_bias": True,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "rope_theta": 100.0,
    "reshape_hidden_states": True,
    "attention_dropout": 0.0,
}
# Channels of an attention head in all of DINOv3, and in what was distilled from it.
_HEAD = 64
# In the repository, the tensors of the distilled ones are one module further down.
_ORIGINAL = r"backbone\.dinov3\.(?:_model\.)?"
_DISTILLED = "backbone.dinov3._model."
# After which blocks maps are taken, which no tensor tells.
_TAPS, _DISTILLED_TAPS = [6, 9, 12], [4, 8, 12]
_NAMES = (
    (rf"{_ORIGINAL}patch_embed\.proj\.", f"{_HERE}embeddings.patch_embeddings."),
    (rf"{_ORIGINAL}(cls_token|mask_token)", rf"{_HERE}embeddings.\1"),
    (rf"{_ORIGINAL}storage_tokens", f"{_HERE}embeddings.register_tokens"),
    (rf"{_ORIGINAL}rope_embed\.", f"{_HERE}rope_embed."),
    (rf"{_ORIGINAL}blocks\.(\d+)\.attn\.proj\.", rf"{_HERE}model.layer.\1.attention.o_proj."),
    (rf"{_ORIGINAL}blocks\.(\d+)\.ls(\d)\.gamma", rf"{_HERE}model.layer.\1.layer_scale\2.lambda1"),
    (rf"{_ORIGINAL}blocks\.(\d+)\.mlp\.w1\.", rf"{_HERE}model.layer.\1.mlp.gate_proj."),
    (rf"{_ORIGINAL}blocks\.(\d+)\.mlp\.(?:fc1|w2)\.", rf"{_HERE}model.layer.\1.mlp.up_proj."),
    (rf"{_ORIGINAL}blocks\.(\d+)\.mlp\.(?:fc2|w3)\.", rf"{_HERE}model.layer.\1.mlp.down_proj."),
    (rf"{_ORIGINAL}blocks\.", f"{_HERE}model.layer."),
    (rf"{_ORIGINAL}norm\.", f"{_HERE}norm."),
    (r"backbone\.sta\.stem\.0\.", "model.conv_encoder.spatial_tuning_adapter.stem_conv.conv."),
    (r"backbone\.sta\.stem\.1\.", "model.conv_encoder.spatial_tuning_adapter.stem_conv.norm."),
    (r"backbone\.sta\.conv2\.0\.", "model.conv_encoder.spatial_tuning_adapter.conv2.conv."),
    (r"backbone\.sta\.conv2\.1\.", "model.conv_encoder.spatial_tuning_adapter.conv2.norm."),
    (r"backbone\.sta\.conv([34])\.1\.", r"model.conv_encoder.spatial_tuning_adapter.conv\1.conv."),
    (r"backbone\.sta\.conv([34])\.2\.", r"model.conv_encoder.spatial_tuning_adapter.conv\1.norm."),
    (r"backbone\.convs\.(\d)\.", r"model.conv_encoder.fusion_proj.\1.conv."),
    (r"backbone\.norms\.(\d)\.", r"model.conv_encoder.fusion_proj.\1.norm."),
)  # fmt: skip
# A tensor that only such checkpoints of the repository have.
MARK = "backbone.sta.stem.0.weight"


def config_of(published: Mapping[str, Any], place: str) -> Dinov3BackboneConfig:
    """The backbone of a ``config.json``.

    Raises:
        UserError: ``weights-config`` for an option we have no architecture for.
    """
    inner = published["backbone_config"]
    check_options(inner, _PLAIN, place)
    width, heads = inner.get("hidden_size", 384), inner.get("num_attention_heads", 6)
    if width != _HEAD * heads:
        raise UserError(
            "weights-config",
            f"{place}: {heads} heads of {width} channels, not {_HEAD} in each",
        )
    taps = taps_of(inner, place)
    if len(taps) != 3:
        raise UserError("weights-config", f"{place}: maps after blocks {list(taps)}, not three")
    return Dinov3BackboneConfig(
        patch=inner.get("patch_size", 16),
        width=width,
        heads=heads,
        taps=taps,
        drop_path=inner.get("drop_path_rate", 0.0),
        ffn=inner.get("intermediate_size", 1536),
        # The library's conversion left GELU where the original has SiLU.
        activation="swiglu" if inner.get("use_gated_mlp", False) else "gelu",
        registers=inner.get("num_register_tokens", 0),
        first_scale=inner.get("layerscale_value", 1.0),
        final_norm=inner.get("apply_layernorm", True),
        norm_eps=inner.get("layer_norm_eps", 1e-5),
        detail=published.get("spatial_tuning_adapter_inplanes", 16),
    )


def published_of(tensors: Mapping[str, Tensor], place: str) -> dict[str, Any]:
    """What a ``config.json`` would say of the backbone of the repository's checkpoint.

    Raises:
        UserError: ``weights-backbone`` where it is none of those we know.
    """
    distilled = any(name.startswith(_DISTILLED) for name in tensors)
    root = _DISTILLED if distilled else _DISTILLED.removesuffix("_model.")
    kernel = tensors.get(f"{root}patch_embed.proj.weight")
    if kernel is None:
        raise UserError("weights-backbone", f"{place}: the backbone is no DINOv3")
    gated = f"{root}blocks.0.mlp.w1.weight" in tensors
    tokens = tensors.get(f"{root}storage_tokens")
    return {
        "model_type": "dinov3_vit",
        "patch_size": kernel.shape[-1],
        "hidden_size": len(kernel),
        "num_attention_heads": len(kernel) // _HEAD,
        "num_hidden_layers": depth(tensors, f"{root}blocks"),
        "intermediate_size": len(tensors[f"{root}blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"]),
        "use_gated_mlp": gated,
        "num_register_tokens": 0 if tokens is None else tokens.shape[1],
        "layerscale_value": 1e-5 if f"{root}blocks.0.ls1.gamma" in tensors else None,
        "apply_layernorm": f"{root}norm.weight" in tensors,
        "layer_norm_eps": 1e-6 if distilled else 1e-5,
        "out_indices": _DISTILLED_TAPS if distilled else _TAPS,
    }


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The repository's tensors of a backbone in the library's terms; others stay as they are.

    A mask that was kept of biases is applied to them.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(rf"{_ORIGINAL}blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            if found[2] == "bias_mask":
                continue
            mask = tensors.get(f"{name}_mask")
            whole = tensor if mask is None else tensor * mask
            for letter, part in zip("qkv", whole.chunk(3), strict=True):
                named[f"{_HERE}model.layer.{found[1]}.attention.{letter}_proj.{found[2]}"] = part
            continue
        for pattern, replacement in _NAMES:
            name, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        named[name] = tensor
    return named


def adapt(tensors: dict[str, Tensor]) -> None:
    """Fills in what the library has not, a key's bias and the periods, and flattens, in place."""
    query = re.compile(re.escape(f"{_HERE}model.layer.") + r"\d+\.attention\.q_proj\.bias")
    for name in [n for n in tensors if query.fullmatch(n)]:
        key = name.replace("q_proj", "k_proj")
        tensors.setdefault(key, torch.zeros_like(tensors[name]))
        tensors.setdefault(f"{_HERE}rope_embed.periods", rotation_periods(_HEAD))
    for token in ("cls_token", "register_tokens"):
        if (found := tensors.get(f"{_HERE}embeddings.{token}")) is not None:
            tensors[f"{_HERE}embeddings.{token}"] = found[0]


def rules(config: DetectorConfig) -> list[Rule]:
    """Where the tensors go, the convolutions that join maps and details too."""
    backbone = config.backbone
    if not isinstance(backbone, Dinov3BackboneConfig):
        return []
    # One linear map, whose first half is the gate.
    half = "#1" if backbone.activation == "swiglu" else ""
    here = re.escape(_HERE)
    layer, ours = rf"{here}model\.layer\.(\d+)\.", r"backbone.blocks.\1."
    adapter = r"model\.conv_encoder\.spatial_tuning_adapter\."
    join = r"model\.conv_encoder\.fusion_proj\.(\d)\."
    attention = [
        Rule(rf"{layer}attention\.{letter}_proj\.{_WB}", rf"{ours}query_key_value.\2#{i}")
        for i, letter in enumerate("qkv")
    ]
    return [
        Rule(rf"{here}embeddings\.mask_token", None, "of the backbone's pretraining"),
        Rule(rf"{here}embeddings\.cls_token", "backbone.first_tokens#0"),
        Rule(rf"{here}embeddings\.register_tokens", "backbone.first_tokens#1"),
        Rule(rf"{here}embeddings\.patch_embeddings\.{_WB}", r"backbone.embed.\1"),
        Rule(rf"{here}rope_embed\.periods", "backbone.periods"),
        Rule(
            rf"{here}norm\.{_WB}",
            r"backbone.final_norm.\1" if backbone.final_norm else None,
            "of a norm that its maps do not go through",
        ),
        *attention,
        Rule(rf"{layer}attention\.o_proj\.{_WB}", ours + r"output.\2"),
        Rule(rf"{layer}norm1\.{_WB}", ours + r"norm.\2"),
        Rule(rf"{layer}norm2\.{_WB}", ours + r"ffn_norm.\2"),
        Rule(rf"{layer}mlp\.gate_proj\.{_WB}", ours + r"expand.\2#0"),
        Rule(rf"{layer}mlp\.up_proj\.{_WB}", ours + r"expand.\2" + half),
        Rule(rf"{layer}mlp\.down_proj\.{_WB}", ours + r"contract.\2"),
        Rule(rf"{layer}layer_scale1\.lambda1", ours + "scale"),
        Rule(rf"{layer}layer_scale2\.lambda1", ours + "ffn_scale"),
        Rule(rf"{adapter}stem_conv\.(.+)", r"backbone.adapter.stem.\1"),
        *(
            Rule(rf"{adapter}conv{i + 2}\.(.+)", rf"backbone.adapter.steps.{i}.\1")
            for i in range(3)
        ),
        Rule(rf"{join}conv\.weight", r"neck.projections.\1.0.weight"),
        Rule(rf"{join}norm\.{_NORM}", r"neck.projections.\1.1.\2"),
    ]
