"""A fault that only one engine has is found in that engine's own values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from detr import msda
from engines import native_engine, open_engine, openvino_engine
from engines.bundle import Bundle, open_bundle
from engines.torch_engine import TorchEngine
from export.bundle import export_bundle
from export.golden import drawn_images
from export.parity.first_deviation import first_deviation

MakeCheckpoint = Callable[..., Path]
ENGINES: dict[str, ModuleType] = {"native": native_engine, "openvino": openvino_engine}


@pytest.fixture(scope="module")
def bundle(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("first_deviation") / "x.bundle"
    export_bundle(checkpoint("deformable-refine"), out, gate=False)
    return open_bundle(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_the_layer_is_named(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = TorchEngine(Path(bundle.info.source.path))
    image = drawn_images(bundle.info.model.preprocess.canvases[0])[1]
    healthy = first_deviation(bundle, reference, open_engine(bundle.path, name), image)
    assert healthy is not None and healthy.compared > 20 and healthy.before < 1e-4
    assert healthy.layer in ("", "decode"), healthy.text()

    calls = []

    def wrong(*arguments: Any) -> Any:
        """The kernel, but its second call forgets a tenth."""
        out = msda.forward(*arguments)
        calls.append(out)
        if len(calls) == 2:
            out *= 0.9
        return out

    names = ("native_available", "instruction_set")
    kept = {key: getattr(msda, key) for key in names}
    monkeypatch.setattr(ENGINES[name], "msda", SimpleNamespace(forward=wrong, **kept))
    found = first_deviation(bundle, reference, open_engine(bundle.path, name), image)
    assert found is not None and len(calls) == 3
    assert found.layer.startswith("decoder.layers.0"), found.text()
    assert "MSDeformAttn" in found.operators


@pytest.mark.slow
def test_a_fused_graph_is_compared_with_fused_modules(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Unfused, the first convolution of an RT-DETR's RepVGG block would already differ."""
    export_bundle(checkpoint("rtdetr"), tmp_path / "x.bundle", gate=False)
    bundle = open_bundle(tmp_path / "x.bundle")
    reference = TorchEngine(Path(bundle.info.source.path))
    image = drawn_images(bundle.info.model.preprocess.canvases[0])[1]
    healthy = first_deviation(bundle, reference, open_engine(bundle.path, "openvino"), image)
    assert healthy is not None and healthy.compared > 20 and healthy.before < 1e-4
    assert healthy.layer in ("", "decode"), healthy.text()
