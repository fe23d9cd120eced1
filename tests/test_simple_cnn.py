"""The small classifier: its size, its two-part forward pass, and the trick it uses for speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from adaptive_loss.models import models
from adaptive_loss.models.simple_cnn import SimpleCNN


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_parameters_at_cifar_size() -> None:
    # 3·24·9 + 24·48·9 + 48·96·9 convolutions, 2·(24 + 48 + 96) normalisation, 1536·200 + 200 and 200·10 + 10 linear.
    assert sum(p.numel() for p in models.get("simple_cnn")().parameters()) == 362_234


@pytest.mark.parametrize("size", [8, 9, 14, 28, 32])
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 10)])
def test_any_image_from_8_pixels(size: int, channels: int, classes: int) -> None:
    model = SimpleCNN(image_size=size, in_channels=channels, num_classes=classes)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("bad", [{"image_size": 7}, {"in_channels": 0}, {"num_classes": 0}])
def test_sizes_that_cannot_be(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        SimpleCNN(**bad)  # pyright: ignore[reportArgumentType]


def test_images_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected images \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
        SimpleCNN(image_size=8, in_channels=1)(torch.zeros(2, 3, 8, 8))


def test_forward_is_classify_of_features() -> None:
    model = SimpleCNN(image_size=8).eval()
    images = torch.randn(3, 3, 8, 8)
    features = model.features(images)
    assert features.shape == (3, 200) and (features >= 0).all()
    assert torch.equal(model(images), model.classify(features))


def test_dropout_is_after_the_features() -> None:
    model = SimpleCNN(image_size=8, dropout=0.3).train()
    features = torch.ones(2, 200)
    assert not torch.equal(model.classify(features), model.classify(features))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.features(images), model.features(images))
    assert torch.equal(*(SimpleCNN(image_size=8, dropout=0.0).classify(features).chunk(2)))


def test_seeded_by_the_global_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in SimpleCNN(image_size=8).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_pooling_before_relu_equals_relu_before_pooling() -> None:
    torch.manual_seed(0)
    model = SimpleCNN(image_size=8).double()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for order in ((2, 3), (3, 2)):
        model.zero_grad()
        x = images
        for block in model.blocks:
            assert isinstance(block, nn.Sequential)
            x = block[order[1]](block[order[0]](block[1](block[0](x))))
        x.square().sum().backward()
        gradients.append([x.detach()] + [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None])
    assert len(gradients[0]) > 1
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_it_learns_a_small_batch() -> None:
    torch.manual_seed(0)
    model, labels = SimpleCNN(image_size=8, in_channels=1), torch.arange(20) % 10
    images = torch.randn(20, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.9
