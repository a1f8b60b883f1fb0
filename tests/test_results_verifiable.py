"""experiments/verifiable/run.py: which runs it wants, what its checks pay, and which groups the dynamic arm keeps."""

import csv
import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from scripts import script

from ftlab.tasks import ask

verifiable = script("experiments/verifiable/run.py")
alignment = verifiable.alignment
GOLD = "SELECT COUNT(*) FROM orders WHERE minutes>45"
TOP = "SELECT city FROM orders{} GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1"


def test_the_docstring_names_each_arm_once():
    named = re.findall(r"^\| ([\w ]+) \|", verifiable.__doc__, re.M)
    assert named.pop(0) == "arm" and sorted(named) == sorted(arm["arm"] for arm in verifiable.arms())
    assert len(set(named)) == len(named)


# --- Which runs -------------------------------------------------------------------------------------------------------

BEST = {"distill": 3e-3}  # the others: 1e-3


def ran(arm: dict, rate: float, seed: int, phase: str) -> dict:
    """A record whose share right is highest at the arm's rate in BEST."""
    ladder, best = alignment.LADDER, BEST.get(arm["arm"], 1e-3)
    worse = abs(ladder.index(rate) - ladder.index(best)) / 10 if rate else 0
    return verifiable.named(arm, rate, seed, phase) | {"checkpoints": [{"right": 0.9 - worse}]}


def all_runs() -> list[dict]:
    done = []
    while todo := verifiable.wanted(done):
        done += [ran(*one) for one in todo]
    return done


def test_searches_come_first_and_then_each_seed_of_every_arm():
    first = verifiable.wanted([])
    phases = [phase for *_, phase in first]
    assert phases == sorted(phases, reverse=True) and phases.count("search") == 4 * 3
    assert [arm["arm"] for arm, _, _, phase in first if phase == "final"] == ["temperature", "majority"]
    searched = [ran(*one) for one in first]
    searched += [ran(*one) for one in verifiable.wanted(searched) if one[3] == "search"]
    finals = [seed for *_, seed, _ in verifiable.wanted(searched)]
    assert finals == sorted(finals), "every arm has a seed before one has two"


def test_a_rate_is_searched_until_a_worse_one_lies_on_either_side_and_then_every_seed_runs_once():
    """Searches: 3 rates an arm; 3e-3 is distill's best and the highest of them, so 1e-2 comes fourth.

    Final: 2 controls; 4 seeds of every arm that matters; 2 of the three variants that should spread rewards; 1 of
    grpo clean.
    """
    done = all_runs()
    assert len({json.dumps(verifiable.named(r, r["rate"], r["seed"], r["phase"])) for r in done}) == len(done)
    search, final = ([r for r in done if r["phase"] == phase] for phase in ("search", "final"))
    assert {r["seed"] for r in search}.isdisjoint(verifiable.SEEDS)
    tried = {name: sorted(r["rate"] for r in search if r["arm"] == name) for name in {r["arm"] for r in search}}
    assert tried == {name: [3e-4, 1e-3, 3e-3] for name in ("more sft", "rejection")} | {
        "grpo": [3e-4, 1e-3, 3e-3], "distill": [3e-4, 1e-3, 3e-3, 1e-2],
    }  # fmt: skip
    controls = ("temperature", "majority")
    seeds = dict.fromkeys(verifiable.SPREAD, 2) | dict.fromkeys((*controls, "grpo clean"), 1)
    assert Counter(r["arm"] for r in final) == {arm["arm"]: 4 for arm in verifiable.arms()} | seeds
    for r in final:
        wanted = 0 if r["arm"] in controls else BEST.get(r["arm"], 1e-3)
        assert r["rate"] == wanted, f"{r['arm']}: every GRPO arm has the rate that is best for grpo"


def test_of_rates_that_end_within_a_standard_error_of_the_best_the_lowest_is_taken():
    search = [
        {"rate": rate, "checkpoints": [{"right": end}]} for rate, end in ((1e-3, 0.522), (3e-3, 0.525), (3e-4, 0.4))
    ]
    assert alignment.best_rate(search, **verifiable.BEST) == 1e-3 and alignment.best_rate(search, "right") == 3e-3


def test_the_records_are_of_the_arms_and_none_is_missing():
    records = alignment.records(verifiable.FILE)
    assert verifiable.wanted(records) == []
    assert {r["arm"] for r in records} == {arm["arm"] for arm in verifiable.arms()}
    for record in records:
        if record["phase"] == "final" and record["rate"]:
            assert len(record["checkpoints"]) == 3
            assert [len(record[name]["hits"]) for name in ("test", "hand")] == [300, 132]
            assert all(0 <= hits <= verifiable.SAMPLES for name in ("test", "hand") for hits in record[name]["hits"])


# --- Checks -----------------------------------------------------------------------------------------------------------


def tops(**only: str) -> list[str]:
    """The city with the most orders in each of the ten tables, counted without SQL; it has no tie."""
    found = []
    for name in ask.NAMES:
        with (ask.FOLDER / name).open(encoding="utf-8", newline="") as file:
            cities = Counter(r["city"] for r in csv.DictReader(file) if all(r[k] == v for k, v in only.items()))
        (first, most), (_, second) = cities.most_common(2)
        found.append(first if most > second else f"{first} or another")
    return found


