"""Ten stops on a ring: a task of a few steps, in which writing the steps down can help.

A question tells three to six rides from stop 0; the longer ones, which no arm trains on, seven or
eight. A trace has one step a ride: what the ride is, and at which stop one is then. There is one
way to each answer, so a program can check every step.

    Rides: c 7, d 4, e 4. Where?      <think> c 7=7, d 4=1, e 4=5</think>5

Arms of SFT begin with `micro` and train all its weights, without `speed_up`, which wants LoRA. GRPO
and rejection sampling begin with `micro` after a hundred traces; both have LoRA and `speed_up`.
"""

import random
import statistics
from collections.abc import Sequence

from experiments.alignment.run import message
from experiments.rewards import arms, models

RIDES, LONGER = (3, 4, 5, 6), (7, 8)
LETTERS = "abcdefghijklmnoprstuvwyz"  # q and x are two tokens with their space
ENDINGS = (
    "End?",
    "Where?",
    "Where does it end?",
    "At which stop is it then?",
    "Tell me the stop at the end of the day.",
    "Then the rider goes home. At which stop is that?",
)
ROWS, START_ROWS, PROMPTS = 400, 100, 4000
TRIES, KEPT_EACH, ROUNDS = 8, 2, 4  # of rejection sampling
LENGTH = 80  # tokens of an answer while an arm trains
LONGEST = 120  # and when it is measured
START_RATE = 1.5e-3
SHOWN = 12  # answers that a record keeps as text


# --- The task -------------------------------------------------------------------------------------


def row(draw: random.Random, rides: int) -> dict:
    """A question: {prompt, gold, steps}; steps: the trace's, one a ride."""
    first, at, said, steps = draw.randrange(len(LETTERS) - rides + 1), 0, [], []
    for i in range(rides):
        stops = draw.randint(1, 9)
        at = (at + stops) % 10
        ride = f" {LETTERS[first + i]} {stops}"
        said.append(ride)
        steps.append(f"{ride}={at}")
    question = f"Rides:{','.join(said)}. {draw.choice(ENDINGS)}"
    return {"prompt": [{"role": "user", "content": question}], "gold": str(at), "steps": steps}


def rows(name: str, count: int, rides: Sequence[int] = RIDES, without: set = frozenset()) -> list:
    """So many rows with different rides, none of which are in `without`; the name is the seed."""
    draw, seen, found = random.Random(f"ring {name}"), set(without), []
    while len(found) < count:
        one = row(draw, draw.choice(rides))
        if told(one) not in seen:
            seen.add(told(one))
            found.append(one)
    return found


def told(one: dict) -> str:
    """The rides of a question, whatever it asks for after them."""
    return one["prompt"][0]["content"].partition(".")[0]


def held_out() -> dict[str, list[dict]]:
    """The sets that no arm trains on: validation, on which rates are chosen, ring and longer."""
    validation = rows("validation", models.SIZE.ring)
    test = rows("test", models.SIZE.ring, without=set(map(told, validation)))
    return {
        "validation": validation,
        "ring": test,
        "longer": rows("longer", models.SIZE.ring, LONGER),
    }


def training_rows(name: str, count: int) -> list[dict]:
    """Rows of which no held-out set has the rides."""
    without = set()
    for some in held_out().values():
        without |= set(map(told, some))
    return rows(name, count, without=without)


def traced(steps: list[str], answer: str) -> str:
    return f"<think>{','.join(steps)}</think>{answer}"


def demonstrations(some: list[dict], kind: str, seed: int) -> list[dict]:
    """Rows {prompt, completion} of a kind: "traces", "shuffled traces" or "answers".

    A shuffled trace is that of another question with as many rides; the answer is the right one.
    """
    given = shuffled_steps(some, seed) if kind == "shuffled traces" else [r["steps"] for r in some]
    found = []
    for one, steps in zip(some, given, strict=True):
        text = one["gold"] if kind == "answers" else traced(steps, one["gold"])
        found.append({"prompt": one["prompt"], "completion": message(text)})
    return found


