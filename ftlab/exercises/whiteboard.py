"""Arithmetic for a whiteboard, with fresh numbers each time: what interviewers ask to be worked out on the spot.

    whiteboard.board()           problems one after another, checked, with the working

Each problem is a function: it draws its numbers and returns the text, the answer, the working, and what typical slips
give. All is plain arithmetic, as on paper; tests/test_whiteboard.py holds every one against the formula of ftlab or of
the library that the course uses.
"""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import ipywidgets
from IPython.display import display

from ftlab.classroom import page, progress, quiz
from ftlab.classroom.quiz import Question

KIND = "whiteboard"  # in the progress file
PROBLEMS: dict[str, Callable[[random.Random], Question]] = {}


def problem(name: str, proof: str, unit: str = "") -> Callable:
    """Puts a function that returns (text, answer, working, {what a wrong number means: that number}) into PROBLEMS."""

    def listed(make: Callable) -> Callable:
        def question(rng: random.Random) -> Question:
            while not (made := make(rng)):  # None: these numbers make no good problem
                pass
            text, answer, why, slips = made
            near = 0.02 * abs(answer)  # a slip that happens to give about the right number is none
            wrong = tuple((value, meaning) for meaning, value in slips.items() if abs(value - answer) > near)
            return Question("whiteboard", "numeric", text, proof, whys=(why,), answer=answer, unit=unit, wrong=wrong)

        PROBLEMS[name] = question
        return question

    return listed


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- The problems: each a function from a random generator to a question ----------------------------------------------


@problem("LoRA parameters", "02_lora_math#count")
def adapter(rng):
    wide, tall, r = rng.choice([1024, 2048, 4096, 8192]), rng.choice([1024, 4096, 11008, 14336]), rng.choice([4, 8, 32])
    text = f"How many numbers does LoRA train for a layer from {wide:,} to {tall:,} with r = {r}?"
    why = f"r (in + out) = {r} x ({wide:,} + {tall:,}) = {r * (wide + tall):,}."
    slips = {
        "That is A alone: B has r times the outputs.": r * wide,
        "That is in times out times r; A and B have r (in + out).": r * wide * tall,
    }
    return text, r * (wide + tall), why, slips


@problem("grouped-query attention", "02_lora_math#count")
def grouped_query(rng):
    heads, kv, layers, r = (
        rng.choice([16, 32, 64]),
        rng.choice([4, 8]),
        rng.choice([16, 28, 32, 80]),
        rng.choice([8, 16]),
    )
    width, narrow = heads * 128, kv * 128
    answer = layers * r * ((width + width) + (width + narrow))
    text = (
        f"A model is {width:,} wide and has {layers} layers, {heads} query heads and {kv} key-value heads of 128. "
        f"How many parameters has an adapter with r = {r} on q_proj and v_proj?"
    )
    why = f"{layers} x {r} x (({width:,} + {width:,}) + ({width:,} + {narrow:,})) = {answer:,}."
    slips = {
        f"v_proj is not square: it maps {width:,} to {narrow:,}.": layers * r * 4 * width,
        "That is one layer.": answer / layers,
    }
    return text, answer, why, slips


@problem("FLOPs of a LoRA step", "02_lora_math#speed")
def step_flops(rng):
    n, r = rng.choice([1024, 2048, 4096, 8192]), rng.choice([8, 16, 64, 256])
    answer = (2 * n**2 + 6 * n * r) / (3 * n**2)
    text = (
        f"What share of full fine-tuning's FLOPs does a LoRA step of a square layer of width {n:,} need with r = {r}?"
    )
    why = f"(2 n^2 + 6 n r) / 3 n^2 = (2 x {n:,}^2 + 6 x {n:,} x {r}) / (3 x {n:,}^2) = {answer:.3f}."
    slips = {
        "That is the share of trained parameters; the frozen weight is still multiplied, forward and backward.": 2
        * r
        / n,
        "Two thirds is the limit: the adapter's own six products are missing.": 2 / 3,
    }
    return text, answer, why, slips


