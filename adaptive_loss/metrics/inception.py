"""Features of the Inception network in which published FID and KID are measured: the extra ``inception``.

Its weights (91 MB) are downloaded once, into torch.hub's folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.errors import RunError

PACKAGE = "torch_fidelity"
LAYER = "2048"
"""The last pooling layer, by torch-fidelity's name: 2048 features."""
BATCH = 64


def load_inception(device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The features of FID (Heusel et al. 2017): images ``[N, 1 or 3, H, W]`` in 0 to 1 → ``[N, 2048]``.

    With them :func:`~adaptive_loss.metrics.frechet.frechet_distance` is FID, of 2049 images or more on either side, and
    :func:`~adaptive_loss.metrics.kid.kernel_distance` is KID, both as torch-fidelity computes them: images become
    bytes and are resized as TensorFlow did it. Frozen, and no gradient passes: this is for judging.

    Args:
        device: where the network lives.

    Raises:
        RunError: torch-fidelity is not installed, or the weights cannot be had.
    """
    module = _network_module()
    # As tensors alone, and checked by the hash in the file's name, which torch-fidelity does not ask for.
    load = partial(torch.hub.load_state_dict_from_url, check_hash=True, weights_only=True)
    module.load_state_dict_from_url = load  # pyright: ignore[reportAttributeAccessIssue]
    try:
        network = module.FeatureExtractorInceptionV3("inception", [LAYER]).to(device)
    except (OSError, RuntimeError) as error:
        cause, folder = " ".join(str(error).split()), Path(torch.hub.get_dir()) / "checkpoints"
        raise RunError(
            f"no Inception weights ({cause}); put the file of {module.URL_INCEPTION_V3} into {folder}"
        ) from error
    return partial(_features, network, device)


@torch.no_grad()
def _features(network: Any, device: str | torch.device, images: Tensor) -> Tensor:
    pixels = (images.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
    return torch.cat([network(part.to(device))[0] for part in pixels.split(BATCH)])


def _network_module() -> ModuleType:
    """torch-fidelity's module of this one network, past its package, which imports torchvision for others."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.submodule_search_locations is None:
        raise RunError(f"{PACKAGE} is not installed; run: pip install 'adaptive-loss[inception]'")
    whole = {name: sys.modules.pop(name) for name in _loaded()}
    front = ModuleType(PACKAGE)
    front.__path__ = list(found.submodule_search_locations)
    sys.modules[PACKAGE] = front
    try:
        return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(whole)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == PACKAGE]
