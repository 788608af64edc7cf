"""No source file may run data as code: pickle and its kin, eval, a shell, an open YAML or Jinja door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "engine", "models", "moe", "plugins", "quant", "src/nybble")

# Each is banned with everything below it: `pickle` bans `pickle.loads`. With (), only the call is.
BANNED = {
    "pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "torch.load", "torch.package",
    "eval", "exec", "builtins.eval", "builtins.exec",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "jinja2.Environment", "jinja2.Template()", "jinja2.sandbox.SandboxedEnvironment",
}
# Methods that pickle what they carry, whoever offers them.
BANNED_METHODS = {
    "send_pyobj", "recv_pyobj", "all_gather_object", "gather_object", "broadcast_object_list",
    "scatter_object_list",
}
BANNED_FLAGS = {"shell=True", "allow_pickle=True", "trust_remote_code=True", "weights_only=False"}


def offences(source: str) -> list[str]:
    """What `source` does that it must not, as "line: name". Import aliases are followed."""
    tree = ast.parse(source)
    alias: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
            alias |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                      for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
            alias |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return alias.get(node.id, node.id)
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found.append((node.lineno, dotted(node)))
        elif isinstance(node, ast.Call):
            found.append((node.lineno, f"{dotted(node.func)}()"))
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            found.append((node.lineno, f"{node.arg}={node.value.value}"))
    return sorted({
        f"{line}: {name}" for line, name in found
        if name in BANNED_FLAGS or name.rpartition(".")[2] in BANNED_METHODS
        or any(name == ban or name.startswith(f"{ban}.") for ban in BANNED)
    })


@pytest.mark.parametrize("source", [
    "import pickle", "import pickle as p\np.loads(b'')", "from pickle import loads", "import cloudpickle",
    "import torch\ntorch.load('x')", "import torch as t\nload = t.load", "from torch import load",
    "eval('1')", "exec('1')", "import yaml\nyaml.load(x)",
    "import numpy as np\nnp.load(f, allow_pickle=True)", "import os\nos.system('ls')",
    "from subprocess import run\nrun('ls', shell=True)", "socket.send_pyobj(1)",
    "from jinja2 import Environment", "import jinja2 as j\nj.Environment()",
    "from jinja2 import Template\nTemplate('{{ 1 }}')",
])
def test_offence_is_seen(source):
    assert offences(source)


@pytest.mark.parametrize("source", [
    "import yaml\nyaml.safe_load(x)", "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    "model.eval()", "import numpy as np\nnp.load(f)", "run(['ls'], shell=False)",
    "from jinja2 import Template\nx: Template", "fix = 'torch.load(x, weights_only=True)'",
])
def test_innocence_is_seen(source):
    assert offences(source) == []


def test_no_source_file_runs_data_as_code():
    files = [path for folder in FOLDERS for path in sorted(ROOT.joinpath(folder).rglob("*.py"))]
    assert len(files) > 20
    assert {str(path.relative_to(ROOT)): bad for path in files if (bad := offences(path.read_text()))} == {}
