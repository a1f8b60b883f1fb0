"""JupyterLab started for real and a browser that shows it, watched: what is asked from where, and what goes wrong.

The browser is Debian's Chromium (`apt-get install chromium`), driven by Playwright. Where one of them is missing these
tests are skipped, and the end of the run says so. With E2E_SHOTS=folder the tests leave pictures, to be looked at.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

if find_spec("playwright"):
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium")
MISSING = [name for name, found in (("Chromium", CHROMIUM), ("Playwright", find_spec("playwright"))) if not found]
SECONDS = 1000  # Playwright counts in milliseconds
PATIENCE = 120 * SECONDS  # for one thing to happen on a machine that is busy with others
# what the copy of the repository has besides notebooks
COPIED = ("Makefile", "README.md", "data", "experiments", "jupyter", "tools")
FAILED = re.compile(r"Traceback \(most|NameError: ")  # ftlab tells of a cell that was not run in one line


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"{' and '.join(MISSING)} not found"))


def pytest_terminal_summary(terminalreporter) -> None:
    if MISSING:
        terminalreporter.section("NOT TESTED IN A BROWSER", red=True, bold=True)
        terminalreporter.line(f"{' and '.join(MISSING)} not found: tests/e2e did not run. apt-get install chromium")


class Lab:
    """What `make lab` starts in a copy of the repository, with a home, settings and progress of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.progress = folder, folder / "repository", folder / "progress.sqlite"
        self.notebooks = self.root / "notebooks"  # as they were committed
        self.my = self.root / "my"  # the learner's copies, which `make lab` makes
        self.temporary = folder / "tmp"  # where notebooks write
        for made in (self.root, self.notebooks, self.temporary, folder / "home"):
            made.mkdir()
        for source in ROOT.glob("notebooks/*.ipynb"):
            shutil.copy(source, self.notebooks)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.root / name)
        self.log = (folder / "jupyterlab.log").open("w")
        self._token = secrets.token_hex(16)
        options = "--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port=0"
        command = ["make", "--assume-old=.venv/ready", f"BIN={Path(sys.executable).parent}", f"LAB={options}", "lab"]
        self._process = subprocess.Popen(
            command, cwd=self.root, env=self._environment(), stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._runtime = folder / "runtime"
        self.url = self._wait_for_url()

    def _environment(self) -> dict[str, str]:
        """The environment without what belongs to the user, but with the cache that holds the converted model."""
        from ftlab.paths import CACHE

        theirs = re.compile(r"JUPYTER|JPY|IPYTHON|XDG_|FTLAB|MAKE|MFLAGS|GOMP_|UNSLOTH")
        kept = {key: value for key, value in os.environ.items() if not theirs.match(key)}
        own = {"HOME": "home", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "TMPDIR": "tmp",
               "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings"}  # fmt: skip
        return {**kept, **{key: str(self.folder / name) for key, name in own.items()}, "FTLAB_CACHE": str(CACHE),
                "FTLAB_PROGRESS": str(self.progress), "JUPYTER_TOKEN": self._token}  # fmt: skip

    def _wait_for_url(self) -> str:
        for _ in range(3000):
            for found in self._runtime.glob("jpserver-*.json"):
                if text := found.read_text():
                    return json.loads(text)["url"]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"JupyterLab did not start:\n{Path(self.log.name).read_text()}")

    def theme(self, name: str) -> None:
        """Pages that are opened from now on are "Light" or "Dark"."""
        file = self.folder / "settings" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"theme": f"JupyterLab {name}"}))

    def first(self) -> str:
        """The address that a browser would have been sent to."""
        (page,) = self._runtime.glob("jpserver-file-to-run-*-open.html")
        return re.search(r'href="([^"]+)"', page.read_text())[1]

    def fresh(self, notebook: str) -> None:
        """Makes the learner's copy again, as the first `make lab` does."""
        (self.my / f"{notebook}.ipynb").unlink()
        command = [sys.executable, "tools/copies.py"]
        subprocess.run(command, cwd=self.root, env=self._environment(), check=True)

    def address(self, notebook: str, folder: str = "my") -> str:
        """Where a notebook is to be seen, in a workspace of its own that begins as a learner's does."""
        name = secrets.token_hex(4)
        workspace = json.loads((ROOT / "jupyter" / "workspace.json").read_text()) | {"metadata": {"id": name}}
        self._ask("PUT", f"lab/api/workspaces/{name}", json.dumps(workspace).encode())
        return f"{self.url}lab/workspaces/{name}/tree/{folder}/{notebook}.ipynb?token={self._token}"

    def stop_kernels(self) -> None:
        """Ends the kernels, so that a test finds a fresh one, and the memory of the one before."""
        for kernel in json.loads(self._ask("GET", "api/kernels")):
            self._ask("DELETE", f"api/kernels/{kernel['id']}")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = Request(self.url + path, body, {"Authorization": f"token {self._token}"}, method=method)
        with urlopen(request, timeout=PATIENCE / SECONDS) as answer:
            return answer.read()

    def stop(self) -> None:
        self._process.terminate()  # make tells the server, and waits for it
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.log.close()