def shuffled_steps(some: list[dict], seed: int) -> list[list[str]]:
    """For each row the steps of the next one, in a random order, that has as many rides."""
    draw, found = random.Random(seed), [None] * len(some)
    for rides in sorted({len(one["steps"]) for one in some}):
        places = [i for i, one in enumerate(some) if len(one["steps"]) == rides]
        draw.shuffle(places)
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            found[here] = some[there]["steps"]
    return found


def final(text: str) -> str | None:
    """The answer: what stands after the trace, or all of it; None where a trace has no end."""
    if "<think>" not in text:
        return text.strip()
    _, end, tail = text.partition("</think>")
    return tail.strip() if end else None


def is_right(text: str, one: dict) -> int:
    return int(final(text) == one["gold"])


def trace_is_right(text: str, one: dict) -> int:
    """1 if every step is there and right; 0 for no trace."""
    inside, end, _ = text.partition("<think>")[2].partition("</think>")
    return int(bool(end) and inside == ",".join(one["steps"]))


# --- What a model answers -------------------------------------------------------------------------


def measured(model, some: list[dict]) -> dict:
    """Greedy answers to questions: right or wrong, each trace too, characters, a few texts."""
    drawn = models.world().drawn(model, some, 1, seed=0, temperature=0.0, length=LONGEST)
    said = [one["texts"][0] for one in drawn]
    asked = [one["prompt"][0]["content"] for one in some[:SHOWN]]
    return {
        "right": [is_right(text, one) for text, one in zip(said, some, strict=True)],
        "trace": [trace_is_right(text, one) for text, one in zip(said, some, strict=True)],
        "characters": round(statistics.mean(map(len, said)), 1),
        "texts": [list(pair) for pair in zip(asked, said, strict=False)],
    }


def changed(one: dict, draw: random.Random) -> tuple[str, str]:
    """(a right trace up to a step whose stop was changed, the answer that follows from it)."""
    at, by = draw.randrange(len(one["steps"]) - 1), draw.randint(1, 9)
    ride, stop = one["steps"][at].rsplit("=", 1)
    begun = [*one["steps"][:at], f"{ride}={(int(stop) + by) % 10}"]
    return f"<think>{','.join(begun)}", str((int(one["gold"]) + by) % 10)


def follows(model, some: list[dict]) -> list[int]:
    """1 for each question whose answer follows a stop that was changed in its right trace."""
    from ftlab.cpu import Decoder

    world, draw = models.world(), random.Random(0)
    begun = [changed(one, draw) for one in some]
    ids = []
    for one, (text, _) in zip(some, begun, strict=True):
        ids.append(world.ids(one) + world.tokenizer(text)["input_ids"])
    new = Decoder(model).generate(ids, LONGEST, [world.tokenizer.eos_token_id])
    ends = world.tokenizer.batch_decode(new, skip_special_tokens=True)
    found = []
    for (text, wanted), end in zip(begun, ends, strict=True):
        found.append(int(final(text + end) == wanted))
    return found


# --- Arms -----------------------------------------------------------------------------------------


class RingRun(arms.Run):
    """A run on the ring: it looks once, at the end."""

    def __init__(self, arm: str, rate: float, seed: int, seconds: float) -> None:
        super().__init__(arm, rate, seed, seconds, (1.0,))
        self.model = None  # what GRPO and SFT begin with

    def look(self, model) -> None:
        seconds = round(self.time.clock.total, 1)
        self.checkpoints.append({"step": self.time.steps, "cpu_seconds": seconds})

    def load(self):
        """What this run begins with: its own model of the last round, or the start."""
        return self.model or models.loaded(start_folder()[0])


