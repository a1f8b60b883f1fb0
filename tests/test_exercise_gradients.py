"""Exercises that write a loss or a layer: beside the value the gradients count, at edges too."""

from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl.experimental.orpo.orpo_trainer import log1mexp

import ftlab.exercises as ex
from ftlab.exercises import check, differences, gradients, nb02, nb04_preferences, nb06, nb07, nb09
from ftlab.exercises.differences import first_difference
from ftlab.scratch.lora import LoRALinear

ALL = ex.exercises()


@pytest.fixture(autouse=True)
def _own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLAB_PROGRESS", str(tmp_path / "progress.sqlite"))


def shown_well(feedback) -> str:
    """The text of a block, without a traceback and short."""
    text = repr(feedback)
    assert "Traceback" not in text and len(text) < 2000
    return text


LEARN = {  # exercises that write a loss or a layer; the inputs by which gradients are compared
    "02.1": ["x", "lora_A", "lora_B"],
    "04.1": ["logps"],
    "04.3": ["logps"],
    "04.5": ["logps"],
    "04.6": ["logits"],
    "04.7": ["policy_chosen_logps", "policy_rejected_logps"],
    "06.1": ["policy_chosen_mean_logps", "policy_rejected_mean_logps"],
    "06.2": ["policy_logps"],
    "07.2": ["logps"],
    "07.4": ["student_logits"],
    "09.2": ["token_losses"],
}
TENSORS = {
    "02.2": "B1",
    "03.1": "block",
    "04.2": "rewards",
    "04.4": "rewards",
}  # others that take tensors


def layer_like(forward):
    """MyLoRA of the solution with another forward(layer, x)."""

    class MyLoRA(LoRALinear):
        def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0):
            super().__init__(base_layer, r, lora_alpha, lora_dropout)
            self.r, self.lora_alpha = r, lora_alpha

    MyLoRA.forward = forward
    return MyLoRA


def right_forward(layer, x):
    low = layer.lora_dropout(x) @ layer.lora_A.T @ layer.lora_B.T
    return layer.base_layer(x) + layer.lora_alpha / layer.r * low


def like(q, change):
    """The right answer with change(right function, *inputs) in the place of its value."""
    if q == "02.1":
        return layer_like(lambda layer, x: change(partial(right_forward, layer), x))
    return lambda *inputs: change(ALL[q].solution, *inputs)


def under_no_grad(right, *inputs):
    with torch.no_grad():
        return right(*inputs)


def as_a_constant(right, *inputs):
    return torch.tensor(right(*inputs).tolist())


def half_detached(right, *inputs):
    value = right(*inputs)
    return 0.3 * value + 0.7 * value.detach()


def minus_the_gradient(right, *inputs):
    value = right(*inputs)
    return 2 * value.detach() - value


def scaled_in_place_and_back(right, *inputs):
    """The usual way: one works in a tensor that is the caller's."""
    inputs[0].mul_(3)
    return right(inputs[0] / 3, *inputs[1:])


VALUE_ONLY = [half_detached, minus_the_gradient]
NO_GRADIENT = [lambda right, *inputs: right(*inputs).detach(), under_no_grad, as_a_constant]


@pytest.mark.parametrize("change", NO_GRADIENT, ids=["detach", "no_grad", "tensor"])
@pytest.mark.parametrize("q", LEARN)
def test_a_loss_or_a_layer_without_a_gradient_is_not_right_and_named(q, change):
    feedback = check(q, like(q, change))
    words = next(iter(nb02.NO_GRADIENT)) if q == "02.1" else gradients.DETACHED
    assert not feedback.right and words in shown_well(feedback), feedback


@pytest.mark.parametrize("change", VALUE_ONLY)
@pytest.mark.parametrize("q", LEARN)
def test_a_loss_or_a_layer_right_in_value_only_is_not_right_and_named(q, change):
    feedback = check(q, like(q, change))
    named = [f"{gradients.WRONG_PATH} {name}" for name in LEARN[q]] + list(nb02.NO_WAY_BACK) * (q == "02.1")
    assert not feedback.right and any(words in shown_well(feedback) for words in named), feedback


