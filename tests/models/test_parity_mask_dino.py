"""Mask DINO against what its own code answers; see golden/README.md."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from detr.models.weights.original import convert
from tests.models.test_parity_original import GOLDEN, assert_close, images, state_dict

FOLDER = GOLDEN / "mask_dino"
# Its code takes images that fill their canvas, a multiple of 32 (height, width).
CANVASES = ((128, 192), (96, 160))
EVERY = 5  # rows and columns of masks that are stored


def thinned(masks: torch.Tensor) -> torch.Tensor:
    return masks[..., ::EVERY, ::EVERY]


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(path.stem for path in FOLDER.glob("*.npz")))
def test_same_answers(case):
    golden = np.load(FOLDER / f"{case}.npz")
    imported = convert(state_dict(golden), case, json.loads(golden["options"].item()))
    detector = imported.detector
    # In training the decoder also says what its heads see before the first layer.
    detector.decoder.train()
    for i, canvas in enumerate(CANVASES):
        sizes = (canvas, canvas)
        with torch.no_grad():
            memory = detector.encode(
                images(canvas, sizes), torch.tensor(sizes, dtype=torch.float32)
            )
            (own,) = detector.decode(memory, detector.queries(memory))
            layers = range(len(own.logits))
            masks = [memory.pixels.masks(own.initial.masks), *map(own.mask_logits, layers)]
        assert_close([own.initial.logits, *own.logits], golden[f"logits_{i}"])
        assert_close([own.initial.boxes, *own.boxes], golden[f"boxes_{i}"])
        assert_close(thinned(torch.stack(masks)), golden[f"masks_{i}"])
        proposals = own.group.proposals
        assert_close(proposals.logits, golden[f"proposal_logits_{i}"])
        assert_close(proposals.boxes, golden[f"proposal_boxes_{i}"])
        wanted = thinned(memory.pixels.masks(proposals.masks))
        assert_close(wanted, golden[f"proposal_masks_{i}"])
        spread = golden[f"logits_{i}"][-1].std(1).mean(), golden[f"boxes_{i}"][-1].std(1).mean()
        assert min(spread) > 1e-3, "queries that all say the same prove nothing"
