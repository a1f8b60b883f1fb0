"""experiments/runs.py: what a kill loses, which runs are left, what a record says of its run.

At the end: each folder of experiments has its script and its records, and says how it trained.
"""

import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import ROOT, script

from experiments import lab, runs
from experiments.runs import Job, append, keep, read, todo, told, work

EXPERIMENTS = ROOT / "experiments"
HERE, THERE = "AMD EPYC, 2 cores", "Intel Xeon, 2 cores"


def stamped(name: dict, processor: str = HERE, boot: str = "abc") -> dict:
    """A record with all that is wanted of one, as `stamp` leaves it."""
    return name | {
        "versions": {"trl": "1.14.2"},
        "processor": processor,
        "boot": boot,
        "dtype": "float32",
        "cpu_seconds": 60.0,
        "chosen": {"rate": "on validation"},
        "questions": ["ask/hand_test"],
    }


CONDITIONS = runs.conditions(stamped({}))


def named(arm: str, seed: int, **more) -> dict:
    return {"arm": arm, "seed": seed} | more


def jobs_of(arms: list[str], seeds: list[int]) -> list[Job]:
    """Every run, in an order that is not yet the one in which they are to be done."""
    return [Job((named(arm, seed),), (arm, seed)) for arm in arms for seed in seeds]


# --- What a kill loses ----------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from experiments.runs import append
record = {0}
for i in range(10_000):
    append(Path(sys.argv[1]), record | {{"seed": i, "text": "x" * 500_000}})
    print(i, flush=True)
