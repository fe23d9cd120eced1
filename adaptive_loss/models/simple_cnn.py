"""A small convolutional classifier: quick on a CPU, and large enough that wrong loss weights show."""

from __future__ import annotations

from torch import Tensor, nn

from adaptive_loss.models import models

CHANNELS = (24, 48, 96)
WIDTH = 200
SMALLEST_IMAGE = 2 ** len(CHANNELS)


@models.register("simple_cnn")
class SimpleCNN(nn.Module):
    """Three convolution blocks and a hidden layer: 362,234 parameters for 3×32×32 images and 10 classes.

    Weights are drawn from PyTorch's global generator; seed it first for a repeatable start.

    Args:
        image_size: height and width of the images, in pixels, 8 or more.
        in_channels: 3 for colour, 1 for grey.
        num_classes: number of classes.
        dropout: share of hidden features dropped while training.

    Raises:
        ValueError: the image is smaller than 8×8, or another size is one that cannot be.

    Example:
        >>> import torch
        >>> model = SimpleCNN(image_size=8, in_channels=1)
        >>> features = model.features(torch.zeros(4, 1, 8, 8))
        >>> features.shape, model.classify(features).shape
        (torch.Size([4, 200]), torch.Size([4, 10]))
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, num_classes: int = 10, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise ValueError(f"image_size must be at least {SMALLEST_IMAGE}, not {image_size}")
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels and num_classes must be at least 1, not {in_channels} and {num_classes}")
        self.image_shape = (in_channels, image_size, image_size)
        inputs = (in_channels, *CHANNELS[:-1])
        self.blocks = nn.Sequential(*(_block(i, o) for i, o in zip(inputs, CHANNELS, strict=True)))
        side = image_size // SMALLEST_IMAGE
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS[-1] * side * side, WIDTH), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """Hidden features ``[B, 200]``, 0 or more, before dropout, of float images ``[B, C, H, W]``.

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"expected images [B, {', '.join(map(str, self.image_shape))}], got {list(images.shape)}")
        return self.hidden(self.blocks(images))

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[B, classes]`` from :meth:`features`, so that a loss on features costs no second pass."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.classify(self.features(images))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    # ReLU is monotone, so it commutes with the maximum, values and gradients alike; pooling first leaves it a
    # quarter of the pixels. The convolution has no bias because the normalisation would subtract it again.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
    )
