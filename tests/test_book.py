"""The web edition: built without a network, every link followed, every page opened in Chromium, which asks nobody else.

`make book` makes the environment that builds it; the pages are opened as files, as a reader without a server does.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ftlab.classroom import quiz
from notebooks import NOTEBOOKS, ROOT

SPHINX = ROOT / ".venv-book" / "bin" / "sphinx-build"
NOWHERE = "http://127.0.0.1:9"  # where a proxy would be; nobody listens


@dataclass
class Page(HTMLParser):
    """A page of the site: what it links to, what it loads, its anchors, and its text without code and formulas."""

    path: Path
    links: list[dict[str, str]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    prose: str = ""
    _inside: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.source = self.path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, pairs: list[tuple[str, str | None]]) -> None:
        names = {key: value or "" for key, value in pairs}
        self._inside += tag in QUOTED
        if "id" in names:
            self.anchors.add(names["id"])
        if tag == "a" and "href" in names:
            self.links.append(names)
        elif tag == "link":
            self.loads.append(names["href"])
        self.loads += [names[key] for key in ("src", "srcset", "poster", "data") if key in names]

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in QUOTED

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.prose += data

    def target(self, link: str) -> tuple[Path, str]:
        parts = urlsplit(link)
        path = (self.path.parent / unquote(parts.path)).resolve() if parts.path else self.path
        return path, unquote(parts.fragment)


QUOTED = {"code", "pre", "math", "script", "style"}


@dataclass
class Site:
    folder: Path

    @cached_property
    def pages(self) -> dict[str, Page]:
        """Page by name: "index", "02_lora_math"."""
        return {path.stem: Page(path) for path in sorted(self.folder.rglob("*.html"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    if not SPHINX.exists():
        pytest.skip("THE BOOK IS NOT TESTED: `make book` makes .venv-book, which builds it")
    folder = tmp_path_factory.mktemp("book") / "html"
    command = [SPHINX, "--quiet", "--fail-on-warning", "--keep-going", "-c", ROOT / "book", ROOT, folder]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), NOWHERE)
    done = subprocess.run(command, env={**os.environ, **proxies}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Site(folder)


def test_every_cell_of_every_notebook_has_its_anchor(site):
    for name, cells in NOTEBOOKS.items():
        shown = [cell["id"] for cell in cells if "".join(cell["source"]).strip() and not removed(cell)]
        missing = [cell for cell in shown if f"cell-id={cell}" not in site.pages[name].anchors]
        assert not missing, f"{name}: no anchor for {missing}"
        hidden = sum("hide-input" in cell["metadata"].get("tags", []) for cell in cells)
        folded = re.findall(r'<details class="admonition hide above-input">', site.pages[name].source)
        assert len(folded) == hidden, f"{name}: {hidden} cells are to be folded, {len(folded)} are"


def removed(cell: dict) -> bool:
    return "remove-cell" in cell["metadata"].get("tags", [])


def test_every_link_leads_somewhere(site):
    dead, by_path = [], {page.path: page for page in site.pages.values()}
    for page in by_path.values():
        for link in (names["href"] for names in page.links):
            if urlsplit(link).scheme in ("http", "https", "mailto"):
                continue
            path, anchor = page.target(link)
            known = by_path[path].anchors if path in by_path else set()
            if not path.is_file() or (anchor and anchor not in known):
                dead.append(f"{page.path.name}: {link}")
    assert not dead, "\n".join(dead)


def test_links_between_notebooks_are_kept(site):
    """What leads from cell to cell in Jupyter leads from page to page here: in prose, in outputs, in what is folded."""
    for name, cells in NOTEBOOKS.items():
        texts = [text for cell in cells if not removed(cell) for text in texts_of(cell)]
        wanted = {(stem, anchor) for text in texts
                  for stem, anchor in re.findall(r"[(\"'](\d\d_\w+)\.ipynb(?:#([\w=-]+))?[)\"']", text)}  # fmt: skip
        page = site.pages[name]
        got = {(path.stem, anchor) for path, anchor in (page.target(link["href"]) for link in page.links)}
        assert wanted <= got, f"{name}: {sorted(wanted - got)}"
        assert ".ipynb" not in "".join(link["href"] for link in page.links)


def texts_of(cell: dict) -> list[str]:
    if cell["cell_type"] == "markdown":
        return ["".join(cell["source"])]
    shown = [output.get("data", {}) for output in cell["outputs"]]
    return ["".join(data[kind]) for data in shown for kind in ("text/html", "text/markdown") if kind in data]


def test_previous_and_next_follow_the_course(site):
    order = ["README", *NOTEBOOKS]
    for before, after in pairwise(order):
        for name, to, way in ((before, after, "next-page"), (after, before, "prev-page")):
            page = site.pages[name]
            assert [page.target(link["href"])[0].stem for link in page.links if link.get("class") == way] == [to]


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.pages.values():
        for load in page.loads:
            assert load.startswith("data:") or page.target(load)[0].is_file(), f"{page.path.name} loads {load}"
        assert "require.js" not in page.source and "@jupyter-widgets" not in page.source
    for sheet in site.folder.rglob("*.css"):
        loads = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", sheet.read_text(encoding="utf-8"))
        assert not [load for load in loads if re.match(r"(https?:)?//", load)], sheet


def test_every_formula_is_drawn(site):
    for name in NOTEBOOKS:
        page = site.pages[name]
        formulas = re.findall(r"<math.*?</math>", page.source, re.DOTALL)
        unknown = [formula for formula in formulas if "\\" in formula or "merror" in formula]
        assert not unknown, f"{name}: {unknown}"
        assert not re.findall(r"\$\$|\\(?:frac|text|pi|sigma|beta|log|ln|cdot)\b", page.prose), name
    assert site.pages["02_lora_math"].source.count("<math") > 100


# --- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="THE BOOK IS NOT SEEN: no playwright")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("THE BOOK IS NOT SEEN: no chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture(params=["light, desktop", "dark, phone"])
def view(request, browser, site):
    """A browser's page; afterwards: nothing was asked of anybody but the folder, and nothing went wrong in it."""
    scheme, device = request.param.split(", ")
    size = {"width": 400, "height": 800} if device == "phone" else {"width": 1280, "height": 900}
    context = browser.new_context(color_scheme=scheme, viewport=size)
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda asking: asked.append(asking.url))
    page.on("requestfailed", lambda asking: wrong.append(f"failed: {asking.url}"))
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert asked and not [url for url in asked if not url.startswith((site.folder.as_uri(), "data:"))], asked
    assert not wrong, wrong


