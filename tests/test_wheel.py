"""What is installed is what is in the tree: the wheel's file list, the sdist's, and the public names."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "plugins", "quant", "moe", "models", "csrc", "bench")
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
DEMO = "models/demo/"


def tree() -> set[str]:
    """Every file of the package as the repository has it, by its name in the wheel."""
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                             capture_output=True, check=True).stdout.split()
    package = {f"nybble/{name}" for name in tracked if (ROOT / name).exists() and name.split("/")[0] in FOLDERS
               and ((ROOT / name).suffix in SUFFIXES or name.startswith(DEMO))}
    return package | {"nybble/__init__.py", "nybble/__main__.py", "nybble/py.typed"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="the build frontend is a dev dependency")
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_wheel_is_the_tree_and_survives_the_sdist(dist):
    """`build` makes the wheel from the sdist, so a link lost in either shows here."""
    (wheel,) = dist.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == tree()


def test_links_are_relative_and_complete():
    links = {path.name: path.readlink() for path in (ROOT / "src" / "nybble").iterdir() if path.is_symlink()}
    assert links == {name: Path("../..") / name for name in FOLDERS}


def test_public_names():
    import nybble

    assert nybble.__all__ == ["LLM", "AsyncLLM", "CompletionOutput", "EngineArgs", "LLMEngine", "Logprob",
                              "NybbleError", "RequestOutput", "SamplingParams", "__version__", "hookimpl"]
    for name in nybble.__all__:
        assert getattr(nybble, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = nybble.LMM


def test_importing_the_package_imports_no_torch():
    code = "import sys, nybble, nybble.plugins.manager; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_imports_inside_the_package_are_relative():
    """An absolute import of itself makes a second copy of a module when a file is opened by its real path."""
    absolute = [f"{name}:{i}" for name in sorted(tree()) if name.endswith(".py")
                for i, line in enumerate((ROOT / "src" / name).read_text().splitlines(), 1)
                if line.lstrip().startswith(("import nybble", "from nybble"))]
    assert absolute == []
