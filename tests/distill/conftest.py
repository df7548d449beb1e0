"""A tiny data set, a recipe that trains on it in seconds, and its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from detr.data.synth import generate
from distill.recipe import Recipe

SIZE = (64, 128)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KITTI folder of ten small scenes, eight of them for training."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate(folder, images=10, size=SIZE, seed=3, format="kitti")
    return folder


@pytest.fixture()
def tiny(scenes: Path) -> Recipe:
    """Six steps of a detector of a few thousand weights."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"train": f"kitti:{scenes}:train", "val": f"kitti:{scenes}:val"},
            "input": {"size": SIZE},
            "detector": {
                "backbone": {
                    "name": "resnet18",
                    "options": {
                        "stem_type": "deep",
                        "stem_width": 4,
                        "channels": [8, 8, 16, 16],
                        "layers": [1, 1, 1, 1],
                    },
                },
                "width": 32,
                "attention_heads": 2,
                "dropout": 0.1,
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
            "optimizer": {
                "lr": 1e-3,
                "backbone_lr": 1e-3,
                "clip": 1.0,
                "warmup_steps": 2,
                "drops": [0.8],
            },
            "steps": 6,
            "batch_size": 2,
            "ema": 0.9,
            "checkpoint_every": 3,
        }
    )
