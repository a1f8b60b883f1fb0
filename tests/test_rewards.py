"""ftlab.rewards: every fault names got, wanted, row and cause; time limits; a broken GRPO run that goes on."""

import contextlib
import functools
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name

from ftlab import guarded, last_good_checkpoint
from ftlab.rewards import NoTimeLimit, RewardError, TimeUp, in_time

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")


def batch_of(size: int, **columns) -> dict:
    """What GRPOTrainer passes for chats: row 2 asks "question 2" and is answered "answer 2"."""
    return {
        "prompts": [[{"role": "user", "content": f"question {i}"}] for i in range(size)],
        "completions": [[{"role": "assistant", "content": f"answer {i}"}] for i in range(size)],
        "gold": [str(i) for i in range(size)],
        "trainer_state": None,
        **columns,
    }


def broken_at(row: int, fault):
    """A reward of 0.5 for each answer, but `fault()` for the answer of one row."""

    def right(completions, gold, **_):
        return [fault() if own == str(row) else 0.5 for _, own in zip(completions, gold, strict=True)]

    return right


def divide():
    return 1 / 0


def endless():
    while True:
        pass


def message_of(reward, size: int = 4, seconds: float = 10.0) -> str:
    with pytest.raises(RewardError) as caught:
        guarded(reward, seconds)(**batch_of(size))
    return str(caught.value)


# --- A reward without a fault -----------------------------------------------------------------------------------------

NUMBERS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False, width=32)
VALUES = st.lists(st.integers(0, 9), max_size=4) | st.sampled_from(["", "text", None, {"a": 1}])
COLUMNS = st.dictionaries(st.sampled_from("abc"), VALUES)


@settings(max_examples=40, deadline=None)
@given(st.lists(NUMBERS, max_size=4), COLUMNS)
def test_any_batch_passes_through_unchanged_in_one_call(rewards, columns):
    calls = []

    def right(**batch):
        calls.append(batch)
        return rewards

    batch = batch_of(len(rewards), **columns)
    assert guarded(right)(**batch) == rewards
    assert len(calls) == 1 and calls[0].keys() == batch.keys() and all(calls[0][key] is batch[key] for key in batch)


@pytest.mark.parametrize(
    "rewards",
    [
        (0.5, 1, True),
        torch.tensor([0.5, 1.0, 1.0]),
        torch.tensor([0.5, 1, 1], dtype=torch.bfloat16, requires_grad=True),
        np.array([0.5, 1, 1], dtype=np.float32),
        [torch.tensor(0.5), np.float32(1), np.bool_(True)],
    ],
)
def test_tuples_tensors_and_arrays_become_lists_of_floats(rewards):
    got = guarded(lambda **_: rewards)(**batch_of(3))
    assert got == [0.5, 1.0, 1.0] and all(type(value) is float for value in got)


# --- Faults: got, wanted, row, cause ----------------------------------------------------------------------------------

FAULTS = {  # at one row: what it does there, what the message says of it, and a likely cause
    "raises": (divide, "got ZeroDivisionError: division by zero,", "an answer that it does not expect"),
    "nan": (lambda: NAN, "got nan,", "0/0"),
    "infinite": (lambda: -INF, "got -inf,", "log(0)"),
    "infinite in float32": (lambda: 1e39, "got 1e+39,", "log(0)"),
    "too large for a float": (lambda: 10**400, "got 1000", "log(0)"),
    "text": (lambda: "0.5", "got '0.5',", "still text"),
    "shape (B, 1)": (lambda: [0.5], "got [0.5],", "(B, 1) for (B,)"),
    "a tensor of two": (lambda: torch.ones(2), "got [1.0, 1.0],", "(B, 1) for (B,)"),
    "complex": (lambda: 1j, "got 1j,", "0/0"),
}


