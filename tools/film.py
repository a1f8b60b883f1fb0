"""The pictures of README: a film of notebook 00 in JupyterLab, and three stills, made in a real browser.

    python tools/film.py            film and stills, 6 minutes; needs Chromium (apt-get install chromium)
    python tools/film.py --stills   the stills alone

JupyterLab runs in a copy of the repository, as `make lab` starts it, and Chromium shows it. The film runs the real
cells: the question before training, the training, the question again. Only waiting is cut: a frame is kept when the
page has changed, and is shown for as long as it takes to read. The stills show outputs as they are committed.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
import conftest as e2e  # noqa: E402  the tests' own JupyterLab and notebook

PICTURES = ROOT / "data" / "pictures"
SIZE, TALL = {"width": 960, "height": 620}, {"width": 1100, "height": 1700}  # of the film, of the stills
STILLS = {  # file -> notebook, cell
    "still_rank": ("02_lora_math", "kept"),
    "still_memory": ("03_qlora_memory", "fit"),
    "still_frontier": ("04_rlhf_vs_dpo", "gain"),
}
CAPTION = """text => {
  let bar = document.getElementById('film-caption');
  if (!bar) {
    bar = document.createElement('div');
    bar.id = 'film-caption';
    bar.style.cssText = 'position:fixed;left:0;right:0;bottom:0;padding:10px 20px;z-index:9999;' +
                        'background:#14323f;color:#fff;font:600 19px sans-serif';
    document.body.append(bar);
  }
  bar.textContent = text;
}"""
PLAIN = """() => {  // the notebook alone: no menus, no panels
  const style = document.createElement('style');
  style.textContent = '#jp-top-panel, #jp-menu-panel, .jp-SideBar, #jp-left-stack, #jp-bottom-panel,' +
    '.jp-Notebook-footer, .jp-NotebookPanel-toolbar {display: none !important}';
  document.head.append(style);
}"""


TO_THE_MIDDLE = """cell => {
  cell.scrollIntoView({block: 'center'});
  return cell.getBoundingClientRect().top;
}"""


class Film:
    """Frames of a page with the time that each is shown, in milliseconds."""

    def __init__(self, page: Page) -> None:
        self.page, self.frames, self.times = page, [], []

    def take(self, milliseconds: int) -> None:
        """One frame; where the page looks as before, the last frame is shown longer."""
        frame = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if self.frames and ImageChops.difference(frame, self.frames[-1]).getbbox() is None:
            self.times[-1] += milliseconds
        else:
            self.frames.append(frame)
            self.times.append(milliseconds)

    def save(self, file: Path, colours: int = 96) -> None:
        """An animated GIF that runs for ever; all frames share the colours of the last one, so little moves."""
        palette = self.frames[-1].quantize(colours, dither=Image.Dither.NONE)
        first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames)
        first.save(file, save_all=True, append_images=rest, duration=self.times, loop=0, optimize=True)


def make_film(notebook: e2e.Notebook, file: Path) -> None:
    """Runs the first cells of notebook 00 and films the question before, the training, and the question after."""
    page = notebook.page
    notebook.run("imports", "doctor", "dial", "table", "prompt")
    film = Film(page)
    page.keyboard.press("Control+b")
    page.evaluate(PLAIN)

    def show(id: str, caption: str) -> None:
        notebook.cell(id).evaluate("cell => cell.scrollIntoView({block: 'start'})")
        page.evaluate(CAPTION, caption)
        page.wait_for_timeout(600)

    show("before", "A 135M chat model, with the columns in its prompt, before training ...")
    film.take(1600)
    notebook.run("before")
    show("before", "... What it writes does not run.")
    film.take(3200)
    notebook.run("rows")
    show("train", "Now the field's own code: LoRA and TRL's SFTTrainer, on two CPU cores ...")
    film.take(2200)
    notebook.cell("train").locator(".jp-InputPrompt").click()
    page.keyboard.press("Control+Enter")
    waiting = notebook.cell("train").locator(".jp-InputArea-prompt", has_text="[*]")
    expect(waiting).to_have_count(1)
    while waiting.count():  # a frame where the curve has grown
        notebook.output("train").evaluate("cell => cell.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(1500)
        film.take(250)
        film.times[-1] = min(film.times[-1], 500)  # the waiting is cut
    film.times[-1] += 1200
    notebook.run("after", patience=600 * e2e.SECONDS)
    show("after", "... and the same question gets the right query, and the right table.")
    notebook.output("after").evaluate("cell => cell.scrollIntoView({block: 'end'})")
    page.wait_for_timeout(600)
    film.take(5000)
    film.save(file)


def settle(page: Page, output) -> None:
    """Scrolls to an output until it stays where it is: JupyterLab renders the cells above it late."""
    place = None
    while place != (place := output.evaluate(TO_THE_MIDDLE)):
        page.wait_for_timeout(1500)


def make_stills(lab: e2e.Lab, context, folder: Path) -> None:
    """The committed outputs of the cells of STILLS, as JupyterLab shows them."""
    for name, (stem, id) in STILLS.items():
        page = context.new_page()
        page.goto(lab.address(stem, "notebooks"))
        notebook = e2e.Notebook(page, lab.notebooks / f"{stem}.ipynb")
        page.keyboard.press("Control+b")  # the contents beside the notebook
        output = notebook.output(id)
        settle(page, output)
        output.screenshot(path=folder / f"{name}.png")
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stills", action="store_true", help="the stills alone")
    parser.add_argument("--to", type=Path, default=PICTURES, help="folder of the pictures")
    asked = parser.parse_args()
    if e2e.MISSING:
        raise SystemExit(f"{' and '.join(e2e.MISSING)} not found: apt-get install chromium")
    expect.set_options(timeout=e2e.PATIENCE)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lab = e2e.Lab(Path(folder))
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=e2e.CHROMIUM, args=args)
        try:
            context = browser.new_context(viewport=TALL)
            context.set_default_timeout(e2e.PATIENCE)
            make_stills(lab, context, asked.to)
            if not asked.stills:
                context = browser.new_context(viewport=SIZE)
                context.set_default_timeout(e2e.PATIENCE)
                file = lab.my / "00_start_here.ipynb"
                file.write_text(json.dumps(e2e.notebook_of(file, {})), encoding="utf-8")
                page = context.new_page()
                page.goto(lab.address("00_start_here"))
                idle = page.locator("#jp-bottom-panel, #jp-main-statusbar").get_by_text("(ipykernel) | Idle")
                expect(idle).to_be_visible()
                make_film(e2e.Notebook(page, file), asked.to / "first_run.gif")
        finally:
            browser.close()
            lab.stop()


if __name__ == "__main__":
    main()