class Watch:
    """What a browser's pages asked of anybody but the server, and what they complained of. Outside is not reached."""

    def __init__(self, context: "BrowserContext", server: str) -> None:
        host = re.escape(server.partition("://")[2])
        # what the server would fetch from outside counts as asked of others
        self._inside = re.compile(rf"^((http|ws)://{host}(?!lab/api/(news|update))|data:|blob:)")
        self.server, self.requests, self.outside, self.errors = server, 0, [], []
        context.route(lambda url: not self._inside.match(url), lambda route: route.abort())
        context.on("request", lambda request: self._asked(request.url))
        context.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("page", lambda page: page.on("websocket", lambda socket: self._asked(socket.url)))

    def _asked(self, url: str) -> None:
        self.requests += 1
        if not self._inside.match(url):
            self.outside.append(url)


class Notebook:
    """The notebook that a page shows. Cells are named by their ids, as in the file."""

    def __init__(self, page: "Page", file: Path) -> None:
        self.page, self.file = page, file
        self._shown = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")
        self.ids = [cell["id"] for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]]

    def cell(self, id: str) -> "Locator":
        return self._shown.locator(f'.jp-Cell[data-windowed-list-index="{self.ids.index(id)}"]')

    def output(self, id: str) -> "Locator":
        return self.cell(id).locator(".jp-Cell-outputArea")

    def run(self, *ids: str, patience: float = PATIENCE) -> None:
        """Runs these cells one after the other, each to its end; AssertionError, with the traceback, if one fails."""
        for id in ids:
            self.cell(id).locator(".jp-InputPrompt").click()
            self.page.keyboard.press("Control+Enter")
            self._finished(self.cell(id), patience)

    def run_all(self, patience: float) -> None:
        """Run, Run All Cells, and all of them to their ends; AssertionError, with the traceback, if one fails."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self._finished(self._shown, patience)
        calm = 0  # times on end that the kernel was idle: a cell with a hidden source shows no number

        def at_rest() -> bool:
            nonlocal calm
            idle = self.page.get_by_text("(ipykernel) | Idle").first.is_visible()
            calm = calm + 1 if idle else 0
            return calm > 20

        self.until(at_rest, "its kernel is at rest", patience)

    def _finished(self, where: "Locator", patience: float) -> None:
        """Waits until each code cell in `where` has its number, or one has failed."""
        # JupyterLab marks an error as it marks what is written to stderr
        failed = where.locator('[data-mime-type="application/vnd.jupyter.stderr"]').filter(has_text=FAILED)
        waiting = where.locator(".jp-InputArea-prompt").filter(has_text=re.compile(r"\[[ *]\]"))
        self.until(lambda: failed.count() or not waiting.count(), "its cells have run", patience)
        assert not failed.count(), failed.first.text_content()  # a cell out of sight has no inner text

    def until(self, holds: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Returns when `holds()` is true; AssertionError if it is not for too long."""
        deadline = time.monotonic() + patience / SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"waited {patience / SECONDS:.0f} s in vain until {what}"
            self.page.wait_for_timeout(100)

    def save(self) -> list[dict]:
        """Saves the notebook as Ctrl+S does; its cells, as they now stand in the file."""
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        self.until(lambda: self.file.stat().st_mtime_ns != before, "it is saved")
        expect(self.page.locator(".lm-TabBar-tab.jp-mod-dirty")).to_have_count(0)
        return json.loads(self.file.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab. A SIGTERM, of `timeout` or of a CI that gives up, is taken as Ctrl+C, so that no server is left."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.stop()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium. It ends with the module: while it lives no other test of this process can have an event loop."""
    with sync_playwright() as playwright:
        rootless = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=rootless)
        yield made
        made.close()


@pytest.fixture
def watch(lab, browser) -> Iterator[Watch]:
    """A fresh browser profile; after each test: nobody else was asked for anything, and no error was in the console."""
    expect.set_options(timeout=PATIENCE)
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, service_workers="block")
    context.set_default_timeout(PATIENCE)
    watch = Watch(context, lab.url)
    watch.context = context
    yield watch
    context.close()
    assert watch.outside == []
    assert watch.errors == []


@pytest.fixture
def opened(lab, watch) -> Iterator[Callable[..., Notebook]]:
    """opened(name, theme="Light", cells=None, outputs=False): the notebook, its kernel ready; or a new one of cells.

    It is the learner's copy; it has no outputs, or those that were committed.

    cells: id -> code. In a notebook that there is they take the place of its cells of these ids.
    """

    def open_it(name: str, theme: str = "Light", cells: dict[str, str] | None = None, outputs=False) -> Notebook:
        file = lab.my / f"{name}.ipynb"
        if outputs:
            shutil.copy(ROOT / "notebooks" / file.name, file)
        else:
            file.write_text(json.dumps(notebook_of(file, cells or {}), ensure_ascii=False), encoding="utf-8")
        page = watch.context.new_page()
        lab.theme(theme)
        page.goto(lab.address(name))
        expect(page.locator("#jp-bottom-panel, #jp-main-statusbar").get_by_text("(ipykernel) | Idle")).to_be_visible()
        return Notebook(page, file)

    yield open_it
    lab.stop_kernels()


def notebook_of(file: Path, cells: dict[str, str]) -> dict:
    """The notebook of this file, or a new one, with these cells in the place of its own, and without outputs."""
    if not file.exists():
        made = [{"cell_type": "code", "id": id, "metadata": {}, "source": code} for id, code in cells.items()]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    else:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        assert set(cells) <= {cell["id"] for cell in notebook["cells"]}, "no such cell: was one renamed?"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(source=cells.get(cell["id"], cell["source"]), outputs=[], execution_count=None)
    return notebook
