"""Whether every architecture can learn four images by heart.

python -m tools.overfit --out docs/measured/overfit.json
python -m tools.overfit dino detr --steps 800
python -m tools.overfit rtdetr d-fine --masks --out docs/measured/overfit.json

Trains a detector of a few thousand weights on four synthetic scenes, through the whole training
loop, and measures AP on the same four. A target, mask or gradient that is wrong shows here: such a
detector stays far below one that is only small. One line per family and, with ``--out``, one entry
of a JSON file, where the other families' stay; the exit status is 1 if one is below AP50 0.9. With
``--masks`` a family without masks gets a light mask head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from detr.config import (
    AnchorQueriesConfig,
    ContrastiveDenoisingConfig,
    Dinov2BackboneConfig,
    GroupedQueriesConfig,
    MixedQueriesConfig,
    OneToManyConfig,
    PlainDenoisingConfig,
    ProjectorNeckConfig,
    SelectedQueriesConfig,
    TwoStageQueriesConfig,
    UnifiedQueriesConfig,
    VitBackboneConfig,
)
from detr.data.synth import generate
from detr.model_info import read_model_info
from detr.presets import FAMILIES, preset
from distill.recipe import Recipe
from distill.training.loop import train

SIZE = (64, 128)
ENOUGH = 0.9
# What a family's own training changes of the detection loss, and what it adds.
_RT_DETR = {"scores": "varifocal"}
_D_FINE: dict[str, Any] = {"edges": 0.15, "box_pairs": "union"}
_LW_DETR = {"scores": "iou_aware"}
# A map of 16 x 32 cells needs no 12,544 points.
_MASK_DINO = {"focal": 4.0, "cost_class": 4.0, "mask_points": 256}
LOSSES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("rtdetr", "rtdetrv2", "rtdetrv2-discrete"), _RT_DETR),
    **dict.fromkeys(("mask-dino", "stable-mask-dino"), _MASK_DINO),
    **dict.fromkeys(("lwdetr", "rfdetr"), _LW_DETR),
    "d-fine": {"scores": "varifocal", **_D_FINE},
    "deim-d-fine": {"scores": "matchability", **_D_FINE},
    "deimv2": {"scores": "matchability", **_D_FINE},
    "deim-rtdetrv2": {"scores": "matchability"},
}
_VIT: dict[str, Any] = {
    "patch": 8,
    "width": 64,
    "heads": 4,
    "side": 8,
    "windows": 2,
    "windowed": (0, 2),
    "taps": (2, 4),
}
# Families whose sizes have no ResNet.
VITS: dict[str, dict[str, Any]] = {
    "lwdetr": {"backbone": VitBackboneConfig(**_VIT), "neck": ProjectorNeckConfig(blocks=1)},
    "rfdetr": {
        "backbone": Dinov2BackboneConfig(**_VIT),
        "neck": ProjectorNeckConfig(blocks=1, norm="layer"),
    },
}
METHODS: dict[str, list[str]] = {
    "d-fine": ["go_lsd"],
    "deim-d-fine": ["go_lsd"],
    "deimv2": ["go_lsd"],
}


def small(family: str, masks: bool = False) -> dict[str, Any]:
    """A family's detector with a small backbone and transformer, everything else its own.

    Args:
        family: One of the presets' families.
        masks: It has masks, whether or not that is its own.
    """
    config = preset(f"{family}-r18", 1, pretrained=False)
    backbone: dict[str, Any] = {"name": "test_resnet", "first_projection": False}
    if config.neck.levels == 1:
        # Four scenes of 8 cells at stride 32 would say little; dilation keeps the last map finer.
        backbone |= {"strides": (16,), "options": {"output_stride": 16}}
    queries: dict[str, Any] = {"number": 24}
    match config.queries:
        case TwoStageQueriesConfig(one_to_many=OneToManyConfig()):
            queries["one_to_many"] = {"queries": 36, "repeat": 3}
        case (
            MixedQueriesConfig(denoising=ContrastiveDenoisingConfig())
            | SelectedQueriesConfig(denoising=ContrastiveDenoisingConfig())
        ):
            queries["denoising"] = {"number": 20}
        case GroupedQueriesConfig():
            queries["groups"] = 3
        case UnifiedQueriesConfig():
            # Between cells' numbers the boxes of masks of one cell have no size.
            queries |= {"denoising": {"number": 20}, "initial_boxes": "bitmask"}
        case AnchorQueriesConfig(denoising=PlainDenoisingConfig()):
            queries["denoising"] = {"groups": 3}
    encoder: dict[str, Any] = {"layers": min(1, config.encoder.layers), "ffn": 128}
    decoder: dict[str, Any] = {"layers": 2, "ffn": 128}
    if config.encoder.sampling_points:
        encoder["points"] = 2
    if points := config.decoder.cross_attention.sampling_points:
        decoder["cross_attention"] = {"points": 2 if isinstance(points, int) else (1, 2, 1)}
        if config.decoder.cross_attention.own_heads:
            decoder["cross_attention"]["heads"] = 8
    heads: dict[str, Any] = {}
    if config.heads.masks is not None:
        heads["masks"] = {"width": 32}
    elif masks:
        heads["masks"] = {"width": 32, "channels": 32}
    changed = config.replace(
        heads=heads,
        width=64,
        attention_heads=4,
        dropout=0.0,
        backbone=backbone,
        encoder=encoder,
        queries=queries,
        decoder=decoder,
        detections=48,
    )
    changed = changed.replace(**VITS.get(family, {}))
    return {**changed.model_dump(), "num_classes": 0}


def overfit(family: str, steps: int, folder: Path, masks: bool = False) -> dict[str, float]:
    """AP50 on the four scenes that a family's detector was trained on.

    Returns:
        ``ap50`` of boxes and, for a family with masks, ``mask_ap50``.

    Args:
        family: One of the presets' families.
        steps: Each sees all four scenes.
        folder: For the scenes and the run; new or empty.
        masks: A family without masks gets a light mask head.
    """
    # Four fifths of the scenes are the training split.
    generate(folder / "scenes", images=5, size=SIZE, seed=3, format="coco")
    data = f"coco:{folder / 'scenes'}:train"
    recipe = Recipe.model_validate(
        {
            "name": family,
            "data": {"train": data, "val": data},
            "input": {"size": SIZE},
            "detector": small(family, masks),
            "optimizer": {"lr": 1e-3, "backbone_lr": 1e-3, "clip": 1.0, "drops": [0.8]},
            "steps": steps,
            "batch_size": 4,
            "loss": {**LOSSES.get(family, {}), **({"mask_points": 256} if masks else {})},
            "methods": METHODS.get(family, []),
            "augment": {"flip": 0, "zoom": (1, 1), "jitter": 0},
            "checkpoint_every": steps,
        }
    )
    weights = train(recipe, folder / "run")
    told = read_model_info(weights.with_suffix(".json")).provenance
    return {name: told[name] for name in ("ap50", "mask_ap50") if name in told}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    failed = False
    table: dict[str, dict[str, float]] = {}
    if arguments.out is not None and arguments.out.exists():
        table = json.loads(arguments.out.read_text())
    for family in arguments.families:
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            found = overfit(family, arguments.steps, Path(scratch), arguments.masks)
        spent = time.process_time() - begin
        told = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        light = arguments.masks and FAMILIES[family].heads.masks is None
        name = f"{family} with masks" if light else family
        print(f"{name:28} {told} after {arguments.steps} steps, {spent:.0f} s of processor")
        failed |= min(found.values()) < ENOUGH
        table[name] = {
            **{key: round(value, 3) for key, value in found.items()},
            "steps": arguments.steps,
            "seconds": round(spent),
        }
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(table, indent=1) + "\n")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
