"""What a calibrated plan is held to before it is used."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from dqar_fx import Plan
from dqar_fx.calibration.binding import check_shapes, shapes_of
from dqar_fx.graph.sites import Site


def test_only_sizes_that_are_known_to_differ_are_warned_about() -> None:
    site = Site(0, "attn", "self", "", ("a",), ((2, 16, 128),), heads=4)
    plan = Plan(np.zeros((3, 1), dtype=bool), "calibrated", {"shapes": shapes_of([site])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_shapes(plan, [site])
        check_shapes(plan, [replace(site, shapes=((4, 16, 128),))])  # another batch
        check_shapes(plan, [replace(site, shapes=((2, "s7", 128),))])  # left open
    for other in ((2, 64, 128), (2, 16)):
        with pytest.warns(UserWarning, match="calibrated at another size"):
            check_shapes(plan, [replace(site, shapes=(other,))])
