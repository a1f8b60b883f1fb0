"""`GRPOTrainer(reward_funcs=[guarded(right)])`: a broken reward stops the run with one error that names the row.

TRL alone takes a NaN for None ("does not apply") and trains on, an infinite reward makes all advantages of its group 0,
and an endless loop in the check of one answer holds the run for ever.

An alarm (SIGALRM) ends an endless loop in Python. It does not end a call into C (a regex that backtracks, a database, a
power of large numbers), since Python hears signals between two of its own instructions only. A process can be killed at
any time. So `guarded` runs a reward in a process of its own where nothing gets lost that way. Tests:
tests/test_rewards.py.
"""

import contextlib
import dis
import functools
import inspect
import io
import multiprocessing
import os
import pickle
import re
import reprlib
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from numbers import Real
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

CAUSES = {
    "died": "a crash in compiled code, sys.exit, or the memory ran out",
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
LOGS = ("log_extra", "log_metric")  # what TRL gives a reward to write into its log
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, re.Pattern, ModuleType)


class RewardError(ValueError):
    """What a reward gave and what was wanted, in which row, the likely cause, and how the run goes on."""


class NoTimeLimit(RuntimeWarning):
    """Something runs without a time limit, or without one that holds in C; the message says why."""


class TimeUp(BaseException):
    """TimeUp(seconds); no Exception, so that the code's own `except Exception` does not swallow it."""

    def __str__(self) -> str:
        return f"no answer after {self.args[0]:g} s: is there an endless loop?"


class _Fault(NamedTuple):
    cause: str  # a key of CAUSES
    got: str
    row: int | None = None
    error: Exception | None = None
    search: bool = True  # whether the rows may be tried one by one


def guarded(reward: Callable, seconds: float = 10.0, process: bool | None = None) -> "Guarded":
    """The same reward under the same name; its value is a list with a float or None for each of the B completions.

    Its `limit` says what ends it after `seconds`, its `why` and its repr why this was chosen:

    - "process": it runs in a forked process, which is killed, in C too. TRL's log_extra and
      log_metric work, and what it prints is printed. What else it changes (the state of `random`,
      say) stays in there, and it sees the imported modules as they were at its first call.
    - "alarm": SIGALRM, in Python code only.
    - "none": there are no alarms (Windows); it warns with NoTimeLimit.

    By itself it takes a process on Linux, if the reward's own code (functions of the same notebook
    or file, not of what they import) sets nothing outside and uses no list, dict, model or other
    object that this process holds too. It forks at the first call, and again if a name that the
    reward uses means something else by now. macOS can fork, but its libraries may crash then.
    `process` overrules the choice.

    Raises RewardError if the reward raises, returns no list or tensor of shape (B,), gives a value
    that is no finite number, or needs more than `seconds` for a batch; to find the row it then
    calls the reward row by row. Raises TypeError for an async reward, and ValueError for
    `process=True` where it is not safe to fork.
    """
    if any(map(inspect.iscoroutinefunction, (reward, reward.__call__))):
        raise TypeError(f"got {reward!r}: async rewards are not guarded; give them to GRPOTrainer directly")
    if process and sys.platform != "linux":
        raise ValueError(f"got process=True on {sys.platform}, wanted Linux: only there it is safe to fork")
    return Guarded(reward, seconds, process)


