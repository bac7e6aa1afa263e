"""What a report says of the machine that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfqlib
from dfqlib.training import machine

TINY: dict[str, Any] = {"images": 8, "synthesis_steps": 1, "steps": 1, "batch": 4, "progress": False}


def test_the_processor_is_named_with_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.LIMITS:
        monkeypatch.delenv(name, raising=False)
    said = {
        "flags : fpu avx2 avx512f avx512_vnni\nmodel name : Some Xeon": "Some Xeon (AVX2, AVX-512, VNNI)",
        "model name : Old One\nflags : sse4_1 avx2": "Old One (AVX2)",
        "model name : Older\nflags : sse2": "Older (none of AVX2, ",
        "Features : fp asimd asimddp": "(NEON, dot products)",
    }
    for text, expected in said.items():
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert expected in machine.processor()

    def refuse(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "the system does not say which instructions it has" in machine.processor()


def test_a_limit_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert "limited by ONEDNN_MAX_CPU_ISA=AVX2" in machine.processor()


@pytest.mark.parametrize(
    ("wish", "native", "dtype"), [(True, True, "bfloat16"), (True, False, "float32"), (False, True, "float32")]
)
def test_a_report_tells_the_dtype_it_was_computed_in_not_the_wish(
    wish: bool, native: bool, dtype: str, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(machine, "has_bfloat16", lambda _: native)
    monkeypatch.setattr("dfqlib.training.numerics.has_bfloat16", lambda _: native)

    class Watched(nn.Module):
        """What fx cannot follow, and so runs as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = teacher

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.inner(x) if bool(x.abs().sum() >= 0) else x

    settings = dfqlib.quantize(Watched(), (1, 16, 16), bf16=wish, **TINY).settings
    assert settings["dtype"] == dtype
    assert any(seen) is (dtype == "bfloat16")
    assert settings["bf16"] is wish
    assert settings["processor"] == machine.processor()