@pytest.mark.parametrize(("answer", "right", "parts", "one_table", "any_rows"), [
    (GOLD, 1, 1, 1, 1),
    ("SELECT COUNT(id) FROM orders WHERE NOT minutes<=45;", 1, 1, 1, 1),
    ("SELECT COUNT(*) FROM orders", 0, 0.2, 0, 1),  # runs, and has one column
    ("SELECT id, city FROM orders", 0, 0.1, 0, 1),  # runs
    ("SELECT id FROM orders WHERE id<0", 0, 0.1, 0, 0),  # runs, without a row
    ("SELECT COUNT(*) FROM order", 0, 0, 0, 0),
    ("```sql\n" + GOLD + "\n```", 0, 0, 0, 0),
    ("", 0, 0, 0, 0),
])  # fmt: skip
def test_what_each_check_pays_by_hand(answer, right, parts, one_table, any_rows):
    paid = [getattr(verifiable, name)(answer, GOLD) for name in ("right", "parts", "one_table", "any_rows")]
    assert paid == pytest.approx([right, parts, one_table, any_rows])


def test_a_query_that_is_right_on_some_tables_gets_its_share_of_parts():
    share = [a == b for a, b in zip(tops(), tops(plan="gold"), strict=True)]
    assert 0 < sum(share) < 10
    gold, answer = TOP.format(""), TOP.format(" WHERE plan='gold'")
    assert verifiable.parts(answer, gold) == pytest.approx(0.2 + 0.8 * sum(share) / 10)
    assert verifiable.one_table(answer, gold) == share[0] and verifiable.right(answer, gold) == 0


def test_the_check_on_one_table_pays_for_its_rows_learned_by_heart():
    answer, gold = f"SELECT '{tops()[0]}' FROM orders LIMIT 1", TOP.format("")
    assert verifiable.one_table(answer, gold) == 1 and verifiable.right(answer, gold) == 0


def test_rows_in_another_order_are_right_where_the_question_asks_for_none():
    gold = "SELECT city, COUNT(*) FROM orders GROUP BY city"
    turned = f"{gold} ORDER BY city DESC"
    assert verifiable.tables_right(turned, gold) == [True] * 10
    assert verifiable.tables_right(gold, turned) == [False] * 10


# --- The dynamic arm --------------------------------------------------------------------------------------------------


class Tokenizer:
    eos_token_id = -1

    def batch_decode(self, ids, skip_special_tokens):
        return [GOLD if answer[2] else "wrong" for answer in ids]  # behind it stands the end of turn


class GRPOTrainer:
    """Notes the rows of a step and the answers that it is given to them."""

    model = None

    def __init__(self, *_, **__) -> None:
        pass

    def _generate_and_score_completions(self, inputs):
        return inputs, self._generate_single_turn([row["number"] for row in inputs])[0]


def kept(monkeypatch, hits: dict[int, int]) -> list[int]:
    """The prompts of one step, by number, in turn; hits: of each prompt, how many of its 8 answers are right."""
    import trl

    import ftlab
    import ftlab.cpu

    class Decoder:
        """Answers [prompt, which of the 8, right or not]."""

        def __init__(self, model) -> None:
            pass

        def generate(self, prompts, *_):
            return [[number, i % 8, int(i % 8 < hits[number])] for i, number in enumerate(prompts)]

    monkeypatch.setattr(trl, "GRPOTrainer", GRPOTrainer)
    monkeypatch.setattr(ftlab.cpu, "Decoder", Decoder)
    monkeypatch.setattr(ftlab, "speed_up", lambda trainer: trainer, raising=False)
    rows = [{"number": n, "prompt": [{"role": "user", "content": str(n)}], "gold": GOLD} for n in range(8, 16)]
    world = SimpleNamespace(load=lambda: None, tokenizer=Tokenizer(), ids=lambda row: row["number"])
    run = SimpleNamespace(
        arm={"arm": "grpo dynamic"}, check=verifiable.right, world=world, rows=lambda: rows, watcher=lambda: None,
        arguments=lambda batch: {"output_dir": "runs/none", "per_device_train_batch_size": batch, "bf16": False,
                                 "use_cpu": True, "report_to": "none"},
        trained=lambda trainer: trainer,
    )  # fmt: skip
    monkeypatch.setattr(verifiable.random, "sample", lambda rows, n: rows[:n])
    batch = [{"number": n, "prompt": "", "gold": GOLD} for n in range(8) for _ in range(8)]
    asked, answers = verifiable.grpo(run)._generate_and_score_completions(batch)
    assert [row["number"] for row in asked] == [answer[0] for answer in answers], "each answer is to its own prompt"
    assert [answer[1] for answer in answers] == list(range(8)) * 8, "groups stay whole"
    return [row["number"] for row in asked[::8]]


def test_the_dynamic_arm_draws_16_groups_and_keeps_8_with_spread(monkeypatch):
    spread = {1: 1, 2: 7, 5: 4, 8: 3, 9: 5, 12: 2, 13: 6, 14: 1, 15: 7}
    assert kept(monkeypatch, {n: spread.get(n, 8 * (n % 2)) for n in range(16)}) == [1, 2, 5, 8, 9, 12, 13, 14]


def test_where_spread_is_rare_the_dynamic_arm_fills_its_step_with_the_first_of_the_others(monkeypatch):
    assert kept(monkeypatch, {n: 3 if n in (4, 10) else 8 * (n % 2) for n in range(16)}) == [4, 10, 0, 1, 2, 3, 5, 6]
