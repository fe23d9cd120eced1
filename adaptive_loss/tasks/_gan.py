"""A generative adversarial network, whatever it draws."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptive_loss.events import Event
from adaptive_loss.losses import LossTerms
from adaptive_loss.models.conv_gan import ImageCritic, ImageGenerator
from adaptive_loss.models.mlp_gan import PointCritic, PointGenerator
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks._adversarial import Watch, feature_matching, frozen, gradient_penalty, logistic, non_saturating
from adaptive_loss.tasks.base import Opponent, Task

BETAS = (0.5, 0.99)
"""Adam's: less momentum than usual, since the game turns."""


class AdversarialTask(Task):
    """A generator against a ``critic``; what they are and what they draw is the subclass's.

    - ``adversarial`` (base): E[softplus(−D(G(z)))].
    - ``feature_matching``: ‖E f(x) − E f(G(z))‖² in the critic's last hidden layer.
    - ``logistic`` of the critic: E[softplus(−D(x))] + E[softplus(D(G(z)))].
    - ``r1`` of the critic: ½ E‖∇D(x)‖², so that its weight is γ.

    A running mean of the generator's weights is what is evaluated and shown. Its decay is ``decay``.

    Attributes:
        generator, critic: the two networks.
        averaged: the running mean.
    """

    terms = ("adversarial", "feature_matching")
    base = "adversarial"
    opponents = (Opponent("critic", ("logistic", "r1")),)
    objectives = ("sample_quality",)
    decay: ClassVar[float] = 0.99

    def set_up(self, generator: PointGenerator | ImageGenerator, critic: PointCritic | ImageCritic) -> None:
        """Take in the networks."""
        self.model = self.generator = generator.to(self.device)
        self.critic = critic.to(self.device)
        self.averaged = AveragedModel(self.generator, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.averaged.requires_grad_(False)
        self.latents = own_generator(self.config.seed, "latent")
        self.watch = Watch("critic")

    @abstractmethod
    def real(self, rows: Tensor) -> Tensor:
        """The training examples ``rows``, on the device, as the critic sees them."""

    def latent(self, count: int, generator: Generator) -> Tensor:
        """``count`` latent vectors from N(0, I), [count, Z]."""
        return torch.randn(count, self.generator.latent, generator=generator).to(self.device)

    def generate(self, count: int, generator: Generator) -> Tensor:
        """``count`` samples of the generator being trained; the gradient reaches it."""
        return self.generator(self.latent(count, generator))

    @torch.no_grad()
    def samples(self, count: int, purpose: str) -> Tensor:
        """``count`` samples of the averaged generator, the same latents at every call."""
        return self.averaged(self.latent(count, own_generator(self.config.seed, purpose)))

    def opponent(self, name: str) -> nn.Module:
        """The critic."""
        return self.critic

    def opponent_losses(self, name: str, rows: Tensor) -> LossTerms:
        """The critic's wanted terms."""
        real = self.real(rows)
        with torch.no_grad():
            fake = self.generate(len(rows), self.latents)
        of_real, of_fake = self.critic(real), self.critic(fake)
        self.watch.see(of_real, of_fake)
        losses = {"logistic": logistic(of_real, of_fake)}
        if "r1" in self.wanted:
            losses["r1"] = gradient_penalty(self.critic, real)
        return losses

    def losses(self, rows: Tensor) -> LossTerms:
        """The generator's wanted terms."""
        with frozen(self.critic):
            features = self.critic.features(self.generate(len(rows), self.latents))
            losses = {"adversarial": non_saturating(self.critic.classify(features))}
            if "feature_matching" in self.wanted:
                losses["feature_matching"] = feature_matching(self.critic.features(self.real(rows)), features)
        return losses

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam with little momentum, for either network."""
        return torch.optim.Adam(parameters, lr=self.config.lr, betas=BETAS)

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """Cosine decay from ``--lr`` to 0: a game does not stand still by itself."""
        return CosineAnnealingLR(optimizer, max(steps, 1))

    def after_step(self) -> list[Event]:
        """Let the average follow, and say where the critic has collapsed."""
        self.averaged.update_parameters(self.generator)
        return self.watch.events()

    @property
    def collapsed(self) -> dict[str, str]:
        """The critic, with the reason, where it has collapsed."""
        return {} if self.watch.collapsed is None else {"critic": self.watch.collapsed}

    def state_dict(self) -> dict[str, Any]:
        """The latents' generator, the average and the watch."""
        return {
            "latents": self.latents.get_state(),
            "averaged": self.averaged.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.latents.set_state(state["latents"])
        self.averaged.load_state_dict(state["averaged"])
        self.watch.load_state_dict(state["watch"])
