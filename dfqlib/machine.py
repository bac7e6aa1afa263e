"""What computes here: the processor's name, the instructions that count, and whether it multiplies bfloat16.

The kernels of another processor's kind are chosen by the environment, ``ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2`` for example; what is said here follows.
"""

import os
import platform
from pathlib import Path

import torch

VNNI = "VNNI"
"""Products of 8-bit integers are summed in 32 bits: without these instructions x86 sums pairs of them in 16."""


def processor(device: torch.device | str = "cpu") -> str:
    """Name and instructions, such as ``"Intel(R) Core(TM) i5-8250U, AVX2"``, or the name of the GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _from_cpuinfo("model name") or platform.processor() or platform.machine()
    return ", ".join([name, *instructions()])


def instructions() -> list[str]:
    """The kernels that PyTorch takes (``"AVX512"``, ``"AVX2"``, ``"DEFAULT"``), then ``"VNNI"`` and ``"bfloat16"``."""
    found = [torch.backends.cpu.get_cpu_capability()]
    if "vnni" in (_from_cpuinfo("flags") or ""):
        found.append(VNNI)
    if has_bfloat16(torch.device("cpu")):
        found.append("bfloat16")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return [*found, f"oneDNN limited to {limit}"] if limit not in ("", "DEFAULT", "ALL") else found


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively, and the kernels at hand let it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _from_cpuinfo(field: str) -> str | None:
    """A field of the first processor that Linux lists; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)
