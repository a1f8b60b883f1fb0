"""Notebook 08: the loss mask of a conversation with tools, and the loop that runs them."""

from collections.abc import Callable
from functools import partial
from random import Random

from ftlab.exercises.core import Exercise, first_difference

# --- 08.4: the assistant's mask ---------------------------------------------------------------------------------------


def my_assistant_mask(input_ids, opening, end):
    mask, counts = [], False
    for t, token in enumerate(input_ids):
        mask.append(int(counts))
        begins = input_ids[max(0, t + 1 - len(opening)) : t + 1] == opening
        counts = begins or (counts and token != end)
    return mask


def _mask_with(change: Callable) -> Callable:
    """my_assistant_mask, then change(mask, input_ids, opening, end)."""
    return lambda input_ids, opening, end: change(my_assistant_mask(input_ids, opening, end), input_ids, opening, end)


def _spans(mask: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of each run of ones."""
    edges = [t for t in range(len(mask) + 1) if ([0, *mask, 0][t]) != ([0, *mask, 0][t + 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _spans_alone(mask: list[int], wanted: list[tuple[int, int]]) -> list[int]:
    return [int(any(begin <= t < end for begin, end in wanted)) for t in range(len(mask))]


def _opening_too(mask, input_ids, opening, end):
    return _spans_alone(mask, [(begin - len(opening), stop) for begin, stop in _spans(mask)])


def _without_end(mask, input_ids, opening, end):
    return [bit * int(token != end) for bit, token in zip(mask, input_ids, strict=True)]


def _whole_turns_only(mask, input_ids, opening, end):
    return _spans_alone(mask, [span for span in _spans(mask) if input_ids[span[1] - 1] == end])


def _every_turn(input_ids, opening, end):
    """Every turn that begins with the first id of an opening: the question and the rows count too."""
    mask, since = [0] * len(input_ids), None
    for t, token in enumerate(input_ids):
        mask[t] = int(since is not None and t >= since + len(opening))
        if token == opening[0]:
            since = t
        if token == end:
            since = None
    return mask


MASKS = {
    "the rows of the tool count too: only a turn that begins with the whole opening is the assistant's": _every_turn,
    "the opening counts: it is given at generation, so the loss begins after it": _mask_with(_opening_too),
    "the end of turn is left out, so the model never learns to stop": _mask_with(_without_end),
    "only the first turn of the assistant counts: the answer is one too": _mask_with(
        lambda mask, *_: _spans_alone(mask, _spans(mask)[:1])),
    "only the last turn of the assistant counts: the call is one too": _mask_with(
        lambda mask, *_: _spans_alone(mask, _spans(mask)[-1:])),
    "all after the first opening counts: stop at the end of the turn": _mask_with(
        lambda mask, *_: [int(1 in mask[: t + 1]) for t in range(len(mask))]),
    "a last turn that is cut off has no end, and counts as well": _mask_with(_whole_turns_only),
    "0 and 1 are swapped: 1 is what counts": _mask_with(lambda mask, *_: [1 - bit for bit in mask]),
    "these are labels (ids and -100): a mask holds 0 and 1": _mask_with(
        lambda mask, input_ids, *_: [i if bit else -100 for i, bit in zip(input_ids, mask, strict=True)]),
}  # fmt: skip


def _conversation_ids(rng: Random) -> tuple[list[int], list[int], int]:
    """A system message, a question, one or two calls with their rows, an answer, which may be cut off."""
    roles = {"system": [1, 30, 9], "user": [1, 31, 9], "assistant": [1, 32, 9], "tool": [1, 33, 9]}
    turns = ["system", "user", *["assistant", "tool"] * rng.randint(1, 2), "assistant"]
    ids = []
    for role in turns:
        text = [rng.choice([9, 32, *range(3, 30)]) for _ in range(rng.randint(2, 6))]
        ids += [*roles[role], *text, 2]
    return ids[:-1] if rng.random() < 0.3 else ids, roles["assistant"], 2


# --- 08.5: the loop ---------------------------------------------------------------------------------------------------


def my_tool_loop(say, run_sql, messages, most=4):
    messages = list(messages)
    for _ in range(most):
        reply = say(messages)
        messages.append(reply)
        for call in reply.get("tool_calls", []):
            rows = run_sql(**call["function"]["arguments"])
            messages.append({"role": "tool", "content": rows})
        if not reply.get("tool_calls"):
            break
    return messages


def _loop(
    keep_call: bool = True,
    keep_rows: bool = True,
    role: str = "tool",
    rounds: Callable = lambda most: most,
    calls: Callable = lambda calls: calls,
    run: Callable = lambda run_sql, arguments: run_sql(**arguments),
    give: Callable = lambda messages, asked: messages,
) -> Callable:
    """my_tool_loop with something changed."""

    def loop(say, run_sql, messages, most=4):
        asked, messages = len(messages), list(messages)
        for _ in range(rounds(most)):
            reply = say(messages)
            if keep_call or not reply.get("tool_calls"):
                messages.append(reply)
            for call in calls(reply.get("tool_calls", [])):
                rows = run(run_sql, call["function"]["arguments"])
                if keep_rows:
                    messages.append({"role": role, "content": rows})
            if not reply.get("tool_calls"):
                break
        return give(messages, asked)

    return loop


LOOPS = {
    "the call is missing in the conversation: append the assistant's message too": _loop(keep_call=False),
    "the rows are missing in the conversation: the model never sees them": _loop(keep_rows=False),
    'the rows are a message of the role "tool"': _loop(role="user"),
    "one call and no more: after its rows the model may call again, or answer": _loop(rounds=lambda most: 1),
    "the loop ends after the first rows: ask once more, for the answer": _loop(rounds=lambda most: 2),
    "`say` is asked at most `most` times": _loop(rounds=lambda most: most + 1),
    "a message may hold several calls: run each": _loop(calls=lambda calls: calls[:1]),
    "arguments are given by name: run_sql(**arguments)": _loop(run=lambda run_sql, arguments: run_sql(arguments)),
    "the whole conversation is wanted, not the last answer": _loop(
        give=lambda messages, asked: messages[-1]["content"]),
    "what came before the loop belongs to the conversation": _loop(give=lambda messages, asked: messages[asked:]),
}  # fmt: skip


class _Model:
    """Asks for these queries, a round at a time, then answers with the rows. It goes by the conversation alone."""

    def __init__(self, rounds: list[list[str]]) -> None:
        self.rounds = rounds

    def __call__(self, messages: list[dict]) -> dict:
        if len(messages) > 60:
            raise RuntimeError("the model was asked again and again")
        seen = [message["content"] for message in messages if message["role"] == "tool"]
        for queries in self.rounds:
            if len(seen) < len(queries):
                calls = [{"type": "function", "function": {"name": "run_sql", "arguments": {"query": query}}}
                         for query in queries]  # fmt: skip
                return {"role": "assistant", "content": "", "tool_calls": calls}
            seen = seen[len(queries) :]
        said = " and ".join(message["content"] for message in messages if message["role"] == "tool")
        return {"role": "assistant", "content": f"The rows are {said}."}

    def __repr__(self) -> str:
        return f"say (it wants {self.rounds})"


class _Tool:
    """run_sql with rows that depend on the query alone."""

    def __call__(self, query) -> str:
        if not isinstance(query, str):
            return f"error: {query!r} is no query"
        return "error: no such column: plann" if "plann" in query else f"[[{sum(map(ord, query)) % 997}]]"

    def __repr__(self) -> str:
        return "run_sql"


def _asked(rng: Random) -> tuple:
    def query() -> str:
        return f"SELECT COUNT(*) FROM orders WHERE {rng.choice(['plan', 'plann', 'city'])}='{rng.randrange(100, 999)}'"

    rounds = [[query() for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(0, 5))]
    messages = [{"role": "system", "content": "Write one SQLite query."}, {"role": "user", "content": "How many?"}]
    return _Model(rounds), _Tool(), messages, rng.randint(3, 5)


EXERCISES = {
    "08.4": Exercise(
        "Write the loss mask of a conversation with a tool",
        partial(first_difference, answer=my_assistant_mask, draw=_conversation_ids, wrong=MASKS),
        (
            "Go through the ids with a flag that says whether you are in a turn of the assistant.",
            "input_ids[t + 1 - len(opening) : t + 1] == opening says that an opening ends at t: the next id counts.",
            "The end of turn counts, and switches the flag off. Tool, user and system turns have other openings.",
        ),
        my_assistant_mask,
        MASKS,
    ),
    "08.5": Exercise(
        "Write the tool loop",
        partial(first_difference, answer=my_tool_loop, draw=_asked, wrong=LOOPS),
        (
            "A `for` over range(most): ask say(messages), and append what it returns.",
            'Does the reply have "tool_calls"? If not, the loop is over.',
            'For each call: rows = run_sql(**call["function"]["arguments"]), then append '
            '{"role": "tool", "content": rows}.',
        ),
        my_tool_loop,
        LOOPS,
    ),
}
