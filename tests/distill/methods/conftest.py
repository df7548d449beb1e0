"""Tiny detectors and one training step of them, through the real loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from detr.config import (
    BackboneConfig,
    ContrastiveDenoisingConfig,
    DecoderConfig,
    DeformableCrossAttentionConfig,
    DeformableEncoderConfig,
    DetectorConfig,
    DistributionRefinementConfig,
    LearnedQueriesConfig,
    LookForwardTwiceConfig,
    MixedQueriesConfig,
    NeckConfig,
    TwoStageQueriesConfig,
)
from detr.models import Detector, Target, build_detector
from distill.data.batches import Batch
from distill.methods import Method, build_methods
from distill.methods.foundation import FoundationOptions
from distill.methods.step import Step
from distill.teachers.foundation import Foundation, open_foundation
from distill.training.forward import forward

CLASSES = 3
CANVAS = (64, 96)

BuildDetector = Callable[..., Detector]
TakeStep = Callable[..., Step]


DETECTOR = DetectorConfig(
    num_classes=CLASSES,
    width=32,
    attention_heads=4,
    backbone=BackboneConfig(name="test_resnet", strides=(8, 16)),
    neck=NeckConfig(levels=3),
    encoder=DeformableEncoderConfig(layers=1, ffn=32, points=2),
    queries=MixedQueriesConfig(number=7, denoising=ContrastiveDenoisingConfig(number=4)),
    decoder=DecoderConfig(
        layers=2,
        ffn=32,
        cross_attention=DeformableCrossAttentionConfig(points=2),
        refinement=LookForwardTwiceConfig(),
        final_norm=True,
    ),
)
# Boxes read off distributions of their edges.
EDGES: dict[str, Any] = {"decoder.refinement": DistributionRefinementConfig(bins=8)}
# By what the queries are.
KINDS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "edges": EDGES,
    "two_stage": {"queries": TwoStageQueriesConfig(number=7), "decoder.final_norm": False},
    "learned": {
        "queries": LearnedQueriesConfig(number=7),
        "decoder": {"refinement": {"kind": "detach"}, "final_norm": False},
    },
}


def _detector(seed: int = 0, query: str = "mixed", **changes: Any) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build_detector(DETECTOR.replace(**KINDS[query]).replace(**changes))
        # Heads start at zero; nothing would reach the layers before them.
        for name, parameter in detector.named_parameters():
            if not name.startswith("backbone."):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return detector


def _target(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> Target:
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.zeros(0, 4),
    )


def _generator(*place: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(place) % 2**32)


def _step(
    student: Detector,
    teacher: Detector | None,
    methods: Sequence[Method],
    targets: Sequence[Target] | None = None,
    seed: int = 0,
    index: int = 0,
    average: Detector | None = None,
) -> Step:
    """One step on two images, the second of which leaves padding."""
    if targets is None:
        targets = [
            _target([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.4, 0.6]], [0, 2]),
            _target([[0.5, 0.5, 0.5, 0.25]], [1]),
        ]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(targets), 3, *CANVAS, generator=generator)
    valid = torch.tensor([[64.0, 96.0]] + [[40.0, 80.0]] * (len(targets) - 1))
    count = sum(len(target.labels) for target in targets)
    state = SimpleNamespace(
        student=student,
        teachers={
            kind: model
            for kind, model in (("frozen", teacher), ("ema", average))
            if model is not None
        },
        methods=methods,
        autocast=contextlib.nullcontext,
        box_counts=lambda _: (torch.tensor(float(max(1, count))), 0),
        generators=lambda step: (
            _generator(1000, step),
            [_generator(i, step) for i in range(len(targets))],
        ),
    )
    torch.manual_seed(seed)
    batch = Batch(images, valid, list(targets), [(Path("a.png"),)] * len(targets))
    return forward(state, batch, index)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny vision transformer where a recipe names nothing else than the published one."""
    usual = FoundationOptions()

    def tiny(model: str, weights: str | None, place: str) -> Foundation:
        if (model, weights) != (usual.model, usual.weights):
            return open_foundation(model, weights, place)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            body = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
        return Foundation(body, lambda x: body.forward_features(x)[:, 1:], 16, 64)

    monkeypatch.setattr("distill.methods.foundation.open_foundation", tiny)


@pytest.fixture(scope="session")
def build() -> BuildDetector:
    """``build(seed=0, query="mixed", **changes)``: a tiny DINO, or other queries and changes."""
    return _detector


@pytest.fixture(scope="session")
def take_step() -> TakeStep:
    """``take_step(student, teacher, methods, targets=None)``: encodes and decodes a batch."""
    return _step


@pytest.fixture(scope="session")
def target() -> Callable[..., Target]:
    """``target(boxes, labels)``."""
    return _target


@pytest.fixture(scope="session")
def method() -> Callable[..., Method]:
    """``method(name, student, teacher, **options)``: one method through the public way."""

    def make(name: str, student: Detector, teacher: Detector | None, **options: Any) -> Method:
        return build_methods([{name: options}], student, teacher)[0]

    return make


@pytest.fixture(scope="session")
def reached() -> Callable[..., set[str]]:
    """``reached(name, student, teacher, **options)``: the student's parameters a method moves.

    Fails if the teacher gets a gradient or changes, or a loss is not finite.
    """

    def learn(name: str, student: Detector, teacher: Detector, **options: Any) -> set[str]:
        teacher.requires_grad_(True)
        before = copy.deepcopy(teacher.state_dict())
        tested = build_methods([{name: options}], student, teacher)[0]
        losses = tested.losses(_step(student, teacher, [tested]))
        assert all(value.isfinite() for value in losses.values()), {
            name: value for name, value in losses.items() if not value.isfinite()
        }
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None for p in teacher.parameters())
        torch.testing.assert_close(teacher.state_dict(), before)
        return {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}

    return learn


@pytest.fixture()
def query_kind(request: pytest.FixtureRequest) -> str:
    """What student and teacher are: with distributions for a method that compares these."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    return "edges" if str(parameters.get("name")).startswith("go_lsd") else "mixed"


@pytest.fixture()
def teacher(build: BuildDetector, query_kind: str) -> Detector:
    """A frozen teacher, other weights than :func:`student`."""
    return build(seed=1, query=query_kind).eval().requires_grad_(False)


@pytest.fixture()
def student(build: BuildDetector, query_kind: str) -> Detector:
    """A student in training mode, shaped like the teacher."""
    return build(seed=2, query=query_kind).train()
