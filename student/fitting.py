"""Whether a student's weights fit, told from the headers of its files before anything of it is read.

A model that does not fit would end its worker (the system kills it, and its supervisor starts it again for the same
end), or take minutes to say "out of memory" in a way that looks as if the next try might do.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import psutil
import torch

from preceptor.errors import PreceptorError
from student.memory import cgroup_limit, free_bytes

GIB = 2**30
# How a model is computed with, by kind of device (student.base.load_base).
_DTYPES = {"cpu": ("float32", 4), "cuda": ("bfloat16", 2)}


def check_fits(folder: Path, device: str, name: str) -> None:
    """Raises PreceptorError(STUDENT_TOO_LARGE), naming what the weights of the student need and what there is."""
    dtype, size = _dtype(device)
    needed = weight_bytes(folder, size)
    there, where = room(device)
    if needed > there:
        raise PreceptorError(
            "STUDENT_TOO_LARGE",
            f"student {name or folder.name} needs {needed / GIB:.2f} GiB for its weights in {dtype}, and {where}",
        )


def fits_alone(folder: Path, device: str) -> bool:
    """Whether the student would fit if no other were in memory."""
    return weight_bytes(folder, _dtype(device)[1]) <= room_alone(device)


def room_alone(device: str) -> int:
    """Bytes that weights might take if there were no others."""
    one = torch.device(device)
    return int(torch.cuda.get_device_properties(one).total_memory) if one.type == "cuda" else room(device)[0]


def _dtype(device: str) -> tuple[str, int]:
    return _DTYPES.get(torch.device(device).type, _DTYPES["cuda"])


def room(device: str) -> tuple[int, str]:
    """Bytes that weights may take, and that in words. On a GPU what is free now; of the machine's memory what there is
    at all, because what is free of that changes with whatever else is done."""
    if (one := torch.device(device)).type == "cuda":
        free, total = free_bytes(one), torch.cuda.get_device_properties(one).total_memory
        return free, f"{torch.cuda.get_device_name(one)} has {free / GIB:.2f} of {total / GIB:.2f} GiB free"
    total = psutil.virtual_memory().total
    limit = cgroup_limit()
    if limit is not None and limit < total:
        return limit, f"this container may use {limit / GIB:.2f} GiB"
    return total, f"this machine has {total / GIB:.2f} GiB of memory"


def weight_bytes(folder: Path, size: int) -> int:
    """Bytes of the weights of a checkpoint with ``size`` bytes a number; what is quantised stays as it is stored.

    0 for what cannot be read: loading says why.
    """
    try:
        quantised = "quantization_config" in json.loads((folder / "config.json").read_text())
        return sum(
            stored if quantised or not dtype.startswith(("F", "BF")) else math.prod(shape) * size
            for path in _files(folder)
            for dtype, shape, stored in _tensors(path)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0


def _files(folder: Path) -> list[Path]:
    """Those that transformers loads, where there are others besides."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _tensors(path: Path) -> list[tuple[str, list[int], int]]:
    """Type, shape and stored bytes of each."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
    return [
        (entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