@pytest.mark.parametrize("fault", FAULTS)
@settings(max_examples=4, deadline=None)
@given(st.data())
def test_a_fault_in_one_row_names_it(fault, data):
    what, got, cause = FAULTS[fault]
    size = data.draw(st.integers(2, 9))
    row = data.draw(st.integers(0, size - 1))
    message = message_of(broken_at(row, what), size)
    assert message.startswith(f"reward right: {got}") and cause in message
    assert f"wanted a list of {size} finite numbers or None, one for each completion" in message
    assert f"Row: {row} of 0 to {size - 1}\n" in message
    assert message.count("question ") == 1 == message.count("answer ") - cause.count("answer ")
    assert f"'question {row}'" in message and f"'answer {row}'" in message
    assert "trainer.train(resume_from_checkpoint=last_good_checkpoint(output_dir))" in message


def test_what_the_reward_raised_is_the_cause():
    with pytest.raises(RewardError) as caught:
        guarded(broken_at(1, divide), process=False)(**batch_of(3))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError) as caught:
        guarded(broken_at(1, divide), process=True)(**batch_of(3))
    assert "in divide" in str(caught.value.__cause__)
    with pytest.raises(RewardError) as caught:
        guarded(broken_at(1, lambda: NAN))(**batch_of(3))
    assert caught.value.__cause__ is None


def test_a_reward_without_kwargs_raises_at_the_first_row():
    def no_kwargs(completions, gold):
        return [1.0] * len(completions)

    message = message_of(no_kwargs)
    assert "unexpected keyword argument" in message and "Row: 0 of 0 to 3\n" in message
    assert "no **kwargs" in message


@pytest.mark.parametrize(
    ("reward", "row", "got"),
    [
        (lambda gold, **_: [1.0 for own in gold if own != "2"], 2, "[1.0, 1.0, 1.0]"),
        (lambda **_: None, 0, "None"),
        (lambda **_: 0.5, 0, "0.5"),
        (lambda **_: torch.tensor(0.5), 0, "0.5"),
        (lambda **_: {"a": 1}, 0, "{'a': 1}"),
        (lambda **_: iter([]), 0, "<list_it"),
    ],
)
def test_a_result_that_is_no_list_of_one_each(reward, row, got):
    message = message_of(reward)
    assert f"got {got}" in message and "wanted a list of 4" in message and f"Row: {row} of 0 to 3\n" in message
    assert "no `return`" in message and "skips rows" in message