"""


def test_a_kill_while_a_process_appends_loses_at_most_the_run_that_it_was_writing(tmp_path):
    file = tmp_path / "records.jsonl"
    code = WRITER.format(stamped({"arm": "a"}))
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(file)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    for _ in range(4):
        assert writer.stdout.readline(), "the writer has ended by itself"
    writer.send_signal(signal.SIGKILL)
    done = 4 + len(writer.stdout.read().splitlines())
    assert writer.wait() == -signal.SIGKILL
    if file.read_bytes().endswith(b"\n"):
        left = read(file)
    else:
        with pytest.warns(UserWarning, match="killed"):
            left = read(file)
    assert [record["seed"] for record in left] == list(range(len(left)))
    assert done <= len(left) <= done + 1, "what was reported as written is there"


@given(st.integers(1, 200))
def test_a_line_that_was_cut_off_is_lost_alone_and_the_next_one_is_whole(tmp_path_factory, k):
    file = tmp_path_factory.mktemp("torn") / "records.jsonl"
    kept = [stamped(named("a", seed)) for seed in (1, 2)]
    for record in kept:
        append(file, record)
    line = json.dumps(stamped(named("b", 3))).encode()
    file.write_bytes(file.read_bytes() + line[:k])
    with pytest.warns(UserWarning, match=rf"killed.* {min(k, len(line))} bytes"):
        assert read(file) == kept
    file.write_bytes(file.read_bytes() + line[:k])
    with pytest.warns(UserWarning, match="killed"):
        append(file, stamped(named("b", 3)))
    assert read(file) == [*kept, stamped(named("b", 3))]


def test_a_line_that_is_broken_elsewhere_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"seed": 1}\n{"seed": \n{"seed": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(file)


@pytest.mark.parametrize("field", runs.REQUIRED)
def test_a_record_without_a_field_is_refused_by_its_name_and_the_file_stays(field, tmp_path):
    file = tmp_path / "records.jsonl"
    append(file, stamped(named("a", 0)))
    before = file.read_bytes()
    whole = stamped(named("b", 0))
    for lacking in ({k: v for k, v in whole.items() if k != field}, whole | {field: None}):
        with pytest.raises(ValueError, match=f"lacks {field}\\."):
            append(file, lacking)
    assert file.read_bytes() == before


# --- Which runs are left --------------------------------------------------------------------------

ARMS = st.lists(st.sampled_from("abcd"), min_size=1, unique=True)
SEEDS = st.lists(st.integers(0, 5), min_size=1, unique=True)
STATES = ("missing", "old", "here", "there", "other start")


def as_recorded(arm: str, seed: int, state: str) -> list[dict]:
    """What the file holds of a run."""
    name = named(arm, seed)
    return {
        "missing": [],
        "old": [name | {"versions": {"trl": "1.12.0"}, "cpu_seconds": 1.0}],
        "here": [stamped(name)],
        "there": [stamped(name, processor=THERE)],
        "other start": [stamped(name, boot="xyz")],
    }[state]


@given(ARMS, SEEDS, st.data())
def test_what_is_left_by_the_rules_one_seed_after_the_other(arms, seeds, data):
    """The rules again, run by run: old ones stand; a seed of one machine goes on there alone."""
    states, records = {}, []
    for seed in seeds:
        for arm in arms:
            states[arm, seed] = data.draw(st.sampled_from(STATES))
            records += as_recorded(arm, seed, states[arm, seed])
    wanted, replaced = [], []
    for seed in sorted(seeds):
        own = [arm for arm in arms if states[arm, seed] != "old"]
        lacking = [arm for arm in own if states[arm, seed] == "missing"]
        where = {states[arm, seed] for arm in own} - {"missing"}
        again = len(where) > 1 or (lacking and where and where != {"here"})
        wanted += [(arm, seed) for arm in (own if again else lacking)]
        if again:
            there = [arm for arm in own if states[arm, seed] != "missing"]
            replaced += [(arm, seed) for arm in there]
    parts = todo(jobs_of(arms, seeds), records, CONDITIONS, ("seed",))
    assert [job.arguments for part in parts for job in part.jobs] == wanted
    found = [(r["arm"], r["seed"]) for part in parts for r in part.replaced]
    assert sorted(found) == sorted(replaced)
    assert all(len({job.seed for job in part.jobs}) == 1 for part in parts)


@given(ARMS, SEEDS)
def test_nothing_done_is_every_arm_of_the_first_seed_then_of_the_second(arms, seeds):
    parts = todo(jobs_of(arms, seeds), [], CONDITIONS, ("seed",))
    done = [job.arguments for part in parts for job in part.jobs]
    assert done == [(arm, seed) for seed in sorted(seeds) for arm in arms]


def test_another_version_of_a_library_is_another_machine():
    done = stamped(named("a", 1)) | {"versions": {"trl": "1.15.0"}}
    (part,) = todo(jobs_of(["a", "b"], [1]), [done], CONDITIONS, ("seed",))
    assert len(part.jobs) == 2 and part.replaced == [done]


def test_the_search_comes_first_and_goes_on_a_run_at_a_time_wherever_it_was_begun():
    search = [Job((named("a", 11, rate=rate, phase="search"),), (rate,)) for rate in (1, 2, 3)]
    final = [Job((named("a", seed, rate=1, phase="final"),), (seed,)) for seed in (1, 2)]
    done = [stamped(search[0].names[0], processor=THERE)]
    (part,) = todo([*final, *search], done, CONDITIONS, ("seed",))
    assert (part.jobs, part.replaced) == (search[1:], [])
    done += [stamped(job.names[0]) for job in search[1:]]
    assert [p.jobs for p in todo([*final, *search], done, CONDITIONS, ("seed",))] == [
        [final[0]],
        [final[1]],
    ]


def test_a_seed_is_whole_within_its_task():
    tasks = [Job((named("a", 1, task=t),), (t,)) for t in ("orders", "codes")]
    done = [stamped(named("a", 1, task="orders"), processor=THERE)]
    (part,) = todo(tasks, done, CONDITIONS, ("task", "seed"))
    assert (part.jobs, part.replaced) == ([tasks[1]], [])


# --- All runs -------------------------------------------------------------------------------------


class Measure:
    """Measures at once, notes what it was asked, and is killed at its k-th run."""

    def __init__(self, kill_at: int = 0) -> None:
        self.asked, self.kill_at = [], kill_at

    def __call__(self, arm: str, seed: int) -> list[dict]:
        self.asked.append((arm, seed))
        if len(self.asked) == self.kill_at:
            raise KeyboardInterrupt
        return [stamped(named(arm, seed))]


@pytest.fixture
def at_home(monkeypatch):
    """This process runs under the conditions of `stamped`."""
    monkeypatch.setattr(runs, "boot", lambda: "abc")
    monkeypatch.setattr(runs, "processor", lambda: HERE)
    monkeypatch.setattr(runs, "versions", lambda *_: {"trl": "1.14.2"})


def test_a_run_that_is_broken_off_is_the_only_one_that_is_done_twice(tmp_path, at_home):
    file, jobs = tmp_path / "records.jsonl", jobs_of(["a", "b"], [1, 2])
    first, second = Measure(kill_at=2), Measure()
    with pytest.raises(KeyboardInterrupt):
        work(file, lambda records: jobs, first, commit=False)
    work(file, lambda records: jobs, second, commit=False)
    assert first.asked == [("a", 1), ("b", 1)]
    assert second.asked == [("b", 1), ("a", 2), ("b", 2)]
    assert [(r["arm"], r["seed"]) for r in read(file)] == [*first.asked[:1], *second.asked]


def test_an_unfinished_seed_is_run_again_whole_elsewhere_and_its_lines_are_kept(tmp_path, at_home):
    file = tmp_path / "records.jsonl"
    whole = [stamped(named(arm, 1), processor=THERE) for arm in ("a", "b")]
    begun = stamped(named("a", 2), processor=THERE)
    for record in (*whole, begun):
        append(file, record)
    measure = Measure()
    work(file, lambda records: jobs_of(["a", "b"], [1, 2]), measure, commit=False)
    assert measure.asked == [("a", 2), ("b", 2)]
    assert read(file) == [*whole, stamped(named("a", 2)), stamped(named("b", 2))]
    assert read(tmp_path / runs.SUPERSEDED) == [begun]


def test_old_records_stay_as_they_are_to_the_byte(tmp_path, at_home):
    file = tmp_path / "records.jsonl"
    old = '{"seed":1,"arm":"a",  "versions":{"trl":"1.12.0"}, "right":[1,0], "said":"\\u00e4"}\n'
    file.write_text(old)
    measure = Measure()
    work(file, lambda records: jobs_of(["a", "b"], [1]), measure, commit=False)
    assert measure.asked == [("b", 1)] and file.read_text().startswith(old)
    assert not (tmp_path / runs.SUPERSEDED).exists()
    begun = stamped(named("c", 1), processor=THERE)
    append(file, begun)
    work(file, lambda records: jobs_of(["a", "b", "c"], [1]), measure, commit=False)
    assert measure.asked[1:] == [("b", 1), ("c", 1)] and file.read_text().startswith(old)
    assert read(tmp_path / runs.SUPERSEDED) == [stamped(named("b", 1)), begun]


def test_a_run_of_whose_two_records_a_kill_left_one_is_done_again(tmp_path, at_home):
    file = tmp_path / "records.jsonl"
    names = named("a", 1), named("a + b", 1)
    append(file, stamped(names[0]) | {"mean": 0.5})
    work(file, lambda _: [Job(names)], lambda: [stamped(name) for name in names], commit=False)
    assert read(file) == [stamped(name) for name in names]
    assert [record["mean"] for record in read(tmp_path / runs.SUPERSEDED)] == [0.5]


def test_a_measurement_that_names_its_record_otherwise_is_an_error(tmp_path, at_home):
    wrong = [stamped(named("b", 1))]
    with pytest.raises(ValueError, match="disagree"):
        work(tmp_path / "r.jsonl", lambda _: jobs_of(["a"], [1]), lambda *_: wrong, commit=False)


def test_the_plan_says_seed_by_seed_what_is_missing_and_runs_nothing(tmp_path, at_home, capsys):
    """By hand: a took 1 h and 2 h, so its 2 runs are 3 h; of c nothing is known."""
    file, measure = tmp_path / "records.jsonl", Measure()
    for seed, hours in ((1, 1), (2, 2)):
        append(file, stamped(named("a", seed)) | {"cpu_seconds": 3600.0 * hours})
    before = file.read_bytes()
    _, how = runs.flags(["--plan"])
    work(file, lambda _: jobs_of(["a", "c"], [1, 2, 3, 4]), measure, **how)
    said = capsys.readouterr().out
    found = re.findall(r"^seed (\d): (\d) runs, ([\d.]+) CPU hours: (.+)$", said, re.M)
    assert found == [
        ("1", "1", "0.00", "c"),
        ("2", "1", "0.00", "c"),
        ("3", "2", "1.50", "a, c"),
        ("4", "2", "1.50", "a, c"),
    ]
    assert "3.00 CPU hours" in said and re.search(r"^4 runs are not in this sum", said, re.M)
    assert measure.asked == [] and file.read_bytes() == before


# --- Commits --------------------------------------------------------------------------------------


def git(folder, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a records file, committed at the second 10,000, and another file."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_COMMITTER_DATE", "@10000 +0000")
    git(tmp_path, "init", "-q")
    for key, value in (("user.name", "a"), ("user.email", "a@b.c"), ("commit.gpgsign", "false")):
        git(tmp_path, "config", key, value)
    folder = tmp_path / "ask"
    folder.mkdir()
    append(folder / "records.jsonl", stamped(named("a", 0)))
    (tmp_path / "other.txt").write_text("one\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "begin")
    return tmp_path


def commits(folder) -> int:
    return int(git(folder, "rev-list", "--count", "HEAD"))


def test_records_are_committed_once_an_hour_alone_and_what_is_staged_stays_staged(repository):
    file = repository / "ask" / "records.jsonl"
    append(file, stamped(named("a", 1)))
    (repository / "other.txt").write_text("two\n")
    (repository / "new.txt").write_text("new\n")
    git(repository, "add", "other.txt")
    assert not keep(file, now=10_000 + 3599) and commits(repository) == 1
    assert keep(file, now=10_000 + 3600) and commits(repository) == 2
    assert git(repository, "show", "--format=", "--name-only", "HEAD") == "ask/records.jsonl"
    assert git(repository, "diff", "--cached", "--name-only") == "other.txt"
    assert git(repository, "status", "--porcelain", "new.txt") == "?? new.txt"
    assert not keep(file, now=10**9), "nothing new, no commit"


def test_a_new_file_of_records_and_those_that_it_replaces_are_committed_too(repository):
    file = repository / "qlora" / "records.jsonl"
    file.parent.mkdir()
    for path in (file, file.with_name(runs.SUPERSEDED)):
        append(path, stamped(named("a", 1)))
    assert keep(file, now=10_001)
    shown = git(repository, "show", "--format=", "--name-only", "HEAD").splitlines()
    assert shown == ["qlora/records.jsonl", f"qlora/{runs.SUPERSEDED}"]


def test_if_git_refuses_the_reason_is_said_and_the_work_goes_on(repository, at_home, capsys):
    hook = repository / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    hook.chmod(0o755)
    file, measure = repository / "ask" / "records.jsonl", Measure()
    work(file, lambda _: jobs_of(["a", "b"], [1]), measure)
    assert measure.asked == [("a", 1), ("b", 1)] and len(read(file)) == 3
    assert "not today" in capsys.readouterr().out and commits(repository) == 1


def test_no_record_waits_longer_than_an_hour_and_a_run(repository, at_home, monkeypatch):
    """Runs of 25 minutes: by the clock of the test, which is git's as well."""
    file, clock = repository / "ask" / "records.jsonl", [10_000]

    def measure(arm: str, seed: int) -> list[dict]:
        clock[0] += 25 * 60
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"@{clock[0]} +0000")
        return [stamped(named(arm, seed))]

    monkeypatch.setattr(time, "time", lambda: float(clock[0]))
    work(file, lambda _: jobs_of(["a"], list(range(1, 9))), measure)
    at = [*map(int, git(repository, "log", "--reverse", "--format=%ct").splitlines())]
    apart = [(b - a) // 60 for a, b in itertools.pairwise(at)]
    assert apart[:2] == [75, 75] and sum(apart) == 8 * 25
    assert git(repository, "status", "--porcelain") == ""


def test_no_commit_where_none_is_wanted_or_possible(repository, at_home, tmp_path_factory):
    _, how = runs.flags(["--no-commit"])
    work(repository / "ask" / "records.jsonl", lambda _: jobs_of(["a"], [1]), Measure(), **how)
    assert commits(repository) == 1
    file = tmp_path_factory.mktemp("plain") / "records.jsonl"
    append(file, stamped(named("a", 1)))
    assert not keep(file)


# --- What a record tells --------------------------------------------------------------------------

XEON = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx512f {}\n\n"


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "avx2"])
def test_the_processor_by_its_model_and_whether_it_multiplies_bf16(flag):
    info, native = XEON.format(flag) * 2, flag.endswith("bf16")
    assert runs.processor(info).startswith("Intel(R) Xeon(R), ")
    assert runs.multiplies_bf16(info) is native
    assert runs.multiplies_bf16("Features\t: fp asimd bf16\n") is True
    assert runs.multiplies_bf16("") is None


