"""From a recipe to everything a training step needs, and back to files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detr.config import ClassMap
from detr.data import Dataset, open_dataset
from detr.errors import UserError
from detr.model_info import ModelInfo
from detr.models import (
    Detector,
    Target,
    Teacher,
    TeacherPart,
    build_detector,
    save_info,
    save_model,
)
from distill.data.batches import Batches
from distill.distributed import World
from distill.elastic.batches import ElasticBatches
from distill.elastic.network import ElasticNetwork
from distill.evaluate import Measured
from distill.methods import Method, build_methods, parse_methods
from distill.methods.step import TeacherKind
from distill.recipe import Recipe
from distill.teachers.answers import StoredAnswers
from distill.teachers.open import open_teacher, tell_ap
from distill.training.accumulate import images_per_process
from distill.training.checks import (
    check_map,
    check_norm,
    inspect_all,
    tell_queries,
    with_range_of,
)
from distill.training.cpu import prepare_cpu, trained_format
from distill.training.ema import Ema
from distill.training.first_weights import set_first_weights
from distill.training.identity import Sources, weights_digest
from distill.training.optim import build_optimizer
from distill.training.run_dir import RunDir

# Purposes of random numbers drawn from one seed: for all images, for one image, for a process.
_ALL, _IMAGE, _DROPOUT = range(3)


@dataclass
class State:
    """Everything a training step needs.

    Attributes:
        recipe: The run.
        world: This process and its device.
        classes: Of the training data.
        student: The network being trained, in training mode.
        teacher: The frozen network, in evaluation mode; only where a method looks at it.
        methods: Distillation methods, in the recipe's order; of an elastic training those of all
            its models.
        optimizer: Over the student's and the methods' parameters.
        scaler: Loss scaling for fp16; does nothing otherwise.
        ema: Weight average, or ``None``.
        batches: Training batches by step.
        val: Validation data, or ``None`` (also on every process but the first).
        elastic: The models within the student, where the recipe has an ``elastic`` section.
    """

    recipe: Recipe
    world: World
    classes: ClassMap
    student: Detector
    teacher: Teacher | None
    methods: list[Method[Any]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    batches: Batches
    val: Dataset | None
    elastic: ElasticNetwork | None = None

    @property
    def trained(self) -> list[nn.Module]:
        """Modules whose parameters the optimizer moves."""
        return [self.student, *self.methods]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def teachers(self) -> dict[TeacherKind, Teacher]:
        """Whom methods learn from: the frozen network, the student's own average, or both."""
        found: dict[TeacherKind, Teacher] = {}
        if self.teacher is not None:
            found["frozen"] = self.teacher
        if any(method.teacher == "ema" for method in self.methods):
            assert self.ema is not None
            found["ema"] = self.ema.model
        return found

    @property
    def weights(self) -> dict[str, Detector]:
        """The run's weights by name, ``student`` and ``ema``; first those that count.

        They are what a recipe says is evaluated: what ``model.safetensors`` holds.
        """
        if self.ema is None:
            return {"student": self.student}
        both = {"student": self.student, "ema": self.ema.model}
        return dict(sorted(both.items())) if self.recipe.ema_evaluated else both

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Lower precision on a GPU where the recipe asks for it."""
        if self.recipe.amp == "off" or self.world.device.type != "cuda":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.recipe.amp == "bf16" else torch.float16
        return torch.autocast("cuda", dtype)

    def seed_dropout(self, index: int, part: int = 0) -> None:
        """Seeds the default generators for a step: dropout differs between processes and parts."""
        place = self.world.rank * self.recipe.accumulate + part
        torch.manual_seed(self._seed(index, _DROPOUT, place))

    def generators(self, index: int) -> tuple[torch.Generator, list[torch.Generator]]:
        """A step's generator for all images, and one for each image of this process."""
        seeds = [self._seed(index, _ALL, 0)]
        seeds += [self._seed(index, _IMAGE, slot) for slot in self.batches.slots]
        shared, *own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return shared, own

    def _seed(self, index: int, purpose: int, place: int) -> int:
        # torch's CPU generator takes 32 bits of a seed, so they have to depend on everything.
        sequence = np.random.SeedSequence((self.recipe.seed, index, purpose, place))
        return int(sequence.generate_state(1)[0])

    def box_counts(self, targets: Sequence[Target]) -> tuple[Tensor, int]:
        """What every process must know of all images' ground truth.

        Returns:
            Boxes per process, of at least one box altogether (a scalar on the device: divided by
            it, the mean of the processes' sums is the sum over all images per box), and the largest
            count of an image.
        """
        counts = [len(target.labels) for target in targets]
        everyone = self.world.gather([sum(counts), max(counts)])
        total, most = int(everyone[:, 0].sum()), int(everyone[:, 1].max())
        # Filled on the device: a copy would wait for all that is queued there.
        return torch.full((), max(1, total) / self.world.size, device=self.world.device), most

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Everything needed to go on after ``step`` finished steps.

        Random generators and the sampler are not part of it: they follow from seed and step.
        """
        return {
            "step": step,
            "student": self.student.state_dict(),
            "methods": [method.state_dict() for method in self.methods],
            "optimizer": self._moments(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
        }

    def resume(self, checkpoint: dict[str, Any] | None) -> int:
        """Takes over a checkpoint, if there is one; returns the steps already done."""
        if checkpoint is None:
            return 0
        self.student.load_state_dict(checkpoint["student"])
        for method, state in zip(self.methods, checkpoint["methods"], strict=True):
            method.load_state_dict(state)
        self._resume_moments(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None:
            self.ema.model.load_state_dict(checkpoint["ema"])
        return int(checkpoint["step"])

    def _names(self) -> dict[Tensor, str]:
        """Names of what the optimizer moves."""
        modules = {"student": self.student, "methods": nn.ModuleList(self.methods)}
        return {
            parameter: f"{place}.{name}"
            for place, module in modules.items()
            for name, parameter in module.named_parameters()
        }

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by name.

        Its groups are not part of it: rates follow from recipe and step, and a run that goes on
        with lower ones may have others.
        """
        return {self._names()[p]: dict(found) for p, found in self.optimizer.state.items()}

    def _resume_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        names = self._names()
        state = self.optimizer.state_dict()
        state["state"] = {
            number: dict(moments[names[p]])
            for number, p in enumerate(self.parameters)
            if names[p] in moments
        }
        self.optimizer.load_state_dict(state)

    def save(self, run: RunDir, step: int) -> None:
        """Writes ``model.safetensors``, and the run's other weights under their name.

        Args:
            run: Where.
            step: Finished steps.
        """
        for path, model, info in self._models(run, step, {}):
            save_model(path, model, info)

    def save_ap(self, run: RunDir, step: int, results: Mapping[str, Measured]) -> None:
        """Adds to the sidecars of saved weights what was measured, by name of the weights."""
        for path, _, info in self._models(run, step, results):
            save_info(path, info)

    def _models(
        self, run: RunDir, step: int, results: Mapping[str, Measured]
    ) -> Iterator[tuple[Path, Detector, ModelInfo]]:
        """The run's weights, where they go, and what their sidecars say."""
        if not run.writes:
            return
        provenance: dict[str, Any] = {"recipe": self.recipe.name, "step": step}
        provenance |= {"data": self.recipe.data.train, "torch": torch.__version__}
        for key in ("teacher", "start"):
            if (path := getattr(self.recipe, key)) is not None:
                provenance[key] = path
        if changed := run.changes():
            provenance["changes"] = [change.model_dump() for change in changed]
        if self.recipe.methods:
            provenance["methods"] = [name for entry in self.recipe.methods for name in entry]
        # The model comes last: where it is, the others are.
        for i, (name, model) in reversed(list(enumerate(self.weights.items()))):
            own: dict[str, Any] = {"of": name}
            if (found := results.get(name)) is not None:
                own |= {"val": self.recipe.data.val, "ap": found.boxes.ap, "ap50": found.boxes.ap50}
                if found.masks is not None:
                    own |= {"mask_ap": found.masks.ap, "mask_ap50": found.masks.ap50}
            others = {other: x for other, x in results.items() if other != name}
            own |= {f"ap_{other}": x.boxes.ap for other, x in others.items()}
            info = ModelInfo(
                detector=model.config,
                classes=self.classes,
                preprocess=self.recipe.input,
                provenance=provenance | own,
            )
            yield run.model if i == 0 else run.weights(name), model, info


