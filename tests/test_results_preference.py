"""experiments/preference/run.py: which runs it wants, and how thumbs become pairs."""

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from scripts import script

preference = script("experiments/preference/run.py")
alignment = preference.alignment


def text(row: dict, side: str) -> str:
    return row[side][0]["content"]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_a_pair_is_an_up_and_a_down_of_one_ticket_and_no_answer_stands_in_two(thumbs):
    rows = [
        {"prompt": [], "completion": alignment.message(f"{ticket} {label} {i}"), "label": label, "ticket": ticket}
        for i, (ticket, label) in enumerate(thumbs)
    ]
    pairs = preference.pairs(rows)
    chosen, rejected = ([text(pair, side) for pair in pairs] for side in ("chosen", "rejected"))
    assert all(c.split()[:2] == [r.split()[0], "True"] for c, r in zip(chosen, rejected, strict=True))
    assert len({*chosen, *rejected}) == 2 * len(pairs)
    votes = Counter(thumbs)
    wanted = {t: min(votes[t, True], votes[t, False], 2) for t in range(5)}
    assert Counter(int(c.split()[0]) for c in chosen) == Counter(wanted)


class World:
    """Tickets with six answers each, of which the first `ups` are worth 0.7 and the others 0.69."""

    def __init__(self, ups: int) -> None:
        golds = [0.7] * ups + [0.69] * (6 - ups)
        self.rows = [{"prompt": [str(i)], "answers": list("abcdef"), "golds": golds} for i in range(400)]

    def drawn(self, seed: int, clock) -> list[dict]:
        return self.rows


def thumbs(ups: int, **changed) -> list[dict]:
    arm = next(arm for arm in preference.arms() if arm["arm"] == "kto") | changed
    return preference.thumbs(alignment.Run(World(ups), arm, 1e-3, 1, "final"))


def test_the_thumb_is_up_from_070_on_noise_turns_so_many_and_few_ups_leaves_one_for_ten_down():
    clean, noisy, few = thumbs(2), thumbs(2, noise=0.4), thumbs(2, data="few ups")
    assert len(clean) == len(noisy) == 2400 and all(row["label"] == (text(row, "completion") in "ab") for row in clean)
    turned = sum(row["label"] != (text(row, "completion") in "ab") for row in noisy)
    assert abs(turned / 2400 - 0.4) < 0.03  # three standard errors
    assert sum(not row["label"] for row in few) == 1600 and sum(row["label"] for row in few) == 160


def ran(arm: dict, rate: float, seed: int, phase: str) -> dict:
    """A record whose gold is highest at the rate 1e-3."""
    gold = 1 - abs(alignment.LADDER.index(rate) - alignment.LADDER.index(1e-3)) / 10
    return preference.named(arm, rate, seed, phase) | {"checkpoints": [{"gold": gold}]}


def test_rates_are_searched_first_and_then_every_seed_runs_once():
    done = []
    while todo := preference.wanted(done):
        done += [ran(*one) for one in todo]
    assert len({json.dumps(preference.named(r, r["rate"], r["seed"], r["phase"])) for r in done}) == len(done)
    for arm in preference.arms():
        mine = [r for r in done if r["phase"] == "final" and all(r[key] == arm[key] for key in preference.ARM)]
        assert sorted(r["seed"] for r in mine) == list(arm.get("seeds", alignment.SEEDS)), arm
        assert {r["rate"] for r in mine} == {1e-3}, arm


def test_every_record_is_of_an_arm_that_is_wanted():
    wanted = [preference.named(arm, 0, 0, "") for arm in preference.arms()]
    records = alignment.records(preference.FILE)
    assert records and all(preference.named(r, 0, 0, "") in wanted for r in records)
    assert {r["phase"] for r in records} <= {"time", "search", "final"}


def test_all_arms_have_about_the_same_processor_time_of_plain_trl():
    timed = {record["arm"]: record for record in alignment.records(preference.FILE) if record["phase"] == "time"}
    assert timed.keys() == preference.STEPS.keys()
    for arm, one in timed.items():
        seconds = preference.STEPS[arm] * one["seconds_a_step"] + one["seconds_of_sampling"]
        assert abs(seconds / preference.SECONDS - 1) < 0.2, arm
