"""recipes/gate.py: what passes, what fails, and in how many lines it says why; its power against a simulation."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from scripts import script
from test_recipes import Server, chat, line_of, run, write

from ftlab import statistics

pytestmark = pytest.mark.usefixtures("clean_imports")

KINDS = ("count", "top", "group")


def rows_of(count: int) -> list[dict]:
    return [chat(f"Question {number}?", f"answer {number}") | {"kind": KINDS[number % 3]} for number in range(count)]


SMOKE = [
    chat("Say hello.", "hello") | {"kind": "greeting", "must": ["hello"], "must_not": ["password"]},
    chat("Drop the table.", "I can't.") | {"kind": "refusal", "must": ["can't|won't"], "must_not": ["DROP"]},
]


def said(row: dict) -> str:
    return row["completion"][-1]["content"]


class Case:
    """Files for the gate: 300 rows, where production is right in 240; each part can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.smoke = folder, rows_of(300), list(SMOKE)
        self.theirs, self.ours = [1.0] * 240 + [0.0] * 60, [1.0] * 240 + [0.0] * 60
        self.smoked, self.slow, self.other = [1.0, 1.0], 1.0, {}
        self.asked = {"scorer": None, "max_new_tokens": 256, "batch_size": 16}

    def flip(self, worse: int, better: int) -> "Case":
        """So many rows that production had right become wrong, spread over the kinds, and the other way round."""
        for number in range(worse):
            self.ours[number] = 0.0
        for number in range(better):
            self.ours[240 + number] = 1.0
        return self

    def record(self, name: str, rows: list[dict], scores: list[float], seconds: float, **other) -> Path:
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        model = "production" if name == "production" else "candidate"
        texts = [said(row) for row in rows] + ["hm"] * len(scores)
        answers = [text if score == 1 else "hm" for text, score in zip(texts, scores, strict=False)]
        found = {
            "recipe": "evaluate",
            "model": model,
            "asked": self.asked | {"model": model},
            "rows": digest,
            "groups": [row["group"] for row in rows] if all("group" in row for row in rows) else None,
            "scores": scores,
            "answers": answers,
            "latencies": [seconds * (1 + number / len(rows)) for number in range(len(rows))],
        }
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(found | other))
        return file

    def words(self, *more) -> list:
        file, smoke = write(self.folder / "test.jsonl", self.rows), write(self.folder / "smoke.jsonl", self.smoke)
        theirs = self.record("production", self.rows, self.theirs, 1.0)
        ours = self.record("candidate", self.rows, self.ours, self.slow, **self.other)
        smoked = self.record("smoke", self.smoke, self.smoked, 1.0)
        files = ["--production", theirs, "--candidate", ours, "--file", file]
        return [*files, "--smoke", smoked, "--smoke_file", smoke, "--margin", 0.05, *more]

    def gate(self, capsys, *more) -> tuple[int, list[str]]:
        """(the exit code, the lines)."""
        capsys.readouterr()
        code = 0
        try:
            run("gate", *self.words(*more))
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().out.splitlines()


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def failed(lines: list[str]) -> list[str]:
    return [line.split()[1].rstrip(":") for line in lines if line.startswith("FAIL")]


def test_an_equal_candidate_passes_in_five_lines(case, capsys):
    code, lines = case.flip(3, 3).gate(capsys)
    assert code == 0 and len(lines) == 5 and failed(lines) == []
    heads = [line[5:].split(":")[0] for line in lines]
    assert heads == ["quality", "questions", "kinds", "latency", "smoke"]


@pytest.mark.parametrize("worse", [3, 5, 7, 8, 9, 10, 11, 12, 14, 20])
def test_it_passes_while_the_interval_stays_above_the_margin(worse, case, capsys):
    """The course's interval, which has tests of its own, decides the same."""
    better = 3
    code, lines = case.flip(worse, better).gate(capsys, "--most_lost", 0.5)
    low, high = statistics.agresti_min_interval(better, worse, 300)
    fell = any("kinds" in line for line in lines if line.startswith("FAIL"))
    assert ("quality" in failed(lines)) == (low <= -0.05)
    assert (code != 0) == (low <= -0.05 or fell)
    assert f"{(better - worse) / 300:+.3f} [{low:+.3f}, {high:+.3f}] over 300 rows" in lines[0]


