"""Numbers of many examples: Philox as published, the same one by one and all at once, uniform and independent."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from visling.draws import Draws, GivenDraws, KeyedDraws, Stream, as_draws

Words = tuple[int, ...]

FULL = 2**64 - 1

PUBLISHED: list[tuple[Words, Words, Words]] = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (FULL, FULL, FULL, FULL),
        (FULL, FULL),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]
"""Counter, key, output of Philox-4x64-10: known answers of Random123 1.14 (`kat_vectors`)."""


def philox(counter: Words, key: Words) -> Words:
    """Philox-4x64-10 of one counter, in Python's own integers (Salmon et al. 2011, section 3.3)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ k, second & FULL, (first >> 64) ^ d ^ m, first & FULL
        k, m = (k + 0x9E3779B97F4A7C15) & FULL, (m + 0xBB67AE8584CAA73B) & FULL
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_the_reference_gives_the_published_words(counter: Words, key: Words, output: Words) -> None:
    assert philox(counter, key) == output


@pytest.mark.parametrize("stream", Stream)
def test_numbers_are_those_of_philox(stream: Stream) -> None:
    seed, epoch, indices = 2**40 + 7, 11, [0, 5, 2**35]
    numbers = KeyedDraws(seed, epoch, indices).uniform(stream, 10)
    for index, row in zip(indices, numbers, strict=True):
        words = [word for block in (1, 2, 3) for word in philox((block, stream, index, 0), (seed, epoch))]
        assert row.tolist() == [(word >> 11) * 2.0**-53 for word in words[:10]]


def test_one_by_one_and_all_at_once_are_equal() -> None:
    draws = KeyedDraws(3, 1, np.array([8, 2, 900_001]))
    counts = np.array([5, 0, 7])
    wide = draws.uniform(Stream.TOKENS, 7)
    expected = [number for row, count in zip(wide, counts, strict=True) for number in row[:count]]
    assert draws.flat(Stream.TOKENS, counts).tolist() == expected
    assert [generator.random(7).tolist() for generator in draws.each(Stream.TOKENS)] == wide.tolist()
    assert [generator.random(7).tolist() for generator in draws.generators(Stream.TOKENS)] == wide.tolist()
    assert draws.take(np.array([2, 0])).uniform(Stream.TOKENS, 7).tolist() == wide[[2, 0]].tolist()


def test_a_generator_that_is_moved_forgets_what_it_drew() -> None:
    """32-bit draws keep half a word, and blocks hold four: neither is left to the next example."""
    draws = KeyedDraws(3, 1, [8, 2])
    moved = [(generator.integers(9, size=3).tolist(), generator.random()) for generator in draws.each(Stream.EXAMPLE)]
    apart = draws.generators(Stream.EXAMPLE)
    assert moved == [(generator.integers(9, size=3).tolist(), generator.random()) for generator in apart]


def test_no_examples() -> None:
    draws = KeyedDraws(0, 0, [])
    assert draws.uniform(Stream.TOKENS, 4).shape == (0, 4)
    assert draws.flat(Stream.TOKENS, np.zeros(0, np.int64)).shape == (0,)
    assert not list(draws.each(Stream.EXAMPLE))


def _neighbours() -> dict[str, NDArray[np.float64]]:
    """The same 200,000 places under a base key, and with one of seed, epoch, index and stream changed by one."""
    indices = np.arange(2000)
    return {
        "base": KeyedDraws(0, 0, indices).uniform(Stream.TOKENS, 100),
        "seed": KeyedDraws(1, 0, indices).uniform(Stream.TOKENS, 100),
        "epoch": KeyedDraws(0, 1, indices).uniform(Stream.TOKENS, 100),
        "index": KeyedDraws(0, 0, indices + 1).uniform(Stream.TOKENS, 100),
        "stream": KeyedDraws(0, 0, indices).uniform(Stream.REGIONS, 100),
    }


def test_numbers_are_uniform_and_independent() -> None:
    numbers = _neighbours()
    base = numbers.pop("base")
    # 100 cells of 2,000 expected: chi-square with 99 degrees of freedom is below 160 but for one in 10,000.
    cells = np.bincount((base * 100).astype(int).ravel(), minlength=100)
    assert ((cells - 2000.0) ** 2 / 2000).sum() < 160
    # The standard deviation of a correlation of 200,000 independent pairs is 0.0022.
    for name, other in numbers.items():
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.01, name
    assert abs(np.corrcoef(base[:, :-1].ravel(), base[:, 1:].ravel())[0, 1]) < 0.01


def test_given_generators_continue_from_stream_to_stream() -> None:
    rngs, same = ([np.random.default_rng(seed) for seed in (1, 2)] for _ in range(2))
    draws = as_draws(rngs)
    assert isinstance(draws, GivenDraws)
    assert len(draws) == 2
    assert draws.flat(Stream.TOKENS, np.array([2, 3])).tolist() == [*same[0].random(2), *same[1].random(3)]
    assert draws.uniform(Stream.REGIONS, 2).tolist() == [rng.random(2).tolist() for rng in same]
    assert [rng.random() for rng in draws.each(Stream.EXAMPLE)] == [rng.random() for rng in same]
    assert [rng.random() for rng in draws.generators(Stream.PLACE)] == [rng.random() for rng in same]


def test_draws_stay_as_they_are() -> None:
    draws = KeyedDraws(1, 2, [3])
    assert as_draws(cast(Draws, draws)) is draws
