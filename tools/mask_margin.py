"""What cutting masks to their boxes is worth, by how far around the box pixels are kept.

    python -m tools.mask_margin [--steps 900] [--keep FOLDER]

Trains a small Mask DINO on 176 synthetic scenes of 128 x 256 and prints AP of its masks on them and
on 44 others: cut to the box grown on every side by some share of its size, and not cut at all.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from detr.data import open_dataset
from detr.data.synth import generate
from detr.mask_scaling import MaskScaling
from detr.metrics import coco_ap
from detr.metrics.coco_ap import Accuracy
from detr.types import Detections
from distill.recipe import Recipe
from distill.training.loop import train
from engines import open_engine
from tools.overfit import LOSSES, small

# The last reaches over the whole image from any box of a few pixels.
MARGINS = (0.0, 0.1, 0.25, 0.5, 10.0)


def trained(folder: Path, steps: int) -> Path:
    """The run, unless it is there already."""
    scenes, run = folder / "scenes", folder / "run"
    generate(scenes, images=220, size=(128, 256), seed=3, format="coco", val_fraction=0.2)
    if not (run / "model.safetensors").exists():
        recipe = {
            "name": "masks",
            "data": {"train": f"coco:{scenes}:train", "val": f"coco:{scenes}:val"},
            "input": {"size": (96, 192)},
            "detector": small("mask-dino", masks=True),
            "optimizer": {"lr": 1e-3, "backbone_lr": 1e-3, "clip": 1.0, "drops": [0.8]},
            "steps": steps,
            "batch_size": 4,
            "loss": LOSSES["mask-dino"],
            "checkpoint_every": steps,
        }
        train(Recipe.model_validate(recipe), run)
    return run


def compare(run: Path, data: str) -> None:
    """Prints a line per margin."""
    engine = open_engine(run)
    dataset = open_dataset(data, engine.info.classes)
    raw = [engine.run(engine.prepare([dataset.image(i)])) for i in range(len(dataset))]
    for margin in MARGINS:
        found: list[Detections] = []
        for one in raw:
            assert one.masks is not None
            masks = replace(one.masks, scaling=MaskScaling(margin=margin))
            cut = replace(one, masks=masks)
            found += cut.detections(cut.enlarged())
        ap = coco_ap.evaluate(dataset, found, accuracy=Accuracy(overlap="segm"))
        print(f"{data.rpartition(':')[2]}, margin {margin:g}: mask AP {ap.ap:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--keep", type=Path, help="folder of a run to take, or to keep it in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = trained(folder, options.steps)
        for split in ("val", "train"):
            compare(run, f"coco:{folder / 'scenes'}:{split}")


if __name__ == "__main__":
    main()