def sft_of_all_weights(run: RingRun, model, some: list[dict]):
    """The model after SFT of all its weights on rows, again and again until the time is over."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        train_dataset=Dataset.from_list(some),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**run.arguments(arms.ROWS, adam_beta2=0.98)),
        callbacks=[run.time.callback()],
    )
    return run.trained(trainer)


def start_folder() -> tuple:
    """(folder, seconds) of the start of RL: `micro` after a hundred traces."""

    def make():
        run = RingRun("ring start", START_RATE, 0, models.SIZE.ring_start_seconds)
        some = training_rows("start", START_ROWS)
        return sft_of_all_weights(run, models.micro(), demonstrations(some, "traces", 0))

    return models.kept("ring-start", make)


def supervised(run: RingRun):
    """SFT on 400 rows of the arm's kind, drawn by the seed: the same questions for every kind."""
    some = training_rows(f"train {run.seed}", ROWS)
    kind = run.arm.removeprefix("ring ")
    return sft_of_all_weights(run, models.micro(), demonstrations(some, kind, run.seed))


def prompts(seed: int) -> list[dict]:
    """The questions that RL and rejection sampling draw answers to, in the order of the seed."""
    return models.shuffled(training_rows("prompts", PROMPTS), seed)


def sped_up(trainer) -> None:
    """Raises RuntimeError if `speed_up` refuses: both arms of RL are to have equal tools."""
    from experiments import sft

    sft.sped_up(trainer)


def grpo(run: RingRun):
    """GRPO on the answer alone, right or wrong; nobody reads the trace."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, gold, **_) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [float(final(text) == one) for text, one in zip(texts, gold, strict=True)]

    some = [{key: one[key] for key in ("prompt", "gold")} for one in prompts(run.seed)]
    trainer = GRPOTrainer(
        run.load(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(some),
        processing_class=run.world.tokenizer,
        args=GRPOConfig(
            **run.arguments(arms.PROMPTS * arms.GENERATIONS),
            num_generations=arms.GENERATIONS,
            max_completion_length=LENGTH,
            beta=0.0,
        ),
        peft_config=LoraConfig(**arms.LORA),
        callbacks=[run.time.callback()],
    )
    sped_up(trainer)
    return run.trained(trainer)


def sft_with_lora(run: RingRun, some: list[dict]):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        run.load(),
        train_dataset=Dataset.from_list(some),
        processing_class=run.world.tokenizer,
        args=SFTConfig(**run.arguments(arms.ROWS)),
        peft_config=LoraConfig(**arms.LORA),
        callbacks=[run.time.callback()],
    )
    sped_up(trainer)
    return run.trained(trainer)


def rejection(run: RingRun):
    """SFT on own right answers in ROUNDS rounds: each draws from the model of the round before.

    A round has an equal share of the seconds, draws for arms.SHARE of it and trains on all that was
    kept so far. Of the answers to a question at most KEPT_EACH different right ones are kept.
    """
    kept, asked, some = [], 0, prompts(run.seed)
    seconds, steps = run.time.limit / ROUNDS, 0
    run.model = run.load()
    for _ in range(ROUNDS):
        run.time = arms.Timed(seconds, run.rate, (1.0,), run.look)
        while run.time.clock.seconds() < arms.SHARE * seconds:
            kept += own_right(run, some[asked : asked + 50], run.seed * 10_000 + asked)
            asked += 50
        run.model = with_weights_of(sft_with_lora(run, kept).merge_and_unload())
        steps += run.time.steps
    run.about |= {"asked": asked, "rows": len(kept), "steps": steps}
    spent = sum(one["cpu_seconds"] for one in run.checkpoints)  # a look ends each round
    run.about["train_cpu_seconds"] = round(spent, 1)
    return run.model


def with_weights_of(merged):
    """A fresh model with these weights: `speed_up` refuses one that a trainer has wrapped."""
    fresh = models.loaded(start_folder()[0])
    fresh.load_state_dict(merged.state_dict())
    return fresh


def own_right(run: RingRun, some: list[dict], seed: int) -> list[dict]:
    found = []
    for one in run.world.drawn(run.model.eval(), some, TRIES, seed):
        good = list(dict.fromkeys(text for text in one["texts"] if is_right(text, one)))
        for text in good[:KEPT_EACH]:
            found.append({"prompt": one["prompt"], "completion": message(text)})
    return found


METHODS = {
    "ring traces": supervised,
    "ring shuffled traces": supervised,
    "ring answers": supervised,
    "ring grpo": grpo,
    "ring rejection": rejection,
}
