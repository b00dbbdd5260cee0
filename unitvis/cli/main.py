"""The command line. Exit codes: 0 done; 1 a check failed; 2 wrong usage or no start; 3 images skipped."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unitvis import models
from unitvis.cli.options import Command, parser
from unitvis.drawing import sheets
from unitvis.errors import Interrupted, UnitvisError
from unitvis.files import replacing
from unitvis.gallery import MAX_UNITS, gallery
from unitvis.gallery.figures import DPI, figure
from unitvis.network.network import Network
from unitvis.results.nonfinite import odd_responses
from unitvis.run import Run, load
from unitvis.scanning.merge import merge
from unitvis.scanning.pack import pack
from unitvis.scanning.scan import scan
from unitvis.scanning.torchrun import processes, scan_together
from unitvis.scanning.verify import verify
from unitvis.sources.transform import Transform

DONE, WRONG, USAGE, SKIPPED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr, never a traceback."""
    arguments = parser(COMMANDS).parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"unitvis: warning: {message}", file=sys.stderr)
        try:
            return arguments.command(arguments)
        except UnitvisError as error:
            print(f"unitvis: {error}", file=sys.stderr)
            return USAGE
        except Interrupted as error:
            print(f"unitvis: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print("unitvis: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has gone, as in `unitvis layers MODEL | head`
            sys.stderr.close()
            return DONE


def _load(arguments: argparse.Namespace) -> models.Loaded:
    return models.load(arguments.model, arguments.weights, pretrained=arguments.pretrained)


def _layers(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    size = arguments.crop or (loaded.transform and loaded.transform.crop) or (224, 224)
    network = Network(loaded.model)
    network.examine((3, *(size if isinstance(size, tuple) else (size, size))), arguments.layer or None)
    network.find_receptive_fields()
    print(f"{'layer':<28} {'channels':>8} {'map':>11} {'receptive field':>17} {'stride':>9}")
    for layer in network.layers:
        field = network.fields[layer.name]
        seen = "whole image" if field.whole_image else f"{field.size[0]} x {field.size[1]}"
        stride = f"{field.stride[0]:g} x {field.stride[1]:g}" if field.stride else "-"
        print(f"{layer.name:<28} {layer.channels:>8} {f'{layer.height} x {layer.width}':>11} {seen:>17} {stride:>9}")
        if field.note:
            print(f"  receptive field found by probing, cut at the image's border: {field.note}")
    return DONE


def _scan(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    together = processes() > 1 and arguments.shard is None
    shard = {} if together else {"shard": arguments.shard}
    run = (scan_together if together else scan)(
        loaded,
        arguments.images if len(arguments.images) > 1 else arguments.images[0],
        arguments.layer or None,
        arguments.k,
        out=arguments.output,
        transform=_transform(arguments, loaded.transform, "mean", "std"),
        batch_size=arguments.batch_size,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        precision=arguments.precision,
        unit=arguments.unit,
        **_reading(arguments),
        **shard,
    )
    if run is None:
        return DONE
    code = _done(run, arguments.output, loaded.model, arguments.device, project=arguments.project)
    return DONE if together else code  # torchrun would take any other code for a crash


def _transform(arguments: argparse.Namespace, known: Transform | None, *more: str) -> Transform | None:
    """What is known, with what the command line says instead."""
    fields = ("resize", "crop", "interpolation", *more)
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    return replace(known or Transform(), **given) if given else known


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that say how images are read, when checkpoints come, and what becomes of what is there."""
    names = ("on_error", "max_failures", "decoder", "scaled", "allow_truncated", "workers", "overwrite", "resume")
    return {name: getattr(arguments, name) for name in names} | {"every": arguments.checkpoint_every}


def _pack(arguments: argparse.Namespace) -> int:
    known = Transform()
    if arguments.like is not None:
        like = models.load(arguments.like, pretrained=False).transform
        if like is None:
            raise UnitvisError(f"{arguments.like} names no transform; give --resize and --crop")
        known = like
    packed = pack(
        arguments.images if len(arguments.images) > 1 else arguments.images[0],
        arguments.output,
        _transform(arguments, known),
        **_reading(arguments),
    )
    images, height, width, _ = packed.describe()["shape"]
    print(f"{packed.path}: {images:,} images, {width} x {height} pixels")
    failures = [{"name": packed.name(id), "reason": reason} for id, reason in packed.unusable.items()]
    _tell_failures(failures, Path(packed.path).with_suffix(".json").name)
    return SKIPPED if packed.unusable else DONE


def _done(
    run: Run, folder: Path, model: nn.Module | None = None, device: str | None = None, *, project: bool = False
) -> int:
    """Say what a run holds and draw it, unless it is one to be merged first."""
    _tell(run)
    if run.tops:
        _render_into(run, folder, model=model, project=project, device=device)
    return SKIPPED if run.manifest["failures"] else DONE


def _merge(arguments: argparse.Namespace) -> int:
    model = None
    if arguments.model is not None:
        model = models.load(arguments.model, arguments.weights, pretrained=arguments.pretrained)
    run = merge(
        arguments.runs,
        model,
        out=arguments.output,
        images=arguments.images,
        device=arguments.device,
        partial=arguments.partial,
        overwrite=arguments.overwrite,
    )
    return _done(run, arguments.output)


def _tell(run: Run) -> None:
    if run.tops:
        _tell_result(run)
    else:
        print(f"{run.manifest['images']:,} images; `unitvis merge` makes a run of all shards")
    _tell_failures(run.manifest["failures"], "the manifest")


def _tell_failures(failures: list[dict[str, Any]], where: str) -> None:
    if failures:
        print(f"{len(failures)} images could not be read and were skipped (all are listed in {where}):")
        for failure in failures[:10]:
            print(f"  {failure['name']!r}: {failure['reason']}")  # !r: a name may hold anything


def _tell_result(run: Run) -> None:
    counts = run.count()
    seconds = run.manifest["seconds"]
    images = run.manifest["images"]
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "units" and count)
    rate = images / max(seconds["scan"], 1e-9)  # a merge of recorders knows no time
    print(
        f"{images:,} images, {counts['units']:,} units of {len(run)} layers in {seconds['scan']:.1f} s "
        f"({rate:.0f} images/s) after {seconds['preparation']:.1f} s of preparation, second pass "
        f"{seconds['second_pass']:.1f} s: {told}"
    )
    if run.manifest["precision"] == "exact":
        print(f"precision: {run.manifest['plan']}")
    if unseparated := {name: top.info["unseparated"] for name, top in run.tops.items() if top.info["unseparated"]}:
        layers = ", ".join(f"{count} of {name}" for name, count in unseparated.items())
        print(f"unseparated, so not proven to be the strongest (--precision fp32 decides them): {layers}")
    for sentence in odd_responses(run):
        print(sentence)


def _render(arguments: argparse.Namespace) -> int:
    if arguments.model is None and (arguments.project or arguments.weights):
        raise UnitvisError("--project and --weights need --model, the network that was scanned")
    run = load(arguments.run, arguments.images)
    model = models.load(arguments.model, arguments.weights).model if arguments.model else None
    _render_into(run, arguments.run, arguments.crop, model=model, project=arguments.project)
    return DONE


def _render_into(
    run: Run,
    folder: Path,
    crop: str | None = None,
    *,
    model: nn.Module | None = None,
    project: bool = False,
    device: str | None = None,
) -> None:
    units, drawn = sum(len(top) for top in run.tops.values()), None
    try:
        written = sheets.render(run, folder, crop=crop)
        if units <= MAX_UNITS:
            drawn = gallery(run, folder, model, project=project, crop=crop, device=device)
    except OSError as error:
        raise UnitvisError(
            f"the run is whole, but its pictures could not be written into {folder}: {error.strerror or error}; mend "
            f"that, then draw them with `unitvis render`"
        ) from error
    print(f"{len(written)} sheets in {written[0].parent}")
    if drawn is None:
        print(f"no gallery: {units:,} units are too many ({MAX_UNITS:,} at most)")
    else:
        print(f"gallery: open {drawn} in a browser")


MOST_SIZE = 2048  # of a patch's side on a sheet


def _sheet(arguments: argparse.Namespace) -> int:
    target: Path = arguments.output
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UnitvisError(f"{target} must end in .png, .jpg or .webp")
    if not target.parent.is_dir():
        raise UnitvisError(f"there is no folder {target.parent} to write {target.name} into")
    if target.is_dir():
        raise UnitvisError(f"{target} is a folder; name a file")
    if arguments.size is not None and not 0 < arguments.size <= MOST_SIZE:
        raise UnitvisError(f"--size is 1 to {MOST_SIZE} pixels a patch, not {arguments.size}")
    run = load(arguments.run, arguments.images)
    units = sheets.parse_units(arguments.units) if arguments.units else None
    if arguments.figure:
        if arguments.size:
            raise UnitvisError("a figure has patches of one size; leave out --size")
        page = figure(run, arguments.layer, arguments.figure, units, crop=arguments.crop)
    elif len(arguments.layer) > 1:
        raise UnitvisError("several layers go on one page as a figure: --figure lecture or --figure paper")
    else:
        page = run.sheet(arguments.layer[0], units, crop=arguments.crop, size=arguments.size)
    with replacing(target) as part:
        page.save(part, {".png": "PNG", ".webp": "WEBP"}.get(target.suffix.lower(), "JPEG"), dpi=(DPI, DPI))
    print(f"{target}: {page.width} x {page.height} pixels")
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    run = load(arguments.run, arguments.images)
    found = verify(run, _load(arguments).model, arguments.device)
    how = (
        "bit for bit"
        if found["same_fingerprint"]
        else "within 1e-5 of the layer's largest (another machine or version)"
    )
    print(f"{found['winners'] - found['wrong']:,} of {found['winners']:,} winners came out again {how}")
    if found["wrong"]:
        print(f"the first that did not: {found['first_wrong']}")
    return WRONG if found["wrong"] else DONE


def _demo(arguments: argparse.Namespace) -> int:
    from unitvis.demo.command import demo  # what only the demo needs is loaded for it alone

    print(demo(arguments.output, overwrite=arguments.overwrite, project=arguments.project))
    return DONE


def _bench(arguments: argparse.Namespace) -> int:
    from unitvis.bench.bench import bench

    if arguments.model is None:
        from unitvis.demo import network
        from unitvis.demo.pictures import SIZE

        own = Transform(crop=SIZE, mean=network.MEAN, std=network.STD)
        loaded = models.Loaded("the demo's network", network.load(), own)
    else:
        loaded = _load(arguments)
    transform = loaded.transform or Transform()
    if arguments.crop is not None:
        transform = replace(transform, crop=arguments.crop)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{loaded.spec}: {bench(loaded.model, transform, device, arguments.count)}")
    return DONE


COMMANDS: dict[str, Command] = {
    "demo": _demo,
    "layers": _layers,
    "scan": _scan,
    "merge": _merge,
    "pack": _pack,
    "render": _render,
    "sheet": _sheet,
    "verify": _verify,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
