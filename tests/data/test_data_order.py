import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data.order import Epochs, Mix, Weighted, position_to_index


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 97, 256, 257, 1000, 65_536, 65_537, 1_000_000])
def test_is_a_permutation(n):
    for key in (0, 1, 2**63 - 1):
        assert np.array_equal(np.sort(position_to_index(np.arange(n), n, key)), np.arange(n))


def test_golden_values():
    """The order of every run that exists: if one of these changes, no run can be continued."""
    assert position_to_index(np.arange(10), 10, 42).tolist() == [8, 6, 2, 4, 0, 5, 3, 7, 9, 1]
    assert position_to_index(np.array([0, 1, 499_999, 999_999]), 1_000_000, 123_456_789).tolist() == [
        873359,
        766919,
        517710,
        748704,
    ]
    assert position_to_index(np.array([0, 10**12]), 10**12 + 1, 2**63 - 1).tolist() == [1223808867, 65265544897]
    draws = Mix((5, 4), (1.0, 2.5)).draws(1, np.arange(5), seed=7, stage="sft", fingerprint="sha256:00")
    assert [(draw.source, draw.row, draw.occurrence) for draw in draws] == [
        (1, 0, 0),
        (1, 1, 0),
        (1, 2, 0),
        (1, 1, 2),
        (1, 3, 0),
    ]


@given(st.integers(1, 10**6), st.integers(0, 2**63 - 1), st.data())
@settings(max_examples=100, deadline=None)
def test_each_position_alone(n, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    alone = [int(position_to_index(np.array([position]), n, key)[0]) for position in positions]
    assert position_to_index(positions, n, key).tolist() == alone


def test_positions_outside_are_refused():
    for positions in ([10], [-1], [0, 10]):
        with pytest.raises(IndexError):
            position_to_index(np.array(positions), 10, 1)


@pytest.mark.parametrize("n", [2, 3, 5, 16, 50])
def test_uniform(n):
    """Over many keys every index comes to every position equally often: chi-squared, 6 sigma."""
    keys = 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), position_to_index(np.arange(n), n, key)] += 1
    expected = keys / n
    for row in counts:
        chi = ((row - expected) ** 2 / expected).sum()
        assert chi < (n - 1) + 6 * np.sqrt(2 * (n - 1)) + 6, (n, row)


def test_neighbours_and_epochs_look_unrelated():
    n = 10_000
    first, second = (position_to_index(np.arange(n), n, key).astype(float) for key in (1, 2))
    for a, b in ((first, np.arange(n)), (first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


def test_all_orders_of_four_occur():
    assert len({tuple(position_to_index(np.arange(4), 4, key)) for key in range(1000)}) == 24


def test_steps_over_epochs():
    epochs = Epochs(samples=10, batch_size=4)
    assert epochs.steps_per_epoch == 3
    places = [epochs.place(step) for step in range(1, 7)]
    assert [(p.epoch, p.position, p.count) for p in places] == [
        (0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 0, 4), (1, 4, 4), (1, 8, 2),
    ]  # fmt: skip
    assert Epochs(samples=8, batch_size=4).steps_per_epoch == 2
    assert Epochs(samples=3, batch_size=4).place(2).count == 3


def epoch_of(mix, epoch, seed=1, batch=1000):
    draws = []
    for begin in range(0, mix.samples_per_epoch, batch):
        positions = np.arange(begin, min(begin + batch, mix.samples_per_epoch))
        draws += mix.draws(epoch, positions, seed=seed, stage="s", fingerprint="f")
    return [(draw.source, draw.row, draw.occurrence) for draw in draws]


def test_repeats():
    mix = Mix(rows=(10, 7, 4), repeats=(1.0, 2.5, 0.5))
    assert mix.counts() == [10, 18, 2]
    seen = epoch_of(mix, 0)
    assert len(set(seen)) == len(seen) == 30
    assert {draw[1] for draw in seen if draw[0] == 0} == set(range(10))
    for occurrence in (0, 1):
        assert {draw[1] for draw in seen if draw[0] == 1 and draw[2] == occurrence} == set(range(7))
    assert len({draw[1] for draw in seen if draw[0] == 1 and draw[2] == 2}) == 4


def test_a_fraction_goes_round_all_rows():
    mix = Mix(rows=(10,), repeats=(0.5,))
    first, second, third = ({row for _, row, _ in epoch_of(mix, epoch)} for epoch in range(3))
    assert len(first) == 5 and first | second == set(range(10)) and third == first
    assert {row for _, row, _ in epoch_of(mix, 0, seed=2)} != first


def test_order_differs_by_epoch_and_seed_and_not_by_batch_size():
    mix = Mix(rows=(50,), repeats=(1.0,))
    assert epoch_of(mix, 0, batch=50) == epoch_of(mix, 0, batch=7)
    assert len({tuple(epoch_of(mix, epoch, seed)) for epoch in (0, 1) for seed in (1, 2)}) == 4


MIXED = Weighted(rows=(10, 1000, 3), weights=(1, 2.5, 0.01))
CHANCE = {"seed": 3, "stage": "sft", "fingerprint": "f"}


def test_weights_hold_over_every_stretch():
    drawn = [draw.source for draw in MIXED.draws(np.arange(5000), **CHANCE)]
    for end in (500, 1000, 5000):
        counts = np.bincount(drawn[:end], minlength=3)
        assert abs(counts - end * np.array([1, 2.5, 0.01]) / 3.51).max() < 60
    assert len(set(drawn[:20])) > 1, "mixed, not one after the other"


def test_each_source_is_walked_through_pass_after_pass():
    draws = MIXED.draws(np.arange(5000), **CHANCE)
    for source, rows in enumerate(MIXED.rows):
        own = [(draw.occurrence, draw.row) for draw in draws if draw.source == source]
        passes = [[row for turn, row in own if turn == number] for number in range(max(own)[0] + 1)]
        assert all(sorted(rows_seen) == list(range(rows)) for rows_seen in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert rows > 3 or len({tuple(seen) for seen in passes[:-1]}) > 1 or len(passes) < 3
        if rows == 10:
            assert passes[0] != passes[1] and len(passes) > 100


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.001, 10)), min_size=1, max_size=5),
    st.integers(0, 10**9),
    st.integers(1, 300),
)
def test_a_place_in_the_stream_is_a_function_of_itself_alone(sources, begin, count):
    mix = Weighted(tuple(rows for rows, _ in sources), tuple(weight for _, weight in sources))
    together = mix.draws(np.arange(begin, begin + count), **CHANCE)
    assert mix.draws(np.array([begin + count - 1]), **CHANCE) == together[-1:]
    assert all(0 <= draw.row < mix.rows[draw.source] for draw in together)
    seen = [(draw.source, draw.occurrence, draw.row) for draw in together]
    assert len(set(seen)) == len(seen), "no row twice in one pass"


def test_other_seeds_stages_and_data_mix_in_another_way():
    orders = {
        tuple(MIXED.draws(np.arange(50), **{**CHANCE, **other}))
        for other in ({}, {"seed": 4}, {"stage": "s"}, {"fingerprint": "g"})
    }
    assert len(orders) == 4
