"""Runs everything of the project that needs a GPU and writes one dated JSON with versions.

    make gpu-check
    python docs/measure/gpu_check.py [BUNDLE ...] [--out docs/measured] [--only SECTION ...]

Bundles are checked in ONNX Runtime's CUDA provider, TensorRT-RTX and TensorRT; without one, the
shipped detector is exported in FP32 and FP16. Each section is a process of its own, for a crash in
a driver must not take the others' results along. Exit status: 0 where nothing failed, 1 where
something did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr.cli_support import progress
from detr.errors import UserError
from detr.files import write_atomic
from engines import Engine, open_bundle, open_engine
from engines.bundle import Bundle
from engines.trt.backend import BACKENDS, load
from engines.trt.cuda import checked, compute_capability, runtime
from engines.trt.engine import open_trt

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "measured"
SECONDS = 3600
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
    """A section whose runtime is not installed."""


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


def each(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Results by name; a call that fails leaves the reason under ``failed``."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except Skipped:
            raise
        except Exception as error:  # the runtimes' own exceptions share no base
            found[name] = {"failed": _last_line(str(error)) or type(error).__name__}
    return found


def kernel(bundles: Sequence[Path]) -> Any:
    """Forward of the CUDA kernel against float64, its speed and its share of the bandwidth."""
    fixed = ("bench", "op", "msda", "--device", "cuda", "--json")
    return each(
        {
            f"{preset} {dtype}": partial(detr, *fixed, "--preset", preset, "--dtype", dtype)
            for preset in ("kitti-encoder", "kitti-decoder", "coco-encoder")
            for dtype in ("float32", "float16", "bfloat16")
        }
    )


def gradients(bundles: Sequence[Path]) -> Any:
    """The torch operator on CUDA against the CPU's: output and gradients, relative errors."""
    import torch

    from detr.models.ops import ms_deform_attn

    generator = torch.Generator().manual_seed(0)
    shapes = ((13, 42), (7, 21), (4, 11), (2, 6))
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(2, tokens, 8, 32, generator=generator)
    locations = torch.rand(2, 100, 8, 4, 4, 2, generator=generator) * 1.2 - 0.1
    weights = torch.rand(2, 100, 8, 16, generator=generator).softmax(-1).view(2, 100, 8, 4, 4)
    grad = torch.randn(2, 100, 256, generator=generator)

    def compared(dtype: torch.dtype, allowed: float) -> dict[str, float]:
        results = []
        for device in ("cpu", "cuda"):
            kind = torch.float32 if device == "cpu" else dtype
            leaves = [
                value.to(dtype).to(device, kind, copy=True).requires_grad_(),
                locations.to(device, copy=True).requires_grad_(),
                weights.to(device, copy=True).requires_grad_(),
            ]
            out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
            out.backward(grad.to(device, out.dtype))
            results.append([t.detach().float().cpu() for t in (out, *(x.grad for x in leaves))])
        errors = {
            name: float((a - b).abs().max() / a.abs().max())
            for name, a, b in zip(("out", "value", "locations", "weights"), *results, strict=True)
        }
        if not max(errors.values()) <= allowed:
            raise RuntimeError(f"{errors}, at most {allowed} is allowed")
        return errors

    allowed = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
    return each({str(dtype): partial(compared, dtype, most) for dtype, most in allowed.items()})


def onnxruntime_cuda(bundles: Sequence[Path]) -> Any:
    """Bundles in ONNX Runtime's CUDA provider: scores against its CPU provider, milliseconds."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Skipped("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu")

    def compared(path: Path) -> dict[str, Any]:
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
            times = _milliseconds(call)
        difference = float(np.abs(answers[0] - answers[1]).max())
        return {"max_score_difference": difference, "milliseconds": times}

    return each({path.name: partial(compared, path) for path in bundles})


def tensorrt_rtx(bundles: Sequence[Path]) -> Any:
    """Engines of TensorRT-RTX: built for this GPU, verified, timed."""
    _require("tensorrt-rtx")
    return each({p.name: partial(_built, p, "tensorrt-rtx", "gather") for p in bundles})


def tensorrt(bundles: Sequence[Path]) -> Any:
    """Engines of TensorRT, with our plugin and without: built, verified, timed."""
    _require("tensorrt")
    return each(
        {
            f"{path.name} {lowering}": partial(_built, path, "tensorrt", lowering)
            for path in bundles
            for lowering in ("gather", "plugin")
        }
    )


SECTIONS: dict[str, Callable[[Sequence[Path]], Any]] = {
    "kernel": kernel,
    "gradients": gradients,
    "onnxruntime-cuda": onnxruntime_cuda,
    "tensorrt-rtx": tensorrt_rtx,
    "tensorrt": tensorrt,
}


def _require(backend: str) -> None:
    try:
        load(BACKENDS[backend])
    except UserError as reason:
        raise Skipped(reason.message) from reason


def _built(path: Path, backend: str, lowering: str) -> dict[str, Any]:
    options = ["--backend", backend, "--lowering", lowering, "--json"]
    evidence = detr("export", "trt", path, *options)
    if evidence["status"] == "rejected":
        raise RuntimeError(evidence["complaint"])
    engine = open_trt(open_bundle(path), BACKENDS[backend])
    return {
        "evidence": evidence,
        "memory_bytes": engine.memory_bytes,
        "milliseconds": _engine_times(engine, open_bundle(path)),
        "cuda_graph": engine.cuda_graph,
    }


def _engine_times(engine: Engine, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Engine time by batch size; the images are the golden ones, in turn."""
    images = bundle.golden().images
    sizes = (1, 4) if engine.batch_size is None else (engine.batch_size,)
    found = {}
    for size in sizes:
        inputs = engine.prepare([images[k % len(images)] for k in range(size)])
        found[str(size)] = _milliseconds(partial(engine.run, inputs))
    return found