@pytest.mark.parametrize(("q", "name"), [(q, name) for q, names in LEARN.items() if len(names) > 1 for name in names])
def test_one_input_that_gets_no_gradient_is_named(q, name):
    def cut(right, *inputs):
        at = LEARN[q].index(name)
        return right(*(x.detach() if i == at else x for i, x in enumerate(inputs)))

    def cut_layer(layer, x):
        parts = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
        parts[name] = parts[name].detach()
        low = layer.lora_dropout(parts["x"]) @ parts["lora_A"].T @ parts["lora_B"].T
        return layer.base_layer(parts["x"]) + layer.lora_alpha / layer.r * low

    feedback = check(q, layer_like(cut_layer) if q == "02.1" else like(q, cut))
    named = next(iter(nb02.NO_WAY_BACK)) if (q, name) == ("02.1", "x") else f"{gradients.NO_PATH} {name}"
    assert not feedback.right and named in shown_well(feedback), feedback


@pytest.mark.parametrize("q", [*LEARN, *TENSORS])
def test_an_input_that_is_changed_in_place_is_named(q):
    name = TENSORS.get(q) or LEARN[q][0]
    if q == "02.2":

        def change(A1, B1, scaling1, *rest):
            B1 *= scaling1
            return ALL[q].solution(A1, B1, 1.0, *rest)
    else:
        change = like(q, scaled_in_place_and_back)
    feedback = check(q, change)
    assert not feedback.right and f"{name} {gradients.IN_PLACE}" in shown_well(feedback), feedback


def at_zero_input(right, x):
    length = x.norm()
    return right(x / length * length)


def log_of_sigmoid_in_one_side(right, pi_w, pi_l, ref_w, ref_l, beta):
    """Right in value everywhere, and its gradient is nan where sigmoid is 0."""
    gap = beta * (pi_w - pi_l - ref_w + ref_l)
    return -torch.where(gap > -30, gap.sigmoid().log(), gap)


def mean_times_length_of_logps(right, logps, rewards, baseline, mask):
    lengths = mask.sum(1, keepdim=True)
    return right(logps / lengths * lengths, rewards, baseline, mask)


def answers_means_by_their_lengths(right, logps, old_logps, advantages, mask, clip_eps):
    rows = zip(logps, old_logps, advantages, mask, strict=True)
    means = [right(*(x[None] for x in row), clip_eps) for row in rows]
    return (torch.stack(means) * mask.sum(1)).sum() / mask.sum()


def one_answer_at_a_time(right, *inputs):
    *inputs, mask, clip_eps, beta = inputs
    tokens = mask.sum(1)
    means = [right(*(x[i : i + 1] for x in (*inputs, mask)), clip_eps, beta) for i in range(len(mask))]
    return (torch.stack(means) * tokens / tokens).mean()


def nan_in_the_side_not_taken(right, logps, *rest):
    """Right in value everywhere, and its gradient is nan for an empty answer."""
    mask = rest[3]
    n = mask.sum(1, keepdim=True)
    return right(torch.where(n > 0, logps / n * n, logps), *rest)


def mean_times_length(right, logits, input_ids, mask):
    n = mask[:, 1:].sum(1)
    return right(logits, input_ids, mask) / n * n


def log_1_minus_p(right, chosen, rejected, lam):
    odds = [x - torch.log(1 - x.exp()) for x in (chosen, rejected)]
    return -chosen - lam * logsigmoid(odds[0] - odds[1])


def log1p_of_minus_p(right, chosen, rejected, lam):
    odds = [x - torch.log1p(-x.exp()) for x in (chosen, rejected)]
    return -chosen - lam * logsigmoid(odds[0] - odds[1])


def trls_log1mexp(right, chosen, rejected, lam):
    """TRL's: right in value everywhere, and its gradient is nan where exp(x) is rounded to 1."""
    odds = [x - log1mexp(x) for x in (chosen, rejected)]
    return -chosen - lam * logsigmoid(odds[0] - odds[1])


def exp_by_hand(right, policy_logps, ref_logps, desirable, z0, beta):
    distance = beta * (policy_logps - ref_logps - z0)
    return 1 / (1 + torch.exp(torch.where(desirable, distance, -distance)))


