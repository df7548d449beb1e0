"""The training loop: one step, and the run around it.

A step is a pure function of (weights, optimizer state, seed, step number): batches and every
random choice follow from (seed, step). A run that is stopped and goes on from its checkpoint
therefore ends with the very weights of a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from detr.cli_support import progress
from detr.errors import UserError
from detr.models import QueryGroup, Teacher
from distill.data.batches import Batch
from distill.distributed import World, join
from distill.evaluate import Measured, measure_ap
from distill.losses.detection import detection_losses
from distill.methods.step import Step
from distill.profiler import span
from distill.query_owners import OWNERS_FILE, record_owners
from distill.recipe import Recipe
from distill.training.accumulate import Share, note_statistics, split
from distill.training.meter import Meter, peak_megabytes
from distill.training.optim import rate, set_rate
from distill.training.run_dir import RunDir
from distill.training.state import State, set_up

# Steps whose losses are averaged into one line of metrics.jsonl.
LOG_EVERY = 20


def forward(state: State, batch: Batch, index: int, share: Share | None = None) -> Step:
    """Encodes and decodes a batch with student and teacher, all query groups in one call each.

    Args:
        state: Of the run.
        batch: On the device.
        index: The step, from 0.
        share: What a part of a step must know of the whole.
    """
    student, teacher, methods = state.student, state.step_teacher, state.methods
    attention = any(method.needs_attention for method in methods)
    maps = frozenset(role for method in methods for role in method.self_attention)
    if share is None:
        share = Share(*state.box_counts(batch.targets), *state.generators(index))
    with state.autocast():
        with span("student"):
            memory = student.encode(batch.images, batch.valid_sizes)
            own = student.queries(memory, batch.targets, share.generators, share.most)
        step = Step(
            index=index,
            images=batch.images,
            valid_sizes=batch.valid_sizes,
            targets=batch.targets,
            student=student,
            teacher=teacher,
            student_memory=memory,
            teacher_memory=None,
            student_groups=own,
            teacher_groups=[],
            normalizer=share.normalizer,
            generator=share.generator,
            generators=share.generators,
        )
        if teacher is not None:
            with torch.no_grad(), span("teacher"):
                step.teacher_memory = teacher.encode(batch.images, batch.valid_sizes)
                step.teacher_groups = teacher.queries(step.teacher_memory)
        with span("queries"):
            extra = [pair for method in methods for pair in method.groups(step)]
        if teacher is not None and step.teacher_memory is not None:
            asked = [pair.teacher for pair in extra if pair.teacher is not None]
            _check_answerable(asked, teacher)
            groups = step.teacher_groups + asked
            with torch.no_grad(), span("teacher_decoder"):
                outputs = teacher.decode(step.teacher_memory, groups, attention, maps)
            step.teacher_outputs = {output.group.role: output for output in outputs}
        with span("queries"):
            groups = step.student_groups + [p.student for p in extra if p.student is not None]
            groups += [group for method in methods for group in method.followup_groups(step)]
        with span("student_decoder"):
            outputs = student.decode(memory, groups, attention, maps)
        step.student_outputs = {output.group.role: output for output in outputs}
    return step


def _check_answerable(groups: Sequence[QueryGroup], teacher: Teacher) -> None:
    """Raises UserError ``method-teacher`` for queries a teacher cannot be asked."""
    if groups and "decode" not in teacher.offers:
        raise UserError(
            "method-teacher",
            f"{groups[0].role}: a {teacher.facts.family} teacher answers its own queries only; the "
            "method's needs() must name decode",
        )


def losses_of(state: State, step: Step) -> dict[str, Tensor]:
    """All weighted losses of a step: the detection loss and what every method adds."""
    replaced = next((m for m in state.methods if m.replaces_detection_loss), None)
    losses = None if replaced is None else replaced.detection_losses(step)
    if losses is None:
        weights = state.recipe.loss
        losses = detection_losses(
            step.student_outputs, step.targets, step.normalizer, weights, step.generators
        )
    for method in state.methods:
        losses.update(method.losses(step))
    return losses


def train_step(state: State, batch: Batch, index: int) -> dict[str, float]:
    """One optimizer step; returns the losses of all processes, their sum as ``loss``.

    Raises:
        UserError: ``loss-not-finite`` naming the step and the batch's files; no weight has moved.
    """
    recipe = state.recipe
    factor = rate(index, recipe.steps, recipe.optimizer)
    set_rate(state.optimizer, factor)
    state.optimizer.zero_grad()
    step, losses = _backward(state, batch.to(state.world.device), index)
    norm = None
    with span("optimizer"):
        state.world.average_gradients(state.trained)
        state.scaler.unscale_(state.optimizer)
        if recipe.optimizer.clip:
            norm = torch.nn.utils.clip_grad_norm_(state.parameters, recipe.optimizer.clip)
    means, norms = _read(losses, norm)
    # Of all processes, so that all stop where one process's loss is not finite.
    values = state.world.mean_values(means) | norms
    if not math.isfinite(values["loss"]):
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        files = " ".join(str(path) for path in batch.paths)
        raise UserError(
            "loss-not-finite",
            f"step {index}: {bad[0]} is {values[bad[0]]} on {files}; lower optimizer.lr or mend "
            "the labels, then run the same command again",
        )
    with span("optimizer"):
        values["lr"] = factor * recipe.optimizer.lr
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None and all(m.updates_teacher(index) for m in state.methods):
            state.ema.update(state.student, index)
    for method in state.methods:
        method.after_step(step)
    return values


# Losses of a part by name, and ``[n]`` their values.
_Losses = tuple[list[str], Tensor]


def _read(
    parts: Sequence[_Losses], norm: Tensor | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Means of the parts' losses, and the gradients' norm where there is one.

    Read at once: a GPU has nothing to do while Python waits for it.
    """
    values = [values for _, values in parts]
    numbers = iter(torch.cat(values if norm is None else [*values, norm[None]]).tolist())
    means: dict[str, float] = defaultdict(float)
    for names, _ in parts:
        for name in names:
            means[name] += next(numbers) / len(parts)
    return means, {} if norm is None else {"grad_norm": next(numbers)}


