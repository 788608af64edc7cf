"""The kernels between products compile for Hopper at real shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_real_shapes_compile_and_do_not_spill(tmp_path):
    """In a process of its own: this one interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, Path(__file__).with_name("compile_small_sm90.py")], env=env, text=True,
                          capture_output=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
