"""`GRPOTrainer(reward_funcs=[guarded(right)])`: a broken reward stops the run with one error that names the row.

TRL alone takes a NaN for None ("does not apply") and trains on, an infinite reward makes all advantages of its group 0,
and an endless loop in the check of one answer holds the run for ever.
"""

import functools
import math
import reprlib
import signal
import threading
import time
from collections.abc import Callable

CAUSES = {
    "raises": "an answer that it does not expect (empty, cut off, no number). If every row raises: no **kwargs in its "
    "signature, a column that the data lacks, or messages taken for text (completion[0]['content'])",
    "slow": "an endless loop, a regex that backtracks, a slow judge; or `seconds` is too small",
    "no list": "no `return`, a `yield`, or the reward of one answer or of the whole batch",
    "count": "a filter or `continue` skips rows, a `return` stands inside the loop, or it gives one reward a prompt",
    "value": "0/0, log(0), the mean of nothing, a score that is still text, or shape (B, 1) for (B,)",
}
GO_ON = """The run is not lost if it wrote a checkpoint (save_strategy="steps"; save_steps is 500 unless you set it).
Mend the reward, build the trainer again with the same output_dir, and go on:
trainer.train(resume_from_checkpoint=last_good_checkpoint(output_dir))"""
FLOAT32_MAX = 3.4028234663852886e38  # TRL keeps rewards in float32
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100  # characters; the middle is left out


class RewardError(ValueError):
    """What a reward gave and what was wanted, in which row, the likely cause, and how the run goes on."""


class _TimeUp(BaseException):
    """No Exception, so that a reward's own `except Exception` does not swallow it."""


def guarded(reward: Callable, seconds: float = 10.0) -> Callable[..., list[float | None]]:
    """The same reward under the same name; its value is a list with a float or None for each of the B completions.

    Raises RewardError if the reward raises, returns no list, tuple, tensor or array of shape (B,), gives a value that
    is no finite number, or needs more than `seconds` for a batch. To find the row it then calls the reward row by row,
    for about `seconds` more. An alarm interrupts Python code and sleeps, but not a call into C. Outside of the main
    thread and on Windows the time is only measured afterwards: an endless loop stays endless.

    Raises TypeError for an async reward or a hub id, and ValueError for a time that is not above 0.
    """
    from trl.trainer.utils import get_callable_name, is_async_callable

    if not callable(reward) or is_async_callable(reward):
        raise TypeError(f"reward: got {_short.repr(reward)}, wanted a function, not async; give TRL others as they are")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: got {seconds!r}, wanted the time that one batch may take, above 0 and finite")

    @functools.wraps(reward)
    def call(**batch):
        try:
            return _rewards(reward, batch, seconds)
        except RewardError as fault:
            message = f"reward {call.__name__}: {_in_words(fault, reward, batch, seconds)}"
            raise RewardError(message) from fault.__cause__

    call.__name__ = get_callable_name(reward)  # TRL logs by it; a partial or an object has none
    return call


def _rewards(reward: Callable, batch: dict, seconds: float) -> list[float | None]:
    """The rewards. Its RewardError has the args: a key of CAUSES, what was got, and the row if it is known."""
    try:
        result = _in_time(reward, batch, seconds)
    except _TimeUp:
        raise RewardError("slow", f"nothing within {seconds:g} s", None) from None
    except Exception as error:
        raise RewardError("raises", f"{type(error).__name__}: {error!s:.300}", None) from error
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardError("no list", _short.repr(result), None)
    if len(values) != len(batch["completions"]):
        raise RewardError("count", f"{len(values)} rewards", None)
    for row, value in enumerate(values):
        try:
            good = value is None or (not isinstance(value, str) and abs(float(value)) <= FLOAT32_MAX)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
            good = False
        if not good:
            raise RewardError("value", _short.repr(value), row)
    return [value if value is None else float(value) for value in values]


def _in_time(reward: Callable, batch: dict, seconds: float) -> object:
    """What the reward returns. Raises _TimeUp; an alarm that was set before is then set again."""
    armed, start = True, time.monotonic()

    def ring(*_):
        if armed:
            raise _TimeUp

    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if alarm:
        left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, seconds)
            result = reward(**batch)
        finally:
            armed = False  # an alarm that rings before this line does not ring again
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, left and max(left - time.monotonic() + start, 1e-6), interval)
    if time.monotonic() - start > seconds:
        raise _TimeUp
    return result


def _in_words(fault: RewardError, reward: Callable, batch: dict, seconds: float) -> str:
    """The message. A row that is not known is searched for: each alone, in half of the time at most."""
    kind, got, row = fault.args
    size, end, rows = len(batch["completions"]), time.monotonic() + seconds / 2, [] if row is None else [row]
    for i in range(size if row is None else 0):
        own = {key: [v[i]] if isinstance(v, list) and len(v) == size else v for key, v in batch.items()}
        try:
            if time.monotonic() < end:
                _rewards(reward, own, seconds / 2)
        except RewardError as alone:
            if alone.args[0] == kind and type(alone.__cause__) is type(fault.__cause__):
                rows.append(i)
    where = "Row: none was found that does it alone, so it is the batch as a whole, or chance."
    if rows:
        turns = [(key, batch[key][rows[0]]) for key in ("prompts", "completions") if key in batch]
        texts = [f"\n  {key[:-1]}: {_short.repr(x[-1:] if isinstance(x, list) else x)}" for key, x in turns]
        where = f"Row: {rows[0]} of 0 to {size - 1}{f', and {len(rows) - 1} more' * (len(rows) > 1)}{''.join(texts)}"
    wanted = f"a list of {size} finite numbers or None, one for each completion, within {seconds:g} s"
    return f"got {got}, wanted {wanted}.\n{where}\nLikely cause: {CAUSES[kind]}.\n{GO_ON}"
