"""CLoCKDistill's equation 9 as printed and as KD-DETR's code has it, on the same steps.

python -m tools.equation9

The demo student, as it starts, is asked the demo teacher's points about synthetic scenes. For each
reading: the three terms, the length of their gradient in the student, as a multiple of the
detection loss's, and the cosine of its angle to the gradient of the default. Means over batches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr.data.synth import generate
from distill.distributed import join
from distill.methods.step import Step
from distill.recipe import find_recipe, load_recipe
from distill.training.forward import forward, losses_of
from distill.training.run_dir import RunDir
from distill.training.state import State, set_up

NAME = "clockdistill"
TERMS = tuple(f"{NAME}/{term}" for term in ("class", "l1", "giou"))
# What a reading changes of the default.
READINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no factor T²": {"squared_temperature": False},
    "softmax weights": {"confidence": "softmax"},
    "no normalizer": {"normalize": False},
    "as printed": {"squared_temperature": False, "confidence": "softmax", "normalize": False},
}


def prepare(options: dict[str, Any], data: Path, scratch: Path) -> State:
    """The demo student before its first step, with one reading."""
    overrides = (
        f"data.train=kitti:{data}:train",
        "data.val=null",
        "batch_size=4",
        f"methods={json.dumps([{NAME: options}])}",
    )
    recipe = load_recipe(find_recipe("demo-student"), overrides)
    return set_up(recipe, RunDir(scratch, recipe, True), join())


def gradient(state: State, total: Tensor) -> Tensor:
    """Of the student's weights, in one row."""
    parts = torch.autograd.grad(total, state.parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(state.parameters, parts, strict=True)
        ]
    )


def look(state: State, index: int) -> Step:
    """One batch, seen by student and teacher."""
    state.seed_dropout(index)
    return forward(state, state.batches.batch(index), index)


def main() -> None:
    """Prints one row of a Markdown table per reading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=4, help="of 4 images each")
    count = parser.parse_args().batches
    rows: dict[str, list[Tensor]] = {}
    reference: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        generate(data, 6 * count, (96, 320), seed=0)
        for number, (reading, options) in enumerate(READINGS.items()):
            state = prepare(options, data, Path(folder) / f"run{number}")
            for index in range(count):
                losses = losses_of(look(state, index), state.methods, state.recipe.loss)
                terms = [losses.pop(term) for term in TERMS]
                detection = torch.stack([x for n, x in losses.items() if NAME not in n]).sum()
                mine, base = gradient(state, torch.stack(terms).sum()), gradient(state, detection)
                if reading == "default":
                    reference.append(mine)
                cosine = torch.cosine_similarity(mine, reference[index], 0)
                values = [*(term.detach() for term in terms), mine.norm() / base.norm(), cosine]
                rows.setdefault(reading, []).append(torch.stack(values))
    print("| reading | class | L1 | GIoU | gradient | cosine |\n|---|---|---|---|---|---|")
    for reading, found in rows.items():
        told = " | ".join(f"{value:.3g}" for value in torch.stack(found).mean(0).tolist())
        print(f"| {reading} | {told} |")


if __name__ == "__main__":
    main()