@problem("training states", "02_lora_math#count", "GB")
def training_states(rng):
    billions, millions, lora = (
        rng.choice([1.24, 7.25, 8.03, 13.02, 70.55]),
        rng.choice([10, 40, 80, 200]),
        rng.random() < 0.6,
    )
    if not lora:
        text = f"Full fine-tuning of {billions} billion parameters, mixed precision with Adam: how many GB of states?"
        why = f"2 + 2 + 4 + 8 = 16 bytes each: 16 x {billions} = {16 * billions:.1f} GB, before activations."
        slips = {
            "That is the weights alone.": 2 * billions,
            "The fp32 master copy is missing.": 12 * billions,
            "The two moments are missing.": 8 * billions,
        }
        return text, 16 * billions, why, slips
    answer = 2 * billions + 16 * millions / 1000
    text = (
        f"LoRA with {millions} million parameters on a bf16 base of {billions} billion: how many GB of training states?"
    )
    why = f"The base in bf16, 16 bytes for the adapter: 2 x {billions} + 16 x {millions} / 1000 = {answer:.2f} GB."
    slips = {
        "That is full fine-tuning: a frozen weight has no gradient and no moments.": 16 * billions,
        "The base is frozen, but it must be in memory.": 16 * millions / 1000,
        "That is the weights; the adapter's gradient and moments are missing.": 2 * billions + 2 * millions / 1000,
    }
    return text, answer, why, slips


@problem("bits a weight", "03_qlora_memory#parity", "bits")
def bits_a_weight(rng):
    block, double = rng.choice([32, 64, 128]), rng.random() < 0.5  # at 256 a slip is within 1 %
    single = 4 + 32 / block
    if not double:
        text = f"NF4 in blocks of {block} with one fp32 constant each: how many bits a weight?"
        why = f"4 + 32 / {block} = {single}."
        slips = {"The constants are missing.": 4.0, "That has one constant of 8 bits.": 4 + 8 / block}
        return text, single, why, slips
    answer = 4 + 8 / block + 32 / (block * 256)
    text = (
        f"NF4 in blocks of {block}, the constants double-quantized (8 bits, 256 of them under one fp32): bits a weight?"
    )
    why = f"4 + 8 / {block} + 32 / ({block} x 256) = {answer:.4f}."
    slips = {"That is without double quantization.": single, "The constants are missing.": 4.0}
    return text, answer, why, slips


@problem("quantized weights", "03_qlora_memory#cards", "GB")
def quantized_weights(rng):
    vocabulary, width, linear = rng.choice([(32_000, 4096, 6.48), (128_256, 4096, 6.98), (152_064, 3584, 6.53)])
    linear = round(linear * rng.uniform(0.8, 1.2), 2)
    tables = 2 * vocabulary * width / 1e9
    answer = linear * 4.127 / 8 + 2 * tables
    text = (
        f"{linear} billion weights in linear layers are stored in NF4 with double quantization (4.127 bits); embedding "
        f"and head, {vocabulary:,} x {width:,} each, stay in bf16. How many GB?"
    )
    why = (
        f"{linear} x 4.127 / 8 = {linear * 4.127 / 8:.2f}; "
        f"2 x {vocabulary:,} x {width:,} x 2 / 10^9 = {2 * tables:.2f}; "
        f"{linear * 4.127 / 8:.2f} + {2 * tables:.2f} = {answer:.2f} GB."
    )
    slips = {
        "Embedding and head are not quantized.": (linear + tables) * 4.127 / 8,
        "Embedding and head are missing.": linear * 4.127 / 8,
        "They are two tables.": linear * 4.127 / 8 + tables,
    }
    return text, answer, why, slips


@problem("reward model loss", "04_rlhf_vs_dpo#reward")
def reward_model(rng):
    chosen, rejected = round(rng.uniform(-1, 2), 1), round(rng.uniform(-1, 2), 1)
    gap = chosen - rejected
    answer = -math.log(_sigmoid(gap))
    text = f"A reward model gives the chosen answer {chosen}, the rejected one {rejected}. What is its loss, in nats?"
    why = f"-ln sigmoid({chosen} - ({rejected})) = -ln sigmoid({gap:.1f}) = {answer:.4g}."
    slips = {
        "The wrong way round: it is chosen minus rejected.": -math.log(_sigmoid(-gap)),
        "That is the chance that the chosen one wins; the loss is minus its logarithm.": _sigmoid(gap),
    }
    return text, answer, why, slips


