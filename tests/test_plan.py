"""Plans: what they say of a table, what they refuse, and that files and pictures show the same."""

import copy
import json
import pickle
import struct
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.figure import Figure

from dqar_fx.errors import PlanError
from dqar_fx.plan import Plan

unhurried = settings(deadline=None)  # a busy machine is no failure


@st.composite
def tables(draw: st.DrawFn) -> npt.NDArray[np.bool_]:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
    table = draw(hnp.arrays(np.bool_, shape))
    table[0] = False
    return table


def table(*rows: str) -> npt.NDArray[np.bool_]:
    return np.array([[character == "#" for character in row] for row in rows])


EXAMPLE = table(
    "...",
    "...",
    "#..",
    "##.",
    ".#.",
    "##.",
)


def test_the_numbers_of_an_example() -> None:
    plan = Plan(EXAMPLE)
    assert (plan.num_steps, plan.num_sites) == (6, 3)
    assert plan.reuse_ratio == 6 / 18
    assert plan.age.T.tolist() == [[0, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3], [0] * 6]
    assert plan.stores.T.tolist() == [
        [False, True, False, False, True, False],
        [False, False, True, False, False, False],
        [False] * 6,
    ]
    assert [[plan.reason(step, site) for step in range(6)] for site in range(3)] == [
        ["warmup", "warmup", "reuse", "reuse", "stale", "reuse"],
        ["warmup", "warmup", "schedule", "reuse", "reuse", "reuse"],
        ["warmup", "warmup", "schedule", "schedule", "schedule", "schedule"],
    ]


@unhurried
@given(tables())
def test_ages_and_stores_follow_from_playing_the_plan_through(reuse: npt.NDArray[np.bool_]) -> None:
    plan = Plan(reuse)
    stored_at: dict[int, int] = {}
    read = set()
    for step, row in enumerate(reuse):
        for site, reused in enumerate(row):
            if reused:
                read.add((stored_at[site], site))
                assert plan.age[step, site] == step - stored_at[site] > 0
            else:
                stored_at[site] = step
                assert plan.age[step, site] == 0
    assert set(zip(*np.nonzero(plan.stores), strict=True)) == read
    assert not (plan.stores & plan.reuse).any()


@unhurried
@given(tables())
def test_every_reason_is_what_its_definition_says(reuse: npt.NDArray[np.bool_]) -> None:
    plan = Plan(reuse)
    for step in range(plan.num_steps):
        for site in range(plan.num_sites):
            if reuse[step, site]:
                expected = "reuse"
            elif not reuse[: step + 1].any():
                expected = "warmup"
            elif reuse[step - 1, site]:
                expected = "stale"
            else:
                expected = "schedule"
            assert plan.reason(step, site) == expected


@pytest.mark.parametrize(("step", "site"), [(-1, 0), (6, 0), (0, -1), (0, 3)])
def test_there_is_no_reason_outside_of_the_plan(step: int, site: int) -> None:
    with pytest.raises(PlanError, match=r"Steps go from 0 to 5, sites from 0 to 2\."):
        Plan(EXAMPLE).reason(step, site)


def test_a_plan_cannot_be_changed_and_does_not_change_with_the_array_it_was_made_from() -> None:
    mine = EXAMPLE.copy()
    plan = Plan(mine)
    mine[3, 2] = True
    assert plan == Plan(EXAMPLE)
    for array in (plan.reuse, plan.age, plan.stores):
        with pytest.raises(ValueError, match="read-only"):
            array[1, 1] = 1
    with pytest.raises(FrozenInstanceError):
        plan.reuse = mine  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_copies_are_equal_and_read_only_too(twin_of: Any) -> None:
    plan = Plan(EXAMPLE, "origin")
    assert plan.age is plan.age  # cached, and no hindrance to copying
    twin = twin_of(plan)
    assert twin == plan
    assert twin.schedule == "origin"
    assert not twin.reuse.flags.writeable


