"""Runs and records of an experiment: one run a line of `records.jsonl`, beside its `run.py`.

A training experiment lists its runs as `Job`s and hands them to `work` with the function that
measures one. What then holds of its records:

- Seeds outside, arms inside, after the search of settings, which has a seed of its own.
- A record is appended when its run is over, and is on the disk before the next run begins: a kill
  loses the run under way, and the next call goes on behind the last record.
- One machine holds all arms of a seed. A seed that was left unfinished on another machine (another
  processor, another start of the machine, other versions) is run again whole, and so is one whose
  records come from two of them. The lines that this replaces go to `superseded.jsonl`.
- Records from before this file lack what `stamp` gives. They count as done; nothing moves or
  repeats them.
- The records are committed at least every hour, that file alone, never pushed; `--no-commit`
  leaves it.
- `--plan` prints what is missing and how long such runs took before, and runs nothing.

`told(record, field)` reads a field of any record, old or new. What an old record does not hold is
"not recorded": nothing is filled in afterwards.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

NOT_RECORDED = "not recorded"
STAMPED = ("versions", "processor", "dtype", "cpu_seconds", "chosen", "questions")
REQUIRED = ("seed", "arm", *STAMPED)
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 processors, and of Arm's
SUPERSEDED = "superseded.jsonl"
HOUR = 3600


# --- What a record says of its run ----------------------------------------------------------------


def stamp(dtype: str, questions: list, chosen: dict, packages: tuple = PACKAGES) -> dict:
    """What every record says beside what was measured: {field: value}, for `record | stamp(...)`.

    dtype: of weights and products, "float32" for instance. questions: whose values the record
    holds, names of lists in experiments/ids.json, or ids. chosen: {setting: how it was chosen}.
    boot: which start of which machine this is, 12 letters; see `todo`.
    """
    import torch

    return {
        "versions": versions(packages),
        "processor": processor(),
        "native_bf16": multiplies_bf16(),
        "boot": boot(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "questions": questions,
        "chosen": chosen,
    }


def versions(packages: tuple = PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor(info: str | None = None) -> str:
    """The model and the number of cores, "AMD EPYC, 2 cores". info: the text of /proc/cpuinfo."""
    models = _cpuinfo("model name", info) or [platform.processor() or platform.machine()]
    return f"{models[0]}, {os.cpu_count()} cores"


def multiplies_bf16(info: str | None = None) -> bool | None:
    """Whether the processor multiplies bf16 by itself; None where there is no /proc/cpuinfo."""
    features = _cpuinfo("flags", info) or _cpuinfo("Features", info)
    return not NATIVE_BF16.isdisjoint(features[0].split()) if features else None


def _cpuinfo(name: str, info: str | None) -> list[str]:
    """The values of a line of /proc/cpuinfo, one a core."""
    file = Path("/proc/cpuinfo")
    if info is None:
        info = file.read_text(encoding="utf-8") if file.is_file() else ""
    pairs = [line.partition(":") for line in info.splitlines()]
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def cpu_clock() -> float:
    """CPU seconds of this process so far and of those that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def boot() -> str:
    """Which start of which machine this is: Linux' boot id, else the machine's name, as a hash."""
    file = Path("/proc/sys/kernel/random/boot_id")
    text = file.read_text(encoding="utf-8") if file.is_file() else platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- Reading and writing --------------------------------------------------------------------------


def read(file: Path) -> list[dict]:
    """The records of a file, one a line, in their order; [] where there is no file.

    A kill in the middle of a write leaves a line without its end. It is cut off the file, with a
    warning: that run is lost and will be done again. Any other broken line raises ValueError.
    """
    if not file.is_file():
        return []
    whole, end, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        warnings.warn(
            f"{file}: the last line has no end, so the process that wrote it was killed; its "
            f"{len(torn)} bytes are cut off and that run is done again",
            stacklevel=2,
        )
        os.truncate(file, len(whole + end))
    return [_parsed(line, number, file) for number, line in enumerate(whole.splitlines(), 1)]


def _parsed(line: bytes, number: int, file: Path) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        text = f"{file}, line {number}: got {line[:60]!r}, want one JSON object"
        raise ValueError(f"{text}. Was the file edited or merged by hand?") from error


