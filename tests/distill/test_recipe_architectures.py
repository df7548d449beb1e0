"""Recipes are the published architectures: each detector is its preset, the one parity is for."""

from __future__ import annotations

import pytest

from detr.config import DetectorConfig
from detr.presets import preset
from distill.recipe import Recipe, find_recipe, load_recipe, shipped
from distill.training.optim import rate

# The preset of each recipe whose name does not tell it.
PRESETS = {
    "coco-conditional-dc5-r101": "conditional-detr-dc5-r101",
    "coco-conditional-dc5-r18": "conditional-detr-dc5-r18",
    "coco-conditional-dc5-r50": "conditional-detr-dc5-r50",
    "coco-conditional-r101": "conditional-detr-r101",
    "coco-conditional-r18": "conditional-detr-r18",
    "coco-conditional-r50": "conditional-detr-r50",
    "coco-dab-deformable-r50": "dab-deformable-detr-r50",
    "coco-dab-r101": "dab-detr-r101",
    "coco-dab-r18": "dab-detr-r18",
    "coco-dab-r50": "dab-detr-r50",
    "coco-deformable-r101": "deformable-detr-r101",
    "coco-deformable-r18": "deformable-detr-r18",
    "coco-deformable-r50": "deformable-detr-r50",
    "coco-deformable-refine-r50": "deformable-detr-refine-r50",
    "coco-detr-dc5-r101": "detr-dc5-r101",
    "coco-detr-dc5-r18": "detr-dc5-r18",
    "coco-detr-dc5-r50": "detr-dc5-r50",
    "coco-detr-r101": "detr-r101",
    "coco-detr-r18": "detr-r18",
    "coco-detr-r50": "detr-r50",
    "coco-dino-5s-r50": "dino-official-5scale-r50",
    "coco-dino-r18": "dino-mmdet-r18",
    "coco-dino-r50": "dino-mmdet-r50",
    "coco-dino-swin-l": "dino-mmdet-swin-l",
    "coco-h-deformable-r50": "h-deformable-detr-r50",
    "coco-mask-dino-r50-12e": "mask-dino-r50",
    "coco-od-dab-deformable-r50": "dab-deformable-detr-r50",
    "coco-od-deformable-r50": "deformable-detr-shared-r50",
    "coco-od-dino-5s-r50": "dino-official-5scale-r50",
    "coco-od-dino-r50-12e": "dino-official-r50",
    "coco-od-dino-r50-24e": "dino-official-r50",
    "coco-od-dino-swin-l-12e": "dino-official-swin-l",
    "coco-od-dino-swin-l-24e": "dino-official-swin-l",
    "coco-stable-dab-deformable-r50": "dab-deformable-detr-r50",
    "coco-stable-deformable-r50": "deformable-detr-refine-r50",
    "coco-stable-dino-5s-r50": "stable-dino-5scale-r50",
    "coco-stable-dino-r50-12e": "stable-dino-r50",
    "coco-stable-dino-r50-24e": "stable-dino-r50",
    "coco-stable-dino-swin-l-12e": "stable-dino-swin-l",
    "coco-stable-dino-swin-l-24e": "stable-dino-swin-l",
    "coco-stable-h-deformable-r50": "h-deformable-detr-r50",
    "coco-stable-mask-dino-r50-12e": "stable-mask-dino-r50",
}
# Small detectors of our own, from random weights.
OWN = {
    "demo-dfine",
    "demo-dino",
    "demo-elastic",
    "demo-mask-dino",
    "demo-mask-student",
    "demo-stable-mask-dino",
    "demo-rtdetr",
    "demo-student",
    "demo-student-narrow",
    "demo-student-third",
    "demo-teacher",
    "kitti-small",
}
# Stable-DINO's further baselines were trained with detrex, which freezes a ResNet's stem alone.
DETREX = {"backbone.frozen_stages": 1}
PORTS = {
    "coco-stable-dab-deformable-r50",
    "coco-stable-deformable-r50",
    "coco-stable-h-deformable-r50",
}
FAMILIES = {"dino": "dino-mmdet", "dab": "dab-detr", "deformable": "deformable-detr"}


