"""What a model still knows of everyday questions, with harm and change of form told apart.

A model that was trained on short answers, or on queries, may say the wrong thing for two reasons:
it lost the fact, or it answers in another form ("SELECT ...", one word). So each question is asked
in two ways:

    right        1 if the greedy reply holds the answer: knowledge and form together
    recognized   1 if the question raises this answer's probability more than those of three other
                 questions' answers: nothing is generated, so no form is asked of the model

`recognized` goes by groups of four questions of like topic. L[i, j] is the log-probability (nats,
sum over its tokens) of answer j after question i and LEAD, which the model does not have to write.
From each L[i, j] the answer's mean probability over the four questions is taken off, so that a
short or common answer has no advantage (Holtzman et al. 2021 divide by an unconditional one):

    R[i, j] = L[i, j] - log mean_i' exp L[i', j]        recognized[i] = 1 if argmax_j R[i, j] is i
    margin[i] = R[i, i] - max_{j != i} R[i, j]          in nats: recognized if it is positive

A guess has 0.25. The 135M before any training has 0.98, so `recognized` falls late; `margin`, which
has no ceiling, falls at once.
"""

import contextlib
import json

from ftlab.paths import DATA

QUESTIONS = "general/candidates, every fourth"  # the list in experiments/ids.json
TOKENS = 24  # at most, of a reply
LEAD = "The answer is"  # in the assistant's turn, before the answers that are compared
SIZE = 4  # questions of a group
SHOWN = 12  # replies that a record keeps as text


def rows_of(file: str) -> list[dict]:
    """The rows of a JSONL file of data/, in its order."""
    lines = (DATA / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def everyday() -> list[dict]:
    """The 143 everyday questions: every fourth candidate, none of which is in rehearsal.jsonl."""
    return rows_of("general/candidates")[::4]


def asked(row: dict, before: tuple = ()) -> list[dict]:
    """The chat of a question, behind the messages `before`; the template adds SmolLM2's system."""
    return [*before, {"role": "user", "content": row["question"]}]


def short_answers() -> tuple:
    """Three other everyday questions, each with its answer of a word or two, as turns of a chat.

    They show a model the short form without training it. None is among `everyday` and none among
    those that data/general/rehearsal.jsonl answers.
    """
    rows = rows_of("general/candidates")[2::4]
    turns = []
    for row in rows[:: len(rows) // 3][:3]:
        turns += asked(row)
        turns.append({"role": "assistant", "content": row["answer"]})
    return tuple(turns)


def measured(model, tokenizer, rows: list[dict], before: tuple = ()) -> dict:
    """A value a question: `right`, `words` of the reply, `query` (it begins as one), `recognized`
    and `margin` (nats). `replies` are the first SHOWN as text.
    """
    from ftlab import answers
    from ftlab.tasks import handbook

    said = answers(model, tokenizer, [asked(row, before) for row in rows], TOKENS)
    right = [int(handbook.scorer(*pair)) for pair in zip(said, rows, strict=True)]
    found = {"right": right, "words": [len(text.split()) for text in said]}
    found["query"] = [int(text.lstrip().upper().startswith("SELECT")) for text in said]
    margin = margins(model, tokenizer, rows, before)
    found |= {"recognized": [int(gap > 0) for gap in margin], "margin": margin}
    return found | {"replies": said[:SHOWN]}


# --- Recognizing the answer -----------------------------------------------------------------------


def groups(rows: list[dict]) -> list[list[int]]:
    """The numbers of the rows in groups of SIZE, like topics together, no answer in one twice.

    Row after row, by topic, goes to the first group that has room and no answer like its own. The
    last groups may be smaller, but none has one row alone. Raises ValueError below two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"got {len(rows)} questions, wanted two or more to compare their answers")
    found: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].get("topic", "")):
        fits = [group for group in found if _fits(rows, group, i)]
        if fits:
            fits[0].append(i)
        else:
            found.append([i])
    return _without_single(rows, found)


def _fits(rows: list[dict], group: list[int], i: int, size: int = SIZE) -> bool:
    return len(group) < size and not any(forms(rows[i]) & forms(rows[j]) for j in group)


def _without_single(rows: list[dict], found: list[list[int]]) -> list[list[int]]:
    """The groups; a row that is alone goes to the last group that it fits, as a fifth one."""
    kept = [group for group in found if len(group) > 1]
    for [i] in (group for group in found if len(group) == 1):
        fits = [group for group in kept if _fits(rows, group, i, SIZE + 1)]
        if not fits:
            raise ValueError(
                f"no group for {rows[i]['question']!r}: all hold an answer like its own"
            )
        fits[-1].append(i)
    return kept


def forms(row: dict) -> set[str]:
    """The accepted forms of a row's answer, in small letters."""
    return {text.lower() for text in (row["answer"], *row["accept"])}


def margins(model, tokenizer, rows: list[dict], before: tuple = ()) -> list[float]:
    """By how many nats each row's question raises its own answer above the next of its group."""
    found = [0.0] * len(rows)
    with _reading(model) as llama:
        for group in groups(rows):
            logps = table(llama, tokenizer, [rows[i] for i in group], before)
            for i, margin in zip(group, ahead(logps), strict=True):
                found[i] = round(margin, 3)
    return found


@contextlib.contextmanager
def _reading(model):
    """A context that gives the model, its adapter merged in, as one that reads packed rows."""
    import torch

    from ftlab import llama
    from ftlab.evaluate import plain_inference

    with plain_inference(model):
        yield llama.PackedLlama(model, torch.float32, merged=True)


def table(llama, tokenizer, rows: list[dict], before: tuple = ()) -> list[list[float]]:
    """L: the log-probability of answer j after question i and LEAD, in nats; (n, n) for n rows."""
    import torch

    from ftlab.llama import per_token_logps

    prompts, ends = [], [_ids(tokenizer, f" {row['answer']}") for row in rows]
    for row in rows:
        chat = asked(row, before)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(_ids(tokenizer, text + LEAD))
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows))]
    ids = [prompts[i] + ends[j] for i, j in pairs]
    shape = (len(ids), max(map(len, ids)))
    input_ids = torch.zeros(shape, dtype=torch.long)
    read, labels = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, ((i, _), tokens) in enumerate(zip(pairs, ids, strict=True)):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        read[row, : len(tokens)] = True
        labels[row, len(prompts[i]) - 1 : len(tokens) - 1] = True  # position t predicts t + 1
    targets = input_ids.roll(-1, dims=1)
    logps = per_token_logps(llama, input_ids, read, targets, labels, [i for i, _ in pairs]).logps
    return logps.sum(1).view(len(rows), len(rows)).tolist()


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def ahead(logps: list[list[float]]) -> list[float]:
    """The margin of each question, in nats; logps[i][j] as in `table`, two rows or more."""
    import numpy as np

    values = np.array(logps)  # (n, n)
    raised = values - (np.logaddexp.reduce(values, axis=0) - np.log(len(values)))
    own = raised.diagonal().copy()
    np.fill_diagonal(raised, -np.inf)
    return (own - raised.max(1)).tolist()
