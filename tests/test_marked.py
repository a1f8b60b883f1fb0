"""ftlab.classroom.marked: the sentence that costs is marked, what is missing is named, nothing of a text is HTML."""

import re

from ftlab.classroom.marked import replies_page
from ftlab.tasks import replies


def test_a_page_of_replies_marks_the_sentence_that_costs_and_names_what_is_missing():
    label = {"intent": "late_delivery", "order_id": "482193", "refund_amount": None, "urgency": "normal"}
    label |= {"language": "en"}
    row = replies.as_pair({"ticket": "Where is <b>482193</b>?", "label": label, "chosen": "x", "rejected": "y"})
    good = "Sorry. Let me call the rider and find out where order 482193 is."
    html = replies_page([row], {"one": [good], "two": [good + " Your next meal is free."]}).data
    assert re.findall("<mark>(.*?)</mark>", html) == ["Your next meal is free."]
    assert re.findall("lacks [a-z, ]+", html) == ["lacks fair"] and "<b>1.00</b></div>" in html
    assert "&lt;b&gt;482193" in html and "<b>482193" not in html


def test_as_many_rows_are_shown_as_there_are_replies_and_long_ones_whole():
    label = {"intent": "late_delivery", "order_id": None, "refund_amount": None, "urgency": "normal", "language": "en"}
    rows = [replies.as_pair({"ticket": f"Ticket {i}", "label": label, "chosen": "x", "rejected": "y"}) for i in (1, 2)]
    html = replies_page(rows, {"one": ["word " * 100]}).data
    assert "Ticket 1" in html and "Ticket 2" not in html and html.count("word") == 100