class Guarded:
    """What `guarded` returns."""

    def __init__(self, reward: Callable, seconds: float, process: bool | None) -> None:
        from trl.trainer.utils import get_callable_name

        functools.update_wrapper(self, reward)
        self.__name__ = get_callable_name(reward)  # a functools.partial has none of its own
        self.reward, self.seconds = reward, seconds
        refused = "process=False" if process is False else _no_process(reward)
        if process:
            self._take("process", "process=True")
        elif not refused:
            self._take("process", "it shares nothing with this process that it could change")
        elif hasattr(signal, "setitimer"):
            self._take("alarm", f"{refused}; a call into C is not stopped")
        else:
            self._take("none", f"{sys.platform} has no alarms")
            text = f"reward {self.__name__} has no time limit: {self.why}"
            warnings.warn(text, NoTimeLimit, stacklevel=3)

    def _take(self, limit: str, why: str) -> None:
        self.limit, self.why = limit, why
        self.worker = _Worker(self.reward) if limit == "process" else None

    def __repr__(self) -> str:
        return f"guarded({self.__name__}, seconds={self.seconds:g}, limit={self.limit!r})  # {self.why}"

    def __call__(self, /, **batch) -> list[float | None]:
        found = self._called(batch, self.seconds)
        if not isinstance(found, _Fault):
            return found
        size = len(batch["completions"])
        wanted = f"a list of {size} finite numbers or None, one for each completion"
        first = f"reward {self.__name__}: got {found.got}, wanted {wanted}, within {self.seconds:g} s.\n"
        where = self._where(found, batch)
        raise RewardError(f"{first}{where}\nLikely cause: {CAUSES[found.cause]}.\n{GO_ON}") from found.error

    def _called(self, batch: dict, seconds: float) -> list[float | None] | _Fault:
        """The rewards, or what is wrong with them."""
        if self.worker is None:
            return _limited(self.reward, batch, seconds, self.limit)
        try:
            sent = _packed(batch, seconds)
        except Exception as error:
            self._take(
                "alarm",
                f"a batch cannot be sent to a process: {type(error).__name__}: {error!s:.200}",
            )
            text = f"reward {self.__name__} runs in this process, where a call into C has no time limit: {self.why}"
            warnings.warn(text, NoTimeLimit, stacklevel=4)
            return self._called(batch, seconds)
        return self.worker.ask(sent, seconds, {name: batch.get(name) for name in LOGS})

    def _where(self, fault: _Fault, batch: dict) -> str:
        """The row of the fault in words: the one that is known, or else the first that fails alone."""
        size = len(batch["completions"])
        if not fault.search:
            return "Row: not looked for, since the alarm was not heard; it would take as long again."
        row, alone = fault.row, None
        if row is None:
            row, alone = self._first_to_fail(batch, fault)
        if row is None:
            return "Row: none was found that fails alone, so it is the batch as a whole, or chance."
        said = f"\n  alone: {alone.got}" if alone is not None and alone.cause == "slow" else ""
        for key in ("prompt", "completion"):
            if f"{key}s" in batch:
                text = batch[f"{key}s"][row]
                said += f"\n  {key}: {_short.repr(text[-1:] if isinstance(text, list) else text)}"
        return f"Row: {row} of 0 to {size - 1}{said}"

    def _first_to_fail(self, batch: dict, fault: _Fault) -> tuple[int | None, _Fault | None]:
        """The first row that fails alone, and how. In B rows that are slow together, one takes more than its share."""
        size = len(batch["completions"])
        if size == 1 and fault.cause == "slow":
            return 0, None
        share = min(self.seconds, max(self.seconds / max(size, 1), 1.0))
        for row in range(size):
            own = {k: [v[row]] if isinstance(v, list) and len(v) == size else v for k, v in batch.items()}
            found = self._called(own, share)
            if isinstance(found, _Fault):
                return row, found
        return None, None


def _no_process(reward: Callable) -> str | None:
    """Why a reward must not run in a process of its own, in words."""
    if sys.platform != "linux":
        return f"it is not safe to fork on {sys.platform}"
    if multiprocessing.current_process().daemon:
        return "this process is a daemon, which may not start another"
    return _used(reward)[1]


def _limited(reward: Callable, batch: dict, seconds: float, limit: str) -> list[float | None] | _Fault:
    """The rewards, or what is wrong with them, with the alarm around them if that is the limit."""
    alarm, start = TimeUp(seconds), time.monotonic()
    try:
        values = in_time(alarm, reward, **batch) if limit == "alarm" else reward(**batch)
    except TimeUp as error:
        if error is not alarm:  # of a limit around this one
            raise
        took = time.monotonic() - start
        if took < seconds + 1:
            return _Fault("slow", f"nothing within {seconds:g} s")
        late = f"nothing within {seconds:g} s, but a call into C that went on for {took:.0f} s"
        return _Fault("slow", late, search=False)
    except Exception as error:
        return _raised(error)
    return _checked(values, len(batch["completions"]))


def _raised(error: Exception) -> _Fault:
    return _Fault("raises", f"{type(error).__name__}: {error!s:.300}", error=error)


