"""The README's Python runs as it stands there, given the names that a user would have; and links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss import probes
from adaptive_loss.tasks import tasks

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = sorted([*README.parent.glob("*.md"), *README.parent.glob("docs/**/*.md")])
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def block(word: str) -> str:
    """The one block of Python that holds ``word``."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def run(text: str, names: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``text`` as a script that finds ``names`` there already; what it leaves."""
    (folder / "readme.py").write_text(text, encoding="utf-8")
    return runpy.run_path(str(folder / "readme.py"), init_globals=names)


def test_the_loop_adapts_after_at_most_five_changed_lines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    images, labels = torch.randn(64, 8), torch.randint(4, (64,))
    names: dict[str, Any] = {
        "model": model,
        "images": images,
        "labels": labels,
        "optimizer": torch.optim.Adam(model.parameters(), 1e-2),
        "loader": [(images[i::4], labels[i::4]) for i in range(4)] * 30,
        "ce": lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        "mix": lambda batch: F.cross_entropy(model(batch[0].flip(0)), batch[1]),  # labels of other images: harmful
        "kd": lambda batch: model(batch[0]).square().mean(),
        "held_out_loss": lambda x, y: F.cross_entropy(model(x), y),
    }
    text = block("for batch in loader")
    executor = run(text, names, tmp_path)["executor"]
    assert executor.signals.step == 120
    assert executor.weights["ce"] == 1.0 and executor.weights["mix"] < 0.5
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    changed = [line for line in lines if line.endswith("# new") or "  # was: " in line]
    assert len(changed) <= 5
    assert [line.split()[0] for line in lines if line not in changed] == [
        *("for", "losses", "optimizer.zero_grad()", "loss.backward()")
    ]


def test_the_two_executors_of_a_gan_step_each_its_own_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    critic, generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), nn.Linear(4, 8)

    def r1(real: Tensor) -> Tensor:
        real = real.requires_grad_()
        (slope,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
        return slope.square().sum(1).mean()

    names: dict[str, Any] = {
        "critic": critic,
        "real": torch.randn(16, 8),
        "fake": generator(torch.randn(16, 4)),
        "critic_optimizer": torch.optim.SGD(critic.parameters(), 0.1),
        "generator_optimizer": torch.optim.SGD(generator.parameters(), 0.1),
        "hinge": lambda real, fake: F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake)).mean(),
        "r1": r1,
        "matching": lambda real, fake: (real.mean(0) - fake.mean(0)).square().mean(),
        "probe": lambda: (generator(torch.ones(16, 4)).mean(0) - 1).square().mean(),
    }
    before = [[p.clone() for p in network.parameters()] for network in (critic, generator)]
    found = run("from adaptive_loss import LossExecutor\n" + block("critic_loss"), names, tmp_path)
    for network, old in zip((critic, generator), before, strict=True):
        assert not all(torch.equal(p, q) for p, q in zip(network.parameters(), old, strict=True))
    assert found["critic_loss"].signals.step == found["generator_loss"].signals.step == 1
    assert found["generator_loss"].probe is names["probe"]


def test_the_probe_of_sample_quality_reaches_the_decoder(tmp_path: Path) -> None:
    model = nn.Module()
    model.decoder = nn.Linear(16, 28 * 28)
    names: dict[str, Any] = {"model": model, "images": torch.rand(300, 1, 28, 28), "torch": torch, "probes": probes}
    probe = run(block("sample_quality"), names, tmp_path)["probe"]
    (slope,) = torch.autograd.grad(probe(), model.decoder.bias)
    assert torch.isfinite(slope).all() and slope.any()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def test_pictures_of_samples_are_small_and_shown() -> None:
    shown = (README.parent / "docs/results/generative.md").read_text(encoding="utf-8")
    pictures = list((README.parent / "docs/samples").iterdir())
    assert len(pictures) >= 6
    for file in pictures:
        assert file.suffix == ".png" and file.stat().st_size < 150_000
        assert f"../samples/{file.name}" in shown


def test_every_task_is_named() -> None:
    (row,) = re.findall(r"`adaptive-loss train ([^`]+)`", README.read_text(encoding="utf-8"))
    assert sorted(row.split(r"\|")) == tasks.names()


def headings(page: Path) -> list[str]:
    """The anchors that a page's headings make."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]
