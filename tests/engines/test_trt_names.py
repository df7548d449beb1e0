"""Every name we use of TensorRT exists in 10.16 and in 11.4, whose networks and flags differ.

``tensorrt_names.json`` holds, of the names used in our source, those that each release has. Write
it anew with the bindings of the releases at hand (they import with empty stand-ins for TensorRT's
libraries on ``LD_LIBRARY_PATH``; nothing of them runs):

    TENSORRT_BINDINGS=FOLDER:FOLDER python tests/engines/test_trt_names.py

where each FOLDER holds ``tensorrt_bindings`` and, in ``stub``, the libraries.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = Path(__file__).with_name("tensorrt_names.json")
SOURCES = (*sorted((ROOT / "engines/trt").glob("*.py")), ROOT / "engines/msda_plugin.py")
# The one module that may use what only TensorRT-RTX has.
RTX_ONLY_IN = "backend.py"

# What a variable is, by its name; the source keeps to these.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
    "timing_cache": "ITimingCache",
}


def receiver(node: ast.expr) -> str:
    """``config`` of ``config.flags``, ``self._config.flags`` and the like."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return str(name).lstrip("_")


def used_in(source: str) -> set[str]:
    """Names of TensorRT's that a module uses, as ``Class.member``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            # Methods TensorRT calls: a new name for one would go unnoticed.
            for base in node.bases:
                if isinstance(base, ast.Attribute) and receiver(base.value) == "trt":
                    methods = [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
                    found |= {f"{base.attr}.{name}" for name in methods if name[0] != "_"}
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        of = receiver(node.value)
        if of == "trt":
            found.add(node.attr)
        elif of in CLASSES:
            found.add(f"{CLASSES[of]}.{node.attr}")
        elif isinstance(node.value, ast.Attribute) and receiver(node.value.value) == "trt":
            found.add(f"{of}.{node.attr}")
    return found


def used(skip: str = "") -> set[str]:
    return set().union(*(used_in(p.read_text()) for p in SOURCES if p.name != skip))


def present(module: Any, names: set[str]) -> list[str]:
    def has(name: str) -> bool:
        try:
            functools.reduce(getattr, name.split("."), module)
        except AttributeError:
            return False
        return True

    return sorted(name for name in names if has(name))


def stub_bindings() -> dict[str, list[str]]:
    """Names the bindings named in ``TENSORRT_BINDINGS`` have, by version."""
    found = {}
    for folder in filter(None, os.environ.get("TENSORRT_BINDINGS", "").split(os.pathsep)):
        code = (
            "import importlib.util, json, sys\n"
            f"spec = importlib.util.spec_from_file_location('names', {str(__file__)!r})\n"
            "names = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(names)\n"
            "import tensorrt_bindings as trt\n"
            "print(json.dumps([trt.__version__, names.present(trt, names.used())]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=_environment(folder),
            capture_output=True,
            text=True,
            check=True,
        )
        version, names = json.loads(done.stdout)
        found[f"tensorrt {version}"] = names
    return found


def _environment(folder: str) -> dict[str, str]:
    """In which the bindings of a folder import."""
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "LD_LIBRARY_PATH": f"{folder}/stub"}


@pytest.fixture(scope="module")
def listed() -> dict[str, set[str]]:
    return {release: set(names) for release, names in json.loads(NAMES.read_text()).items()}


def test_the_source_is_understood() -> None:
    found = used()
    assert {
        "Builder.create_network",
        "BuilderFlag.TF32",
        "IExecutionContext.execute_async_v3",
        "ILogger.log",
        "IProgressMonitor.step_complete",
        "OnnxParser.parse_from_file",
        "ParserError.desc",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "DataType.BF16",
        "nptype",
    } <= found
    classes = {name.split(".")[0] for name in found}
    assert set(CLASSES.values()) <= classes, "a variable of the list is used nowhere"


def test_a_name_of_one_major_only_would_be_seen() -> None:
    assert used_in("config.int8_calibrator = c\nself._trt.BuilderFlag.FP16") == {
        "IBuilderConfig.int8_calibrator",
        "BuilderFlag",
        "BuilderFlag.FP16",
    }


@pytest.mark.parametrize("major", ["10.16", "11.4"])
def test_every_name_exists_in_both_majors(listed: dict[str, set[str]], major: str) -> None:
    (release,) = [name for name in listed if name.startswith(f"tensorrt {major}")]
    assert used(skip=RTX_ONLY_IN) - listed[release] == set()


def test_what_rtx_needs_exists_there(listed: dict[str, set[str]]) -> None:
    (release,) = [name for name in listed if name.startswith("tensorrt-rtx")]
    missing = used() - listed[release]
    # It takes no plugins and keeps tactics to itself; those calls are never made with it.
    assert missing == {"NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS"}
    only = listed[release] - set().union(*(listed[r] for r in listed if r != release))
    assert only == {
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IExecutionContext.is_stream_capturable",
    }


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_the_list_agrees_with_what_is_installed(listed: dict[str, set[str]], module: str) -> None:
    trt = pytest.importorskip(module)
    release = f"{module.replace('_', '-')} {trt.__version__}"
    if release not in listed:
        pytest.skip(f"{release} is not one of {', '.join(listed)}")
    assert set(present(trt, used())) == listed[release]


def test_the_list_agrees_with_the_bindings(listed: dict[str, set[str]]) -> None:
    found = stub_bindings()
    if not found:
        pytest.skip("TENSORRT_BINDINGS names no folders")
    for release, names in found.items():
        assert set(names) == listed[release]


def test_the_bindings_accept_the_plugins_declarations() -> None:
    """Their own check of the three functions; only the plugin registry is a library's."""
    folders = list(filter(None, os.environ.get("TENSORRT_BINDINGS", "").split(os.pathsep)))
    if not folders:
        pytest.skip("TENSORRT_BINDINGS names no folders")
    code = (
        "import sys\n"
        "import tensorrt_bindings as trt\n"
        "sys.modules['tensorrt'] = trt\n"
        "import tensorrt_bindings.plugin as plugin, tensorrt_bindings.plugin._lib as lib\n"
        "sys.modules['tensorrt.plugin'] = plugin\n"
        "lib._register_plugin_creator = lambda *_: None\n"
        "from engines import msda_plugin\n"
        "made = lib.QDP_REGISTRY[msda_plugin.register()]\n"
        "assert made.input_tensor_names == ['value', 'locations', 'weights'], made\n"
        "assert made.aot_impl_attr_names == ['spatial_shapes'] and made.autotune_func, made\n"
    )
    for folder in folders:
        subprocess.run([sys.executable, "-c", code], env=_environment(folder), check=True)


if __name__ == "__main__":
    releases = stub_bindings()
    rtx = importlib.import_module("tensorrt_rtx")
    releases[f"tensorrt-rtx {rtx.__version__}"] = present(rtx, used())
    NAMES.write_text(json.dumps(releases, indent=1) + "\n")