def test_stamp_gives_what_append_wants_beside_seed_arm_and_seconds():
    record = named("a", 1) | {"cpu_seconds": 1.0}
    record |= runs.stamp("float32", ["ask/hand_test"], {"rate": "on validation"})
    assert set(runs.REQUIRED) <= record.keys() and runs.is_stamped(record)
    assert record["versions"].keys() >= {"python", "torch", "transformers", "trl", "peft"}


FLAT = {"torch": "2.13.0", "trl": "1.12.0", "machine": "x86_64", "cores": 2, "threads": 1}
NESTED = {"python": "3.11.7", "versions": {"trl": "1.14.2"}, "hardware": {"machine": "x86_64"}}


@pytest.mark.parametrize(("record", "field", "value"), [
    ({"environment": FLAT}, "versions", {"torch": "2.13.0", "trl": "1.12.0"}),
    ({"environment": NESTED}, "versions", {"python": "3.11.7", "trl": "1.14.2"}),
    ({"versions": {"trl": "1.14.2"}}, "versions", {"trl": "1.14.2"}),
    ({"environment": FLAT}, "processor", "x86_64, 2 cores (model not recorded)"),
    ({"environment": NESTED}, "processor", "x86_64 (model not recorded)"),
    ({"processor": HERE, "environment": FLAT}, "processor", HERE),
    ({"cpu_seconds": 3.0, "train_cpu_seconds": 2.0}, "cpu_seconds", 3.0),
    ({"train_cpu_seconds": 2.0, "seconds": 9.0}, "cpu_seconds", 2.0),
    ({"answer_seconds": 2.0, "train_seconds": 1.5}, "cpu_seconds", 3.5),
    ({"seconds": 9.0, "train_seconds": 8.0}, "cpu_seconds", "not recorded"),
    ({"questions": 132}, "questions", "132, ids not recorded"),
    ({"questions": ["ask/hand_test"]}, "questions", ["ask/hand_test"]),
    ({"environment": FLAT}, "dtype", "not recorded"),
    ({"rate": 1e-3}, "chosen", "not recorded"),
    ({"dtype": "float32"}, "dtype", "float32"),
    ({}, "versions", "not recorded"),
    ({}, "processor", "not recorded"),
])  # fmt: skip
def test_what_a_record_tells_and_that_nothing_is_filled_in(record, field, value):
    assert told(record, field) == value


