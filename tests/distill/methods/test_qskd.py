"""QSKD against its equations and small cases worked by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from detr.models import Detector, Target, cxcywh_to_xyxy
from distill.losses.costs import MatchingCosts
from distill.losses.matcher import match
from distill.losses.matches import Matches
from distill.losses.overlap import giou
from distill.losses.targets import pad_targets
from distill.methods import Method
from distill.methods.parts.attended_cells import attended_cells, dense
from distill.methods.parts.prediction_pairs import Predictions, distances
from distill.methods.parts.query_selection import select_queries
from distill.methods.qskd import attention_mask, normalized
from distill.methods.step import Step

Build = Callable[..., Detector]
TakeStep = Callable[..., Step]
MakeMethod = Callable[..., Method]
Targets = Callable[..., Target]
COSTS = MatchingCosts()


def pairs(rows: list[tuple[int, int, int, int]]) -> Matches:
    return Matches(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1))


def overlaps(boxes: torch.Tensor, truth: list[Target]) -> torch.Tensor:
    """Generalised IoU with every padded box."""
    return giou(cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(pad_targets(truth)[0])[:, None])


def test_group_query_selection_by_hand(target: Targets) -> None:
    # Truth 0 covers [0, .4]^2, truth 1 [.6, 1]^2. Query 0 sits on truth 0; 1 is shifted half a side
    # (GIoU 1/3); 2 lies apart in the same rows (hull .6 x .4, union .24 + ...); 3 sits on truth 1.
    truth = [target([[0.2, 0.2, 0.4, 0.4], [0.8, 0.8, 0.4, 0.4]], [0, 1]), target([], [])]
    queries = [
        [0.2, 0.2, 0.4, 0.4],
        [0.4, 0.2, 0.4, 0.4],
        [0.7, 0.2, 0.2, 0.4],
        [0.8, 0.8, 0.4, 0.4],
    ]
    table = overlaps(torch.tensor([[queries, queries]]), truth)
    matches = pairs([(0, 0, 0, 0), (0, 0, 3, 1)])
    found = select_queries(table, truth, matches, 0.0)
    assert found.positive[0].tolist() == [[True, False, False, True], [False] * 4]
    assert found.hard[0].tolist() == [[False, True, False, False], [False] * 4]
    assert found.easy[0].tolist() == [[False, False, True, False], [False] * 4]
    assert found.owner[0, 0].tolist()[:2] == [0, 0] and found.owner[0, 0, 3] == 1
    assert found.overlap[0, 0, [0, 1, 3]].tolist() == pytest.approx([1, 1 / 3, 1], abs=1e-5)
    # Query 2 against truth 0: apart by .2, hull .8 x .4 = .32, union .16 + .08: GIoU -.08/.32.
    assert found.overlap[0, 0, 2].item() == pytest.approx(-0.25, abs=1e-5)
    assert select_queries(table, truth, matches, -0.3).hard[0, 0].tolist() == [0, 1, 1, 0]
    assert not select_queries(table, truth, matches, 1 / 3 + 1e-4).hard.any()


def test_a_positive_belongs_to_its_match_even_where_another_box_fits_better(
    target: Targets,
) -> None:
    truth = [target([[0.2, 0.2, 0.4, 0.4], [0.8, 0.8, 0.4, 0.4]], [0, 1])]
    boxes = torch.tensor([[[[0.2, 0.2, 0.4, 0.4], [0.2, 0.2, 0.4, 0.4]]]])
    matches = pairs([(0, 0, 0, 0), (0, 0, 1, 1)])
    found = select_queries(overlaps(boxes, truth), truth, matches, 0.0)
    assert found.owner[0, 0].tolist() == [0, 1]
    assert found.overlap[0, 0, 1].item() < 0 and found.positive.all()


def test_mask_is_equation_4(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    qskd = method("qskd", student, teacher)
    step = take_step(student, teacher, [qskd])
    output, memory = step.teacher_outputs["own"], step.teacher_memory
    assert memory is not None
    logits, boxes = output.logits[-1][None], output.boxes[-1][None]
    matches = match(logits, boxes, step.targets, COSTS)
    selected = select_queries(overlaps(boxes, step.targets), step.targets, matches, -0.4)
    chosen = selected.mask("positive_hard")[0]
    assert selected.hard.any() and not chosen.all()
    for weighted in (True, False):
        found = attention_mask(output, selected, chosen, memory, weighted)
        maps = dense(attended_cells(output.attention[0], memory.shapes)).mean(2)
        for image in range(2):
            expected = torch.zeros(maps.shape[-1])
            for query in chosen[image].nonzero()[:, 0].tolist():
                factor = 1 + float(selected.overlap[0, image, query]) if weighted else 1.0
                expected += factor * maps[image, query]
            torch.testing.assert_close(found[image], expected / chosen[image].sum())


def test_normalized_is_batch_norm_over_the_kept_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, generator=generator) * 4 + 7
    kept = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])
    found = normalized(tokens, kept)[kept]
    expected = torch.nn.functional.batch_norm(tokens[kept], None, None, training=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_follow_equation_5(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    qskd = method("qskd", student, teacher, predictions="off", feature_weight=1.0)
    step = take_step(student, teacher, [qskd])
    losses = qskd.losses(step)
    assert list(losses) == ["qskd/features"]
    output, memory = step.teacher_outputs["own"], step.teacher_memory
    assert memory is not None
    logits, boxes = output.logits[-1][None], output.boxes[-1][None]
    matches = match(logits, boxes, step.targets, COSTS)
    selected = select_queries(overlaps(boxes, step.targets), step.targets, matches, 0.0)
    mask = attention_mask(output, selected, selected.mask("positive_hard")[0], memory, True)
    kept = ~memory.padding
    mask = mask * kept.sum(1, keepdim=True)
    masked = [(x.tokens * mask[..., None])[kept] for x in (memory, step.student_memory)]
    norm = [torch.nn.functional.batch_norm(x, None, None, training=True) for x in masked]
    expected = (norm[0] - norm[1]).square().mean()
    torch.testing.assert_close(losses["qskd/features"], expected, rtol=1e-4, atol=1e-5)


def test_an_unscaled_mask_drowns_in_the_epsilon(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    tokens = torch.randn(1, 500, 3, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(1, 500, dtype=torch.bool)
    assert normalized(tokens, kept).std().item() == pytest.approx(1, abs=0.01)
    # At COCO's 17,821 cells a mask of mean 1 / S leaves a fiftieth of the spread.
    assert normalized(tokens / 17821, kept).std() < 0.02
    plain = method("qskd", student, teacher, predictions="off", mask_scale="none")
    scaled = method("qskd", student, teacher, predictions="off")
    step = take_step(student, teacher, [plain])
    found = [m.losses(step)["qskd/features"].item() for m in (plain, scaled)]
    assert abs(found[0] - found[1]) > 1e-3 * found[1]


@torch.no_grad()
def equation_7(step: Step, layer: int, threshold: float) -> dict[str, float]:
    """LAPD of one layer in loops, negatives assigned by brute force."""
    found: list[tuple[float, float, float]] = []
    sides = []
    for output in (step.student_outputs["own"], step.teacher_outputs["own"]):
        logits, boxes = output.logits[layer], output.boxes[layer]
        matches = match(logits[None], boxes[None], step.targets, COSTS)
        sides.append((logits, boxes, matches))

    def distance(image: int, i: int, j: int) -> tuple[float, float, float]:
        (zs, bs, _), (zt, bt, _) = sides
        d = distances(
            Predictions(zs[image, i][None], bs[image, i][None]),
            Predictions(zt[image, j][None], bt[image, j][None]),
        )
        return float(d.classes), 5 * float(d.l1), 2 * float(d.giou)

    for image, truth in enumerate(step.targets):
        lists = []
        for _, boxes, matches in sides:
            here = matches.image == image
            owned = dict(zip(matches.query[here].tolist(), matches.box[here].tolist(), strict=True))
            table = giou(cxcywh_to_xyxy(boxes[image])[:, None], cxcywh_to_xyxy(truth.boxes)[None])
            hard: dict[int, list[int]] = {j: [] for j in range(len(truth.labels))}
            for query in range(len(table)):
                best, owner = table[query].max(0)
                if query not in owned and best > threshold:
                    hard[int(owner)].append(query)
            lists.append(({j: i for i, j in owned.items()}, hard))
        (our_match, our_hard), (their_match, their_hard) = lists
        for j in range(len(truth.labels)):
            found.append(distance(image, our_match[j], their_match[j]))
            short, long = our_hard[j], their_hard[j]
            swap = len(short) > len(long)
            if swap:
                short, long = long, short
            options = [
                [
                    distance(image, *((b, a) if swap else (a, b)))
                    for a, b in zip(short, p, strict=True)
                ]
                for p in permutations(long, len(short))
            ]
            found += min(options, key=lambda o: sum(map(sum, o)))
    sums = [sum(x) / len(found) for x in zip(*found, strict=True)]
    return dict(zip(("class", "l1", "giou"), sums, strict=True))


def test_predictions_follow_equation_7(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    qskd = method("qskd", student, teacher, features=False, threshold=-0.3)
    step = take_step(student, teacher, [qskd])
    assert not step.teacher_outputs["own"].attention  # nobody asked
    losses = qskd.losses(step)
    layers = [equation_7(step, layer, -0.3) for layer in (0, 1)]
    for key in ("class", "l1", "giou"):
        expected = sum(layer[key] for layer in layers)
        assert losses[f"qskd/{key}"].item() == pytest.approx(expected, rel=1e-3), key
    last = method("qskd", student, teacher, features=False, threshold=-0.3, layers="last")
    found = last.losses(step)
    assert found["qskd/l1"].item() == pytest.approx(layers[1]["l1"], rel=1e-3)


def test_global_alignment_pairs_every_query(
    build: Build, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    student = build(seed=2, queries={"number": 5}).train()
    qskd = method("qskd", student, teacher, features=False, predictions="global")
    step = take_step(student, teacher, [qskd])
    expected = 0.0
    for layer in range(2):
        ours, theirs = (o["own"] for o in (step.student_outputs, step.teacher_outputs))
        for image in range(2):
            table = torch.zeros(5, 7)
            for i, j in product(range(5), range(7)):
                parts = distances(
                    Predictions(ours.logits[layer][image, i], ours.boxes[layer][image, i]),
                    Predictions(theirs.logits[layer][image, j], theirs.boxes[layer][image, j]),
                )
                table[i, j] = (parts.classes + 5 * parts.l1 + 2 * parts.giou).detach()
            rows, columns = linear_sum_assignment(table.numpy())
            expected += float(table[rows, columns].sum()) / 10
    assert sum(v.item() for v in qskd.losses(step).values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["positive_hard", "positive", "hard", "easy"])
@pytest.mark.parametrize("pool", ["box", "image"])
def test_every_selection_is_finite_and_teaches(
    select: str,
    pool: str,
    student: Detector,
    teacher: Detector,
    take_step: TakeStep,
    method: MakeMethod,
) -> None:
    threshold = {"hard": -1.0, "easy": 1.0}.get(select, -0.3)
    qskd = method("qskd", student, teacher, select=select, pool=pool, threshold=threshold)
    losses = qskd.losses(take_step(student, teacher, [qskd]))
    assert set(losses) == {f"qskd/{k}" for k in ("features", "class", "l1", "giou")}
    assert all(v.isfinite() and v > 0 for v in losses.values())


@pytest.mark.parametrize("query", ["mixed", "two_stage", "learned"])
def test_an_equal_student_has_nothing_to_learn(
    query: str, build: Build, take_step: TakeStep, method: MakeMethod
) -> None:
    teacher = build(seed=3, query=query).eval()
    student = copy.deepcopy(teacher)
    for predictions in ("local", "global"):
        qskd = method("qskd", student, teacher, predictions=predictions)
        step = take_step(student, teacher, [qskd])
        losses = qskd.losses(step)
        for key in ("features", "l1", "giou"):
            assert abs(losses[f"qskd/{key}"].item()) < 1e-5, key
        # The cross-entropy is the teacher's entropy then, and pulls nowhere.
        logits = step.student_outputs["own"].logits
        gradients = torch.autograd.grad(losses["qskd/class"], logits)
        assert all(g.abs().max() < 1e-6 for g in gradients)


@pytest.mark.parametrize(
    "changes", [{}, {"encoder.layers": 0}, {"width": 16}, {"queries.number": 4}]
)
def test_gradients_reach_the_student_and_never_the_teacher(
    changes: dict[str, object], build: Build, teacher: Detector, reached: Callable[..., set[str]]
) -> None:
    moved = reached("qskd", build(seed=2, **changes).train(), teacher)
    for part in ("backbone", "neck", "decoder.layers.0", "decoder.class_heads.1"):
        assert any(name.startswith(part) for name in moved), part


def test_features_do_not_reach_the_decoder_and_the_adaptor_is_no_part_of_the_student(
    build: Build, teacher: Detector, take_step: TakeStep, method: MakeMethod
) -> None:
    student = build(seed=2, encoder={"layers": 0}).train()
    qskd = method("qskd", student, teacher)
    assert any(name.startswith("adaptor.layers.0") for name, _ in qskd.named_parameters())
    qskd.losses(take_step(student, teacher, [qskd]))["qskd/features"].backward()
    assert all(p.grad is None for n, p in student.named_parameters() if n.startswith("decoder."))
    assert all(p.grad is not None for p in qskd.parameters())
    none = method("qskd", student, teacher, adaptor_layers=0)
    assert not list(none.parameters())
    same = method("qskd", build(seed=2), teacher)
    assert not list(same.parameters())
    assert len(list(method("qskd", student, teacher, adaptor_layers=3).adaptor.layers)) == 3


def test_images_without_objects(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    box = [[0.5, 0.5, 0.3, 0.3]]
    qskd = method("qskd", student, teacher)
    for targets in ([target([], [])] * 2, [target(box, [1]), target([], [])]):
        student.zero_grad()
        losses = qskd.losses(take_step(student, teacher, [qskd], targets))
        total = torch.stack(list(losses.values())).sum()
        assert total.isfinite() and (total > 0) == (len(targets[0].labels) > 0)
        total.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_an_image_without_objects_changes_no_other_images_features(
    student: Detector, teacher: Detector, take_step: TakeStep, method: MakeMethod, target: Targets
) -> None:
    qskd = method("qskd", student.eval(), teacher)
    truth = target([[0.5, 0.5, 0.3, 0.3]], [1])
    both = qskd.losses(take_step(student, teacher, [qskd], [truth, target([], [])]))
    step = take_step(student, teacher, [qskd], [truth, target([], [])])
    step.targets = step.targets[:1]
    for memory in (step.student_memory, step.teacher_memory):
        assert memory is not None
        memory.tokens, memory.padding = memory.tokens[:1], memory.padding[:1]
    output = step.teacher_outputs["own"]
    output.logits = [x[:1] for x in output.logits]
    output.boxes = [x[:1] for x in output.boxes]
    for sampled in output.attention:
        sampled.locations, sampled.weights = sampled.locations[:1], sampled.weights[:1]
    alone = qskd._features(step)  # type: ignore[operator]
    torch.testing.assert_close(both["qskd/features"], 50 * alone)