@problem("DPO loss", "04_rlhf_vs_dpo#parity")
def preference(rng):
    ref_w, ref_l, beta = -rng.randint(8, 30), -rng.randint(8, 30), rng.choice([0.05, 0.1, 0.5])
    pi_w, pi_l = ref_w + rng.randint(-4, 4), ref_l + rng.randint(-4, 4)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    answer = -math.log(_sigmoid(margin))
    text = (
        f"Log-probabilities of the chosen and the rejected answer: policy {pi_w} and {pi_l}, reference {ref_w} and "
        f"{ref_l}. What is DPO's loss with beta = {beta}, in nats?"
    )
    why = (
        f"{beta} x (({pi_w} - {ref_w}) - ({pi_l} - {ref_l})) = {margin:.2f}; -ln sigmoid({margin:.2f}) = {answer:.4g}."
    )
    slips = {
        "The reference is missing.": -math.log(_sigmoid(beta * (pi_w - pi_l))),
        "beta is missing.": -math.log(_sigmoid(margin / beta)),
        "The sign: a margin in favour of the chosen answer lowers the loss.": -math.log(_sigmoid(-margin)),
    }
    return text, answer, why.replace("- -", "+ "), slips


@problem("ORPO loss", "06_orpo_kto_spin#odds")
def odds_ratio(rng):
    p_w, p_l = rng.choice([0.5, 0.6, 0.75, 0.8, 0.9]), rng.choice([0.1, 0.2, 0.25, 0.4])
    ratio = p_w / (1 - p_w) / (p_l / (1 - p_l))
    answer = -math.log(p_w) + 0.1 * math.log(1 + 1 / ratio)
    text = f"Probability per token: chosen {p_w}, rejected {p_l}. What is ORPO's loss with lambda = 0.1, in nats?"
    why = (
        f"Odds ratio ({p_w} / {1 - p_w:.2g}) / ({p_l} / {1 - p_l:.2g}) = {ratio:.3f}; "
        f"-ln {p_w} + 0.1 x ln(1 + 1 / {ratio:.3f}) = {answer:.4f}."
    )
    slips = {
        "lambda is missing.": -math.log(p_w) + math.log(1 + 1 / ratio),
        "The NLL of the chosen answer is missing.": 0.1 * math.log(1 + 1 / ratio),
        "Probabilities taken for odds.": -math.log(p_w) + 0.1 * math.log(1 + p_l / p_w),
    }
    return text, answer, why, slips


@problem("KTO loss", "06_orpo_kto_spin#kto-hand")
def thumb(rng):
    ratio, up, z0 = rng.choice([2, 3, 4, 9]), rng.random() < 0.5, rng.choice([0.0, 0.5, 1.0])
    gap = math.log(ratio) - z0
    answer = 1 - _sigmoid(gap if up else -gap)
    text = (
        f"The policy finds an answer {ratio} times as likely as the reference does; z0 = {z0}, beta = 1. What is KTO's "
        f"loss of it with a thumbs-{'up' if up else 'down'}?"
    )
    sign = "" if up else "-"
    why = f"1 - sigmoid({sign}(ln {ratio} - {z0})) = 1 - sigmoid({gap if up else -gap:.3f}) = {answer:.3f}."
    slips = {
        "That is the loss of the opposite label.": 1 - answer,
        "z0 is missing.": 1 - _sigmoid(math.log(ratio) if up else -math.log(ratio)),
        "The reward is the logarithm of the ratio.": 1 - _sigmoid(ratio - z0 if up else z0 - ratio),
    }
    return text, answer, why, slips