# --- The experiments ------------------------------------------------------------------------------

FOLDERS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/run.py"))
TRAINED = ("ask", "ask_forgetting", "alignment", "lora_rank", "methods", "preference", "qlora",
           "tool_calls", "verifiable", "ask_rows", "lora_ask", "qlora_ask", "poison",
           "canary", "preferences", "rlhf", "rewards")  # fmt: skip
OF_THE_135M = ("ask", "ask_forgetting", "qlora", "methods", "engines", "stack_peers", "ask_rows",
               "lora_ask", "qlora_ask", "poison", "canary", "rlhf", "rewards")  # fmt: skip


def test_each_folder_has_the_script_and_its_records_one_a_line():
    there = {path.name for path in EXPERIMENTS.iterdir() if path.is_dir()}
    assert there - {"gpu", "__pycache__"} == set(FOLDERS) >= set(TRAINED)
    for name in set(FOLDERS) - set(lab.under_way()):
        file = EXPERIMENTS / name / "records.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines and all(isinstance(json.loads(line), dict) for line in lines), name


@pytest.mark.parametrize("name", FOLDERS)
def test_every_record_tells_each_field_or_that_it_is_not_recorded(name):
    for record in read(EXPERIMENTS / name / "records.jsonl"):
        for field in runs.STAMPED:
            assert told(record, field) not in (None, "", [], {}), field