def published(name: str) -> DetectorConfig:
    """The architecture a shipped recipe is to have, of one class."""
    if name not in PRESETS:
        # METHOD-FAMILY-TEACHER-STUDENT on COCO, the same or FAMILY-BACKBONE on KITTI.
        deim = "deim-" if "-deim-" in name else ""
        if "-dfine-" in name:
            return preset(f"{deim}d-fine-{name.rpartition('-')[2]}", 1)
        if "-rtdetrv2-" in name:
            return preset(f"{deim}rtdetrv2-{name.rpartition('-')[2]}", 1)
        for family in ("lwdetr", "rfdetr", "deimv2"):
            if f"-{family}-" in name:
                return preset(f"{family}-{name.rpartition('-')[2]}", 1)
        if "-rtdetr-" in name:
            return preset(f"rtdetr-{name.rpartition('-')[2]}", 1)
        family = next(f for f in (*FAMILIES, "conditional", "detr") if f"-{f}-" in name)
        family = {**FAMILIES, "conditional": "conditional-detr", "detr": "detr"}[family]
        dilated = "-dc5" if "-dc5-" in name else ""
        return preset(f"{family}{dilated}-{name.rpartition('-')[2]}", 1)
    found = preset(PRESETS[name], 1)
    return found.replace(**DETREX) if name in PORTS else found


def loaded(name: str) -> Recipe:
    return load_recipe(find_recipe(name))


@pytest.mark.parametrize("name", sorted(set(shipped()) - OWN))
def test_a_recipe_trains_its_presets_detector(name: str) -> None:
    detector = loaded(name).detector.for_classes(1)
    # What is done with the detections is the recipe's (Stable-DINO: NMS at 0.8).
    assert detector.model_copy(update={"nms": None}) == published(name)


@pytest.mark.parametrize("name", sorted(set(shipped()) - OWN))
def test_images_have_the_papers_sizes(name: str) -> None:
    recipe = loaded(name)
    if name.startswith("coco-rfdetr-"):
        side = {"nano": 384, "small": 512, "medium": 576, "large": 704}[name.split("-")[-1]]
        assert recipe.input.size == (side, side) and recipe.input.short is None
        return
    if name.startswith(("coco-rtdetr-", "coco-dfine-", "coco-lwdetr-", "coco-deim")):
        small = {"coco-deimv2-atto": 320, "coco-deimv2-femto": 416}
        if name in small:
            assert recipe.input.size == (small[name],) * 2 and recipe.input.short is None
            return
        assert recipe.input.size == (640, 640) and recipe.input.short is None
        return
    if "mask-dino" in name:
        assert recipe.input.size == (1024, 1024) and recipe.input.short is None
        return
    assert (recipe.input.short, recipe.input.long) == (800, 1333)
    if name.startswith("coco-"):
        assert recipe.input.size is None
        view = recipe.augment.multi_scale
        assert view is not None and recipe.augment.jitter == 0 and recipe.augment.flip == 0.5
        assert (view.short, view.long) == (tuple(range(480, 801, 32)), 1333)
        assert (view.crop, view.crop_short, view.crop_sides) == (0.5, (400, 500, 600), (384, 600))
    else:
        assert recipe.input.size == (416, 1344)


def frozen(name: str) -> int:
    return preset(name, 1).backbone.frozen_stages


def test_what_is_frozen_follows_the_code_base() -> None:
    for family in ("detr", "dab-detr", "deformable-detr", "dino-official", "dino-mmdet"):
        assert frozen(f"{family}-r50") == 2
    assert frozen("dino-r50") == frozen("stable-dino-r50") == frozen("stable-dino-5scale-r101") == 1
    assert frozen("dino-mmdet-swin-l") == frozen("stable-dino-swin-l") == 0
    assert preset("detr-r50", 1, pretrained=False).backbone.frozen_stages == 0


