"""AdamW with the parameter groups of the DETR family, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill.recipe import OptimizerRecipe

# Deformable DETR trains these more slowly (its section 1.5 note 3).
_SLOW = ("sampling_offsets", "reference_points")
# Of a backbone, what no pretraining has seen (DEIMv2's adapter).
_NEW = "backbone.adapter."


def build_optimizer(
    detector: nn.Module, extra: nn.Module | None, recipe: OptimizerRecipe
) -> torch.optim.AdamW:
    """AdamW over a detector and, at the main rate, the parameters methods bring along.

    Each group keeps its own top rate in ``base_lr``; :func:`set_rate` scales it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    named = list(detector.named_parameters())
    if extra is not None:
        named += list(extra.named_parameters())
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        pretrained = name.startswith("backbone.") and not name.startswith(_NEW)
        lr = recipe.backbone_lr if pretrained else recipe.lr
        if any(part in name for part in _SLOW):
            lr *= recipe.offsets_lr_factor
        # Norms and biases have one dimension; pulling them to zero regularises nothing.
        decayed = parameter.ndim > 1 or recipe.decay_norms_and_biases
        decay = recipe.weight_decay if decayed else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,
    )


def rate(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """Factor on every base rate in step ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / (recipe.warmup_steps + 1)) ** recipe.warmup_power
    drops = sum(step >= round(share * steps) for share in recipe.drops)
    return float(warm * recipe.drop_factor**drops * _cosine(step, steps, recipe))


def _cosine(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """The flat-cosine schedule's factor (DEIM's code, ``engine/optim/lr_scheduler.py``)."""
    if recipe.cosine is None:
        return 1.0
    first, last = (round(share * steps) for share in recipe.cosine)
    done = 1.0 if step >= last else max(0, step - first) / (last - first)
    return recipe.cosine_factor + (1 - recipe.cosine_factor) * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to ``factor`` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
