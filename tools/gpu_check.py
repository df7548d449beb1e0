"""Runs everything of the project that needs a GPU and writes one dated JSON with versions.

    make gpu-check
    python -m tools.gpu_check [BUNDLE ...] [--out docs/measured] [--only SECTION ...]

Bundles are checked in ONNX Runtime's CUDA provider, TensorRT-RTX and TensorRT; without one, the
shipped detector is exported in FP32 and FP16. Each part of a section is a process of its own, for a
crash in a driver must not take the others' results along, and the file is written anew after each.
Exit status: 0 where nothing failed, 1 where something did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.latency import measure_latency, summarize
from bench.machine.clocks import read_clocks
from detr.cli_support import progress
from detr.data.synth.write import generate
from detr.errors import UserError
from detr.files import write_atomic
from engines import Engine, open_bundle, open_engine
from engines.bundle import Bundle
from engines.trt.backend import BACKENDS, load
from engines.trt.cuda import checked, compute_capability, runtime
from engines.trt.engine import TrtEngine

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "measured"
SECONDS = 1800  # per part
RUNS = 50
PACKAGES = (
    "cuda-bindings",
    "detr-distillery",
    "numpy",
    "nvidia-cuda-nvrtc",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
)


class Skipped(Exception):
    """A part whose runtime is not installed or does not know this GPU."""


# A section's parts by name, each a function without arguments that runs in a process of its own.
Parts = dict[str, Callable[[], Any]]


def detr(*arguments: object) -> Any:
    """The JSON a command of ours prints; of one that missed a budget with its ``complaint``.

    Raises:
        RuntimeError: It failed; the message is what it said last.
    """
    command = [sys.executable, "-m", "detr", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 3) or not done.stdout.strip():
        raise RuntimeError(f"{' '.join(command[1:])}: {_last_line(done.stderr)}")
    result = json.loads(done.stdout)
    return result if done.returncode == 0 else result | {"complaint": _last_line(done.stderr)}


def kernel(bundles: Sequence[Path]) -> Parts:
    """Forward of the CUDA kernel against float64, its speed and its share of the bandwidth."""
    fixed = ("bench", "op", "msda", "--device", "cuda", "--json")
    return {
        f"{preset} x{batch} {dtype}": partial(
            detr, *fixed, "--preset", preset, "--batch", str(batch), "--dtype", dtype
        )
        for preset in ("kitti-encoder", "kitti-decoder", "coco-encoder")
        for batch in (1, 8)
        for dtype in ("float32", "float16", "bfloat16")
    }


def gradients(bundles: Sequence[Path]) -> Parts:
    """The torch operator on CUDA against the CPU's: output and gradients, relative errors."""
    allowed = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
    return {name: partial(_gradients, name, most) for name, most in allowed.items()}


def _gradients(name: str, allowed: float) -> dict[str, float]:
    try:
        import torch

        from detr.models.attention.ms_deform_attn import ms_deform_attn
    except ModuleNotFoundError as error:
        raise Skipped(str(error)) from error
    if not torch.cuda.is_available():
        raise Skipped(f"torch {torch.__version__} finds no CUDA device")
    dtype: torch.dtype = getattr(torch, name)

    generator = torch.Generator().manual_seed(0)
    shapes = ((13, 42), (7, 21), (4, 11), (2, 6))
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(2, tokens, 8, 32, generator=generator)
    locations = torch.rand(2, 100, 8, 4, 4, 2, generator=generator) * 1.2 - 0.1
    weights = torch.rand(2, 100, 8, 16, generator=generator).softmax(-1).view(2, 100, 8, 4, 4)
    grad = torch.randn(2, 100, 256, generator=generator)

    results = []
    for device in ("cpu", "cuda"):
        kind = torch.float32 if device == "cpu" else dtype
        leaves = [
            value.to(dtype).to(device, kind, copy=True).requires_grad_(),
            locations.to(device, copy=True).requires_grad_(),
            weights.to(device, copy=True).requires_grad_(),
        ]
        out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
        gradients = torch.autograd.grad(out, leaves, grad.to(device, out.dtype))
        results.append([t.detach().float().cpu() for t in (out, *gradients)])
    errors = {
        name: float((a - b).abs().max() / a.abs().max())
        for name, a, b in zip(("out", "value", "locations", "weights"), *results, strict=True)
    }
    if not max(errors.values()) <= allowed:
        raise RuntimeError(f"{errors}, at most {allowed} is allowed")
    return errors