@problem("GAE", "04_rlhf_vs_dpo#value-table")
def generalised_advantage(rng):
    rewards, values = ([round(rng.uniform(0, 1), 1) for _ in range(2)] for _ in range(2))
    lam = rng.choice([0.5, 0.9])
    last = rewards[1] - values[1]
    first = rewards[0] + values[1] - values[0]
    answer = first + lam * last
    if abs(answer) < 0.05 or abs(lam * last) < 0.05:  # nothing to divide an error by, or nothing to learn
        return None
    text = (
        f"Two tokens with rewards {rewards[0]} and {rewards[1]}, values {values[0]} and {values[1]}; gamma = 1, "
        f"lambda = {lam}. What is the advantage of the first one?"
    )
    why = (
        f"From the back: {rewards[1]} - {values[1]} = {last:.1f}; "
        f"{rewards[0]} + {values[1]} - {values[0]} = {first:.1f}; {first:.1f} + {lam} x ({last:.1f}) = {answer:.4g}."
    )
    slips = {
        "That is the surprise of the first token alone.": first,
        "lambda is missing.": first + last,
        "The next token's value is missing.": rewards[0] - values[0] + lam * last,
    }
    return text, answer, why, slips


@problem("RLOO", "04_rlhf_vs_dpo#baseline")
def group_baseline(rng):
    rewards = [rng.randint(0, 9) for _ in range(4)]
    mean = sum(rewards) / 4
    if rewards[0] == mean:
        return None
    answer = rewards[0] - sum(rewards[1:]) / 3
    given = ", ".join(map(str, rewards))
    text = f"Four answers to one prompt have the rewards {given}. What is RLOO's advantage of the first?"
    why = f"Its reward minus the mean of the others: {rewards[0]} - {sum(rewards[1:])} / 3 = {answer:.3f}."
    slips = {"The mean of all four contains the answer itself.": rewards[0] - mean, "The sign.": -answer}
    return text, answer, why, slips


@problem("PPO's clip", "04_rlhf_vs_dpo#clip")
def clipped_loss(rng):
    ratio, advantage = rng.choice([0.4, 0.6, 0.9, 1.1, 1.4, 1.7]), rng.choice([-2, -1, -0.5, 0.5, 1, 2])
    clipped = min(max(ratio, 0.8), 1.2)
    answer = -min(ratio * advantage, clipped * advantage)
    text = (
        f"A token has the ratio {ratio} and the advantage {advantage}. What is its PPO loss with a clip range of 0.2?"
    )
    why = f"-min({ratio} x ({advantage}), {clipped} x ({advantage})) = {answer:.3g}."
    slips = {
        "The minimum takes the other one: the clip binds only where the token has gone far enough already.": -max(
            ratio * advantage, clipped * advantage
        ),
        "A loss is minus the objective.": -answer,
    }
    return text, answer, why, slips


@problem("interval of a rate", "05_practical_pipeline#interval", "points")
def rate_interval(rng):
    n, share = rng.choice([50, 100, 150, 400, 1000]), rng.choice([0.5, 0.6, 0.8, 0.9])
    answer = 196 * math.sqrt(share * (1 - share) / n)
    text = (
        f"{100 * share:.0f} % of {n:,} answers are right. How many points to either side is the 95 % interval of that "
        "rate (normal approximation)?"
    )
    why = f"100 x 1.96 x sqrt({share} x {1 - share:.1f} / {n:,}) = {answer:.4g} points."
    slips = {
        "That is one standard error.": answer / 1.96,
        "That is the whole width.": 2 * answer,
        "That is a share; a point is a hundredth.": answer / 100,
        "The root is missing.": 196 * share * (1 - share) / n,
    }
    return text, answer, why, slips


@problem("training hours", "03_qlora_memory#hours", "hours")
def hours(rng):
    rows, tokens, epochs = rng.choice([2000, 10_000, 50_000]), rng.choice([200, 500, 1500]), rng.choice([2, 3, 4])
    speed = rng.choice([900, 2415, 3726, 12_000])
    answer = rows * tokens * epochs / speed / 3600
    text = (
        f"{rows:,} rows of {tokens:,} tokens, {epochs} epochs, {speed:,} tokens a second: how many hours of training?"
    )
    why = f"{rows:,} x {tokens:,} x {epochs} / {speed:,} / 3600 = {answer:.4g} hours."
    slips = {"That is one epoch.": answer / epochs, "That is minutes.": 60 * answer, "That is seconds.": 3600 * answer}
    return text, answer, why, slips


