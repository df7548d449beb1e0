"""GO-LSD against the same detector without it, on synthetic scenes, seed by seed.

python -m tools.go_lsd --out docs/measured/go_lsd.json

Both train a small D-FINE with FGL on the union of matches; one's layers also follow its last. One
line per run and, with ``--out``, a JSON file of all runs, which goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean

from detr.data.synth import generate
from detr.model_info import read_model_info
from distill.recipe import Recipe
from distill.training.loop import train
from tools.overfit import LOSSES, SIZE, small

METHODS: dict[str, list[str]] = {"FDR alone": [], "GO-LSD": ["go_lsd"]}


def trained(name: str, seed: int, steps: int, layers: int, folder: Path) -> dict[str, float]:
    """AP and AP50 on the held-out fifth of the scenes in a folder.

    Args:
        name: Of :data:`METHODS`.
        seed: Of weights, batches and noise.
        steps: Of eight scenes each.
        layers: Of the decoder.
        folder: Holds ``scenes``; the run goes beside them.
    """
    detector = small("d-fine")
    detector["decoder"]["layers"] = layers
    data = f"coco:{folder / 'scenes'}"
    recipe = Recipe.model_validate(
        {
            "name": "go-lsd",
            "data": {"train": f"{data}:train", "val": f"{data}:val"},
            "input": {"size": SIZE},
            "detector": detector,
            "optimizer": {"lr": 1e-3, "backbone_lr": 1e-3, "clip": 1.0, "drops": [0.8]},
            "steps": steps,
            "batch_size": 8,
            "seed": seed,
            "loss": LOSSES["d-fine"],
            "methods": METHODS[name],
            "augment": {"zoom": (1, 1), "jitter": 0},
            "checkpoint_every": steps,
        }
    )
    run = folder / f"{seed}-{len(METHODS[name])}"
    told = read_model_info(train(recipe, run).with_suffix(".json")).provenance
    return {key: round(100 * float(told[key]), 2) for key in ("ap", "ap50")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    if arguments.out is not None and arguments.out.exists():
        table = json.loads(arguments.out.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        generate(folder / "scenes", images=arguments.scenes, size=SIZE, seed=3, format="coco")
        for seed in range(arguments.seeds):
            for name in METHODS:
                key = f"{name}, seed {seed}"
                if key in table:
                    continue
                begin = time.process_time()
                table[key] = trained(name, seed, arguments.steps, arguments.layers, folder)
                table[key]["seconds"] = round(time.process_time() - begin)
                print(key, table[key], flush=True)
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps(table, indent=1) + "\n")
    for name in METHODS:
        found = [row["ap"] for key, row in table.items() if key.startswith(name)]
        print(f"{name}: mean AP {mean(found):.2f} of {len(found)} seeds")


if __name__ == "__main__":
    main()