@pytest.mark.parametrize("name", OF_THE_135M)
def test_every_training_record_of_the_135m_says_or_lacks_its_dtype(name):
    for record in read(EXPERIMENTS / name / "records.jsonl"):
        assert re.search("float|not recorded", told(record, "dtype"))


def sets_bf16(node: ast.AST) -> bool:
    """Whether a call or a mapping says bf16=False."""
    if isinstance(node, ast.keyword):
        return node.arg == "bf16" and getattr(node.value, "value", None) is False
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        said = [v for k, v in pairs if getattr(k, "value", None) == "bf16"]
        return any(getattr(value, "value", None) is False for value in said)
    return False


CONFIG = re.compile(r"(SFT|DPO|KTO|GRPO|RLOO|Reward|Distillation)Config|config(_class)?")


def in_trls_dtype(code: str) -> list[int]:
    """The lines of a trainer's config to which nobody says bf16=False, itself or by `arguments`."""
    tree, found = ast.parse(code), []
    for node in ast.walk(tree):
        called = getattr(getattr(node, "func", None), "id", "")
        if not CONFIG.fullmatch(called):
            continue
        shared = any(k.arg is None and "arguments" in ast.dump(k.value) for k in node.keywords)
        if not shared and not any(map(sets_bf16, node.keywords)):
            found.append(node.lineno)
    makers = [n for n in ast.walk(tree) if getattr(n, "name", "") == "arguments"]
    return found + [n.lineno for n in makers if not any(map(sets_bf16, ast.walk(n)))]


