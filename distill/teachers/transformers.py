"""Detectors of the transformers library as frozen teachers (``teacher: hf:FOLDER``).

They see each image in their own size and normalization, and what they say is brought to the
student's canvas: boxes are relative to the image for both, and maps are sampled where the student's
cells are. They answer their own queries only; nobody can ask them others.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.cli_support import missing_extra
from detr.config import SigmoidClassesConfig
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models import (
    Facts,
    GroupOutput,
    LevelShapes,
    Memory,
    QueryGroup,
    TeacherPart,
    detections,
)
from detr.models.geometry import padding_mask, token_centers, valid_ratios

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


# Detections of an image: most of these families have as many queries.
DETECTIONS = 300
_CLASSES = SigmoidClassesConfig()


class HuggingFaceTeacher(nn.Module):
    """A transformers detector as a :class:`detr.models.Teacher`.

    It answers its own queries while it looks at an image; they start from boxes of its own encoder.
    The strides of its maps are those on the student's canvas.

    Args:
        model: The transformers model.
        image_format: How it wants its images.
        student: How the student's images are normalized.
        class_names: By index; an output without a name has an empty one.

    Attributes:
        class_names: Of every class output.
    """

    offers: frozenset[TeacherPart] = frozenset({"predictions", "memory", "queries"})

    def __init__(
        self,
        model: nn.Module,
        image_format: ImageFormat,
        student: PreprocessConfig,
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.model, self.image_format = model.eval(), image_format
        config: Any = model.config
        self.model_type = str(config.model_type)
        std = torch.tensor(image_format.std)
        scale = torch.tensor(student.std) * image_format.scale / std
        shift = torch.tensor(student.mean) * image_format.scale - torch.tensor(image_format.mean)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("shift", (shift / std).view(3, 1, 1))
        self._decoder_inputs: dict[str, Any] = {}
        decoder: nn.Module = model.model.decoder  # type: ignore[assignment, union-attr]
        decoder.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
        answer, maps = self._ask(torch.zeros(1, 3, *image_format.size))
        outputs = answer.logits[-1].shape[-1]
        self.class_names = (*class_names, *[""] * (outputs - len(class_names)))
        sides = [image_format.size[0] / x.shape[-2] for x in maps]
        # The nearest power of two: a patch of 14 pixels stands where one of 16 does.
        self.facts = Facts(
            family=FAMILIES[self.model_type],
            num_classes=outputs,
            width=maps[0].shape[1],
            neck_width=maps[0].shape[1],
            heads=0,
            attention="deformable",
            strides=tuple(2 ** round(math.log2(side)) for side in sides),
            backbone_strides=(),
            backbone_channels=(),
            encoder_layers=int(getattr(config, "encoder_layers", 0)),
            decoder_layers=len(answer.logits),
            num_queries=answer.logits[0].shape[1],
            query_start="boxes",
            blank_content=False,
            scores="sigmoid",
        )

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """See :class:`detr.models.Teacher`; the whole network runs here, and only once."""
        answer, maps = self._ask(self._pictures(images, valid_sizes))
        canvas = (images.shape[-2], images.shape[-1])
        shapes: LevelShapes = tuple(
            (math.ceil(canvas[0] / s), math.ceil(canvas[1] / s)) for s in self.facts.strides
        )
        ratios = valid_ratios(valid_sizes, shapes, canvas)
        centers = token_centers(ratios, shapes)
        parts = torch.split(centers, [h * w for h, w in shapes], 1)
        tokens = torch.cat([_sampled(m, p) for m, p in zip(maps, parts, strict=True)], 1)
        padding = padding_mask(ratios, shapes)
        positions = torch.zeros_like(tokens)
        return Memory(tokens, shapes, padding, ratios, positions, answer=answer)

    def queries(self, memory: Memory) -> list[QueryGroup]:
        """See :class:`detr.models.Teacher`."""
        return [_answer_of(memory).group]

    def decode(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        attention: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """See :class:`detr.models.Teacher`; ``decode`` and ``attention`` are not offered."""
        answers = {group.role: _answer_of(memory) for group in self.queries(memory)}
        return [answers[group.role] for group in groups]

    def class_contents(self) -> None:
        """See :class:`detr.models.Teacher`; nobody can ask it for a class."""

    def forward(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`detr.models.Detector.forward`."""
        answer, _ = self._ask(self._pictures(images, valid_sizes))
        return detections(answer.logits[-1], answer.boxes[-1], original_sizes, _CLASSES, DETECTIONS)

    def _pictures(self, images: Tensor, valid_sizes: Tensor) -> Tensor:
        """The images without their padding in the detector's size and normalization."""
        cut = [
            functional.interpolate(
                image[None, :, :height, :width],
                self.image_format.size,
                mode="bilinear",
                antialias=True,
            )
            for image, (height, width) in zip(images, valid_sizes.long().tolist(), strict=True)
        ]
        return torch.cat(cut) * self.scale + self.shift

    @torch.no_grad()
    def _ask(self, pictures: Tensor) -> tuple[GroupOutput, list[Tensor]]:
        """What the detector says, and the maps ``[B, C, H, W]`` its decoder reads, finest first."""
        output = self.model(pixel_values=pictures)
        inputs = self._decoder_inputs
        reference = inputs["reference_points"]
        if self.model_type not in _BOX_REFERENCES:
            reference = reference.sigmoid()
        shapes = [(int(h), int(w)) for h, w in inputs["spatial_shapes_list"]]
        levels = torch.split(inputs["encoder_hidden_states"], [h * w for h, w in shapes], 1)
        maps = [
            torch.unflatten(level.transpose(1, 2), 2, shape)
            for level, shape in zip(levels, shapes, strict=True)
        ]
        maps.sort(key=lambda m: -m.shape[-1])
        group = QueryGroup("own", inputs["inputs_embeds"], reference)
        self._decoder_inputs = {}
        logits, boxes, hidden = _layers(output)
        references = [reference, *boxes][: len(boxes)]
        return GroupOutput(group, logits, boxes, hidden, references), maps

    def _keep_inputs(self, module: nn.Module, positional: Any, named: Mapping[str, Any]) -> None:
        """Keeps what the decoder is given."""
        self._decoder_inputs = dict(named)


