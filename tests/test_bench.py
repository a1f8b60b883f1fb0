"""README and CONTRIBUTING say what was measured, `make bench` measures all of it, `make gpu` what needs a GPU."""

import ast
import json
import re
from pathlib import Path

import pytest
from scripts import ROOT, script

SHARED = {"harness", "report", "gpu"}  # gpu: make gpu
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED)


@pytest.fixture(scope="module")
def report():
    return script("bench/report.py")


def test_both_pages_say_what_was_measured(report):
    for file in report.PAGES:
        text = file.read_text("utf-8")
        assert report.page(text) == text, "run python bench/report.py"


def test_a_stale_figure_is_seen(report):
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    line = next(line for line in report.measured().splitlines() if re.search(r"\d", line))
    assert report.page(text.replace(line, re.sub(r"\d", "7", line) + "7")) == report.page(text) == text
    line, figures = "| [00 A](notebooks/a.ipynb) | why? | 9 | 9 |", {"seconds": 90, "peak_bytes": 2.5e9}
    for native, star in ((True, ""), (False, "*")):
        assert report.row(line, {"a": {**figures, "native_bf16": native}}) == (
            f"| [00 A](notebooks/a.ipynb) | why? | 1.5{star} | 2.5 |"
        )


def test_no_notebook_was_measured_to_take_much_longer_than_its_first_cell_says():
    course = script("bench/course.py")
    measured = json.loads((ROOT / "bench" / "results" / "course.json").read_text("utf-8"))["measured"]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert measured[notebook.stem]["seconds"] < 1.25 * course.promised(notebook), notebook.stem


def test_make_bench_runs_every_script_and_each_has_its_line(report):
    recipe = re.search(r"for script in (.*); do \$\(BIN\)/python bench", (ROOT / "Makefile").read_text("utf-8"))
    assert sorted(recipe[1].split()) == SCRIPTS == sorted(one.__name__ for one in report.BENCHMARKS)


def test_notebooks_are_measured_as_make_nbval_runs_them():
    assert " ".join(script("bench/harness.py").NBVAL) in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda f: f.stem)
def test_a_result_has_its_script_and_says_on_what_it_was_measured(file):
    assert file.stem in SCRIPTS
    said = json.loads(file.read_text("utf-8"))["environment"]
    assert said["versions"]["torch"] and said["hardware"]["cores"] and said["processor"]


def test_two_parts_of_make_gpu_on_tiny_shapes(tmp_path, monkeypatch):
    """Without a GPU: real bitsandbytes, real answers, and the records that a GPU would leave. All in this process."""
    gpu = script("bench/gpu.py")
    assert gpu.harness.alone(divmod, 7, 2) == (3, 1)
    monkeypatch.setattr(gpu.harness, "alone", lambda function, *arguments: function(*arguments))
    gpu.main(["nf4", "answers", "--tiny", "--to", str(tmp_path)])
    records = {file.stem: json.loads(file.read_text("utf-8")) for file in tmp_path.glob("*.json")}
    assert records.keys() == {"nf4", "answers"} and "bench/gpu.py" in (ROOT / "Makefile").read_text("utf-8")
    for record in records.values():
        assert record["tiny"] and not record["left_out"] and record["environment"]["versions"]["torch"]
        assert record["cases"] and not any("failed" in case for case in record["cases"].values())
    assert records["nf4"]["cases"]["64 x 128, double False"]["weights_equal"]


def test_all_of_make_gpu_takes_at_most_nine_minutes():
    source = ast.parse((ROOT / "bench" / "gpu.py").read_text("utf-8"))
    (seconds,) = (ast.literal_eval(node.value) for node in source.body if "SECONDS" in ast.unparse(node)[:8])
    assert sum(seconds.values()) <= 9 * 60


def test_flake_runs_a_copy_of_the_notebooks_that_finds_its_data(tmp_path):
    flake = script("bench/flake.py")
    orders = [flake.notebooks(seed, tmp_path / str(seed)) for seed in (0, 1)]
    for seed, arguments in enumerate(orders):
        copies = [Path(each) for each in arguments if each.endswith(".ipynb")]
        assert len(copies) == 12 and {c.parent for c in copies} == {tmp_path / str(seed) / "elsewhere"}
        assert all(c.is_file() and (c.parent / "../data/ask/train.jsonl").is_file() for c in copies)
    assert [Path(each).name for each in orders[0]] != [Path(each).name for each in orders[1]]