def means_times_lengths(right, logps, old_logps, advantages, mask, eps_max):
    n, weight = mask.sum(1), (logps - old_logps).exp().clamp(max=eps_max).detach()
    loss = -weight * advantages[:, None] * logps
    return ((loss * mask).sum(1) / n * n).sum() / mask.sum()


def log_of_softmax(right, student_logits, teacher_logits, mask):
    p, q = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)
    return ((p * (p / q).log()).sum(-1) * mask).sum() / mask.sum()


def mean_of_nothing(right, losses, counts):
    return losses.mean() * len(losses) * len(counts) / sum(counts)


NOT_FINITE = [
    ("02.1", at_zero_input, nb02.ZEROS),
    ("04.1", mean_times_length_of_logps, "an empty answer has the log-prob 0"),
    ("04.3", answers_means_by_their_lengths, ""),
    ("04.5", one_answer_at_a_time, "an empty answer divides 0 by 0"),
    ("04.5", nan_in_the_side_not_taken, gradients.NOT_FINITE),
    ("04.6", mean_times_length, nb04_preferences.EMPTY),
    ("04.7", log_of_sigmoid_in_one_side, ""),
    ("06.1", log_1_minus_p, nb06.NEARLY_1),
    ("06.1", log1p_of_minus_p, nb06.NEARLY_1),
    ("06.1", trls_log1mexp, nb06.NEARLY_1),
    ("06.2", exp_by_hand, nb06.OVERFLOW),
    ("07.2", means_times_lengths, nb07.EMPTY),
    ("07.4", log_of_softmax, nb07.IMPOSSIBLE),
    ("09.2", mean_of_nothing, nb09.EMPTY),
]


@pytest.mark.parametrize(("q", "change", "words"), NOT_FINITE, ids=[f"{q}-{f.__name__}" for q, f, _ in NOT_FINITE])
def test_nan_at_an_edge_is_not_right_and_named(q, change, words):
    for _ in range(5):
        feedback = check(q, like(q, change))
        text = shown_well(feedback)
        assert not feedback.right and ("nan" in text or "inf" in text), feedback
        assert words in text and (words or gradients.NOT_FINITE in text or nb04_preferences.FAR_APART in text)


@pytest.mark.parametrize("q", LEARN)
def test_the_references_are_finite_at_their_edges(q, monkeypatch):
    """Values and gradients that the check holds against a learner's."""
    seen, real = [], differences.outcome

    def noted(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(differences, "outcome", noted)
    for _ in range(5):
        assert check(q, layer_like(right_forward) if q == "02.1" else ALL[q].solution).right
    compared = [found for found in seen if found.gradients]
    assert len(compared) > 100
    for found in compared:
        assert gradients.finite(found.value)
        assert all(gradients.finite(found.gradients[name]) for name in LEARN[q])


def test_a_gradient_that_reaches_a_fixed_input_is_named():
    def right(x, target):
        return (x - target.detach()) ** 2

    draw = lambda rng: (torch.randn(3), torch.randn(3))  # noqa: E731
    compare = partial(first_difference, answer=right, draw=draw, by=["x"], fixed=["target"])
    assert compare(right) is None
    assert "target is fixed" in compare(lambda x, target: (x - target) ** 2).likely


def test_a_backward_pass_that_fails_is_told():
    def spoils_its_own(x):
        y = x.exp()
        value = y + 0
        y.mul_(2)  # the backward pass of exp needs y
        return value

    slip = first_difference(spoils_its_own, lambda x: x.exp(), lambda rng: (torch.randn(3),), by=["x"])
    assert slip.likely == gradients.BACKWARD and "backward" in slip.got


def test_gradients_are_compared_entry_by_entry_not_as_a_sum():
    """The sum of all values has the same gradient, but the values' weights differ."""

    def shuffled(x):
        value = 2 * x
        return value.detach() + (value - value.detach()).flip(0)

    draw = lambda rng: (torch.randn(4),)  # noqa: E731
    assert gradients.WRONG_PATH in first_difference(shuffled, lambda x: 2 * x, draw, by=["x"]).likely
