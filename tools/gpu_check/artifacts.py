"""Bundles in the runtimes that are installed: built, judged by the gate, timed, reported."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.latency import measure_latency, summarize
from detr.data.synth.write import generate
from detr.errors import UserError
from engines import Engine, open_bundle, open_engine
from engines.bundle import Bundle
from engines.trt.backend import BACKENDS, load
from engines.trt.engine import TrtEngine
from tools.gpu_check.part import Parts, Setting, Skipped, last_line

RUNS = 50
# Precision of each exported bundle by its place among the setting's.
EXPORTED = ("fp32", "fp16")


def detr(*arguments: object) -> Any:
    """The JSON a command of ours prints, also where it misses a budget.

    Raises:
        RuntimeError: It failed; the message is what it said last.
    """
    command = [sys.executable, "-m", "detr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 3) or not done.stdout.strip():
        raise RuntimeError(f"{' '.join(command[1:])}: {last_line(done.stderr)}")
    return json.loads(done.stdout)


def export(setting: Setting) -> Parts:
    """The shipped detector in two precisions, any batch."""
    pairs = zip(EXPORTED, setting.bundles, strict=True)
    return {precision: partial(_exported, precision, path) for precision, path in pairs}


def _exported(precision: str, path: Path) -> None:
    modules = [*(backend.module for backend in BACKENDS.values()), "onnxruntime"]
    if not any(map(find_spec, modules)):
        raise Skipped(f"nothing to run it in is installed: {', '.join(modules)}")
    options = ["--out", path, "--batch", "dynamic", "--precision", precision, "--json"]
    detr("export", "onnx", "demo-teacher", *options)


def onnxruntime_cuda(setting: Setting) -> Parts:
    """Bundles in ONNX Runtime's CUDA provider: scores against its CPU provider, milliseconds."""
    return {path.name: partial(_onnxruntime_cuda, path) for path in setting.bundles}


def _onnxruntime_cuda(path: Path) -> dict[str, Any]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Skipped(str(error)) from error
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Skipped("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu")
    bundle = _opened(path)
    inputs = open_engine(path, "onnxruntime").prepare(bundle.golden().images[:1])
    feed = {
        "images": inputs.images,
        "valid_sizes": inputs.valid_sizes,
        "original_sizes": inputs.original_sizes,
    }
    answers, times = [], {}
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        session = ort.InferenceSession(str(bundle.model), providers=[provider])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not load")
        call = partial(session.run, ["scores"], feed)
        answers.append(call()[0])
        times = _times(call)
    difference = float(np.abs(answers[0] - answers[1]).max())
    return {"max_score_difference": difference, "times": times}


def tensorrt_rtx(setting: Setting) -> Parts:
    """Engines of TensorRT-RTX: built for this GPU, verified, timed."""
    return {p.name: partial(built, p, "tensorrt-rtx", "gather") for p in setting.bundles}


def tensorrt(setting: Setting) -> Parts:
    """Engines of TensorRT, with our plugin and without: built, verified, timed."""
    return {
        f"{path.name} {lowering}": partial(built, path, "tensorrt", lowering)
        for path in setting.bundles
        for lowering in ("gather", "plugin")
    }


def report(setting: Setting) -> Parts:
    """``bench run`` over the engines built before: AP and latency with clocks and throttling."""
    return {
        f"{path.name} {backend}": partial(_report, path, backend)
        for path in setting.bundles
        for backend in BACKENDS
    }


def _report(path: Path, backend: str) -> Any:
    if not list(path.glob(f"engines/{backend}-sm*/evidence.json")):
        raise Skipped(f"no {backend} engine was built")
    with tempfile.TemporaryDirectory() as scratch:
        size = open_bundle(path).info.model.preprocess.canvases[0]
        generate(Path(scratch) / "data", 16, size, seed=0, val_fraction=0.5)
        options = ["--data", f"kitti:{scratch}/data", "--engine", backend]
        return detr("bench", "run", path, *options, "--out", f"{scratch}/report", "--json")


def built(path: Path, backend: str, lowering: str) -> dict[str, Any]:
    """One engine: its evidence, memory and times; what was found so far where it fails."""
    try:
        load(BACKENDS[backend])
    except UserError as reason:
        raise Skipped(reason.message) from reason
    bundle = _opened(path)
    options = ["--backend", backend, "--lowering", lowering, "--json"]
    try:
        evidence = detr("export", "trt", path, *options)
    except RuntimeError as reason:
        if "error[compute-capability]" in str(reason):
            raise Skipped(str(reason)) from reason
        raise
    found: dict[str, Any] = {"evidence": evidence}
    if evidence["status"] == "rejected":
        return found | {"failed": "; ".join(evidence["reasons"])}
    try:
        engine = open_engine(path, backend)
        assert isinstance(engine, TrtEngine)
        found["memory_bytes"] = engine.memory_bytes
        found["times"] = _engine_times(engine, bundle)
        found |= {"cuda_graph": engine.cuda_graph, "no_cuda_graph": engine.no_cuda_graph}
    except Exception as error:  # the runtimes' own exceptions share no base
        found["failed"] = last_line(str(error)) or type(error).__name__
    return found


def _opened(path: Path) -> Bundle:
    """A bundle.

    Raises:
        Skipped: It is one that was to be exported and was not.
    """
    if not path.exists():
        raise Skipped(f"{path.name} was not exported")
    return open_bundle(path)


def _engine_times(engine: Engine, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Engine time by batch size; the images are the golden ones, in turn."""
    images = bundle.golden().images
    sizes = (1, 4) if engine.batch_size is None else (engine.batch_size,)
    return {
        str(size): measure_latency(engine, images, iterations=RUNS, batch=size).engine.model_dump()
        for size in sizes
    }


def _times(call: Callable[[], Any]) -> dict[str, float]:
    """Of one call, after a few that do not count."""
    for _ in range(10):
        call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return summarize(np.array(times), 1).model_dump()
