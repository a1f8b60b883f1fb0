"""Rewards for grpo.py that keep their limits: --rewards rewards:final_answer rewards:soft_overlong

A reward gets all answers of a batch and the columns of their rows, by name and one entry an answer,
and returns a list of numbers, one an answer; None where it doesn't apply. `completions` are texts,
or lists of messages where the prompts are; `completion_ids` are their tokens. grpo.py adds the
columns `answer` (the text of the rows' completion) and `max_completion_length`.

Write yours in a file of your own, in the folder where you start: --rewards my_rewards:is_right.
Whatever a reward pays for is what you get more of, so read answers beside the numbers.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import said

SECONDS = 5  # of one answer's program (limits as Linux and macOS have them)
MEGABYTES = 1024  # of its memory
PROCESSES = 8  # at a time
LONGEST = 100  # characters of a final answer
FINAL = re.compile(
    rf"(?:\\boxed\{{|\banswer(?: is\s*:?|\s*:)(?!.{{0,20}}\\boxed\{{))\s*([^\n}}]{{1,{LONGEST}}})",
    re.IGNORECASE,
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
RUN = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEGABYTES << 20}, {MEGABYTES << 20}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {1 << 20}))
runpy.run_path(sys.argv[1], run_name="__main__")
"""
CODE = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


def exact_match(completions, answer, **columns):
    """1 where the answer is the row's, word for word, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(said(got).strip() == wanted.strip()) for got, wanted in pairs]


def plain(text):
    """A final answer without what doesn't count: 1,000.00 and $1000 are 1000."""
    text = text.strip().rstrip(".").strip("*$ ").replace(",", "")
    return f"{float(text):g}" if NUMBER.fullmatch(text) else text.casefold()


def final_answer(completions, answer, **columns):
    """1 where the last "Answer: ..." or \\boxed{...} is the row's answer, else 0.

    The last one, because a model that writes several would be paid for guessing. "answer" wants
    "is" or a colon behind it. Braces inside a box are not read: \\frac{1}{2} needs a reward of your
    own. The pattern has no nested repetition, so no answer can hold it up.
    """
    found = []
    for got, wanted in zip(completions, answer, strict=True):
        final = FINAL.findall(said(got))
        found.append(float(bool(final) and plain(final[-1]) == plain(wanted)))
    return found


def soft_overlong(completion_ids, max_completion_length, **columns):
    """0, and from 4/5 of the most tokens falling to -1 at all of them (DAPO's, arXiv:2503.14476).

    With L the most tokens, C = L / 5 and y tokens: 0 if y <= L - C, else (L - C - y) / C. An answer
    that was cut costs 1, so give it a small weight: --reward_weights 1 0.2.
    """
    found = []
    for ids, most in zip(completion_ids, max_completion_length, strict=True):
        room = most / 5
        found.append(min(0.0, (most - room - len(ids)) / room))
    return found


def passes(program, tests):
    """Whether the tests run to their end behind the program, in a process of its own.

    The sign that they did is a random word which is printed last: an exit code of 0 also comes of a
    program that ends itself before its tests. What still cheats: a program that looks for the word
    in its own process, or that makes the tests' comparisons true.
    """
    word = secrets.token_hex(16)
    source = f"{program}\n\n{tests}\n\nprint({word!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder, "answer.py"), Path(folder, "said")
        file.write_text(source, encoding="utf-8", errors="replace")
        with said.open("wb") as out:  # a pipe would wait for children that the program has left
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", RUN, str(file)],
                cwd=folder,
                env={"PATH": os.defpath},  # no token and no key of yours
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
        return said.read_bytes().endswith(word.encode() + b"\n")


def tests_pass(completions, tests, **columns):
    """1 where the last ```python block of an answer passes the row's `tests`, lines of assert.

    Limits: SECONDS, MEGABYTES, an empty environment. It is no sandbox: the program can read your
    files and use the network, so run the training in a container that has neither.
    """
    blocks = [CODE.findall(said(got)) for got in completions]
    with ThreadPoolExecutor(PROCESSES) as pool:
        ran = pool.map(
            lambda pair: bool(pair[0]) and passes(pair[0][-1], pair[1]),
            zip(blocks, tests, strict=True),
        )
        return [float(right) for right in ran]
