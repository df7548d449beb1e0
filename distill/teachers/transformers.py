"""Detectors of the transformers library as frozen teachers (``teacher: hf:FOLDER``).

They see each image in their own size and normalisation, and what they say is brought to the
student's canvas: boxes are relative to the image for both, and maps are sampled where the student's
cells are. They answer their own queries only; nobody can ask them others.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.cli_support import missing_extra
from detr.config import (
    BackboneConfig,
    ClassMap,
    DecoderConfig,
    DetectorConfig,
    LookForwardTwiceConfig,
    MixedQueriesConfig,
    NeckConfig,
)
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import Detector, GroupOutput, LevelShapes, Memory, QueryGroup, detections
from detr.models.geometry import padding_mask, token_centres, valid_ratios

PREFIX = "hf:"
# Model type to its name.
FAMILIES = {
    "rt_detr": "RT-DETR",
    "rt_detr_v2": "RT-DETRv2",
    "d_fine": "D-FINE",
    "deimv2": "DEIMv2",
    "rf_detr": "RF-DETR",
    "lw_detr": "LW-DETR",
}
# What such a teacher offers; see distill.methods.base.
OFFERS = frozenset({"predictions", "memory", "queries"})
# Those whose decoder takes boxes; the others' takes the boxes' logits.
_BOX_REFERENCES = ("rf_detr", "lw_detr")


class ImageFormat(NamedTuple):
    """How a detector wants its images.

    Attributes:
        size: (height, width), whatever the image's shape.
        scale: What a value of 0..255 is multiplied with first.
        mean, std: Subtracted and divided by afterwards.
    """

    size: tuple[int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class AnsweredMemory(Memory):
    """A memory that knows what its detector says about it.

    Attributes:
        answer: Of the detector's own queries.
    """

    answer: GroupOutput | None = None


class HuggingFaceTeacher(Detector):
    """A transformers detector with the three steps of ours.

    Its config says what methods may ask: how many classes, queries, layers and channels, and the
    strides of its maps on the student's canvas. Its queries start from boxes of its own encoder.

    Args:
        model: The transformers model.
        wanted: How it wants its images.
        given: How the student's images are normalised.
        columns: The class logit of each of the data's classes.
    """

    def __init__(
        self, model: nn.Module, wanted: ImageFormat, given: PreprocessConfig, columns: list[int]
    ) -> None:
        nn.Module.__init__(self)
        self.model = model.eval()
        self.wanted, self.kind = wanted, str(model.config.model_type)  # type: ignore[union-attr]
        scale = torch.tensor(given.std) * wanted.scale / torch.tensor(wanted.std)
        shift = torch.tensor(given.mean) * wanted.scale - torch.tensor(wanted.mean)
        self.scale: Tensor
        self.shift: Tensor
        self.columns: Tensor
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("shift", (shift / torch.tensor(wanted.std)).view(3, 1, 1))
        self.register_buffer("columns", torch.tensor(columns))
        self._seen: dict[str, Any] = {}
        decoder: nn.Module = model.model.decoder  # type: ignore[assignment, union-attr]
        decoder.register_forward_pre_hook(self._look, with_kwargs=True)
        answer, maps = self._ask(torch.zeros(1, 3, *wanted.size))
        sides = [wanted.size[0] / x.shape[-2] for x in maps]
        # The nearest power of two: a patch of 14 pixels stands where one of 16 does.
        self.strides = tuple(2 ** round(math.log2(side)) for side in sides)
        self.config = DetectorConfig(
            num_classes=len(columns),
            width=maps[0].shape[1],
            attention_heads=1,
            backbone=BackboneConfig(name=self.kind, strides=self.strides),
            neck=NeckConfig(levels=len(maps)),
            queries=MixedQueriesConfig(number=answer.logits[0].shape[1]),
            decoder=DecoderConfig(layers=len(answer.logits), refinement=LookForwardTwiceConfig()),
            detections=300,
        )

    def encode(self, images: Tensor, valid_sizes: Tensor) -> AnsweredMemory:
        """See the base class; the whole network runs here, and only once."""
        answer, maps = self._ask(self._pictures(images, valid_sizes))
        canvas = (images.shape[-2], images.shape[-1])
        shapes: LevelShapes = tuple(
            (math.ceil(canvas[0] / s), math.ceil(canvas[1] / s)) for s in self.strides
        )
        ratios = valid_ratios(valid_sizes, shapes, canvas)
        centres = token_centres(ratios, shapes)
        parts = torch.split(centres, [h * w for h, w in shapes], 1)
        tokens = torch.cat([_sampled(m, p) for m, p in zip(maps, parts, strict=True)], 1)
        padding = padding_mask(ratios, shapes)
        return AnsweredMemory(
            tokens, shapes, padding, ratios, torch.zeros_like(tokens), answer=answer
        )

    def queries(self, memory: Memory, *_: Any, **__: Any) -> list[QueryGroup]:
        """See the base class; there are never any but the detector's own, in training or not."""
        return [_answer_of(memory).group]

    def decode(
        self, memory: Memory, groups: list[QueryGroup], *_: Any, **__: Any
    ) -> list[GroupOutput]:
        """See the base class; there are no attention maps.

        Raises:
            ValueError: For any other queries than the detector's own.
        """
        answer = _answer_of(memory)
        if [group.role for group in groups] != [answer.group.role]:
            raise ValueError(f"{FAMILIES[self.kind]} answers its own queries only")
        return [answer]

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        answer, _ = self._ask(self._pictures(images, valid_sizes))
        return detections(answer.logits[-1], answer.boxes[-1], original_sizes, self.config)

    def _pictures(self, images: Tensor, valid_sizes: Tensor) -> Tensor:
        """The images without their padding in the detector's size and normalisation."""
        cut = [
            functional.interpolate(
                image[None, :, :height, :width], self.wanted.size, mode="bilinear", antialias=True
            )
            for image, (height, width) in zip(images, valid_sizes.long().tolist(), strict=True)
        ]
        return torch.cat(cut) * self.scale + self.shift

    @torch.no_grad()
    def _ask(self, pictures: Tensor) -> tuple[GroupOutput, list[Tensor]]:
        """What the detector says, and the maps ``[B, C, H, W]`` its decoder reads, finest first."""
        said = self.model(pixel_values=pictures)
        seen = self._seen
        reference = seen["reference_points"]
        if self.kind not in _BOX_REFERENCES:
            reference = reference.sigmoid()
        shapes = [(int(h), int(w)) for h, w in seen["spatial_shapes_list"]]
        levels = torch.split(seen["encoder_hidden_states"], [h * w for h, w in shapes], 1)
        maps = [
            torch.unflatten(level.transpose(1, 2), 2, shape)
            for level, shape in zip(levels, shapes, strict=True)
        ]
        maps.sort(key=lambda m: -m.shape[-1])
        group = QueryGroup("own", seen["inputs_embeds"], reference)
        self._seen = {}
        logits, boxes, hidden = _layers(said)
        references = [reference, *boxes][: len(boxes)]
        logits = [x.index_select(-1, self.columns) for x in logits]
        return GroupOutput(group, logits, boxes, hidden, references), maps

    def _look(self, module: nn.Module, positional: Any, named: Mapping[str, Any]) -> None:
        """Keeps what the decoder is given."""
        self._seen = dict(named)


