"""Every original repository's detector against what its own code answers; see golden/README.md."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from detr.models.weights.original import convert

GOLDEN = Path(__file__).parent / "golden"
# (height, width) of a canvas and of the images on it; the second is no multiple of any stride.
CANVASES = [
    ((128, 192), ((128, 192), (90, 130))),
    ((101, 167), ((70, 167), (101, 111))),
]
TABLES = {"query_embed", "refpoint_embed", "tgt_embed", "label_enc", "patterns"} | {
    "level_embed",
    "level_embeds",
}


def weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of natural size that follows from its name."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    x = generator.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) < 2:
        x = 0.1 * x + float(name.endswith("weight"))
    elif not TABLES & set(name.split(".")):
        x = x / np.sqrt(np.float32(np.prod(shape[1:])))
    return torch.from_numpy(x.astype(np.float32))


def state_dict(golden) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, shape in zip(golden["names"].tolist(), golden["shapes"].tolist(), strict=True):
        shared = shape.startswith("=")
        state[name] = (
            state[shape[1:]].clone() if shared else weight(name, [int(n) for n in shape.split("x")])
        )
    return state


def images(canvas, sizes) -> torch.Tensor:
    """Coarse noise: every token of fine noise looks like every other."""
    coarse = np.random.RandomState(0).standard_normal((len(sizes), 3, 4, 6)).astype(np.float32)
    rows, columns = np.arange(canvas[0]) * 4 // canvas[0], np.arange(canvas[1]) * 6 // canvas[1]
    batch = 4 * coarse[:, :, rows][:, :, :, columns]
    for image, (height, width) in zip(batch, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return torch.from_numpy(batch)


def assert_close(ours: list[torch.Tensor] | torch.Tensor, theirs: np.ndarray) -> None:
    ours = torch.stack(ours) if isinstance(ours, list) else ours
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.npz")))
def test_same_answers(case):
    golden = np.load(GOLDEN / f"{case}.npz")
    options = json.loads(golden["options"].item())
    detector = convert(state_dict(golden), case, options).detector
    for i, (canvas, sizes) in enumerate(CANVASES):
        with torch.no_grad():
            memory = detector.encode(
                images(canvas, sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            groups = detector.source.training_groups(memory)
            groups[0] = detector.queries(memory)[0]
            own, *more = detector.decode(memory, groups)
        assert_close(own.logits, golden[f"logits_{i}"])
        assert_close(own.boxes, golden[f"boxes_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-3, "queries that all say the same prove nothing"
        if f"proposal_boxes_{i}" in golden:
            proposals = own.group.proposals
            assert_close(proposals.logits, golden[f"proposal_logits_{i}"])
            assert_close(proposals.boxes, golden[f"proposal_boxes_{i}"])
        if f"many_boxes_{i}" in golden:
            assert_close(more[0].logits, golden[f"many_logits_{i}"])
            assert_close(more[0].boxes, golden[f"many_boxes_{i}"])


def test_every_family_is_held():
    families = {"detr", "conditional", "dab", "deformable", "dn-dab", "dn-deformable"} | {
        "dab-deformable",
        "h-deformable",
        "dino",
        "detrex-dino",
    }
    assert families <= {path.stem for path in GOLDEN.glob("*.npz")}
