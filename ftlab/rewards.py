"""`GRPOTrainer(reward_funcs=[guarded(right)])`: a broken reward stops the run and names the row.

TRL alone takes a NaN for None ("does not apply") and trains on, an infinite reward makes all
advantages of its group 0, and an endless loop holds the run for ever.

An alarm (SIGALRM) ends a loop in Python, but no call into C (a regex that backtracks, a query). A
process can be killed at any time, but what it changes is lost. So `guarded` runs each batch in a
fork of this process if nothing gets lost that way.
"""

import contextlib
import dis
import functools
import inspect
import io
import multiprocessing
import os
import re
import reprlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

CAUSES = {
    "died": "a crash in compiled code, sys.exit, or no memory left",
    "raises": "an answer that it does not expect (empty, no number), a missing column, or no **kwargs",
    "slow": "an endless loop, a regex that backtracks, a slow judge; or `seconds` is too small",
    "shape": "no `return`, one inside the loop, a `yield`, a filter that skips rows, or one reward a prompt",
    "value": "0/0, log(0), the mean of nothing, a score that is still text, or shape (B, 1) for (B,)",
}
GO_ON = """\
The run is not lost if it wrote a checkpoint (save_strategy="steps"; save_steps is 500 by default).
Mend the reward, build the trainer again with the same output_dir, and go on:
trainer.train(resume_from_checkpoint=last_good_checkpoint(output_dir))"""
LOGS = {"log_extra", "log_metric"}  # TRL's columns that are functions
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, re.Pattern, ModuleType)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100  # characters; the middle is left out


class RewardError(ValueError):
    """What was got and wanted, in which row, the likely cause, and how to go on."""


class NoTimeLimit(RuntimeWarning):
    """Something runs without a time limit."""


class TimeUp(BaseException):
    """TimeUp(seconds); no Exception, so that the code's own `except Exception` lets it pass."""

    def __str__(self) -> str:
        return f"no answer after {self.args[0]:g} s: is there an endless loop?"


class _Fault(NamedTuple):
    cause: str  # a key of CAUSES
    got: str
    row: int | None = None
    error: Exception | None = None


def guarded(reward: Callable, seconds: float = 10.0, process: bool | None = None) -> "Guarded":
    """The same reward under the same name, checked: a float or None for each of B completions.

    Its `limit` says what ends it after `seconds`, its `why` and its repr why this was chosen:

    - "process": a fork for each batch, killed in C too. What it prints and gives to TRL's log_extra
      and log_metric arrives; all else is lost, such as a cache in an imported module.
    - "alarm": SIGALRM, in Python code only.
    - "none": no alarms (Windows); each call warns with NoTimeLimit.

    It is a process on Linux if the reward's own code (functions of the same notebook or file) sets
    nothing outside, draws no random numbers, and uses no list, model or other object that this
    process holds too. `process` overrules the choice (macOS can fork, but libraries may crash).

    Raises TypeError for an async reward; when called RewardError if the reward raises, gives
    anything but B finite numbers or None, or takes longer. It tries row by row to name the one.
    """
    if any(map(inspect.iscoroutinefunction, (reward, reward.__call__))):
        raise TypeError(f"got {reward!r}: async is not guarded; give it to GRPOTrainer directly")
    if process and not hasattr(os, "fork"):
        raise ValueError(f"got process=True, wanted a system that can fork: {sys.platform} can't")
    return Guarded(reward, seconds, *_chosen(reward, process))


def _chosen(reward: Callable, process: bool | None) -> tuple[str, str]:
    """The kind of limit, and why."""
    if process:
        return "process", "process=True"
    if not hasattr(signal, "setitimer"):
        return "none", f"{sys.platform} has no alarms"
    if process is False:
        reason = "process=False"
    elif sys.platform != "linux":
        reason = f"it is not safe to fork on {sys.platform}"
    else:
        reason = _lost(reward)
    if reason:
        return "alarm", f"{reason}; a call into C is not stopped"
    return "process", "it shares nothing with this process that it could change"


