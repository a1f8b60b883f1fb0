"""README says what was measured, and `make bench` measures all of it."""

import json
import re

import pytest
from scripts import ROOT, script

SHARED = {"harness", "report"}
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED)


@pytest.fixture(scope="module")
def report():
    return script("bench/report.py")


def test_readme_says_what_was_measured(report):
    text = (ROOT / "README.md").read_text("utf-8")
    assert report.readme(text) == text, "run python bench/report.py"


def test_a_stale_figure_in_readme_is_seen(report):
    text = (ROOT / "README.md").read_text("utf-8")
    line = next(line for line in report.measured().splitlines() if re.search(r"\d", line))
    assert report.readme(text.replace(line, re.sub(r"\d", "7", line) + "7")) == report.readme(text)
    line, figures = "| [00 A](notebooks/a.ipynb) | why? | 9 | 9 |", {"seconds": 90, "peak_bytes": 2.5e9}
    for native, star in ((True, ""), (False, "*")):
        assert report.row(line, {"a": {**figures, "native_bf16": native}}) == (
            f"| [00 A](notebooks/a.ipynb) | why? | 1.5{star} | 2.5 |"
        )


def test_make_bench_runs_every_script_and_each_has_its_line(report):
    recipe = re.search(r"for script in (.*); do \$\(BIN\)/python bench", (ROOT / "Makefile").read_text("utf-8"))
    assert sorted(recipe[1].split()) == SCRIPTS == sorted(one.__name__ for one in report.BENCHMARKS)


def test_notebooks_are_measured_as_make_nbval_runs_them():
    assert " ".join(script("bench/harness.py").NBVAL) in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.parametrize("file", sorted((ROOT / "data" / "results" / "bench").glob("*.json")), ids=lambda f: f.stem)
def test_a_result_has_its_script_and_says_on_what_it_was_measured(file):
    assert file.stem in SCRIPTS
    said = json.loads(file.read_text("utf-8"))["environment"]
    assert said["versions"]["torch"] and said["hardware"]["cores"] and said["processor"]
