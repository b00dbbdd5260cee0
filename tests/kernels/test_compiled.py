"""The kernels compiled ahead of time, as the operators launch them, for chips that need not be here.

A driver that only names its target stands in for the real one, so Triton specialises the arguments that `plan` gives.
The checks hold for the pinned Triton; another version may lower the same kernel to other instructions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unitvis_kernels as uk
from unitvis_kernels._triton import Launch
from unitvis_kernels.geometry import ConvGeometry

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

argmax, topk, epilogue, residual, conv, normalize, magnitudes = (
    sys.modules[f"unitvis_kernels.{name}"]
    for name in ("spatial_argmax", "topk_merge", "epilogue", "residual", "conv_argmax", "normalize", "magnitudes")
)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def empty_maps(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def argmax_nchw(dtype: torch.dtype, *shape: int) -> Launch:
    x = empty_maps(shape, dtype, torch.contiguous_format)
    return argmax.plan(x, x.new_empty(shape[:2], dtype=torch.int64))


def argmax_nhwc(dtype: torch.dtype, *shape: int, inside: tuple[int, ...] | None = None) -> Launch:
    x = empty_maps(shape, dtype, torch.channels_last)
    return argmax.plan(x, x.new_empty(shape[:2], dtype=torch.int64), inside)


def topk_launch(k: int, images: int, kind: str = "") -> Launch:
    state = uk.topk_state(1152, k, device="meta")
    if kind == "state":
        return topk.plan(state, state[:, :k].T, state[:, k : 2 * k].T)
    ids = state.new_empty((images, 1152) if kind == "ids [N, C]" else (images,))
    return topk.plan(state, state.new_empty(images, 1152), ids, *(2 * [kind == "of a step"]))


def epilogue_launch(dtype: torch.dtype, *pool: int, bias: bool = True, key_after: bool = False) -> Launch:
    x = empty_maps((256, 64, 56, 56), dtype, torch.channels_last)
    b = x.new_empty(64) if bias else None
    keys = x.new_empty((256, 64), dtype=torch.int64)
    floor = x.new_empty(64, dtype=torch.float32)
    return epilogue.plan(x, b, "relu", pool, key_after, floor, keys, epilogue.new_map(x, pool))


def residual_launch(dtype: torch.dtype, taps: str, shortcut_bias: bool = False, size: int = 56) -> Launch:
    x = empty_maps((256, 256, size, size), dtype, torch.channels_last)
    keys = [x.new_empty((256, 256), dtype=torch.int64) if tap == "1" else None for tap in taps]
    bias, floors = x.new_empty(256), [x.new_empty(256, dtype=torch.float32)] * 4
    return residual.plan_pixels(x, x, bias, bias if shortcut_bias else None, "relu", keys, floors, x)


def normalize_launch(dtype: torch.dtype) -> Launch:
    x = torch.empty(256, 224, 224, 3, dtype=torch.uint8, device="meta")
    return normalize.plan(x, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), x.new_empty(x.shape, dtype=dtype))


def blocks_launch(dtype: torch.dtype, kernel: int, stride: int, *, pixels: bool) -> Launch:
    geometry = uk.ConvGeometry((stride, stride), (kernel // 5, kernel // 5))
    blocks = uk.Blocks.of(3, (224, 224), (kernel, kernel), geometry)
    x = torch.empty(256, 224, 224, 3, dtype=torch.uint8 if pixels else dtype, device="meta")
    constants = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)) if pixels else (None, None)
    y = x.new_empty((256, *blocks.size, blocks.channels), dtype=dtype)
    return normalize.plan_blocks(x, *constants, blocks, y)


def magnitudes_launch(dtype: torch.dtype) -> Launch:
    if dtype == torch.uint8:
        x, constants = torch.empty(256, 224, 224, 3, dtype=dtype, device="meta"), ((0.5,) * 3, (0.2,) * 3)
    else:
        x, constants = empty_maps((256, 3, 224, 224), dtype, torch.channels_last), ((), ())
    return magnitudes.plan(x, *constants, magnitudes.new_magnitudes(x, constants[0]))


# name: (launch, whether its loads must be 128 bits wide)
KERNELS: dict[str, tuple[Callable[[], Launch], bool]] = {
    "argmax nchw fp16 55x55": (lambda: argmax_nchw(HALF, 256, 64, 55, 55), True),
    "argmax channels_last fp16": (lambda: argmax_nhwc(HALF, 256, 64, 55, 55), True),
    "argmax channels_last bf16 7x7": (lambda: argmax_nhwc(BF16, 256, 512, 7, 7), True),
    "argmax channels_last fp16, inside": (lambda: argmax_nhwc(HALF, 256, 64, 55, 55, inside=(3, 52, 3, 52)), True),
    "argmax channels_last fp32, 24 channels, split": (lambda: argmax_nhwc(FLOAT, 8, 24, 112, 112), True),
    "topk k=9": (lambda: topk_launch(9, 256), True),
    "topk k=64, of a step": (lambda: topk_launch(64, 256, "of a step"), True),
    "topk k=32": (lambda: topk_launch(32, 256), True),
    "topk k=9, a state": (lambda: topk_launch(9, 9, "state"), False),
    "epilogue fp16": (lambda: epilogue_launch(HALF), True),
    "epilogue fp16 pool 2 2": (lambda: epilogue_launch(HALF, 2, 2, 0), True),
    "epilogue fp16 pool 3 2": (lambda: epilogue_launch(HALF, 3, 2, 0), True),
    "epilogue fp16 pool 3 1 1": (lambda: epilogue_launch(HALF, 3, 1, 1), True),
    "residual fp16": (lambda: residual_launch(HALF, "1000"), True),
    "residual fp16 with a projection, all keys": (lambda: residual_launch(HALF, "1111", True), True),
    "normalize fp16": (lambda: normalize_launch(HALF), True),
    "normalize fp16 into blocks of 4 x 4": (lambda: blocks_launch(HALF, 11, 4, pixels=True), False),
    "arrange fp16 with a fourth channel": (lambda: blocks_launch(HALF, 3, 1, pixels=False), False),
    "magnitudes of pixels": (lambda: magnitudes_launch(torch.uint8), False),
    "magnitudes fp16": (lambda: magnitudes_launch(HALF), False),
}
# Tested with -m slow only.
MORE_KERNELS: dict[str, tuple[Callable[[], Launch], bool]] = {
    **{f"argmax nchw {d} {s}": (lambda d=d, s=s: argmax_nchw(d, *s), True) for d in (HALF, BF16, FLOAT)
       for s in ((256, 64, 55, 55), (64, 512, 7, 7), (1, 64, 224, 224), (256, 64, 1, 1))},
    **{f"argmax channels_last {d} {s}": (lambda d=d, s=s: argmax_nhwc(d, *s), True) for d in (HALF, BF16, FLOAT)
       for s in ((256, 64, 55, 55), (64, 512, 7, 7), (1, 64, 224, 224), (8, 24, 30, 30))},
    **{f"topk k={k}": (lambda k=k: topk_launch(k, 256), k <= 64) for k in (1, 10, 16, 40, 64, 300, 1024)},
    "topk k=9, N=16": (lambda: topk_launch(9, 16), True),
    "topk k=9, ids [N, C]": (lambda: topk_launch(9, 64, "ids [N, C]"), False),
    **{f"epilogue {d} {p}": (lambda d=d, p=p: epilogue_launch(d, *p), True) for d in (HALF, BF16, FLOAT)
       for p in ((), (2, 2, 0), (3, 2, 0), (3, 2, 1), (2, 1, 0), (3, 1, 1), (4, 2, 1), (5, 1, 2))},
    **{f"epilogue {p}, key after": (lambda p=p: epilogue_launch(HALF, *p, key_after=True), True)
       for p in ((), (3, 2, 1))},
    **{f"residual {d} {t} {s}": (lambda d=d, t=t, s=s: residual_launch(d, t, size=s), True)
       for d in (HALF, BF16, FLOAT) for t in ("1000", "1001") for s in (56, 7)},
    **{f"normalize {d}": (lambda d=d: normalize_launch(d), True) for d in (BF16, FLOAT)},
    **{f"magnitudes {d}": (lambda d=d: magnitudes_launch(d), False) for d in (BF16, FLOAT)},
}  # fmt: skip

# name: input channels, input size, output channels, kernel, stride, padding
LAYERS = {
    "AlexNet 1": (3, 224, 64, 11, 4, 2),
    "AlexNet 2": (64, 27, 192, 5, 1, 2),
    "AlexNet 3": (192, 13, 384, 3, 1, 1),
    "AlexNet 4": (384, 13, 256, 3, 1, 1),
    "AlexNet 5": (256, 13, 256, 3, 1, 1),
    "VGG16 1_1": (3, 224, 64, 3, 1, 1),
    **{
        f"VGG16 {name}": (c, size, d, 3, 1, 1)
        for name, c, size, d in (
            *(("1_2", 64, 224, 64), ("2_1", 64, 112, 128), ("2_2", 128, 112, 128), ("3_1", 128, 56, 256)),
            *(("3_2", 256, 56, 256), ("4_1", 256, 28, 512), ("4_2", 512, 28, 512), ("5", 512, 14, 512)),
        )
    },
    "ResNet-50 1": (3, 224, 64, 7, 2, 3),
    "ResNet-50 2 first": (64, 56, 64, 1, 1, 0),
    **{
        f"ResNet-50 {stage} {name}": layer
        for stage, c, size in ((2, 64, 56), (3, 128, 28), (4, 256, 14), (5, 512, 7))
        for name, layer in {
            "3x3": (c, size, c, 3, 1, 1),
            "expand": (c, size, 4 * c, 1, 1, 0),
            "reduce": (4 * c, size, c, 1, 1, 0),
            **(
                {"3x3 stride 2": (c, 2 * size, c, 3, 2, 1), "reduce first": (2 * c, 2 * size, c, 1, 1, 0)}
                if c > 64
                else {}
            ),
            **({"shortcut": (2 * c, 2 * size, 4 * c, 1, 2, 0)} if c > 64 else {}),
        }.items()
    },
}
PRODUCTS = {"sm_80": "HMMA.16816.F32", "sm_90": "HGMMA.64x", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}


class TargetOnly:
    """A driver that knows its target, and no device."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, name: str, patch: pytest.MonkeyPatch) -> Any:
    target = TARGETS[name][0]
    options = {k: v for k, v in launch.options.items() if k != "maxnreg" or target.backend == "cuda"}
    patch.setattr(triton.runtime.driver, "_active", TargetOnly(target, 1000 + list(TARGETS).index(name)))
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **options)


def tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def check(
    name: str, plan: Callable[[], Launch], wide: bool, target: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(torch.version, "hip", "7.0" if target == "gfx942" else None)  # some launches differ there
    kernel = compiled(plan(), target, patch)
    assert kernel.metadata.shared <= TARGETS[target][1]
    if target == "gfx942":
        assembly = kernel.asm["amdgcn"]
        assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)) == {"0"}  # scalars spill into vector lanes
        assert not wide or "load_dwordx4" in assembly
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin))))
    sass = tool("nvdisasm", "-c", str(cubin))
    print(f"{name} | {target} | {usage['REG']} registers | {kernel.metadata.shared} B shared")
    assert usage["STACK"] == usage["LOCAL"] == "0"
    assert not wide or re.search(r"LDG\.E\.(\w+\.)*128", sass)


def conv_launch(name: str, dtype: torch.dtype, activation: str | None, store: bool, key_after: bool) -> Launch:
    C, size, D, kernel, stride, padding = LAYERS[name]
    x = empty_maps((256, C, size, size), dtype, torch.channels_last)
    weight = empty_maps((D, C, kernel, kernel), dtype, torch.channels_last)
    geometry = ConvGeometry((stride, stride), (padding, padding))
    keys = x.new_empty((256, D), dtype=torch.int64)
    y = conv.new_map(x, weight, geometry, store)
    return conv.plan(x, weight, x.new_empty(D), geometry, activation, store, key_after, keys, y)


