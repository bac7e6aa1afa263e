"""The processor: its name, the instructions that affect results and speed, and whether it multiplies bfloat16.

Environment variables can restrict PyTorch to the kernels of an older processor (``ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2``); the name and ``has_bfloat16`` take them into account.
"""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_int8",),
    "NEON": ("asimd", "neon"),
    "dot products": ("asimddp",),
    "I8MM": ("i8mm",),
}
"""Instructions that affect speed and rounding, and their names on Linux."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def processor(device: torch.device | str = "cpu") -> str:
    """Name and instructions, such as ``"Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz (AVX2)"``, or the name of the GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return ", limited by ".join([_name_and_features(), *([" ".join(limits)] if limits else [])])


def _name_and_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return f"{platform.processor() or platform.machine()} (the system does not say which instructions it has)"
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(said.get("flags", said.get("Features", "")).split())
    features = [name for name, names in FEATURES.items() if flags.intersection(names)]
    return f"{said.get('model name', platform.machine())} ({', '.join(features) or 'none of ' + ', '.join(FEATURES)})"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively and PyTorch uses that."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def peak_gb(process: int | str = "self") -> float | None:
    """The most memory that a process has held so far, in GB, as Linux counts it; None elsewhere."""
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        peak = re.search(r"VmHWM:\s+(\d+)", status)
        return int(peak[1]) / 1e6 if peak else None
    return None
