"""ftlab.classroom.methods: what it reads off made-up runs can be worked out on paper; the stored runs are whole."""

import matplotlib.pyplot as plt
import pytest
from scripts import script

from ftlab.classroom import methods


def run(task: str, arm: str, *values: float, seed: int = 0, **more) -> dict:
    return {"task": task, "arm": arm, "seed": seed, "values": list(values)} | more


RUNS = [
    run("tidy", "rules", 0.5, 1.0),
    run("tidy", "zero-shot", 0.0, 0.5),
    run("tidy", "few-shot", 0.5, 0.5),
    run("tidy", "retrieval", 0.0, 0.0),
    run("tidy", "fine-tuning", 1.0, 0.5, seed=1, rows=512),
    run("tidy", "fine-tuning", 1.0, 1.0, seed=0, rows=512),
    *(run(task, arm, 1.0, 0.0) for task in ("facts", "ask", "triage") for arm in ("retrieval", "rules")),
    run("size", "trained on 8", 0.5, 0.5),
    run("size", "nearest of 32", 0.5, 0.0),
    *(run("noise", "256, half wrong", 0.0, 0.5, seed=seed) for seed in (0, 1)),
    *({"task": "known", "arm": arm, "seed": 0, "before": 0.5, "rows": 7,
       "curve": [{"passes": 2, "taught": 0.5, "others": 0.25}, {"passes": 4, "taught": 1.0, "others": 0.0}]}
      for arm in ("known", "unknown")),
    {"task": "domain", "arm": "pages", "seed": 0, "before": {"pages": 50.0}, "after": {"pages": 20.0}},
    {"task": "domain", "arm": "pages", "seed": 1, "before": {"pages": 50.0}, "after": {"pages": 30.0}},
]  # fmt: skip


def test_values_come_by_seed_and_arms_from_the_best_down():
    assert methods.values(RUNS, "tidy", "fine-tuning").tolist() == [[1, 1], [1, 0.5]]
    assert methods.values(RUNS, "tidy", "constrained").size == 0
    assert methods.arms(RUNS, "tidy")[:3] == ["fine-tuning", "rules", "few-shot"]


def test_a_difference_is_taken_example_by_example_and_for_each_seed():
    """fine-tuning minus rules: (0.5, 0) and (0.5, -0.5), mean 0.125."""
    mean, low, high = methods.compare(RUNS, "tidy", "fine-tuning", "rules")
    assert mean == pytest.approx(0.125) and low <= mean <= high
    assert methods.compare(RUNS, "tidy", "rules", "rules") == (0, 0, 0)


def test_arms_with_other_numbers_of_seeds_cannot_be_paired():
    three = [run("tidy", "other", 0.0, 1.0, seed=seed) for seed in range(3)]
    with pytest.raises(ValueError, match="got 2 seeds of fine-tuning and 3 of other"):
        methods.compare(RUNS + three, "tidy", "fine-tuning", "other")


def test_the_winner_is_compared_with_the_best_of_another_family():
    """On facts the reader (mean 1), the base model with pages and search alone (0.5 each) are all retrieval, so it is
    compared with few-shot (0.25). On tidy what finds examples for a trained model (0.8) is fine-tuning as the winner is
    (0.875), so that is compared with the rules (0.75).
    """
    more = [
        run("facts", "fine-tuning + retrieval", 1.0, 1.0),
        run("facts", "few-shot", 0.5, 0.0),
        run("tidy", "fine-tuning + retrieval", 0.8, 0.8),
    ]
    found = methods.winners(RUNS + more)
    assert list(found.index) == list(methods.TASKS)
    *facts, difference = found.loc["facts"]
    assert facts == ["retrieval", "fine-tuning + retrieval", 1, "few-shot", 0.25]
    assert difference == "+0.750 (+0.500 to +1.000)*"
    *tidy, difference = found.loc["tidy"]
    assert tidy == ["fine-tuning", "fine-tuning", 0.875, "rules", 0.75] and difference.startswith("+0.125 (")


