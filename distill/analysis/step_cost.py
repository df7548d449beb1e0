"""What distilling costs: a training step split into its parts, for every method (QSKD table 7).

Student and teacher have random weights and the images are noise with boxes drawn on a grid of
sizes: the time of a step depends on shapes, not on what is learned. All methods take turns, so that
what else the machine does falls on all of them, and medians over the turns are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch
from pydantic import BaseModel

from detr.cli_support import emit, json_option, progress
from detr.config import DetectorConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector, build_detector
from detr.presets import preset
from distill.analysis.noise import Noise
from distill.data.batches import Batches
from distill.distributed import World, join
from distill.losses.weights import LossWeights
from distill.methods import METHODS, build_methods, find_method, parse_methods
from distill.profiler import Clock, Part
from distill.recipe import DataRecipe, DetectorRecipe, Recipe, load_recipe, shipped
from distill.teachers.open import freeze
from distill.training.cpu import prepare_cpu, trained_format
from distill.training.ema import Ema
from distill.training.loop import train_step
from distill.training.optim import build_optimizer
from distill.training.state import State

# Of COCO.
CLASSES = 80
# The two steps others are compared with: labels alone, and a teacher that answers unheard.
PLAIN, TAUGHT = "none", "teacher"
# Largest share of a step that matching and losses may take, and that QSKD may add.
SHARE = 0.1

Options = dict[str, Any]


class StepCost(BaseModel):
    """Median milliseconds of one method's step.

    Attributes:
        method: Its name; ``none`` learns from labels alone, ``teacher`` from labels while the
            teacher answers its own queries: the student's step and the teacher's inference.
        student: Forward pass of the student's own and denoising queries.
        teacher: Inference of the teacher.
        extra_queries: Making and decoding further queries, in both decoders, and handing out
            attention maps; forward only.
        matching: Assignments, those of the detection loss included.
        losses: The rest of the losses.
        backward: Backward pass.
        optimizer: Gradient norm, optimizer, weight average.
        total: The whole step.
        added: Share of ``total`` beyond the plain step and the teacher's inference.
        matching_and_losses: Their share of ``total``.
        cheap: Whether that share stays within a tenth, and for QSKD what it adds as well.
    """

    method: str
    student: float
    teacher: float
    extra_queries: float
    matching: float
    losses: float
    backward: float
    optimizer: float
    total: float
    added: float
    matching_and_losses: float
    cheap: bool


class StepCosts(BaseModel):
    """The table; ``added`` and ``cheap`` are its verdicts.

    Attributes:
        student: Name of the student's detector.
        teacher: Name of the teacher's.
        size: (height, width) of the canvas.
        batch_size: Images.
        device: Where it ran.
        threads: Of torch on the CPU.
        clock: ``processor`` or ``wall`` time.
        turns: Steps behind each median.
        rows: ``none``, ``teacher``, then one per method.
        left_out: Of all methods those that these detectors cannot run, and why.
    """

    student: str
    teacher: str
    size: tuple[int, int]
    batch_size: int
    device: str
    threads: int
    clock: str
    turns: int
    rows: list[StepCost]
    left_out: list[str] = []

    def text(self) -> str:
        """The table as Markdown, milliseconds and shares."""
        parts = ["student", "teacher", "extra_queries", "matching", "losses", "backward"]
        parts += ["optimizer", "total"]
        heads = ["method", *(p.replace("_", " ") for p in parts), "added", "matching + losses"]
        heads += ["within 10 %"]
        lines = [
            f"{self.student} taught by {self.teacher}, {self.batch_size} x {self.size[0]} x "
            f"{self.size[1]}, {self.device}, {self.threads} threads: ms of {self.clock} time, "
            f"median of {self.turns}",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + "---|" * len(heads),
        ]
        for row in self.rows:
            cells = [row.method, *(f"{getattr(row, p):.0f}" for p in parts)]
            cells += [f"{100 * row.added:+.1f} %", f"{100 * row.matching_and_losses:.1f} %"]
            cells += ["yes" if row.cheap else "no"]
            lines.append("| " + " | ".join(cells) + " |")
        if self.left_out:
            lines += ["", *(f"left out: {reason}" for reason in self.left_out)]
        return "\n".join(lines)


def time_steps(
    student: DetectorConfig,
    teacher: DetectorConfig,
    methods: Sequence[str],
    size: tuple[int, int],
    batch_size: int,
    turns: int,
    options: Mapping[str, Options] | None = None,
    loss: LossWeights | None = None,
    left_out: list[str] | None = None,
) -> list[StepCost]:
    """Times the steps of every method and of the plain student.

    Args:
        student: The network that is trained.
        teacher: The frozen one.
        methods: Names, each possibly several joined by ``+``.
        size: Canvas, pixels.
        batch_size: Images.
        turns: Timed steps per method, after one that is not.
        options: Of methods by name; their defaults where there are none.
        loss: Weights of the detection loss, and how many points of masks it looks at.
        left_out: Takes the reason of every method that cannot be built, which then has no row.

    Raises:
        UserError: What :func:`distill.methods.build_methods` raises, without ``left_out``.
    """
    prepare_cpu()
    world = join()
    torch.manual_seed(0)
    ours = _built(student, world).to(memory_format=trained_format(world.device)).train()
    theirs = freeze(_built(teacher, world))
    names = (PLAIN, TAUGHT, *methods)
    states = {}
    for name in names:
        specs = [{part: dict((options or {}).get(part, {}))} for part in _parts(name)]
        weights = loss or LossWeights()
        try:
            states[name] = _state(name, specs, ours, theirs, size, batch_size, world, weights)
        except UserError as error:
            if left_out is None:
                raise
            left_out.append(error.message)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    batch = states[PLAIN].batches.batch(0).to(world.device)
    steps = [name for _ in range(turns + 1) for name in states]
    bar = progress(steps, "steps", len(steps))
    for i, name in enumerate(bar):
        with Clock(world.device) as clock:
            train_step(states[name], batch, i // len(states))
        if i >= len(states):
            seconds[name].append(clock.seconds)
    return step_costs(seconds)


def step_costs(seconds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[StepCost]:
    """The table's rows.

    What a step's decoders take beyond the same network's without further queries belongs to the
    further queries.

    Args:
        seconds: Seconds by part of every timed step of every method, PLAIN's and TAUGHT's included.
    """
    ms = {name: _medians(steps) for name, steps in seconds.items()}
    rows = []
    for name, parts in ms.items():
        students = ms[PLAIN]["student_decoder"] if _parts(name) else parts["student_decoder"]
        if name == TAUGHT or any(find_method(m).teacher == "frozen" for m in _parts(name)):
            teachers, expected = ms[TAUGHT]["teacher_decoder"], ms[TAUGHT]["total"]
        else:  # none, or a weight average, which only answers its own queries
            teachers = parts["teacher_decoder"]
            expected = ms[PLAIN]["total"] + parts["teacher"] + teachers
        extra = parts["queries"] + parts["student_decoder"] + parts["teacher_decoder"]
        share = (parts["matching"] + parts["losses"]) / parts["total"]
        added = parts["total"] / expected - 1
        rows.append(
            StepCost(
                method=name,
                student=parts["student"] + students,
                teacher=parts["teacher"] + teachers,
                extra_queries=extra - students - teachers,
                matching=parts["matching"],
                losses=parts["losses"],
                backward=parts["backward"],
                optimizer=parts["optimizer"],
                total=parts["total"],
                added=added,
                matching_and_losses=share,
                cheap=share <= SHARE and (name != "qskd" or added <= SHARE),
            )
        )
    return rows


def _parts(name: str) -> list[str]:
    """The methods a row's name joins."""
    return [] if name in (PLAIN, TAUGHT) else name.split("+")


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds of every part, and of the step."""
    medians = {
        part: 1e3 * statistics.median(step.get(part, 0.0) for step in steps)
        for part in get_args(Part)
    }
    return medians | {"total": 1e3 * statistics.median(sum(step.values()) for step in steps)}


def _built(config: DetectorConfig, world: World) -> Detector:
    detector = build_detector(config, pretrained=False).to(world.device)
    return detector.to(memory_format=torch.channels_last)


def _state(
    name: str,
    specs: list[dict[str, Options]],
    student: Detector,
    teacher: Detector,
    size: tuple[int, int],
    batch_size: int,
    world: World,
    loss: LossWeights,
) -> State:
    """What a step of a method needs; all share the two networks, whose weights stay."""
    kinds = [kind.teacher for kind, _ in parse_methods(specs)]
    ema = Ema(student, 0.9996, rising=False) if "ema" in kinds else None
    recipe = Recipe(
        name=name,
        data=DataRecipe(train="none"),
        input=PreprocessConfig(size=size),
        detector=DetectorRecipe(**student.config.model_dump()),
        steps=10**6,
        batch_size=batch_size,
        loss=loss,
    )
    methods = build_methods(
        specs, student, teacher, average=None if ema is None else ema.model, loss=recipe.loss
    )
    optimizer = build_optimizer(student, torch.nn.ModuleList(methods), recipe.optimizer)
    for group in optimizer.param_groups:
        group["base_lr"] = 0.0
    data = Noise(size, student.facts.num_classes)
    return State(
        recipe=recipe,
        world=world,
        classes=data.classes,
        student=student,
        teacher=teacher if name == TAUGHT or "frozen" in kinds else None,
        methods=methods,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=False),
        ema=ema,
        batches=Batches(
            data,
            recipe.input,
            recipe.augment,
            batch_size,
            recipe.seed,
            masks=student.facts.masks,
            steps=recipe.steps,
        ),
        val=None,
    )


def _config(name: str) -> tuple[DetectorConfig, Recipe | None]:
    """A detector by preset or recipe, and the recipe."""
    if Path(name).is_file() or name in shipped():
        recipe = load_recipe(Path(name) if Path(name).is_file() else shipped()[name])
        return recipe.detector.for_classes(recipe.detector.num_classes or CLASSES), recipe
    return preset(name, CLASSES, pretrained=False), None


def _names(methods: str) -> list[str]:
    """The methods asked for.

    Raises:
        UserError: ``method-unknown`` where one does not exist.
    """
    given = list(METHODS) if methods == "all" else [m.strip() for m in methods.split(",")]
    for name in given:
        parse_methods([{part: {}} for part in name.split("+")])
    return given


@click.command("train-step")
@click.option("--config", required=True, help="Student: a detector's name or a recipe.")
@click.option("--teacher", help="Teacher: the same; the student's with a ResNet-50 by default.")
@click.option("--methods", default="all", show_default=True, help="Comma-separated; + adds up.")
@click.option("--size", help="Canvas, HEIGHTxWIDTH; the recipe's, or 800x1344.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Images a step."
)
@click.option(
    "--turns", type=click.IntRange(1), default=5, show_default=True, help="Steps behind a median."
)
@click.option("--threads", type=click.IntRange(1), help="Of torch; one measures processor time.")
@json_option
def command(
    config: str,
    teacher: str | None,
    methods: str,
    size: str | None,
    batch_size: int,
    turns: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Split a training step into student, teacher, extra queries, matching and losses.

    Every method takes turns with the plain student, with random weights and noise for images, and
    with the options that a recipe given as --config has for it.

    Example: detr bench train-step --config dino-r18 --methods qskd,kd_detr --size 320x544
    """
    names = _names(methods)
    ours, recipe = _config(config)
    taught_by = teacher or (f"{config[:-3]}r50" if config.endswith("r18") else config)
    theirs, _ = _config(taught_by)
    if size is not None:
        canvas = _size(size)
    else:
        canvas = (800, 1344) if recipe is None else recipe.input.canvases[0]
    entries = () if recipe is None else recipe.methods
    options = {key: given for entry in entries for key, given in entry.items()}
    if threads is not None:
        torch.set_num_threads(threads)
    loss = None if recipe is None else recipe.loss
    # Whoever asks for all asks for those there are for these detectors.
    left_out: list[str] = []
    missing = left_out if methods == "all" else None
    rows = time_steps(ours, theirs, names, canvas, batch_size, turns, options, loss, missing)
    device = join().device
    table = StepCosts(
        student=config,
        teacher=taught_by,
        size=canvas,
        batch_size=batch_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        clock="processor" if Clock(device).processor else "wall",
        turns=turns,
        rows=rows,
        left_out=left_out,
    )
    emit(table, as_json, table.text())


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise UserError("option-form", f"--size {text!r}: expected HEIGHTxWIDTH, such as 800x1344")
    return int(height), int(width)
