"""The command line. Exit codes: 0 done; 1 a check failed; 2 wrong usage or no start; 3 images skipped."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from unitvis import models, sheets
from unitvis.decoding import DECODERS
from unitvis.distributed import processes, scan_together
from unitvis.errors import Interrupted, UnitvisError
from unitvis.figures import DPI, FIGURES, figure
from unitvis.gallery import MOST_UNITS, gallery
from unitvis.merge import merge
from unitvis.nonfinite import odd_responses
from unitvis.progress import EVERY
from unitvis.recorder import Recorder
from unitvis.rescore import verify
from unitvis.run import Run, load, replacing
from unitvis.scan import PRECISIONS, scan
from unitvis.transform import Transform

DONE, WRONG, USAGE, SKIPPED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr, never a traceback."""
    arguments = _parser().parse_args(argv)
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
    with Recorder(loaded.model, arguments.layer or None) as recorder:
        recorder.prepare((3, *(size if isinstance(size, tuple) else (size, size))))
    print(f"{'layer':<28} {'channels':>8} {'map':>11} {'receptive field':>17} {'stride':>9}")
    for layer in recorder.layers:
        field = recorder.fields[layer.name]
        seen = "whole image" if field.whole_image else f"{field.size[0]} x {field.size[1]}"
        stride = f"{field.stride[0]:g} x {field.stride[1]:g}" if field.stride else "-"
        print(f"{layer.name:<28} {layer.channels:>8} {f'{layer.height} x {layer.width}':>11} {seen:>17} {stride:>9}")
        if field.note:
            print(f"  receptive field found by probing, cut at the image's border: {field.note}")
    return DONE


