"""OpenMP's threads sleep while they wait, unless the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Notes what torch would see if it were imported now, and imports no torch.
LOOK = """
import importlib, os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            raise SystemExit
sys.meta_path.insert(0, Spy())
importlib.import_module(sys.argv[1])
import torch
"""


def policy(module: str, **environment: str) -> str:
    plain = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment = {**plain, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-c", LOOK, module]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["detr.cli", "distill.cli", "export.cli", "bench.cli", "engines.cli", "detr.data.cli"]
)
def test_it_is_chosen_before_torch_is_imported(module: str) -> None:
    assert policy(module) == "PASSIVE"


def test_what_the_user_chose_stays() -> None:
    assert policy("detr.cli", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy("detr.cli", GOMP_SPINCOUNT="100") == "None"
