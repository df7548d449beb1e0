"""The list of known miscompilations loads, and finds what it should and nothing else."""

from __future__ import annotations

import pytest

from engines.msda_function import OPSETS, HeadShape, make_function
from export.deploy.known_bad import in_range, known_bad, known_bad_list


def ids(*arguments: object) -> list[str]:
    return [entry.id for entry in known_bad(*arguments)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "version", "opset", "ops", "precision", "expected"),
    [
        ("tensorrt", "10.14.1.48", 17, {"GridSample"}, "fp32", ["gridsample-in-decoder"]),
        ("tensorrt", "11.1.0.106", 18, {"GridSample"}, "fp16", ["gridsample-in-decoder"]),
        ("tensorrt", "10.13.3.9", 17, {"GridSample"}, "fp32", ["gridsample-10.13.3"]),
        ("tensorrt", "10.13.2", 17, {"GridSample"}, "fp32", []),
        ("tensorrt-rtx", "1.7.1", 17, {"GridSample"}, "fp32", ["gridsample-tensorrt-rtx"]),
        ("tensorrt-rtx", "1.7.1", 17, {"GatherND"}, "fp32", []),
        (
            "tensorrt-rtx",
            "1.7.1",
            20,
            {"GridSample"},
            "fp32",
            ["gridsample-opset-20", "gridsample-tensorrt-rtx"],
        ),
        ("tensorrt", "11.1", 17, {"GatherND", "MatMul"}, "fp32", []),
        ("tensorrt", "10.9", 16, {"ReduceMean"}, "fp16", ["layernorm-in-pieces"]),
        ("tensorrt", "10.9", 16, {"ReduceMean"}, "fp32", []),
        ("tensorrt", "10.9", 17, {"ReduceMean"}, "fp16", []),
        ("onnxruntime", "1.20", 20, {"GridSample"}, "fp32", []),
    ],
)
def test_what_applies(
    backend: str, version: str, opset: int, ops: set[str], precision: str, expected: list[str]
) -> None:
    assert ids(backend, version, opset, ops, precision) == expected


def test_what_one_gpu_alone_gets_wrong() -> None:
    orin = ("tensorrt", "10.13.3.9", 17, {"MatMul"}, "fp16")
    assert ids(*orin, (87,)) == ["orin-10.13.3"] == ids(*orin, (86, 87))
    assert ids(*orin, (86,)) == ids(*orin) == ids(*orin[:-1], "fp32", (87,)) == []
    assert ids("tensorrt", "10.3.0", 17, {"MatMul"}, "fp16", (87,)) == []


@pytest.mark.parametrize(
    "version", ["10.13.3.9", "10.14.1.48", "10.16.1.11", "11.1.0", "11.4.0.106"]
)
@pytest.mark.parametrize("opset", OPSETS)
def test_what_export_writes_has_a_way_into_every_tensorrt(version: str, opset: int) -> None:
    """The exporter knows no version to consult the list for; so each graph of it must have a body,
    or the plugin, that is on no list, and the one with GridSample must be."""
    for precision in ("fp32", "fp16", "int8"):
        for lowering, expected in (("gather", False), ("gridsample", True)):
            head = HeadShape(8, 32, 4)
            body = make_function(((8, 8), (4, 4)), head, lowering, opset, precision != "fp32")
            ops = {node.op_type for node in body.node} | {"LayerNormalization", "Softmax", "TopK"}
            found = known_bad("tensorrt", version, opset, ops, precision)
            assert bool(found) == expected, found
        assert not known_bad("tensorrt", version, opset, {"MSDeformAttn"}, precision)


def test_every_entry_can_be_acted_on() -> None:
    entries = known_bad_list()
    assert len({entry.id for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.links and all(link.startswith("https://") for link in entry.links)
        assert "\n" not in entry.text() and entry.instead
        assert entry.ops or entry.capabilities, "an entry that stops every build"
        in_range("1.0", entry.versions)
        in_range("17", entry.opset)


@pytest.mark.parametrize(
    ("version", "range_", "inside"),
    [
        ("10.14", ">=10.14", True),
        ("10.9", ">=10.14", False),
        ("10.13.3.9", ">=10.13.3,<10.14", True),
        ("11", "==11.0.0", True),
        ("1.2", "", True),
    ],
)
def test_ranges(version: str, range_: str, inside: bool) -> None:
    assert in_range(version, range_) is inside


def test_a_bad_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="10-11"):
        in_range("10", "10-11")
