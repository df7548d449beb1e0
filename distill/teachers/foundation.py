"""Vision foundation models as frozen teachers of a map: DINOv2 and its kin, plain transformers.

They are no detectors: all they show is one token for each patch of an image. timm's models are
named; the transformers library's are a folder, ``hf:FOLDER``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from detr.cli_support import missing_extra
from detr.data.preprocess import PreprocessConfig
from detr.errors import UserError
from detr.models.tensors import match_tensors, read_tensors

PREFIX = "hf:"
# What images of 0..1 are normalized by where a model does not say otherwise.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Foundation:
    """A frozen vision transformer; no module, so that nobody trains or saves it.

    Args:
        body: The network.
        tokens: Tokens ``[B, N, C]`` of its patches, row by row, out of an image batch.
        patch: Pixels of a patch's side.
        width: C.
        mean, std: What images of 0..1 are normalized by.
    """

    def __init__(
        self,
        body: nn.Module,
        tokens: Callable[[Tensor], Tensor],
        patch: int,
        width: int,
        mean: tuple[float, ...] = _MEAN,
        std: tuple[float, ...] = _STD,
    ) -> None:
        self.body = body.eval().requires_grad_(False)
        self.patch, self.width, self._tokens = patch, width, tokens
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        # What brings a student's pixels to its own, by device and normalization.
        self._brought: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, cells: tuple[int, int], stride: int, given: PreprocessConfig
    ) -> Tensor:
        """What it sees of each cell of a student's map, ``[B, H * W, C]`` float32.

        Args:
            images: ``[B, 3, h, w]`` as the student gets them.
            cells: (H, W) of the student's map; the image is scaled until a cell is a patch.
            stride: Pixels of a cell's side, on the student's canvas.
            given: How the student's images were normalized.
        """
        self.body.to(images.device)
        scale, shift = self._change(images.device, given)
        pixels = images.to(torch.float32) * scale + shift
        # The map's last cells may reach beyond the canvas.
        height, width = (n * stride for n in cells)
        beyond = (0, width - pixels.shape[-1], 0, height - pixels.shape[-2])
        pixels = functional.pad(pixels, beyond)
        size = (cells[0] * self.patch, cells[1] * self.patch)
        scaled = functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        return self._tokens(scaled).to(torch.float32)

    def _change(self, device: torch.device, given: PreprocessConfig) -> tuple[Tensor, Tensor]:
        """Factor and summand ``[3, 1, 1]`` from the student's normalization to its own."""
        key = (device, given.mean, given.std)
        if key not in self._brought:
            mean, std = torch.tensor(given.mean), torch.tensor(given.std)
            both = std / 255 / self._std, (mean / 255 - self._mean) / self._std
            scale, shift = (x[:, None, None].to(device) for x in both)
            self._brought[key] = scale, shift
        return self._brought[key]


def open_foundation(model: str, weights: str | None, place: str) -> Foundation:
    """A foundation model by name or folder.

    Args:
        model: A name of timm's, or ``hf:FOLDER``.
        weights: File of the timm model's weights; ``None`` for those that timm publishes.
        place: Who asks, for messages.

    Raises:
        UserError: ``foundation-unknown`` for a model that timm does not have or that has no
            patches, ``foundation-weights`` where weights are missing or cannot be read,
            ``extra-missing`` without the library, and what reading a file raises.
    """
    if model.startswith(PREFIX):
        if weights is not None:
            raise UserError("foundation-weights", f"{place}: {model} brings its own weights")
        return _from_transformers(Path(model.removeprefix(PREFIX)), place)
    return _from_timm(model, weights, place)


def _from_timm(model: str, weights: str | None, place: str) -> Foundation:
    try:
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise missing_extra(error, place) from error
    if not timm.is_model(model):
        raise UserError("foundation-unknown", f"{place}: timm has no model {model!r}")
    options = {"num_classes": 0, "dynamic_img_size": True}
    try:
        body: Any = timm.create_model(model, pretrained=weights is None, **options)
    except TypeError as error:
        raise _no_patches(model, place) from error
    except Exception as error:  # timm and its hub raise a dozen unrelated types here
        raise UserError(
            "foundation-weights",
            f"{place}: {model}: {_line(error)}; offline, give a file: weights",
        ) from error
    if not hasattr(body, "patch_embed") or not hasattr(body, "num_prefix_tokens"):
        raise _no_patches(model, place)
    if weights is not None:
        # A file of a whole classifier has its head besides.
        match_tensors(body, read_tensors(Path(weights)), weights, surplus_allowed=True)
    first: int = body.num_prefix_tokens

    def tokens(images: Tensor) -> Tensor:
        found: Tensor = body.forward_features(images)
        return found[:, first:]

    side = int(body.patch_embed.patch_size[0])
    told = body.pretrained_cfg
    return Foundation(body, tokens, side, int(body.num_features), told["mean"], told["std"])


def _from_transformers(folder: Path, place: str) -> Foundation:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise missing_extra(error, place) from error
    try:
        body, found = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError("foundation-weights", f"{place}: {folder}: {_line(error)}") from error
    # The library fills what is missing with random numbers.
    if absent := sorted(found["missing_keys"]):
        raise UserError("foundation-weights", f"{place}: {folder}: lacks {absent[0]}")
    side = getattr(body.config, "patch_size", None)
    if not isinstance(side, int):
        raise _no_patches(str(folder), place)
    first = 1 + int(getattr(body.config, "num_register_tokens", 0))

    def tokens(images: Tensor) -> Tensor:
        out: Tensor = body(pixel_values=images).last_hidden_state
        return out[:, first:]

    told = _image_format(folder)
    mean, std = (tuple(told.get(k, v)) for k, v in (("image_mean", _MEAN), ("image_std", _STD)))
    return Foundation(body, tokens, side, int(body.config.hidden_size), mean, std)


def _image_format(folder: Path) -> Mapping[str, Any]:
    """What the folder says of images, if it does."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("foundation-weights", f"{path}: {_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _no_patches(model: str, place: str) -> UserError:
    return UserError(
        "foundation-unknown", f"{place}: {model} is no plain vision transformer with patches"
    )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