def load(
    folder: Path, classes: ClassMap, preprocess: PreprocessConfig, renamed: Mapping[str, str]
) -> HuggingFaceTeacher:
    """The teacher in a Hugging Face folder.

    Args:
        folder: With ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``.
        classes: Of the training data.
        preprocess: Of the student.
        renamed: The teacher's names of those classes that have another name there.

    Raises:
        UserError: ``teacher-family`` for what is no folder of a known detector, ``teacher-input``
            where it does not say how it wants its images, ``teacher-classes`` where it lacks one of
            the data's classes, ``teacher-unreadable`` for weights that cannot be read, or
            ``extra-missing`` without the transformers library.
    """
    published = _document(folder / "config.json", "teacher-family")
    kind = str(published.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            "teacher-family",
            f"{PREFIX}{folder}: model type {kind!r} is none of {', '.join(FAMILIES)}; families of "
            "ours are imported with `detr weights import`",
        )
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"teacher: {PREFIX}{folder}") from error
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            "teacher-family",
            f"{PREFIX}{folder}: transformers {transformers.__version__} has no {FAMILIES[kind]}; "
            "install a newer one",
        )
    names = _names(published)
    columns = _columns(folder, names, classes, renamed)
    wanted = _image_format(folder / "preprocessor_config.json")
    try:
        model, found = transformers.AutoModelForObjectDetection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError("teacher-unreadable", f"{PREFIX}{folder}: {line}") from error
    # The library fills what is missing with random numbers, and a random teacher teaches nothing.
    absent = sorted([*found["missing_keys"], *(str(x[0]) for x in found["mismatched_keys"])])
    if absent:
        rest = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            "teacher-unreadable",
            f"{PREFIX}{folder}: missing or of another shape: {', '.join(absent[:3])}{rest}",
        )
    return HuggingFaceTeacher(model, wanted, preprocess, columns)