def test_plans_are_equal_by_their_table() -> None:
    assert Plan(EXAMPLE, "one origin") == Plan(EXAMPLE.tolist(), "another")
    assert len({Plan(EXAMPLE), Plan(EXAMPLE, "text"), Plan(EXAMPLE[:5])}) == 2
    # the same bytes in another shape are another plan
    assert Plan(np.zeros((2, 3), dtype=bool)) != Plan(np.zeros((3, 2), dtype=bool))
    assert Plan(EXAMPLE) != "a plan"


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (
            table("...#", "####"),
            r"Plan\.reuse\[0\] reuses at sites \[3\]: step 0 has nothing stored yet\. Set row 0 to",
        ),
        (np.zeros((3, 2)), r"dtype float64, not bool\. Convert it with astype\(bool\)"),
        ([[0, 1]], r"dtype int64, not bool"),
        (np.zeros(3, dtype=bool), r"shape \(3,\)\. It must be \[steps, sites\]"),
        (np.zeros((0, 3), dtype=bool), r"shape \(0, 3\)\..* at least one of each"),
        (np.zeros((3, 0), dtype=bool), r"shape \(3, 0\)"),
        ([[False], [False, True]], r"not a table .*Give every step the same number of sites"),
    ],
)
def test_tables_that_are_refused(reuse: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(reuse)


def test_a_plan_stands_in_for_a_schedule_where_it_fits() -> None:
    plan = Plan(EXAMPLE)
    assert plan.plan(3) is plan
    assert plan.plan(num_sites=3, num_steps=6) is plan
    with pytest.raises(PlanError, match=r"for 3 sites and 6 steps, but the run has 28 sites and 6 steps"):
        plan.plan(28)
    with pytest.raises(PlanError, match=r"for 3 sites and 6 steps, but the run has 3 sites and 50 steps\. .*Schedule"):
        plan.plan(3, 50)


def test_text_groups_the_sites_that_do_the_same() -> None:
    plan = Plan(table("....", "##..", "##..", "....", "##.."), "custom")
    assert str(plan) == (
        "5 steps x 4 sites, 30.0% reused\n0-1 +##+#\n2-3 .....\n. compute  + compute and store  # reuse"
    )
    assert repr(plan) == "<Plan: 5 steps, 4 sites, 30.0% reused, schedule='custom'>"
    assert str(Plan(EXAMPLE)).splitlines()[1:4] == ["0 .+##+#", "1 ..+###", "2 ......"]


@unhurried
@given(tables(), st.none() | st.text())
def test_files_read_back(tmp_path_factory: pytest.TempPathFactory, reuse: npt.NDArray[np.bool_], text: Any) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    loaded = Plan.load(Plan(reuse, text).save(path))
    assert loaded == Plan(reuse)
    assert loaded.schedule == text


def test_files_can_be_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert Plan(EXAMPLE, "custom").save(str(path)) == path
    assert path.read_text().splitlines()[-8:-2] == [
        '    "...",',
        '    "...",',
        '    "#..",',
        '    "##.",',
        '    ".#.",',
        '    "##."',
    ]


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    link = tmp_path / "link.json"
    link.symlink_to(path)
    Plan(EXAMPLE).save(path)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            Plan(EXAMPLE[:2]).save(path)
    assert Plan.load(path) == Plan(EXAMPLE)
    Plan(EXAMPLE[:3]).save(link)
    assert Plan.load(path) == Plan(EXAMPLE[:3])
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]  # nothing else is left behind


DOCUMENT = {
    "format": "dqar_fx.plan",
    "version": 1,
    "schedule": None,
    "num_steps": 2,
    "num_sites": 2,
    "reuse": ["..", "#."],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r'no "format": "dqar_fx\.plan"\. Write plans with Plan\.save'),
        ({"version": 2}, r"has version 2, and this dqar_fx reads up to 1\. Update"),
        ({"version": True}, r'"version" is True'),
        ({"version": 0}, r'"version" is 0'),
        ({"schedule": 3}, r'"schedule" is 3'),
        ({"reuse": []}, r'"reuse" must be a list with one string'),
        ({"reuse": "..#"}, r'"reuse" must be a list'),
        ({"reuse": [[0, 1]]}, r'"reuse" must be a list'),
        ({"reuse": ["..", "#x"]}, r"\"reuse\"\[1\] holds \['x'\]"),
        ({"reuse": ["..", "#"]}, r'"reuse"\[1\] has 1 sites, but "reuse"\[0\] has 2'),
        ({"reuse": ["#.", ".."]}, r"reuse\[0\] reuses at sites \[0\]"),
        ({"reuse": ["", ""], "num_sites": 0}, r"shape \(2, 0\)"),
        ({"num_steps": 3}, r'"num_steps" is 3, but "reuse" has 2'),
        ({"num_sites": None}, r'"num_sites" is None, but "reuse" has 2'),
    ],
)
def test_damaged_documents_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(DOCUMENT))
    assert Plan.load(path) == Plan(table("..", "#."))
    path.write_text(json.dumps(DOCUMENT | change))
    with pytest.raises(PlanError, match=rf"mine\.json is not a plan that can be read: .*{message}"):
        Plan.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_document_is_refused_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"mine\.json is not a plan that can be read"):
        Plan.load(path)


def test_a_missing_file_is_an_os_error_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent.json")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_picture_has_the_size_asked_for_and_shows_every_cell(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plan = Plan(EXAMPLE)
    path = plan.plot(tmp_path / "plan.png", size=(6, 4), dpi=80)
    assert path == tmp_path / "plan.png"
    assert png_size(tmp_path / "plan.png") == (480, 320)
    pixels = imread(tmp_path / "plan.png")
    assert pixels.shape[:2] == (320, 480)
    seen = {tuple(np.round(colour[:3] * 255).astype(int).tolist()) for colour in pixels.reshape(-1, pixels.shape[-1])}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xE6, 0xE6, 0xE6)} <= seen


@pytest.mark.parametrize("shape", [(1, 1), (50, 28), (200, 114)])
def test_plans_of_any_size_can_be_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    reuse = np.ones(shape, dtype=bool)
    reuse[0] = False
    Plan(reuse).plot(tmp_path / "plan.png", dpi=40)
    assert png_size(tmp_path / "plan.png") == (360, 200)


def test_without_a_path_the_figure_comes_back() -> None:
    figure = Plan(EXAMPLE, "its schedule").plot()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "its schedule\n33.3% of 6 x 3 attentions reused, at most 3 steps old"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "compute 50.0%",
        "compute and store 16.7%",
        "reuse 33.3%",
    ]
    titled = Plan(EXAMPLE).plot(title="mine")
    assert isinstance(titled, Figure)
    assert titled.axes[0].get_title(loc="left").startswith("mine\n")
