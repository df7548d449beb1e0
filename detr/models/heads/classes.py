"""Class heads, and how their logits are ranked."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr.config import (
    ClassesConfig,
    DetectorConfig,
    SigmoidClassesConfig,
    SoftmaxClassesConfig,
)


class Best(NamedTuple):
    """The best candidates of each image, ``[B, T]`` each, best first.

    Attributes:
        scores: In [0, 1].
        queries: Which query each is.
        labels: Its class, int64.
    """

    scores: Tensor
    queries: Tensor
    labels: Tensor


class ClassHead(nn.Linear):
    """Class logits ``[..., D]`` to ``[..., K]``, or one more."""

    @staticmethod
    @abstractmethod
    def best(logits: Tensor, count: int) -> Best:
        """The ``count`` best candidates, or all where there are fewer.

        Args:
            logits: ``[B, N, K]``, or ``[B, N, K + 1]`` with "no object" last.
            count: T.
        """


class SigmoidClassHead(ClassHead):
    """Independent scores, which start at 0.01 everywhere (focal loss paper, section 4.1)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes)
        nn.init.constant_(self.bias, -math.log(99))

    @staticmethod
    def best(logits: Tensor, count: int) -> Best:
        """See the base class; every (query, class) pair is a candidate."""
        num_classes = logits.shape[2]
        # Ranking logits equals ranking scores, but large logits do not tie as saturated scores do.
        count = min(count, logits.shape[1] * num_classes)
        best, index = logits.flatten(1).topk(count, dim=1)
        query = torch.div(index, num_classes, rounding_mode="floor")
        labels = index - query * num_classes
        return Best(best.sigmoid(), query, labels)


class SoftmaxClassHead(ClassHead):
    """Scores that exclude each other, with one more logit for "no object" (DETR)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes + 1)

    @staticmethod
    def best(logits: Tensor, count: int) -> Best:
        """See the base class; each query is a candidate, with its best class."""
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        best, query = scores.topk(min(count, scores.shape[1]), dim=1)
        return Best(best, query, labels.gather(1, query))


_HEADS: dict[type[ClassesConfig], type[SigmoidClassHead] | type[SoftmaxClassHead]] = {
    SigmoidClassesConfig: SigmoidClassHead,
    SoftmaxClassesConfig: SoftmaxClassHead,
}


def class_head(config: DetectorConfig) -> ClassHead:
    """A new class head of a detector."""
    return _HEADS[type(config.heads.classes)](config.width, config.num_classes)


def best(config: ClassesConfig, logits: Tensor, count: int) -> Best:
    """What :meth:`ClassHead.best` of a config's head says."""
    return _HEADS[type(config)].best(logits, count)
