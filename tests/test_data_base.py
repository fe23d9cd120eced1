"""Splits are disjoint, balanced and seeded; the order of batches resumes where it was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from adaptive_loss.data.base import (
    Batches,
    Dataset,
    Split,
    channel_statistics,
    stratified_splits,
)
from adaptive_loss.errors import UsageError
from adaptive_loss.seeding import own_generator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split_of(value: int, n: int = 4) -> Split:
    return Split(torch.full((n, 3, 2, 2), value, dtype=torch.uint8), torch.arange(n))


# --- splits


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 7),
    each=st.integers(3, 20),
    parts=st.lists(st.integers(0, 15), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_splits_are_disjoint_exact_and_balanced(classes: int, each: int, parts: list[int], seed: int) -> None:
    labels = torch.arange(classes * each) % classes
    sizes = {f"part{i}": size for i, size in enumerate(parts)}
    if sum(parts) > classes * each:
        with pytest.raises(UsageError):
            stratified_splits(labels, sizes, seeded(seed))
        return
    splits = stratified_splits(labels, sizes, seeded(seed))
    assert {name: len(rows) for name, rows in splits.items()} == sizes
    together = torch.cat(list(splits.values()))
    assert len(together.unique()) == len(together)
    for rows in (*splits.values(), together):
        counts = torch.bincount(labels[rows], minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_same_seed_same_splits_and_another_seed_others() -> None:
    labels = torch.arange(200) % 10
    first, again, other = (stratified_splits(labels, {"a": 50, "b": 30}, seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["a"], other["a"])


def test_splits_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    stratified_splits(torch.arange(40) % 4, {"a": 8}, seeded())
    list(Batches(8, 2, seeded()))
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_images_of_a_class_names_the_class_and_the_largest_balanced_size() -> None:
    labels = torch.cat([torch.zeros(500), torch.ones(310)]).long()
    with pytest.raises(UsageError) as caught:
        stratified_splits(labels, {"train": 800, "probe": 200}, seeded(), classes=("dog", "cat"))
    assert str(caught.value) == (
        "--subset 1000 needs 500 images of each class but class 'cat' has 310; the largest balanced size is 620"
    )
    stratified_splits(labels, {"train": 620}, seeded(), classes=("dog", "cat"))


def test_a_class_without_any_image_is_noticed() -> None:
    with pytest.raises(UsageError, match="class 'c' has 0; the largest balanced size is 0"):
        stratified_splits(torch.tensor([0, 1, 0, 1]), {"train": 3}, seeded(), classes=("a", "b", "c"))


def test_odd_images_come_from_the_richest_class() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    splits = stratified_splits(labels, {"all": 5}, seeded())
    assert splits["all"].sort().values.tolist() == [0, 1, 2, 3, 4]


def test_no_labels_and_negative_sizes() -> None:
    with pytest.raises(UsageError, match="has 0"):
        stratified_splits(torch.empty(0, dtype=torch.long), {"train": 1}, seeded())
    with pytest.raises(ValueError, match="negative"):
        stratified_splits(torch.arange(4), {"train": -1}, seeded())


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long), TypeError),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), TypeError),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), ValueError),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), ValueError),
    ],
)
def test_a_split_refuses_what_it_cannot_hold(images: torch.Tensor, labels: torch.Tensor, error: type) -> None:
    with pytest.raises(error, match="a split holds"):
        Split(images, labels)


# --- dataset


def test_statistics_equal_the_plain_formula() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 4), generator=seeded(), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, pixels.mean(1).float())
    torch.testing.assert_close(std, pixels.std(1, correction=0).float())


def test_statistics_of_a_constant_channel_can_be_divided_by() -> None:
    assert channel_statistics(torch.full((1, 1, 2, 2), 7, dtype=torch.uint8))[1].tolist() == [1.0]
    with pytest.raises(ValueError, match="at least one image"):
        channel_statistics(torch.empty(0, 1, 2, 2, dtype=torch.uint8))


def test_statistics_come_from_train_alone_and_held_in_joins_all_but_test() -> None:
    dataset = Dataset("d", ("a",) * 4, split_of(51), split_of(200), split_of(201), split_of(255), {})
    assert dataset.mean.tolist() == pytest.approx([0.2] * 3)
    assert dataset.mean.dtype == dataset.std.dtype == torch.float32
    assert dataset.held_in.images[:, 0, 0, 0].tolist() == [51] * 4 + [200] * 4 + [201] * 4
    assert dataset.held_in.labels.tolist() == [0, 1, 2, 3] * 3
    assert dataset.held_in is dataset.held_in
    assert dataset.image_shape == (3, 2, 2)


def test_own_generators_differ_by_purpose_and_seed_only() -> None:
    def draw(seed: int, purpose: str) -> list[int]:
        return torch.randint(0, 1000, (6,), generator=own_generator(seed, purpose)).tolist()

    assert draw(1, "order") == draw(1, "order")
    assert draw(1, "order") != draw(1, "augment")
    assert draw(1, "order") != draw(2, "order")
    draw(-1, "order")


# --- order of batches


@pytest.mark.parametrize(("drop_last", "lengths"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_an_epoch_visits_each_example_at_most_once(drop_last: bool, lengths: list[int]) -> None:
    batches = Batches(10, 4, seeded(), drop_last)
    epoch = list(batches)
    assert [len(batch) for batch in epoch] == lengths
    assert len(batches) == len(lengths)
    assert len(torch.cat(epoch).unique()) == sum(lengths)
    assert not torch.equal(torch.cat(epoch), torch.cat(list(batches)))


@pytest.mark.parametrize("cut", range(9))
def test_a_cut_order_resumes_exactly(cut: int) -> None:
    whole = Batches(12, 4, seeded(3))
    expected = [batch.tolist() for _ in range(4) for batch in whole]
    first, seen, state = Batches(12, 4, seeded(3)), [], None
    state = first.state_dict()
    while len(seen) < cut:
        for batch in first:
            seen.append(batch.tolist())
            state = first.state_dict()
            if len(seen) == cut:
                break
    second = Batches(12, 4, seeded(99))
    second.load_state_dict(state)
    assert torch.equal(second.state_dict()["generator"], state["generator"])
    while len(seen) < len(expected):
        seen.extend(batch.tolist() for batch in second)
    assert seen == expected


def loader(batches: Batches, workers: int = 0) -> DataLoader[int]:
    return DataLoader(range(batches.n), batch_sampler=batches, generator=batches.generator, num_workers=workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_a_loader_fetched_ahead_are_not_lost(cut: int, workers: int) -> None:
    whole, first, second = (Batches(12, 4, seeded(seed)) for seed in (3, 3, 99))
    expected = [batch.tolist() for _ in range(3) for batch in whole.through(loader(whole))]
    seen: list[list[int]] = []
    while len(seen) < cut:
        for batch in first.through(loader(first, workers)):
            seen.append(batch.tolist())
            state = first.state_dict()
            if len(seen) == cut:
                break
    second.load_state_dict(state)
    while len(seen) < len(expected):
        seen += [batch.tolist() for batch in second.through(loader(second, workers))]
    assert seen == expected


def test_a_loader_that_draws_from_elsewhere_is_refused() -> None:
    batches = Batches(12, 4, seeded())
    with pytest.raises(ValueError, match=r"generator=batches\.generator"):
        next(batches.through(DataLoader(range(12), batch_sampler=batches)))  # type: ignore[arg-type]


def test_a_state_at_the_end_of_an_epoch_starts_the_next_one() -> None:
    first = Batches(8, 4, seeded())
    list(first)
    second = Batches(8, 4, seeded(5))
    second.load_state_dict(first.state_dict())
    assert [b.tolist() for b in second] == [b.tolist() for b in first]


def test_a_loop_left_early_is_not_continued() -> None:
    batches = Batches(8, 2, seeded())
    next(iter(batches))
    assert len(list(batches)) == 4


def test_batches_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="--batch-size 9 is larger than the 8 training images; use at most 8"):
        Batches(8, 9, seeded())
    with pytest.raises(UsageError, match="at least 1"):
        Batches(8, 0, seeded())
    state = Batches(8, 2, seeded()).state_dict()
    with pytest.raises(ValueError, match="of 8 images in batches of 2, not of 8 in batches of 4"):
        Batches(8, 4, seeded()).load_state_dict(state)