def _milliseconds(call: Callable[[], Any]) -> dict[str, float]:
    for _ in range(10):
        call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=100)
    return {
        "runs": RUNS,
        "mean": statistics.fmean(times),
        "p50": statistics.median(times),
        "p90": cuts[89],
        "p99": cuts[98],
    }


def machine() -> dict[str, Any]:
    """The GPU, its driver and the packages."""
    cudart = runtime()
    properties = checked(cudart.cudaGetDeviceProperties(0))
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "gpu": properties.name.decode(),
        "compute_capability": compute_capability(),
        "memory_bytes": int(properties.totalGlobalMem),
        "cuda_driver": checked(cudart.cudaDriverGetVersion()),
        "cuda_runtime": checked(cudart.cudaRuntimeGetVersion()),
        "packages": versions,
    }


def run_section(name: str, bundles: Sequence[Path]) -> dict[str, Any]:
    """One section in a process of its own: status, seconds, and result or reason."""
    start = time.perf_counter()
    options = ["--section", name, *map(str, bundles)]
    command = [sys.executable, __file__, *options]
    script = Path(__file__).resolve().relative_to(ROOT)
    entry: dict[str, Any] = {"command": " ".join(["python", str(script), *options])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
        if done.returncode == 0:
            entry |= answer
        else:
            entry |= {"status": "failed", "reason": _last_line(done.stderr) or "no word"}
            entry["exit_status"] = done.returncode  # negative: ended by that signal
    except subprocess.TimeoutExpired:
        entry |= {"status": "failed", "reason": f"not done after {SECONDS} s"}
    except ValueError:
        entry |= {"status": "failed", "reason": f"printed no JSON: {_last_line(done.stdout)}"}
    return entry | {"seconds": round(time.perf_counter() - start, 1)}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def check(names: Sequence[str], bundles: Sequence[Path], out: Path) -> int:
    """Runs sections one after the other; the file is written anew after each."""
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "bundles": [str(path) for path in bundles],
        "sections": {},
    }
    path = out / f"gpu-{report['date'][:10]}.json"
    for name in progress(list(names), "gpu-check"):
        report["sections"][name] = run_section(name, bundles)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    for name, entry in report["sections"].items():
        print(
            f"{name:<18} {entry['status']:<8} {entry['seconds']:7.1f} s {entry.get('reason', '')}"
        )
    print(f"wrote {path}")
    return int(any(entry["status"] == "failed" for entry in report["sections"].values()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section is not None:
        try:
            result = SECTIONS[options.section](options.bundles)
            failed = [
                f"{name}: {part['failed']}" for name, part in result.items() if "failed" in part
            ]
            answer = {"status": "failed" if failed else "passed", "result": result}
            if failed:
                answer["reason"] = "; ".join(failed)
        except Skipped as reason:
            answer = {"status": "skipped", "reason": str(reason)}
        print(json.dumps(answer))
        return 0
    try:
        if compute_capability() is None:
            raise UserError("device-missing", "gpu-check needs a CUDA device; there is none here")
        with tempfile.TemporaryDirectory() as scratch:
            bundles = options.bundles or exported(Path(scratch))
            return check(options.only, bundles, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status


def exported(folder: Path) -> list[Path]:
    """The shipped detector in two precisions, any batch."""
    paths = []
    for precision in ("fp32", "fp16"):
        paths.append(folder / f"demo-{precision}.bundle")
        options = ["--out", paths[-1], "--batch", "dynamic", "--precision", precision, "--json"]
        detr("export", "onnx", "demo-teacher", *options)
    return paths


if __name__ == "__main__":
    sys.exit(main())
