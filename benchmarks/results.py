"""Convert pytest-benchmark's timings to a results file, and results files to the README's tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.machine import ROOT
from unitvis.bench.bench import BARE_FORWARD, DEVICE_HOOK, NAIVE_HOOK

FORMAT = 1
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
LONG = RESULTS / "long"  # results of the measurements started by hand, a file each
START, END = "<!-- python -m benchmarks writes from here -->", "<!-- to here -->"
START_EXACTNESS = "<!-- python -m benchmarks.exactness writes from here -->"
PERCENTILES = (20, 50, 80)
FAMILIES = (BARE_FORWARD, DEVICE_HOOK, NAIVE_HOOK)  # baselines, each in several forms (compiled, captured)
NAMES = {"alexnet": "AlexNet", "vgg16": "VGG16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
NAMES |= {"small": "MobileNet, width 0.25, trained", "large": "MobileNet, width 1, trained"}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def row(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the row of one timed callable: its parameters, percentiles of its seconds a call, and rates."""
    found = dict(turns[-1]["extra_info"])
    calls, times = found.pop("calls"), [seconds for turn in turns for seconds in turn["stats"]["data"]]
    found["rounds"] = len(times)
    found["seconds"] = {f"p{p}": float(f"{np.percentile(times, p) / calls:.4g}") for p in PERCENTILES}
    median = found["seconds"]["p50"]
    for amount, rate, unit in (("bytes", "gb_s", 1e9), ("flops", "tflop_s", 1e12), ("images", "images_s", 1)):
        if amount in found:
            found[rate] = float(f"{found[amount] / median / unit:.4g}")
    return found


def rows(benchmarks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the rows of all timed callables; those of operators get their fraction of the measured ceiling."""
    turns: dict[str, list[dict[str, Any]]] = {}
    for one in benchmarks:
        own = {key: value for key, value in one["extra_info"].items() if key not in ("rescored", "undecided")}
        turns.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(one)
    found = [row(one) for one in turns.values()]
    ceilings = {one["name"]: one for one in found if one["kind"] == "ceiling"}
    for one in found:
        for rate, ceiling in (("gb_s", "copy"), ("tflop_s", "product")):
            if one["kind"] == "operator" and rate in one and ceiling in ceilings:
                one["of_ceiling"] = round(one[rate] / ceilings[ceiling][rate], 3)
    return found


def read(path: Path) -> dict[str, Any]:
    """Read a results file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, **parts: Any) -> None:
    """Write entries of a results file; its other entries, measured at another time, are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT} | read(path) | parts, indent=1) + "\n")


def record(name: str, figures: dict[str, Any], folder: Path = LONG) -> Path:
    """Write the figures of a long measurement on the CPU, in place of earlier ones of that name."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    write(path, machine=machine.describe(torch.device("cpu")), **figures)
    return path


def headline(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group rows that were compared: {what, unitvis, each baseline in its fastest form}, in images/s."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in found:
        if one["kind"] not in ("step", "scan"):
            continue
        batch = one["images"] if one["kind"] == "step" else one["batch"]
        rates = groups.setdefault((one["network"], one["precision"], one["kind"], batch), {})
        family = next((name for name in FAMILIES if one["contender"].startswith(name)), one["contender"])
        rates[family] = max(rates.get(family, 0.0), one["images_s"])
    lines = []
    for (network, precision, kind, batch), rates in groups.items():
        what = f"{NAMES.get(network, network)}, {PRECISIONS[precision]}, "
        what += f"a step of {batch}" if kind == "step" else f"a scan from host memory, {batch} at once"
        for contender in rates:
            if contender.startswith("unitvis"):
                own = what + contender.removeprefix("unitvis")
                lines.append({"what": own, "unitvis": rates[contender]} | {name: rates[name] for name in FAMILIES})
    return lines


def render(files: Iterable[Path]) -> str:
    """Write the README's table of speeds, in Markdown, from results files."""
    loaded = [json.loads(path.read_text()) for path in files]
    text = [
        f"Images a second; behind each, how many times as fast as that unitvis is. Where {BARE_FORWARD} and "
        f"{DEVICE_HOOK} were also compiled or captured, the fastest form counts.",
        "",
    ]
    for one in loaded:
        device = one["machine"]
        driver = f", driver {device['driver']}" if device["driver"] else ""
        host = f"{device['name']}, {device['cores']} cores" if device["kind"] == "cpu" else device["name"]
        text += [
            f"**{host}**{driver}, torch {device['versions']['torch']}, commit {device['commit']}, "
            f"{device['date']}, load {device['load']} before the start:",
            "",
            f"| | unitvis | {BARE_FORWARD} | {DEVICE_HOOK} | {NAIVE_HOOK} |",
            "|---|---|---|---|---|",
        ]
        for line in headline(one["rows"]):
            cells = [f"{line[f]:,.0f} ({line['unitvis'] / line[f]:.2f}x)" for f in FAMILIES]
            text.append(f"| {line['what']} | {line['unitvis']:,.0f} | {' | '.join(cells)} |")
        text.append("")
    if not any(one["machine"]["kind"] == "cuda" for one in loaded):
        text += ["Not yet measured on a GPU.", ""]
    return "\n".join(text)


def files() -> list[Path]:
    """List the committed results files of devices."""
    return sorted(RESULTS.glob("*.json"))


def render_exactness(lines: Iterable[dict[str, Any]]) -> str:
    """Write the README's table of what the bound decided, in Markdown."""
    text = [
        "| | images | scanned in | units | decided by the bound alone | of these wrong |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(lines, key=lambda one: (NAMES[one["network"]], one["images"], one["precision"])):
        what = f"{NAMES[one['network']]} | {one['images']:,} | {PRECISIONS[one['precision']]} | {one['units']:,}"
        text.append(f"| {what} | {one['decided']:,} | {one['wrong']:,} |")
    return "\n".join([*text, ""])


def block(readme: str, start: str = START) -> str:
    """Return the README's text between two markers."""
    return readme.partition(start + "\n")[2].partition(END)[0]


def update_readme() -> None:
    """Write the tables into the README, between their markers."""
    text = README.read_text(encoding="utf-8")
    tables = {START: render(files()), START_EXACTNESS: render_exactness(read(LONG / "exactness.json")["lines"])}
    for start, table in tables.items():
        before, _, rest = text.partition(start + "\n")
        _, _, behind = rest.partition(END)
        text = f"{before}{start}\n{table}{END}{behind}"
    README.write_text(text, encoding="utf-8")