def onnxruntime_cuda(bundles: Sequence[Path]) -> Parts:
    """Bundles in ONNX Runtime's CUDA provider: scores against its CPU provider, milliseconds."""
    return {path.name: partial(_onnxruntime_cuda, path) for path in bundles}


def _onnxruntime_cuda(path: Path) -> dict[str, Any]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Skipped("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu")
    bundle = open_bundle(path)
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


def tensorrt_rtx(bundles: Sequence[Path]) -> Parts:
    """Engines of TensorRT-RTX: built for this GPU, verified, timed."""
    return {p.name: partial(_built, p, "tensorrt-rtx", "gather") for p in bundles}


def tensorrt(bundles: Sequence[Path]) -> Parts:
    """Engines of TensorRT, with our plugin and without: built, verified, timed."""
    return {
        f"{path.name} {lowering}": partial(_built, path, "tensorrt", lowering)
        for path in bundles
        for lowering in ("gather", "plugin")
    }


def report(bundles: Sequence[Path]) -> Parts:
    """``bench run`` over the engines built before: AP and latency with clocks and throttling."""
    return {
        f"{path.name} {backend}": partial(_report, path, backend)
        for path in bundles
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


SECTIONS: dict[str, Callable[[Sequence[Path]], Parts]] = {
    "kernel": kernel,
    "gradients": gradients,
    "onnxruntime-cuda": onnxruntime_cuda,
    "tensorrt-rtx": tensorrt_rtx,
    "tensorrt": tensorrt,
    "report": report,
}


def _built(path: Path, backend: str, lowering: str) -> dict[str, Any]:
    try:
        load(BACKENDS[backend])
    except UserError as reason:
        raise Skipped(reason.message) from reason
    options = ["--backend", backend, "--lowering", lowering, "--json"]
    try:
        evidence = detr("export", "trt", path, *options)
    except RuntimeError as reason:
        if "error[compute-capability]" in str(reason):
            raise Skipped(str(reason)) from reason
        raise
    if evidence["status"] == "rejected":
        raise RuntimeError(evidence["complaint"])
    # What was found so far is kept where the runner itself fails.
    found: dict[str, Any] = {"evidence": evidence}
    try:
        engine = open_engine(path, backend)
        assert isinstance(engine, TrtEngine)
        found["memory_bytes"] = engine.memory_bytes
        found["times"] = _engine_times(engine, open_bundle(path))
        found |= {"cuda_graph": engine.cuda_graph, "no_cuda_graph": engine.no_cuda_graph}
    except Exception as error:  # the runtimes' own exceptions share no base
        found["failed"] = _last_line(str(error)) or type(error).__name__
    return found


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


def machine() -> dict[str, Any]:
    """The GPU, its driver and the packages; what cannot be read says why."""
    cudart = runtime()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    facts: dict[str, Callable[[], Any]] = {
        "gpu": lambda: checked(cudart.cudaGetDeviceProperties(0)).name.decode(),
        "memory_bytes": lambda: int(checked(cudart.cudaGetDeviceProperties(0)).totalGlobalMem),
        "compute_capability": compute_capability,
        "cuda_driver": lambda: checked(cudart.cudaDriverGetVersion()),
        "cuda_runtime": lambda: checked(cudart.cudaRuntimeGetVersion()),
        "clocks": lambda: str(read_clocks()),
    }
    found: dict[str, Any] = {"packages": versions}
    for name, fact in facts.items():
        try:
            found[name] = fact()
        except Exception as error:  # one driver's quirk must not cost the whole check
            found[name] = f"not read: {error}"
    return found


def run_part(section: str, part: str, bundles: Sequence[Path]) -> dict[str, Any]:
    """One part in a process of its own: status, seconds, and result or reason."""
    start = time.perf_counter()
    options = ["--section", section, "--part", part, *map(str, bundles)]
    typed = ["python", "-m", "tools.gpu_check", *options]
    entry: dict[str, Any] = {"command": shlex.join(typed)}
    try:
        command = [sys.executable, __file__, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0:
            # Libraries may have printed before.
            entry |= json.loads(_last_line(done.stdout, None))
        else:
            entry |= {"status": "failed", "reason": _last_line(done.stderr) or "no word"}
            entry["exit_status"] = done.returncode  # negative: ended by that signal
    except subprocess.TimeoutExpired:
        entry |= {"status": "failed", "reason": f"not done after {SECONDS} s"}
    except ValueError:
        entry |= {"status": "failed", "reason": f"printed no JSON: {_last_line(done.stdout)}"}
    except OSError as error:
        entry |= {"status": "failed", "reason": str(error)}
    return entry | {"seconds": round(time.perf_counter() - start, 1)}


def answer(section: str, part: str, bundles: Sequence[Path]) -> dict[str, Any]:
    """What a part's process prints."""
    try:
        result = SECTIONS[section](bundles)[part]()
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # the runtimes' own exceptions share no base
        trace = traceback.format_exc().splitlines()[-12:]
        reason_ = _last_line(str(error)) or type(error).__name__
        return {"status": "failed", "reason": reason_, "traceback": trace}
    if isinstance(result, dict) and "failed" in result:
        return {"status": "failed", "reason": result["failed"], "result": result}
    return {"status": "passed", "result": result}


def _last_line(text: str, most: int | None = 500) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def check(names: Sequence[str], bundles: Sequence[Path], out: Path) -> int:
    """Runs all parts one after the other; the file is written anew after each.

    Args:
        names: Sections.
        bundles: What to check; the shipped detector, exported first, where there are none.
        out: Folder of the report. One of the same day is not overwritten.
    """
    now = datetime.now(timezone.utc)
    sections: dict[str, dict[str, Any]] = {}
    told: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), "machine": machine()}
    path = out / f"gpu-{now:%Y-%m-%d}.json"
    if path.exists():
        path = out / f"gpu-{now:%Y-%m-%d-%H%M%S}.json"
    with tempfile.TemporaryDirectory() as scratch:
        if not bundles:
            bundles, sections["export"] = exported(Path(scratch))
        told |= {"bundles": [str(bundle) for bundle in bundles], "sections": sections}
        plan = [(name, part) for name in names for part in SECTIONS[name](bundles)]
        write_atomic(path, json.dumps(told, indent=1) + "\n")
        for name, part in progress(plan, "gpu-check"):
            sections.setdefault(name, {})[part] = run_part(name, part, bundles)
            write_atomic(path, json.dumps(told, indent=1) + "\n")
    failed = False
    for name, parts in sections.items():
        for part, entry in parts.items():
            failed |= entry["status"] == "failed"
            print(
                f"{name + ', ' + part:<44} {entry['status']:<8} {entry['seconds']:7.1f} s "
                f"{entry.get('reason', '')}"
            )
    print(f"wrote {path}")
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section is not None:
        print("\n" + json.dumps(answer(options.section, options.part, options.bundles)))
        return 0
    try:
        if compute_capability() is None:
            raise UserError("device-missing", "gpu-check needs a CUDA device; there is none here")
        return check(options.only, options.bundles, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status


def exported(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """The shipped detector in two precisions, any batch, and how that went."""
    paths: list[Path] = []
    parts: dict[str, Any] = {}
    for precision in ("fp32", "fp16"):
        start = time.perf_counter()
        path = folder / f"demo-{precision}.bundle"
        options = ["--out", path, "--batch", "dynamic", "--precision", precision, "--json"]
        try:
            detr("export", "onnx", "demo-teacher", *options)
            paths.append(path)
            parts[precision] = {"status": "passed"}
        except RuntimeError as error:
            parts[precision] = {"status": "failed", "reason": _last_line(str(error))}
        parts[precision]["seconds"] = round(time.perf_counter() - start, 1)
    return paths, parts


if __name__ == "__main__":
    sys.exit(main())
