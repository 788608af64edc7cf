"""The kernels between products, and those that feed torch's, compile for Hopper at real shapes; warming up compiles all
that requests will need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("program", ["ahead.py", "compile_small_sm90.py", "compile_many_sm90.py",
                                     "count_variants.py"])
def test_programs_that_print_what_is_wrong(tmp_path, program):
    """In a process of its own: this one interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, Path(__file__).with_name(program)], env=env, text=True,
                          capture_output=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
