"""Training recipes: every number of a run in one validated, frozen object.

Recipes are YAML. A misspelt key or a bad value is reported with file, line and, where one is near,
the key that was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from detr.config import DetectorConfig, PartName, Positive, Strict, Word, merged
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.presets import preset
from detr.problems import Problem, first_problem
from detr.upgrade import MOVED
from distill.data.augment import AugmentConfig
from distill.data.composed import Share
from distill.elastic.choices import ElasticRecipe
from distill.losses.weights import LossWeights
from distill.recipe_yaml import Places, is_file, place_of, read_recipe

SHIPPED = Path(__file__).parent / "recipes"


Rate = Annotated[float, Field(ge=0)]
# Steps are counted in more than parts of a detector are.
Steps = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(ge=1, le=10**9)]


class DataRecipe(Strict):
    """Data sets: ``kitti:PATH[:split]``, ``coco:PATH[:split]`` or a YAML file.

    Attributes:
        train: What is learned from; it also decides the classes.
        val: What AP is measured on, or ``None``.
        max_unreadable: So many images may turn out to be unreadable: in training another image
            takes the place, AP is that of the others. One more stops the run.
    """

    train: Word
    val: Word | None = None
    max_unreadable: Steps = 10


class DetectorRecipe(DetectorConfig):
    """A detector whose number of classes may be left to the data set (0).

    ``preset: dino-r18`` names the detector (:mod:`detr.presets`) that the keys beside it change;
    without it, they change the plain Deformable DETR of :class:`DetectorConfig`'s defaults.
    """

    num_classes: Annotated[int, Field(ge=0, le=100_000)] = 0

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        name = content.get("preset")
        try:
            base = DetectorConfig(num_classes=1) if name is None else preset(str(name), 1)
        except UserError as error:
            raise PydanticCustomError("preset", "{reason}", {"reason": error.message}) from error
        changes = {key: value for key, value in content.items() if key != "preset"}
        return merged({**base.model_dump(), "num_classes": 0}, changes)

    def for_classes(self, number: int) -> DetectorConfig:
        """The complete config.

        Raises:
            UserError: ``recipe-classes`` where the recipe names another number of classes.
        """
        if self.num_classes not in (0, number):
            raise UserError(
                "recipe-classes",
                f"detector.num_classes is {self.num_classes} but the training data has {number} "
                "classes; leave the key out to take the data's",
            )
        return DetectorConfig.model_validate({**self.model_dump(), "num_classes": number})


class InheritRecipe(Strict):
    """Which teacher layer each student layer starts from; ``None`` spreads them evenly.

    Attributes:
        encoder: Teacher encoder layer (from 0) of each student encoder layer.
        decoder: Teacher decoder layer (from 0) of each student decoder layer.
    """

    encoder: tuple[int, ...] | None = None
    decoder: tuple[int, ...] | None = None


class OptimizerRecipe(Strict):
    """AdamW with warm-up and a rate that falls in steps, along a cosine, or both.

    Attributes:
        lr: Of everything but the backbone.
        backbone_lr: Of the backbone.
        weight_decay: Of weight matrices, kernels and embeddings.
        decay_norms_and_biases: It is also that of parameters of one dimension, as in the papers'
            code.
        offsets_lr_factor: On sampling offsets and reference points (0.1 in Deformable DETR).
        clip: Largest gradient norm; 0 clips nothing.
        warmup_steps: Steps in which the rate rises to the full one.
        warmup_power: Of the share of these that is done: 1 rises linearly, 2 as in DEIM.
        drops: Shares of the run after which the rate falls by ``drop_factor``.
        drop_factor: Factor of each drop.
        cosine: Shares of the run from and to which the rate falls along half a cosine, flat before
            and after (RTMDet, DEIM); ``None`` for drops alone.
        cosine_factor: What is left of the rate then.
    """

    lr: Rate = 1e-4
    backbone_lr: Rate = 1e-5
    weight_decay: Rate = 1e-4
    decay_norms_and_biases: bool = False
    offsets_lr_factor: Rate = 1.0
    clip: Rate = 0.1
    warmup_steps: Steps = 0
    warmup_power: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    drops: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (11 / 12,)
    drop_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    cosine: tuple[Share, Share] | None = None
    cosine_factor: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _in_order(self) -> OptimizerRecipe:
        if self.cosine is not None and self.cosine[0] >= self.cosine[1]:
            raise ValueError(f"cosine: {self.cosine[0]:g} is no less than {self.cosine[1]:g}")
        return self


class ValidationRecipe(Strict):
    """When and on what AP is measured.

    Attributes:
        every: Steps between measurements; 0 measures at the end only.
        images: At most this many images of ``data.val`` (the last measurement takes them all).
    """

    every: Steps = 0
    images: Count | None = None


def _inherit(value: object) -> object:
    return {} if value is True else None if value is False else value


def _method_entries(value: object) -> object:
    """Allows a bare name where a method needs no options."""
    if not isinstance(value, list):
        return value
    return [{entry: {}} if isinstance(entry, str) else entry for entry in value]


def _folder_name(value: str) -> str:
    if "/" in value or value in (".", ".."):
        raise ValueError(f"{value!r} is a path and no name")
    return value


class Recipe(Strict):
    """A complete training run.

    Attributes:
        name: Names the run directory ``runs/NAME``; a word, no path.
        data: Data sets.
        input: Canvas and normalization.
        detector: Architecture; a preset and what it changes of it.
        teacher: Run directory or ``.safetensors`` of the teacher, or ``hf:FOLDER`` for one of the
            transformers library's detectors; needed by ``distill run``.
        teacher_classes: What the teacher calls those of the data's classes that have another name
            there (``{Car: car}``); it may know more classes, in any order.
        teacher_answers: Folder where the teacher's answers are kept; another student that is shown
            the same images (seed, data, augmentation, batch) reads them there.
        methods: One ``{name: options}`` per distillation method; their losses are added. A method
            outside the package is named by its place, ``my_package.my_module:MyMethod``.
        elastic: The smaller models that the training is to hold as well (``distill elastic``).
        inherit: Start from the teacher's weights (true, or an explicit layer map).
        start: Run directory, ``.safetensors`` or name of a shipped model whose weights the detector
            starts from, with or without a teacher.
        start_classes: What ``start`` calls those of the data's classes that have another name there
            (``{Car: car}``).
        freeze: Parts that are not trained; they compute as in evaluation.
        optimizer: Optimizer and schedule.
        steps: Length of the run.
        batch_size: Images per step, of all processes.
        accumulate: Parts in which each process sees its images of a step, one after the other, to
            need less memory; the training is the same.
        ema: Decay of a weight average that is measured and saved beside the student; ``None`` for
            none.
        ema_rising: Whether the decay rises from 0 to ``ema`` over the first steps (else constant).
        ema_evaluated: Whether the average is the run's model; otherwise the student is.
        amp: Autocast type on a GPU; the CPU always computes in float32.
        loss: Weights of the detection loss.
        augment: How training images vary.
        validation: When AP is measured.
        checkpoint_every: Steps between checkpoints.
        tensorboard: Write the metrics for TensorBoard as well.
        wandb: For Weights & Biases as well; its environment variables say where.
        mlflow: For MLflow as well; its environment variables say where.
        workers: Threads that prepare batches ahead.
        seed: Of initial weights, order, augmentation and noise.
        min_teacher_ap: Refuse a teacher below this AP (0..1) on a slice of ``data.val``.
    """

    name: Annotated[Word, AfterValidator(_folder_name)]
    data: DataRecipe
    input: PreprocessConfig
    detector: DetectorRecipe
    teacher: Word | None = None
    teacher_classes: dict[str, str] = {}
    teacher_answers: Word | None = None
    methods: Annotated[tuple[dict[str, dict[str, Any]], ...], BeforeValidator(_method_entries)] = ()
    elastic: ElasticRecipe | None = None
    inherit: Annotated[InheritRecipe | None, BeforeValidator(_inherit)] = None
    start: Word | None = None
    start_classes: dict[str, str] = {}
    freeze: tuple[PartName, ...] = ()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    steps: Count
    batch_size: Positive = 16
    accumulate: Positive = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_rising: bool = True
    ema_evaluated: bool = True
    amp: Literal["off", "bf16", "fp16"] = "off"
    loss: LossWeights = LossWeights()
    augment: AugmentConfig = AugmentConfig()
    validation: ValidationRecipe = ValidationRecipe()
    checkpoint_every: Count = 500
    tensorboard: bool = False
    wandb: bool = False
    mlflow: bool = False
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    min_teacher_ap: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if any(len(entry) != 1 for entry in self.methods):
            raise ValueError("methods: each entry is one name with its options")
        if self.teacher is None and (self.inherit or self.needs_teacher):
            raise ValueError("methods and inherit need a teacher")
        if self.loss.scores != "focal" and self.detector.heads.classes.no_object:
            raise ValueError(f"loss.scores: {self.loss.scores} is for heads.classes: sigmoid")
        if self.start_classes and self.start is None:
            raise ValueError("start_classes: there is no start whose classes have other names")
        if self.loss.edges and self.detector.decoder.refinement.distribution is None:
            raise ValueError("loss.edges: is for decoder.refinement: distribution")
        if self.detector.heads.masks is None and self.loss.of_masks:
            raise ValueError(f"loss.{self.loss.of_masks[0]}: is for a detector with heads.masks")
        outside = self.teacher is not None and self.teacher.startswith("hf:")
        if outside and self.inherit:
            raise ValueError("inherit: a detector of another library has no weights to start from")
        if self.elastic is not None:
            for reason in self.elastic.contradictions(self.detector, self.input):
                raise ValueError(reason)
        if self.teacher_classes and self.teacher is None:
            raise ValueError("teacher_classes: there is no teacher whose classes have other names")
        if self.teacher_answers is not None and not self.needs_teacher:
            raise ValueError("teacher_answers: no method asks a trained teacher")
        return self

    def without_teacher(self) -> Recipe:
        """The same student trained on labels alone."""
        return self.model_copy(
            update={
                "teacher": None,
                "teacher_classes": {},
                "teacher_answers": None,
                "methods": (),
                "elastic": None,
                "inherit": None,
                "min_teacher_ap": None,
            }
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether a method learns from a trained network; a name nobody knows counts as one."""
        if not self.methods:
            return False
        # Imported here: recipes without methods are read without the models.
        from distill.methods import METHODS, find_method

        names = [name for entry in self.methods for name in entry]
        kinds = [find_method(n) if n in METHODS or ":" in n else None for n in names]
        return any(kind is None or kind.teacher == "frozen" for kind in kinds)

    def to_yaml(self) -> str:
        """The complete recipe, defaults included, in the order of the fields."""
        content = self.model_dump(mode="json")
        text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        return text