def _backward(state: State, batch: Batch, index: int) -> tuple[Step, list[_Losses]]:
    """Gradients of all parts of a step.

    Returns:
        The last part's step, and the losses of each part, their sum as ``loss``.
    """
    count = state.recipe.accumulate
    parts = split(batch, count)
    normalizer, most = state.box_counts(batch.targets)
    size = len(parts[0].targets)

    def look(part: int) -> tuple[Step, dict[str, Tensor]]:
        state.seed_dropout(index, part)
        generator, generators = state.generators(index)
        own = generators[part * size : (part + 1) * size]
        share = Share(normalizer / count, most, generator, own)
        step = forward(state, parts[part], index, share)
        with span("losses"):
            return step, losses_of(state, step)

    shared = note_statistics(count, look, state.trained) if count > 1 else None
    found: list[_Losses] = []
    for part in range(count):
        with contextlib.nullcontext() if shared is None else shared.part(first_pass=False):
            step, losses = look(part)
        terms = torch.stack(list(losses.values()))
        total = terms.sum()
        with span("backward"):
            torch.autograd.backward(state.scaler.scale(total / count))
        found.append(([*losses, "loss"], torch.cat([terms, total[None]]).detach()))
    return step, found


def train(recipe: Recipe, out: Path) -> Path:
    """Trains what a recipe says, or goes on where an earlier call stopped.

    Args:
        recipe: The run.
        out: Run directory.

    Returns:
        The saved model, ``out/model.safetensors``.

    Raises:
        UserError: Whatever is wrong with the recipe's data, teacher or output folder, and
            ``loss-not-finite``.
    """
    world = join()
    run = RunDir(out, recipe, world.main)
    if run.finished() and not run.moved:
        return _nothing_to_do(run)
    with run.alone():
        return _train(recipe, run, world)


def _nothing_to_do(run: RunDir) -> Path:
    run.say(f"{run.path}: finished, {run.recipe.steps} steps; nothing to do")
    return run.model


def _train(recipe: Recipe, run: RunDir, world: World) -> Path:
    state = set_up(recipe, run, world)
    first = state.resume(run.load_checkpoint())
    run.start(first)
    if run.finished():
        return _nothing_to_do(run)
    with run.logging():
        _run(state, run, first)
    return run.model


def _run(state: State, run: RunDir, first: int) -> None:
    """The steps from ``first`` on, and the last measurement."""
    recipe, world = state.recipe, state.world
    batches = state.batches.stream(first, recipe.steps, recipe.workers)
    meter, last_ap = Meter(), ""
    with progress(range(first, recipe.steps), recipe.name, recipe.steps) as bar:
        bar.update(first)
        bar.disable = not world.main
        for index in bar:
            batch = meter.timed(lambda: next(batches))
            for path, error in batch.left_out:
                run.leave_out(path, error)
            meter.add(train_step(state, batch, index))
            done = index + 1
            if done % LOG_EVERY == 0 or done == recipe.steps:
                means = meter.means()
                run.record(done, means)
                bar.set_postfix_str(f"loss {means['loss']:.3f}{last_ap}")
            if done == recipe.steps or due(done, recipe.checkpoint_every):
                run.save_checkpoint(state.checkpoint(done))
                world.wait()
            if done < recipe.steps and due(done, recipe.validation.every):
                last_ap = f", {validate(state, run, done, recipe.validation.images)}"
                meter = Meter()
    run.record(recipe.steps, {"peak_mb": peak_megabytes(world.device)})
    ap = validate(state, run, recipe.steps)
    run.say(f"{run.path}: finished, {recipe.steps} steps{ap and ', ' + ap}{run.left_out}")


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens now."""
    return every > 0 and done % every == 0


def validate(state: State, run: RunDir, done: int, images: int | None = None) -> str:
    """Saves the model, then measures it where there is validation data; returns the AP as text.

    Where there is a weight average, it and the student are both saved and measured.
    """
    state.save(run, done)
    results: dict[str, Measured] = {}
    text = ""
    if state.val is not None:
        recipe = state.recipe
        for name, model in state.weights.items():
            nms = recipe.detector.nms
            result = measure_ap(model, state.val, recipe.input, images, nms, run.leave_out)
            results[name] = result
            # The weights that count have plain names, the others say whose they are.
            prefix = f"{name}/" if text else ""
            run.record(done, {f"{prefix}{key}": x for key, x in result.values.items()})
            told = result.text()
            run.say(f"step {done}: {told} on {result.boxes.images} images ({name} weights)")
            text = text or told
        if run.writes:
            models = {"student": state.student}
            if state.ema is not None:
                models["average"] = state.ema.model
            kept = record_owners(done, models, state.val, recipe.input, run.leave_out)
            run.append(OWNERS_FILE, kept.model_dump_json())
        state.save_ap(run, done, results)
    return text
