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
from distill.data.batches import Batch
from distill.distributed import World, join
from distill.elastic.step import passes
from distill.evaluate import Measured, measure_ap
from distill.profiler import span
from distill.query_owners import OWNERS_FILE, record_owners
from distill.recipe import Recipe
from distill.training.accumulate import Share, note_statistics, split
from distill.training.forward import Answered, Pass, whole
from distill.training.meter import Meter, peak_megabytes
from distill.training.optim import rate, set_rate
from distill.training.run_dir import RunDir
from distill.training.state import State, set_up

# Steps whose losses are averaged into one line of metrics.jsonl.
LOG_EVERY = 20


def train_step(state: State, batch: Batch, index: int) -> dict[str, float]:
    """One optimizer step; returns the losses of all processes, their sum as ``loss``.

    Raises:
        UserError: ``loss-not-finite`` naming the step and the batch's files; no weight has moved.
    """
    recipe = state.recipe
    factor = rate(index, recipe.steps, recipe.optimizer)
    set_rate(state.optimizer, factor)
    state.optimizer.zero_grad()
    batch = batch.to(state.world.device)
    if state.elastic is None:
        seen = [whole(state, batch, index)]
    else:
        seen = passes(state, state.elastic, batch, index)
    answered: list[Answered] = []
    losses: list[_Losses] = []
    for one in seen:
        last, found = _backward(state, one, index)
        answered += last
        losses += found
    norm = None
    with span("optimizer"):
        state.world.average_gradients(state.trained)
        state.scaler.unscale_(state.optimizer)
        if recipe.optimizer.clip:
            norm = torch.nn.utils.clip_grad_norm_(state.parameters, recipe.optimizer.clip)
    means, norms = _read(losses, norm, recipe.accumulate)
    # Of all processes, so that all stop where one process's loss is not finite.
    values = state.world.mean_values(means) | norms
    if not math.isfinite(values["loss"]):
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        files = " ".join(str(path) for image in batch.paths for path in image)
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
    for one_student in answered:
        for method in one_student.methods:
            method.after_step(one_student.step.towards(method.teacher))
    return values


# Losses of a part by name, and ``[n]`` their values.
_Losses = tuple[list[str], Tensor]


def _read(
    parts: Sequence[_Losses], norm: Tensor | None, count: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over a pass's ``count`` parts, summed over passes, and the gradients' norm if any.

    Read at once: a GPU has nothing to do while Python waits for it.
    """
    values = [values for _, values in parts]
    numbers = iter(torch.cat(values if norm is None else [*values, norm[None]]).tolist())
    means: dict[str, float] = defaultdict(float)
    for names, _ in parts:
        for name in names:
            means[name] += next(numbers) / count
    return means, {} if norm is None else {"grad_norm": next(numbers)}


def _backward(state: State, seen: Pass, index: int) -> tuple[list[Answered], list[_Losses]]:
    """Adds the gradients of all parts of a pass.

    Returns:
        Who answered the last part, and the losses of each part, their sum as ``loss``.
    """
    count = state.recipe.accumulate
    parts = split(seen.batch, count)
    normalizer, most = state.box_counts(seen.batch.targets)
    size = len(parts[0].targets)

    def look(part: int) -> tuple[list[Answered], dict[str, Tensor]]:
        state.seed_dropout(index, part)
        generator, generators = state.generators(index)
        own = generators[part * size : (part + 1) * size]
        share = Share(normalizer / count, most, generator, own)
        return seen.look(parts[part], share)

    shared = note_statistics(count, look, state.trained) if count > 1 else None
    found: list[_Losses] = []
    answered: list[Answered] = []
    for part in range(count):
        with contextlib.nullcontext() if shared is None else shared.part(first_pass=False):
            answered, losses = look(part)
        terms = torch.stack(list(losses.values()))
        total = terms.sum()
        with span("backward"):
            torch.autograd.backward(state.scaler.scale(total / count))
        found.append(([*losses, "loss"], torch.cat([terms, total[None]]).detach()))
    return answered, found


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
