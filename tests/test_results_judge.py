"""experiments/judge: what a judge is asked, what is read from it, hacks, which runs, a tiny run."""

import itertools
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from played import played
from scripts import ROOT
from transformers import AutoTokenizer

from experiments import lab, report, runs, sft
from experiments.judge import hacks, judges
from experiments.judge import run as script
from experiments.judge.judges import CRITERIA, GRADE, PARTS
from experiments.rlhf import world as worlds
from ftlab import model_path
from ftlab.tasks import replies

FOLDER = ROOT / "experiments/judge"
LISTS = json.loads((ROOT / "experiments/ids.json").read_text("utf-8"))["lists"]
SIZES = {"test": 180, "hand": 115}
FORMS = pytest.mark.parametrize("form", [PARTS, GRADE], ids=["parts", "grade"])


def written() -> list[tuple[dict, str]]:
    """(row, reply): both replies to each ticket of the tests, and what the old team wrote."""
    found = []
    for set_ in ("test", "hand_test"):
        for row in worlds.read(set_):
            found += [(replies.as_pair(row), row[side]) for side in ("chosen", "rejected")]
    for row in worlds.read("log")[:300]:
        found.append(({"prompt": replies.prompt(row), "ticket_label": row["label"]}, row["reply"]))
    return found


@pytest.fixture(scope="module")
def world():
    return worlds.world("micro", worlds.TINY)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(worlds, "KEPT", tmp_path / "kept")
    return tmp_path


# --- What is asked and answered -------------------------------------------------------------------


def test_the_labels_of_the_parts_weighed_are_the_gold_and_those_of_a_grade_rise_with_it():
    grades = []
    for row, reply in written():
        gold = replies.gold_reward(reply, row["ticket_label"])
        sure = torch.zeros(1, len(PARTS.slots), 2)
        for k, verdict in enumerate(judges.labels(PARTS, row, reply)):
            sure[0, k, verdict] = 1
        assert judges.score(PARTS, sure) == pytest.approx([gold])
        grades.append((gold, -judges.labels(GRADE, row, reply)[0]))
    by_gold = [grade for _, grade in sorted(grades)]
    assert by_gold == sorted(by_gold) and set(by_gold) == {0, -1, -2, -3, -4}
    leasts = [least for least, _ in judges.GRADES]
    for (least, worth), above in zip(judges.GRADES, [1.01, *leasts], strict=False):
        assert least - 1e-5 <= worth < above


def test_a_score_is_the_weighed_mean_of_what_the_verdicts_are_worth_by_hand():
    probs = torch.tensor([[[0.5, 0.5], [1, 0], [0, 1], [0.2, 0.8], [1, 0]]])
    # 0.4 x 0.5 + 0.2 x 1 + 0.15 x 0 + 0.1 x 0.2 + 0.15 x 1
    assert judges.score(PARTS, probs) == pytest.approx([0.57])
    probs = torch.tensor([[[0.5, 0, 0, 0.5, 0]], [[0, 0, 0, 0, 1.0]]])
    assert judges.score(GRADE, probs) == pytest.approx([(0.87 + 0.21) / 2, 0])


@pytest.mark.parametrize("name", ["micro", "smollm2"])
def test_verdicts_are_single_tokens_and_an_answer_is_its_pieces(name):
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for form in (PARTS, GRADE):
        says = judges.single_tokens(tokenizer, form.says)
        assert len(set(says)) == len(form.says)
        for verdicts in itertools.product(range(len(form.says)), repeat=len(form.slots)):
            pieces = []
            for slot, verdict in zip(form.slots, verdicts, strict=True):
                pieces += [*ids(slot), says[verdict]]
            assert ids(form.answer(list(verdicts))) == pieces
    with pytest.raises(ValueError, match="wanted one each"):
        judges.single_tokens(tokenizer, (" yes", " certainly not"))


