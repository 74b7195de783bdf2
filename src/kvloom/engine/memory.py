"""How much memory there is: of the machine, or of the control group (container) that the process is confined to."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def total_memory_bytes(device: torch.device) -> int:
    """Bytes that all processes on `device` can take together."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _meminfo("SwapTotal", 0)
    return min(own, _of_group("memory.max", own))


def available_memory_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on `device` could take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _meminfo("MemAvailable", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(free, _of_group("memory.max", free) - _of_group("memory.current", 0)))


def _meminfo(name: str, unknown: int) -> int:
    """A line of Linux' /proc/meminfo, in bytes."""
    lines = MEMINFO.read_text().splitlines() if MEMINFO.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), unknown)


def _of_group(name: str, unlimited: int) -> int:
    """A number of the control group; `unlimited` where there is none, or where it says so."""
    try:
        text = (CONTROL_GROUP / name).read_text().strip()
    except OSError:
        return unlimited
    return int(text) if text.isdigit() else unlimited
