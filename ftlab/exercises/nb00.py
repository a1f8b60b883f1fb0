"""Notebook 00: the messages that a chat model is asked with."""

from random import Random

from ftlab.exercises.core import Exercise, Slip
from ftlab.exercises.differences import first_difference
from ftlab.tasks.ask import SYSTEM


def my_messages(question):
    return [{"role": "system", "content": "Write one SQLite query."}, {"role": "user", "content": question}]


def _question(rng: Random) -> tuple[str]:
    what, dish = rng.choice(["average tip of", "fastest"]), rng.choice(["thai", "dosa"])
    city = rng.choice(["Pune", "Kochi"])
    return (f"{what} {dish} orders in {city}, top {rng.randrange(2, 99)}?",)


WRONG = {
    "the roles are swapped": lambda question: [
        {"role": "user", "content": SYSTEM}, {"role": "system", "content": question}],
    "the user comes before the system message": lambda question: my_messages(question)[::-1],
    "the system message is missing": lambda question: my_messages(question)[1:],
    "the answer belongs to the model, not into the prompt": lambda question: [
        *my_messages(question), {"role": "assistant", "content": "SELECT 1"}],
    "a list of messages is wanted, not one string": lambda question: f"{SYSTEM}\n{question}",
    "the instruction is written into the user's message": lambda question: [
        {"role": "user", "content": f"{SYSTEM}\n{question}"}],
    "a message is a dict with the keys role and content": lambda question: [("system", SYSTEM), ("user", question)],
    "the question is fixed: use the argument": lambda question: my_messages("how many orders?"),
}  # fmt: skip


def verify(mine) -> Slip | None:
    return first_difference(mine, my_messages, _question, WRONG)


EXERCISES = {
    "00.1": Exercise(
        "Write the list of messages that asks the model a question",
        verify,
        (
            "A chat model reads a list of messages. Each message is a dict with two keys, role and content.",
            'Two messages: first the role "system" with the instruction, then the role "user" with the question.',
            'The first one is {"role": "system", "content": "Write one SQLite query."}. Write the second the same way.',
        ),
        my_messages,
        WRONG,
        difficulty=1,
        minutes=3,
    ),
}