def test_no_experiment_trains_in_the_dtype_that_trl_takes_by_itself():
    """TRL 1.14 sets bf16 wherever fp16 is not, on a CPU too."""
    assert in_trls_dtype("SFTConfig('runs', use_cpu=True)") == [1]
    assert in_trls_dtype("SFTConfig('runs', bf16=True)") == [1]
    assert in_trls_dtype("SFTConfig(**run.arguments(3), bf16=False)") == []
    assert in_trls_dtype("def arguments():\n    return {'seed': 1}") == [1]
    for name in FOLDERS:
        code = (EXPERIMENTS / name / "run.py").read_text(encoding="utf-8")
        assert in_trls_dtype(code) == [], name


def jobs_in(name: str, records: list[dict]) -> list[Job]:
    """Every run of an experiment, as far as its records have come."""
    made = script(f"experiments/{name}/run.py").jobs
    if name in ("ask", "tool_calls", "methods"):
        return made([])
    return made([], records) if name == "lora_rank" else made(records)


@pytest.mark.parametrize("name", TRAINED)
def test_every_final_record_is_of_one_run_of_its_script(name):
    records = read(EXPERIMENTS / name / "records.jsonl")
    jobs = jobs_in(name, records)
    for record in records:
        if record.get("phase", "final") == "final":
            assert sum(job.left(record) for job in jobs) == 1, {
                k: v for k, v in record.items() if not isinstance(v, list | dict)
            }


def test_the_questions_that_a_script_names_are_lists_of_ids_json():
    known = json.loads((EXPERIMENTS / "ids.json").read_text(encoding="utf-8"))["lists"]
    for name in TRAINED:
        module = script(f"experiments/{name}/run.py")
        names = getattr(module, "QUESTIONS", None)
        if name == "methods":
            tasks = {task for task, _, _ in module.runs()} - {"known"}
            names = [each for task in tasks for each in module.questions(task)]
        if name == "preference":
            names = module.alignment.QUESTIONS
        assert names and [n for n in names if n not in known and not n.startswith("data/")] == []