def test_the_matrix_has_a_panel_a_task_and_marks_the_best_bar_and_what_is_missing():
    figure, axes = plt.subplots(2, 2)
    methods.plot_matrix(axes.flat, RUNS)
    titles = [ax.get_title() for ax in axes.flat]
    assert titles == list(methods.TASKS.values())
    tidy = axes.flat[titles.index(methods.TASKS["tidy"])]
    widths = {methods.ARMS[round(-bar.get_y() - bar.get_height() / 2)]: bar.get_width() for bar in tidy.patches}
    assert widths == {"zero-shot": 0.25, "few-shot": 0.5, "retrieval": 0, "rules": 0.75, "fine-tuning": 0.875}
    colours = [bar.get_facecolor() for bar in tidy.patches]
    best = colours[list(widths).index("fine-tuning")]
    assert colours.count(best) == 1
    assert [text.get_text() for text in tidy.texts].count("-") == len(methods.ARMS) - len(widths)
    plt.close(figure)


def test_sizes_lie_on_two_lines():
    """The rows of `fine-tuning` come from its runs; `retrieval` looks among all 2,108 rows of the training file."""
    figure, ax = plt.subplots()
    methods.plot_sizes(ax, RUNS)
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert lines == {
        "trained on": [[8, 0.5], [512, 0.875]],
        "in the prompt": [[8, 0.5], [32, 0.25], [2108, 0]],
    }
    plt.close(figure)


def test_noise_and_domain_tables():
    """Noisy minus the right half: (-1, 0), mean -0.5. Perplexity: from 50 to the mean of 20 and 30."""
    clean = [("noise", "the right half alone"), ("size", "trained on 32"), ("size", "trained on 128")]
    noise = methods.noise_table(RUNS + [run(*arm, 1.0, 0.5, seed=seed) for arm in clean for seed in (0, 1)])
    assert list(noise["words right"]) == ["0.750", "0.250", "0.750", "0.750"]
    first, wrong, *others = noise["minus the first"]
    assert first == "" and wrong.startswith("-0.500") and all(gap.startswith("+0.000") for gap in others)
    shown = methods.domain_table(RUNS).loc["pages"].to_dict()
    assert shown == {"perplexity before": 50, "perplexity after": 25, "after / before": 0.5}


def test_known_and_unknown_facts_are_drawn_over_passes():
    figure, axes = plt.subplots(1, 2)
    methods.plot_known(axes, RUNS)
    for ax, key in zip(axes, ("taught", "others"), strict=True):
        curves = [
            line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"
        ]
        assert curves == [[point[key] for point in RUNS[-3]["curve"]]] * 2
    assert axes[0].get_title() == "the 7 taught questions"
    plt.close(figure)


# --- The stored runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return methods.records()


@pytest.mark.parametrize(("task", "examples"), [("facts", 100), ("ask", 132), ("tidy", 100), ("triage", 150)])
def test_every_task_has_its_arms_on_all_its_examples(stored, task, examples):
    without = {"facts": {"constrained"}, "tidy": {"constrained"}}.get(task, set())
    assert set(methods.arms(stored, task)) == set(methods.ARMS) - without
    for arm in methods.arms(stored, task):
        seeds = 3 if "fine-tuning" in arm else 1
        assert methods.values(stored, task, arm).shape == (seeds, examples)


def test_which_family_won_is_more_than_chance_on_every_task(stored):
    found = methods.winners(stored)
    assert dict(found["won by"]) == {"facts": "retrieval", "ask": "rules", "tidy": "fine-tuning", "triage": "rules"}
    assert found["best minus that"].str.fullmatch(r"\+\S+ \(\+\S+ to \+\S+\)\*").all()


def test_the_sizes_shown_are_those_that_the_script_ran(stored):
    ran = script("data/results/methods.py")
    figure, ax = plt.subplots()
    methods.plot_sizes(ax, stored)
    ns = {c.get_label(): c.lines[0].get_xdata().tolist() for c in ax.containers}
    asked = [n for n in ran.SHOWN if n > ran.SHOTS]
    assert ns["trained on"] == [*ran.SHOWN, ran.TRAINED["tidy"]]
    assert ns["in the prompt"] == [ran.SHOTS, *asked, len(ran.train_rows("tidy"))]
    plt.close(figure)


def test_no_run_is_stored_twice(stored):
    names = [(run["task"], run["arm"], run["seed"]) for run in stored]
    assert len(set(names)) == len(names)
