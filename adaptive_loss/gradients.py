"""Gradients of terms, their Gramian in the optimizer's metric, and the look-ahead made from it.

Nothing here writes ``.grad``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from adaptive_loss.parallel import Group, is_split, is_whole, mean_gradients, size_of, summed

Gradient = Sequence[Tensor | None]
"""One tensor a parameter; None where the parameter does not take part."""

_CANCELLED = 1e-12
"""⟨G, PG⟩ below this part of (Σᵢ‖vᵢ‖_P)² is rounding noise of float32 products: the terms cancel, and G is none."""
_TINY = 1e-300


def leaves(root: Tensor) -> list[Tensor]:
    """The leaf tensors that require gradients in the graph of ``root``, in a fixed order."""
    found: list[Tensor] = []
    stack, seen = [root.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def term_gradients(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Gradient]:
    """One vector–Jacobian product a loss on the live graph, which is kept for the user's own backward."""
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[part.to_dense() if part is not None and part.is_sparse else part for part in parts] for parts in found]


def gradients_where_there(losses: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Gradient]:
    """One gradient a loss, all None where the loss is."""
    nothing: Gradient = [None] * len(parameters)
    found = iter(term_gradients([loss for loss in losses if loss is not None], parameters))
    return [nothing if loss is None else next(found) for loss in losses]