def test_a_fault_of_the_batch_as_a_whole_names_no_row():
    def compares(completions, **_):
        return [1.0] if len(completions) == 1 else divide()

    def one_a_prompt(prompts, **_):
        return [0.5] * max(1, len(prompts) // 2)

    def once(completions, calls=[], **_):  # noqa: B006
        calls.append(1)
        return [1.0] * len(completions) if calls[1:] else divide()

    for reward in (compares, one_a_prompt, once):
        message = message_of(reward)
        assert "Row: none was found that fails alone" in message and "question" not in message


def test_long_and_odd_texts_are_shortened():
    batch = batch_of(2, prompts=["p" * 10_000, ""], completions=[[], None])
    with pytest.raises(RewardError) as caught:
        guarded(lambda **_: [NAN, 0.0])(**batch)
    assert "ppp...ppp" in str(caught.value) and len(str(caught.value)) < 1_500


async def later(completions, **_):
    return [1.0] * len(completions)


class Judge:
    async def __call__(self, completions, **_):
        return [1.0] * len(completions)


@pytest.mark.parametrize("reward", [later, functools.partial(later, gold="x"), Judge()])
def test_an_async_reward_which_trl_awaits_itself_is_refused_before_the_run(reward):
    with pytest.raises(TypeError, match="give it to GRPOTrainer directly"):
        guarded(reward)


# --- Time -------------------------------------------------------------------------------------------------------------


def swallows():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize("stuck", [endless, lambda: time.sleep(3_600), swallows])
def test_a_row_that_does_not_end_is_interrupted_and_named(stuck):
    handler = signal.getsignal(signal.SIGALRM)
    message = message_of(broken_at(2, stuck), seconds=0.2)
    assert "got nothing within 0.2 s, wanted a list of 4" in message and "endless loop" in message
    assert "Row: 2 of 0 to 3" in message and "'answer 2'" in message
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_batch_that_is_slow_as_a_whole():
    def slow(completions, **_):
        return [1.0] if len(completions) == 1 else endless()

    assert "Row: none was found that fails alone" in message_of(slow, seconds=0.2)


def test_an_alarm_at_any_moment_leaves_no_trace():
    """Limits from a microsecond up, so that alarms ring before, in and after the reward."""
    handler, ends = signal.getsignal(signal.SIGALRM), set()
    for i in range(1, 500):
        try:
            once = guarded(lambda **_: [sum(range(200))], seconds=i * 1e-6, process=False)
            ends.add(once(**batch_of(1))[0])
        except RewardError as error:
            ends.add("nothing within" in str(error))
        assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert ends == {True, 19_900.0}


def test_a_limit_around_it_rings_when_it_would_have_rung():
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()

    def training():
        while time.monotonic() < start + 3:
            guarded(lambda **_: [0.5], seconds=5)(**batch_of(1))

    with pytest.raises(TimeUp, match=r"no answer after 0\.3 s"):
        in_time(TimeUp(0.3), training)
    assert time.monotonic() - start < 2 and signal.getsignal(signal.SIGALRM) is handler


def test_an_alarm_that_is_lost_rings_again(monkeypatch):
    """Python passes over what is raised while it deletes an object, or in a callback of the garbage collector."""

    class Slow:
        def __del__(self):
            time.sleep(0.5)

    def training():
        Slow()
        endless()

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(TimeUp, match=r"no answer after 0\.2 s"):
        in_time(TimeUp(0.2), training)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_slow_reward_does_not_hold_up_the_limit_around_it_nor_is_it_blamed_for_it():
    start = time.monotonic()
    with pytest.raises(TimeUp, match=r"no answer after 0\.2 s"):
        in_time(TimeUp(0.2), guarded(lambda **_: time.sleep(3), seconds=5), **batch_of(1))
    assert time.monotonic() - start < 2


def test_a_longer_limit_around_it_runs_on():
    def training():
        guarded(lambda **_: [0.5], seconds=0.5)(**batch_of(1))
        return signal.getitimer(signal.ITIMER_REAL)[0]

    assert 3 < in_time(TimeUp(5), training) <= 5


def test_columns_may_have_any_name():
    assert guarded(lambda **_: [0.5])(**batch_of(1), seconds=[1], function=[2], limit=[3]) == [0.5]


def test_tried_by_hand_without_prompts_it_names_the_fault_too():
    with pytest.raises(RewardError, match=r"(?s)ZeroDivisionError.*Row: 0 of 0 to 1\n  completion: 'a'"):
        guarded(lambda completions, **_: [divide() for _ in completions])(completions=["a", "b"])


def test_an_alarm_of_somebody_else_is_late_but_not_lost_and_the_limit_holds():
    """Due before the limit, with a handler that raises nothing."""
    rang, start = [], time.monotonic()
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic() - start))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(TimeUp, match=r"no answer after 0\.4 s"):
            in_time(TimeUp(0.4), endless)
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(rang) == 1 and 0.4 <= rang[0] < 1.4


def test_without_a_limit_it_warns():
    with ThreadPoolExecutor(1) as pool, pytest.warns(NoTimeLimit, match="main thread"):
        assert pool.submit(in_time, TimeUp(1), divmod, 7, 2).result() == (3, 1)


def test_in_a_worker_thread_where_no_alarm_can_ring_it_works_too():
    found = []
    worker = threading.Thread(target=lambda: found.append(guarded(broken_at(9, divide))(**batch_of(2))))
    worker.start()
    worker.join()
    assert found == [[0.5, 0.5]]


