"""Accelerators that runs may use; torch is only asked where there may be one."""

import ast
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

# Of NVIDIA, of NVIDIA in WSL, of AMD, of Intel, of others.
DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/accel")
BUILDS = ("cuda", "hip", "xpu")  # names in torch/version.py, None where torch was built without


def may_have_one() -> bool:
    """Tell, without importing torch, whether it might find an accelerator; False is certain."""
    if sys.platform != "linux":
        return True
    return any(map(os.path.exists, DEVICES)) and torch_build() != "cpu"


def torch_build() -> str:
    """Name what torch was built for as its version.py says it: cuda, hip, xpu, cpu; "" when that cannot be read."""
    found = importlib.util.find_spec("torch")
    try:
        tree = ast.parse(Path(found.origin).with_name("version.py").read_text("utf-8"))
    except (AttributeError, TypeError, OSError, SyntaxError):
        return ""
    values = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            values |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
    if "cuda" not in values:
        return ""
    return next((name for name in BUILDS if values.get(name)), "cpu")


@cache
def accelerator() -> str | None:
    """Name the kind of accelerator that torch finds, None when it finds none."""
    if not may_have_one():
        return None
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def cuda_name() -> str | None:
    """Return the name of the CUDA device, if there is one."""
    if accelerator() != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name()


def visible_gpus() -> list[str]:
    """The CUDA devices that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    if accelerator() != "cuda":
        return []
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(index) for index in range(torch.cuda.device_count())]
