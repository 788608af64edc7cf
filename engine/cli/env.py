"""`nybble env`: versions, machine, devices and variables, for a bug report; secrets are left out."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from argparse import Namespace
from importlib import metadata
from typing import Any

from ...plugins import env
from .._version import __version__
from ..args import setting_fields
from .parser import Parser

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "jinja2",
    "pluggy",
    "msgspec",
    "pyzmq",
    "starlette",
    "uvicorn",
    "h11",
    "uvloop",
    "nvidia-cutlass",
)
GPU_FIELDS = ("index", "name", "memory.total", "compute_cap", "driver_version")
SMI_SECONDS = 10


def add_arguments(parser: Parser) -> None:
    """Add the command's flags."""
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def run(parsed: Namespace) -> int:
    """Print what is here; imports none of it."""
    found = describe()
    if parsed.json:
        print(json.dumps(found, indent=1))
        return 0
    for title, value in found.items():
        if isinstance(value, dict):
            print(f"{title}:" + ("" if value else " none"))
            for name, text in value.items():
                print(f"  {name:<24}{text}")
        else:
            print(f"{title}: {value}")
    return 0


def describe() -> dict[str, Any]:
    """Everything the command prints."""
    return {
        "nybble": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in DISTRIBUTIONS},
        "gpus": _gpus(),
        "variables": env.shown(public=setting_fields()),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> dict[str, str]:
    """GPU index -> name, memory, compute capability and driver, as nvidia-smi says; {} without it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    command = [smi, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    return {row[0]: row[1] for row in rows}
