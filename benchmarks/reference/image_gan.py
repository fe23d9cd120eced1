"""A plain GAN on the digits, against which `adaptive-loss train gan --quick --mode customary` is checked.

    python benchmarks/reference/image_gan.py 1 2

Data, networks and draws are the task's, the loop and the losses are not: both follow one course, to rounding, which the
game enlarges: they agree to 5% at the size of tests/test_references.py, but at twice the learning rate and 60 epochs
own_kid of seed 1 was 1.37 here and 0.90 by the task. The quick form (0.71 by the task) has not been run here.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.metrics.features import load_features
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.metrics.prdc import precision_recall_density_coverage
from adaptive_loss.models.conv_gan import ImageCritic, ImageGenerator
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, LR, GAMMA, DECAY, RIM = 60, 128, 1e-3, 0.0004, 0.99, 4
BETAS = (0.5, 0.99)


def critic_loss(critic: ImageCritic, real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss and R1."""
    of_real = critic(real.requires_grad_())
    (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
    penalty = GAMMA / 2 * gradient.square().sum((1, 2, 3)).mean()
    return F.softplus(-of_real).mean() + F.softplus(critic(fake)).mean() + penalty


def train(data: Dataset, seed: int, epochs: int = EPOCHS, batch: int = BATCH) -> dict[str, float]:
    """Kernel distance and coverage of as many samples as there are test images, in the judge's features."""
    torch.manual_seed(seed)
    images = F.pad(2 * data.train.images.float() / 255 - 1, (RIM, RIM, RIM, RIM), value=-1.0)
    generator, critic = ImageGenerator(1), ImageCritic(1)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    order, latents = own_generator(seed, "order"), own_generator(seed, "latent")
    steps = len(images) // batch
    optimizers = [torch.optim.Adam(net.parameters(), lr=LR, betas=BETAS) for net in (critic, generator)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps) for optimizer in optimizers]
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(batch)[:steps]:
            for turn in (0, 1):
                made = generator(torch.randn(batch, generator.latent, generator=latents))
                optimizers[turn].zero_grad()
                loss = F.softplus(-critic(made)).mean() if turn else critic_loss(critic, images[rows], made.detach())
                loss.backward()
                optimizers[turn].step()
                schedules[turn].step()
            average.update_parameters(generator)
    return judged(average, data, seed)


@torch.no_grad()
def judged(average: AveragedModel, data: Dataset, seed: int) -> dict[str, float]:
    """What the task measures, the rim cut off again."""
    look = load_features("digits", "judge").features
    latent = torch.randn(len(data.test), average.module.latent, generator=own_generator(seed, "samples test"))
    made = look((average(latent)[:, :, RIM:-RIM, RIM:-RIM] + 1) / 2)
    real = look(data.test.images.float() / 255)
    covered = precision_recall_density_coverage(made, real, 5)["coverage"]
    return {"own_kid": float(kernel_distance(made.double(), real.double())), "coverage": covered}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[1:] or ["1", "2"]:
        found = train(load(), int(given))
        print(f"seed {given}: own_kid {found['own_kid']:.4f}, coverage {found['coverage']:.4f}", flush=True)
