"""Terms: roles, every bad input with its message, and exact values."""

import math

import pytest
import torch

from adaptive_loss import LossExecutor
from adaptive_loss.losses import Terms


def live(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_roles_partition_the_terms():
    terms = Terms({"a": 1.0, "b": 2.0, "c": 0.0, "d": 3.0}, base="a", targets={"d": 1.0})
    assert terms.names == ("a", "b", "c", "d") and terms.base_index == 0
    assert terms.active.tolist() == [True, True, False, True]
    assert terms.movable.tolist() == [False, True, False, False]
    assert Terms({"a": 1.0, "b": 1.0}).movable.tolist() == [True, True]


def test_terms_keep_their_own_copy():
    start = {"a": 1.0}
    terms = Terms(start)
    start["a"] = math.nan
    assert terms.start_weights.tolist() == [1.0]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"start": {}}, ValueError, "no terms"),
        ({"start": ["a"]}, TypeError, "weights must be a dict"),
        ({"start": {"a": -1.0}}, ValueError, "'a' is -1.0"),
        ({"start": {"a": math.nan}}, ValueError, "'a' is nan"),
        ({"start": {"a": math.inf}}, ValueError, "'a' is inf"),
        ({"start": {"a": 0.0, "b": 0.0}}, ValueError, "all start weights are 0"),
        ({"start": {"a": "1"}}, TypeError, "'a' is a str"),
        ({"start": {"a": None}}, TypeError, "'a' is a NoneType"),
        ({"start": {"": 1.0}}, TypeError, "non-empty string"),
        ({"start": {1: 1.0}}, TypeError, "non-empty string"),
        ({"start": {"a": 1.0}, "base": "b"}, KeyError, "base 'b' is not a term"),
        ({"start": {"a": 1.0, "b": 0.0}, "base": "b"}, ValueError, "'b' has start weight 0"),
        ({"start": {"a": 1.0}, "targets": {"b": 1.0}}, KeyError, "target 'b' is not a term"),
        ({"start": {"a": 1.0}, "targets": {"a": math.nan}}, ValueError, "target of term 'a' is nan"),
        ({"start": {"a": 1.0}, "targets": {"a": "x"}}, TypeError, "target of term 'a' is a str"),
        ({"start": {"a": 1.0, "b": 1.0}, "base": "a", "targets": {"a": 1.0}}, ValueError, "'a' has a target"),
        ({"start": {"a": 1.0, "b": 0.0}, "targets": {"b": 1.0}}, ValueError, "'b' has a target"),
    ],
)
def test_bad_terms(kwargs, error, words):
    with pytest.raises(error) as caught:
        Terms(**kwargs)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        ([1.0], TypeError, "losses must be a dict"),
        ({}, ValueError, "no term is present"),
        ({"a": None, "b": None}, ValueError, "no term is present"),
        ({"z": live(1.0)}, KeyError, "unknown term 'z'"),
        ({"a": 1.0}, TypeError, "term 'a' is a float"),
        ({"a": torch.ones(2, requires_grad=True)}, ValueError, "term 'a' has shape (2,)"),
        ({"a": torch.ones(1, requires_grad=True)}, ValueError, "term 'a' has shape (1,)"),
        ({"a": torch.tensor(1)}, TypeError, "term 'a' has dtype torch.int64"),
        ({"a": torch.tensor(1j, requires_grad=True)}, TypeError, "term 'a' has dtype torch.complex64"),
        ({"a": torch.tensor(1.0)}, ValueError, "term 'a' has no gradient"),
        ({"a": live(1.0), "b": torch.ones((), device="meta", requires_grad=True)}, ValueError, "'b' is on meta"),
    ],
)
def test_bad_losses(losses, error, words):
    executor = LossExecutor({"a": 1.0, "b": 1.0})
    with pytest.raises(error) as caught:
        executor(losses)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    executor({"a": live(1.0), "b": live(2.0)}).backward()  # and nothing is spoilt by it


def test_a_detached_term_is_fine_where_nothing_would_come_of_it():
    terms = Terms({"a": 1.0, "off": 0.0})
    assert terms.read({"a": live(1.0), "off": torch.tensor(3.0)}).values.tolist() == [1.0, 3.0]
    with torch.no_grad():
        assert terms.read({"a": torch.tensor(2.0)}).present.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_read_exactly(dtype):
    x, y = live(0.1, dtype), live(1 / 3, torch.float64)
    values = Terms({"a": 1.0, "b": 1.0, "c": 1.0}).read({"c": y, "a": x}).values
    assert values.dtype == torch.float64
    assert values[0] == x.item() and math.isnan(values[1]) and values[2] == 1 / 3


def test_a_pinned_term_does_not_move_and_may_not_be_what_cannot_be_pinned() -> None:
    terms = Terms({"a": 1.0, "b": 1.0, "c": 1.0}, "a", pinned=("b",))
    assert terms.movable.tolist() == [False, False, True]
    with pytest.raises(KeyError, match="pinned term 'd' is not a term"):
        Terms({"a": 1.0, "b": 1.0}, "a", pinned=("d",))
    with pytest.raises(ValueError, match="'b' is pinned, but without a base"):
        Terms({"a": 1.0, "b": 1.0}, pinned=("b",))
    with pytest.raises(ValueError, match="'b' is pinned and has a target"):
        Terms({"a": 1.0, "b": 1.0}, "a", {"b": 1.0}, pinned=("b",))


def test_one_pinned_name_is_no_list_of_letters() -> None:
    with pytest.raises(TypeError, match=r"pinned is 'kl': give a list of names, \['kl'\]"):
        LossExecutor({"fit": 1.0, "kl": 1.0}, base="fit", pinned="kl")
