"""tools/publish.py: badges and install lines for a repository, twice the same, and nothing else touched."""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from importlib.metadata import PackageNotFoundError

import pytest
from scripts import script

publish, report = script("tools/publish.py"), script("bench/report.py")
ROOT = publish.NOTEBOOKS.parent
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}


def test_every_notebook_begins_with_its_title_and_installs_itself_on_colab():
    for file, notebook in NOTEBOOKS.items():
        title, install = notebook["cells"][:2]
        source = "".join(install["source"])
        repository = re.search(r"^REPOSITORY = \"([\w./-]*)\"", source, re.MULTILINE)[1]
        assert (title["cell_type"], install["id"]) == ("markdown", "colab"), file
        assert source == publish.install(repository), file


def test_no_notebook_and_no_readme_shows_a_learner_an_address_that_is_none():
    for path in [ROOT / "README.md", *sorted(ROOT.glob("notebooks/*.ipynb"))]:
        assert not re.search(r"OWNER|\bNAME\b", path.read_text(encoding="utf-8")), path.name


COLAB = """
import builtins, sys, types
from IPython.core.interactiveshell import InteractiveShell
sys.modules["google.colab"] = types.ModuleType("google.colab")
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print("pip", line), magic_name="pip")
shell.system = lambda line: print("shell", line.split()[0])
builtins.input = lambda words: print("asked", words) or TYPED
result = shell.run_cell(CODE)
print("raised", repr(result.error_in_exec))
"""


def on_colab(code: str, typed: str = "") -> str:
    """What the install cell does where google.colab is there and somebody types this, without pip and a shell."""
    script = COLAB.replace("TYPED", repr(typed)).replace("CODE", repr(code))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("repository", "typed"), [("a-b/c.d", ""), ("", "a-b/c.d"), ("", " a-b/c.d ")])
def test_on_colab_the_course_is_installed_from_the_address_in_the_cell_or_else_from_what_is_typed(repository, typed):
    said = on_colab(publish.install(repository), typed)
    assert 'pip install --quiet "ftlab[colab] @ git+https://github.com/a-b/c.d"' in said
    assert ("asked" in said) == (not repository) and "raised None" in said and said.count("shell") == 3


@pytest.mark.parametrize("typed", ["", "a", "https://github.com/a/b", 'a/b"; rm -rf ~', "a/b c"])
def test_on_colab_without_an_address_one_line_says_what_to_do_and_nothing_is_run(typed):
    said = on_colab(publish.CELL, typed)
    assert "raised SystemExit" in said and "type owner/name" in said
    assert "pip install" not in said and "shell" not in said


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
    assert 'REPOSITORY = "a/b"' in "".join(install["source"]) and 'REPOSITORY = ""' in publish.CELL


@pytest.mark.parametrize("repository", ["", "name", "a/b/c", "https://github.com/a/b", "a b/c", 'a/b"; import os'])
def test_what_is_no_repository_is_refused(repository):
    notebook = copy.deepcopy(next(iter(NOTEBOOKS.values())))
    with pytest.raises(ValueError, match="wanted owner/name"):
        publish.address(notebook, "x.ipynb", repository)
    assert notebook == next(iter(NOTEBOOKS.values()))


@pytest.mark.parametrize("cells", [{"title": "# Title"}, {"title": "Title", "colab": ""}, {"title": "#", "colab": ""}])
def test_a_notebook_without_the_cell_or_the_title_is_named(cells):
    notebook = {"cells": [{"id": id, "source": [source]} for id, source in cells.items()]}
    with pytest.raises(ValueError, match=r"x\.ipynb"):
        publish.address(notebook, "x.ipynb", "a/b")


