"""What is installed: two packages, importable anywhere, and nothing named `kernels`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
    assert sources <= set(names)
    assert {"unitvis/py.typed", "unitvis_kernels/py.typed"} <= set(names)


PROGRAM = """
import sys
checkout = sys.argv[2]  # an editable install puts it on the path
sys.path = [sys.argv[1], *(path for path in sys.path if not path.startswith(checkout) or "site-packages" in path)]
sys.modules["triton"] = None  # importing it raises
import torch
import unitvis, unitvis_kernels
assert unitvis.__file__.startswith(sys.argv[1]) and unitvis_kernels.__file__.startswith(sys.argv[1])
assert not torch.cuda.is_initialized()
try:
    import kernels
except ModuleNotFoundError:
    print("fine", unitvis_kernels.spatial_argmax(torch.zeros(1, 1, 2, 2)).item() >> 32)
"""


def test_import_needs_no_gpu_and_no_triton_and_brings_no_kernels(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "site"), str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        check=False,
    )
    assert done.stdout == "fine 0\n", done.stderr
