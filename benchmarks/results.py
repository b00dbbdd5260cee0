"""From what pytest-benchmark timed to a results file, and from results files to the tables in docs/."""

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
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
LONG = RESULTS / "long"  # what takes long and is not about speed alone: a file a command
GPU = RESULTS / "gpu"  # parts of the suite that were run by hand on a GPU: steps and operators, a file each
START, END = "<!-- python -m benchmarks writes from here -->", "<!-- to here -->"
START_STEPS = "<!-- python -m benchmarks writes the steps on a GPU from here -->"
START_OPERATORS = "<!-- python -m benchmarks writes the operators on a GPU from here -->"
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
    """What was timed on each machine, as Markdown tables, from results files."""
    loaded = [json.loads(path.read_text()) for path in files]
    text = [
        f"Images per second; in brackets, unitvis's rate divided by that one. Where {BARE_FORWARD} and {DEVICE_HOOK} "
        f"were also compiled or captured, the fastest form counts.",
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
        text += ["The whole suite has not been run on a GPU yet.", ""]
    return "\n".join(text)


def render_steps(measured: dict[str, Any]) -> str:
    """Milliseconds of a step of each network on a GPU, as a Markdown table."""
    rivals = (f"{BARE_FORWARD}, captured", f"{BARE_FORWARD}, torch.compile", f"{DEVICE_HOOK}, captured")
    heads = [part for rival in rivals for part in (rival, "ratio")]
    text = [f"| | unitvis | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    steps: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for one in measured["rows"]:
        steps.setdefault((one["network"], one["precision"], one["images"]), {})[one["contender"]] = one
    for (network, precision, images), found in steps.items():
        own = found["unitvis"]
        cells = [f"{own['ms_median']:.4g} ms ({own['images_s']:,.0f} images/s)"]
        for rival in rivals:
            ms = found[rival]["ms_median"]
            cells += [f"{ms:.4g} ms", f"{own['ms_median'] / ms:.2f}"]
        text.append(f"| {NAMES[network]}, {PRECISIONS[precision]}, {images} images | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def render_operators(measured: dict[str, Any]) -> str:
    """The share of the device's ceiling that each operator and its fastest rival reach, as a Markdown table."""
    text = ["| operator | input | unitvis | fastest other way |", "|---|---|---|---|"]
    shares: dict[str, dict[str, float]] = {}
    for one in measured["rows"]:
        if one["kind"] != "operator":
            continue
        parts = [f"{one['shape']}", *(f"{key} {one[key]}" for key in ("layout", "weight", "pool") if one.get(key))]
        what = f"`{one['name']}` | {', '.join(parts)}"
        shares.setdefault(what, {})[one["contender"]] = one["of_ceiling"]
    for what, found in shares.items():
        own = found.pop("unitvis")
        rival, share = max(found.items(), key=lambda item: item[1])
        text.append(f"| {what} | {own:.0%} | {share:.0%} ({rival}) |")
    return "\n".join([*text, ""])


def files() -> list[Path]:
    """List the committed results files of devices."""
    return sorted(RESULTS.glob("*.json"))


def render_exactness(lines: Iterable[dict[str, Any]]) -> str:
    """How many units the bound decided, and how many of them wrongly, as a Markdown table."""
    text = [
        "| | images | scanned in | units | decided by the bound alone | of these wrong |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(lines, key=lambda one: (NAMES[one["network"]], one["images"], one["precision"])):
        what = f"{NAMES[one['network']]} | {one['images']:,} | {PRECISIONS[one['precision']]} | {one['units']:,}"
        text.append(f"| {what} | {one['decided']:,} | {one['wrong']:,} |")
    return "\n".join([*text, ""])


def block(document: str, start: str = START) -> str:
    """What stands between the markers."""
    return document.partition(start + "\n")[2].partition(END)[0]


def tables() -> dict[str, dict[str, str]]:
    """{name of a document in docs/: {marker: the table that stands behind it}}."""
    return {
        "benchmarks.md": {START: render(files()), START_STEPS: render_steps(read(GPU / "h200-steps.json"))},
        "kernels.md": {START_OPERATORS: render_operators(read(GPU / "h200-operators.json"))},
        "exactness.md": {START_EXACTNESS: render_exactness(read(LONG / "exactness.json")["lines"])},
    }


def update_documents() -> None:
    """Put the tables between their markers."""
    for name, parts in tables().items():
        path = DOCS / name
        text = path.read_text(encoding="utf-8")
        for start, table in parts.items():
            before, _, rest = text.partition(start + "\n")
            _, _, behind = rest.partition(END)
            text = f"{before}{start}\n{table}{END}{behind}"
        path.write_text(text, encoding="utf-8")
