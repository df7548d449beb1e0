"""A training that is killed, or whose disk fills up, ends with the weights of an undisturbed one.

A few moments each; ``python -m tools.interrupted`` takes more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import interrupted

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


# A limit on the size of a file stands for the disk: the write fails in the middle.
_FULL_DISKS = """
import resource, sys
from pathlib import Path

import torch

from detr.data.synth import generate
from tools.interrupted import SIZE, begin, differences, small_recipe, status_of, steps_done

folder = Path(sys.argv[1])
generate(folder / "scenes", images=10, size=SIZE, seed=3, format="kitti")
torch.set_num_threads(1)
recipe, undisturbed = small_recipe(folder / "scenes"), folder / "undisturbed"
assert status_of(begin(recipe, undisturbed)) == 0
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
most = (undisturbed / "checkpoints/last.pt").stat().st_size
for share in (0.02, 0.5, 0.98):
    run = folder / f"run-{share}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * most), limits[1]))
    assert status_of(begin(recipe, run)) == 28, share
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_done(run, recipe) == 0, share
    assert status_of(begin(recipe, run)) == 0, share
    assert differences(run, undisturbed, recipe) == [], share
print("three full disks")
"""


def python(*arguments: str) -> str:
    """What a fresh interpreter prints: trainings are forked, and this one has threads."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(interrupted.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights() -> None:
    told = json.loads(python("-m", "tools.interrupted", "--kills", "3", "--full-disks", "0"))
    assert len(told["killed"]) == 3
    assert all(trial["differs"] == [] for trial in told["killed"])


@pytest.mark.slow
def test_a_full_disk_costs_nothing_that_was_there(tmp_path: Path) -> None:
    assert python("-c", _FULL_DISKS, str(tmp_path)) == "three full disks\n"


def test_a_difference_is_seen(tmp_path: Path) -> None:
    assert interrupted._equal({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert not interrupted._equal({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])})
    assert not interrupted._equal([1], [1, 2])