def _scan(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    fields = ("resize", "crop", "mean", "std", "interpolation")
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    together = processes() > 1 and arguments.shard is None
    shard = {} if together else {"shard": arguments.shard}
    run = (scan_together if together else scan)(
        loaded,
        arguments.images if len(arguments.images) > 1 else arguments.images[0],
        arguments.layer or None,
        arguments.k,
        out=arguments.output,
        transform=replace(loaded.transform or Transform(), **given) if given else loaded.transform,
        batch_size=arguments.batch_size,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        precision=arguments.precision,
        unit=arguments.unit,
        on_error=arguments.on_error,
        max_failures=arguments.max_failures,
        decoder=arguments.decoder,
        scaled=arguments.scaled,
        allow_truncated=arguments.allow_truncated,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        every=arguments.checkpoint_every,
        workers=arguments.workers,
        **shard,
    )
    if run is None:
        return DONE
    code = _done(run, arguments.output, loaded.model, arguments.device, project=arguments.project)
    return DONE if together else code  # torchrun would take any other code for a crash


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
    failures = run.manifest["failures"]
    if failures:
        print(f"{len(failures)} images could not be read and were skipped (all are listed in the manifest):")
        for failure in failures[:10]:
            print(f"  {failure['name']!r}: {failure['reason']}")  # !r: a name may hold anything


def _tell_result(run: Run) -> None:
    counts = sheets.summary(run)
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
        if units <= MOST_UNITS:
            drawn = gallery(run, folder, model, project=project, crop=crop, device=device)
    except OSError as error:
        raise UnitvisError(
            f"the run is whole, but its pictures could not be written into {folder}: {error.strerror or error}; mend "
            f"that, then draw them with `unitvis render`"
        ) from error
    print(f"{len(written)} sheets in {written[0].parent}")
    if drawn is None:
        print(f"no gallery: {units:,} units are too many ({MOST_UNITS:,} at most)")
    else:
        print(f"gallery: open {drawn} in a browser")


def _sheet(arguments: argparse.Namespace) -> int:
    target: Path = arguments.output
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UnitvisError(f"{target} must end in .png, .jpg or .webp")
    if not target.parent.is_dir():
        raise UnitvisError(f"there is no folder {target.parent} to write {target.name} into")
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


def _size(text: str) -> int | tuple[int, int]:
    """224 is a length, 224x256 height x width."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 224 or 224x256 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _square(text: str) -> tuple[int, int]:
    size = _size(text)
    return size if isinstance(size, tuple) else (size, size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unitvis", description="For every unit of a ConvNet, the image patches that excite it most."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        return sub

    def model_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", metavar="MODEL", help=models.FORMS)
        weights_options(sub)

    def weights_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a state dict to load into it")
        sub.add_argument(
            "--no-pretrained", dest="pretrained", action="store_false", help="random weights (by name only)"
        )

    def run_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished scan")

    def images_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--images", help="where the scanned images are now, if they moved")

    sub = command("demo", _demo, "Draw pictures, scan them with the embedded network, and show what its units like.")
    sub.add_argument("-o", "--output", type=Path, default=Path("unitvis-demo"), metavar="RUN", help="(unitvis-demo)")
    sub.add_argument("--project", action="store_true", help="draw deconvnet projections beside the patches (a minute)")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")

    sub = command("layers", _layers, "List layers that can be scanned, with what their neurons see.")
    model_argument(sub)
    sub.add_argument(
        "--layer", action="append", metavar="PATTERN", help="a name or shell pattern; default: convolutions"
    )
    sub.add_argument("--crop", type=_square, metavar="S|HxW", help="size of the input (the model's own, or 224)")

    sub = command("scan", _scan, "Scan images for the patches that excite every unit most, and draw them.")
    model_argument(sub)
    sub.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="a folder, a text list of paths, tar archives ('train-{000..146}.tar'), or a uint8 .npy [N, H, W, 3]",
    )
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="folder to write the run into")
    sub.add_argument(
        "--layer", action="append", metavar="PATTERN", help="a name or shell pattern; default: convolutions"
    )
    sub.add_argument("-k", type=int, default=9, help="patches a unit (9)")
    sub.add_argument("--resize", type=_size, metavar="R|HxW", help="R: the shorter side; HxW: exactly")
    sub.add_argument("--crop", type=_square, metavar="S|HxW", help="cut the centre")
    sub.add_argument("--mean", type=float, nargs=3, metavar="M", help="subtracted, of values in 0..1")
    sub.add_argument("--std", type=float, nargs=3, metavar="S", help="divided by")
    sub.add_argument("--interpolation", help="nearest, bilinear, bicubic, lanczos, box or hamming")
    sub.add_argument("--batch-size", type=int, metavar="N", help="images read at once; does not change the result")
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    sub.add_argument("--precision", choices=PRECISIONS, default="exact")
    sub.add_argument("--unit", choices=("channel", "neuron"), default="channel", help="what is ranked")
    sub.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="what an unreadable image does")
    sub.add_argument("--max-failures", type=int, metavar="N", help="stop when more images than N cannot be read")
    sub.add_argument("--allow-truncated", action="store_true", help="take what is there of files that end early")
    sub.add_argument("--decoder", choices=DECODERS, default="pillow", help="of JPEG files (pillow); changes pixels")
    sub.add_argument("--scaled", action="store_true", help="decode large JPEG files at 1/2 to 1/8; changes pixels")
    sub.add_argument("--workers", type=int, metavar="N", help="threads that decode (one a core)")
    sub.add_argument("--shard", metavar="I/N", help="scan one of N parts of the images; `unitvis merge` joins them")
    sub.add_argument("--resume", action="store_true", help="go on with the scan that was stopped in RUN")
    sub.add_argument(
        "--checkpoint-every", type=float, default=EVERY, metavar="SECONDS", help="a kill loses no more than that (60)"
    )
    sub.add_argument("--project", action="store_true", help="draw deconvnet projections beside the patches (slow)")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")

    sub = command("merge", _merge, "Make one run of the runs of all shards, as if one scan had seen all images.")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="made with scan --shard, or merged")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="folder to write the run into")
    sub.add_argument("--model", metavar="MODEL", help="the model, where it is not found as it was scanned")
    weights_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is")
    sub.add_argument("--partial", action="store_true", help="merge what is there although images are missing")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")
    images_option(sub)

    sub = command("render", _render, "Draw the sheets and the gallery of a finished scan again.")
    run_argument(sub)
    images_option(sub)
    sub.add_argument("--model", help="the network, to draw again what only it can: response maps, filters, projections")
    sub.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a state dict to load into it")
    sub.add_argument("--project", action="store_true", help="with --model: draw deconvnet projections")
    sub.add_argument("--crop", choices=("effective", "rf", "image"), help="what a patch shows; default: by layer")

    sub = command("sheet", _sheet, "Draw one layer's units as a page of 3x3 tiles, or a figure of some layers.")
    run_argument(sub)
    sub.add_argument("layer", metavar="LAYER", nargs="+", help="with --figure also several")
    sub.add_argument("--figure", choices=FIGURES, help="nine units a layer; paper: projections beside patches")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    sub.add_argument("--units", metavar="0-8,12", help="which units; default: all, of a figure nine")
    sub.add_argument("--crop", choices=("effective", "rf", "image"), help="what a patch shows; default: by layer")
    sub.add_argument("--size", type=int, metavar="PIXELS", help="of one patch; default: by the number of units")
    images_option(sub)

    sub = command("verify", _verify, "Recompute every winner of a run; exit code 1 if one does not come out again.")
    run_argument(sub)
    model_argument(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is")
    images_option(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