def preconditioner(optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> list[Tensor | float]:
    """P, the diagonal by which the optimizer scales a gradient, one tensor (or 1.0) a parameter.

    1 for SGD and unknown optimizers; 1/(√v̂ + ε) for those that keep a second moment, v̂ bias-corrected for the Adam
    family. A parameter without state yet counts as 1. Where learning rates differ between parameters, P carries them,
    as parts of the greatest one.
    """
    if optimizer is None:
        return [1.0] * len(parameters)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    mine = [groups.get(id(p), {}) for p in parameters]
    rates = [float(group.get("lr", 1.0)) for group in mine]
    top = max(rates, default=0.0)
    parts = [rate / top if top > 0 else 1.0 for rate in rates]
    return [_diagonal(optimizer.state.get(p, {}), g) * part for p, g, part in zip(parameters, mine, parts, strict=True)]


def _diagonal(state: dict, group: dict) -> Tensor | float:
    eps = float(group.get("eps", 1e-8))
    if "exp_avg_sq" in state:
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / correction
    elif "square_avg" in state:
        second = state["square_avg"]
    elif "sum" in state:
        second = state["sum"]
    else:
        return 1.0
    return 1 / (second.sqrt() + eps)


def gramian(gradients: Sequence[Gradient], metric: Sequence[Tensor | float]) -> Tensor:
    """A = V P Vᵀ, the inner products of V's rows (one gradient each) under the diagonal metric P.

    Args:
        gradients: n gradients over the same parameters; a missing part counts as zero.
        metric: P, one tensor or number a parameter.

    Returns:
        [n, n] float64 on the CPU; products are taken in float32 (float64 where the gradients are) and summed
            over parameters in float64.
    """
    parts = zip(zip(*gradients, strict=True), metric, strict=True)
    found = [products for rows, scale in parts if (products := _products(rows, scale)) is not None]
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    if not found:
        return total
    # One transfer to the host, whatever the number of parameters.
    for products in torch.stack([part.to(found[0].device) for part in found]).to("cpu", torch.float64):
        size = products[:, -1]
        total += products[:, :-1] * size * size[:, None]
    return (total + total.T) / 2


def _products(parts: Gradient, scale: Tensor | float) -> Tensor | None:
    """[n, n+1] inner products of n rows over one parameter, each row divided by its size, and the sizes; None for none.

    A row's size is a power of two near its greatest entry. The division by it is exact, so nothing changes but that
    products of tiny or huge gradients stay in float32's range.
    """
    known = next((part for part in parts if part is not None), None)
    if known is None or not known.numel():
        return None
    rows = torch.stack([torch.zeros_like(known) if part is None else part for part in parts])
    rows = rows.reshape(len(rows), -1).to(torch.promote_types(rows.dtype, torch.float32))
    exponents = torch.frexp(rows.abs().amax(1)).exponent.clamp(-126, 126)
    rows = torch.ldexp(rows, -exponents[:, None])
    products = (rows * (scale.flatten() if isinstance(scale, Tensor) else scale)) @ rows.T
    return torch.cat([products, torch.ldexp(torch.ones_like(products[:, :1]), exponents[:, None])], dim=1)


class TermGradients:
    """Gradients of K scaled terms at a tap: nothing is computed before it is asked for, and nothing twice.

    A tap is the output tensor, shared features or some parameters; at features the products cost one pass through the
    heads a term and keep K tensors of the features' size. Products are taken in float32 (float64 where the gradients
    are); ``.grad`` is never written. Between ranks they are the gradients of the terms' means over all ranks: at
    parameters the means of the ranks' gradients, at other tensors, of which each rank has its part of the batch, what
    one process would find at all parts together.

    Args:
        losses: K live terms, None where absent or off.
        scale: [K] factor of each term.
        at: the tensors to differentiate with respect to.
        group: the ranks that train together.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> found = TermGradients([(w**2).sum() / 2, w.sum()], torch.tensor([1.0, 2.0]), [w])
        >>> found.norms.tolist(), found.gramian[0, 1].item()
        ([5.0, 2.8284271247461903], 14.0)
    """

    def __init__(
        self, losses: Sequence[Tensor | None], scale: Tensor, at: Sequence[Tensor], group: Group = None
    ) -> None:
        self.losses, self.scale, self.at, self.group = losses, scale, at, group
        self.shares = [1 / size_of(group) if is_whole(tensor) else 1.0 for tensor in at]
        """The part of each tensor that this rank answers for, so that sums over ranks count every entry once."""

    @cached_property
    def raw(self) -> list[Gradient]:
        """One gradient a term over the tap's tensors, unscaled; all None where the term is absent."""
        own = gradients_where_there(self.losses, self.at)
        return mean_gradients(own, self.at, [is_whole(tensor) for tensor in self.at], self.group)

    @cached_property
    def gramian(self) -> Tensor:
        """[K, K] ⟨sᵢgᵢ, sⱼgⱼ⟩, float64 on the CPU, 0 where a term is absent; one transfer to the host."""
        return summed(gramian(self.raw, self.shares), self.group) * self.scale * self.scale[:, None]

    @cached_property
    def norms(self) -> Tensor:
        """[K] ‖sᵢgᵢ‖."""
        return self.gramian.diagonal().clamp_min(0).sqrt()

    @cached_property
    def cosines(self) -> Tensor:
        """[K, K] cosines, 0 with a gradient that is 0."""
        norms = self.norms
        return self.gramian / (norms * norms[:, None]).clamp_min(_TINY)


@dataclass(frozen=True)
class LookAhead:
    """What one look-ahead found, in the optimizer's metric; K terms.

    Args:
        gain: [K] h̃, the gauge-projected cosine by which more of term i would lower the objective; NaN where absent.
        cos_base: [K] cosine of term i's gradient with the base term's (with the whole gradient where there is no base).
        cos_probe: [K] cosine of term i's gradient with the objective's.
        share: [K] gradient norms ‖wᵢgᵢ‖ as shares of their sum.
        objective: the probe's value.
        products: [K+1, K+1] Gramian ⟨gᵢ, Pgⱼ⟩ of the unweighted gradients and, last, the objective's; NaN in the rows
            and columns of absent terms. From it :func:`slopes` tells what would have been found at other weights.
    """

    gain: Tensor
    cos_base: Tensor
    cos_probe: Tensor
    share: Tensor
    objective: float
    products: Tensor


def look_ahead(products: Tensor, weights: Tensor, base: int | None, objective: float) -> LookAhead:
    """Gauge-projected look-ahead from the Gramian A of the K terms' gradients and, last, the probe's gradient.

    With vᵢ = wᵢgᵢ, G = Σⱼ vⱼ and g_p the probe's gradient,
    h̃ᵢ = ⟨g_p, P(vᵢ − (⟨vᵢ, PG⟩/⟨G, PG⟩) G)⟩ / (‖g_p‖_P ‖vᵢ‖_P).
    Moving along the whole gradient G counts for nothing, since an adaptive optimizer cancels that direction's scale.

    Args:
        products: A, [K+1, K+1] float64.
        weights: w, [K] float64.
        base: index of the base term, or None.
        objective: the probe's value, passed through.

    Example:
        >>> A = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
        >>> ones = torch.ones(2, dtype=torch.float64)
        >>> look_ahead(A, ones, None, 0.0).gain.tolist()  # the probe agrees with term 0, so term 1 should shrink
        [0.5, -0.5]
    """
    gain = slopes(products[None], weights)[0]
    scaled = products * _beside_one(weights) * _beside_one(weights)[:, None]
    terms, to_probe = scaled[:-1, :-1], scaled[:-1, -1]
    along = terms.sum(1)
    norms = terms.diagonal().clamp_min(0).sqrt()
    probe_norm = math.sqrt(max(float(scaled[-1, -1]), 0.0))
    whole_norm = math.sqrt(max(float(along.sum()), 0.0))
    reference, reference_norm = (along, whole_norm) if base is None else (terms[base], float(norms[base]))
    return LookAhead(
        gain=gain,
        cos_base=reference / (norms * reference_norm).clamp_min(_TINY),
        cos_probe=to_probe / (norms * probe_norm).clamp_min(_TINY),
        share=norms / norms.sum().clamp_min(_TINY),
        objective=objective,
        products=products,
    )


def slopes(products: Tensor, weights: Tensor) -> Tensor:
    """[M, K] h̃ of M look-aheads, as they would have been at other weights.

    The cosine of the whole gradient with the probe's, c(w) = ⟨g_p, PG⟩/(‖g_p‖_P‖G‖_P), has the slope
    ∂c/∂log wᵢ = (‖vᵢ‖_P/‖G‖_P)·h̃ᵢ. So the h̃ of one Gramian, taken at one weight after another, lead to the weights
    whose step serves the probe best, without another pass through the model.

    Args:
        products: [M, K+1, K+1] float64, Gramians ⟨gᵢ, Pgⱼ⟩ of unweighted gradients, the probe's last; NaN where absent.
        weights: [K] float64, the weights to ask about.

    Returns:
        NaN for absent terms.

    Example:
        >>> A = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]], dtype=torch.float64)
        >>> slopes(A, torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()  # term 0 alone is all that serves
        [[0.0, 0.0]]
    """
    gramians = Gramians(products)
    found, _ = gramians.at(weights.numpy())
    return torch.from_numpy(np.where(gramians.absent, math.nan, found.T))


class Gramians:
    """M Gramians, made ready to be asked for :func:`slopes` at one weight after another.

    In NumPy, whose calls cost less on arrays so small: a controller asks eight times a look-ahead. It is calls that
    cost, not numbers, and most where shapes differ: all that is linear in the weights is one product, and the M
    look-aheads lie along the last axis.

    Args:
        products: [..., M, K+1, K+1] float64 as for :func:`slopes`; those of several runs may be asked at once.

    Attributes:
        absent: [..., M, K] bool.
    """

    def __init__(self, products: Tensor) -> None:
        known = products.numpy()
        self.absent = np.isnan(np.diagonal(known, axis1=-2, axis2=-1)[..., :-1])
        if self.absent.any():
            known = np.nan_to_num(known)
        norms = np.sqrt(np.maximum(np.diagonal(known, axis1=-2, axis2=-1), 0.0))
        # A's rows, of which the last is the probe's, and one more that gives Σᵢ‖vᵢ‖_P.
        rows = np.concatenate((known[..., :-1].swapaxes(-3, -2), norms[..., None, :, :-1]), axis=-3)
        *runs, height, looks, terms = rows.shape
        self._shape, self._rows = rows.shape[:-1], rows.reshape(*runs, height * looks, terms)
        self._newest = norms[..., -1, :-1]
        self._to_probe = known[..., :-1, -1].swapaxes(-2, -1).copy()
        self._scale = np.maximum(norms[..., :-1] * norms[..., -1:], _TINY).swapaxes(-2, -1).copy()

    def at(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What they say at ``weights``, [..., K].

        Returns:
            [..., K, M] h̃, 0 for absent terms, and [..., K] lengths ‖wᵢgᵢ‖_P of the newest, as shares of their sum.
        """
        found = (self._rows @ weights[..., None]).reshape(self._shape)
        along, probe, lengths = found[..., :-2, :], found[..., -2, :], found[..., -1, :]
        whole = (weights[..., None, :] @ along)[..., 0, :]
        there = whole > _CANCELLED * lengths * lengths
        part = probe * there / np.maximum(whole, _TINY)
        slopes = (self._to_probe - along * part[..., None, :]) / self._scale
        return slopes, weights * self._newest / np.maximum(lengths[..., -1:], _TINY)


def length_ratio(products: Tensor, before: Tensor, after: Tensor) -> float:
    """‖G(after)‖_P/‖G(before)‖_P, the whole gradient's lengths at two weights, [K]; 1 where it has none.

    Args:
        products: [K+1, K+1] as for :func:`slopes`.
        before, after: [K] float64.
    """
    terms = products.nan_to_num(0.0)[:-1, :-1]
    lengths = [float(weights @ terms @ weights) for weights in (before, after)]
    return math.sqrt(lengths[1] / lengths[0]) if min(lengths) > 0 else 1.0


def _beside_one(weights: Tensor) -> Tensor:
    return torch.cat([weights, weights.new_ones(1)])


def dense_values(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, of sparse ones the entries that are there: same norm, same finiteness."""
    return [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients together, 0 for none, taken at least in float32; one transfer to the host.

    Of gradients that ``fully_shard`` has split it is the norm of the whole.
    """
    split = [gradient for gradient in gradients if is_split(gradient)]
    if not split:
        return _norm(gradients)
    return math.hypot(_norm([gradient for gradient in gradients if not is_split(gradient)]), _norm(split))


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([_at_least_float32(g) for g in gradients])) if gradients else 0.0


def _at_least_float32(gradient: Tensor) -> Tensor:
    """The gradient itself, or the norm of one in half precision, which could not hold it: the total is the same."""
    return gradient if gradient.element_size() >= 4 else torch.linalg.vector_norm(gradient, dtype=torch.float32)
