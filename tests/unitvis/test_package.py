"""What is installed: two packages of one version, importable anywhere, and nothing named `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import unitvis
from unitvis import cli

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TRAINING = {"unitvis/demo/train.py"}  # made the demo's weights, which are installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"unitvis", "unitvis_kernels"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "unitvis").rglob("*.py")}
    sources |= {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    assert sources > TRAINING
    assert {name for name in names if name.endswith(".py")} == sources - TRAINING
    assert {"unitvis/py.typed", "unitvis_kernels/py.typed", "unitvis/demo/network.safetensors"} <= set(names)


PROGRAM = """
import os, sys
folder, version = sys.argv[1:]
def checkout(path):  # which an editable install puts on the path
    return any(os.path.isdir(os.path.join(path, name)) for name in ("unitvis", "unitvis_kernels"))
sys.path = [folder, *(path for path in sys.path if "site-packages" in path or not checkout(path))]
for missing in ("triton", "fcntl"):  # as on Windows; importing them raises
    sys.modules[missing] = None
import torch
import unitvis, unitvis_kernels
from unitvis import *
assert unitvis.__file__.startswith(folder) and unitvis_kernels.__file__.startswith(folder)
assert unitvis.__version__ == version
assert not torch.cuda.is_initialized()
import unitvis.cli, unitvis.demo.command
try:
    import kernels
except ModuleNotFoundError:
    print("fine", unitvis_kernels.spatial_argmax(torch.zeros(1, 1, 2, 2)).item() >> 32)
"""


def test_import_needs_no_gpu_no_triton_and_no_fcntl_and_brings_no_kernels(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "site"), VERSION],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        check=False,
    )
    assert done.stdout == "fine 0\n", done.stderr


def test_the_version_is_that_of_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    assert unitvis.__version__ == VERSION
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"unitvis {VERSION}\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["scan", "--help"], ["scan", "net.py:net"]])
def test_help_and_wrong_usage_do_not_wait_for_pytorch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from unitvis.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: print('ended with', end.code)\n"
        "print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith(f"ended with {2 if arguments == ['scan', 'net.py:net'] else 0}\nset()\n")


def test_every_public_name_is_found() -> None:
    for name in unitvis.__all__:
        assert getattr(unitvis, name).__module__.startswith("unitvis.")
        assert name in dir(unitvis)
    assert callable(unitvis.gallery)
    with pytest.raises(AttributeError, match="module 'unitvis' has no attribute 'scam'"):
        unitvis.scam  # noqa: B018