def check_convolution(
    name: str, launch: Launch, target: str, tmp_path: Path, patch: pytest.MonkeyPatch, store: bool = True
) -> None:
    if target == "gfx942":
        launch.options["SIGNED_NAN"] = True  # as `plan` has it there
    if target == "sm_80":
        launch.options.pop("maxnreg", None)  # likewise
    kernel = compiled(launch, target, patch)
    assert kernel.metadata.shared <= TARGETS[target][1]
    vectors = LAYERS[name][0] % 8 == 0
    if target == "gfx942":
        assembly = kernel.asm["amdgcn"]
        assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)) == {"0"}
        assert PRODUCTS[target] in assembly
        assert f"load_dwordx{4 if vectors else 2} " in assembly
        assert "load_ushort" not in assembly.split("v_mfma_f32")[1]
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage", str(cubin))))
    sass = tool("nvdisasm", "-c", str(cubin))
    tile = "x".join(str(launch.options[b]) for b in ("BM", "BN", "BK"))
    print(f"{name} | {target} | {tile} w{launch.options['num_warps']} | {usage['REG']} registers", end="")
    print(f" | {kernel.metadata.shared} B shared")
    assert usage["STACK"] == usage["LOCAL"] == "0"
    assert PRODUCTS[target] in sass
    # Pixels and weights arrive in whole vectors: by asynchronous copies, or by loads where one step is all there is.
    copies = set(re.findall(r"LDGSTS\.E\.(?:BYPASS\.)?(\w+)", sass))
    assert copies <= {"128" if vectors else "64"}
    assert copies or re.search(r"LDG\.E\.(\w+\.)*128", sass)
    assert set(re.findall(r"STG\.E\.(?:\w+\.)*(128|U16)", sass)) == ({"128"} if store else set())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *[(name, "sm_90") for name in ("AlexNet 1", "ResNet-50 2 expand", "ResNet-50 3 3x3")],
        *[("ResNet-50 3 3x3", target) for target in ("sm_80", "sm_100", "gfx942")],
    ],
)
def test_a_convolution_compiles_to_the_tensor_cores(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_convolution(name, conv_launch(name, HALF, "relu", True, False), target, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_convolution_compiles(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_convolution(name, conv_launch(name, HALF, "relu", True, False), target, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["AlexNet 1", "ResNet-50 2 expand", "ResNet-50 3 3x3", "ResNet-50 5 3x3"])
def test_every_form_of_a_convolution(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, *rest in ((BF16, None, True, False), (HALF, "relu6", True, True), (BF16, "relu", False, False)):
        launch = conv_launch(name, dtype, *rest)
        check_convolution(name, launch, target, tmp_path, monkeypatch, store=rest[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, wide = KERNELS[name]
    check(name, plan, wide, target, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MORE_KERNELS)
def test_every_variant_compiles(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, wide = MORE_KERNELS[name]
    check(name, plan, wide, target, tmp_path, monkeypatch)