# --- A process of its own ---------------------------------------------------------------------------------------------


def test_an_alarm_that_another_thread_takes_does_not_raise_inside_a_fork(monkeypatch):
    """It would leave `logging` locked for ever, and the next fork of another thread would wait."""
    started, over = [], threading.Event()
    waits = threading.Thread(target=over.wait)
    waits.start()
    start = multiprocessing.context.ForkProcess.start

    def slow(process):
        signal.pthread_kill(waits.ident, signal.SIGALRM)
        for _ in range(1000):
            time.sleep(0)  # Python calls the handler here, in the main thread
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", slow)
    try:
        with pytest.raises(TimeUp):
            in_time(TimeUp(60), guarded(lambda **_: [0.5], process=True), **batch_of(1))
    finally:
        over.set()
        waits.join()
    assert started and not started[0].is_alive()


def backtracks(completions, **_):
    return [float(bool(re.fullmatch("(a+)+b", text[0]["content"]))) for text in completions]


def counts(completions, **_):
    numbers = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(x) FROM r LIMIT 1"
    sqlite3.connect(":memory:").execute(numbers if "a" * 40 in completions[-1][0]["content"] else "SELECT 1")
    return [0.0] * len(completions)


@pytest.mark.parametrize("hangs", [backtracks, counts])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_hang_in_compiled_code_is_stopped_and_the_next_call_works(hangs, in_thread):
    """No alarm is heard in either. The clock only finds what hangs."""
    call = guarded(hangs, seconds=1)
    assert call.limit == "process" and "limit='process'" in repr(call)
    fine = [[{"role": "assistant", "content": text}] for text in ("aab", "ab", "b")]
    stuck = [*fine[:2], [{"role": "assistant", "content": "a" * 40}]]
    with ThreadPoolExecutor(1) if in_thread else contextlib.nullcontext() as pool:
        run = (lambda **batch: pool.submit(call, **batch).result()) if in_thread else call
        right = run(completions=fine)
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"nothing within 1 s.*(?s:.*)Row: 0 of 0 to 0\n"):
            run(completions=stuck[2:])
        assert time.monotonic() - start < 1 + 1 and run(completions=fine) == right
        with pytest.raises(RewardError, match=r"nothing within 1 s.*(?s:.*)Row: 2 of 0 to 2\n"):
            run(completions=stuck)
        assert run(completions=fine) == right