class Guarded:
    """What `guarded` returns."""

    def __init__(self, reward: Callable, seconds: float, limit: str, why: str) -> None:
        from trl.trainer.utils import get_callable_name

        self.__name__ = get_callable_name(reward)  # a functools.partial has none of its own
        self.reward, self.seconds, self.limit, self.why = reward, seconds, limit, why

    def __repr__(self) -> str:
        call = f"guarded({self.__name__}, seconds={self.seconds:g}, limit={self.limit!r})"
        return f"{call}  # {self.why}"

    def __call__(self, /, **batch) -> list[float | None]:
        start = time.monotonic()
        found = self._called(batch)
        if not isinstance(found, _Fault):
            return found
        where = self._where(found, batch, time.monotonic() - start)
        size = len(batch["completions"])
        wanted = f"a list of {size} finite numbers or None, one for each completion"
        first = f"reward {self.__name__}: got {found.got}, wanted {wanted}"
        likely = f"Likely cause: {CAUSES[found.cause]}."
        lines = [f"{first}, within {self.seconds:g} s.", where, likely, GO_ON]
        raise RewardError("\n".join(lines)) from found.error

    def _called(self, batch: dict) -> list[float | None] | _Fault:
        run = _in_fork if self.limit == "process" else _under_alarm
        return run(self.reward, batch, self.seconds)

    def _where(self, fault: _Fault, batch: dict, took: float) -> str:
        """The row in words: the one that is known, or else the first to fail alone."""
        if took > self.seconds + 1:
            return f"Row: not looked for, since a call into C went on for {took:.0f} s."
        row = self._first_to_fail(batch) if fault.row is None else fault.row
        if row is None:
            return "Row: none was found that fails alone, so it is the whole batch, or chance."
        said = f"Row: {row} of 0 to {len(batch['completions']) - 1}"
        for key in ("prompt", "completion"):
            if f"{key}s" in batch:
                text = batch[f"{key}s"][row]
                said += f"\n  {key}: {_short.repr(text[-1:] if isinstance(text, list) else text)}"
        return said

    def _first_to_fail(self, batch: dict) -> int | None:
        size = len(batch["completions"])
        if size == 1:
            return 0
        for row in range(size):
            alone = {}
            for name, column in batch.items():
                is_per_row = isinstance(column, list) and len(column) == size
                alone[name] = [column[row]] if is_per_row else column
            if isinstance(self._called(alone), _Fault):
                return row
        return None


def _checked(reward: Callable, batch: dict) -> list[float | None] | _Fault:
    """The rewards as floats and None, or what is wrong with them."""
    try:
        values = reward(**batch)
    except Exception as error:
        return _Fault("raises", f"{type(error).__name__}: {error!s:.300}", error=error)
    values = _plain(values)
    if not isinstance(values, list | tuple) or len(values) != len(batch["completions"]):
        return _Fault("shape", _short.repr(values))
    values = [_plain(value) for value in values]
    for row, value in enumerate(values):  # TRL keeps them in float32, up to 3.4028e38
        if value is not None and not (isinstance(value, Real) and abs(value) < 3.4028235e38):
            return _Fault("value", _short.repr(value), row)
    return [value if value is None else float(value) for value in values]


def _plain(value: Any) -> Any:
    """Lists and numbers of tensors."""
    return value.tolist() if hasattr(value, "tolist") else value


# --- An alarm -------------------------------------------------------------------------------------


def _under_alarm(reward: Callable, batch: dict, seconds: float) -> list[float | None] | _Fault:
    alarm = TimeUp(seconds)
    try:
        return _checked(functools.partial(in_time, alarm, reward), batch)
    except TimeUp as error:
        if error is alarm:
            return _Fault("slow", f"nothing within {seconds:g} s")
        raise  # of a limit around this one


