"""The cells of a notebook that shows each widget of the course, in a state worth looking at."""

QUIZ = "11_interview_prep"  # it has questions of each kind

GALLERY = {  # a widget's class, or, small, what a function shows; with a hyphen, in which state -> the cell
    "first": """
import json, random, tempfile
from pathlib import Path
RUNS = Path(tempfile.mkdtemp())
FILE = RUNS / "progress.sqlite"
""",
    "AskBox": """
from ftlab.classroom import askbox
SQL = "SELECT city, COUNT(*) FROM orders WHERE minutes>45 GROUP BY city"
askbox.AskBox({"untrained": lambda _: "No idea.", "trained": lambda _: SQL}, "late orders?")""",
    "decide": "from ftlab.classroom import decide; decide.decision_helper()",
    "fit": "from ftlab.classroom import widgets; widgets.will_it_fit()",
    "rank": "widgets.rank_slider()",
    "margin": "from ftlab.classroom import landscape; landscape.margin_explorer()",
    "orpo": "landscape.orpo_landscape()",
    "review": """
from ftlab.classroom.review import review
item = {"prompt": "Where is my food? #482193", "answer": "late delivery", "reference": '{"intent": "late_delivery"}'}
items = [{"id": n, **item} for n in range(3)]
review(items, RUNS / "review.jsonl", title="Is this right?")""",
    "review-labels": """
labels = ["condition lost or invented", "wrong value or column", "house word not known", "grouping or order",
          "does not run", "question unclear", "gold is wrong"]
review(items, RUNS / "labels.jsonl", "What is wrong?", labels)""",
    "session": """
from ftlab.classroom import cards, flash
session = flash.session(file=FILE); session.press("Show the answer")
session""",
    "Interview": """
from ftlab.classroom import interview
trial = interview.Interview(cards.load()[:2], 2, random.Random(0), FILE)
for label in ("Start", "I have answered", "I have answered"):
    trial.press(label)
trial""",
    "Interview-report": """
done = interview.Interview(cards.load()[:2], 2, random.Random(0), FILE); done.press("Start")
for mark in ("yes", "no"):
    for label in 2 * ["I have answered"] + 4 * [mark]:
        done.press(label)
done""",
    "board": "from ftlab.exercises import whiteboard; whiteboard.board(1, FILE)",
    "ledger": "from ftlab.classroom import claims; claims.ledger()",
    "deck": "cards.deck()",
    "quiz": f"from ftlab.classroom import quiz; quiz.show({QUIZ!r}, file=FILE)",
    "sheet": "cards.cheat_sheet()",
}  # fmt: skip
