"""Goal: momentum is driven only where a group has it, and the values shown elsewhere are the groups' own.

Method: every kind of group at once, against both targets, with and without the settings that are switched off.
"""

import pytest

from flyball_server.core.momentum import driven, own
from flyball_server.core.types import Group

GROUPS = (
    Group("sgd", 0.1, 0.9),
    Group("switched off", 0.1, 0.0),
    Group("plain", 0.1),
    Group("adam", 0.1, None, (0.8, 0.999)),
    Group("adam, beta1 off", 0.1, None, (0.0, 0.9)),
    Group("both", 0.1, 0.7, (0.6, 0.999)),
    Group("both, momentum off", 0.1, 0.0, (0.6, 0.999)),
)


@pytest.mark.parametrize(
    ("target", "off", "values"),
    [
        ("momentum", False, (0.9, None, None, None, None, 0.7, None)),
        ("beta1", False, (0.9, None, None, 0.8, None, 0.7, None)),
        ("momentum", True, (0.9, 0.0, None, None, None, 0.7, 0.0)),
        ("beta1", True, (0.9, 0.0, None, 0.8, 0.0, 0.7, 0.0)),
    ],
)
def test_only_what_a_group_has_and_has_switched_on_is_driven(target, off, values):
    assert driven(GROUPS, target, off=off) == values


def test_what_is_switched_off_is_left_alone_unless_asked_for():
    assert driven(GROUPS, "beta1") == driven(GROUPS, "beta1", off=False)


def test_a_group_that_nobody_drives_shows_the_setting_it_was_attached_with():
    assert own(GROUPS) == (0.9, 0.0, None, 0.8, 0.0, 0.7, 0.0)


def test_no_groups_have_no_momentum():
    assert driven((), "momentum") == own(()) == ()
