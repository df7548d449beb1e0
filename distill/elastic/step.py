"""One step of an elastic training: every canvas is seen once, and several models answer.

Backbone and encoder run once for a canvas, as deep as the deepest model there needs; the output of
a layer is the memory of the model that ends with it. Decoder and losses are each model's own, and
the loss is the mean over the models, in which the largest weighs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detr.models import Memory
from distill.data.batches import Batch
from distill.elastic.choices import Source
from distill.elastic.network import ElasticNetwork, Trained
from distill.methods.step import TeacherKind
from distill.profiler import span
from distill.training.accumulate import Share
from distill.training.forward import Answered, Look, Pass, Seen, answer, look, losses_of
from distill.training.state import State

# Against 1 of any other model: all but the largest pull shared weights towards fewer layers.
_LARGEST = 1.5


def passes(state: State, network: ElasticNetwork, batch: Batch, index: int) -> list[Pass]:
    """The looks at a step's images, one for each canvas.

    Args:
        state: Of the run.
        network: Its models.
        batch: On the device, with those of smaller canvases.
        index: The step, from 0.
    """
    everyone = network.trained(index)
    total = sum(_weight(model) for model in everyone)
    found = []
    for size in dict.fromkeys(model.draw.choice.size for model in everyone):
        images = batch if size is None else batch.smaller.get(size, batch)
        models = [model for model in everyone if model.draw.choice.size == size]
        found.append(Pass(images, _look(state, network, models, total, index)))
    return found


def _weight(model: Trained) -> float:
    """Share of a model in a step's loss, against the others'."""
    return _LARGEST if model.draw.role == "largest" else 1.0


def _look(
    state: State, network: ElasticNetwork, models: Sequence[Trained], total: float, index: int
) -> Look:
    """What looks at the images of one canvas, or at a part of them."""

    def look_at(batch: Batch, share: Share) -> tuple[list[Answered], dict[str, Tensor]]:
        answered = _answers(state, network, models, batch, index, share)
        losses: dict[str, Tensor] = {}
        with span("losses"):
            for model, one in zip(models, answered, strict=True):
                terms = losses_of(one.step, model.methods, state.recipe.loss).values()
                loss = torch.stack(list(terms)).sum() * (_weight(model) / total)
                role = model.draw.role
                losses[role] = losses[role] + loss if role in losses else loss
        return answered, losses

    return look_at


def _answers(
    state: State,
    network: ElasticNetwork,
    models: Sequence[Trained],
    batch: Batch,
    index: int,
    share: Share,
) -> list[Answered]:
    """What all models of a canvas say."""
    sources = {model.draw.source for model in models}
    deepest = state.student
    if "largest" not in sources:
        deepest = max(models, key=lambda model: model.draw.choice.encoder_layers).detector
    seen: dict[Source, dict[TeacherKind, Seen]] = {}
    answered = []
    with state.autocast():
        with span("student"):
            memory = deepest.encode(batch.images, batch.valid_sizes)
        if "teacher" in sources:
            seen["teacher"] = {kind: look(x, batch) for kind, x in state.teachers.items()}
        if "largest" in sources:
            with torch.no_grad(), span("teacher"):
                known = _detached(memory)
                largest = Seen(network.largest, known, network.largest.queries(known))
                seen["largest"] = dict.fromkeys(state.teachers, largest)
        for model in models:
            own = at_depth(memory, model.draw.choice.encoder_layers)
            teachers = seen[model.draw.source]
            step = answer(model.detector, own, teachers, model.methods, batch, index, share)
            answered.append(Answered(step, model.methods))
    return answered


def at_depth(memory: Memory, layers: int) -> Memory:
    """The memory of an encoder's first layers (``encoder.nested``).

    Args:
        memory: Of as many layers, or of more.
        layers: How many.
    """
    if layers == len(memory.layers) - 1:
        return memory
    return replace(memory, tokens=memory.layers[layers], layers=memory.layers[: layers + 1])


def _detached(memory: Memory) -> Memory:
    """The same without gradient."""
    return replace(
        memory,
        tokens=memory.tokens.detach(),
        positions=memory.positions.detach(),
        features=[x.detach() for x in memory.features],
        layers=[x.detach() for x in memory.layers],
    )