def shipped() -> dict[str, Path]:
    """Name and file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or shipped name.

    Raises:
        UserError: ``recipe-missing``.
    """
    path = Path(name)
    if is_file(path):
        return path
    if name in shipped():
        return shipped()[name]
    near = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see `distill recipes`"
    raise UserError("recipe-missing", f"{name}: no such file and no shipped recipe{hint}")


def load_recipe(path: Path, overrides: Sequence[str] = (), methods: bool = False) -> Recipe:
    """Reads and validates a recipe.

    A file with ``base: NAME`` changes the recipe of that name or path: mappings are merged key by
    key, everything else is replaced.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` with the value in YAML, applied over the file.
        methods: Whether the methods are to be found and their options to be good, too.

    Raises:
        UserError: ``recipe-missing``, ``recipe-yaml``, ``recipe-key`` or ``recipe-value``, and for
            methods what :func:`distill.methods.parse_methods` raises, naming file and line, or the
            override.
    """
    content, places = read_recipe(path, overrides, find_recipe)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, places, path) from error
    if methods:
        _check_methods(recipe.methods, places, path)
    return recipe


def _check_methods(specs: Sequence[dict[str, Any]], places: Places, path: Path) -> None:
    """Names the place of methods and options there are not."""
    # Imported here: recipes without methods are read without the models.
    from distill.methods import parse_methods

    parts = [(("methods", str(k)), specs[k : k + 1]) for k in range(len(specs))]
    for key, part in (*parts, (("methods",), specs)):
        try:
            parse_methods(part)
        except UserError as error:
            place = place_of(key, places, path)
            raise UserError(error.code, f"{place}: {error.message}") from error