def in_time(limit: TimeUp, function: Callable, /, *arguments: Any, **named: Any) -> Any:
    """What the function returns; raises the limit if it takes longer, as soon as C lets it.

    A limit around this one holds too; somebody else's alarm rings late, but is not lost. Warns with
    NoTimeLimit where there are no alarms.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not in_main:
        text = f"no limit of {limit.args[0]:g} s: no alarms on Windows and outside the main thread"
        warnings.warn(text, NoTimeLimit, stacklevel=2)
        return function(*arguments, **named)

    start = time.monotonic()
    left, again = signal.getitimer(signal.ITIMER_REAL)  # of an alarm around this one
    if 0 < left <= limit.args[0] and hasattr(signal.getsignal(signal.SIGALRM), "rung"):
        return function(*arguments, **named)  # that one is ours too, rings first, and raises

    over = False

    def ring(*signal_and_frame):
        if not over:
            ring.rung = True
            raise limit

    ring.rung = False
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, limit.args[0], 1)  # again: in a __del__ it is lost
            return function(*arguments, **named)
        except BaseException as error:
            if ring.rung and not isinstance(error, TimeUp):
                raise limit from error  # C code dropped what `ring` raised and gave another error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own, since the alarm may ring in the first one
        over = True
        signal.signal(signal.SIGALRM, before)
        rest = left and max(left + start - time.monotonic(), 1e-6)
        signal.setitimer(signal.ITIMER_REAL, rest, again)


# --- A process of its own -------------------------------------------------------------------------


def _in_fork(reward: Callable, batch: dict, seconds: float) -> list[float | None] | _Fault:
    """The rewards from a copy of this process as it stands."""
    from multiprocessing.context import ForkProcess  # not there on Windows

    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = ForkProcess(target=_fork, args=(reward, batch, seconds, theirs), daemon=True)
    try:
        with _signals_wait():
            process.start()
        theirs.close()
        if not ours.poll(seconds):
            return _Fault("slow", f"nothing within {seconds:g} s")
        found, logged, printed = ours.recv()
    except (EOFError, OSError):
        process.join(1)
        return _Fault("died", f"a process that ended with exit code {process.exitcode}")
    finally:
        ours.close()
        if process.pid is not None:
            process.kill()
            process.join()
    if printed:
        print(printed, end="")
    for name, given, named in logged:
        batch[name](*given, **named)
    return found


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Alarms and Ctrl-C that come meanwhile are handled at the end.

    One that raises inside a fork leaves a lock of `logging` held for ever. Blocking them in this
    thread does not help: another thread takes the signal, and Python calls the handler here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python calls handlers in the main thread alone
        return
    came = []
    with contextlib.ExitStack() as stack:
        for one in (signal.SIGALRM, signal.SIGINT):
            if (handler := signal.getsignal(one)) is not None:  # None: it is not Python's
                stack.callback(signal.signal, one, handler)
                signal.signal(one, lambda number, frame: came.append(number))
        yield
    for one in came:
        signal.raise_signal(one)


def _fork(reward: Callable, batch: dict, seconds: float, pipe: Any) -> None:
    """What the copy does: it sends the rewards, what was logged, what was printed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # ends it if the parent was killed
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # OpenMP would wait for threads of the parent
    logged, printed = [], io.StringIO()
    for name in LOGS & batch.keys():
        batch[name] = lambda *given, _name=name, **named: logged.append((_name, given, named))
    with contextlib.redirect_stdout(printed):
        found = _checked(reward, batch)
    if isinstance(found, _Fault) and found.error:  # not every error can be sent, but its text can
        text = "".join(traceback.format_exception(found.error))
        found = _Fault(found.cause, found.got, found.row, RuntimeError(text))
    pipe.send((found, logged, printed.getvalue()))


# --- What a copy of this process would lose -------------------------------------------------------


def _lost(reward: Callable) -> str | None:
    """In words, the first thing of this process that the reward may change."""
    seen, todo = [], [("itself", reward)]
    while todo:
        name, thing = todo.pop()
        if any(thing is other for other in seen):
            continue
        seen.append(thing)
        if isinstance(thing, FunctionType):
            if changes := _changes(thing):
                return changes
            todo += _used(thing)
        elif isinstance(thing, tuple):
            todo += [(name, part) for part in thing]
        elif not isinstance(thing, PLAIN):
            is_of_module = isinstance(getattr(thing, "__self__", None), ModuleType)  # math.log
            if not is_of_module:
                return f"it uses {name} ({type(thing).__name__}), which this process holds too"
    return None


def _changes(function: FunctionType) -> str | None:
    """In words, the first thing outside itself that a function changes."""
    outside = function.__code__.co_freevars
    for step in _steps(function):
        name = step.argval
        is_nonlocal = step.opname == "STORE_DEREF" and name in outside
        if is_nonlocal or step.opname in ("STORE_GLOBAL", "STORE_ATTR"):
            return f"{function.__name__} sets {name}, which this process would not see"
        if name == "environments":  # TRL's column of objects that live on
            return f"it uses {name}, which this process holds too"
        if step.opname != "LOAD_CONST" and str(name).startswith("rand"):
            return f"it uses {name}: each batch would draw the same numbers"
    return None


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names and values from outside a function, without functions and classes of other files."""
    for value in function.__defaults__ or ():
        yield "a default", value
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            yield name, cell.cell_contents
    known = function.__globals__  # without Python's builtins
    loaded = {step.argval for step in _steps(function) if step.opname == "LOAD_GLOBAL"}
    for name in sorted(loaded & known.keys()):
        is_code = isinstance(known[name], FunctionType | type)
        if not is_code or known[name].__module__ == function.__module__:
            yield name, known[name]


def _steps(function: FunctionType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of the lambdas and functions within it."""
    todo = [function.__code__]
    while todo:
        code = todo.pop()
        yield from dis.get_instructions(code)
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