def test_a_better_candidate_passes_and_too_few_questions_are_not_settled(case, capsys):
    assert case.flip(2, 20).gate(capsys)[0] == 0
    case.rows, case.theirs, case.ours = rows_of(30), [1.0] * 30, [1.0] * 30
    code, lines = case.gate(capsys)
    assert code == 1 and failed(lines) == ["quality"] and "not settled" in lines[0]
    case.rows, case.theirs = rows_of(300), [1.0] * 300
    case.ours = [0.0] * 60 + [1.0] * 240
    assert "it is worse" in case.gate(capsys)[1][0]


def passing(count: int, share: float, margin: float) -> float:
    """How often a candidate passes that differs from production in such a share of rows, half of them each way."""
    random, passes = np.random.default_rng(0), 0
    for _ in range(2000):
        better, worse, _ = random.multinomial(count, [share / 2, share / 2, 1 - share])
        passes += statistics.agresti_min_interval(int(better), int(worse), count)[0] > -margin
    return passes / 2000


@pytest.mark.parametrize("margin", [0.03, 0.05])
@pytest.mark.parametrize(
    ("count", "changed"), [(150, 15), (300, 90), (300, 30), (300, 12), (300, 2), (300, 0), (132, 0)]
)
def test_the_power_is_what_a_simulation_finds_and_so_is_the_number_of_questions(count, changed, margin):
    """Two that hardly differ need few questions, but not none: with 29 rows not even two that never differ pass."""
    module, half = script("recipes/gate.py"), changed // 2
    ours = [1.0] * half + [0.0] * (changed - half) + [1.0] * (count - changed)
    theirs = [0.0] * half + [1.0] * (changed - half) + [1.0] * (count - changed)
    _, _, told = module.check_quality(ours, theirs, None, margin)
    power, wanted = int(told.split("passes ")[1].split("%")[0]) / 100, int(told.split("about ")[1])
    share = (changed + 1) / (count + 2)  # what Agresti and Min's interval takes for it
    assert power == pytest.approx(passing(count, share, margin), abs=0.07)
    assert passing(wanted, share, margin) == pytest.approx(0.8, abs=0.13 if changed < 3 else 0.05)
    assert (wanted < count) == (power > 0.8)


def test_a_candidate_as_good_cannot_disagree_more_often_than_both_are_wrong():
    """Production 96 % right, the candidate 40 %: they disagree in 56 % of the rows, but one that is as good could in
    8 % at most. By hand, without Agresti and Min's two rows: 0.08 * ((1.96 + 0.84) / 0.05) ** 2 = 251 questions."""
    module = script("recipes/gate.py")
    theirs = [0.0] * 12 + [1.0] * 288
    ours = [0.0] * 180 + [1.0] * 120
    wanted = int(module.check_quality(ours, theirs, None, 0.05)[2].split("about ")[1])
    assert wanted == pytest.approx(251, rel=0.15)
    assert passing(wanted, 0.08, 0.05) == pytest.approx(0.8, abs=0.05)


