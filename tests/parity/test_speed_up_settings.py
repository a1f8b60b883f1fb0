"""Each field of TRL's four configs has a verdict with `speed_up`: equal, refused, or refused by TRL
itself.

The verdicts stand in tests/golden/speed_up_settings.json, with their reasons;
tests/golden/make_speed_up_settings.py makes it by running all of them. Here the table is held to
the installed TRL and some of it is run again; with FTLAB_FUZZ above 1, as in `make test-long`, all
of it.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from datasets import disable_progress_bars
from speed_up_runs import KINDS, build
from speed_up_settings import DRAWING, fields, key, values, verdict

from ftlab import cpu

pytestmark = pytest.mark.usefixtures("one_thread")
disable_progress_bars()
ROOT = Path(__file__).parent.parent
TABLE = json.loads((ROOT / "golden" / "speed_up_settings.json").read_text("utf-8"))
SAMPLE = {  # run each time: some of each kind of verdict and of each trainer
    "SFT": ("loss_type", "packing", "pad_to_multiple_of", "neftune_noise_alpha", "max_length"),
    "DPO": ("use_weighting", "label_smoothing", "precompute_ref_log_probs"),
    "KTO": ("loss_type", "desirable_weight"),
    "GRPO": (
        "entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "temperature", "beta",
        "max_completion_length",
    ),
}  # fmt: skip
LONG = int(os.environ.get("FTLAB_FUZZ", "1")) > 1
RUN = [
    pytest.param(kind, field, id=f"{kind}-{field.name}")
    for kind in KINDS
    for field in fields(kind)
    if LONG or field.name in SAMPLE[kind]
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_of_the_installed_trl_has_a_verdict(kind):
    """A field that a release adds has none, and fails here until somebody has run it."""
    named = {field.name for field in fields(kind)}
    assert TABLE[kind].keys() == named, sorted(TABLE[kind].keys() ^ named)
    for field in fields(kind):
        asked = {key(changes) for changes in values(kind, field)}
        assert TABLE[kind][field.name].keys() == asked and asked, field.name
    for name, verdicts in TABLE[kind].items():
        for value, (word, reason) in verdicts.items():
            assert word in ("equal", "refused", "TRL refuses"), (name, value, word, reason)
            assert bool(reason) == (word != "equal"), (name, value)


def test_a_reason_names_the_setting():
    """Or what the setting does to the trainer."""
    other = (
        "checkpoint",
        "collator",
        "bf16",
        "compute_metrics",
        "callback",
        "hook",
        "liger",
        "eval",
    )
    for kind in KINDS:
        for name, verdicts in TABLE[kind].items():
            for value, (word, reason) in verdicts.items():
                if word == "refused":
                    given = [part.split("=")[0] for part in value.split(", ")]
                    assert any(part in reason for part in (name, *given, *other)), (value, reason)


def test_how_answers_are_drawn_is_nobodys_but_trls():
    for name in DRAWING:
        words = {word for word, _ in TABLE["GRPO"][name].values()}
        assert words <= {"refused", "TRL refuses"}, name


@pytest.mark.parametrize(("kind", "field"), RUN)
def test_a_verdict_is_what_comes_out(kind, field):
    for changes in values(kind, field):
        word, reason = verdict(kind, changes)
        known, known_reason = TABLE[kind][field.name][key(changes)]
        assert (word, word == "TRL refuses" or reason) == (
            known,
            word == "TRL refuses" or known_reason,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("default", [None, 0, 1.0, "none"])
def test_a_field_that_a_later_trl_adds_is_refused(kind, default):
    """Whatever its default value is: nobody knows what that does."""
    config = KINDS[kind][1]
    later = dataclasses.make_dataclass(
        config.__name__,
        [("sharpness", object, dataclasses.field(default=default))],
        bases=(config,),
    )
    trainer = build(kind, config=later)
    before = dict(vars(trainer))
    with pytest.warns(cpu.NotSpedUp, match="sharpness"):
        result = cpu.speed_up(trainer)
    assert not result and "sharpness" in result.reason
    assert vars(trainer) == before
