"""One process or several (torchrun): rank, device and the sums training needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detr.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place.

    Attributes:
        rank, size: Of this process, and how many there are.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and measures."""
        return self.rank == 0

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Every process's numbers, ``[size, n]`` int64; on the CPU, so that no GPU is waited for.

        Args:
            numbers: This process's, equally many in all.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(everyone, own)
        else:
            everyone = [own]
        return torch.stack(everyone)

    def mean_values(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over all processes of numbers that all have under the same names."""
        if self.size == 1:
            return dict(values)
        table = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(table)
        return dict(zip(values, (table / self.size).tolist(), strict=True))

    def wait(self) -> None:
        """Returns when every process has come here: nobody runs ahead while one writes."""
        if self.size > 1:
            dist.barrier()

    def average_gradients(self, modules: list[nn.Module]) -> None:
        """Replaces every gradient by its mean over all processes, in one reduction.

        A parameter without a gradient counts as zero, so a process whose batch has no boxes
        neither waits nor makes the others wait.
        """
        if self.size == 1:
            return
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [p.numel() for p in parameters])
        for p, gradient, part in zip(parameters, gradients, parts, strict=True):
            # Into the gradient's own memory: a fused optimizer walks through weight and gradient
            # in the order they lie in, which is another one for channels-last kernels.
            p.grad = gradient.copy_(part.view_as(p))


def join() -> World:
    """The processes torchrun started, or this one alone; the GPU if there is one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # Numbers the processes tell each other on the CPU do not make a GPU wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return World(dist.get_rank() if size > 1 else 0, size, device)


class Parts:
    """Statistics of a step whose images are seen in several parts, one after the other.

    A first pass over all parts notes the sums they would share, the second gets their means.

    Attributes:
        noted: The sums of each part of the first pass, in the order they were asked for.
    """

    def __init__(self) -> None:
        self.noted: list[list[Tensor]] = []
        self._means: list[Tensor] = []
        self._given: int | None = None

    @contextlib.contextmanager
    def part(self, first_pass: bool) -> Iterator[None]:
        """Within it, :func:`mean_over_processes` speaks of all parts of all processes."""
        global _parts
        self._given = None if first_pass else 0
        if first_pass:
            self.noted.append([])
        _parts = self
        try:
            yield
        finally:
            _parts = None

    def close_first_pass(self) -> None:
        """Makes the means; every part must have asked equally often."""
        self._means = [
            _mean(torch.stack(values).mean(0)) for values in zip(*self.noted, strict=True)
        ]

    def mean(self, value: Tensor) -> Tensor:
        """Notes a part's sum, or gives the mean of all parts' instead."""
        if self._given is None:
            self.noted[-1].append(value)
            return value
        self._given += 1
        return self._means[self._given - 1]


# What the part of a step that is being computed belongs to.
_parts: Parts | None = None


def mean_over_processes(value: Tensor) -> Tensor:
    """A detached sum's mean over the processes of distributed training; itself in a single one.

    Dividing by it makes the mean of the processes' losses equal to the loss of one process that
    sees all their images. Every process must call it equally often. Where a step's images are seen
    in several parts, parts count like processes; the sum must not depend on earlier means.
    """
    value = value.detach()
    return _mean(value) if _parts is None else _parts.mean(value)


def _mean(value: Tensor) -> Tensor:
    """The mean over processes."""
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


class _MeanWithGradient(torch.autograd.Function):
    """Mean over processes whose gradient is the mean over processes, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean(value.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _mean(gradients[0].detach())


def shared_statistic(value: Tensor) -> Tensor:
    """A sum's mean over processes that passes gradient: for statistics over a whole batch.

    With gradients averaged over processes the gradient, too, is that of one process that sees all
    images. Every process must call it equally often.

    Raises:
        UserError: ``accumulate-statistic`` in a part of a step: its gradient would have to wait for
            parts that have not been seen.
    """
    if _parts is not None:
        raise UserError(
            "accumulate-statistic",
            "accumulate: a method learns through statistics of the whole batch (QSKD's adaptor), "
            "which parts of it do not have; set accumulate to 1 or take another option",
        )
    shared: Tensor = _MeanWithGradient.apply(value)
    return shared
