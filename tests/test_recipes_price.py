"""recipes/price.py: the price of an answer with the idle hours in it, against a day played minute by minute."""

import json
import math
import random

import pytest
from scripts import ROOT, script

PRICE = script("recipes/price.py")


def test_by_hand():
    """1,000 answers a day of 3.6 s keep one machine busy for one hour of 24: $24 a day for 1,000 answers, where an
    hour costs $1; switched on for 4 hours, $4, a quarter busy. Never idle: $1."""
    assert PRICE.of_1000(3.6, 1, 1000) == pytest.approx((24, 1, 1 / 24))
    assert PRICE.of_1000(3.6, 1, 1000, hours=4) == pytest.approx((4, 1, 1 / 4))
    assert PRICE.of_1000(3.6, 1, 24_000) == pytest.approx((1, 1, 1))  # full, and one machine suffices
    assert PRICE.of_1000(3.6, 1, 24_001)[1] == 2
    assert PRICE.of_1000(3.6, 1, 24_000, peak=3) == pytest.approx((3, 3, 1 / 3))
    assert PRICE.machine_seconds([2, 4, 6, 8], 4) == 5 / 4 and PRICE.machine_seconds([2, 4], 32) == 3 / 2


@pytest.mark.parametrize("seed", range(20))
def test_a_day_played_hour_by_hour_costs_the_same(seed):
    """Answers of each hour are drawn; machines are rented until the busiest hour's work fits; the bill is summed."""
    rng = random.Random(seed)
    seconds, dollars, hours = rng.uniform(0.05, 5), rng.uniform(0.1, 5), rng.randint(1, 24)
    asked = [rng.randint(1, 20_000) for _ in range(hours)]  # nobody asks while they are off
    machines = 1
    while max(asked) * seconds > machines * 3600:
        machines += 1
    bill = sum(machines * dollars for _ in asked)
    worked = sum(answers * seconds for answers in asked) / (machines * 3600 * hours)
    peak = max(asked) / (sum(asked) / hours)
    found = PRICE.of_1000(seconds, dollars, sum(asked), hours, peak)
    assert found == pytest.approx((bill / sum(asked) * 1000, machines, worked))
    assert found[0] == pytest.approx(1000 * seconds * dollars / 3600 / found[2])  # the price without idle time, over it


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_the_seconds_of_a_machine_are_the_clocks_where_so_many_are_always_asked(at_once):
    """A queue of equal answers, played: the clock over the answers. 84 divide by 1, 4 and 7."""
    free, latencies = [0.0] * at_once, []
    for _ in range(84):
        slot = free.index(min(free))
        latencies.append(0.5)
        free[slot] += 0.5
    assert PRICE.machine_seconds(latencies, at_once) == pytest.approx(max(free) / 84)


def test_the_price_never_falls_below_that_of_a_machine_that_is_never_idle():
    for answers in (1, 10, 1e3, 1e5, 1e7):
        dollars, machines, busy = PRICE.of_1000(0.3, 2.5, answers, peak=1.7)
        assert dollars >= 1000 * 0.3 * 2.5 / 3600 and 0 < busy <= 1 / 1.7 + 1e-9 and machines >= 1
    assert PRICE.of_1000(0.3, 2.5, 1)[0] == pytest.approx(60_000)  # one answer a day pays for the whole day


@pytest.mark.parametrize("bad", [
    {"seconds": 0}, {"dollars_an_hour": -1}, {"answers_a_day": 0}, {"hours": 25}, {"hours": 0}, {"peak": 0.5},
    {"seconds": math.nan},
])  # fmt: skip
def test_what_makes_no_price_is_refused_with_what_was_got(bad):
    good = {"seconds": 1.0, "dollars_an_hour": 1.0, "answers_a_day": 10.0, "hours": 24.0, "peak": 1.0}
    (name, value) = next(iter(bad.items()))
    with pytest.raises(ValueError, match=rf"got .*{name} {value}.*wanted"):
        PRICE.of_1000(**good | bad)


def test_the_command_reads_what_evaluate_writes(tmp_path, capsys):
    served = {"latencies": [1.0, 2.0, 3.0, 2.0], "asked": {"batch_size": 2}}
    (tmp_path / "served.json").write_text(json.dumps(served))
    words = ["--answers", str(tmp_path / "served.json"), "--dollars_an_hour", "2.5", "--answers_a_day", "20000"]
    PRICE.main([*words, "--peak", "4"])
    assert capsys.readouterr().out == (
        "1 s of a machine for an answer; machines: 1, busy 23.1%\n"
        "$3 for 1,000 answers; $0.6944 if they were never idle\n"
    )
    with pytest.raises(SystemExit, match=r"got seconds 1\.0, .* hours 30\.0"):
        PRICE.main([*words, "--hours", "30"])


@pytest.mark.parametrize("content", [
    None, "{", "[]", '{"asked": {}}', '{"latencies": null, "asked": {"batch_size": 2}}',
    '{"latencies": [], "asked": {"batch_size": 2}}',
])  # fmt: skip
def test_another_file_is_named(content, tmp_path):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=rf"{file}.*wanted what evaluate.py --endpoint"):
        PRICE.main(["--answers", str(file), "--dollars_an_hour", "1", "--answers_a_day", "10"])


def test_the_page_names_it():
    assert "(price.py)" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
