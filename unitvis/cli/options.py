"""Options of the command line: commands, arguments and options. Nothing here imports PyTorch, so help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from unitvis.choices import CHECKPOINT_SECONDS, CROPS, DECODERS, FIGURES, MODEL_FORMS, PRECISIONS, PROJECTIONS, UNITS
from unitvis.version import __version__

_SEVERAL = ("--layer", "--exclude")  # options that take one value, or several behind all arguments


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; `command` in what it parses is the name of the one that was given."""
    whole = argparse.ArgumentParser(
        prog="unitvis", description="For every unit of a ConvNet, the image patches that excite it most."
    )
    whole.add_argument("--version", action="version", version=f"unitvis {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=name)
        return sub

    def model_argument(sub: argparse.ArgumentParser, nargs: str | None = None) -> None:
        sub.add_argument("model", metavar="MODEL", nargs=nargs, help=MODEL_FORMS)
        weights_options(sub)

    def weights_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a state dict to load into it")
        sub.add_argument(
            "--no-pretrained", dest="pretrained", action="store_false", help="random weights (by name only)"
        )

    def size_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--resize", type=_size, metavar="R|HxW", help="R: the shorter side; HxW: exactly")
        sub.add_argument("--crop", type=_square, metavar="S|HxW", help="cut the centre")
        sub.add_argument("--interpolation", help="nearest, bilinear, bicubic, lanczos, box or hamming")

    def value_options(sub: argparse.ArgumentParser) -> None:
        one_or_three = "three numbers, or one for all channels (also of a network for grey images)"
        told = f"subtracted, of values in 0..1; {one_or_three}"
        sub.add_argument("--mean", type=_numbers, metavar="M [M M]", help=told)
        sub.add_argument("--std", type=_numbers, metavar="S [S S]", help=f"divided by; {one_or_three}")

    def reading_options(sub: argparse.ArgumentParser) -> None:
        size_options(sub)
        sub.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="for an unreadable image")
        sub.add_argument("--max-failures", type=int, metavar="N", help="stop when more images than N cannot be read")
        sub.add_argument("--allow-truncated", action="store_true", help="decode files that end early as far as they go")
        sub.add_argument("--decoder", choices=DECODERS, default="pillow", help="of JPEGs (pillow); may change pixels")
        sub.add_argument("--scaled", action="store_true", help="decode large JPEG files at 1/2 to 1/8; changes pixels")
        sub.add_argument(
            "--images-ending",
            action="append",
            metavar="ENDING",
            help="which files of a folder or of archives are images: .jpg, .seg.png, '' for names without an ending",
        )
        sub.add_argument(
            "--workers",
            type=int,
            metavar="N",
            help="processes that decode files (one a core; at most four a core, or 64)",
        )
        sub.add_argument(
            "--checkpoint-every",
            type=float,
            default=CHECKPOINT_SECONDS,
            metavar="SECONDS",
            help="seconds between checkpoints, the most that a kill loses (60)",
        )

    def layer_options(sub: argparse.ArgumentParser) -> None:
        several = "; several after MODEL and all IMAGES"
        sub.add_argument(
            "--layer",
            action="append",
            metavar="PATTERN",
            help=f"a name or shell pattern{several}; default: convolutions",
        )
        sub.add_argument(
            "--exclude", action="append", default=[], metavar="PATTERN", help=f"layers to leave out{several}"
        )

    def labels_option(sub: argparse.ArgumentParser, text: str) -> None:
        told = f"names of the classes, one a line or as JSON{text}"
        sub.add_argument("--labels", type=Path, metavar="FILE", help=told)

    def run_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished scan")

    def images_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--images", help="where the scanned images are now, if they moved")

    def project_option(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("--project", nargs="?", choices=PROJECTIONS, const=PROJECTIONS[0], default=False, help=text)

    def page_options(sub: argparse.ArgumentParser, told: str, *, required: bool = False) -> None:
        sub.add_argument("-o", "--output", type=Path, required=required, metavar="FILE.png|svg|pdf", help=told)
        sub.add_argument("--width", metavar="160mm", help="of a page for print (mm, cm, in); of SVG and PDF 160mm")

    def units_option(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument("--units", action="append", default=[], metavar="[LAYER/]0-8,12", help=text)

    sub = command("demo", "Draw images, scan them with the embedded network, and show what excites its units.")
    sub.add_argument("-o", "--output", type=Path, default=Path("unitvis-demo"), metavar="RUN", help="(unitvis-demo)")
    project_option(sub, "draw projections beside the patches (a minute)")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")

    sub = command("layers", "List layers that can be scanned, with their receptive fields.")
    model_argument(sub)
    layer_options(sub)
    sub.add_argument("--crop", type=_square, metavar="S|HxW", help="size of the input (the model's own, or 224)")

    sub = command("scan", "Scan images for the patches that excite every unit most, and draw them.")
    model_argument(sub)
    sub.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="a folder, a text list of paths, tar archives ('train-{000..146}.tar'), a pack, a uint8 .npy [N, H, W, 3]",
    )
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="folder to write the run into")
    layer_options(sub)
    sub.add_argument("-k", type=int, default=9, help="patches a unit (9)")
    reading_options(sub)
    value_options(sub)
    sub.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images read, and in half precision computed, at once (64, on a GPU 256); halved where memory runs out",
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    sub.add_argument("--precision", choices=PRECISIONS, default="exact")
    sub.add_argument("--unit", choices=UNITS, default="channel", help="what is ranked")
    sub.add_argument(
        "--inside", action="store_true", help="rank only positions that read no padding at the image's border"
    )
    sub.add_argument("--shard", metavar="I/N", help="scan one of N parts of the images; `unitvis merge` joins them")
    sub.add_argument("--resume", action="store_true", help="continue the interrupted scan in RUN")
    project_option(sub, "draw projections beside the patches (slow); render can do it later, of chosen units")
    labels_option(sub, ", shown at the units of the network's last layer; default: those of the weights")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")

    sub = command("merge", "Merge the runs of all shards into one, equal to a scan of all images.")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="made with scan --shard, or merged")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="folder to write the run into")
    sub.add_argument("--model", help="the model; needed unless it was torchvision:NAME or timm:NAME without --weights")
    weights_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is")
    sub.add_argument("--partial", action="store_true", help="merge although images are missing")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in RUN")
    images_option(sub)

    sub = command("pack", "Decode and resize images once, into a .npy array that many scans read.")
    sub.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="a folder, a text list of paths, or tar archives ('train-{000..146}.tar')",
    )
    sub.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.npy", help="FILE.json and FILE.npz lie beside it"
    )
    sub.add_argument("--like", metavar="MODEL", help="resize, crop and interpolation as that model's weights want them")
    reading_options(sub)
    sub.add_argument("--resume", action="store_true", help="continue the interrupted pack")
    sub.add_argument("--overwrite", action="store_true", help="replace the pack that is there")

    sub = command("render", "Draw the sheets and the gallery of a finished scan again.")
    run_argument(sub)
    images_option(sub)
    sub.add_argument("--model", help="the network, needed to draw response maps, filters and projections")
    sub.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a state dict to load into it")
    project_option(sub, "with --model: draw projections, which the run keeps; default: by the deconvnet")
    units_option(sub, "of which units projections are drawn; default: all; may be repeated with other layers")
    sub.add_argument("--crop", choices=CROPS, help="what a patch shows; default: by layer")
    labels_option(sub, ", which the run keeps")

    sub = command("sheet", "Draw one layer's units as a page of 3x3 tiles, or a figure of some layers.")
    run_argument(sub)
    sub.add_argument("layer", metavar="LAYER", nargs="+", help="with --figure also several")
    sub.add_argument("--figure", choices=FIGURES, help="nine units a layer; paper: projections beside patches")
    page_options(sub, "SVG and PDF are for print", required=True)
    units_option(sub, "which units; default: all, of a figure nine; may be repeated with other layers")
    sub.add_argument("--model", help="for --figure paper: the network, to compute projections that the run lacks")
    sub.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or a state dict to load into it")
    project_option(sub, "for --figure paper: the method; default: deconvnet")
    sub.add_argument("--crop", choices=CROPS, help="what a patch shows; default: by layer")
    sub.add_argument("--size", type=int, metavar="PIXELS", help="of one patch; default: by the number of units")
    images_option(sub)

    sub = command("overview", "Draw nine units of some layers side by side, chosen by rule: the slide for a lecture.")
    run_argument(sub)
    sub.add_argument("layer", metavar="LAYER", nargs="*", help="which; default: five of the run's, evenly spaced")
    page_options(sub, "(RUN/overview.png); SVG and PDF are for print")
    images_option(sub)

    sub = command("excerpt", "Write chosen units into one HTML file with all its pictures, to be sent on.")
    run_argument(sub)
    sub.add_argument("units", metavar="LAYER/UNIT", nargs="+", help="which units, such as conv4/12 or conv4/0-8,12")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    sub.add_argument("--crop", choices=CROPS, help="what a patch shows; default: by layer")
    images_option(sub)

    sub = command("maps", "Draw what all units of one layer respond to one image.")
    model_argument(sub)
    sub.add_argument("image", metavar="IMAGE", help="a picture")
    sub.add_argument("layer", metavar="LAYER", help="a name, see `unitvis layers`")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    units_option(sub, "which units; default: all")
    size_options(sub)
    value_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is")

    sub = command("verify", "Recompute every winner of a run; exit code 1 if one is not reproduced.")
    run_argument(sub)
    model_argument(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: where the model is")
    images_option(sub)

    sub = command("bench", "Time a scan against a naive hook and others, after checking that they agree.")
    model_argument(sub, "?")
    sub.add_argument("--count", type=int, metavar="N", help="images; default: as many as a minute allows")
    sub.add_argument("--crop", type=_square, metavar="S|HxW", help="size of the images (the model's own, or 224)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    return whole


def with_joined_values(argv: Sequence[str]) -> list[str]:
    """Arguments in which --mean, --std and --project are joined with their values: "--mean=.5,.5,.5".

    For argparse an option has a fixed number of values, or takes all that follow, paths of images too; here --mean and
    --std take up to three numbers, and --project a method if one follows, else the first.
    """
    joined, rest = [], list(argv)
    while rest:
        joined.append(rest.pop(0))
        if joined[-1] in ("--mean", "--std"):
            numbers = list(takewhile(_is_number, rest[:3]))
            if numbers:
                joined[-1] += "=" + ",".join(numbers)
                del rest[: len(numbers)]
        elif joined[-1] == "--project":
            joined[-1] += f"={rest.pop(0) if rest[:1] and rest[0] in PROJECTIONS else PROJECTIONS[0]}"
    return joined


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command. Words that follow the one of a --layer or --exclude, and are no arguments, belong to it, too."""
    whole, joined = parser(), with_joined_values(argv)
    arguments, beyond = whole.parse_known_args(joined)
    return arguments if not beyond else whole.parse_args(_with_several(joined))


def _with_several(argv: Sequence[str]) -> list[str]:
    """Arguments in which --layer and --exclude stand before each of the words that follow them."""
    several, rest = [], list(argv)
    while rest:
        several.append(rest.pop(0))
        if several[-1] in _SEVERAL:
            option = several.pop()
            words = list(takewhile(lambda word: not word.startswith("-"), rest))
            several += [f"{option}={word}" for word in words] or [option]
            del rest[: len(words)]
    return several


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(text: str) -> tuple[float, ...]:
    """Parse ".5" or ".485,.456,.406"."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(map(_is_number, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor three")
    return tuple(map(float, parts))


def _size(text: str) -> int | tuple[int, int]:
    """Parse "224" to a length in pixels, "224x256" to (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 224 or 224x256 (height x width)")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _square(text: str) -> tuple[int, int]:
    """Parse "224" to (224, 224), "224x256" to (height, width)."""
    size = _size(text)
    return size if isinstance(size, tuple) else (size, size)
