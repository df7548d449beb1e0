"""What a teacher is: any detector that shows what methods look at, ours or another library's.

:class:`Detector` satisfies :class:`Teacher`, and so does whatever wraps a network of another kind
(``distill.teachers``). Methods know nothing else of a teacher; of a student, they compare the same
:class:`Facts`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from detr.models.structures import GroupOutput, Memory, QueryGroup

# What a teacher can give: answers to its own queries, maps, those queries themselves (with hidden
# states), answers to any queries, attention, and masks beside the boxes of its answers.
TeacherPart = Literal[
    "predictions", "backbone", "neck", "memory", "queries", "decode", "attention", "masks"
]
EVERYTHING: frozenset[TeacherPart] = frozenset(get_args(TeacherPart))
# What a detector of boxes gives at most.
WITHOUT_MASKS: frozenset[TeacherPart] = EVERYTHING - {"masks"}

AttentionKind = Literal["deformable", "dense", "conditional"]


@dataclass(frozen=True)
class Facts:
    """What is fixed about a detector, and what methods pair student and teacher by.

    Attributes:
        family: What messages call it.
        num_classes: Number of foreground classes K.
        width: Channels D of memory and queries.
        neck_width: Channels of the maps that the encoder takes.
        heads: Of the decoder's self-attention; 0 where it does not hand out attention.
        cross_heads: Of its attention to the memory; likewise.
        attention: Of the decoder to the memory: sampled (``deformable``), over all cells
            (``dense``), or over all cells with content and place apart (``conditional``).
        strides: Pixels per cell of each level of the memory, finest first.
        backbone_strides: Of the backbone's maps, which are the leading levels; none where it does
            not hand them out.
        backbone_channels: Of the same maps.
        encoder_layers: How many enhance the memory.
        decoder_layers: How many answer, each with logits and boxes.
        num_queries: Own queries of an image, N.
        query_start: Own queries start from ``points``, which follow from a learned position, or
            from ``boxes``, from which the position follows.
        blank_content: Own queries start without any content.
        edges: Boxes are read off distributions of their edges.
        scores: Every class has a ``sigmoid`` of its own, or all share a ``softmax`` with a last
            logit for "no object".
        masks: Answers have masks.
    """

    family: str
    num_classes: int
    width: int
    neck_width: int
    heads: int
    attention: AttentionKind
    strides: tuple[int, ...]
    backbone_strides: tuple[int, ...]
    backbone_channels: tuple[int, ...]
    encoder_layers: int
    decoder_layers: int
    num_queries: int
    query_start: Literal["points", "boxes"]
    blank_content: bool
    scores: Literal["sigmoid", "softmax"]
    cross_heads: int = 0
    edges: bool = False
    masks: bool = False


class ObjectDetector(Protocol):
    """A torch network that finds objects in a batch of images."""

    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Its weights; at least one, whose device is the network's."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switches to training, or back to evaluation."""
        ...

    def eval(self) -> Any:
        """Switches to evaluation."""
        ...

    def __call__(
        self, images: Tensor, valid_sizes: Tensor, original_sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """What :meth:`detr.models.Detector.forward` gives: boxes, scores, labels, perhaps masks."""
        ...


class Teacher(ObjectDetector, Protocol):
    """A frozen detector that methods learn from.

    Attributes:
        facts: See :class:`Facts`.
        offers: What methods may look at; the rest is empty or cannot be asked for.
    """

    facts: Facts
    offers: frozenset[TeacherPart]

    def encode(self, images: Tensor, valid_sizes: Tensor) -> Memory:
        """What it sees.

        Args:
            images: ``[B, 3, H, W]``, as the student gets them: normalized, padded at the right and
                bottom.
            valid_sizes: ``[B, 2]`` (height, width) of the image inside the canvas, pixels.

        Returns:
            The memory, with ``features`` where ``backbone`` is offered and ``layers`` where
            ``neck`` is.
        """
        ...

    def queries(self, memory: Memory) -> list[QueryGroup]:
        """Its own queries: one group, ``own``."""
        ...

    def decode(
        self,
        memory: Memory,
        groups: list[QueryGroup],
        attention: bool = False,
        self_attention: Collection[str] = (),
    ) -> list[GroupOutput]:
        """Its answers to groups of queries that do not influence each other.

        Args:
            memory: Made by :meth:`encode`.
            groups: Those of :meth:`queries` and, where ``decode`` is offered, any others.
            attention: Also return the cross-attention of every layer, where it is offered.
            self_attention: Roles of groups whose self-attention is also wanted, where attention is
                offered.

        Returns:
            One output per group, in order.
        """
        ...

    def class_contents(self) -> Tensor | None:
        """Content ``[K, D]`` of queries that ask for a class, where it was trained with such."""
        ...
