"""ftlab.publish: badges and install lines for a repository, twice the same, and nothing else touched."""

import copy
import json
import re
import shutil
import tomllib

import pytest

from ftlab import publish

ROOT = publish.NOTEBOOKS.parent
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}


def repository_of(notebook: dict) -> str:
    return re.search(r"github\.com/([\w.-]+/[\w.-]+)\"$", "".join(notebook["cells"][1]["source"]))[1]


@pytest.mark.parametrize("file", NOTEBOOKS)
def test_a_notebook_begins_with_its_title_and_installs_itself_on_colab(file):
    cells = NOTEBOOKS[file]["cells"]
    assert (cells[0]["cell_type"], cells[1]["id"]) == ("markdown", "colab")
    assert "".join(cells[1]["source"]) == publish.CELL.replace("OWNER/NAME", repository_of(NOTEBOOKS[file]))


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


def test_two_cells_by_hand():
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    notebook = {
        "cells": [
            {"id": "title", "source": ["# Title\n", "\n", f"{badge}(old)\n", "\n", "Words.\n", f"No {badge}"]},
            {"id": "import", "source": []},
            {"id": "colab", "source": ["old"]},
        ]
    }
    title, between, install = publish.address(notebook, "x.ipynb", "a/b")["cells"]
    address = "(https://colab.research.google.com/github/a/b/blob/main/notebooks/x.ipynb)"
    assert title["source"] == ["# Title\n", "\n", f"{badge}{address}\n", "\n", "Words.\n", f"No {badge}"]
    assert between["source"] == []
    assert install["source"][2:] == [
        "\n",
        'if "google.colab" in sys.modules:\n',
        '    %pip install --quiet "ftlab[all] @ git+https://github.com/a/b"',
    ]


@pytest.mark.parametrize("repository", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", 'a/b"; import os'])
def test_what_is_no_repository_is_refused(repository):
    notebook = copy.deepcopy(next(iter(NOTEBOOKS.values())))
    with pytest.raises(ValueError, match="wanted owner/name"):
        publish.address(notebook, "x.ipynb", repository)
    assert notebook == next(iter(NOTEBOOKS.values()))


@pytest.mark.parametrize("cells", [{"title": "# Title"}, {"title": "Title", "colab": ""}, {"title": "#", "colab": ""}])
def test_a_notebook_without_the_cell_or_the_title_is_named(cells):
    notebook = {"cells": [{"id": id, "source": [source]} for id, source in cells.items()]}
    with pytest.raises(ValueError, match=r"x\.ipynb: wanted .*'# '.*'colab'"):
        publish.address(notebook, "x.ipynb", "a/b")


def test_the_command_writes_every_notebook(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("no notebook", encoding="utf-8")
    for file in NOTEBOOKS:
        shutil.copy(ROOT / "notebooks" / file, tmp_path)
    monkeypatch.setattr(publish, "NOTEBOOKS", tmp_path)
    publish.main(["a/b"])
    assert capsys.readouterr().out.split() == list(NOTEBOOKS)
    for file in NOTEBOOKS:
        before, after = ((folder / file).read_text(encoding="utf-8") for folder in (ROOT / "notebooks", tmp_path))
        assert after.count(f"github/a/b/blob/main/notebooks/{file}") == 1
        beyond = before.split("\n  },\n", 2)[2]  # all that follows the second cell
        assert len(beyond) > 1000 and after.endswith(beyond), "written as it was, to the last character"
    with pytest.raises(SystemExit, match="usage"):
        publish.main(["a/b", "c/d"])


def test_what_is_installed_on_colab_is_all_that_the_notebooks_need():
    """The extra of the install line is the one that the lock file is made of, and the wheel carries the data."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = re.search(r'"ftlab\[(\w+)\]', publish.CELL)[1]
    assert f"--extra {extra} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert extra in project["project"]["optional-dependencies"]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"data": "ftlab/_data"}


def test_a_widget_leaves_its_page_or_nothing():
    view, html, plain = {publish.VIEW: {"model_id": "1"}}, {"text/html": "<p>1</p>"}, {"text/plain": "1"}
    outputs = [{"data": view | html | plain}, {"data": view | plain}, {"data": dict(plain)}, {"text": ["1"]}]
    notebook = {"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}]}
    once = publish.still(copy.deepcopy(notebook))
    assert once["cells"][1]["outputs"] == [{"data": html | plain}, {"data": plain}, {"text": ["1"]}]
    assert publish.still(copy.deepcopy(once)) == once
