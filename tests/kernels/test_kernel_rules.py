"""Rules that the source of every kernel keeps, and that the import needs neither Triton nor a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kernels"
FILES = sorted((ROOT / "unitvis_kernels").glob("*.py"))


def kernels(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("jit") for d in node.decorator_list)
    ]


def test_there_are_kernels_to_look_at() -> None:
    assert {"spatial_argmax", "topk_merge", "epilogue", "conv_argmax", "normalize", "magnitudes"} <= {
        p.stem for p in FILES if kernels(p)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_masked_loads_give_other(path: Path) -> None:
    for kernel in kernels(path):
        for call in ast.walk(kernel):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "tl.load":
                given = {k.arg for k in call.keywords}
                assert len(call.args) == 1, f"{path.name}:{call.lineno}"
                assert ("mask" in given) == ("other" in given), f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_addresses_are_64_bit(path: Path) -> None:
    for kernel in kernels(path):
        if "tl.program_id" in ast.unparse(kernel):
            assert ".to(tl.int64)" in ast.unparse(kernel), f"{path.name}: {kernel.name}"


def test_the_kernel_that_changes_a_state_is_not_tuned_by_running_it() -> None:
    assert "autotune" not in (ROOT / "unitvis_kernels" / "topk_merge.py").read_text()


@pytest.mark.parametrize("without", ["", "sys.modules['triton'] = None"])
def test_import_touches_no_gpu_and_needs_no_triton(without: str) -> None:
    code = f"""
import sys, torch
{without}
def refuse(*args, **kwargs): raise SystemExit("a GPU was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
import unitvis_kernels as uk
x = torch.randn(2, 3, 4, 4)
x, _ = uk.conv_argmax(x, torch.randn(3, 3, 1, 1))[::-1]
keys, y = uk.epilogue(x, torch.zeros(3), "relu", (2, 2))
uk.topk_merge_(uk.topk_state(3, 2), keys, torch.arange(2))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