def append(file: Path, record: dict) -> None:
    """Puts the record of a run at the end of a file, as one line that is on the disk on return.

    Raises ValueError if it lacks a field of REQUIRED: what is not recorded now never will be.
    """
    lacking = [field for field in REQUIRED if record.get(field) in (None, "", {}, [], NOT_RECORDED)]
    if lacking:
        text = f"{file}: got a record with {', '.join(record)}; it lacks {', '.join(lacking)}"
        raise ValueError(f"{text}. Is `stamp` missing, or did the run not take its cpu_seconds?")
    read(file)  # cuts off what a kill has left
    add(file, record)


def add(file: Path, record: dict) -> None:
    """Puts any line at the end of a file: it is whole, and on the disk on return."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with file.open("ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def replace(file: Path, records: list[dict]) -> None:
    """Writes a file anew, one record a line."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    _write(file, "".join(lines).encode())


def _write(file: Path, content: bytes) -> None:
    """Writes a whole file: after a kill it is the old one or the new one."""
    beside = file.with_name(file.name + ".new")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


# --- Which runs are left --------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run. names: of each record that it leaves, the fields and values that no other record has
    together, `seed` among them; arguments: of the function that measures it.

    A name with a `phase` other than "final" is of the search, which comes first.
    """

    names: tuple[dict, ...]
    arguments: tuple = ()

    @property
    def seed(self) -> int:
        return self.names[0]["seed"]

    @property
    def searches(self) -> bool:
        return self.names[0].get("phase", "final") != "final"

    def left(self, record: dict) -> bool:
        """Whether a record is of this run."""
        return any(_has(record, name) for name in self.names)

    def is_done(self, records: list[dict]) -> bool:
        """Whether each record of this run is among these."""
        return all(any(_has(record, name) for record in records) for name in self.names)


def _has(record: dict, name: dict) -> bool:
    return all(field in record and record[field] == value for field, value in name.items())


@dataclass(frozen=True)
class Part:
    """The next runs, and the records that they replace: the search, or one seed."""

    jobs: list[Job]
    replaced: list[dict]


def todo(jobs: list[Job], records: list[dict], here: tuple, within: tuple) -> list[Part]:
    """What is left to do, part by part, in the order in which it is done.

    jobs: every run that there should be, those that are done among them. here: `conditions` of this
    process. within: the fields that records of one comparison share, `seed` among them.

    The runs of the search that are missing are a part of their own and come alone: the other runs
    depend on what they find. Then each seed is a part. Records without `stamp`'s fields count as
    done and are never replaced. Of the others, an unfinished seed is run again whole unless all its
    records were made under the conditions that hold here, and so is one made under several.
    """
    search = [job for job in jobs if job.searches and not job.is_done(records)]
    if search:
        return [Part(search, [])]
    final = sorted((job for job in jobs if not job.searches), key=lambda job: job.seed)
    groups: dict[tuple, list[Job]] = {}
    for job in final:
        groups.setdefault(tuple(job.names[0][field] for field in within), []).append(job)
    parts = [_part(group, records, here) for group in groups.values()]
    return [part for part in parts if part.jobs]


def _part(group: list[Job], records: list[dict], here: tuple) -> Part:
    """What is left of one seed."""
    old = [record for record in records if not is_stamped(record)]
    group = [job for job in group if not job.is_done(old)]
    mine = [r for r in records if is_stamped(r) and any(job.left(r) for job in group)]
    missing = [job for job in group if not job.is_done(old + mine)]
    made_under = {conditions(record) for record in mine}
    if len(made_under) > 1 or (missing and made_under - {here}):
        return Part(group, mine)
    return Part(missing, [])


def is_stamped(record: dict) -> bool:
    """Whether a record holds what `stamp` gives; those from before do not."""
    return all(field in record for field in STAMPED)


def conditions(record: dict) -> tuple:
    """What all arms of a seed must share: the start of the machine, the processor, the versions."""
    found = tuple(sorted(record["versions"].items()))
    return record.get("boot"), record["processor"], found


def supersede(file: Path, replaced: list[dict]) -> None:
    """Moves records to `superseded.jsonl` beside their file; after a kill both files have them."""
    if not replaced:
        return
    beside = file.with_name(SUPERSEDED)
    there = read(beside)
    for record in replaced:
        if record not in there:
            add(beside, record)
    lines = file.read_bytes().splitlines(keepends=True)
    _write(file, b"".join(line for line in lines if json.loads(line) not in replaced))
    print(f"{len(replaced)} records go to {beside.name}: these runs are done again", flush=True)


# --- All runs -------------------------------------------------------------------------------------


def flags(words: list[str]) -> tuple[list[str], dict]:
    """(the other words, what `work` is told by --plan and --no-commit) of a command line."""
    asked = {"plan_only": "--plan" in words, "commit": "--no-commit" not in words}
    return [word for word in words if word not in ("--plan", "--no-commit")], asked


def work(
    file: Path,
    jobs_for: Callable[[list[dict]], list[Job]],
    measure: Callable[..., list[dict]],
    within: tuple = ("seed",),
    at_once: int = 1,
    plan_only: bool = False,
    commit: bool = True,
) -> None:
    """Runs what is left, a record a line of the file each.

    jobs_for: from the records so far, every run that there should be. measure: from a job's
    arguments, its records. within: see `todo`. at_once: runs at a time, each in a process of its
    own if there are several.
    """
    here = conditions({"boot": boot(), "processor": processor(), "versions": versions()})
    if plan_only:
        print(plan(todo(jobs_for(read(file)), read(file), here, within), read(file)))
        return
    spawned = ProcessPoolExecutor(at_once, mp_context=get_context("spawn"))
    with spawned if at_once > 1 else contextlib.nullcontext() as pool:
        while parts := todo(jobs_for(read(file)), read(file), here, within):
            supersede(file, parts[0].replaced)
            for job, records in _measured(parts[0].jobs, measure, pool):
                _store(file, job, records)
                if commit:
                    keep(file)
            if commit and len(parts) == 1:
                keep(file, every=0)


def dry(folder: Path, names: list, measure: Callable) -> None:
    """measure(name), small, of each name into FOLDER/records.jsonl; prints its CPU seconds."""
    for name in names:
        (record,) = measure(name)
        append(folder / "records.jsonl", record)
        print(f"{record['cpu_seconds']:7.1f} s  {name}", flush=True)


def _store(file: Path, job: Job, records: list[dict]) -> None:
    """Appends the records of a run, in place of those that a kill between two of them has left."""
    if not job.is_done(records):
        got = f"a run left {len(records)} records, and not all that it should: {list(job.names)}"
        raise ValueError(f"{got}. Do the names of the job and the measurement disagree?")
    supersede(file, [r for r in read(file) if is_stamped(r) and job.left(r)])
    for record in records:
        append(file, record)
        show(record)


def _measured(jobs: list[Job], measure: Callable, pool: ProcessPoolExecutor | None) -> Iterator:
    """(job, its records), as they come."""
    if pool is None:
        for job in jobs:
            yield job, measure(*job.arguments)
        return
    futures = {pool.submit(measure, *job.arguments): job for job in jobs}
    for future in as_completed(futures):
        yield futures[future], future.result()


def show(record: dict) -> None:
    """Prints a record without its lists; of its checkpoints the last one."""
    reached = (record.get("checkpoints") or [{}])[-1]
    hidden = (*STAMPED, "boot", "threads", "native_bf16")
    short = {}
    for field, value in (record | reached).items():
        if field == "cpu_seconds" or not (field in hidden or isinstance(value, list | dict)):
            short[field] = value
    print(short, flush=True)


def plan(parts: list[Part], records: list[dict]) -> str:
    """What is left, seed by seed, and its CPU hours by the records of the same arms."""
    lines, whole, unknown = [], 0.0, 0
    for part in parts:
        seconds = [seconds_before(job, records) for job in part.jobs]
        known = [value for value in seconds if value is not None]
        whole, unknown = whole + sum(known), unknown + len(seconds) - len(known)
        what = "search" if part.jobs[0].searches else f"seed {part.jobs[0].seed}"
        arms = ", ".join(dict.fromkeys(_called(job) for job in part.jobs))
        line = f"{what}: {len(part.jobs)} runs, {sum(known) / HOUR:.2f} CPU hours: {arms}"
        if part.replaced:
            line += f"; again whole, {len(part.replaced)} records go to {SUPERSEDED}"
        lines.append(line)
    if not lines:
        return "nothing is missing"
    if parts[0].jobs[0].searches:
        lines.append("the runs after the search depend on what it finds")
    lines.append(f"together {whole / HOUR:.2f} CPU hours, by records of the same arms")
    if unknown:
        lines.append(f"{unknown} runs are not in this sum: no record says what such a run took")
    return "\n".join(lines)


def _called(job: Job) -> str:
    """The arm of a run, and what else names it but its seed and phase."""
    name = job.names[0]
    said = [name["arm"]] if "arm" in name else []
    for field, value in name.items():
        if field not in ("arm", "seed", "phase") and value is not None:
            said.append(f"{field} {value}")
    return " ".join(said)


def seconds_before(job: Job, records: list[dict]) -> float | None:
    """The mean CPU seconds of an arm's records, whatever seed, rate, phase; None without any."""
    free = ("seed", "rate", "phase")
    name = {field: value for field, value in job.names[0].items() if field not in free}
    spent = [told(record, "cpu_seconds") for record in records if _has(record, name)]
    numbers = [seconds for seconds in spent if seconds != NOT_RECORDED]
    return statistics.mean(numbers) if numbers else None


