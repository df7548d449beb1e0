"""Every name we use of TensorRT exists in each release a bundle is for.

``tensorrt_names.json`` holds, of the names used in our source, those that each release has. Write
it anew with the bindings of the releases at hand (``make bindings`` lays them out; they import with
empty stand-ins for TensorRT's libraries, and nothing of them runs):

    python tests/engines/test_trt_names.py
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

from engines.trt.backend import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
NAMES = Path(__file__).with_name("tensorrt_names.json")
BINDINGS = ROOT / "build" / "bindings"
PLUGIN = ROOT / "engines/msda_plugin.py"
# The one module that may use what only TensorRT-RTX has.
RTX = ROOT / "engines/trt/rtx.py"
SOURCES = (*sorted((ROOT / "engines/trt").glob("*.py")), PLUGIN)
RELEASES = ("10.3", "10.8", "10.9", "10.13", "10.16", "11.4")

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
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
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
        elif of == "trtp":
            found.add(f"plugin.{node.attr}")
        elif of in CLASSES:
            found.add(f"{CLASSES[of]}.{node.attr}")
        elif isinstance(node.value, ast.Attribute) and receiver(node.value.value) == "trt":
            found.add(f"{of}.{node.attr}")
    return found


def used(*skip: Path) -> set[str]:
    return set().union(*(used_in(p.read_text()) for p in SOURCES if p not in skip))


def present(module: Any, names: set[str]) -> list[str]:
    def has(name: str) -> bool:
        try:
            functools.reduce(getattr, name.split("."), module)
        except AttributeError:
            return False
        return True

    return sorted(name for name in names if has(name))


def folders() -> list[Path]:
    return sorted(
        path for path in (BINDINGS / "tensorrt").glob("*") if (path / "tensorrt_bindings").is_dir()
    )


def ask(folder: Path, code: str, python: str = sys.executable) -> str:
    """What a program prints that runs with the bindings of a folder as ``tensorrt``."""
    start = (
        "import sys\n"
        "import tensorrt_bindings as trt\n"
        "sys.modules['tensorrt'] = trt\n"
        "try:\n"
        "    import tensorrt_bindings.plugin as plugin\n"
        "    sys.modules['tensorrt.plugin'] = plugin\n"
        "except ImportError:\n"
        "    pass\n"
    )
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, "-c", start + code],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": f"{folder}/stub"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stub_bindings() -> dict[str, list[str]]:
    """Names the bindings laid out have, by release."""
    code = (
        "import importlib.util, json\n"
        f"spec = importlib.util.spec_from_file_location('names', {str(__file__)!r})\n"
        "names = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(names)\n"
        "print(json.dumps([trt.__version__, names.present(trt, names.used())]))"
    )
    found = {}
    for folder in folders():
        version, names = json.loads(ask(folder, code).splitlines()[-1])
        found[f"tensorrt {version}"] = names
    return found


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


def names_of(listed: dict[str, set[str]], number: str) -> set[str]:
    (release,) = [name for name in listed if name.startswith(f"tensorrt {number}.")]
    return listed[release]


@pytest.mark.parametrize("number", RELEASES)
def test_every_name_exists_in_every_release(listed: dict[str, set[str]], number: str) -> None:
    assert used(RTX, PLUGIN) - names_of(listed, number) == set()


@pytest.mark.parametrize("number", RELEASES)
def test_the_plugin_is_built_only_where_its_names_exist(
    listed: dict[str, set[str]], number: str
) -> None:
    """The table of docs/tensorrt.md: 10.9 is the first that compiles it ahead of time."""
    missing = used_in(PLUGIN.read_text()) - names_of(listed, number)
    assert BACKENDS["tensorrt"].takes_plugins(number) == (not missing), missing


def test_what_rtx_needs_exists_there(listed: dict[str, set[str]]) -> None:
    (release,) = [name for name in listed if name.startswith("tensorrt-rtx")]
    missing = used() - listed[release]
    # It takes no plugins and keeps tactics to itself; those calls are never made with it.
    assert missing == {
        name
        for name in used_in(PLUGIN.read_text())
        if name.startswith("plugin.") or name.endswith("PREFER_AOT_PYTHON_PLUGINS")
    }
    assert used_in(RTX.read_text()) >= {
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "ComputeCapability",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "IExecutionContext.is_stream_capturable",
        "IExecutionContext.set_device_memory",
        "IRuntimeCache.deserialize",
        "IRuntimeConfig.set_runtime_cache",
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
        pytest.skip(f"no bindings in {BINDINGS}: make bindings")
    for release, names in found.items():
        assert set(names) == listed[release]


REGISTER = (
    "import tensorrt_bindings.plugin._lib as lib\n"
    "lib._register_plugin_creator = lambda *_: None\n"
    "from engines import msda_plugin\n"
    "made = [lib.QDP_REGISTRY[name] for name in msda_plugin.register()]\n"
    "for one in made:\n"
    "    assert one.input_tensor_names == ['value', 'locations', 'weights'], one\n"
    "    assert one.autotune_func, one\n"
    "attributes = [one.aot_impl_attr_names for one in made]\n"
    "assert attributes == [['spatial_shapes'], ['spatial_shapes', 'points']], attributes\n"
    "import numpy\n"
    "print(trt.__version__, numpy.__version__)\n"
)


def register(folder: Path, python: str) -> str:
    """Registers the plugin as TensorRT does; only the registry itself is a library's."""
    return ask(folder, REGISTER, python).splitlines()[-1]


def with_plugins() -> list[Path]:
    return [path for path in folders() if BACKENDS["tensorrt"].takes_plugins(path.name)]


def test_the_bindings_accept_the_plugins_declarations() -> None:
    if not with_plugins():
        pytest.skip(f"no bindings in {BINDINGS}: make bindings")
    for folder in with_plugins():
        assert register(folder, sys.executable).startswith(folder.name)


def test_they_accept_them_with_the_newest_numpy() -> None:
    """A Python of its own, laid out beside them: numpy 2.5 needs 3.12, and changed what NDArray is.

    Bindings are made for one version of Python, so these are others.
    """
    python = BINDINGS / "newest-numpy" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: make bindings, where there is a Python 3.12 or newer")
    checked = [
        tuple(int(part) for part in register(folder, str(python)).split()[1].split(".")[:2])
        for folder in sorted(python.parents[1].glob("bindings/*"))
        if BACKENDS["tensorrt"].takes_plugins(folder.name)
    ]
    assert len(checked) >= 4 and min(checked) >= (2, 5), checked


if __name__ == "__main__":
    releases = stub_bindings()
    rtx = importlib.import_module("tensorrt_rtx")
    releases[f"tensorrt-rtx {rtx.__version__}"] = present(rtx, used())
    NAMES.write_text(json.dumps(releases, indent=1) + "\n")
