"""Which query stands for which object: kept during a run, and compared afterwards.

A run keeps the final layer's matches of a few validation images at every validation, a few hundred
bytes each, so that how much they change needs no old checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from detr.data.dataset import Dataset, evenly_spaced
from detr.data.preprocess import PreprocessConfig, preprocess
from detr.models import Detector, GroupOutput, Memory, Target
from distill.data.batches import target_of
from distill.data.unreadable import LeaveOut, readable
from distill.losses.detection import proposal_targets
from distill.losses.matcher import match
from distill.losses.matches import Matches
from distill.teachers.chosen_classes import ChosenClasses

# Images whose matches a run keeps, and the file they go to.
RECORDED_IMAGES, OWNERS_FILE = 16, "matching.jsonl"
_BATCH = 4

# Query of every object of an image, -1 for an object without one.
Owners = list[int]


class OwnerRecord(BaseModel):
    """Matches after some training steps.

    Attributes:
        step: Finished steps.
        student: Per image, the query of every object.
        average: The same of the weight average, where there is one.
    """

    step: int
    student: list[Owners]
    average: list[Owners] | None = None


@dataclass
class Answer:
    """What a detector says about a batch.

    Attributes:
        indices: The images.
        targets: Their objects.
        valid_sizes: ``[B, 2]`` (height, width) inside the canvas.
        canvas: (height, width) of the padded batch.
        memory: The encoder's output.
        output: The own queries, with attention.
    """

    indices: list[int]
    targets: list[Target]
    valid_sizes: Tensor
    canvas: tuple[int, int]
    memory: Memory
    output: GroupOutput


@torch.no_grad()
def answers(
    detector: Detector | ChosenClasses,
    dataset: Dataset,
    config: PreprocessConfig,
    indices: Sequence[int],
    attention: bool = False,
) -> Iterator[Answer]:
    """Runs a detector, in evaluation mode for the time, with all its layers' answers."""
    device = next(detector.parameters()).device
    for start in range(0, len(indices), _BATCH):
        chunk = list(indices[start : start + _BATCH])
        images = [dataset.image(i) for i in chunk]
        inputs = preprocess(images, config)
        targets = [
            target_of(dataset.labels(i), (image.shape[0], image.shape[1])).to(device)
            for i, image in zip(chunk, images, strict=True)
        ]
        valid = torch.from_numpy(inputs.valid_sizes).to(device)
        training = detector.training
        detector.eval()
        memory = detector.encode(torch.from_numpy(inputs.images).to(device), valid)
        output = detector.decode(memory, detector.queries(memory), attention)[0]
        detector.train(training)
        canvas = inputs.images.shape[-2], inputs.images.shape[-1]
        yield Answer(chunk, targets, valid, canvas, memory, output)


def layer_owners(answer: Answer) -> list[list[Owners]]:
    """Query of every object by layer and image; encoder proposals come first where there are any.

    A proposal and the query made from it have the same number.
    """
    output = answer.output
    found: list[list[Owners]] = []
    if (proposals := output.group.proposals) is not None:
        logits, boxes, targets = proposal_targets(proposals, answer.targets)
        found += _owners(match(logits, boxes, targets), 1, targets)
    matches = match(
        torch.stack(output.logits),
        torch.stack(output.boxes),
        answer.targets,
        no_object=output.no_object,
    )
    return found + _owners(matches, len(output.logits), answer.targets)


def _owners(matches: Matches, layers: int, targets: Sequence[Target]) -> list[list[Owners]]:
    table = [[[-1] * len(target.labels) for target in targets] for _ in range(layers)]
    columns = (matches.layer, matches.image, matches.query, matches.box)
    for layer, image, query, box in zip(*(c.tolist() for c in columns), strict=True):
        table[layer][image][box] = query
    return table


def final_owners(
    detector: Detector, dataset: Dataset, config: PreprocessConfig, indices: Sequence[int]
) -> list[Owners]:
    """Query of every object in the final layer, per image."""
    found: list[Owners] = []
    for answer in answers(detector, dataset, config, indices):
        found += layer_owners(answer)[-1]
    return found


def record_owners(
    step: int,
    models: Mapping[str, Detector],
    dataset: Dataset,
    config: PreprocessConfig,
    leave_out: LeaveOut | None = None,
) -> OwnerRecord:
    """The record of ``student`` and, if given, ``average`` after some steps."""
    chosen = evenly_spaced(len(dataset), RECORDED_IMAGES)
    indices = [i for i, _ in readable(dataset, chosen, leave_out)]
    found = {name: final_owners(model, dataset, config, indices) for name, model in models.items()}
    return OwnerRecord(step=step, student=found["student"], average=found.get("average"))


def read_owner_records(path: Path) -> list[OwnerRecord]:
    """A run's records by step; of repeated steps the last."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    rows = [OwnerRecord.model_validate_json(line) for line in lines]
    by_step = {row.step: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def instability(before: Sequence[Owners], after: Sequence[Owners]) -> float:
    """Queries per image that stand for another object than before (DN-DETR section 3.1, IS).

    A query that gains, loses or changes its object counts once, so the most an image can add is
    twice its number of objects.
    """
    changes = 0
    for old, new in zip(before, after, strict=True):
        theirs = {query: box for box, query in enumerate(old) if query >= 0}
        ours = {query: box for box, query in enumerate(new) if query >= 0}
        changes += sum(theirs.get(q) != ours.get(q) for q in theirs.keys() | ours.keys())
    return changes / max(1, len(before))


def consistency(first: Sequence[Owners], second: Sequence[Owners]) -> float:
    """Share of objects for which two models match the same query (OD-DETR figure 5), percent."""
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a, b, strict=True)]
    return 100 * sum(a == b for a, b in pairs) / max(1, len(pairs))
