"""ftlab.scratch.ppo: what padding must not change, REINFORCE written out, the library's own numbers, a run that learns.

Equality with TRL's PPOTrainer on a recorded batch: tests/parity/test_ppo.py.
"""

import copy
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ftlab.scratch import ppo

PAD, EOS = 0, 2
with safe_open(Path(__file__).parent / "golden" / "ppo.safetensors", "pt") as file:  # the models of the recorded update
    CONFIG = json.loads(file.metadata()["about"])["model_config"]
TEXTS = [  # prompt, answer
    ([1, 5, 9, 4], [7, 3, 20, 11, 6, EOS]),  # the longest answer ended
    ([1, 8], [13, 4, 9, 9, 10, 5]),  # as long, cut off
    ([1, 6, 6, 17, 21], [EOS]),  # only the end of turn
    ([1, 12, 3], [14, 22, EOS]),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def llama(seed: int, labels: int = 0, **more):
    torch.manual_seed(seed)
    if labels:
        return LlamaForSequenceClassification(LlamaConfig(**CONFIG | more, num_labels=labels)).eval()
    return LlamaForCausalLM(LlamaConfig(**CONFIG | more)).eval()


@pytest.fixture
def models():
    return SimpleNamespace(policy=llama(0), ref_model=llama(1), reward_model=llama(2, 1), value_model=llama(3, 1))


def table(texts, layout="left", more: int = 0) -> list[torch.Tensor]:
    """input_ids, attention_mask, completion_mask, `more` columns wider than they have to be.

    Padding stands before the prompt ("left"), between prompt and answer ("middle"), or behind the answer ("right").
    """
    rows, width = [], max(len(prompt) for prompt, _ in texts)
    whole = width + max(len(answer) for _, answer in texts)
    for prompt, answer in texts:
        pad = [(PAD, 0, 0)] * (0 if layout == "right" else width - len(prompt))
        words = [(token, 1, 0) for token in prompt]
        row = (words + pad if layout == "middle" else pad + words) + [(token, 1, 1) for token in answer]
        rows.append(row + [(PAD, 0, 0)] * (whole + more - len(row)))
    return list(torch.tensor(rows).unbind(2))


def roll(models, text, **settings) -> ppo.Rollout:
    roles = (models.policy, models.ref_model, models.reward_model, models.value_model)
    return ppo.rollout(*roles, *text, eos_token_id=EOS, **settings)


def numbers(batch: ppo.Rollout) -> dict[str, torch.Tensor]:
    """What the rollout says of actions and states, one after the other, wherever they stand in the table."""
    actions = {name: getattr(batch, name)[batch.mask] for name in ("old_logps", "ref_logps", "advantages")}
    states = {name: getattr(batch, name)[batch.states] for name in ("values", "rewards", "returns")}
    return {**actions, **states, "scores": batch.scores}


def optimizer(models, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD([*models.policy.parameters(), *models.value_model.parameters()], **settings)


def weights(models) -> list[torch.Tensor]:
    return [p.detach().clone() for m in (models.policy, models.value_model) for p in m.parameters()]


# --- Padding ----------------------------------------------------------------------------------------------------------


def trained(models, text) -> list[torch.Tensor]:
    """The weights after two epochs of two minibatches."""
    mine = copy.deepcopy(models)
    torch.manual_seed(0)
    ppo.update(mine.policy, mine.value_model, optimizer(mine, lr=0.1), roll(mine, text), epochs=2, minibatches=2)
    return weights(mine)


@pytest.mark.parametrize(("layout", "more"), [("left", 3), ("right", 0), ("right", 2)])
def test_where_the_padding_stands_changes_nothing(models, layout, more):
    text = table(TEXTS, layout, more)
    wanted, got = numbers(roll(models, table(TEXTS))), numbers(roll(models, text))
    for name in wanted:
        assert_close(got[name], wanted[name])
    for a, b in zip(trained(models, text), trained(models, table(TEXTS)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("seen", [False, True])
def test_what_stands_in_the_padding_changes_nothing(models, seen):
    """Nor does what stands behind the answer and is no padding, as a next turn would."""
    clean = table(TEXTS, more=2)
    behind = clean[2].cumsum(1) == clean[2].sum(1, keepdim=True)
    ids = torch.where(clean[1] == 1, clean[0], torch.randint(3, 24, clean[0].shape))
    dirty = [ids, clean[1] | behind.long() if seen else clean[1], clean[2]]
    assert not torch.equal(clean[0], ids)
    wanted, got = numbers(roll(models, clean)), numbers(roll(models, dirty))
    for name in wanted:
        assert_close(got[name], wanted[name])
    for a, b in zip(trained(models, dirty), trained(models, clean), strict=True):
        assert_close(a, b)


def test_an_answer_alone_has_the_numbers_it_has_among_others(models):
    """All but the advantages, which are whitened over the batch."""
    batch = roll(models, table(TEXTS))
    for i, text in enumerate(TEXTS[:2]):
        together, alone = numbers(batch.rows(torch.tensor([i]))), numbers(roll(models, table([text])))
        for name in together.keys() - {"advantages"}:
            assert_close(alone[name], together[name])


def test_an_answer_that_ended_has_one_state_more_than_tokens(models):
    batch = roll(models, table(TEXTS))
    assert batch.mask.sum(1).tolist() == [6, 6, 1, 3]
    assert batch.states.sum(1).tolist() == [7, 6, 2, 4]
    for name in ("old_logps", "ref_logps", "advantages"):
        assert not getattr(batch, name)[~batch.mask].any()
    for name in ("values", "rewards", "returns"):
        assert not getattr(batch, name)[~batch.states].any()


# --- What is learned from ---------------------------------------------------------------------------------------------


def test_scores_are_the_reward_models_own(models):
    """The library's pooling, at the last token that is not padding; so also with LoRA on the model."""
    text = table(TEXTS, more=1)
    inputs = {"input_ids": text[0], "attention_mask": text[1]}
    with torch.no_grad():
        wanted = models.reward_model(**inputs).logits.squeeze(1)
    assert_close(roll(models, text).scores, wanted)
    models.reward_model = get_peft_model(models.reward_model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    with torch.no_grad():
        changed = models.reward_model(**inputs).logits.squeeze(1)
    assert_close(roll(models, text).scores, changed)
    assert not torch.isclose(changed, wanted, rtol=1e-3).any()


def test_rewards_are_the_score_at_the_end_and_minus_beta_times_the_kl_on_the_way(models):
    batch = roll(models, table(TEXTS), beta=0.3)
    kl = (batch.old_logps - batch.ref_logps).sum(1)
    assert_close(batch.rewards.sum(1), batch.scores - 0.3 * kl)
    for i, (prompt, answer) in enumerate(TEXTS):
        row = batch.rewards[i, 4:][: len(answer) + 1]  # from the state before the first token
        first = sum(per_token(models.policy, prompt, answer)[:1]) - sum(per_token(models.ref_model, prompt, answer)[:1])
        ended = answer[-1] == EOS
        assert row[0].item() == pytest.approx(-0.3 * first, rel=1e-4)
        assert ended == batch.states[i, 4 + len(answer)].item()
        if ended:
            assert row[len(answer)] == batch.scores[i]  # behind the end of turn, alone


def test_without_a_kl_the_score_is_the_only_reward(models):
    batch = roll(models, table(TEXTS), beta=0.0)
    assert torch.equal(batch.rewards.sum(1), batch.scores)
    assert (batch.rewards != 0).sum(1).tolist() == [1, 1, 1, 1]
    models.ref_model = llama(9)
    again = roll(models, table(TEXTS), beta=0.0)
    assert torch.equal(again.rewards, batch.rewards) and torch.equal(again.advantages, batch.advantages)
    assert not torch.allclose(again.ref_logps, batch.ref_logps)


def test_what_comes_later_is_discounted(models):
    """lam=1, so that a return is the discounted sum of the rewards from there on, whatever the value model says."""
    batch = roll(models, table(TEXTS), gamma=0.9, lam=1.0)
    for rewards, returns, states in zip(batch.rewards, batch.returns, batch.states, strict=True):
        to_come = 0.0
        for t in reversed(states.nonzero().squeeze(1).tolist()):
            to_come = rewards[t].item() + 0.9 * to_come
            assert returns[t].item() == pytest.approx(to_come, rel=1e-4, abs=1e-5)


def test_temperature_is_a_policy_of_flatter_logits(models):
    """logits / 0.5 at temperature 1 are the logits of a head of twice the size; reference and update do the same."""
    wanted = roll(models, table(TEXTS), temperature=0.5)
    sharp = copy.deepcopy(models)
    for model in (sharp.policy, sharp.ref_model):
        model.lm_head.weight.data *= 2
    assert_close(numbers(wanted), numbers(roll(sharp, table(TEXTS))))
    stats = ppo.update(models.policy, models.value_model, optimizer(models, lr=0.0), wanted, epochs=1)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6)


def test_with_an_adapter_the_reference_is_the_policy_without_it(models):
    base = models.policy
    models.ref_model = copy.deepcopy(base)
    models.policy = policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    wanted = roll(models, table(TEXTS))

    def ref_model(**inputs):
        with policy.disable_adapter():
            return policy(**inputs)

    models.ref_model = ref_model
    batch = roll(models, table(TEXTS))
    assert_close(numbers(batch), numbers(wanted))
    assert not torch.allclose(wanted.old_logps, wanted.ref_logps)

    held = [p for p in [*policy.parameters(), *models.value_model.parameters()] if p.requires_grad]
    ppo.update(policy, models.value_model, torch.optim.SGD(held, lr=0.1), batch, epochs=1)
    assert_close(roll(models, table(TEXTS)).ref_logps, batch.ref_logps)  # the base model is as it was
    assert not torch.allclose(roll(models, table(TEXTS)).old_logps, batch.old_logps)


# --- The step ---------------------------------------------------------------------------------------------------------


def per_token(model, prompt: list[int], answer: list[int]) -> list[float]:
    """log p of each token of the answer, one forward pass and one softmax each."""
    found = []
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1]
        found.append(math.log(logits.double().softmax(0)[token].item()))
    return found


def test_the_first_step_is_reinforce_with_a_baseline(models):
    """lam=1, so that an advantage is all that is still to come, minus the value; no clipping, one epoch.

    Written out answer by answer, token by token, in float64: sum over all tokens of -A log p and of (V - R)^2 / 2, each
    divided by how many there are. What is to come is the score and the KL of this and the later tokens.
    """
    for model in vars(models).values():
        model.double()
    batch = roll(models, table(TEXTS), beta=0.3, gamma=1.0, lam=1.0)
    start = copy.deepcopy(models)
    steps = optimizer(models, lr=1.0)
    stats = ppo.update(
        models.policy, models.value_model, steps, batch, epochs=1, clip_eps=math.inf, vf_coef=1.0, max_grad_norm=1e9
    )

    advantages, log_probs, errors = [], [], []
    for prompt, answer in TEXTS:
        ids = torch.tensor([prompt + answer])
        ended = answer[-1] == EOS
        reading = start.value_model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        values = (reading @ start.value_model.score.weight[0])[len(prompt) - 1 :][: len(answer) + ended]
        score = start.reward_model(input_ids=ids).logits.item()
        mine, theirs = per_token(start.policy, prompt, answer), per_token(start.ref_model, prompt, answer)
        penalties = [0.3 * (a - b) for a, b in zip(mine, theirs, strict=True)]
        to_come = [score - sum(penalties[i:]) for i in range(len(answer) + ended)]
        errors += [(value - target) ** 2 / 2 for value, target in zip(values, to_come, strict=True)]
        advantages += [to_come[i] - values[i].item() for i in range(len(answer))]
        logits = start.policy(input_ids=ids).logits[0]
        log_probs += [logits[len(prompt) + i - 1].log_softmax(0)[token] for i, token in enumerate(answer)]
    mean, spread = statistics.mean(advantages), math.sqrt(statistics.variance(advantages) + 1e-8)
    policy_loss = sum(-(a - mean) / spread * p for a, p in zip(advantages, log_probs, strict=True)) / len(advantages)
    value_loss = sum(errors) / len(errors)
    (policy_loss + value_loss).backward()
    assert stats["value_loss"] == pytest.approx(value_loss.item())
    for model, before in ((models.policy, start.policy), (models.value_model, start.value_model)):
        for now, was in zip(model.parameters(), before.parameters(), strict=True):
            assert was.grad.any()
            assert_close(was.detach() - now.detach(), was.grad)


def test_every_epoch_takes_every_answer_once(models):
    """Nothing moves at rate 0; so however they are shuffled, the mean of all steps is that of the answers alone."""
    batch, steps = roll(models, table(TEXTS)), optimizer(models, lr=0.0)
    alone = [
        ppo.update(models.policy, models.value_model, steps, batch.rows(torch.tensor([i])), epochs=1) for i in range(4)
    ]
    stats = ppo.update(models.policy, models.value_model, steps, batch, epochs=3, minibatches=4)
    for name in ("policy_loss", "value_loss", "grad_norm"):
        assert stats[name] == pytest.approx(statistics.mean(one[name] for one in alone), rel=1e-5)
    assert len({round(one["value_loss"], 5) for one in alone}) == 4


def test_the_gradient_of_both_models_together_is_clipped(models):
    batch, before = roll(models, table(TEXTS)), weights(models)
    stats = ppo.update(
        models.policy, models.value_model, optimizer(models, lr=1.0), batch, epochs=1, max_grad_norm=0.25
    )
    step = torch.cat([(a - b).flatten() for a, b in zip(weights(models), before, strict=True)])
    assert stats["grad_norm"] > 1 and step.norm().item() == pytest.approx(0.25, rel=1e-4)


def moved(models, **settings) -> tuple[dict[str, float], float, float]:
    """The stats of 20 epochs, and how far the log-probs and the values have moved, in the mean of their positions."""
    mine = copy.deepcopy(models)
    batch = roll(mine, table(TEXTS))
    stats = ppo.update(mine.policy, mine.value_model, optimizer(mine, lr=0.01), batch, epochs=20, **settings)
    now = roll(mine, table(TEXTS))
    logps, values = (getattr(now, name) - getattr(batch, name) for name in ("old_logps", "values"))
    return stats, logps[batch.mask].abs().mean().item(), values[batch.states].abs().mean().item()


def test_the_clip_ranges_hold_policy_and_values_back(models):
    """A narrow range takes gradient away, so that its model moves less; the other model moves as it did."""
    wide = {"clip_eps": math.inf, "value_clip": math.inf, "vf_coef": 1.0, "max_grad_norm": math.inf}
    stats, logps, values = moved(models, **wide)
    assert stats["clip_fraction"] == 0
    narrow, held, same = moved(models, **wide | {"clip_eps": 0.05})
    assert narrow["clip_fraction"] > 0.2 and held < 0.5 * logps and same == pytest.approx(values, rel=1e-3)
    _, same, held = moved(models, **wide | {"value_clip": 0.05})
    assert held < 0.5 * values and same == pytest.approx(logps, rel=1e-3)


def test_what_the_stats_say_of_the_rollout(models):
    """By the sums over each answer, written out."""
    batch = roll(models, table(TEXTS))
    stats = ppo.update(models.policy, models.value_model, optimizer(models, lr=0.0), batch, epochs=1)
    mine = [per_token(models.policy, *text) for text in TEXTS]
    theirs = [per_token(models.ref_model, *text) for text in TEXTS]
    assert stats["kl"] == pytest.approx(
        statistics.mean(sum(a) - sum(b) for a, b in zip(mine, theirs, strict=True)), rel=1e-4
    )
    assert stats["entropy"] == pytest.approx(-statistics.mean(p for answer in mine for p in answer), rel=1e-4)
    assert stats["score"] == pytest.approx(batch.scores.mean().item())
    assert stats["ratio"] == pytest.approx(1, abs=1e-5) and stats["clip_fraction"] == 0


def test_it_learns_what_is_rewarded():
    """A bandit: one token after one prompt, +1 for the lower half of the vocabulary and -1 for the upper one.

    The reward model reads it off the token's embedding, without a layer between. The value model has to learn the mean.
    """
    policy, value_model, reward_model = llama(0), llama(3, 1), llama(2, 1, num_hidden_layers=0)
    sign = torch.where(torch.arange(24) < 12, 1.0, -1.0)
    with torch.no_grad():  # all embeddings of one norm
        reward_model.model.embed_tokens.weight[:] = torch.cat([sign[:, None], torch.ones(24, 15)], 1)
        reward_model.score.weight.zero_()[0, 0] = 1
    models = SimpleNamespace(
        policy=policy, ref_model=copy.deepcopy(policy), reward_model=reward_model, value_model=value_model
    )
    steps = torch.optim.AdamW([*policy.parameters(), *value_model.parameters()], lr=1e-2)
    prompts, log = torch.tensor([[1, 5]]).repeat(32, 1), []
    torch.manual_seed(0)
    for _ in range(10):
        ids = policy.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=1
        )
        completion_mask = torch.tensor([0, 0, 1]).expand_as(ids)
        batch = roll(models, (ids, torch.ones_like(ids), completion_mask), beta=0.01)
        assert_close(batch.scores, sign[ids[:, 2]])
        log.append(ppo.update(policy, value_model, steps, batch, minibatches=2))
    assert log[0]["score"] < 0 and statistics.mean(one["score"] for one in log[-3:]) > 0.7
    assert statistics.mean(one["value_loss"] for one in log[-3:]) < 0.5 * log[0]["value_loss"]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[-1]["kl"] > 0.2


# --- Errors -----------------------------------------------------------------------------------------------------------


def lost_end_of_turn() -> list[torch.Tensor]:
    """The end of turn also pads, and the masks come from input_ids != pad_token_id."""
    ids, attention_mask, completion_mask = table([TEXTS[3], TEXTS[1]])
    ids = ids.where(attention_mask == 1, EOS)
    return [ids, attention_mask * (ids != EOS), completion_mask * (ids != EOS)]


def not_sampled(row: int, column: int | slice) -> list[torch.Tensor]:
    """The table with these columns left out of the answer."""
    text = table(TEXTS)
    text[2][row, column] = 0
    return text


whole = table(TEXTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([whole[0], whole[1][:, :5], whole[2]], r"input_ids \(4, 11\), attention_mask \(4, 5\).*both masks cover both"),
        ([whole[0], whole[1], whole[2][:, 5:]], r"completion_mask \(4, 6\)"),
        ([whole[0][0], whole[1][0], whole[2][0]], r"\(11,\).*\(B, T\)"),
        ([whole[0], whole[1], 2 * whole[2]], "wanted only 0 and 1"),
        (not_sampled(2, slice(None)), r"rows with \[1, 1, 0, 1\] runs of ones.*an empty answer"),
        ([whole[0], whole[1], whole[1]], "nothing, in an answer or right before it"),
        ([whole[0], whole[1] - whole[2], whole[2]], "padding, or nothing, in an answer"),
        (table(TEXTS, "middle"), "right before it.*padded on the right"),
        (not_sampled(1, 7), "runs of ones.*tool output"),
        (lost_end_of_turn(), "end of turn behind an answer.*does the same token pad"),
    ],
)
def test_text_that_does_not_fit(models, text, message):
    with pytest.raises(ValueError, match=message):
        roll(models, text)


def poisoned(model, value: float):
    with torch.no_grad():
        next(iter(model.parameters()))[20] = value
    return model


@pytest.mark.parametrize(
    ("role", "model", "message"),
    [
        ("reward_model", lambda: llama(0, labels=2), "head of 2 labels, wanted 1"),
        ("reward_model", lambda: poisoned(llama(0, 1), math.nan), "scores: got 1 numbers that are not finite"),
        ("value_model", lambda: poisoned(llama(0, 1), math.inf), "values: got [0-9]+ numbers that are not finite"),
        ("ref_model", lambda: poisoned(llama(0), math.nan), "ref_logps: got [0-9]+ numbers that are not finite"),
    ],
)
def test_models_that_do_not_fit(models, role, model, message):
    """Poisoned is token 20, which stands in the first answer alone."""
    setattr(models, role, model())
    with pytest.raises(ValueError, match=message):
        roll(models, table(TEXTS))


@pytest.mark.parametrize("role", ["policy", "value_model"])
def test_dropout_must_be_off(models, role):
    task = "CAUSAL_LM" if role == "policy" else "SEQ_CLS"
    model = get_peft_model(getattr(models, role), LoraConfig(task_type=task, lora_dropout=0.1))
    setattr(models, role, model)
    with pytest.raises(ValueError, match=rf"{role} with active dropout, wanted {role}.eval\(\)"):
        roll(models, table(TEXTS))
    model.eval()
    roll(models, table(TEXTS))
