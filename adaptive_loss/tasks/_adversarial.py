"""What the adversarial tasks share: losses of both sides, and a look at whether the discriminator still teaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss.events import Event

PATIENCE = 200
"""Steps in a row after which a discriminator that does not teach counts as collapsed."""
WON, BLIND = 0.99, 1e-3


def non_saturating(fake: Tensor) -> Tensor:
    """E[softplus(−D(G(z)))] of the generator (Goodfellow et al. 2014). Logits [B] → 0-dim."""
    return F.softplus(-fake.float()).mean()


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """E[softplus(−D(x))] + E[softplus(D(G(z)))] of the discriminator (Goodfellow et al. 2014). Logits [B] → 0-dim."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½(E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]), the ½ as in taming-transformers (Lim & Ye 2017). → 0-dim."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def gradient_penalty(critic: nn.Module, real: Tensor) -> Tensor:
    """½ E‖∇ₓD(x)‖² at real data, so that its weight is R1's γ (Mescheder et al. 2018, eq. 9). [B, …] → 0-dim."""
    inputs = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(inputs).float().sum(), inputs, create_graph=True)
    return gradient.float().flatten(1).square().sum(1).mean() / 2


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """‖E f(x) − E f(G(z))‖², f the discriminator's last hidden layer (Salimans et al. 2016). [B, D] → 0-dim."""
    return (real.float().mean(0) - fake.float().mean(0)).square().sum()


def lecam(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """E(D(x) − α_F)² + E(D(x̂) − α_R)² (Tseng et al. 2021, eq. 3): logits stay near the other side's mean. → 0-dim.

    Args:
        real, fake: logits.
        anchors: [2], running means α_R of D(x) and α_F of D(x̂).
    """
    return (real - anchors[1]).square().mean() + (fake - anchors[0]).square().mean()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """What is computed meanwhile leaves no gradient at ``network``'s parameters, though it passes through them."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


class Watch:
    """Tells when a discriminator has nothing left to teach.

    It *won* a step where it put at least 99% of real and of generated examples on their side of 0, and was *blind* in
    one where its logits differ by less than 0.001 (standard deviation). It has collapsed once either held for 200 steps
    in a row, until a step in which neither holds.

    Args:
        name: of the discriminator.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps, self.in_row, self.state = 0, 0, ""

    def see(self, real: Tensor, fake: Tensor) -> None:
        """One step's logits."""
        state = _teaching(real.detach().float(), fake.detach().float())
        self.in_row = self.in_row + 1 if state and state == self.state else int(bool(state))
        self.state, self.steps = state, self.steps + 1

    @property
    def collapsed(self) -> str | None:
        """Why it counts as collapsed, in one line, or None."""
        if self.in_row < PATIENCE:
            return None
        if self.state == "won":
            return f"{self.name!r} told real from generated for {self.in_row} steps: raise its penalty or lower --lr"
        return f"{self.name!r} gave all the same score for {self.in_row} steps: lower its penalty or --lr"

    def events(self) -> list[Event]:
        """An alarm at the step at which it collapses; nothing else."""
        if self.in_row != PATIENCE:
            return []
        details = {"opponent": self.name, "state": self.state}
        return [Event(self.steps, "alarm", f"discriminator {self.collapsed}", details)]

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"steps": self.steps, "in_row": self.in_row, "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps, self.in_row, self.state = state["steps"], state["in_row"], state["state"]


def _teaching(real: Tensor, fake: Tensor) -> str:
    logits = torch.cat([real.flatten(), fake.flatten()])
    looks = torch.stack([(real > 0).float().mean(), (fake < 0).float().mean(), logits.std(correction=0)])
    of_real, of_fake, spread = looks.tolist()  # one transfer from the device, not three
    if min(of_real, of_fake) >= WON:
        return "won"
    return "blind" if spread < BLIND else ""
