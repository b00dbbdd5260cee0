"""The commands of the command line, each a function of its arguments that returns the exit code."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from unitvis import models
from unitvis.attribution.feature_maps import feature_maps
from unitvis.cli.codes import DONE, SKIPPED, WRONG
from unitvis.cli.report import print_drawn, print_layers, print_pack, print_run, print_times, print_verified
from unitvis.drawing import sheets
from unitvis.drawing.page import ENDINGS, PICTURES, Page, check_ending, page_dots, save_picture
from unitvis.drawing.units import Units, parse_choice, units_by_layer
from unitvis.errors import Interrupted, UnitvisError
from unitvis.network.network import Network
from unitvis.pages import MAX_UNITS, draw
from unitvis.pages.excerpt import excerpt
from unitvis.pages.figures import figure
from unitvis.results.classes import name_classes
from unitvis.results.drawn_files import scanned_file
from unitvis.run import Run, load
from unitvis.scanning.merge import merge
from unitvis.scanning.pack import pack
from unitvis.scanning.scan import scan
from unitvis.scanning.torchrun import processes, scan_together
from unitvis.scanning.verify import verify
from unitvis.sources.transform import Transform

MAX_PATCH_SIDE = 2048  # of a patch on a sheet, in pixels
PAGE_WIDTH = "160mm"  # of SVG and PDF if no other is given: the text of an A4 page


def _load_model(arguments: argparse.Namespace) -> models.Loaded:
    return models.load(arguments.model, arguments.weights, pretrained=arguments.pretrained)


def _device(arguments: argparse.Namespace) -> str:
    """The device that was given; without one a GPU if there is one."""
    if arguments.device is not None:
        return arguments.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _layers(arguments: argparse.Namespace) -> int:
    loaded = _load_model(arguments)
    size = arguments.crop or (loaded.transform and loaded.transform.crop) or (224, 224)
    height, width = size if isinstance(size, tuple) else (size, size)
    network = Network(loaded.model)
    shape = (network.input_channels(height, width), height, width)
    network.examine(shape, arguments.layer or None, exclude=arguments.exclude)
    network.find_receptive_fields()
    print_layers(network)
    return DONE


def _scan(arguments: argparse.Namespace) -> int:
    loaded = _load_model(arguments)
    together = processes() > 1 and arguments.shard is None
    shard = {} if together else {"shard": arguments.shard}
    run = (scan_together if together else scan)(
        loaded,
        arguments.images if len(arguments.images) > 1 else arguments.images[0],
        arguments.layer or None,
        arguments.k,
        exclude=arguments.exclude,
        out=arguments.output,
        transform=given_transform(arguments, loaded.transform, "mean", "std"),
        batch_size=arguments.batch_size,
        device=_device(arguments),
        precision=arguments.precision,
        unit=arguments.unit,
        inside=arguments.inside,
        labels=arguments.labels,
        **given_reading(arguments),
        **shard,
    )
    if run is None:
        return DONE
    code = _finish(run, arguments.output, loaded.model, arguments.device, project=arguments.project)
    return DONE if together else code  # torchrun would take any other code for a crash


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
        given_transform(arguments, known),
        **given_reading(arguments),
    )
    print_pack(packed)
    return SKIPPED if packed.unusable else DONE


def _finish(
    run: Run, folder: Path, model: nn.Module | None = None, device: str | None = None, *, project: bool | str = False
) -> int:
    """Print a run and draw it, unless it is a shard's; returns the exit code."""
    print_run(run)
    if run.tops:
        print_times(run, _render_into(run, folder, model=model, project=project, device=device))
    return SKIPPED if run.manifest["failures"] else DONE


def _merge(arguments: argparse.Namespace) -> int:
    if arguments.model is None and (arguments.weights or not arguments.pretrained):
        raise UnitvisError("--weights and --no-pretrained need --model, the network that was scanned")
    model = None if arguments.model is None else _load_model(arguments)
    run = merge(
        arguments.runs,
        model,
        out=arguments.output,
        images=arguments.images,
        device=arguments.device,
        partial=arguments.partial,
        overwrite=arguments.overwrite,
    )
    return _finish(run, arguments.output)