def set_up(recipe: Recipe, run: RunDir, world: World) -> State:
    """Opens the data, builds the student, checks the teacher, prepares the optimizer.

    Raises:
        UserError: Whatever is wrong with data, architecture, teacher or methods.
    """
    prepare_cpu()
    images_per_process(recipe, world)  # mistakes are told before anything slow happens
    parse_methods(recipe.methods)
    data = open_dataset(recipe.data.train, value_range=recipe.input.range)
    recipe = with_range_of(data, recipe)
    if len(data) == 0:
        raise UserError("data-empty", f"{recipe.data.train}: no images to train on")
    val = None
    if recipe.data.val is not None:
        val = open_dataset(recipe.data.val, data.classes, recipe.input.range)
    masks = recipe.detector.heads.masks is not None
    found = inspect_all([data] if val is None else [data, val], run, masks)
    torch.manual_seed(recipe.seed)
    config = recipe.detector.for_classes(len(data.classes))
    # A run that goes on has its weights, wherever those it began with are now.
    student = _placed(build_detector(config, not run.checkpoint.exists()), world.device)
    check_norm(student)
    check_map(student, recipe, images_per_process(recipe, world) // recipe.accumulate)
    tell_queries(student, found, run)
    opened = None
    if recipe.teacher is not None:
        opened = open_teacher(recipe, data.classes, world.device)
        if not run.checkpoint.exists():  # a run that goes on has measured it already
            tell_ap(recipe, opened, val, run.say, run.leave_out)
    digest = None
    if opened is not None:
        assert isinstance(opened.teacher, nn.Module)
        digest = weights_digest(opened.teacher)
    run.claim(Sources(data=found[0].fingerprint, teacher=digest))
    set_first_weights(student, recipe, data.classes, opened, run)
    teacher = None if opened is None else opened.teacher
    ema = None if recipe.ema is None else Ema(student, recipe.ema, recipe.ema_rising)
    drops = [round(share * recipe.steps) for share in recipe.optimizer.drops]
    online = any(kind.teacher == "ema" for kind, _ in parse_methods(recipe.methods))
    if online and ema is None:
        raise UserError("recipe-value", "methods: this method needs a weight average; set ema")
    average = ema.model if online and ema is not None else None
    elastic = None
    if recipe.elastic is None:
        methods = build_methods(
            recipe.methods,
            student,
            teacher,
            average=average,
            loss=recipe.loss,
            steps=recipe.steps,
            drops=drops,
            preprocess=recipe.input,
        )
    else:
        elastic = ElasticNetwork(recipe, student.train(), teacher, average, drops)
        methods = elastic.methods
    return State(
        recipe=recipe,
        world=world,
        classes=data.classes,
        student=student.train(),
        teacher=_asked(recipe, teacher, digest, run),
        methods=methods,
        optimizer=build_optimizer(student, nn.ModuleList(methods), recipe.optimizer),
        scaler=torch.amp.GradScaler(
            world.device.type, enabled=recipe.amp == "fp16" and world.device.type == "cuda"
        ),
        ema=ema,
        batches=_batches(data, recipe, world, elastic),
        val=val if world.main else None,
        elastic=elastic,
    )


def _asked(
    recipe: Recipe, teacher: Teacher | None, digest: str | None, run: RunDir
) -> Teacher | None:
    """The frozen teacher, where a method looks at it; its answers come from disk if they may."""
    frozen = [one for one in parse_methods(recipe.methods) if one[0].teacher == "frozen"]
    if teacher is None or not frozen:
        return None
    if recipe.teacher_answers is None or digest is None:
        return teacher
    needs = frozenset[TeacherPart]().union(*(kind.needs(options) for kind, options in frozen))
    return StoredAnswers(teacher, digest, Path(recipe.teacher_answers), needs, run.say)


def _batches(
    data: Dataset, recipe: Recipe, world: World, elastic: ElasticNetwork | None
) -> Batches:
    own = images_per_process(recipe, world)
    masks = recipe.detector.heads.masks is not None
    common: tuple[Any, ...] = (data, recipe.input, recipe.augment, own, recipe.seed)
    common += (world.rank, world.size, masks, recipe.steps)
    if recipe.elastic is None or elastic is None:
        return Batches(*common)
    return ElasticBatches(elastic.choices, recipe.elastic.drawn, *common)


def _placed(detector: Detector, device: torch.device) -> Detector:
    """On the device, in the layout in which it is trained fastest there."""
    return detector.to(device).to(memory_format=trained_format(device))
