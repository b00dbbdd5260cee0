"""Networks of one input channel, from image files to patches, projections, checks and packs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import unitvis
from support import brute
from support.commands import call
from unitvis import UnitvisError, cli
from unitvis.network.inputs import input_channels
from unitvis.scanning.verify import verify

COUNT, SIDE, K = 40, 24, 3
LAYERS = ["0", "2"]
NET = """
import torch
from torch import nn

def net(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
"""
SMALL = unitvis.Transform(resize=(SIDE, SIDE), mean=0.5, std=0.25)


def net(channels: int = 1) -> nn.Sequential:
    space: dict[str, object] = {}
    exec(NET, space)  # noqa: S102
    return space["net"](channels)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures in colour; every fourth is grey in its file."""
    (tmp_path / "pictures").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 36, 3), np.uint8)
        picture = Image.fromarray(pixels if number % 4 else pixels[..., 0])
        picture.save(tmp_path / "pictures" / f"{number:02}.png")
    return tmp_path / "pictures"


def model_inputs(folder: Path) -> Tensor:
    """float32 [COUNT, 1, SIDE, SIDE]: resized and made grey by Pillow, then normalised."""
    grey = [
        np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("L"))
        for path in sorted(folder.iterdir())
    ]
    pixels = torch.from_numpy(np.stack(grey))[:, None].float()
    return (pixels / torch.tensor(255.0) - 0.5) / 0.25


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_grey_networks_rank_files_as_brute_force_does(pictures: Path, tmp_path: Path, precision: str) -> None:
    run = unitvis.scan(net(), pictures, LAYERS, K, transform=SMALL, precision=precision, progress=False)
    inputs = model_inputs(pictures)
    responses = brute.responses(net(), LAYERS, inputs, brute.canonical_batches(inputs))
    for layer, (values, _) in responses.items():
        order = np.argsort(-values, axis=0, kind="stable")[:K]
        assert (run[layer].images == order.T).all()
        assert (run[layer].values == np.take_along_axis(values, order, 0).T).all()
    assert run.manifest["input"] == [1, SIDE, SIDE]
    assert verify(run, net())["equal"] == 11 * K

    packed = unitvis.pack(pictures, tmp_path / "x.npy", unitvis.Transform(resize=(SIDE, SIDE)), progress=False)
    assert packed._rows._array.shape == (COUNT, SIDE, SIDE, 3)  # any network can read it
    of_pack = unitvis.scan(
        net(), tmp_path / "x.npy", LAYERS, K, transform=unitvis.Transform(mean=0.5, std=0.25), progress=False
    )
    for layer in LAYERS:
        assert run[layer].values.tobytes() == of_pack[layer].values.tobytes()
        assert (run[layer].images == of_pack[layer].images).all()


def test_what_is_drawn_of_a_grey_network_is_grey(pictures: Path) -> None:
    run = unitvis.scan(net(), pictures, LAYERS, K, transform=SMALL, progress=False)
    patch = np.asarray(run.patch("2", 0, 0, crop="image", size=48))
    picture = Image.open(pictures / run.records[int(run["2"].images[0, 0])]["name"]).convert("L").convert("RGB")
    assert (patch == np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC))).all()
    for projection in unitvis.project(net(), run, "2", 0):
        assert projection.signal.shape == (1, SIDE, SIDE)
        assert projection.picture().size == (96, 96)
    colours = pictures / "01.png"
    shown = unitvis.response_map(net(), colours, "2", 3, transform=SMALL)
    inputs = model_inputs(pictures)[1:2]
    assert np.abs(shown.map - net()(inputs)[0, 3].detach().numpy()).max() < 1e-5
    drawn = np.asarray(shown.image)
    assert (drawn[..., 0] == drawn[..., 1]).all()
    (projection,) = unitvis.project(net(), [Image.open(colours)], "0", 1, transform=SMALL)
    assert projection.signal.shape == (1, SIDE, SIDE)