def _render(arguments: argparse.Namespace) -> int:
    if arguments.model is None and (arguments.project or arguments.weights):
        raise UnitvisError("--project and --weights need --model, the network that was scanned")
    units = parse_choice(arguments.units)
    if units is not None and not arguments.project:
        raise UnitvisError("--units chooses of which units projections are drawn; it needs --project")
    run = load(arguments.run, arguments.images)
    if arguments.labels is not None:
        name_classes(run, arguments.labels)
    _render_into(
        run, arguments.run, arguments.crop, model=_given_network(arguments), project=arguments.project, units=units
    )
    return DONE


def _given_network(arguments: argparse.Namespace) -> nn.Module | None:
    """The network that --model names; None without it."""
    return models.load(arguments.model, arguments.weights).model if arguments.model else None


def _render_into(
    run: Run,
    folder: Path,
    crop: str | None = None,
    *,
    model: nn.Module | None = None,
    project: bool | str = False,
    units: Units = None,
    device: str | None = None,
) -> float:
    """Draw the sheets, and the gallery unless the run has too many units for it; returns the seconds that took.

    Raises Interrupted for Ctrl-C.
    """
    start = time.perf_counter()
    number, drawn = sum(len(top) for top in run.tops.values()), None
    try:
        if number <= MAX_UNITS:
            drawn, written = draw(
                run, folder, model, project=project, units=units, crop=crop, device=device, with_sheets=True
            )
        else:
            written = sheets.render(run, folder, crop=crop)
    except OSError as error:
        raise UnitvisError(
            f"the run is complete, but its pictures could not be written into {folder}: {error.strerror or error}; fix "
            f"that, then draw them with `unitvis render`"
        ) from error
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted after the scan: the run in {folder} is complete, but not all of its pictures are drawn; draw "
            f"them with `unitvis render`",
            signal.SIGINT,
        ) from None
    print_drawn(written, drawn, number)
    return time.perf_counter() - start


def _check_picture(target: Path, endings: tuple[str, ...] = ENDINGS) -> None:
    """Raise UnitvisError, before anything is drawn, where no picture can be written to a path."""
    check_ending(target, endings)
    if not target.parent.is_dir():
        raise UnitvisError(f"there is no folder {target.parent} to write {target.name} into")
    if target.is_dir():
        raise UnitvisError(f"{target} is a folder; name a file")


def _check_replaced(target: Path, run: Run) -> None:
    """Raise UnitvisError where the picture would replace an image that the run ranked or cuts patches from."""
    if not target.exists():
        return
    try:
        source = run.source
    except UnitvisError:  # the images are gone, and drawing says so
        return
    if scanned_file(source, [target]) is not None:
        raise UnitvisError(f"{target} is one of the images that were scanned, and would be replaced; give another path")


def _width(arguments: argparse.Namespace) -> str | None:
    """The width of a page for print, checked; None for a picture for screens."""
    if arguments.width is None:
        return None if arguments.output is None or arguments.output.suffix.lower() in PICTURES else PAGE_WIDTH
    page_dots(arguments.width)
    return str(arguments.width)


def _save_picture(page: Image.Image | Page, target: Path) -> None:
    """Write a picture to a path that `_check_picture` has passed, and print its size."""
    size = f"{page.width} x {page.height} pixels"
    try:
        if isinstance(page, Page):
            page.save(target)
            wide, high = page.millimetres
            size = f"{wide:g} x {high:g} mm" + (f", {size}" if target.suffix.lower() in PICTURES else "")
        else:
            save_picture(page, target)
    except OSError as error:
        raise UnitvisError(
            f"{target} could not be written: {error.strerror or error}; make room there, or give another path"
        ) from error
    print(f"{target}: {size}")


def _sheet(arguments: argparse.Namespace) -> int:
    _check_picture(arguments.output)
    if arguments.size is not None and not 0 < arguments.size <= MAX_PATCH_SIDE:
        raise UnitvisError(f"--size is 1 to {MAX_PATCH_SIDE} pixels a patch, not {arguments.size}")
    if arguments.figure != "paper" and (arguments.model or arguments.project):
        raise UnitvisError("--model and --project are for projections, which --figure paper alone draws")
    if arguments.weights and not arguments.model:
        raise UnitvisError("--weights needs --model, the network that was scanned")
    if (width := _width(arguments)) and arguments.size:
        raise UnitvisError(
            "patches on a page for print (--width, .svg, .pdf) are as large as it allows; leave out --size"
        )
    units = parse_choice(arguments.units)
    run = load(arguments.run, arguments.images)
    _check_replaced(arguments.output, run)
    page: Image.Image | Page
    if arguments.figure:
        if arguments.size:
            raise UnitvisError("a figure has patches of one size; leave out --size")
        page = _figure(run, arguments, units, width)
    elif len(arguments.layer) > 1:
        raise UnitvisError("several layers go on one page as a figure: --figure lecture or --figure paper")
    else:
        (layer,) = arguments.layer
        chosen = units_by_layer({layer: len(run[layer])}, units).get(layer)
        if width is None:
            page = run.sheet(layer, chosen, crop=arguments.crop, size=arguments.size)
        else:
            page = run.sheet(layer, chosen, crop=arguments.crop, width=width)
    _save_picture(page, arguments.output)
    return DONE


