"""Backbones: timm's ``features_only`` models, taken by stride."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr.config import BackboneConfig
from detr.errors import UserError
from detr.models.backbones import hgnet, resnet_vd, swin
from detr.models.backbones.base import AnyBackbone
from detr.models.tensors import match_tensors, read_tensors

hgnet.register()


class Backbone(AnyBackbone):
    """Feature maps at the configured strides, finest first.

    Args:
        config: Which model, which maps, what is trained.
        pretrained: Load ``config.pretrained``; false where other weights follow anyway.
        finer: Strides of further maps, which come before the config's.

    Attributes:
        channels: Of each map.

    Raises:
        UserError: ``backbone-unknown``, ``backbone-options``, ``backbone-strides``,
            ``backbone-frozen-stages``, ``backbone-download`` or what reading the weights raises.
    """

    def __init__(
        self, config: BackboneConfig, pretrained: bool = True, finer: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.body = _create(config, (*finer, *config.strides))
        self.channels = tuple(self.body.feature_info.channels())
        # Some models' maps come with their channels last.
        self.channels_last = str(getattr(self.body, "output_fmt", None)).endswith("NHWC")
        # As exact as the model's own: 1e-6 in a ConvNeXt, 1e-5 in a Swin.
        own = next((m.eps for m in self.body.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
        self.norms = nn.ModuleList(
            nn.LayerNorm(channels, own) for channels in self.channels if config.map_norm
        )
        if pretrained and config.pretrained is not None:
            _load(self.body, config)
        self._frozen = self._frozen_modules()
        for module in self._frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def forward(self, images: Tensor, valid_sizes: Tensor | None = None) -> list[Tensor]:
        """See the base class; one map per stride."""
        features: list[Tensor] = self.body(images)
        if self.norms or self.channels_last:
            features = [self._finished(i, x) for i, x in enumerate(features)]
        return features

    def _finished(self, index: int, x: Tensor) -> Tensor:
        """One map, normalized where asked, with its channels second."""
        if not self.channels_last:
            x = x.permute(0, 2, 3, 1)
        if self.norms:
            x = self.norms[index](x)
        return x.permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> Backbone:
        """As usual, but frozen parts stay in evaluation mode: fixed statistics, no dropout."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        """Modules that are never trained: frozen stages and, where asked, every batch norm."""
        frozen: list[nn.Module] = []
        if self.config.frozen_stages:
            ends = [str(i["module"]).replace(".", "_") for i in self.body.feature_info.info]
            children = dict(self.body.named_children())
            count = self.config.frozen_stages
            if count > len(ends) or ends[count - 1] not in children:
                raise UserError(
                    "backbone-frozen-stages",
                    f"backbone.frozen_stages: {count}: {self.config.name} has "
                    f"{sum(end in children for end in ends)} stages that can be frozen",
                )
            for name, child in children.items():
                frozen.append(child)
                if name == ends[count - 1]:
                    break
        if self.config.norm == "frozen":
            frozen += [m for m in self.body.modules() if isinstance(m, _BatchNorm)]
        return frozen


def _create(config: BackboneConfig, wanted: tuple[int, ...]) -> Any:
    """The untrained timm model with outputs at the wanted strides."""
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(
            "backbone-unknown", f"backbone.name: timm has no model {config.name!r}{hint}"
        )
    windowed = timm.model_entrypoint(config.name).__module__ == swin.MODULE
    options = {**(swin.OPTIONS if windowed else {}), **config.options}
    try:
        with torch.device("meta"):
            scout: Any = timm.create_model(config.name, features_only=True, **options)
        strides: list[int] = scout.feature_info.reduction()
        missing = [s for s in wanted if s not in strides]
        if missing:
            raise UserError(
                "backbone-strides",
                f"backbone.strides: {config.name} has no map of stride {missing[0]}, "
                f"only {', '.join(map(str, strides))}",
            )
        # Of several maps of one stride the last is the deepest.
        indices = [len(strides) - 1 - strides[::-1].index(s) for s in wanted]
        body: Any = timm.create_model(
            config.name, features_only=True, out_indices=indices, **options
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            "backbone-options", f"backbone.options: timm refuses {config.name} with them: {line}"
        ) from error
    if windowed:
        swin.take_any_canvas(body)
    if config.first_projection:
        resnet_vd.add_first_projection(body)
    _tell_channels_apart(body)
    return body


def _tell_channels_apart(body: nn.Module) -> None:
    """Starts convolutions' biases at random instead of at zero.

    Padding is exactly zero, so without a bias every channel of a padded cell is. A layer norm over
    equal channels multiplies gradients by ``1 / sqrt(eps)``: 1000 in each stage of a ConvNeXt,
    whose clipped gradient is then that of the padding alone, and nothing is learned.
    """
    for module in body.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.02)


def _load(body: Any, config: BackboneConfig) -> None:
    """Fills the backbone from a file or a timm tag."""
    assert config.pretrained is not None
    if config.pretrained.startswith("hub:"):
        tag = config.pretrained.removeprefix("hub:")
        try:
            source: nn.Module = timm.create_model(
                tag, pretrained=True, features_only=True, **config.options
            )
        except Exception as error:  # timm and its hub raise a dozen unrelated types here
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                "backbone-download",
                f"backbone.pretrained: {config.pretrained}: {line}; offline, give a file, or start "
                "from random weights: --set detector.backbone.pretrained=null "
                "--set detector.backbone.norm=train --set detector.backbone.frozen_stages=0",
            ) from error
        tensors, place = source.state_dict(), config.pretrained
    else:
        tensors, place = read_tensors(Path(config.pretrained)), config.pretrained
    # A classifier calls stages.0 what a features-only model calls stages_0.
    flat = {re.sub(r"^([a-z]+)\.(\d+)\.", r"\1_\2.", name): x for name, x in tensors.items()}
    tensors = {**tensors, **flat}
    if config.first_projection:
        tensors = resnet_vd.with_first_projection(body, tensors)
    # A file of a whole classifier has more (its head, unused stages), never less.
    match_tensors(body, tensors, place, surplus_allowed=True)
