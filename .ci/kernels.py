"""Compile every kernel library for Hopper and load it, where there is an nvcc; no device is needed.

What is compiled is for the builder's cache to say: a unit whose sources, headers, flags and compilers are those of an
earlier run that went well costs nothing, and any other is compiled. A comparison with an earlier commit would say less:
a shallow clone has none, and after a commit that broke a kernel the next one that leaves `csrc` alone would pass.
"""

from __future__ import annotations

import subprocess
import sys

from nybble.csrc.toolchain import find_cutlass, find_nvcc

ARCH = "90a"
LOAD = f"""
from nybble.csrc.ops import load_op
from nybble.csrc.units import LIBRARIES
for library in LIBRARIES:
    for op in library.ops:
        load_op(op, {ARCH!r} if library.device == "cuda" else None)
    print(f"{{library.name}} loads: {{', '.join(library.ops)}}")
"""


def main() -> int:
    nvcc, reason = find_nvcc()
    if nvcc is None:
        print(f"kernels are not compiled: {reason}")
        return 0
    steps = [("-m", "nybble", "kernels", "build", "--arch", ARCH), ("-c", LOAD)]
    if find_cutlass()[0] is None:
        # its dependencies are those of its Python half, of which nothing is used
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--constraint", "constraints.txt", "nvidia-cutlass")
        steps.insert(0, install)
    for words in steps:  # each in a process of its own, which sees what was installed before
        if code := subprocess.run([sys.executable, *words], check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