def _overview(arguments: argparse.Namespace) -> int:
    target = arguments.output or arguments.run / "overview.png"
    width = _width(arguments)
    run = load(arguments.run, arguments.images)
    _check_picture(target)
    _check_replaced(target, run)
    page = run.overview(arguments.layer) if width is None else run.overview(arguments.layer, width=width)
    _save_picture(page, target)
    return DONE


def _excerpt(arguments: argparse.Namespace) -> int:
    if unnamed := [text for text in arguments.units if "/" not in text]:
        raise UnitvisError(f"{unnamed[0]!r} names no unit; write LAYER/UNIT, such as conv4/12 or conv4/0-8,12")
    units = parse_choice(arguments.units)
    run = load(arguments.run, arguments.images)
    _check_replaced(arguments.output, run)
    target = excerpt(run, arguments.output, units, crop=arguments.crop)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, open it in a browser or send it on")
    return DONE


def _figure(run: Run, arguments: argparse.Namespace, units: Units, width: str | None) -> Page:
    """Draw a figure; Interrupted for Ctrl-C."""
    try:
        return figure(
            run,
            arguments.layer,
            arguments.figure,
            units,
            width=width,
            crop=arguments.crop,
            model=_given_network(arguments),
            project=arguments.project or True,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: the projections of finished units are kept in {arguments.run}; the same command goes on",
            signal.SIGINT,
        ) from None


def _maps(arguments: argparse.Namespace) -> int:
    _check_picture(arguments.output, tuple(PICTURES))
    if arguments.output.exists() and Path(arguments.image).exists() and arguments.output.samefile(arguments.image):
        raise UnitvisError(f"{arguments.output} is the image itself, and would be replaced; give another path")
    units = parse_choice(arguments.units)
    loaded = _load_model(arguments)
    transform = given_transform(arguments, loaded.transform, "mean", "std")
    found = feature_maps(loaded, arguments.image, arguments.layer, transform=transform, device=arguments.device)
    chosen = units_by_layer({arguments.layer: len(found.maps)}, units).get(arguments.layer)
    _save_picture(found.page(chosen), arguments.output)
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    run = load(arguments.run, arguments.images)
    found = verify(run, _load_model(arguments).model, arguments.device)
    print_verified(found)
    return WRONG if found["wrong"] or found["differing"] else DONE


def _demo(arguments: argparse.Namespace) -> int:
    from unitvis.demo.command import demo  # imported for this command alone

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
        loaded = _load_model(arguments)
    transform = loaded.transform or Transform()
    if arguments.crop is not None:
        transform = replace(transform, crop=arguments.crop)
    print(f"{loaded.spec}: {bench(loaded.model, transform, _device(arguments), arguments.count)}")
    return DONE


def given_transform(arguments: argparse.Namespace, known: Transform | None, *more: str) -> Transform | None:
    """Replace fields of a known transform by those given on the command line; more: "mean", "std"."""
    fields = ("resize", "crop", "interpolation", *more)
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    return replace(known or Transform(), **given) if given else known


def given_reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `scan` and `pack` for reading, checkpoints, overwriting and resuming."""
    names = "on_error max_failures decoder scaled allow_truncated images_ending workers overwrite resume"
    return {name: getattr(arguments, name) for name in names.split()} | {"every": arguments.checkpoint_every}


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "layers": _layers,
    "scan": _scan,
    "merge": _merge,
    "pack": _pack,
    "render": _render,
    "sheet": _sheet,
    "overview": _overview,
    "excerpt": _excerpt,
    "maps": _maps,
    "verify": _verify,
    "bench": _bench,
}