# --- Commits --------------------------------------------------------------------------------------


def keep(file: Path, every: float = HOUR, now: float | None = None) -> bool:
    """Commits the records, and those that they replace, if the last commit of them is old.

    every: seconds; now: the time in seconds, by default this moment. Nothing else is committed,
    what else is staged stays staged, and nothing is pushed. Outside a git work tree nothing
    happens. If git refuses, its reason is printed and the work goes on. Returns whether a commit
    was made.
    """
    files = [path.name for path in (file, file.with_name(SUPERSEDED)) if path.exists()]
    if _git(file, "rev-parse", "--is-inside-work-tree").stdout.strip() != "true":
        return False
    if not _git(file, "status", "--porcelain", "--", *files).stdout.strip():
        return False
    last = _git(file, "log", "-1", "--format=%ct", "--", file.name).stdout.strip()
    now = time.time() if now is None else now
    if last and now - int(last) < every:
        return False
    said = f"Records of {file.parent.name}: {len(read(file))} lines"
    for command in (["add", "--", *files], ["commit", "-q", "-m", said, "--", *files]):
        done = _git(file, *command)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip()
            print(f"git {command[0]} of {file} failed, the work goes on: {reason}", flush=True)
            return False
    return True


def _git(file: Path, *words: str) -> subprocess.CompletedProcess:
    """git, run in the folder of the file."""
    try:
        return subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True)
    except OSError as error:  # there is no git
        return subprocess.CompletedProcess(words, 1, "", str(error))


