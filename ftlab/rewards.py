"""`GRPOTrainer(reward_funcs=[guarded(right)])`: a broken reward stops the run with one error that names the row.

TRL alone takes a NaN for None ("does not apply") and trains on, an infinite reward makes all advantages of its group 0,
and an endless loop in the check of one answer holds the run for ever.
"""

import functools
import inspect
import reprlib
import signal
import threading
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

CAUSES = {
    "raises": "an answer that it does not expect (empty, no number), a column that the data lacks, or no **kwargs",
    "slow": "an endless loop, a regex that backtracks, a slow judge; or `seconds` is too small",
    "shape": "no `return`, one inside the loop, a `yield`, a filter that skips rows, or one reward a prompt",
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


class TimeUp(BaseException):
    """TimeUp(seconds); no Exception, so that the code's own `except Exception` does not swallow it."""

    def __str__(self) -> str:
        return f"no answer after {self.args[0]:g} s: is there an endless loop?"


def guarded(reward: Callable, seconds: float = 10.0) -> Callable[..., list[float | None]]:
    """The same reward under the same name; its value is a list with a float or None for each of the B completions.

    Raises RewardError if the reward raises, returns no list or tensor of shape (B,), gives a value that is no finite
    number, or needs more than `seconds` for a batch, by the process's one alarm (SIGALRM), which a call into C does not
    hear. To find the row it then calls the reward row by row. Raises TypeError for an async reward.
    """
    from trl.trainer.utils import get_callable_name

    if any(map(inspect.iscoroutinefunction, (reward, reward.__call__))):
        raise TypeError(f"got {reward!r}: async rewards are not guarded; give them to GRPOTrainer directly")

    @functools.wraps(reward)
    def call(**batch):
        if not isinstance(found := _called(reward, batch, seconds), _Fault):
            return found
        wanted = f"a list of {len(batch['completions'])} finite numbers or None, one for each completion"
        first = f"reward {call.__name__}: got {found.got}, wanted {wanted}, within {seconds:g} s.\n"
        where = _where(found, reward, batch, seconds)
        raise RewardError(f"{first}{where}\nLikely cause: {CAUSES[found.cause]}.\n{GO_ON}") from found.error

    call.__name__ = get_callable_name(reward)  # a functools.partial has none of its own
    return call


def _called(reward: Callable, batch: dict, seconds: float) -> list[float | None] | _Fault:
    """The rewards, or what is wrong with them."""
    limit = TimeUp(seconds)
    try:
        values = in_time(limit, reward, **batch)
    except TimeUp as error:
        if error is not limit:  # of a limit around this one
            raise
        return _Fault("slow", f"nothing within {seconds:g} s")
    except Exception as error:
        return _Fault("raises", f"{type(error).__name__}: {error!s:.300}", error=error)
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(batch["completions"]):
        return _Fault("shape", _short.repr(values))
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    for row, value in enumerate(values):  # TRL keeps rewards in float32, whose largest number is 3.4028e38
        if value is not None and not (isinstance(value, Real) and abs(value) < 3.4028235e38):
            return _Fault("value", _short.repr(value), row)
    return [value if value is None else float(value) for value in values]


def in_time(limit: TimeUp, function: Callable, /, *arguments: Any, **named: Any) -> Any:
    """What the function returns. Raises the limit, where there are alarms (in the main thread, not on Windows)."""

    def ring(*_):
        raise limit

    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    (left, again), start = signal.getitimer(signal.ITIMER_REAL) if alarm else (0, 0), time.monotonic()  # of one around
    if not alarm or 0 < left <= limit.args[0]:
        return function(*arguments, **named)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit.args[0], 1)  # again, as what is raised in a __del__ is lost
            return function(*arguments, **named)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own, since the alarm may ring in the first one
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left and max(left + start - time.monotonic(), 1e-6), again)


def _where(fault: _Fault, reward: Callable, batch: dict, seconds: float) -> str:
    """The row of the fault in words: the one that is known, or else the first that fails alone."""
    size = len(batch["completions"])

    def fails(row: int) -> bool:
        own = {key: [v[row]] if isinstance(v, list) and len(v) == size else v for key, v in batch.items()}
        return isinstance(_called(reward, own, seconds), _Fault)

    row = next(filter(fails, range(size)), None) if fault.row is None else fault.row
    if row is None:
        return "Row: none was found that fails alone, so it is the batch as a whole, or chance."
    texts = {key[:-1]: batch[key][row] for key in ("prompts", "completions") if key in batch}
    said = (f"\n  {key}: {_short.repr(t[-1:] if isinstance(t, list) else t)}" for key, t in texts.items())
    return f"Row: {row} of 0 to {size - 1}{''.join(said)}"
