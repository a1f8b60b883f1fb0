"""ftlab.publish: badges and install lines for a repository, twice the same, and nothing else touched."""

import copy
import json
import re
import tomllib

import pytest

from ftlab import publish

ROOT = publish.NOTEBOOKS.parent
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}


@pytest.mark.parametrize("file", NOTEBOOKS)
def test_a_notebook_begins_with_its_title_and_installs_itself_on_colab(file):
    cells = NOTEBOOKS[file]["cells"]
    repository = re.search(r"github\.com/([\w.-]+/[\w.-]+)\"$", "".join(cells[1]["source"]))[1]
    assert (cells[0]["cell_type"], cells[1]["id"]) == ("markdown", "colab")
    assert "".join(cells[1]["source"]) == publish.CELL.replace("OWNER/NAME", repository)


@pytest.mark.parametrize("file", NOTEBOOKS)
def test_the_address_goes_into_two_cells_only_and_replaces_the_last_one(file):
    before = NOTEBOOKS[file]
    first = publish.address(copy.deepcopy(before), file, "some-one/ft.course")
    again = publish.address(publish.address(copy.deepcopy(before), file, "other/name"), file, "some-one/ft.course")
    assert again == first
    title, install = ("".join(cell["source"]) for cell in first["cells"][:2])
    badge = f"(https://colab.research.google.com/github/some-one/ft.course/blob/main/notebooks/{file})"
    assert title.count(badge) == title.count("colab-badge") == 1
    assert install.count("git+https://github.com/some-one/ft.course") == 1 and "OWNER" not in install
    assert first["cells"][2:] == before["cells"][2:] and first["metadata"] == before["metadata"]
    assert title.splitlines()[0] == "".join(before["cells"][0]["source"]).splitlines()[0]


@pytest.mark.parametrize("repository", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", 'a/b"; import os'])
def test_what_is_no_repository_is_refused(repository):
    notebook = copy.deepcopy(next(iter(NOTEBOOKS.values())))
    with pytest.raises(ValueError, match="wanted owner/name"):
        publish.address(notebook, "x.ipynb", repository)
    assert notebook == next(iter(NOTEBOOKS.values()))


def test_a_notebook_without_the_cell_is_named():
    with pytest.raises(ValueError, match=r"x\.ipynb: wanted .*'colab'"):
        publish.address({"cells": [{"id": "title", "source": ["# Title"]}]}, "x.ipynb", "a/b")


def test_the_command_writes_every_notebook(tmp_path, monkeypatch, capsys):
    for file, notebook in NOTEBOOKS.items():
        (tmp_path / file).write_text(json.dumps(notebook), encoding="utf-8")
    monkeypatch.setattr(publish, "NOTEBOOKS", tmp_path)
    publish.main(["a/b"])
    assert capsys.readouterr().out.split() == list(NOTEBOOKS)
    for path in tmp_path.iterdir():
        assert path.read_text(encoding="utf-8").count("github/a/b/blob/main/notebooks/" + path.name) == 1
    with pytest.raises(SystemExit, match="usage"):
        publish.main([])


def test_what_is_installed_on_colab_is_all_that_the_notebooks_need():
    """The extra of the install line is the one that the lock file is made of, and the wheel carries the data."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = re.search(r'"ftlab\[(\w+)\]', publish.CELL)[1]
    assert f"--extra {extra} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert extra in project["project"]["optional-dependencies"]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"data": "ftlab/_data"}