def load(folder: Path, preprocess: PreprocessConfig) -> HuggingFaceTeacher:
    """The teacher in a Hugging Face folder, with all its classes.

    Args:
        folder: With ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``.
        preprocess: Of the student.

    Raises:
        UserError: ``teacher-family`` for what is no folder of a known detector, ``teacher-input``
            where it does not say how it wants its images, ``teacher-classes`` where the keys of its
            class names do not number its outputs, ``teacher-unreadable`` for weights that cannot be
            read, or ``extra-missing`` without the transformers library.
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
    names = _names(published, folder / "config.json")
    wanted = _image_format(folder / "preprocessor_config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        # The library counts its outputs by the names; a number without one is an output, too.
        config.id2label = dict(enumerate(names))
        model, found = transformers.AutoModelForObjectDetection.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # the library's own kinds as well
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError("teacher-unreadable", f"{PREFIX}{folder}: {line}") from error
    # The library fills what is missing with random numbers, and a random teacher teaches nothing.
    other_shapes = {str(name): stored for name, stored, _ in found["mismatched_keys"]}
    for name, stored in other_shapes.items():
        if "class_embed" in name and "denoising" not in name:  # which has one for noise
            raise UserError(
                "teacher-classes",
                f"{folder / 'config.json'}: id2label names class {len(names) - 1}, the detector "
                f"has {stored[0]} class outputs",
            )
    absent = sorted([*found["missing_keys"], *other_shapes])
    if absent:
        rest = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            "teacher-unreadable",
            f"{PREFIX}{folder}: missing or of another shape: {', '.join(absent[:3])}{rest}",
        )
    return HuggingFaceTeacher(model, wanted, preprocess, names)


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


def _sampled(maps: Tensor, centers: Tensor) -> Tensor:
    """Values ``[B, n, C]`` of maps ``[B, C, H, W]`` at places ``[B, n, 2]`` of the image."""
    grid = (2 * centers - 1)[:, :, None].to(maps.dtype)
    found = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return found.squeeze(-1).transpose(1, 2)


def _answer_of(memory: Memory) -> GroupOutput:
    assert memory.answer is not None
    return memory.answer


def _names(published: Mapping[str, Any], place: Path) -> tuple[str, ...]:
    """Class names by index, which is their key; empty where no key is that index."""
    told = published.get("id2label") or {}
    if not isinstance(told, Mapping):
        raise UserError("teacher-classes", f"{place}: id2label: not a table of numbers and names")
    table = {str(key): str(name) for key, name in told.items()}
    if strange := [key for key in table if not (key.isascii() and key.isdigit())]:
        raise UserError(
            "teacher-classes", f"{place}: id2label: key {strange[0]!r} is not the number of a class"
        )
    named = {int(key): name for key, name in table.items()}
    return tuple(named.get(i, "") for i in range(max(named, default=-1) + 1))


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
    normalized = bool(told.get("do_normalize", True))
    rescaled = bool(told.get("do_rescale", True))
    try:
        return ImageFormat(
            (int(size["height"]), int(size["width"])),
            float(told.get("rescale_factor", 1 / 255)) if rescaled else 1.0,
            tuple(map(float, told["image_mean"])) if normalized else (0.0, 0.0, 0.0),
            tuple(map(float, told["image_std"])) if normalized else (1.0, 1.0, 1.0),
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
