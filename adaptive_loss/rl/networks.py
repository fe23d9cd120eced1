"""Networks that map an observation to one value per action."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Prior = Callable[[Tensor], Tensor]
Array = NDArray[Any]
Parameters = Mapping[str, Array]


class StackedLinear(nn.Module):
    """E linear layers of one shape as one batched product: x [E, ..., in] -> x_e W_e + b_e, [E, ..., out].

    Args:
        layers: the E layers; their parameters are copied.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]).contiguous())
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.stack(biases).unsqueeze(1)) if biases else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [E, ..., in] to [E, ..., out]."""
        rows = inputs if inputs.dim() == 3 else inputs.flatten(1, -2)
        outputs = torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        return outputs if inputs.dim() == 3 else outputs.unflatten(1, inputs.shape[1:-1])


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """One network that computes E of the same build at once: [E, ..., in] -> [E, ..., out].

    Small networks cost overhead, not arithmetic: stacked, three take about the time of one. Every `nn.Linear` becomes
    a `StackedLinear`; the rest of the network must treat the dimensions before the last as batch dimensions.

    Args:
        networks: E networks of one build, whose parameters all belong to `nn.Linear` layers.

    Raises:
        ValueError: if another kind of layer holds parameters or buffers.

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.networks import MLPQ, stack
        >>> stack([MLPQ(6, 2) for _ in range(3)])(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 5, 2])
    """
    linear = [network for network in networks if isinstance(network, nn.Linear)]
    if linear:
        return StackedLinear(linear)
    first = networks[0]
    for name, _ in itertools.chain(first.named_parameters(recurse=False), first.named_buffers(recurse=False)):
        raise ValueError(f"only nn.Linear layers may hold parameters, but {type(first).__name__} holds {name!r}")
    stacked = copy.deepcopy(first)
    for name, _ in first.named_children():
        setattr(stacked, name, stack([network.get_submodule(name) for network in networks]))
    return stacked


def near_zero_(layer: nn.Linear, scale: float = 1e-2) -> nn.Linear:
    """Set bias 0 and weights N(0, scale²), so that values start near 0 yet the members of an ensemble differ."""
    nn.init.normal_(layer.weight, std=scale)
    nn.init.zeros_(layer.bias)
    return layer


def dueling_values(value: Tensor, advantage: Tensor) -> Tensor:
    """Q(s, a) = V(s) + A(s, a) − mean_b A(s, b).

    Args:
        value: [..., 1].
        advantage: [..., A].

    Returns:
        [..., A]; its mean over the actions is V.

    Reference:
        Wang et al., *Dueling network architectures for deep reinforcement learning*, 2016, equation 9
        (https://arxiv.org/abs/1511.06581).

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.networks import dueling_values
        >>> dueling_values(torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]])).tolist()
        [[1.0, 3.0]]
    """
    return value + advantage - advantage.mean(dim=-1, keepdim=True)


class EquivariantQ(nn.Module):
    r"""Values of keep, reset and, per term, raise and lower; permuting the terms permutes the actions.

    The observation is flat: G globals g, then K blocks of F features x_1 … x_K. K is read off its length, and no
    parameter depends on K, so a network trained on 3 terms serves 5:

        h_i    = φ(x_i, g)                              φ, ψ, χ: two-layer perceptrons
        h̄      = (1/K) Σ_i h_i
        Q(keep), Q(reset)         = ψ(h̄, g)
        Q(raise_i), Q(lower_i)    = χ(h_i, h̄, g)

    Action order: 0 keep, 1 reset, then 2 + 2i raise and 3 + 2i lower for term i = 0 … K − 1.

    Args:
        n_global: G ≥ 0.
        n_term: F ≥ 1.
        hidden: width of every hidden layer.
        dueling: split the values into a state value and advantages, see `dueling_values`.
        prior: [B, G + K·F] -> [B, 2 + 2K], added to the output and not trained: the rule the agent starts from.

    Raises:
        ValueError: in `forward`, if the length of an observation is not G + K·F with K ≥ 1.

    Reference:
        Zaheer et al., *Deep Sets*, 2017, theorem 2 and section 3 (https://arxiv.org/abs/1703.06114).

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.networks import EquivariantQ
        >>> network = EquivariantQ(n_global=2, n_term=3)
        >>> network(torch.zeros(4, 2 + 5 * 3)).shape  # five terms: 2 + 2 * 5 actions
        torch.Size([4, 12])
    """

    def __init__(
        self, n_global: int, n_term: int, hidden: int = 32, dueling: bool = False, prior: Prior | None = None
    ) -> None:
        super().__init__()
        self.n_global = n_global
        self.n_term = n_term
        # In a tuple, a prior that is a module is not registered, hence neither trained nor stacked nor saved.
        self._prior = () if prior is None else (prior,)
        # A layer on a concatenation is a sum of layers on its parts: the shared part is computed once, not K times.
        self.term_in = nn.Linear(n_term, hidden)
        self.global_in = nn.Linear(n_global, hidden, bias=False) if n_global else None
        self.term_hidden = nn.Linear(hidden, hidden)
        context = hidden + n_global
        self.common_hidden = nn.Linear(context, hidden)
        self.common_out = near_zero_(nn.Linear(hidden, 2))
        self.move_term = nn.Linear(hidden, hidden)
        self.move_context = nn.Linear(context, hidden, bias=False)
        self.move_out = near_zero_(nn.Linear(hidden, 2))
        self.value_out = near_zero_(nn.Linear(hidden, 1)) if dueling else None

    def n_terms(self, observation_size: int) -> int:
        """K for an observation of this length; ValueError if there is none."""
        terms, rest = divmod(observation_size - self.n_global, self.n_term)
        if rest or terms < 1:
            wanted = f"{self.n_global} + K * {self.n_term} entries with K >= 1"
            raise ValueError(f"an observation must have {wanted}, got {observation_size}")
        return terms

    def forward(self, observation: Tensor) -> Tensor:
        """Map [..., G + K·F] to [..., 2 + 2K]."""
        shared, blocks = observation[..., : self.n_global], observation[..., self.n_global :]
        features = self.term_in(blocks.unflatten(-1, (self.n_terms(observation.shape[-1]), self.n_term)))
        if self.global_in is not None:
            features = features + self.global_in(shared).unsqueeze(-2)
        encoded = torch.relu(self.term_hidden(torch.relu(features)))
        context = torch.cat([encoded.mean(dim=-2), shared], dim=-1)
        common = torch.relu(self.common_hidden(context))
        moves = torch.relu(self.move_term(encoded) + self.move_context(context).unsqueeze(-2))
        values = torch.cat([self.common_out(common), self.move_out(moves).flatten(-2)], dim=-1)
        if self.value_out is not None:
            values = dueling_values(self.value_out(common), values)
        for prior in self._prior:
            values = values + self._untrained(prior, observation)
        return values

    @staticmethod
    def _untrained(prior: Prior, observation: Tensor) -> Tensor:
        rows = observation.reshape(-1, observation.shape[-1])
        with torch.no_grad():
            return prior(rows).unflatten(0, observation.shape[:-1])


def in_numpy(network: nn.Module) -> Parameters:
    """A network's parameters by name, as NumPy sees them: views, no copies."""
    return {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}


def equivariant_values(parameters: Parameters, observation: Array) -> Array:
    """What a stack of E :class:`EquivariantQ`, without dueling and prior, says of one observation, up to rounding.

    In NumPy: on arrays so small it is calls that cost, and PyTorch's cost several times as much.

    Args:
        parameters: of the stack, see :func:`in_numpy`.
        observation: [G + K·F], G ≥ 1.

    Returns:
        [E, 2 + 2K].

    Example:
        >>> import numpy as np
        >>> from adaptive_loss.rl.networks import EquivariantQ, equivariant_values, in_numpy, stack
        >>> parameters = in_numpy(stack([EquivariantQ(n_global=2, n_term=3) for _ in range(4)]))
        >>> equivariant_values(parameters, np.zeros(2 + 5 * 3, np.float32)).shape
        (4, 12)
    """
    n_global, n_term = parameters["global_in.weight"].shape[1], parameters["term_in.weight"].shape[1]
    shared, blocks = observation[None, :n_global], observation[n_global:].reshape(-1, n_term)

    def linear(name: str, inputs: Array) -> Array:
        return inputs @ parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    features = linear("term_in", blocks) + shared @ parameters["global_in.weight"]
    encoded = _relu(linear("term_hidden", _relu(features)))
    pooled = np.add.reduce(encoded, axis=1, keepdims=True) / len(blocks)
    context = np.concatenate((pooled, shared[None].repeat(len(pooled), axis=0)), axis=-1)
    moves = _relu(linear("move_term", encoded) + context @ parameters["move_context.weight"])
    common = _relu(linear("common_hidden", context))
    moved = linear("move_out", moves).reshape(len(pooled), -1)
    return np.concatenate((linear("common_out", common)[:, 0], moved), axis=1)


def _relu(features: Array) -> Array:
    return np.maximum(features, 0)


class MLPQ(nn.Module):
    """Two-layer perceptron from [..., observation_size] to [..., n_actions], for problems without terms.

    Args:
        observation_size: length of an observation.
        n_actions: number of actions.
        hidden: width of the hidden layer.
        dueling: split the values into a state value and advantages, see `dueling_values`.

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.networks import MLPQ
        >>> MLPQ(6, 2)(torch.eye(6)).shape
        torch.Size([6, 2])
    """

    def __init__(self, observation_size: int, n_actions: int, hidden: int = 32, dueling: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(observation_size, hidden)
        self.out = near_zero_(nn.Linear(hidden, n_actions))
        self.value_out = near_zero_(nn.Linear(hidden, 1)) if dueling else None

    def forward(self, observation: Tensor) -> Tensor:
        """Map [..., observation_size] to [..., n_actions]."""
        features = torch.relu(self.hidden(observation))
        values = self.out(features)
        return values if self.value_out is None else dueling_values(self.value_out(features), values)
