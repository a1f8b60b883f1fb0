"""`GRPOTrainer(reward_funcs=[guarded(right)])`: a broken reward stops the run with one error that names the row.

TRL alone takes a NaN for None ("does not apply") and trains on, an infinite reward makes all advantages of its group 0,
and an endless loop in the check of one answer holds the run for ever.
"""

import functools
import reprlib
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

CAUSES = {
    "raises": "an answer that it does not expect (empty, cut off, no number). If every row raises: no **kwargs in its "
    "signature, a column that the data lacks, or messages taken for text (completion[0]['content'])",
    "slow": "an endless loop, a regex that backtracks, a slow judge; or `seconds` is too small",
    "no list": "no `return`, a `yield`, an async function, or the reward of one answer or of the whole batch",
    "count": "a filter or `continue` skips rows, a `return` stands inside the loop, or it gives one reward a prompt",
    "value": "0/0, log(0), the mean of nothing, a score that is still text, or shape (B, 1) for (B,)",
}
GO_ON = """The run is not lost if it wrote a checkpoint (save_strategy="steps"; save_steps is 500 unless you set it).
Mend the reward, build the trainer again with the same output_dir, and go on:
trainer.train(resume_from_checkpoint=last_good_checkpoint(output_dir))"""
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100  # characters; the middle is left out


class RewardError(ValueError):
    """What a reward gave and what was wanted, in which row, the likely cause, and how the run goes on."""


class _Fault(NamedTuple):
    cause: str  # a key of CAUSES
    got: str
    row: int | None = None
    error: Exception | None = None


class _TimeUp(BaseException):
    """No Exception, so that a reward's own `except Exception` does not swallow it."""


def guarded(reward: Callable, seconds: float = 10.0) -> Callable[..., list[float | None]]:
    """The same reward under the same name; its value is a list with a float or None for each of the B completions.

    Raises RewardError if the reward raises, returns no list, tuple, tensor or array of shape (B,), gives a value that
    is no finite number, or needs more than `seconds` for a batch. To find the row it then calls the reward row by row,
    for about `seconds` more. An alarm interrupts Python code and sleeps, but not a call into C; outside of the main
    thread and on Windows there is none.
    """

    @functools.wraps(reward)
    def call(**batch):
        found = _called(reward, batch, seconds)
        if isinstance(found, list):
            return found
        wanted = f"a list of {len(batch['completions'])} finite numbers or None, one for each completion"
        raise RewardError(
            f"reward {call.__name__}: got {found.got}, wanted {wanted}, within {seconds:g} s.\n"
            f"{_where(found, reward, batch, seconds)}\nLikely cause: {CAUSES[found.cause]}.\n{GO_ON}"
        ) from found.error

    call.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL logs by it
    return call


def _called(reward: Callable, batch: dict, seconds: float) -> list[float | None] | _Fault:
    """The rewards, or the first fault."""
    try:
        result = _in_time(reward, batch, seconds)
    except _TimeUp:
        return _Fault("slow", f"nothing within {seconds:g} s")
    except Exception as error:
        return _Fault("raises", f"{type(error).__name__}: {error!s:.300}", error=error)
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        return _Fault("no list", _short.repr(result))
    if len(values) != len(batch["completions"]):
        return _Fault("count", f"{len(values)} rewards")
    for row, value in enumerate(values):
        try:  # TRL keeps rewards in float32, whose largest number is 3.4028e38
            good = value is None or (not isinstance(value, str) and abs(float(value)) < 3.4028235e38)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
            good = False
        if not good:
            return _Fault("value", _short.repr(value), row)
    return [value if value is None else float(value) for value in values]


def _in_time(reward: Callable, batch: dict, seconds: float) -> object:
    """What the reward returns. Raises _TimeUp, where an alarm can be set: in the main thread, and not on Windows."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return reward(**batch)

    def ring(*_):
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return reward(**batch)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own, since the alarm may ring in the first one
        signal.signal(signal.SIGALRM, before)


def _where(fault: _Fault, reward: Callable, batch: dict, seconds: float) -> str:
    """The first row that has this fault alone, in words. One that is not known is searched for, in half of the time."""
    row, size, end = fault.row, len(batch["completions"]), time.monotonic() + seconds / 2
    for i in range(size if row is None else 0):
        own = {key: [v[i]] if isinstance(v, list) and len(v) == size else v for key, v in batch.items()}
        alone = _called(reward, own, seconds / 2)
        if isinstance(alone, _Fault) and (alone.cause, type(alone.error)) == (fault.cause, type(fault.error)):
            row = i
        if row is not None or time.monotonic() > end:
            break
    if row is None:
        return "Row: none was found that does it alone, so it is the batch as a whole, or chance."
    turns = [(key, batch[key][row]) for key in ("prompts", "completions") if key in batch]
    texts = [f"\n  {key[:-1]}: {_short.repr(x[-1:] if isinstance(x, list) else x)}" for key, x in turns]
    return f"Row: {row} of 0 to {size - 1}{''.join(texts)}"