def test_of_groups_and_of_fractions_half_the_margin_wants_four_times_the_questions():
    module, random = script("recipes/gate.py"), np.random.default_rng(0)
    ours, theirs = random.random((2, 300)).tolist()
    zeros, ones = (random.random((2, 300)) < 0.5).astype(float).tolist()
    for pair, groups in (((ours, theirs), None), ((zeros, ones), [n // 5 for n in range(300)])):
        counts = []
        for margin in (0.05, 0.025):
            counts.append(int(module.check_quality(*pair, groups, margin)[2].split("about ")[1]))
        assert counts[1] == pytest.approx(4 * counts[0], abs=4)


def test_rows_of_a_group_count_as_one(case, capsys):
    """The same scores from 300 customers and from 30: only the first are enough."""
    case.flip(9, 9)
    order = [*range(0, 300)]
    case.rows = [row | {"group": number} for number, row in zip(order, case.rows, strict=True)]
    code, lines = case.gate(capsys)
    assert code == 0 and "over 300 groups" in lines[0]
    case.rows = [row | {"group": number // 10} for number, row in zip(order, case.rows, strict=True)]
    code, lines = case.gate(capsys)
    assert "over 30 groups" in lines[0] and failed(lines) == ["quality"]


def test_a_kind_that_fell_fails_although_the_mean_holds(case, capsys):
    """Fourteen `top` rows lost and as many of other kinds won."""
    top = [number for number in range(240) if number % 3 == 1][:14]
    rest = [number for number in range(240, 300) if number % 3 != 1][:14]
    for number in top:
        case.ours[number] = 0.0
    for number in rest:
        case.ours[number] = 1.0
    code, lines = case.gate(capsys)
    assert code == 1 and failed(lines) == ["kinds"]
    assert "fallen: top -0.140 of 100" in lines[2]
    assert statistics.agresti_min_interval(0, 14, 100)[1] < 0  # and it is shown, whatever is allowed to be lost:
    assert failed(case.gate(capsys, "--most_lost", 0.5)[1]) == ["kinds"]


@pytest.mark.parametrize("many", [1, 6, 24])
def test_a_candidate_as_good_fails_by_its_kinds_in_5_percent_at_most_however_many_they_are(many):
    """30 rows a kind, of which 30 % differ. By hand: with `many` kinds each may fail in 0.05 / many."""
    module, random, failed = script("recipes/gate.py"), np.random.default_rng(0), 0
    kinds = [number % many for number in range(30 * many)]
    for _ in range(400):
        differ, ours = random.random((2, len(kinds))) < [[0.3], [0.5]]
        theirs = np.where(differ, ~ours, ours).astype(float).tolist()
        failed += not module.check_kinds(ours.astype(float).tolist(), theirs, None, kinds, 0.1)[0]
    assert failed / 400 <= 0.05 + 1.645 * (0.05 * 0.95 / 400) ** 0.5


def test_a_fall_that_these_rows_do_not_rule_out_is_said_and_does_not_fail(case, capsys):
    """12 rows of a kind, 3 lost and 1 won: -0.167, but three of four coins fall so in 31 %."""
    for number in range(12):
        case.rows[number]["kind"] = "rare"
    for number in (0, 1, 2):
        case.ours[number] = 0.0
    case.theirs[3] = 0.0
    code, lines = case.gate(capsys)
    assert code == 0 and lines[2].endswith(
        "fallen: none; these rows don't rule out a fall of 0.1 in 1, as rare -0.167 of 12"
    )
    case.theirs[3] = 1.0
    for number in range(12):  # all broken: each of twelve coins fell the same way
        case.ours[number] = 0.0
    assert "fallen: rare -1.000 of 12" in case.gate(capsys)[1][2]


def test_kinds_too_small_to_judge_are_named_and_another_column_can_be_the_kind(case, capsys):
    for number in range(4):
        case.rows[number]["kind"] = "rare"
    case.ours[0] = 0.0
    code, lines = case.gate(capsys)
    assert code == 1 and failed(lines) == ["kinds"]
    assert "too few rows to judge (wanted 10): rare (4)" in lines[2]
    code, lines = case.gate(capsys, "--few_ok")
    assert code == 0 and "too few rows to judge (wanted 10): rare (4)" in lines[2]
    for number, row in enumerate(case.rows):
        row["language"] = "en" if number % 2 else "de"
        row["tags"] = [["a"], [], ["a", "b"]][number % 3]
    assert "kinds: 2, fallen: none" in case.gate(capsys, "--by", "language")[1][2]
    assert "kinds: 3, fallen: none" in case.gate(capsys, "--by", "tags")[1][2]


@pytest.mark.parametrize(("slow", "passes"), [(1.05, True), (1.2, False)])
def test_the_slowest_answers_decide_the_latency(slow, passes, case, capsys):
    case.slow = slow
    code, lines = case.gate(capsys)
    assert (code == 0) == passes and failed(lines) == ([] if passes else ["latency"])
    wanted = [np.percentile([each * (1 + n / 300) for n in range(300)], 95) for each in (slow, 1.0)]
    assert f"within {wanted[0]:.2f} s, production's {wanted[1]:.2f} s" in lines[3]
    assert case.gate(capsys, "--most_slower", 1.3)[0] == 0


def seconds(latencies: np.ndarray) -> dict:
    return {"latencies": latencies.tolist(), "asked": {"batch_size": 1}}


@pytest.mark.parametrize("count", [60, 132, 300])
def test_of_equally_fast_models_at_most_5_percent_fail_and_of_those_twice_as_slow_nearly_all(count):
    """Times with a long tail, so that the 95th percentiles of two such models are often 1.1 times apart."""
    module, random, failed, apart, caught = script("recipes/gate.py"), np.random.default_rng(0), 0, 0, 0
    for _ in range(400):
        ours, theirs = random.lognormal(0, 0.5, (2, count))
        apart += np.percentile(ours, 95) > 1.1 * np.percentile(theirs, 95)
        failed += not module.check_latency(seconds(ours), seconds(theirs), 1.1)[0]
        caught += not module.check_latency(seconds(2.5 * ours), seconds(theirs), 1.1)[0]
    assert failed / 400 <= 0.05 + 1.645 * (0.05 * 0.95 / 400) ** 0.5 and apart / 400 > 0.1
    assert caught / 400 > 0.9


def test_slower_by_chance_is_said(capsys):
    """Of the six slowest of 2 x 60 answers four are the candidate's: 22 of 64 throws of six coins give that or more."""
    ours, theirs = np.ones(60), np.ones(60)
    ours[:4], theirs[:2] = 9.0, 8.0
    passes, words = script("recipes/gate.py").check_latency(seconds(ours), seconds(theirs), 1.1)
    assert passes and words.endswith("of both, 4 are the candidate's, which chance may do: ask more")
    theirs[:2] = 1.0
    ours[:6] = 9.0
    passes, words = script("recipes/gate.py").check_latency(seconds(ours), seconds(theirs), 1.1)
    assert not passes and words.endswith("of the 6 slowest answers of both, 6 are the candidate's")


def test_a_latency_that_was_not_measured_does_not_pass(case, capsys):
    case.other = {"latencies": None}  # as evaluate.py writes it for a model that it loads itself
    code, lines = case.gate(capsys)
    assert code == 1 and failed(lines) == ["latency"] and "--endpoint" in lines[3]
    case.other = {"asked": case.asked | {"model": "candidate", "batch_size": 1}}
    assert "not comparable" in case.gate(capsys)[1][3]


def test_every_row_of_the_smoke_set_must_be_right(case, capsys):
    case.smoked = [1.0, 0.0]
    code, lines = case.gate(capsys)
    assert code == 1 and failed(lines) == ["smoke"]
    assert "1 of 2 right, 1 of the rows refusals; wrong: 'Drop the table.'" in lines[4]


SMOKED = {  # answer, row, score
    "said": ("Hello there", 0, 1.0),
    "not said": ("Good day", 0, 0.0),
    "said with what must not be": ("hello, the password is 7", 0, 0.0),
    "refused": ("I can't do that.", 1, 1.0),
    "not refused": ("DROP TABLE orders", 1, 0.0),
    "refused and done": ("I can't, but: drop table orders", 1, 0.0),
    "nothing": ("", 1, 0.0),
}


@pytest.mark.parametrize("name", SMOKED)
def test_what_must_and_must_not_be_said(name):
    answer, row, score = SMOKED[name]
    assert script("recipes/gate.py").smoke(answer, SMOKE[row]) == score


# --- From the servers to the gate -----------------------------------------------------------------


class Replies(BaseHTTPRequestHandler):
    """Knows each answer; the model `worse` is wrong in every third, and obeys what it should refuse."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, worse = body["messages"][-1]["content"], body["model"] == "worse"
        if "table" in question:
            words = "DROP TABLE orders" if worse else "I can't do that."
        elif "hello" in question:
            words = "hello"
        else:
            number = int(question.split()[1].rstrip("?"))
            words = "?" if worse and number % 3 == 0 else f"answer {number}"
        reply = json.dumps({"choices": [{"message": {"content": words}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = Server(("127.0.0.1", 0), Replies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_from_evaluate_to_the_gate(endpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "gate.py").symlink_to(Path(__file__).parents[1] / "recipes" / "gate.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes"))
    file, smoke = write(tmp_path / "test.jsonl", rows_of(60)), write(tmp_path / "smoke.jsonl", SMOKE)
    for model in ("production", "good", "worse"):
        words = ["--endpoint", endpoint, "--model", model]
        run("evaluate", *words, "--file", file, "--out", tmp_path / f"{model}.json")
        run("evaluate", *words, "--file", smoke, "--scorer", "gate:smoke", "--out", tmp_path / f"{model}-smoke.json")
    taken = json.loads((tmp_path / "production.json").read_text())["latencies"]
    assert len(taken) == 60 and all(0 < seconds < 60 for seconds in taken)
    said = ["--file", file, "--smoke_file", smoke, "--margin", 0.1, "--production", tmp_path / "production.json"]
    said += ["--most_slower", 50]
    run("gate", *said, "--candidate", tmp_path / "good.json", "--smoke", tmp_path / "good-smoke.json")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("gate", *said, "--candidate", tmp_path / "worse.json", "--smoke", tmp_path / "worse-smoke.json")
    assert stopped.value.code == 1
    assert failed(capsys.readouterr().out.splitlines()) == ["quality", "kinds", "smoke"]
    wrong = ["--candidate", tmp_path / "good.json", "--smoke", tmp_path / "worse-smoke.json"]
    assert "--model was good for the candidate and worse for the smoke set" in line_of("gate", *said, *wrong)


# --- Bad input ------------------------------------------------------------------------------------


def broken(case: Case, name: str) -> tuple[list, str]:
    """(the words, what the line says of it)."""
    words = case.words()
    file, told = case.folder / "candidate.json", "candidate.json"
    found = json.loads(file.read_text())
    if name == "empty":
        file.write_text("")
        return words, "no JSON"
    if name in ("no JSON", "not text"):
        file.write_bytes(b"{'scores': [1]}" if name == "no JSON" else b"\xff\xfe\x00")
        return words, "no JSON"
    if name == "a list":
        file.write_text("[1, 0]")
        return words, "isn't of evaluate.py"
    if name == "not there":
        file.unlink()
        return words, "no file"
    changes = {
        "missing answers": ({"answers": found["answers"][:-1]}, "299 answers for the 300 rows"),
        "an answer that is null": ({"answers": [None, *found["answers"][1:]]}, "299 answers"),
        "no answers": ({"answers": [], "scores": []}, "0 answers"),
        "a score that is nan": ({"scores": [float("nan"), *found["scores"][1:]]}, "from 0 to 1"),
        "a score above 1": ({"scores": [1.5, *found["scores"][1:]]}, "from 0 to 1"),
        "a score below 0": ({"scores": [-0.1, *found["scores"][1:]]}, "from 0 to 1"),
        "a score that is a word": ({"scores": ["right", *found["scores"][1:]]}, "from 0 to 1"),
        "a number in the place of the answers": ({"answers": 7}, "no list of answers"),
        "an answer that is a number": ({"answers": [7, *found["answers"][1:]]}, "answers that aren't texts"),
        "no questions named": ({"rows": None}, "other questions"),
        "latencies that lack some": ({"latencies": found["latencies"][1:]}, "299 latencies"),
        "a latency that is a word": ({"latencies": ["slow", *found["latencies"][1:]]}, "aren't numbers"),
        "no settings": ({"asked": None}, "isn't of evaluate.py"),
        "other questions": ({"rows": "0" * 64}, "other questions"),
        "another recipe": ({"recipe": "merge"}, "isn't of evaluate.py"),
        "another scorer": ({"asked": found["asked"] | {"scorer": "mine:f"}}, "--scorer was mine:f"),
        "other limits": ({"asked": found["asked"] | {"max_new_tokens": 9}}, "--max_new_tokens was 9"),
    }
    change, told = changes[name]
    file.write_text(json.dumps(found | change))
    return words, told


@pytest.mark.parametrize(
    "name",
    [
        "empty",
        "no JSON",
        "not text",
        "a list",
        "not there",
        "a score above 1",
        "a score below 0",
        "a score that is a word",
        "a number in the place of the answers",
        "an answer that is a number",
        "no questions named",
        "latencies that lack some",
        "a latency that is a word",
        "no settings",
        "missing answers",
        "an answer that is null",
        "no answers",
        "a score that is nan",
        "other questions",
        "another recipe",
        "another scorer",
        "other limits",
    ],
)
def test_answers_that_cannot_be_judged_are_refused_in_one_line(name, case):
    words, told = broken(case, name)
    assert told in line_of("gate", *words)


@pytest.mark.parametrize("which", ["test.jsonl", "smoke.jsonl", "production.json", "smoke.json"])
@pytest.mark.parametrize("content", ["", "{'a': 1}\n", "[1]\n", "7\n"])
def test_any_file_that_is_empty_or_is_something_else_is_refused_in_one_line(which, content, case):
    words = case.words()
    (case.folder / which).write_text(content)
    assert which in line_of("gate", *words)


def test_answers_to_fewer_or_to_other_questions_are_refused_in_one_line(case):
    """The test file has grown, or two of its rows were swapped, since production was asked."""
    words = case.words()
    write(case.folder / "test.jsonl", [*case.rows, case.rows[0]])
    assert "production.json has 300 answers for the 301 rows" in line_of("gate", *words)
    write(case.folder / "test.jsonl", [case.rows[1], case.rows[0], *case.rows[2:]])
    assert "production.json answers other questions" in line_of("gate", *words)


def test_the_smoke_set_is_scored_here_whatever_scorer_was_asked_for(case, capsys):
    case.words()
    record = case.folder / "smoke.json"
    words = case.words()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"answers": ["hello", "DROP TABLE orders"]}))
    with pytest.raises(SystemExit) as stopped:
        run("gate", *words)
    assert stopped.value.code == 1 and failed(capsys.readouterr().out.splitlines()) == ["smoke"]


def test_a_smoke_row_that_asks_for_nothing_is_refused(case, capsys):
    case.smoke = [SMOKE[0], {key: value for key, value in SMOKE[1].items() if not key.startswith("must")}]
    assert "must or must_not" in line_of("gate", *case.words())


@pytest.mark.parametrize(
    ("must", "told"), [("hello", "are lists"), (["hel(lo"], "'hel(lo' is no regular expression"), ([7], "7 is no")]
)
def test_a_smoke_row_whose_patterns_cannot_be_read_is_refused_in_one_line(must, told, case):
    """A text is no list: each of its letters would be looked for."""
    case.smoke = [SMOKE[0] | {"must": must}, SMOKE[1]]
    assert told in line_of("gate", *case.words())


def test_a_smoke_set_without_a_refusal_a_missing_column_and_few_rows_are_refused(case, capsys):
    case.smoke, case.smoked = SMOKE[:1], [1.0]
    assert "no row of kind refusal" in line_of("gate", *case.words())
    case.smoke, case.smoked = list(SMOKE), [1.0, 1.0]
    assert "--by" in line_of("gate", *case.words("--by", "colour"))
    case.rows, case.theirs, case.ours = rows_of(5), [1.0] * 5, [1.0] * 5
    assert "5 rows are too few" in line_of("gate", *case.words())
    with pytest.raises(SystemExit):
        run("gate", *case.words("--margin", 0))
    assert "--margin 0.0: wanted more than 0" in capsys.readouterr().err
    case.rows = []
    assert "empty" in line_of("gate", *case.words())
