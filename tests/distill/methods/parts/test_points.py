"""Distillation points and how answers to them are compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from detr.config import (
    AnchorQueriesConfig,
    BackboneConfig,
    LearnedQueriesConfig,
    QueriesConfig,
)
from detr.errors import UserError
from detr.models import Detector, GroupOutput, QueryGroup, Target
from distill.methods.parts.pairing import pair_layers
from distill.methods.parts.points import (
    ForStudent,
    TargetAware,
    answer_distances,
    check_same_kind,
    general_points,
    kl_divergence,
    specific_points,
)

Build = Callable[..., Detector]
Targets = Callable[..., Target]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def output(logits: list[list[float]], boxes: list[list[float]], **group: object) -> GroupOutput:
    """One image, one layer."""
    queries = QueryGroup("x", torch.zeros(1, len(logits), 4), torch.zeros(1, len(logits), 4))
    for key, value in group.items():
        setattr(queries, key, value)
    return GroupOutput(queries, [torch.tensor([logits])], [torch.tensor([boxes])], [], [])


def test_kl_divergence_by_hand() -> None:
    # softmax([2 ln 3, 0] / 2) = (3/4, 1/4); softmax([0, 0]) = (1/2, 1/2).
    teacher, student = torch.tensor([2 * math.log(3), 0.0]), torch.zeros(2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(
        kl_divergence(student, teacher, 2.0), torch.tensor(4 * expected), rtol=1e-5, atol=1e-6
    )
    assert kl_divergence(teacher, teacher, 2.0).abs() < 1e-6


def test_kl_divergence_of_a_single_class_compares_its_sigmoid() -> None:
    teacher, student = torch.tensor([math.log(3)]), torch.tensor([0.0])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(kl_divergence(student, teacher, 1.0), torch.tensor(expected))


def test_kl_divergence_survives_half_precision() -> None:
    teacher = torch.tensor([30.0, -30.0], dtype=torch.float16)
    value = kl_divergence(-teacher, teacher, 1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor(60.0))


def test_compare_by_hand() -> None:
    student = output([[0.0, 0.0]], [[0.5, 0.5, 0.2, 0.2]])
    teacher = output([[1.0, -1.0]], [[0.6, 0.5, 0.2, 0.2]])
    found = answer_distances(student, teacher, ((0, 0),), 1.0)
    # Boxes overlap on half their area: IoU = 1/3, and their hull has no empty part.
    torch.testing.assert_close(found.giou, torch.tensor([[[2 / 3]]]))
    torch.testing.assert_close(found.l1, torch.tensor([[[0.1]]]))
    torch.testing.assert_close(found.confidence, torch.tensor([[[1 / (1 + math.exp(-1))]]]))


def test_padding_has_no_confidence() -> None:
    student = output(
        [[0.0], [0.0]], [[0.5, 0.5, 0.2, 0.2]] * 2, padding=torch.tensor([[False, True]])
    )
    teacher = output([[3.0], [3.0]], [[0.5, 0.5, 0.2, 0.2]] * 2)
    weights = answer_distances(student, teacher, ((0, 0),), 1.0).confidence
    assert weights[0, 0, 0] > 0.9
    assert weights[0, 0, 1] == 0


def test_layers_pair_one_to_one_or_last_to_last() -> None:
    assert pair_layers(3, 3, None, "m") == ((0, 0), (1, 1), (2, 2))
    assert pair_layers(2, 6, None, "m") == ((1, 5),)
    assert pair_layers(2, 6, (2, 5), "m") == ((0, 2), (1, 5))
    assert pair_layers(2, 6, (None, 5), "m") == ((1, 5),)
    for wrong in ((1,), (0, 6), (-1, 0)):
        with pytest.raises(UserError, match=r"methods\.m\.layer_map") as error:
            pair_layers(2, 6, wrong, "m")
        assert error.value.code == "method-layer-map"


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_general_points_are_shared_and_new_in_every_step(build: Build, query: str) -> None:
    facts = build(query=query).facts
    own = QueryGroup("own", torch.ones(2, 7, facts.width), torch.zeros(2, 7, 4))

    def points(seed: int) -> QueryGroup:
        return general_points("g", own, 5, facts, generator(seed))

    first, again, other = points(0), points(0), points(1)
    torch.testing.assert_close(first.content, again.content)
    assert not torch.equal(first.content, other.content)
    assert first.content.shape == (2, 5, facts.width)
    torch.testing.assert_close(first.content[0], first.content[1])
    assert first.reference.shape == (2, 5, 2 if query == "learned" else 4)
    assert ((first.reference > 0) & (first.reference < 1)).all()
    assert (first.position is not None) == (query == "learned")


@pytest.mark.parametrize(
    ("queries", "patterns"),
    [
        (LearnedQueriesConfig(reference="mlp", learned_content=False), 0),
        (AnchorQueriesConfig(learned_content=False), 0),
        (AnchorQueriesConfig(learned_content=False, patterns=2), 2),
    ],
    ids=["learned", "anchors", "patterns"],
)
def test_general_points_have_content_only_where_the_models_queries_do(
    queries: QueriesConfig, patterns: int, build: Build
) -> None:
    # Released KD-DETR asks DAB-DETR about random anchors whose content is what its own begin with.
    refinement = {"kind": "detach" if queries.has_boxes else "none"}
    facts = build(
        backbone=BackboneConfig(name="test_resnet", strides=(16,)),
        neck={"levels": 1},
        encoder={"kind": "dense", "layers": 1, "ffn": 32},
        queries=queries,
        decoder={"cross_attention": {"kind": "conditional"}, "refinement": refinement},
    ).facts
    own = QueryGroup("own", torch.full((2, 7, facts.width), 3.0), torch.zeros(2, 7, 4))
    group = general_points("g", own, 5, facts, generator())
    assert (group.content == 3.0).all() == (patterns == 0)
    assert group.content.shape == (2, 5, facts.width) and group.reference.std() > 0.01


def test_specific_points_are_the_teachers_queries_without_gradient(build: Build) -> None:
    for query in ("mixed", "two_stage", "learned"):
        detector = build(query=query)
        memory = detector.encode(torch.randn(1, 3, 64, 96), torch.tensor([[64.0, 96.0]]))
        own = detector.queries(memory)[0]
        points = specific_points("s", own, detector.facts)
        torch.testing.assert_close(points.content, own.content)
        torch.testing.assert_close(points.reference, own.reference)
        assert not points.content.requires_grad
        # Only learned positions are part of a query; the others follow from the reference.
        assert (points.position is not None) == (query == "learned")
        assert points.proposals is None


def test_target_aware_queries_stand_on_the_objects(build: Build, target: Targets) -> None:
    teacher = build()
    boxes = [[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.4, 0.6]]
    targets = [target(boxes, [2, 0]), target(boxes[:1], [1])]
    group = TargetAware(teacher, copies=3, jitter=0.0)("t", targets, [generator()] * len(targets))
    table = teacher.denoiser.label_embedding.weight
    assert group.padding is not None
    assert group.content.shape == (2, 6, 32)
    for copy in range(3):
        torch.testing.assert_close(group.reference[0, 2 * copy : 2 * copy + 2], targets[0].boxes)
        torch.testing.assert_close(group.content[0, 2 * copy], table[2])
        torch.testing.assert_close(group.content[0, 2 * copy + 1], table[0])
        torch.testing.assert_close(group.content[1, 2 * copy], table[1])
        assert group.padding[:, 2 * copy : 2 * copy + 2].tolist() == [[False, False], [False, True]]


def test_target_aware_content_does_not_follow_the_teacher(build: Build, target: Targets) -> None:
    teacher = build()
    queries = TargetAware(teacher, copies=1, jitter=0.0)
    before = queries("t", [target([[0.5, 0.5, 0.1, 0.1]], [0])], [generator()]).content.clone()
    teacher.denoiser.label_embedding.weight.data += 1
    after = queries("t", [target([[0.5, 0.5, 0.1, 0.1]], [0])], [generator()]).content
    torch.testing.assert_close(before, after)
    assert "content" in queries.state_dict()
    assert not list(queries.parameters())


def test_target_aware_of_learned_queries_gives_center_and_frozen_position(
    build: Build, target: Targets
) -> None:
    teacher = build(query="learned")
    queries, twin = (TargetAware(teacher, 1, 0.0) for _ in range(2))
    group = queries("t", [target([[0.3, 0.4, 0.2, 0.3]], [0])], [generator()])
    torch.testing.assert_close(group.reference, torch.tensor([[[0.3, 0.4]]]))
    assert group.position is not None and group.position.shape == (1, 1, 32)
    # The size of the box is in the position, whose MLP is the same in every run.
    larger = twin("t", [target([[0.3, 0.4, 0.4, 0.3]], [0])], [generator()])
    same = twin("t", [target([[0.3, 0.4, 0.2, 0.3]], [0])], [generator()])
    assert larger.position is not None and not torch.allclose(group.position, larger.position)
    torch.testing.assert_close(group.position, same.position)
    assert not any(p.requires_grad for p in queries.parameters())
    assert set(queries.state_dict()) > {"content"}


def test_jitter_leaves_the_first_copy_clean(build: Build, target: Targets) -> None:
    box = [0.4, 0.6, 0.2, 0.1]
    group = TargetAware(build(), 3, 0.4)("t", [target([box], [0])], [generator()])
    torch.testing.assert_close(group.reference[0, 0], torch.tensor(box))
    moved = (group.reference[0, 1:] - torch.tensor(box)).abs()
    reach = 0.4 * torch.tensor([0.1, 0.05, 0.2, 0.1])
    assert (moved > 0).all() and (moved <= reach + 1e-6).all()


def test_no_objects_leave_one_filler_query(build: Build, target: Targets) -> None:
    group = TargetAware(build(), 3, 0.0)("t", [target([], [])] * 2, [generator(), generator(1)])
    assert group.padding is not None and group.padding.all()
    assert group.content.shape[1] == 3
    assert group.content.isfinite().all()


def test_width_is_bridged_for_the_student_only(build: Build) -> None:
    teacher, student = build(width=32), build(width=16)
    bridge = ForStudent(student.facts, teacher.facts)
    own = QueryGroup("own", torch.zeros(1, 1, teacher.facts.width), torch.zeros(1, 1, 4))
    group = general_points("g", own, 5, teacher.facts, generator())
    assert bridge(group).content.shape == (1, 5, 16)
    assert sum(p.requires_grad for p in bridge.parameters()) == 2
    assert not list(ForStudent(teacher.facts, teacher.facts).parameters())


def test_points_and_boxes_cannot_be_mixed(build: Build) -> None:
    check_same_kind(build(query="two_stage").facts, build(query="mixed").facts, "m")
    with pytest.raises(UserError) as error:
        check_same_kind(build(query="learned").facts, build(query="mixed").facts, "m")
    assert error.value.code == "method-queries"