def test_the_command_writes_two_cells_of_every_notebook_and_the_last_address_counts(tmp_path, monkeypatch, capsys):
    for file in NOTEBOOKS:
        shutil.copy(ROOT / "notebooks" / file, tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(publish, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    publish.main(["other/name"])
    publish.main(["a/b"])
    assert capsys.readouterr().out.split() == [*NOTEBOOKS, *NOTEBOOKS]
    for file in NOTEBOOKS:
        before, after = ((folder / file).read_text(encoding="utf-8") for folder in (ROOT / "notebooks", tmp_path))
        assert after.count(f"github/a/b/blob/main/notebooks/{file}") == 1 and "other/name" not in after
        before = json.dumps(publish.still(json.loads(before)), indent=1, ensure_ascii=False) + "\n"
        beyond = before.split("\n  },\n", 2)[2]  # all that follows the second cell
        assert len(beyond) > 1000 and after.endswith(beyond), "written as it was, to the last character"
    with pytest.raises(SystemExit, match="usage"):
        publish.main(["a/b", "c/d"])


def test_readme_leads_to_the_repository_its_tests_colab_and_the_web_edition():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("git clone ") <= 1 and text.count("![tests]") <= 1
    made = publish.readme(publish.readme(text, "before/this"), "An-Owner/name.x")
    assert "before/this" not in made and "before.github" not in made
    clone = "git clone https://github.com/An-Owner/name.x finetuning && cd finetuning"
    assert made.count(f"```bash\n{clone}\nmake lab") == made.count("git clone ") == 1
    tests = "https://github.com/An-Owner/name.x/actions/workflows/tests.yml"
    site = "https://an-owner.github.io/name.x/"
    assert made.count(f"[![tests]({tests}/badge.svg)]({tests}) [Read online]({site}) · ") == 1
    assert made.count(f"[memory calculator]({site}memory.html)\n\n![GPU: not required]") == 1
    for file in NOTEBOOKS:
        name = file.removesuffix(".ipynb")
        (row,) = (line for line in made.splitlines() if line.startswith(f"| [{file[:2]} "))
        assert row.count(f"](https://colab.research.google.com/github/An-Owner/name.x/blob/main/notebooks/{file})") == 1
        assert row.count(f"]({site}notebooks/{name}.html)") == 1 and row.count("|") == 5
    assert report.page(made) == made and publish.readme(made, "An-Owner/name.x") == made
    with pytest.raises(ValueError, match="wanted owner/name"):
        publish.readme(text, "a/b/c")


def test_what_is_installed_on_colab_is_an_extra_and_the_wheel_carries_the_data():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = re.search(r'"ftlab\[(\w+)\]', publish.CELL)[1]
    assert extra in project["project"]["optional-dependencies"]
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried == {"data": "ftlab/_data", "experiments": "ftlab/_experiments"}


def test_a_widget_leaves_its_page_or_nothing():
    view, html, plain = {publish.VIEW: {"model_id": "1"}}, {"text/html": "<p>1</p>"}, {"text/plain": "1"}
    waited = {"data": {"text/plain": []}}  # a line that counted, and is empty in the end
    outputs = [{"data": view | html | plain}, {"data": view | plain}, {"data": dict(plain)}, waited, {"text": ["1"]}]
    notebook = {"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}]}
    once = publish.still(copy.deepcopy(notebook))
    assert once["cells"][1]["outputs"] == [{"data": html | plain}, {"data": plain}, {"text": ["1"]}]
    assert publish.still(copy.deepcopy(once)) == once


def test_the_title_says_when_and_with_what_it_was_checked_and_how_long_it_takes_to_read(monkeypatch):
    def installed(name: str) -> str:
        if name == "axolotl":
            raise PackageNotFoundError(name)
        return {"trl": "1.14.2", "peft": "0.21.2"}[name]

    title = "# T\n\nReading time: 99 minutes. Checked in May 2020 with trl 0.1, peft 0.2 and axolotl 0.19.0.\n"
    cells = [
        {"cell_type": "markdown", "source": [title, "\n", "word " * 1781], "metadata": {}},
        {"cell_type": "code", "source": ["x = 1\n\n"] * 15, "metadata": {}},
        {"cell_type": "code", "source": ["x = 1\n"] * 900, "metadata": {"jupyter": {"source_hidden": True}}},
    ]
    monkeypatch.setattr(publish, "version", installed)
    made = publish.checked({"cells": cells}, "x.ipynb", date(2026, 11, 5))
    assert made["cells"][0]["source"][2] == (  # 1,800 words are 10 minutes, 15 lines of code in view are 1
        "Reading time: 10 minutes. Checked on 5 November 2026 with trl 1.14.2, peft 0.21.2 and axolotl 0.19.0.\n"
    )
    with pytest.raises(ValueError, match=r"x\.ipynb: wanted"):
        publish.checked({"cells": [{"cell_type": "markdown", "source": ["# T"]}]}, "x.ipynb", date(2026, 11, 5))


def test_every_notebook_says_so():
    for file, notebook in NOTEBOOKS.items():
        said = re.search(
            r"Reading time: (\d+) minutes.*Checked on \d+ \w+ \d{4} with", "".join(notebook["cells"][0]["source"])
        )
        assert said and int(said[1]) == publish.reading_minutes(notebook), file
