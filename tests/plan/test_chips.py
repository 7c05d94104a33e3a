"""Chips and topologies: what their makers state, what a command line may name, links that a group can use."""

from __future__ import annotations

import pytest

from rave_jax.config import ConfigError
from rave_jax.plan.chips import CHIPS, links, parse_topology


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_facts_of_a_chip_are_those_of_its_page(chip) -> None:
    """The pages state TFLOP/s, GB/s of HBM, GB/s of all links in both directions, for a whole chip."""
    stated = {"v5e": (197, 819, 400), "v5p": (459, 2765, 1200), "v6e": (918, 1600, 800), "tpu7x": (2307, 7380, 1200)}
    flops, hbm, ici = stated[chip.name]
    assert chip.flops * chip.devices == flops * 1e12
    assert chip.hbm_bandwidth * chip.devices == hbm * 1e9
    assert 2 * 2 * chip.axes * chip.link_bandwidth * chip.devices == ici * 1e9
    assert parse_topology(chip.example).name == chip.example


def test_a_topology_is_named_by_chip_and_shape() -> None:
    topology = parse_topology("v5e:16x16", slices=2)
    assert (topology.chip.name, topology.shape, str(topology)) == ("v5e", (16, 16), "2 slices of v5e:16x16")


@pytest.mark.parametrize(
    ("text", "slices", "says"),
    [
        ("v9:4x4", 1, "--topology is 'v9:4x4', expected CHIP:SHAPE with one of the chips v5e (as v5e:16x16), v5p"),
        ("v5e", 1, "--topology is 'v5e', expected a shape of 2 sizes, as v5e:16x16"),
        ("v5e:4x0", 1, "--topology is 'v5e:4x0', expected a shape of 2 sizes"),
        ("v5p:4x4", 1, "chips of v5p lie in 3 dimensions: expected a shape as v5p:4x4x4"),
        ("v5e:4x4", 0, "--slices is 0, expected at least 1"),
        ("v5e:16x16", 10_000, "10000 slices of v5e:16x16 have 2,560,000 devices, expected at most 131,072"),
    ],
)
def test_what_is_no_topology_is_refused_by_its_flag(text: str, slices: int, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_topology(text, slices)
    assert says in str(refused.value)


def test_a_group_uses_the_links_of_the_dimensions_in_which_it_lies() -> None:
    row = [(x, 3, 0) for x in range(4)]
    assert links(row, (16, 16)) == 2
    assert links([(x, y, 0) for x in range(4) for y in range(4)], (16, 16)) == 4
    assert links([(0, 0, 0), (1, 0, 0)], (2, 2)) == 1, "two chips have one link"
