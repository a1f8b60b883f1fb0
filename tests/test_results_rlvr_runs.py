"""data/published/rlvr_runs.yaml: each public run has the same columns, a source and a day, and its sums are right."""

import datetime
import re

import yaml

from ftlab.paths import DATA
from notebooks import worked_out

RUNS = yaml.safe_load((DATA / "published" / "rlvr_runs.yaml").read_text(encoding="utf-8"))
COLUMNS = ["run", "model", "prompts", "answers", "steps", "compute", "gained", "source", "seen", "where"]


def test_each_run_has_every_column_and_says_where_it_was_read():
    assert 5 <= len(RUNS) <= 8 and len({run["run"] for run in RUNS}) == len(RUNS)
    for run in RUNS:
        assert list(run) == COLUMNS
        assert run["source"].startswith("https://") and run["where"] and run["seen"] >= datetime.date(2026, 11, 28)
        assert run["prompts"] or run["compute"], "a run of which nothing is known teaches nothing"


def test_what_follows_by_arithmetic():
    """GPUs times hours, as the entries say them."""
    said = " ".join(run["compute"] for run in RUNS)
    for sum, digits in (("512 * 198", -3), ("16 * 15", 0), ("64 * 1.5 * 24", 0)):
        assert re.search(rf"\b{round(worked_out(sum), digits):,.0f} GPU hours", said), sum