def address(site: Site, name: str) -> str:
    return site.pages[name].path.as_uri()


def test_pages_open(site, view):
    colours = set()
    for name in ("index", "search", *NOTEBOOKS):
        view.goto(address(site, name))
        assert view.title()
        too_wide = view.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert too_wide <= 0, f"{name} is {too_wide} pixels too wide"
        broken = view.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        assert not broken, f"{name}: {broken}"
        buttons, cells = view.locator(".cell_input .copybtn").count(), view.locator(".cell_input").count()
        assert buttons == cells and (cells or name in ("index", "search")), name
        colours.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
    light = view.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
    assert colours == {"rgb(255, 255, 255)" if light else "rgb(19, 20, 22)"}


def test_search_finds_a_word(site, view):
    view.goto(address(site, "search"))
    field = view.locator(".search-container input, input[name=q]").first
    field.evaluate("(input, word) => { input.value = word; input.form.submit(); }", "bitsandbytes")
    results = view.locator("#search-results ul.search li a")
    results.first.wait_for()
    assert any("03_qlora_memory.html" in (link.get_attribute("href") or "") for link in results.all())
    view.goto(f"{address(site, 'search')}?q=xylophone")
    view.locator("#search-results", has_text="did not match any documents").wait_for()


def test_an_anchor_brings_its_cell_into_sight(site, view):
    view.goto(f"{address(site, '02_lora_math')}#cell-id=quiz")
    cell = view.locator(".cell_input", has_text='quiz.show("02_lora_math")')
    inside = "([cell, height]) => { const y = cell.getBoundingClientRect().y; return 0 <= y && y < height; }"
    view.wait_for_function(inside, arg=[cell.element_handle(), view.viewport_size["height"]])


QUIZZES = pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "data" / "quizzes").glob("*.yaml")))


@QUIZZES
def test_quizzes_answer_every_choice(name, site, view):
    """Each choice, pressed by key, says what data/quizzes says of it, right or wrong; pressed again, it is silent."""
    view.goto(address(site, name))
    asked = [question for question in quiz.load(name) if question.kind in ("single", "multiple")]
    choices = view.locator(".choice")
    assert choices.count() == sum(len(question.choices) for question in asked)
    for choice in choices.all():
        choice.press("Enter")
    said = view.locator(".why:visible").all()
    verdicts = [letter in question.right for question in asked for letter in quiz.LETTERS[: len(question.choices)]]
    assert ["right" in (one.get_attribute("class") or "").split() for one in said] == verdicts
    choices.first.press(" ")
    assert view.locator(".why:visible").count() == len(verdicts) - 1


@QUIZZES
def test_quizzes_take_what_is_typed(name, site, view):
    view.goto(address(site, name))
    asked = [question for question in quiz.load(name) if question.kind in ("numeric", "order")]
    for form, question in zip(view.locator(".typed").all(), asked, strict=True):
        right, wrong = question.right, question.right[::-1]
        if question.kind == "numeric":
            right, wrong = repr(question.answer), repr(question.wrong[0][0])
        for response, verdict in ((wrong, "Not yet."), (right, "Right."), ("1.234,5", "Not yet.")):
            form.locator("input").fill(response)
            form.locator("input").press("Enter")
            assert form.get_by_role("status").inner_text().startswith(verdict)


def test_without_javascript_it_reads_and_unfolds(site, browser):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address(site, "02_lora_math"))
    assert page.locator("math").first.is_visible() and page.locator(".cell_input").first.is_visible()
    solution = page.locator(".cell_output > details").first
    assert not solution.locator("p").first.is_visible()
    solution.locator("summary").click()
    assert solution.locator("p").first.is_visible()
    page.get_by_role("link", name="Next").click()
    assert page.url == address(site, "03_qlora_memory")
