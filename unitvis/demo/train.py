"""Training of the demo's network: `python -m unitvis.demo.train`, 10 to 25 minutes on two cores.

The training, the held-out and the demo's own pictures are series of different seeds.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unitvis.demo.network import LAYERS, MEAN, STD, WEIGHTS, build
from unitvis.demo.pictures import pictures

TRAINING_SEED, HELD_OUT_SEED = 1, 2
MAX_SHIFT = 8  # pixels by which augmentation moves a picture


def prepare(images: Tensor) -> Tensor:
    """Normalise images, uint8 [N, H, W, 3], to the network's input, float32 [N, 3, H, W]."""
    return (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift and mirror images, and permute their colour channels, at random: uint8 [N, H, W, 3]."""
    n, size = len(images), images.shape[1]
    dy, dx = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, n, 1), generator=random)
    grid = torch.arange(size)
    rows, columns = [(grid + d).abs() for d in (dy, dx)]  # [N, size], mirrored at the border
    rows, columns = [size - 1 - (size - 1 - index).abs() for index in (rows, columns)]
    columns = torch.where(torch.rand(n, 1, generator=random) < 0.5, columns, columns.flip(1))
    channels = torch.rand(n, 3, generator=random).argsort(1)
    swap = torch.rand(n, 1, generator=random) < 0.5
    channels = torch.where(swap, channels, torch.arange(3))
    picture = torch.arange(n)[:, None, None, None]
    return images[picture, rows[:, :, None, None], columns[:, None, :, None], channels[:, None, None, :]]


def smooth_start(network: nn.Sequential) -> None:
    """Blur the first layer's random filters, so that those which training hardly changes show no noise."""
    weight = next(network.parameters())
    kernel = torch.tensor([1.0, 4, 6, 4, 1])
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 5, 5)
    window = torch.hann_window(9)[1:-1]
    with torch.no_grad():
        smooth = F.conv2d(weight, kernel, padding=2, groups=3) * window[:, None] * window
        weight.copy_(smooth * (weight.std() / smooth.std()))


def fold(trained: nn.Sequential) -> nn.Sequential:
    """Fold batch normalisation into the convolutions; returns a network that computes the same, in eval mode."""
    plain = build()
    state = trained.state_dict()
    for name in LAYERS:
        norm = name.replace("conv", "norm")
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        state[f"{name}.weight"] = state[f"{name}.weight"] * scale[:, None, None, None]
        state[f"{name}.bias"] = (state[f"{name}.bias"] - state[f"{norm}.running_mean"]) * scale + state[f"{norm}.bias"]
    plain.load_state_dict({name: state[name].contiguous() for name in plain.state_dict()})
    return plain.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of pictures, uint8 [N, H, W, 3], that the network classifies correctly."""
    right = 0
    for i in range(0, len(images), 64):
        right += int((network(prepare(images[i : i + 64])).argmax(1) == labels[i : i + 64]).sum())
    return right / len(images)


def train(images: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 64) -> nn.Sequential:
    """Train by stochastic gradient descent with a one-cycle schedule; returns the folded network."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    network = build(normalise=True).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    smooth_start(network)
    first, *deeper = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim == 1]
    decay = ((first, 3e-3), (deeper, 1e-3), (rest, 0.0))  # with more decay the first layer's filters come out smoother
    groups = [{"params": parameters, "weight_decay": rate} for parameters, rate in decay]
    optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.06, epochs * steps, pct_start=0.15)
    started = time.perf_counter()
    for epoch in range(epochs):
        order, total = torch.randperm(len(images), generator=random), 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            inputs = prepare(augment(images[chosen], random)).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(inputs), labels[chosen])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / steps:.3f}  {time.perf_counter() - started:.0f} s", flush=True
        )
    return fold(network)


def train_last_layers(
    network: nn.Sequential, images: Tensor, labels: Tensor, seed: int, epochs: int = 3, batch: int = 64
) -> None:
    """Train the last convolution and the classifier alone, with classifier weights of at least 0 under an L1 penalty.

    Each unit then votes for few classes and against none, so that its nine pictures show the classes it stands for.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    modules = dict(network.named_children())
    last, classifier = modules["conv5"], modules["classify"]
    lower_layers = network[: list(modules).index("conv5")]
    with torch.inference_mode():
        chunks = (augment(images[i : i + batch], random) for i in range(0, len(images), batch))
        features = torch.cat([lower_layers(prepare(chunk)).half() for chunk in chunks])  # [N, 128, 12, 12], some 0.4 GB
    weight = next(classifier.parameters())
    optimiser = torch.optim.AdamW([*last.parameters(), *classifier.parameters()], 3e-3, weight_decay=1e-2)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, epochs * steps, pct_start=0.1)
    for epoch in range(epochs):
        order, total = torch.randperm(len(images), generator=random), 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            largest = last(features[chosen].float()).relu().amax((2, 3))  # [N, units]
            loss = F.cross_entropy(classifier(F.dropout(largest, 0.4)), labels[chosen]) + 4e-3 * weight.abs().sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                weight.clamp_(min=0)
            total += loss.item()
        print(f"last layers {epoch + 1}/{epochs}  loss {total / steps:.3f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: draw the pictures, train, measure the accuracy, write the weights and the record."""
    parser = argparse.ArgumentParser(prog="python -m unitvis.demo.train", description=__doc__)
    parser.add_argument("--pictures", type=int, default=12000, help="training pictures")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of the pictures")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    images, labels = [torch.from_numpy(array) for array in pictures(options.pictures, TRAINING_SEED)]
    print(f"drew {len(images)} pictures in {time.perf_counter() - started:.0f} s", flush=True)
    network = train(images, labels, options.epochs, options.seed)
    train_last_layers(network, images, labels, options.seed)
    held_out = [torch.from_numpy(array) for array in pictures(3000, HELD_OUT_SEED)]
    record: dict[str, Any] = {
        "accuracy": round(accuracy(network, *held_out), 4),
        "held_out": {"seed": HELD_OUT_SEED, "pictures": len(held_out[0])},
        "training": {"seed": TRAINING_SEED, "pictures": len(images), "epochs": options.epochs},
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "pillow": PIL.__version__,
        },
    }  # fmt: skip
    save_file(network.state_dict(), options.output)
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
