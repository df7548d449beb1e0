"""HGNetv2s that timm has not: DEIMv2's, of three stages, smaller than B0.

Huang et al. 2025, Real-Time Object Detection Meets DINOv3. Registered with timm, a backbone's name
finds them. Pico's is B0 without its last stage, which needs no model of its own.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.hgnet import HighPerfGpuNet

# Of each stage: channels in, between and out, blocks, whether it halves the map, whether its
# convolutions are light, their side and their number. timm's class wants four stages; the last is
# never part of the maps.
_FIRST: dict[str, Any] = {
    "stem_type": "v2",
    "stem_chs": [16, 16],
    "stage1": [16, 16, 64, 1, False, False, 3, 3],
    "stage2": [64, 32, 256, 1, True, False, 3, 3],
}
_ATTO = {**_FIRST, "stage3": [256, 64, 256, 1, True, True, 3, 3]}
_FEMTO = {**_FIRST, "stage3": [256, 64, 512, 1, True, True, 5, 3]}


def _create(name: str, stages: dict[str, Any], pretrained: bool, **options: Any) -> Any:
    """The model of timm's class, with three maps at most."""
    outputs = stages["stage3"][2]
    unused = [outputs, 8, 8, 1, True, True, 3, 1]
    taken = options.pop("out_indices", (0, 1, 2))
    # There are no weights of them alone; timm warns of a model that says nothing about its own.
    options["pretrained_cfg"] = {"num_classes": 1000, "input_size": (3, 224, 224)}
    return build_model_with_cfg(
        HighPerfGpuNet,
        name,
        pretrained,
        model_cfg={**stages, "stage4": unused},
        feature_cfg={"flatten_sequential": True, "out_indices": taken},
        use_lab=True,
        **options,
    )


def hgnetv2_atto(pretrained: bool = False, **options: Any) -> Any:
    """0.2 M weights, maps of strides 4, 8 and 16."""
    return _create("hgnetv2_atto", _ATTO, pretrained, **options)


def hgnetv2_femto(pretrained: bool = False, **options: Any) -> Any:
    """B0 with one block in its third stage and no fourth."""
    return _create("hgnetv2_femto", _FEMTO, pretrained, **options)


def register() -> None:
    """Makes them known to timm."""
    for create in (hgnetv2_atto, hgnetv2_femto):
        register_model(create)
