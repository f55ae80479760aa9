"""Train the three small Fashion-MNIST nets of nets.py and export them to ONNX.

    pip install torch==2.13.0 onnx        (the CPU build does)
    python models/train.py [fmnist_resnet fmnist_mbv2 fmnist_srunet] [--out DIR]

About 12 minutes of one core for all three. Seeds are fixed, but another processor or version of torch still
gives other weights and a slightly other score: let no test pin them.

In the ONNX files every BatchNormalization is a node of its own in inference form, the batch is dynamic, and
nothing is folded: they are what an optimizer should get. Exit status: 0 done, 2 wrong request.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fashion_mnist
import fetch

try:
    import nets
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
    from torch.optim.lr_scheduler import OneCycleLR
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install torch==2.13.0 onnx")

OPSET = 17
SEED = 0
WARM_UP = 0.25  # share of the steps in which the learning rate rises
LOG_EVERY = 100  # steps
EVALUATION_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one net is trained."""

    build: Callable[[], nn.Module]
    task: Literal["classify", "enlarge"]
    epochs: int
    batch: int
    top_rate: float


RECIPES = {
    "fmnist_resnet": Recipe(build=nets.fmnist_resnet, task="classify", epochs=4, batch=128, top_rate=0.2),
    "fmnist_mbv2": Recipe(build=nets.fmnist_mbv2, task="classify", epochs=3, batch=128, top_rate=0.15),
    "fmnist_srunet": Recipe(build=nets.fmnist_srunet, task="enlarge", epochs=2, batch=64, top_rate=4e-3),
}


def load(split: fashion_mnist.Split, zoo: Path) -> tuple[Tensor, Tensor]:
    """Return images, N x 1 x 28 x 28 in 0..1, and labels of a split. Raises fetch.FetchError."""
    images, labels = fashion_mnist.load_split(split, zoo)
    return torch.from_numpy(images), torch.from_numpy(labels)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum for a classifier, AdamW for super-resolution."""
    if recipe.task == "enlarge":
        return torch.optim.AdamW(model.parameters(), lr=recipe.top_rate)
    return torch.optim.SGD(model.parameters(), lr=recipe.top_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def loss_of(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor) -> Tensor:
    """Loss of one batch: smoothed cross entropy of a class, or mean absolute error of an enlarged image."""
    if recipe.task == "enlarge":
        return functional.l1_loss(model(functional.avg_pool2d(images, 2)), images)
    if torch.rand(()) < 0.5:
        images = images.flip(3)
    return functional.cross_entropy(model(images), labels, label_smoothing=0.05)


def train(recipe: Recipe, images: Tensor, labels: Tensor) -> nn.Module:
    """Return a trained model in evaluation mode; images are N x 1 x 28 x 28 in 0..1."""
    torch.manual_seed(SEED)
    model = recipe.build().train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = make_optimizer(model, recipe)
    steps = recipe.epochs * (len(images) // recipe.batch)
    schedule = OneCycleLR(optimizer, recipe.top_rate, total_steps=steps, pct_start=WARM_UP)
    step = 0
    started = time.monotonic()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))[: steps // recipe.epochs * recipe.batch]
        for chosen in torch.split(order, recipe.batch):
            batch = images[chosen].contiguous(memory_format=torch.channels_last)
            loss = loss_of(model, recipe, batch, labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
            if step % LOG_EVERY == 0:
                print(f"  step {step}/{steps} loss {loss:.4f} {time.monotonic() - started:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stub lacks it
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor) -> str:
    """Top-1 or mean PSNR (dB) on the test images, in words."""
    total = 0.0
    batches = (torch.split(values, EVALUATION_BATCH) for values in (images, labels))
    for large, truth in zip(*batches, strict=True):
        if recipe.task == "classify":
            total += (model(large).argmax(1) == truth).sum().item()
        else:
            enlarged = model(functional.avg_pool2d(large, 2)).clamp(0, 1)
            total += (-10 * torch.log10((enlarged - large).square().mean((1, 2, 3)) + 1e-12)).sum().item()
    mean = total / len(images)
    return f"top-1 {mean:.4f}" if recipe.task == "classify" else f"PSNR {mean:.3f} dB"


def export(model: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write the ONNX file, whole or not at all.

    The mode PRESERVE stops the exporter from folding the BatchNormalization of a model in evaluation mode.
    """
    side = fashion_mnist.SIDE // (2 if recipe.task == "enlarge" else 1)
    partial = path.with_name(path.name + ".partial")
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, side, side),),
        str(partial),
        dynamo=False,
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
    )
    partial.replace(path)


def main() -> None:
    """Train, export and score what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of " + ", ".join(RECIPES))
    parser.add_argument("--out", type=Path, default=fashion_mnist.HERE, help="default: beside this file")
    parser.add_argument("--zoo", type=Path, default=fetch.ZOO, help="default: models/zoo")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in RECIPES]:
        parser.error(f"no net {', '.join(unknown)}; there are: {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        training, test = load("train", arguments.zoo), load("t10k", arguments.zoo)
    except fetch.FetchError as error:
        parser.error(f"no data: {error}")
    for name in arguments.names or RECIPES:
        recipe = RECIPES[name]
        print(f"{name}: {recipe.epochs} epochs", flush=True)
        model = train(recipe, *training)
        export(model, recipe, arguments.out / f"{name}.onnx")
        print(f"{name}: {score(model, recipe, *test)} of {len(test[0])} test images", flush=True)


if __name__ == "__main__":
    main()