def _checked(values: Any, size: int) -> list[float | None] | _Fault:
    """What a reward returned as a list of floats and None, or what is wrong with it."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != size:
        return _Fault("shape", _short.repr(values))
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    for row, value in enumerate(values):  # TRL keeps rewards in float32, whose largest number is 3.4028e38
        if value is not None and not (isinstance(value, Real) and abs(value) < 3.4028235e38):
            return _Fault("value", _short.repr(value), row)
    return [value if value is None else float(value) for value in values]


# --- An alarm ---------------------------------------------------------------------------------------------------------


def in_time(limit: TimeUp, function: Callable, /, *arguments: Any, **named: Any) -> Any:
    """What the function returns; raises the limit if it takes longer, as soon as it is back from a call into C.

    An alarm that was set before rings as well, when it is due. Warns with NoTimeLimit where no alarm
    can be had: outside the main thread, and on Windows.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        text = f"no time limit of {limit.args[0]:g} s: alarms ring in the main thread only, and not on Windows"
        warnings.warn(text, NoTimeLimit, stacklevel=2)
        return function(*arguments, **named)

    start = time.monotonic()
    ends, rung = start + limit.args[0], False
    left, again = signal.getitimer(signal.ITIMER_REAL)  # of an alarm around this one

    def ring(*signal_and_frame):
        nonlocal left, rung
        early = ends - time.monotonic()
        if early < 0.001:  # timers are exact to a microsecond
            rung = True
            raise limit
        signal.setitimer(signal.ITIMER_REAL, early, 1)
        left = again and time.monotonic() - start + again  # the one around is due first; when it will be next
        if callable(before):
            before(*signal_and_frame)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            first = min(left, limit.args[0]) if left else limit.args[0]
            signal.setitimer(signal.ITIMER_REAL, first, 1)  # again, as what is raised in a __del__ is lost
            return function(*arguments, **named)
        except BaseException as error:
            if rung and error is not limit and not isinstance(error, TimeUp):
                raise limit from error  # C code dropped what `ring` raised and gave another error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # of its own, since the alarm may ring in the first one
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left and max(left + start - time.monotonic(), 1e-6), again)


# --- A process of its own ---------------------------------------------------------------------------------------------


class _Worker:
    """A forked process that calls a reward, batch after batch, until one takes too long."""

    def __init__(self, reward: Callable) -> None:
        self.reward, self.lock = reward, threading.Lock()
        self.process = self.end = self.used = self.owner = None

    def ask(self, sent: bytes, seconds: float, logs: dict) -> list[float | None] | _Fault:
        """The rewards, or what is wrong with them; `logs` are TRL's functions, called with what the reward said."""
        with self.lock:
            self._start()
            found = self._answer(sent, seconds)
        if isinstance(found, _Fault):
            return found
        values, logged, printed = found
        if printed:
            print(printed, end="")
        if not isinstance(values, _Fault):
            for name, arguments, named in logged:
                logs[name](*arguments, **named)
        return values

    def _answer(self, sent: bytes, seconds: float) -> tuple | _Fault:
        process, started = self.process, time.monotonic()
        try:
            self.connection.send_bytes(sent)
            if self.connection.poll(max(seconds + started - time.monotonic(), 0)):
                return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            process.join(1)
            code = process.exitcode
            self.end()
            return _Fault("died", f"a process that ended with exit code {code}")
        except BaseException:  # Ctrl-C, or an alarm around this: its late answer is not the next batch's
            self.end()
            raise
        self.end()
        return _Fault("slow", f"nothing within {seconds:g} s")

    def _start(self) -> None:
        """Forks, unless the process lives, is this process's own, and what the reward uses is what it was."""
        from multiprocessing.context import ForkProcess  # not on Windows

        used, _ = _used(self.reward)
        if self.owner == os.getpid() and self.end.alive:
            same = list(map(id, used)) == list(map(id, self.used))
            if same and self.process.is_alive():
                return
            self.end()
        self.connection, there = multiprocessing.Pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGINT])
        given = (self.reward, there, self.connection, before)
        self.process = ForkProcess(target=_serve, args=given, daemon=True)
        try:  # what a signal raises within a fork can leave a lock of `logging` held for ever
            with warnings.catch_warnings():  # Python 3.12 on: a process with threads forks
                warnings.simplefilter("ignore", DeprecationWarning)
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        self.end = weakref.finalize(self, _end, self.process, self.connection, os.getpid())
        self.used, self.owner = used, os.getpid()


def _end(process: multiprocessing.Process, connection: Any, parent: int) -> None:
    if parent == os.getpid():  # and not a process forked since
        process.kill()  # and no join, since the next fork reaps it
    connection.close()