# --- What a record tells --------------------------------------------------------------------------


def told(record: dict, field: str) -> object:
    """The value of a field of a record, or "not recorded".

    field: "versions", "processor", "dtype", "cpu_seconds", "chosen" or "questions" (any other name
    is looked up as it is). Records from before `stamp` hold some of these in other places:

    | field | what stands for it in an old record |
    |---|---|
    | versions | `environment.versions`, or the names of packages in `environment`, with Python's |
    | processor | `machine` and `cores`: an architecture, without the model |
    | cpu_seconds | `train_cpu_seconds`, of the training alone; `all_seconds`, with the measuring; |
    | | `answer_seconds` and `train_seconds` together, which are of one thread |
    | questions | `questions` where it is a number: how many, without their ids |

    Nothing stands for dtype and chosen. Seconds by the clock (`seconds`, and `train_seconds` where
    there are no `answer_seconds`) are no CPU seconds: other work on the machine adds to them.
    """
    found_in = {
        "versions": _versions,
        "processor": _processor,
        "cpu_seconds": _cpu_seconds,
        "questions": _questions,
    }
    value = found_in[field](record) if field in found_in else record.get(field)
    return NOT_RECORDED if value is None else value


def _versions(record: dict) -> dict | None:
    environment = record.get("environment", {})
    found = record.get("versions") or environment.get("versions") or _packages(environment)
    python = record.get("python") or environment.get("python")
    if found and python:
        found = {"python": python, **found}
    return found or None


def _packages(environment: dict) -> dict:
    """The versions that stand in an environment beside what it says of the machine."""
    found = {}
    for name, value in environment.items():
        if isinstance(value, str) and name not in ("machine", "python"):
            found[name] = value
    return found


def _processor(record: dict) -> dict | str | None:
    if "processor" in record:
        return record["processor"]
    environment = record.get("environment", {})
    hardware = environment.get("hardware", environment)
    parts = [record.get("machine") or hardware.get("machine")]
    parts += [f"{hardware['cores']} cores"] if "cores" in hardware else []
    known = ", ".join(part for part in parts if part)
    return f"{known} (model {NOT_RECORDED})" if known else None


def _cpu_seconds(record: dict) -> float | None:
    for field in ("cpu_seconds", "train_cpu_seconds", "all_seconds"):
        if field in record:
            return record[field]
    if "answer_seconds" in record:
        return round(record["answer_seconds"] + record.get("train_seconds", 0), 1)
    return None


def _questions(record: dict) -> object:
    found = record.get("questions")
    return f"{found}, ids {NOT_RECORDED}" if isinstance(found, int) else found
