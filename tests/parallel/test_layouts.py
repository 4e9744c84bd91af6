"""The chosen layouts have every combination of values that any layout has."""

from itertools import combinations

import pytest

from tests.parallel.layouts import ALL_AXES, DIMENSIONS, ROWS, covering, everything, name_of, size_of

FEW = {**DIMENSIONS, "schedule": ("1f1b", "zb_v"), "model": ("llama",), "recompute": ("none",), "pp": (1, 4)}


def combined(layouts, strength):
    ordered = ({name: layout[name] for name in DIMENSIONS} for layout in layouts)
    return {together for layout in ordered for together in combinations(layout.items(), strength)}


@pytest.mark.parametrize("dimensions", [FEW, ALL_AXES], ids=["few", "all axes"])
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_is_there(dimensions, strength):
    chosen, every = covering(dimensions, strength), list(everything(dimensions))
    assert combined(chosen, strength) == combined(every, strength)
    assert all(layout in every for layout in chosen)
    assert combined(chosen[:-1], strength) != combined(every, strength), "the last one adds nothing"


def test_what_cannot_go_together_is_not_there():
    for layout in covering(DIMENSIONS, 2):
        assert 2 <= size_of(layout) <= 8
        assert layout["tp"] > 1 or not layout["sequence_parallel"]
        assert layout["shard"] * layout["replicate"] * layout["micros"] <= ROWS


def test_every_value_of_every_dimension_is_possible():
    assert combined(covering(DIMENSIONS, 2), 1) == {((name, one),) for name in DIMENSIONS for one in DIMENSIONS[name]}


def test_all_axes_are_eight_ranks():
    assert {size_of(layout) for layout in everything(ALL_AXES)} == {8}


def test_names_tell_layouts_apart():
    names = [name_of(layout) for layout in everything(FEW)]
    assert len(set(names)) == len(names)
    assert (
        name_of(covering(ALL_AXES, 1)[0]) == "llama pp2 shard2 tp2 micros1 gpipe sequence_parallel recompute-none zero1"
    )