def test_a_hang_that_hears_no_alarm_is_said_and_not_tried_again():
    """As in C: the signal waits until the call is over."""
    calls = []

    def deaf(completions, **_):
        calls.append(completions)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(1.2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        return [0.0] * len(completions)

    message = message_of(deaf, seconds=0.1)
    assert "got nothing within 0.1 s" in message and len(calls) == 1
    assert "Row: not looked for, since a call into C went on for 1 s" in message


LIMIT, TOTAL, CALLS = 0.5, 0, []


def reads_limit(completions, **_):
    return [LIMIT for _ in completions]


def sets_total(completions, **_):
    global TOTAL
    TOTAL += 1
    return [1.0] * len(completions)


def fills_calls(completions, **_):
    return [float(CALLS.append(text) or len(CALLS)) for text in completions]


def calls_that(completions, **_):
    return fills_calls(completions)


def draws(completions, **_):
    return [random.random() for _ in completions]


def closed_over(kept):
    def right(completions, **_):
        return [kept and 1.0 for _ in completions]

    return right


@pytest.mark.parametrize(
    ("reward", "limit", "why"),
    [
        (reads_limit, "process", "nothing"),
        (closed_over(("a", 1)), "process", "nothing"),
        (closed_over(math.log), "process", "nothing"),
        (closed_over(functools.lru_cache(reads_limit)), "alarm", "kept (_lru_cache_wrapper)"),
        (closed_over({"a": 1}), "alarm", "kept (dict)"),
        (closed_over(torch.ones(1)), "alarm", "kept (Tensor)"),
        (closed_over([].append), "alarm", "kept (builtin_function_or_method)"),
        (functools.partial(reads_limit, gold=[1]), "alarm", "itself (partial)"),
        (draws, "alarm", "uses random"),
        (lambda environments, **_: [world.reward for world in environments], "alarm", "environments"),
        (sets_total, "alarm", "sets TOTAL"),
        (fills_calls, "alarm", "CALLS (list)"),
        (calls_that, "alarm", "CALLS (list)"),
    ],
)
def test_it_takes_a_process_where_nothing_is_lost_and_says_why(reward, limit, why):
    call = guarded(reward)
    assert call.limit == limit and why in call.why and call.why in repr(call)
    assert guarded(reward, process=False).limit == "alarm" and guarded(reward, process=True).limit == "process"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_where_it_is_not_safe_to_fork_it_says_so(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert guarded(reads_limit).limit == "alarm" and f"not safe to fork on {platform}" in repr(guarded(reads_limit))
    monkeypatch.delattr(signal, "setitimer")
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ValueError, match=f"wanted a system that can fork: {platform}"):
        guarded(reads_limit, process=True)
    call = guarded(reads_limit)
    assert call.limit == "none" and f"{platform} has no alarms" in repr(call)
    with pytest.warns(NoTimeLimit, match="no limit of 10 s"):
        assert call(**batch_of(1)) == [LIMIT]


def test_state_that_this_process_holds_is_not_lost():
    before = TOTAL
    for reward in (sets_total, calls_that):
        for _ in range(2):
            guarded(reward)(**batch_of(2))
    assert before + 2 == TOTAL and len(CALLS) == 4


def test_what_the_reward_uses_may_be_given_another_meaning(monkeypatch):
    call = guarded(reads_limit)
    assert call(**batch_of(2)) == [0.5, 0.5]
    monkeypatch.setitem(globals(), "LIMIT", 0.25)
    assert call(**batch_of(2)) == [0.25, 0.25]


def test_each_batch_has_a_process_that_is_over_with_the_call():
    call = guarded(lambda **_: [float(os.getpid())])
    before = multiprocessing.active_children()
    first, second = call(**batch_of(1)), call(**batch_of(1))
    assert len({*first, *second, float(os.getpid())}) == 3
    assert multiprocessing.active_children() == before


def test_the_state_of_random_numbers_moves_on_in_this_process():
    call = guarded(draws)
    assert call(**batch_of(2)) != call(**batch_of(2))


def test_what_it_logs_and_prints_arrives(capsys):
    def talks(completions, log_extra, log_metric, trainer_state, **_):
        log_extra("words", [len(text) for text in completions])
        log_metric(name="step", value=trainer_state.global_step)
        print("seen", len(completions))
        return [1.0] * len(completions)

    logged, call = [], guarded(talks)
    logs = {name: lambda *arguments, **named: logged.append((arguments, named)) for name in ("log_extra", "log_metric")}
    call(**batch_of(2, trainer_state=TrainerState(global_step=7)), **logs)
    assert call.limit == "process" and logged == [(("words", [1, 1]), {}), ((), {"name": "step", "value": 7})]
    assert capsys.readouterr().out == "seen 2\n"


@pytest.mark.parametrize("end", [lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGKILL), sys.exit])
def test_a_crash_of_the_process_is_an_error_that_names_the_row(end):
    message = message_of(broken_at(1, end))
    assert "a process that ended with exit code" in message and "Row: 1 of 0 to 3\n" in message
    assert "a crash in compiled code" in message


class OddError(Exception):
    def __init__(self, one, two) -> None:
        super().__init__(f"{one} and {two}")


def odd():
    raise OddError("bread", "tea")