def test_grey_networks_on_the_command_line(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(NET)
    model, out = f"{tmp_path / 'nets.py'}:net", tmp_path / "run"
    code, printed, _ = call(capsys, "layers", model, "--crop", SIDE)
    assert code == cli.DONE
    assert printed.splitlines()[1].split()[:3] == ["0", "Conv2d", "6"]
    numbers = ["--mean", 0.5, "--std", 0.25]
    code, printed, _ = call(capsys, "scan", "--resize", "24x24", *numbers, model, pictures, "-o", out, "--project")
    assert code == cli.DONE
    assert "input: 24 x 24 pixels, grey, pixels / 255, mean 0.5, std 0.25\n" in printed
    assert call(capsys, "verify", out, model)[0] == cli.DONE
    assert call(capsys, "render", out, "--model", model, "--project")[0] == cli.DONE
    code, printed, _ = call(capsys, "bench", model, "--crop", SIDE, "--count", 20)
    assert code == cli.DONE
    three = ["--mean", 0.5, 0.5, 0.5]
    code, _, error = call(capsys, "scan", model, pictures, "-o", tmp_path / "b", "--resize", "24x24", *three)
    assert code == cli.USAGE
    assert "the model takes images of one channel (grey), and mean has three numbers; give one: mean=0.5" in error
    assert call(capsys, "scan", model, pictures, "-o", tmp_path / "b", "--mean", 0.5, 0.5)[0] == cli.USAGE


def test_one_number_stands_for_all_colours(pictures: Path) -> None:
    one, three = (
        unitvis.scan(net(3), pictures, LAYERS, K, transform=transform, progress=False)
        for transform in (SMALL, unitvis.Transform((SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3))
    )
    assert all(one[layer].values.tobytes() == three[layer].values.tobytes() for layer in LAYERS)


class GreyInside(nn.Module):
    """Takes colours, though its first convolution has one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        red, green, blue = x.unbind(1)
        return self.conv(0.3 * red[:, None] + 0.6 * green[:, None] + 0.1 * blue[:, None])


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (net(3), 3),
        (net(1), 1),
        (net(5), 5),
        (GreyInside(), 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 3)), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)), 3),
    ],
)
def test_the_number_of_input_channels_is_found(model: nn.Module, channels: int) -> None:
    assert input_channels(model.eval(), SIDE, SIDE, torch.device("cpu")) == channels


def test_pictures_cannot_have_five_channels(pictures: Path) -> None:
    with pytest.raises(UnitvisError, match="takes images of 5 channels, and pictures have 3, or 1 where they are grey"):
        unitvis.scan(net(5), pictures, LAYERS, K, transform=SMALL, progress=False)


def test_a_short_last_axis_is_a_width_where_the_network_says_so() -> None:
    torch.manual_seed(0)
    signals = torch.randn(20, 11, 60, 1)
    model = nn.Sequential(nn.Conv2d(11, 4, (5, 1)), nn.ReLU(), nn.Conv2d(4, 3, (3, 1))).eval()
    responses = brute.responses(model, LAYERS, signals, brute.canonical_batches(signals))
    with unitvis.Recorder(model, LAYERS, K) as recorder:
        recorder(signals)
    for run in (unitvis.scan(model, signals, LAYERS, K, progress=False), recorder.result()):
        for layer, (values, positions) in responses.items():
            order = np.argsort(-values, axis=0, kind="stable")[:K]
            assert (run[layer].images == order.T).all()
            assert (run[layer].positions[..., 0] == np.take_along_axis(positions, order, 0).T).all()


class ChannelsLast(nn.Module):
    """Takes images [N, H, W, 3], as no other network here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize("model", [ChannelsLast(), net(3), net(1)], ids=["channels last", "colours", "grey"])
@pytest.mark.parametrize("channels", [1, 3])
def test_floats_with_their_channels_last_are_refused(model: nn.Module, channels: int) -> None:
    floats = torch.randn(16, 28, 32, channels)
    message = (
        rf"images of shape \[28, 32, {channels}\] seem to have their channels last; normalised float \[N, C, H, W\]"
    )
    for images in (floats, list(floats), iter([floats])):
        with pytest.raises(UnitvisError, match=message):
            unitvis.scan(model.eval(), images, progress=False)
    with unitvis.Recorder(model.eval()) as recorder, pytest.raises(UnitvisError, match=message):
        recorder(floats)
