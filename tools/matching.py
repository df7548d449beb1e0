"""Times the alignment of student and teacher queries: a plain loop, ours over all queries, local.

python -m tools.matching [IMAGES LAYERS]

By default 16 images and 6 layers of 900 x 900 queries with seven objects an image; half the
queries are near some object, as trained detectors' are. Processor seconds of one thread, the median
of three turns; with several cores the assignments of ours run side by side.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from detr.models import Target, cxcywh_to_xyxy
from distill.losses.costs import MatchingCosts
from distill.methods.parts.prediction_pairs import PairWeights, Predictions
from distill.methods.parts.query_selection import Alignment, global_pairs, local_pairs
from distill.training.cpu import prepare_cpu

QUERIES, CLASSES, OBJECTS, TURNS = 900, 80, 7, 3
WEIGHTS = PairWeights(1.0, 5.0, 2.0)
ALIGNMENT = Alignment(0.0, MatchingCosts(), WEIGHTS)


def scene(images: int, seed: int) -> list[Target]:
    """Ground truth of a batch."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for _ in range(images):
        sides = 0.05 + 0.3 * torch.rand(OBJECTS, 2, generator=generator)
        centers = sides / 2 + (1 - sides) * torch.rand(OBJECTS, 2, generator=generator)
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        targets.append(Target(torch.cat((centers, sides), 1), labels, torch.zeros(0, 4)))
    return targets


def answers(targets: list[Target], layers: int, seed: int) -> Predictions:
    """What a trained detector says: every second query is near an object, the others anywhere."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, len(targets), QUERIES)
    truth = torch.stack([t.boxes for t in targets])[None, :, :].expand(layers, -1, -1, -1)
    owner = torch.randint(OBJECTS, shape, generator=generator)
    near = truth.gather(2, owner[..., None].expand(*shape, 4))
    near = near * (1 + 0.3 * torch.randn(*shape, 4, generator=generator))
    free = torch.rand(*shape, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.2, 0.2])
    chosen = torch.rand(*shape, 1, generator=generator) < 0.5
    logits = torch.randn(*shape, CLASSES, generator=generator) - 4
    labels = torch.stack([t.labels for t in targets])[None].expand(layers, -1, -1).gather(2, owner)
    logits = logits + 4 * (chosen & (F.one_hot(labels, CLASSES) > 0))
    return Predictions(logits, torch.where(chosen, near, free).clamp(0.01, 0.99))


def plain(student: Predictions, teacher: Predictions) -> list[object]:
    """One problem after the other: its costs from the definition, then scipy."""
    found: list[object] = []
    for layer in range(len(student.boxes)):
        for image in range(student.boxes.shape[1]):
            ours, theirs = student[layer, image], teacher[layer, image]  # type: ignore[index]
            scores = theirs.logits.sigmoid()
            entropy = F.softplus(ours.logits).sum(1)[:, None] - ours.logits @ scores.T
            l1 = torch.cdist(ours.boxes, theirs.boxes, p=1)
            overlap = generalized_box_iou(cxcywh_to_xyxy(ours.boxes), cxcywh_to_xyxy(theirs.boxes))
            cost = WEIGHTS.classes * entropy + WEIGHTS.l1 * l1 + WEIGHTS.giou * (1 - overlap)
            found.append(linear_sum_assignment(cost.numpy()))
    return found


def main() -> None:
    given = [int(x) for x in sys.argv[1:]]
    images, layers = given or (16, 6)
    prepare_cpu()  # as every training does
    torch.set_num_threads(1)
    targets = scene(images, 0)
    student, teacher = answers(targets, layers, 1), answers(targets, layers, 2)
    ways: dict[str, Callable[[], object]] = {
        "plain loop": lambda: plain(student, teacher),
        "global": lambda: global_pairs(student, teacher, WEIGHTS),
        "local": lambda: local_pairs(targets, student, teacher, ALIGNMENT),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append(time.process_time() - begin)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        print(f"{name:<10} {value:8.3f} s")
    print(f"global is {median['plain loop'] / median['global']:.1f} x faster than the plain loop")
    print(f"local is {median['global'] / median['local']:.1f} x faster than global")
    print(f"local is {median['plain loop'] / median['local']:.1f} x faster than the plain loop")


if __name__ == "__main__":
    main()
