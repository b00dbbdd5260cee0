"""From what pytest-benchmark timed to a results file, and from results files to the README's table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.machine import ROOT
from unitvis.bench.bench import BARE, DEVICE, HOST

FORMAT = 1
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
LONG = RESULTS / "long"  # what takes long and is not about speed alone: a file a command
START, END = "<!-- python -m benchmarks writes from here -->", "<!-- to here -->"
START_EXACTNESS = "<!-- python -m benchmarks.exactness writes from here -->"
PERCENTILES = (20, 50, 80)
NAMES = {"alexnet": "AlexNet", "vgg16": "VGG16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
NAMES |= {"small": "MobileNet, width 0.25, trained", "large": "MobileNet, width 1, trained"}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def row(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One timed callable: what it was, seconds a call (percentiles of all turns' rounds), what follows from them."""
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
    """Every timed callable; operators also as a share of the ceiling that was measured beside them."""
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
    """A results file; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, **parts: Any) -> None:
    """Write parts of a results file: the others, measured by hand or at another time, stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT} | read(path) | parts, indent=1) + "\n")


def record(name: str, figures: dict[str, Any], folder: Path = LONG) -> Path:
    """Write what a long run on the CPU came to, in place of what was there of that name."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    write(path, machine=machine.describe(torch.device("cpu")), **figures)
    return path


def headline(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was compared with one another: {what, unitvis, and per family of baselines its fastest form}, images/s."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in found:
        if one["kind"] not in ("step", "scan"):
            continue
        batch = one["images"] if one["kind"] == "step" else one["batch"]
        rates = groups.setdefault((one["network"], one["precision"], one["kind"], batch), {})
        family = next((f for f in (BARE, DEVICE, HOST) if one["contender"].startswith(f)), one["contender"])
        rates[family] = max(rates.get(family, 0.0), one["images_s"])
    lines = []
    for (network, precision, kind, batch), rates in groups.items():
        what = f"{NAMES.get(network, network)}, {PRECISIONS[precision]}, "
        what += f"a step of {batch}" if kind == "step" else f"a scan from host memory, {batch} at once"
        for who in rates:
            if who.startswith("unitvis"):
                own = what + who.removeprefix("unitvis")
                lines.append({"what": own, "unitvis": rates[who]} | {f: rates[f] for f in (BARE, DEVICE, HOST)})
    return lines


def render(files: Iterable[Path]) -> str:
    """The README's part, in Markdown, from results files."""
    loaded = [json.loads(path.read_text()) for path in files]
    text = [
        f"Images a second; behind each, how many times as fast as that unitvis is. Where {BARE} and {DEVICE} were also "
        f"compiled or captured, the fastest form counts.",
        "",
    ]
    for one in loaded:
        device = one["machine"]
        driver = f", driver {device['driver']}" if device["driver"] else ""
        place = f"{device['name']}, {device['cores']} cores" if device["kind"] == "cpu" else device["name"]
        text += [
            f"**{place}**{driver}, torch {device['versions']['torch']}, commit {device['commit']}, "
            f"{device['date']}, load {device['load']} before the start:",
            "",
            f"| | unitvis | {BARE} | {DEVICE} | {HOST} |",
            "|---|---|---|---|---|",
        ]
        for line in headline(one["rows"]):
            cells = [f"{line[f]:,.0f} ({line['unitvis'] / line[f]:.2f}x)" for f in (BARE, DEVICE, HOST)]
            text.append(f"| {line['what']} | {line['unitvis']:,.0f} | {' | '.join(cells)} |")
        text.append("")
    if not any(one["machine"]["kind"] == "cuda" for one in loaded):
        text += ["Not yet measured on a GPU.", ""]
    return "\n".join(text)


def files() -> list[Path]:
    """Those that are committed."""
    return sorted(RESULTS.glob("*.json"))


def render_exactness(lines: Iterable[dict[str, Any]]) -> str:
    """The README's counts of what the bound decided, in Markdown."""
    text = [
        "| | images | scanned in | units | decided by the bound alone | of these wrong |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(lines, key=lambda one: (NAMES[one["network"]], one["images"], one["precision"])):
        what = f"{NAMES[one['network']]} | {one['images']:,} | {PRECISIONS[one['precision']]} | {one['units']:,}"
        text.append(f"| {what} | {one['decided']:,} | {one['wrong']:,} |")
    return "\n".join([*text, ""])


def block(readme: str, start: str = START) -> str:
    """What stands between the markers."""
    return readme.partition(start + "\n")[2].partition(END)[0]


def update_readme() -> None:
    """Put the tables between their markers."""
    text = README.read_text(encoding="utf-8")
    tables = {START: render(files()), START_EXACTNESS: render_exactness(read(LONG / "exactness.json")["lines"])}
    for start, table in tables.items():
        before, _, rest = text.partition(start + "\n")
        _, _, behind = rest.partition(END)
        text = f"{before}{start}\n{table}{END}{behind}"
    README.write_text(text, encoding="utf-8")
