"""A hundred training steps on the GPU against the same steps on the CPU.

The whole loop: a teacher with a method, denoising, matching on every layer, weight average,
optimizer. The first steps must agree, for they start from the same weights; later ones drift apart
in the last bits, so there the losses' means are compared.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detr.data.synth import generate
from detr.errors import UserError
from distill.distributed import World
from distill.recipe import Recipe
from distill.training.loop import train_step
from distill.training.run_dir import RunDir
from distill.training.state import State, set_up
from tools.gpu_check.part import Device, Parts, Setting, Skipped
from tools.gpu_check.place import Place

SIZE = (64, 128)
STEPS = 100
METHOD = "clockdistill"
_FIRST, _LAST = 5, 20
# Relative: of each of the first steps' losses, and of the mean of the last ones.
_FIRST_ALLOWED, _LAST_ALLOWED = 2e-3, 0.2
_HALF_ALLOWED = 5e-2  # of the first steps' where a GPU computes in bfloat16


def training(setting: Setting) -> Parts:
    """In float32 and, on a GPU, in bfloat16."""
    return {amp: partial(compared, setting.device, STEPS, amp) for amp in ("off", "bf16")}


def recipe(scenes: Path, steps: int, amp: str) -> Recipe:
    """A detector of a few thousand weights that is small enough for a CPU to keep up."""
    backbone: dict[str, Any] = {"name": "resnet18"}
    backbone["options"] = {
        "stem_type": "deep",
        "stem_width": 4,
        "channels": [8, 8, 16, 16],
        "layers": [1, 1, 1, 1],
    }
    return Recipe.model_validate(
        {
            "name": "gpu-check",
            "data": {"train": f"coco:{scenes}:train", "val": None},
            "input": {"size": SIZE},
            "amp": amp,
            "detector": {
                "backbone": backbone,
                "width": 32,
                "attention_heads": 2,
                "dropout": 0.0,  # generators of two devices draw different numbers
                "encoder": {"layers": 1, "ffn": 32, "points": 2},
                "queries": {"kind": "mixed", "number": 12, "denoising": {"number": 10}},
                "decoder": {
                    "layers": 2,
                    "ffn": 32,
                    "cross_attention": {"points": 2},
                    "refinement": {"kind": "look_forward_twice"},
                    "final_norm": True,
                },
            },
            "optimizer": {"lr": 1e-3, "backbone_lr": 1e-3, "clip": 1.0, "drops": [0.8]},
            "teacher": "demo-teacher",
            "methods": [METHOD],
            "steps": steps,
            "batch_size": 2,
            "ema": 0.9,
            "checkpoint_every": steps,
        }
    )


def losses(device: Device, scenes: Path, folder: Path, steps: int, amp: str) -> list[float]:
    """The loss of each step."""
    asked = recipe(scenes, steps, amp)
    world = World(0, 1, torch.device(device))
    state: State = set_up(asked, RunDir(folder, asked, True), world)
    return [train_step(state, state.batches.batch(i), i)["loss"] for i in range(steps)]


def compared(device: Device, steps: int, amp: str) -> dict[str, Any]:
    """Both devices' losses; on the CPU the same steps twice."""
    Place(device)
    with tempfile.TemporaryDirectory() as scratch:
        scenes = Path(scratch) / "scenes"
        generate(scenes, images=10, size=SIZE, seed=3, format="coco")
        try:
            curves = [
                losses(where, scenes, Path(scratch) / str(turn), steps, amp)
                for turn, where in enumerate(("cpu", device))
            ]
        except UserError as error:
            raise RuntimeError(str(error)) from error
        except ModuleNotFoundError as error:
            raise Skipped(f"{error.name} is not installed") from error
    allowed = _FIRST_ALLOWED if amp == "off" or device == "cpu" else _HALF_ALLOWED
    found: dict[str, Any] = {"cpu": curves[0], "device": curves[1]}
    pairs = list(zip(*curves, strict=True))
    first = max(abs(a - b) / a for a, b in pairs[:_FIRST])
    ends = [math.fsum(curve[-_LAST:]) / len(curve[-_LAST:]) for curve in curves]
    last = abs(ends[0] - ends[1]) / ends[0]
    found |= {"first_steps": first, "last_steps": last}
    if not (first <= allowed and last <= _LAST_ALLOWED):
        found["failed"] = f"losses differ by {first:.2g} at first and by {last:.2g} in the end"
    elif steps >= STEPS and not ends[1] < pairs[0][1]:
        found["failed"] = f"loss {pairs[0][1]:.3g} at first, {ends[1]:.3g} in the end"
    return found
