"""[Hint] and [Solution] under the verdict of `check`, where the notebook runs."""

import time
from collections.abc import Callable

import ipywidgets

from ftlab.classroom import page

SURE = "Show the solution? Press once more"


class Buttons:
    """Two buttons, and below them what they have shown so far. It is kept in the kernel alone.

    hint: the HTML of the next hint, and how many are left after it. solution: its HTML.
    right: of an answer that is right the solution needs no second press, and hints are not offered.
    """

    def __init__(
        self,
        hint: Callable[[], tuple[str, int]],
        solution: Callable[[], str],
        right: bool,
    ) -> None:
        self._next, self._show, self._right = hint, solution, right
        self._sure, self._pressed, self._said = right, 0.0, ""
        self.hint = ipywidgets.Button(description="Hint", layout={"width": "auto"})
        self.solution = ipywidgets.Button(description="Solution", layout={"width": "auto"})
        self.hint.layout.display = "none" if right else None
        self.hint.on_click(lambda _: self._in_turn(self._press_hint))
        self.solution.on_click(lambda _: self._in_turn(self._press_solution))
        self._page = ipywidgets.Output()
        row = ipywidgets.HBox([self.hint, self.solution], layout=page.WRAPPED)
        self.widget = ipywidgets.VBox([row, self._page])

    def _in_turn(self, press: Callable[[], None]) -> None:
        """The second press of a double click does nothing."""
        now = time.monotonic()
        if now - self._pressed > page.QUICK:
            press()
        self._pressed = now

    def _press_hint(self) -> None:
        shown, left = self._next()
        self._add(shown)
        self.hint.disabled = not left
        self._ask(False)

    def _press_solution(self) -> None:
        if not self._sure:
            self._ask(True)
            return
        self._add(self._show())
        self.solution.disabled = True
        self._ask(False)

    def _ask(self, ask: bool) -> None:
        """Is the next press on [Solution] the second one?"""
        self._sure = ask or self._right
        self.solution.description = SURE if ask else "Solution"
        self.solution.button_style = "warning" if ask else ""

    def _add(self, shown: str) -> None:
        self._said += shown
        page.fill(self._page, f'<div role="status">{self._said}</div>')