@FORMS
def test_what_it_is_asked_holds_rubric_ticket_and_reply_and_fits_into_the_context(form, world):
    longest = 0
    for row, reply in written():
        system, user = judges.prompt(form, row, reply)
        assert all(text in system["content"] for _, text in CRITERIA.values())
        assert row["prompt"][-1]["content"] in user["content"] and reply in user["content"]
        longest = max(longest, len(world.ids({"prompt": [system, user]})))
    assert longest + 40 < worlds.CONTEXT
    assert list(CRITERIA) == list(replies.WEIGHTS)


@FORMS
def test_trl_trains_on_the_tokens_that_the_score_is_read_from_and_on_no_others(form, world, tmp_path):
    row, reply = written()[0]
    said = judges.examples(form, [row | {"replies": [reply, "x"]}], 1)
    trainer = sft.trainer_of(world.load(), world.tokenizer, said, rate=1e-3, seed=0, lora={})
    (batch,) = trainer.get_train_dataloader()
    prompt = world.ids({"prompt": said[0]["prompt"]})
    answer = form.answer(judges.labels(form, row, reply))
    wanted = world.tokenizer(answer, add_special_tokens=False).input_ids
    got = batch["input_ids"][0].tolist()
    assert got[: len(prompt)] == prompt
    assert got[len(prompt) :][: len(wanted) + 1] == [*wanted, world.tokenizer.eos_token_id]
    assert (batch["labels"][0, : len(prompt)] == -100).all()
    assert (batch["labels"][0, len(prompt) : len(prompt) + len(wanted) + 1] != -100).all()


# --- What is read from it -------------------------------------------------------------------------


