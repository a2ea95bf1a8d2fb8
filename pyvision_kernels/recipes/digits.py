"""`python -m pyvision_kernels.recipes.digits`: a small model learns handwritten digits, stock and ours in step.

The data are the 1,797 pictures of 8 x 8 that scikit-learn ships (from Alpaydin and Kaynak, Optical recognition of
handwritten digits, UCI, 1998), upsampled to 3 x 24 x 24. The model is the reference CNN, or a transformer over patches
(`--model attention`). Two copies of it, one of them converted, see the same batches; nothing but the kernels differs:
those of the converted one are ours throughout, as of `pvk.backend("pvk")`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyvision_kernels as pvk

STEPS = 200
BATCH = 64
LABEL_SMOOTHING = 0.1
TEST_SET = 360
WIDEST = 0.01  # relative difference of the losses of a step


@dataclass(frozen=True)
class Lesson:
    """A model, how Adam teaches it, and what it is to learn.

    Differences of rounding grow with every step. An eps that keeps Adam from steps along gradients of nearly 0, and
    a loss that stays away from 0, keep them far below what is compared.
    """

    make: Callable[[], nn.Module]
    learning_rate: float
    eps: float
    least_accuracy: float


LESSONS = {
    "cnn": Lesson(pvk.models.CNN, 3e-3, 4e-3, 0.98),
    "attention": Lesson(pvk.models.PatchClassifier, 5e-3, 3e-4, 0.97),
}


@dataclass(frozen=True)
class Digits:
    """Pictures [N, 3, 24, 24] of mean 0 and deviation 1, and labels [N], apart for training and testing."""

    pictures: Tensor
    labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """What both models did.

    Attributes:
        stock, ours: The loss at each step.
        stock_accuracy, our_accuracy: Of the test pictures, in 0..1.
        kernels: Operators of ours that the profiler saw in a step of the converted model, forward and backward, and
            how often.
    """

    stock: list[float]
    ours: list[float]
    stock_accuracy: float
    our_accuracy: float
    kernels: dict[str, int]

    @property
    def widest(self) -> float:
        """The largest relative difference of the losses of a step."""
        return max(abs(mine - theirs) / theirs for mine, theirs in zip(self.ours, self.stock, strict=True))


def load() -> Digits:
    """The digits, upsampled, in a fixed split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)  # [N, 8, 8]
    pictures = F.interpolate(small[:, None], size=(24, 24), mode="bilinear", align_corners=False)
    pictures = ((pictures - pictures.mean()) / pictures.std()).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SET], order[TEST_SET:]
    return Digits(pictures[train], labels[train], pictures[test], labels[test])


class Training:
    """A model and its optimiser."""

    def __init__(self, model: nn.Module, lesson: Lesson, steps: int) -> None:
        self.model = model.train()
        self.optimiser = torch.optim.Adam(model.parameters(), lesson.learning_rate, eps=lesson.eps)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, lesson.learning_rate, total_steps=steps, cycle_momentum=False
        )

    def step(self, pictures: Tensor, labels: Tensor) -> float:
        """One step; the loss before it."""
        loss = F.cross_entropy(self.model(pictures), labels, label_smoothing=LABEL_SMOOTHING)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.item()

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            right = self.model(pictures).argmax(1) == labels
        self.model.train()
        return right.float().mean().item()


def kernels_of(call: Callable[[], object]) -> dict[str, int]:
    """Operators of ours that run within a call, and how often."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("pvk::")}


@pvk.backend("pvk")  # "auto" would take PyTorch's attention for so few tokens
def train(
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, float, float], None] | None = None,
    model: str = "cnn",
) -> Outcome:
    """Trains a stock model and its converted copy side by side.

    Args:
        steps (int): Batches of 64. Default: 200.
        seed (int): Of weights and batches. Default: 0.
        device (str): Default: "cpu".
        report (callable): Called after each step with its number and both losses.
        model (str): "cnn" or "attention". Default: "cnn".
    """
    data, lesson = load(), LESSONS[model]
    pictures, labels = data.pictures.to(device), data.labels.to(device)
    test = data.test_pictures.to(device), data.test_labels.to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = lesson.make().to(device)
    stock = Training(made, lesson, steps)
    ours = Training(pvk.convert(copy.deepcopy(made)), lesson, steps)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(epochs)])
    losses: tuple[list[float], list[float]] = ([], [])
    for number, chosen in enumerate(order[: steps * BATCH].split(BATCH)):
        batch = pictures[chosen], labels[chosen]
        for training, values in zip((stock, ours), losses, strict=True):
            values.append(training.step(*batch))
        if report is not None:
            report(number, losses[0][-1], losses[1][-1])
    kernels = kernels_of(lambda: F.cross_entropy(ours.model(batch[0]), batch[1]).backward())
    return Outcome(*losses, stock.accuracy(*test), ours.accuracy(*test), kernels)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyvision_kernels.recipes.digits", description=__doc__)
    parser.add_argument("--model", choices=list(LESSONS), default="cnn")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)

    def report(number: int, stock: float, ours: float) -> None:
        if number % 20 == 0 or number == options.steps - 1:
            print(f"step {number:4d}: loss {stock:.5f} stock, {ours:.5f} ours ({ours / stock - 1:+.1e})")

    try:
        outcome = train(options.steps, options.seed, options.device, report, options.model)
    except ModuleNotFoundError as error:
        print(f"the digits are scikit-learn's, which is missing ({error}): pip install scikit-learn")
        return 1
    print(f"test accuracy: {outcome.stock_accuracy:.2%} stock, {outcome.our_accuracy:.2%} ours")
    print(f"widest difference of the losses of a step: {outcome.widest:.1e}")
    print("our operators in a step: " + (", ".join(outcome.kernels) or "none"))
    agreed = outcome.widest <= WIDEST and bool(outcome.kernels)
    learnt = (
        options.steps < STEPS
        or min(outcome.stock_accuracy, outcome.our_accuracy) >= LESSONS[options.model].least_accuracy
    )
    return 0 if agreed and learnt else 1


if __name__ == "__main__":
    sys.exit(main())
