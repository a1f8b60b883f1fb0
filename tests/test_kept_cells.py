"""The cells that readers called the best of their kind are still there: by notebook and id, as of f21bf8c.

Presence only. Paths, panels and wording may change; some cells of 09 may move to 12, and no other cell moves.
"""

import pytest

from notebooks import CELLS

KEPT = {
    ("01",): ["constrained", "retrieval", "reading"],
    ("02",): ["kept", "step-0"],
    ("03",): ["parity", "kept"],
    ("04",): [
        "optimum",
        "cancel-says",
        "cancel",
        "margin-says",
        "margin",
        "displacement",
        "reward-says",
        "hacking",
    ],
    ("05",): ["controls"],
    ("08",): ["templates-ids", "templates-wrong", "tools"],
    ("09", "12"): ["torchrun", "fsdp-says", "fsdp", "resumed", "traps-says", "traps", "time-picture"],
    ("10",): ["errors"],
}
PRESENT = {(name[:2], name.split("#")[1]) for name, cell in CELLS.items() if "".join(cell["source"]).strip()}


@pytest.mark.parametrize(("lessons", "cell"), [(lessons, cell) for lessons, cells in KEPT.items() for cell in cells])
def test_a_cell_that_must_not_be_lost_is_there(lessons, cell):
    assert any((lesson, cell) in PRESENT for lesson in lessons)