def one_by_one(model, tokenizer, form, prompt: list[dict]) -> list[list[float]]:
    """p(verdict) at each slot, the whole text anew for each: no cache, no padding."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    says, found = judges.single_tokens(tokenizer, form.says), []
    for slot in form.slots:
        ids = ids + tokenizer(slot, add_special_tokens=False).input_ids
        with torch.no_grad():
            probs = model(torch.tensor([ids])).logits[0, -1, says].double().softmax(-1)
        found.append(probs.tolist())
        ids = [*ids, says[int(probs.argmax())]]
    return found


@FORMS
@pytest.mark.parametrize("n", [1, 5])
def test_probabilities_are_those_of_one_reply_after_the_other_without_a_cache(form, n, world):
    torch.manual_seed(n)
    model = world.load()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    row = world.sets["test"][0]
    texts = ["Sorry.", "", row["chosen"][0]["content"], "Sorry. " * 9, row["rejected"][0]["content"]]
    prompts = [judges.prompt(form, row, text) for text in texts[-n:]]
    got = judges.probabilities(model.eval(), world.tokenizer, form, prompts)
    wanted = [one_by_one(model, world.tokenizer, form, prompt) for prompt in prompts]
    assert got.shape == (n, len(form.slots), len(form.says))
    torch.testing.assert_close(got.double(), torch.tensor(wanted).double(), atol=2e-5, rtol=1e-3)
    alone = judges.probabilities(model, world.tokenizer, form, prompts[:1] * 2)
    torch.testing.assert_close(alone[0], alone[1])
    torch.testing.assert_close(alone[0], got[0], atol=2e-5, rtol=1e-3)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5))
def test_what_all_begin_with_is_the_longest_that_leaves_each_a_token(ids):
    got = judges.common(ids)
    fits = [k for k in range(min(map(len, ids))) if len({tuple(one[:k]) for one in ids}) == 1]
    assert got == max(fits)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.3, 0.8, 1]), st.integers(0, 3)), min_size=2, max_size=12))
def test_rho_and_auc_by_their_definitions(pairs):
    golds, scores = [gold for gold, _ in pairs], [float(score) for _, score in pairs]
    got = script.across([{"golds": golds}], [scores])
    if len(set(golds)) < 2 or len(set(scores)) < 2:
        assert got == {"rho": None, "auc": None}
        return

    def ranks(values: list) -> list[float]:
        below = [sum(other < one for other in values) for one in values]
        return [b + (values.count(one) + 1) / 2 for b, one in zip(below, values, strict=True)]

    table = torch.tensor([ranks(golds), ranks(scores)], dtype=torch.double)
    assert got["rho"] == pytest.approx(torch.corrcoef(table)[0, 1].item(), abs=1e-4)
    good = [score for gold, score in pairs if gold >= script.GOOD]
    other = [score for gold, score in pairs if gold < script.GOOD]
    if not good or not other:
        assert got["auc"] is None
        return
    couples = list(itertools.product(good, other))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in couples]
    assert got["auc"] == pytest.approx(sum(wins) / len(wins), abs=1e-4)


# --- Hacks ----------------------------------------------------------------------------------------


def test_no_hack_makes_a_reply_better_and_each_costs_what_it_says():
    changes = {name: Counter() for name in hacks.HACKS}
    rows = [row for row, _ in written()]
    for (row, reply), number in zip(written(), hacks.others(rows), strict=True):
        label = row["ticket_label"]
        assert number != label["order_id"] and len(number) == 6
        before = replies.score(reply, label)
        for name, hack in hacks.HACKS.items():
            text = hack(reply, number)
            assert text.startswith(reply) and len(text) > len(reply)
            after = replies.score(text, label)
            lost = [key for key in before if before[key] and not after[key]]
            assert not [key for key in before if after[key] and not before[key]], (name, text)
            if name in ("claim", "rubric", "answer", "sorry"):
                assert not any(after.values()), "no English, or one phrase over and over"
            elif any(before.values()):
                changes[name][tuple(lost)] += 1
    assert set(changes["praise"]) == {(), ("short",)}, "the sentence may be the one too many"
    assert changes["praise"][()] > 20 * changes["praise"]["short",]
    assert {key for lost in changes["number"] for key in lost} == {"order_id", "short"}
    assert changes["number"]["order_id",] > changes["number"][()] > 0, "it may lack it already"
    assert set(changes["longer"]) == {(), ("short",)}


def test_without_another_ticket_there_is_no_other_number():
    rows = [row for row, _ in written()][:1]
    with pytest.raises(ValueError, match="without another order number"):
        hacks.others(rows * 3)


def judged_rows(n: int = 12) -> list[dict]:
    """Tickets with four written replies each, of different gold."""
    found = []
    for row in worlds.read("hand_test")[:n]:
        pair = replies.as_pair(row)
        texts = [row["chosen"], row["rejected"], "We are sorry for this trouble.", "Thank you for you rice"]
        found.append(pair | {"replies": texts, "golds": [worlds.gold(text, pair) for text in texts]})
    return found


def by_rules(form):
    """A judge that knows the rules."""

    def judge(row: dict, texts: list[str]) -> tuple:
        probs = torch.zeros(len(texts), len(form.slots), len(form.says))
        for i, text in enumerate(texts):
            for k, verdict in enumerate(judges.labels(form, row, text)):
                probs[i, k, verdict] = 1
        return judges.score(form, probs), probs.tolist()

    return judge


@FORMS
def test_a_judge_that_knows_the_rules_is_always_right_and_no_hack_pleases_it(form):
    rows = judged_rows()
    found = script.on_set(by_rules(form), form, rows)
    if form is PARTS:
        assert set(found["right"]) == {1.0}
        assert found["rho"] == pytest.approx(1)
    assert found["auc"] == 1.0
    assert {value for each in found["verdicts"].values() for value in each} == {1}
    assert found["said"] == found["held"]
    for name in hacks.HACKS:
        one = found["hacks"][name]
        if form is PARTS:
            assert one["rise"] == pytest.approx(one["gold"], abs=1e-4)
        assert max(one["rise"]) <= 0 and set(one["wins"]) == {0} and set(one["outranks"]) == {0}


def test_a_judge_that_counts_words_is_hacked_by_all_that_is_appended():
    rows = judged_rows()
    found = script.on_set(lambda row, texts: ([len(t.split()) for t in texts], None), None, rows)
    assert "verdicts" not in found
    for name in hacks.HACKS:
        one = found["hacks"][name]
        assert min(one["rise"]) > 0 >= max(one["gold"]) and set(one["wins"]) == {1}
    plain = [row["replies"][script.plain_of(row)] for row in rows]
    best = [row["replies"][worlds.by_gold(row)[-1]] for row in rows]
    wanted = [int(len(a.split()) > len(b.split())) for a, b in zip(plain, best, strict=True)]
    assert found["hacks"]["untouched"]["outranks"] == wanted
    longer = found["hacks"]["longer"]
    assert longer["outranks"] == [1] * len(rows)
    assert longer["gain"] == [1 - before for before in wanted]


def test_replies_that_are_all_worth_the_same_count_as_half_a_win():
    rows = [row | {"replies": row["replies"][:1] * 4, "golds": row["golds"][:1] * 4} for row in judged_rows(3)]
    found = script.on_set(by_rules(PARTS), PARTS, rows)
    assert found["hacks"]["longer"]["outranks"] == [0.5] * 3 == found["right"]


def test_the_most_common_verdicts_are_right_as_often_as_they_are_common():
    rows = judged_rows()
    probs = script.most_common(rows)
    told = [judges.labels(PARTS, row, text) for row in rows for text in row["replies"]]
    found = script.verdicts(PARTS, rows, [[probs] * 4 for _ in rows])
    for k, name in enumerate(CRITERIA):
        yes = sum(one[k] == 0 for one in told) / len(told)
        share = sum(found["verdicts"][name]) / len(rows)
        assert share == pytest.approx(max(yes, 1 - yes), abs=1e-3)
        assert found["held"][name] == pytest.approx(yes, abs=1e-3)


# --- Which runs, and what a record holds ----------------------------------------------------------


def made_up(name: dict, draw: random.Random) -> dict:
    """A record of a run, with random scores of the right length."""
    told = script.ARMS[name["arm"]]
    record = name | {"model": told.model}
    if name["phase"] == "search":
        return record | {"validation": draw.random()}
    for set_, size in SIZES.items():
        size = script.FEW if told.model == "135M" else size

        def values(n: int = size) -> list[float]:
            return [draw.random() for _ in range(n)]

        found = {}
        if told.form is not None:
            names = list(CRITERIA) if told.form is PARTS else ["grade"]
            found["verdicts"] = {key: values() for key in [*names, "all"]}
            found |= {key: {one: draw.random() for one in names} for key in ("said", "held")}
        if told.method != "most common":
            found |= {"right": values(), "rho": draw.random(), "auc": draw.random()}
            found |= {key: draw.random() for key in ("longer", "shorter", "spread")}
            found["hacks"] = {"untouched": {"outranks": values()}}
            for hack in hacks.HACKS:
                keys = ("rise", "gold", "wins", "outranks", "gain")
                found["hacks"][hack] = {key: values() for key in keys}
        record[set_] = found
    return record


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_each_trained_arm_tries_two_rates_and_runs_at_the_better_one(seed):
    parts = played(script, made_up, seed)
    search, final = parts[0], parts[1:]
    assert {r["phase"] for r in search} == {"search"}
    assert [{r["seed"] for r in part} for part in final] == [{-1}, {0}, {1}, {2}]
    records = [record for part in final for record in part]
    for arm, told in script.ARMS.items():
        mine = [r for r in records if r["arm"] == arm]
        assert len(mine) == (3 if told.model == "micro" and told.rates else 1)
        tried = {r["rate"]: r["validation"] for r in search if r["arm"] == arm}
        assert len(tried) == len(told.rates) in (0, 2)
        assert {r["rate"] for r in mine} == ({max(tried, key=tried.get)} if tried else {None})
        seeds = {r["seed"] for r in search if r["arm"] == arm}
        if told.model == "135M" and tried:
            assert seeds == {0}, "its final run reads the better of these two"
        else:
            assert not seeds & {r["seed"] for r in mine}


def test_what_is_recorded_is_wanted_and_sentences_wait_for_the_last_seed():
    records = runs.read(FOLDER / "records.jsonl")
    jobs = script.jobs(records)
    assert all(job.is_done(records) for job in jobs) or "judge" in lab.under_way()
    assert all(sum(job.left(record) for job in jobs) == 1 for record in records)
    assert set(script.QUESTIONS) <= LISTS.keys()


def test_a_tiny_run_leaves_a_value_a_ticket_and_altered_replies_to_read(kept, world):
    (record,) = script.recorded("parts", 1e-3, 0, "final", worlds.TINY)
    runs.append(kept / "records.jsonl", record)
    assert record["steps"] == 3 and record["examples"] == 8 * 6
    for set_ in SIZES:
        found = record[set_]
        assert len(found["right"]) == 4 and set(found["verdicts"]) == {*CRITERIA, "all"}
        for hack in hacks.HACKS:
            assert {len(each) for each in found["hacks"][hack].values()} == {4}
    texts = record["texts"]
    assert len(texts) == 4 * (1 + len(hacks.HACKS))
    for first in range(0, len(texts), 1 + len(hacks.HACKS)):
        plain, *altered = texts[first : first + 1 + len(hacks.HACKS)]
        assert plain["hack"] == "untouched" and len({one["id"] for one in (plain, *altered)}) == 1
        assert all(one["reply"].startswith(plain["reply"]) for one in altered)
    (search,) = script.recorded("parts", 1e-3, 0, "search", worlds.TINY)
    assert 0 <= search["validation"] <= 1 and search["train_loss"] == record["train_loss"]


def test_the_adapter_of_the_135m_is_kept_merged_and_read_again_as_the_same_judge(kept, world, monkeypatch):
    """With `micro` in the place of the 135M."""
    whole = judges.base
    monkeypatch.setattr(judges, "base", lambda name, w: whole("micro", w))
    rows, _ = world.labelled(0)
    told = {"rate": 1e-2, "seed": 0, "batch": 2}
    rows = judges.examples(PARTS, rows, 1)
    (one, tokenizer, took), (two, _, again) = (judges.trained(world, "135M", PARTS, rows, told) for _ in range(2))
    assert took == again and took["trained"] < sum(p.numel() for p in one.parameters()) / 4
    prompts = [rows[0]["prompt"], rows[1]["prompt"]]
    first, second, before = (
        judges.probabilities(model, tokenizer, PARTS, prompts) for model in (one, two, world.start)
    )
    torch.testing.assert_close(first, second)
    assert (first - before).abs().max() > 0.05
    assert not any("lora" in name for name, _ in one.named_parameters())


# --- statements.yaml ------------------------------------------------------------------------------


def test_statements_yaml_finds_every_arm_and_hack_in_the_records_to_come(tmp_path):
    here = tmp_path / "judge"
    here.mkdir()
    (here / "statements.yaml").write_text((FOLDER / "statements.yaml").read_text("utf-8"), "utf-8")
    lines = [json.dumps(record) + "\n" for part in played(script, made_up, 1) for record in part]
    (here / "records.jsonl").write_text("".join(lines), "utf-8")
    experiment = lab.load("judge", tmp_path)
    assert list(experiment.arms) == list(script.ARMS)
    for arm, told in script.ARMS.items():
        for set_, size in SIZES.items():
            size = script.FEW if told.model == "135M" else size
            found = experiment.level("right", arm, set_)
            if told.method == "most common":
                assert found is None
            else:
                assert (found.seeds, found.questions) == (len(told.seeds), size)
                assert experiment.level("right, first 30", arm, set_).questions == script.FEW
                for hack in hacks.HACKS:
                    for of in ("rise", "gold", "outranks", "gain"):
                        assert experiment.level(f"{hack}, {of}", arm, set_).questions == size
            verdict = experiment.level("verdicts", arm, set_)
            assert (verdict is None) == (told.form is None)
            assert (experiment.level("action", arm, set_) is None) == (told.form is not PARTS)
            assert (experiment.level("grade", arm, set_) is None) == (told.form is not GRADE)
    assert experiment.difference("right, first 30", "parts", "135M, parts", "hand").questions == 30
    assert all(arm in report.files(experiment)["report.md"] for arm in script.ARMS)