# DEIM's epochs: of mosaic and mixup (and where the rate begins to fall), their end, the end of the
# rate's fall, and of the run.
DEIM = {
    "dfine-n": (4, 78, None, 160),
    "dfine-s": (4, 64, 120, 132),
    "dfine-m": (4, 49, 90, 102),
    "dfine-l": (4, 29, 50, 58),
    "dfine-x": (4, 29, 50, 58),
    "rtdetrv2-r18": (4, 64, 117, 120),
    "rtdetrv2-r34": (4, 64, 117, 120),
    "rtdetrv2-r50": (4, 34, 58, 60),
    "rtdetrv2-r101": (4, 34, 58, 60),
}
DEIM = {f"deim-{name}": epochs for name, epochs in DEIM.items()}
# DEIMv2's likewise, of which the smallest have no mixup.
SMALLEST = dict.fromkeys(("deimv2-atto", "deimv2-femto", "deimv2-pico"), (4, 250, 468, 500))
DEIM |= SMALLEST | {
    "deimv2-n": (4, 78, None, 160),
    "deimv2-s": (4, 64, 120, 132),
    "deimv2-m": (4, 49, 90, 102),
    "deimv2-l": (4, 34, 60, 68),
    "deimv2-x": (4, 29, 50, 58),
}


@pytest.mark.parametrize("name", sorted(DEIM))
def test_deims_schedule_is_the_released_one(name: str) -> None:
    first, flat, end, epochs = DEIM[name]
    recipe = loaded(f"coco-{name}")
    seen = 117_266 // recipe.batch_size
    assert recipe.steps == epochs * seen and recipe.optimizer.drops == ()
    assert recipe.loss.scores == "matchability"
    small = name in SMALLEST
    assert (recipe.augment.mixup is None) == small
    for composed in (recipe.augment.mosaic, recipe.augment.mixup)[: 1 if small else 2]:
        assert composed is not None and composed.probability == (0.3 if small else 0.5)
        assert composed.between == pytest.approx((first / epochs, flat / epochs), abs=1e-4)
    warmup = recipe.optimizer.warmup_steps, recipe.optimizer.warmup_power
    assert warmup == (4000 if small else 2000, 2)
    if end is None:
        assert recipe.optimizer.cosine is None
        return
    assert recipe.optimizer.cosine == pytest.approx((flat / epochs, end / epochs), abs=1e-4)
    last = rate(recipe.steps - 1, recipe.steps, recipe.optimizer)
    assert last == recipe.optimizer.cosine_factor == 0.5


def test_schedules_are_the_released_ones() -> None:
    """Drop after 11 of 12, 20 of 24, 30 of 36 and 40 of 50 epochs, whatever line asks for them."""
    drops = {12: 11, 24: 20, 36: 30, 50: 40, 500: 400}
    for name, path in shipped().items():
        if name in OWN or "-deim" in name:
            continue
        lines = [
            x for x in path.read_text().splitlines() if x.startswith("# ") and ": --set steps=" in x
        ]
        variants = [loaded(name)]
        variants += [
            load_recipe(path, line.partition(": --set ")[2].split(" --set ")) for line in lines
        ]
        for recipe in variants:
            epoch = 7392 if name.startswith("coco-") else 374
            if name.startswith("coco-rtdetr-"):  # images with objects, and no drop at all
                assert recipe.steps == 72 * 7329 and recipe.optimizer.drops == (), name
                continue
            if name.startswith(("coco-lwdetr-", "coco-rfdetr-")):
                seen = 117_266 // recipe.batch_size
                epochs = 60 if "lwdetr" in name else 100
                assert recipe.steps == epochs * seen and recipe.optimizer.drops == (), name
                continue
            if name.startswith("coco-dfine-"):
                seen = 117_266 // recipe.batch_size
                epochs = {"n": 160, "s": 132, "m": 132, "l": 80, "x": 80}[name[-1]]
                assert recipe.steps == epochs * seen and recipe.optimizer.drops == (), name
                continue
            epochs = recipe.steps // epoch
            assert recipe.steps == epochs * epoch, name
            assert recipe.optimizer.drops == pytest.approx((drops[epochs] / epochs,), abs=1e-3), (
                name
            )


def test_what_the_papers_print_beside_the_detector() -> None:
    assert loaded("coco-od-deformable-r50").optimizer.weight_decay == 2e-5
    assert loaded("coco-od-dino-r50-12e").optimizer.weight_decay == 1e-4
    for name in shipped():
        if "clockdistill" in name:
            assert loaded(name).inherit is None, name
        if "d3etr" in name or "qskd" in name:
            assert loaded(name).inherit is not None, name
