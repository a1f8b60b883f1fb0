"""What .github/workflows asks for exists here: the targets of make, the files, the versions of Python."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def scripts(workflow: dict) -> str:
    return "\n".join(step.get("run", "") for step in steps(workflow))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_asks_for_what_is_here_and_may_no_more_than_it_needs(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    run = scripts(workflow)
    assert {name for line in re.findall(r"\bmake((?: [a-z0-9-]+\b(?!=))+)", run) for name in line.split()} <= targets
    named = re.findall(r"(?:python|pytest) ((?:tools|tests)/[\w./]+)", run)
    named += re.findall(r"'(ftlab/[\w./]+)'", path.read_text(encoding="utf-8"))
    assert all((ROOT / name).exists() for name in named), named
    assert workflow["permissions"]["contents"] == "read"
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())


def test_the_tests_run_on_every_python_that_the_package_allows():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, after = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    assert tried == [f"3.{minor}" for minor in range(int(first), int(after))]
    assert "make test" in scripts(workflow) and "make lint" in scripts(workflow)


def test_ci_runs_the_drift_and_the_parity_tests_against_the_newest_libraries():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text(encoding="utf-8"))
    run = scripts(workflow)
    assert "make unit TESTS=tests/parity" in run
    assert "tests/drift.py" in run
    assert set(re.search(r"--upgrade (.+)", run)[1].split()) >= {"trl", "transformers", "peft"}
