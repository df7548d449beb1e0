"""The layout of training follows the processor."""

from __future__ import annotations

import pytest
import torch

from distill.training.cpu import trained_format


@pytest.mark.parametrize(
    ("device", "capability", "wanted"),
    [
        ("cpu", "AVX2", torch.contiguous_format),
        ("cpu", "AVX512", torch.channels_last),
        ("cpu", "DEFAULT", torch.channels_last),
        ("cuda", "AVX2", torch.channels_last),
    ],
)
def test_only_avx2_trains_with_channels_first(
    device: str, capability: str, wanted: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert trained_format(torch.device(device)) == wanted