def _serve(reward: Callable, connection: Any, parents_end: Any, signals: set) -> None:
    """What the process does: from the bytes of a batch to the bytes of its rewards, until the parent is gone."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # OpenMP's threads are not here, and it would wait for them
    with contextlib.suppress(EOFError):
        while True:
            sent, logged, printed = connection.recv_bytes(), [], io.StringIO()
            values = _worked(reward, sent, logged, printed)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                answer = pickle.dumps((values, logged, printed.getvalue()))
            except Exception as error:  # what was logged cannot be sent
                answer = pickle.dumps((_raised(RuntimeError(f"log_extra or log_metric: {error}")), [], ""))
            connection.send_bytes(answer)


def _worked(reward: Callable, sent: bytes, logged: list, printed: io.StringIO) -> list[float | None] | _Fault:
    try:
        batch, seconds = pickle.loads(sent)
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # ends this process if the parent was killed
        for name in LOGS:
            if name in batch:
                batch[name] = lambda *arguments, _name=name, **named: logged.append((_name, arguments, named))
        with contextlib.redirect_stdout(printed):
            return _checked(reward(**batch), len(batch["completions"]))
    except Exception as error:
        return _sendable(_raised(error))


def _sendable(fault: _Fault) -> _Fault:
    """With where the error was raised; with another error in its place if it cannot be sent."""
    error = fault.error
    error.add_note("In the reward's process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        replaced = RuntimeError(fault.got)
        replaced.__notes__ = error.__notes__
        return _Fault("raises", fault.got, error=replaced)
    return fault


def _packed(batch: dict, seconds: float) -> bytes:
    """A batch as bytes, without TRL's two log functions: the process puts its own in their place."""
    return pickle.dumps(({**batch, **{name: None for name in LOGS if name in batch}}, seconds))


# --- What a reward shares with this process ---------------------------------------------------------------------------


def _used(reward: Callable) -> tuple[list[Any], str | None]:
    """All that the reward's own code uses, and what of it a copy in another process would not share, in words."""
    used, todo, shares = [], [(getattr(reward, "__name__", "itself"), reward)], None
    while todo:
        name, thing = todo.pop()
        if any(thing is other for other in used):
            continue
        used.append(thing)
        if isinstance(thing, functools.partial):
            todo += [
                (name, thing.func),
                *((name, value) for value in thing.args),
                *thing.keywords.items(),
            ]
        elif isinstance(thing, FunctionType):
            shares = shares or _sets(thing)
            todo += _taken(thing)
        elif isinstance(thing, tuple | frozenset):
            todo += [(name, part) for part in thing]
        elif isinstance(thing, type):
            todo += [(f"{thing.__name__}.{key}", value) for key, value in vars(thing).items() if key[:2] != "__"]
        elif hasattr(thing, "cache_info"):  # functools.lru_cache: a cache of its own is as good
            todo.append((name, thing.__wrapped__))
        elif not _is_plain(thing):
            shares = shares or f"it uses {name} ({type(thing).__name__}), which this process holds too"
    return used, shares


def _is_plain(thing: Any) -> bool:
    if isinstance(thing, BuiltinFunctionType):  # list.append of one list is not plain, math.log is
        return thing.__self__ is None or isinstance(thing.__self__, ModuleType)
    return isinstance(thing, PLAIN)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the lambdas, comprehensions and functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _sets(function: FunctionType) -> str | None:
    """The first thing outside itself that a function sets, in words."""
    outside = function.__code__.co_freevars
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            is_global = step.opname in (
                "STORE_GLOBAL",
                "DELETE_GLOBAL",
                "STORE_ATTR",
                "DELETE_ATTR",
            )
            if is_global or (step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in outside):
                return f"{function.__name__} sets {step.argval}, which this process would not see"
    return None


def _taken(function: FunctionType) -> list[tuple[str, Any]]:
    """Names and values that a function takes from outside, without functions and classes of other files."""
    found = [("a default", value) for value in function.__defaults__ or ()]
    found += (function.__kwdefaults__ or {}).items()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not set yet
            found.append((name, cell.cell_contents))
    for name in sorted(_globals(function)):
        value = function.__globals__[name]
        if not _imported(value, function):
            found.append((name, value))
    return found


def _globals(function: FunctionType) -> set[str]:
    """The names of the globals that a function reads, without those of Python's builtins."""
    steps = (step for code in _codes(function.__code__) for step in dis.get_instructions(code))
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names & function.__globals__.keys()


def _imported(thing: Any, function: FunctionType) -> bool:
    """Whether it is a function or class of another file than this function's."""
    if isinstance(thing, FunctionType):
        return thing.__globals__ is not function.__globals__
    return isinstance(thing, type) and thing.__module__ != function.__module__