def test_an_error_that_cannot_be_sent_arrives_as_its_words_and_its_place():
    with pytest.raises(RewardError, match="got OddError: bread and tea,") as caught:
        guarded(broken_at(1, odd), process=True)(**batch_of(3))
    assert "in odd" in str(caught.value.__cause__)


def test_a_batch_that_cannot_be_pickled_runs_in_a_process_too():
    call = guarded(backtracks, seconds=1)
    assert call(**batch_of(1, lock=threading.Lock())) == [0.0] and call.limit == "process"


def test_after_an_alarm_around_it_a_late_answer_is_not_the_next_batchs():
    def sleeps(gold, **_):
        time.sleep(float(gold[0]))
        return [float(gold[0])]

    call = guarded(sleeps, seconds=5)
    with pytest.raises(TimeUp):
        in_time(TimeUp(0.3), call, **batch_of(1, gold=["1"]))
    assert call(**batch_of(1, gold=["0.01"])) == [0.01]


class Twice:
    """A reward that is an object, here round another one."""

    def __init__(self, func) -> None:
        self.func = func

    def __call__(self, **batch):
        return [2 * value for value in self.func(**batch)]


RIGHT, TWICE = broken_at(9, divide), Twice(broken_at(9, divide))


@pytest.mark.parametrize(
    ("reward", "name"),
    [(RIGHT, "right"), (TWICE, "Twice"), (functools.partial(RIGHT), "right"), (functools.partial(TWICE), "Twice")],
)
def test_it_has_the_name_under_which_trl_logs_the_reward(reward, name):
    assert guarded(reward).__name__ == get_callable_name(reward) == name


# --- In GRPOTrainer ---------------------------------------------------------------------------------------------------


def trainer_in(folder: Path, tiny: Path, reward, **settings) -> GRPOTrainer:
    set_seed(0)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(24)])
    options = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False} | settings
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        reward_funcs=[reward],
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        args=GRPOConfig(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
            per_device_train_batch_size=4, num_generations=4, max_completion_length=8, **options,
        ),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip


def right(completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def breaks(step: int, fault):
    def right_until_then(completion_ids, trainer_state, **_):
        rewards = right(completion_ids)
        return rewards if trainer_state.global_step + 1 < step else [rewards[0], fault(), *rewards[2:]]

    return right_until_then


def test_a_run_whose_reward_breaks_goes_on_from_its_last_checkpoint_to_the_same_bytes(tmp_path, tiny):
    """With num_iterations=2 two steps share one sample, which TRL does not save: the break lies between two samples."""
    flags = {"num_iterations": 2, "max_steps": 4}
    trainer_in(tmp_path / "whole", tiny, guarded(right), **flags).train()
    folder = tmp_path / "broken"
    with pytest.raises(RewardError, match=r"right_until_then: got nan, (?s:.*)Row: 1 of 0 to 3\n  prompt: .*What is"):
        trainer_in(folder, tiny, guarded(breaks(3, lambda: NAN)), **flags).train()
    assert last_good_checkpoint(folder) == str(folder / "checkpoint-2")
    mended = trainer_in(folder, tiny, guarded(right), **flags)
    mended.train(resume_from_checkpoint=last_good_checkpoint(folder))
    name = "checkpoint-4/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert any("rewards/right/mean" in record for record in mended.state.log_history)


@pytest.mark.parametrize(("value", "silent"), [(NAN, [1]), (INF, [0, 1, 2, 3])])
def test_what_trl_alone_makes_of_nan_and_infinity(tmp_path, tiny, value, silent):
    """The rows with the advantage 0: that of the NaN, or the whole group of the infinite reward. The run goes on."""
    trainer = trainer_in(tmp_path, tiny, lambda **_: [0.0, value, 0.25, 1.0], max_steps=1)
    batches, sample = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(sample(inputs)) or dict(batches[-1])
    trainer.train()
    assert [row for row, advantage in enumerate(batches[0]["advantages"]) if advantage == 0] == silent
