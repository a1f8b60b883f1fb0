"""The cells of a notebook that shows each widget of the course, in a state worth looking at."""

QUIZ = "11_interview_prep"  # any would do: the imports of this notebook are the lightest

GALLERY = {  # the class of a widget, or what else is shown; with a hyphen, in which state -> the cell that shows it
    "first": """
import json, tempfile
from pathlib import Path
RUNS = Path(tempfile.mkdtemp())
FILE = RUNS / "progress.sqlite"
""",
    "DecisionHelper": "from ftlab.classroom import decide; decide.decision_helper()",
    "WillItFit": "from ftlab.classroom import widgets; widgets.will_it_fit()",
    "Explorer-margin": "from ftlab.classroom import landscape; landscape.margin_explorer()",
    "Explorer-orpo": "landscape.orpo_landscape()",
    "Review": """
from ftlab.classroom.review import review
item = {"prompt": "Where is my food? #482193", "answer": "late delivery", "reference": '{"intent": "late_delivery"}'}
items = [{"id": n, **item} for n in range(3)]
review(items, RUNS / "review.jsonl", title="Is this right?")""",
    "Session": "from ftlab.classroom import flash; session = flash.session(file=FILE); session.reveal(); session",
    "Interview": """
from ftlab.classroom import interview
trial = interview.interview(seed=1, file=FILE); trial.start(); trial.finish()
trial""",
    "Interview-report": """
done = interview.interview(questions=2, seed=1, file=FILE); done.start()
for mark in ("yes", "no"):
    done.finish()
    done.grade(**dict.fromkeys(interview.RUBRIC, mark))
done""",
    "Board": """
from ftlab.classroom import whiteboard
wrong = whiteboard.board(1, FILE); wrong.check(repr(wrong.question.wrong[0][0]))
wrong""",
    "Board-right": "right = whiteboard.board(1, FILE); right.check(repr(right.question.answer)); right",
    "Ledger": "from ftlab.classroom import claims; claims.ledger()",
    "Deck": "from ftlab.classroom import cards; cards.deck()",
    "Panel": "from ftlab.classroom import progress; progress.panel(FILE)",
    "quiz": f"from ftlab.classroom import quiz; quiz.show({QUIZ!r}, file=FILE)",
    "sheet": "cards.cheat_sheet()",
}  # fmt: skip