def _explain(error: ValidationError, places: Places, path: Path) -> UserError:
    """One line for the first thing pydantic found."""
    problem = first_problem(error, Recipe)
    key = problem.key
    if any(one["type"] == "preset" for one in error.errors()):
        key = (*key, "preset")
    # What contradicts another key is found for the whole, and its message begins with the key.
    known = key or tuple(problem.message.split(maxsplit=1)[0].rstrip(":").split("."))
    where, name = place_of(known, places, path), ".".join(key)
    if (now := _moved(problem)) is not None:
        return UserError("recipe-key", f"{where}: {name} is now {now}")
    if problem.unknown:
        hint = problem.hint(*(["preset"] if key[:-1] == ("detector",) else []))
        return UserError("recipe-key", f"{where}: {problem.message} {name!r}{hint}")
    reason = f"{name}: {problem.message}" if name else problem.message
    return UserError("recipe-value", f"{where}: {reason}")


def _moved(problem: Problem) -> str | None:
    """Where a key of earlier releases is to be found now."""
    key = problem.key
    if key == ("validation", "nms"):
        return "detector.nms"
    if len(key) != 2 or key[0] != "detector" or not (problem.unknown or problem.no_mapping):
        return None
    places = MOVED.get(key[1])
    return None if places is None else " and ".join(f"detector.{place}" for place in places)