@problem("break-even", "01_why_fine_tune#break-even", "calls")
def break_even(rng):
    cost, saved, price = rng.choice([3, 6, 20, 50]), rng.choice([300, 900, 2000]), rng.choice([0.1, 0.2, 0.5, 2.0])
    answer = cost / (saved * price / 1e6)
    text = (
        f"Tuning costs {cost}. It saves {saved:,} prompt tokens a call, at {price} a million. After how many calls has "
        "it paid for itself?"
    )
    each = f"{saved * price / 1e6:.6f}".rstrip("0")
    why = f"A call saves {saved:,} x {price} / 1,000,000 = {each}; {cost} / {each} = {answer:,.0f} calls."
    slips = {"The price is for a million tokens.": cost / (saved * price), "That is tokens, not calls.": answer * saved}
    return text, answer, why, slips


@problem("sharded states", "02_lora_math#count", "GB")
def sharded_states(rng):
    billions, cards, stage = rng.choice([7.25, 8.03, 13.02, 70.55]), rng.choice([2, 4, 8, 16]), rng.choice([1, 2, 3])
    kept, divided = {1: (4, 12), 2: (2, 14), 3: (0, 16)}[stage]
    answer = (kept + divided / cards) * billions
    text = (
        f"Full fine-tuning of {billions} billion parameters with ZeRO-{stage} on {cards} cards: GB of states on each?"
    )
    why = f"{kept} bytes stay, {divided} are divided: ({kept} + {divided} / {cards}) x {billions} = {answer:.1f} GB."
    slips = {"Nothing is divided there: that is plain data parallel.": 16 * billions}
    slips["Everything is divided there: that is ZeRO-3."] = 16 * billions / cards
    return text, answer, why, slips


@problem("F1", "05_practical_pipeline#errors")
def harmonic(rng):
    right, invented, missed = rng.randint(20, 90), rng.randint(1, 30), rng.randint(1, 30)
    precision, recall = right / (right + invented), right / (right + missed)
    answer = 2 * precision * recall / (precision + recall)
    text = (
        f"Of an optional field {right} values are found, {invented} are invented, {missed} are missed. What is its F1?"
    )
    why = (
        f"P = {right} / {right + invented} = {precision:.3f}, R = {right} / {right + missed} = {recall:.3f}; "
        f"2 P R / (P + R) = 2 x {precision:.3f} x {recall:.3f} / ({precision:.3f} + {recall:.3f}) = {answer:.3f}."
    )
    slips = {
        "That is precision.": precision,
        "That is recall.": recall,
        "That counts each error in full; F1 counts it half.": right / (right + invented + missed),
    }
    return text, answer, why, slips


# --- In the notebook --------------------------------------------------------------------------------------------------


def board(seed: int | None = None, file: Path | None = None) -> None:
    """Shows problems with fresh numbers, of all kinds or of one; where there is no kernel, one of each, worked out.

    Each checked answer is stored under the problem's name.
    """
    rng, numbers, place = random.Random(seed), itertools.count(1), ipywidgets.VBox()
    kind = ipywidgets.Dropdown(options=[("any problem", ""), *((name, name) for name in PROBLEMS)])
    kind.description = "problem"

    def new(_=None) -> None:
        name = kind.value or rng.choice(list(PROBLEMS))

        def store(answer: str, right: bool) -> None:
            progress.record(KIND, name, float(right), {"answer": answer}, file=file)

        place.children = [quiz.controls(PROBLEMS[name](rng), store, next(numbers))]

    kind.observe(new, "value")
    again = ipywidgets.Button(description="New numbers")
    again.on_click(new)
    new()
    live = quiz.on_page(ipywidgets.HBox([kind, again]), place)
    shown = (make(random.Random(0)) for make in PROBLEMS.values())
    folded = "".join(page.fold(page.prose(question.text), page.prose(question.whys[0])) for question in shown)
    display(page.view(live, f"A whiteboard with {len(PROBLEMS)} kinds of problems", folded), raw=True)