def _layers(said: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, boxes and hidden states of every layer the detector has heads for when it predicts.

    D-FINE and its relatives have some in training only; of RF-DETR and LW-DETR the last is taken.
    """
    logits = getattr(said, "intermediate_logits", None)
    if logits is None:
        return [said.logits], [said.pred_boxes], [said.last_hidden_state]
    boxes, hidden = said.intermediate_reference_points, said.intermediate_hidden_states
    depth = min(logits.shape[1], boxes.shape[1])
    return (
        list(logits[:, -depth:].unbind(1)),
        list(boxes[:, -depth:].unbind(1)),
        list(hidden[:, -depth:].unbind(1)),
    )


def _sampled(maps: Tensor, centres: Tensor) -> Tensor:
    """Values ``[B, n, C]`` of maps ``[B, C, H, W]`` at places ``[B, n, 2]`` of the image."""
    grid = (2 * centres - 1)[:, :, None].to(maps.dtype)
    found = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return found.squeeze(-1).transpose(1, 2)


def _answer_of(memory: Memory) -> GroupOutput:
    assert isinstance(memory, AnsweredMemory) and memory.answer is not None
    return memory.answer


def _names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names by index."""
    table = published.get("id2label") or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _columns(
    folder: Path, names: tuple[str, ...], classes: ClassMap, renamed: Mapping[str, str]
) -> list[int]:
    """The teacher's class of each class of the data; it may know more."""
    strange = [name for name in renamed if name not in classes.names]
    if strange:
        raise UserError("teacher-classes", f"teacher_classes: the data has no {', '.join(strange)}")
    wanted = [renamed.get(name, name) for name in classes.names]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise UserError(
            "teacher-classes",
            f"{PREFIX}{folder}: the teacher does not know {', '.join(unknown)}; it knows {some}; "
            "teacher_classes maps a class of the data to the teacher's name",
        )
    return [names.index(name) for name in wanted]


def _image_format(path: Path) -> ImageFormat:
    """What a ``preprocessor_config.json`` asks for."""
    told = _document(path, "teacher-input")
    size = told.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
        raise UserError(
            "teacher-input", f"{path}: size must be a fixed height and width, not {size}"
        )
    normalised = bool(told.get("do_normalize", True))
    rescaled = bool(told.get("do_rescale", True))
    try:
        return ImageFormat(
            (int(size["height"]), int(size["width"])),
            float(told.get("rescale_factor", 1 / 255)) if rescaled else 1.0,
            tuple(map(float, told["image_mean"])) if normalised else (0.0, 0.0, 0.0),
            tuple(map(float, told["image_std"])) if normalised else (1.0, 1.0, 1.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "teacher-input", f"{path}: no usable size, image_mean and image_std ({error})"
        ) from error


def _document(path: Path, code: str) -> dict[str, Any]:
    """A JSON file of a Hugging Face folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if code == "teacher-family":
            raise UserError(
                "teacher-family", f"{path}: not the config of a Hugging Face folder: {error}"
            ) from error
        raise UserError("teacher-input", f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError("teacher-family", f"{path}: not a table")
    return content
