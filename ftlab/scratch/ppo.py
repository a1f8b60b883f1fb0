"""PPO as the third step of RLHF, in one page: sample answers, score them, take a few small steps, sample again.

    input_ids = policy.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    batch = rollout(policy, ref_model, reward_model, value_model, input_ids, attention_mask, completion_mask, ...)
    stats = update(policy, value_model, optimizer, batch)

Four models: policy and value model learn, the reference and the reward model do not. The value model begins as a copy
of the reward model. Keep them in eval mode: under dropout the ratio is not 1 before the first step.

Where the sources differ: the PPO paper neither whitens advantages nor clips values, and adds an entropy bonus.
InstructGPT takes one epoch a batch and mixes pretraining gradients in (PPO-ptx). TRL pays the score one position behind
the end of turn only if the batch has a column left there; here every answer that ended has that position. TRL does not
clip the norm of the gradient: max_grad_norm=math.inf.

Equal to a recorded update of TRL 1.12's PPOTrainer, up to the weights after it: tests/parity/test_ppo.py.

Sources: PPO, Schulman et al. 2017, arXiv:1707.06347. InstructGPT, Ouyang et al. 2022, arXiv:2203.02155, section 3.5
and appendix C.4. "The N+ Implementation Details of RLHF with PPO", Huang et al. 2024, arXiv:2403.17031.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftlab.scratch.logps import as_bool_mask, check_shapes, masked_mean, per_token_logps
from ftlab.scratch.rl import gae, kl_k1, ppo_loss, token_rewards, value_loss, whiten


@dataclass
class Rollout:
    """B sampled answers and all that `update` learns from: constants, 0 where their mask is 0.

    An action is a sampled token: (B, T-1), entry t is about token t + 1. A state is the text up to token t: (B, T).
    """

    input_ids: Tensor  # (B, T), prompt and answer
    attention_mask: Tensor  # (B, T)
    mask: Tensor  # (B, T-1), bool: the actions
    states: Tensor  # (B, T), bool: the text before each action and, if the answer ended, behind its end of turn
    old_logps: Tensor  # (B, T-1), of the policy that sampled
    ref_logps: Tensor  # (B, T-1)
    values: Tensor  # (B, T)
    scores: Tensor  # (B,), from the reward model
    rewards: Tensor  # (B, T): -beta * KL of each token, and the score at the last state
    advantages: Tensor  # (B, T-1), whitened
    returns: Tensor  # (B, T)
    temperature: float

    def rows(self, index: Tensor) -> "Rollout":
        """The answers of these rows."""
        return Rollout(**{name: x[index] if isinstance(x, Tensor) else x for name, x in vars(self).items()})


@torch.no_grad()
def rollout(policy: nn.Module, ref_model: Callable, reward_model: nn.Module, value_model: nn.Module, input_ids: Tensor,
            attention_mask: Tensor, completion_mask: Tensor, *, eos_token_id: int, beta: float = 0.05,
            gamma: float = 1.0, lam: float = 0.95, temperature: float = 1.0) -> Rollout:  # fmt: skip
    """The sampled answers with their scores, values and advantages.

    input_ids, attention_mask and completion_mask (1 = sampled token) are (B, T). The policy has sampled at this
    temperature, without top_k and top_p. Padding may stand before the prompt and behind the answer. One tokenizer
    serves all models. With LoRA the reference is the policy without its adapter:

        def ref_model(**inputs):
            with policy.disable_adapter():
                return policy(**inputs)

    Raises ValueError for masks that do not fit, active dropout, and numbers that are not finite.
    """
    completion, last = _answers(input_ids, attention_mask, completion_mask, eos_token_id)
    for name, model in {"policy": policy, "value_model": value_model}.items():
        if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in model.modules()):
            raise ValueError(f"got a {name} with active dropout, wanted {name}.eval(): its numbers would be noise")
    row, mask = torch.arange(len(last), device=last.device), completion[:, 1:]
    states = completion.roll(-1, 1)  # (B, T); column 0 is never sampled
    states[row, last] = input_ids[row, last] == eos_token_id

    scores = values_of(reward_model, input_ids, attention_mask)[row, last]  # (B, T) -> (B,)
    values = values_of(value_model, input_ids, attention_mask).where(states, 0)
    old_logps = logps_of(policy, input_ids, attention_mask, temperature).where(mask, 0)
    ref_logps = logps_of(ref_model, input_ids, attention_mask, temperature).where(mask, 0)
    for name, x in {"scores": scores, "values": values, "old_logps": old_logps, "ref_logps": ref_logps}.items():
        if not x.isfinite().all():
            raise ValueError(f"{name}: got {(~x.isfinite()).sum()} numbers that are not finite: has it diverged?")

    kl = nn.functional.pad(kl_k1(old_logps, ref_logps), (0, 1))  # (B, T-1) -> (B, T); none behind the end
    rewards = token_rewards(scores, kl, states, beta)
    advantages, returns = gae(rewards, values, states, gamma, lam)
    text, advantages = (input_ids, attention_mask, mask, states), whiten(advantages[:, :-1], mask)
    return Rollout(*text, old_logps, ref_logps, values, scores, rewards, advantages, returns, temperature)


def update(policy: nn.Module, value_model: nn.Module, optimizer: torch.optim.Optimizer, batch: Rollout, *,
           epochs: int = 4, minibatches: int = 1, clip_eps: float = 0.2, value_clip: float = 0.2,
           vf_coef: float = 0.1, max_grad_norm: float = 1.0) -> dict[str, float]:  # fmt: skip
    """Trains on the batch `epochs` times, each time shuffled and cut into minibatches of one step; what to watch:

        score                     the reward model's, mean
        kl                        nats/answer, k1 to the reference when the answers were sampled
        entropy                   nats/token, estimated as -log p of the sampled tokens
        policy_loss, value_loss   each token of a minibatch weighs the same; this and what follows: mean of all steps
        ratio                     new / old probability, mean
        clip_fraction             of the tokens, those whose gradient the clipping has taken away
        grad_norm                 of both models together, before it is clipped to max_grad_norm

    The optimizer holds the trained parameters of both models.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch.scores)).tensor_split(minibatches):
            b = batch.rows(rows)
            logps = logps_of(policy, b.input_ids, b.attention_mask, b.temperature)
            values = values_of(value_model, b.input_ids, b.attention_mask)
            policy_loss = masked_mean(ppo_loss(logps, b.old_logps, b.advantages, b.mask, clip_eps), b.mask)
            critic_loss = masked_mean(value_loss(values, b.values, b.returns, b.states, value_clip), b.states)
            optimizer.zero_grad()
            (policy_loss + vf_coef * critic_loss).backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()

            ratio = (logps.detach() - b.old_logps).exp()
            clipped = (ratio - 1) * b.advantages.sign() > clip_eps
            of_tokens = [masked_mean(x, b.mask) for x in (ratio, clipped.to(ratio.dtype))]
            steps.append(torch.stack([policy_loss.detach(), critic_loss.detach(), *of_tokens, grad_norm]))
    names = ("policy_loss", "value_loss", "ratio", "clip_fraction", "grad_norm")
    stats = {
        "score": batch.scores.mean(),
        "kl": kl_k1(batch.old_logps, batch.ref_logps).sum(1).mean(),
        "entropy": masked_mean(-batch.old_logps, batch.mask),
        **dict(zip(names, torch.stack(steps).mean(0), strict=True)),
    }
    return {name: x.item() for name, x in stats.items()}


def logps_of(model: Callable, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of each next token at this temperature, (B, T-1), from a causal language model."""
    return per_token_logps(_read(model, input_ids, attention_mask).logits / temperature, input_ids)


def values_of(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the model's head says of the text up to each token, (B, T), fp32 or wider.

    The model is an AutoModelForSequenceClassification with num_labels=1. A value model learns all of these numbers; a
    reward model has learned the one at the answer's last token, which is its .logits.
    """
    values = model.score(_read(model, input_ids, attention_mask, output_hidden_states=True).hidden_states[-1])
    if values.shape[2] != 1:
        raise ValueError(f"got a head of {values.shape[2]} labels, wanted 1: was it loaded without num_labels=1?")
    return values.squeeze(2).to(torch.promote_types(values.dtype, torch.float32))  # (B, T, 1) -> (B, T)


def _read(model: Callable, input_ids: Tensor, attention_mask: Tensor, **options: bool):
    """The model's output. Positions count real tokens only, so that padding moves nothing on any side."""
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False, **options)


def _answers(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """completion_mask as bool (B, T), and where each answer's last token stands, (B,)."""
    masks = {"attention_mask": attention_mask, "completion_mask": completion_mask}
    check_shapes("generate returns prompt and answer, so both masks cover both", 2, input_ids=ids, **masks)
    seen, completion = as_bool_mask(attention_mask, ids), as_bool_mask(completion_mask, ids)
    if (completion & ~(seen & nn.functional.pad(seen[:, :-1], (1, 0)))).any():
        raise ValueError("got padding, or nothing, in an answer or right before it: prompts padded on the right?")
    row, place = torch.arange(len(ids), device=ids.device), torch.arange(ids.shape[1], device=ids.device)
    last = (completion * place).argmax(1)
    behind = ids[row, (last + 1).clamp(max=len(place) - 1)]
    if ((behind == eos_token_id) & (ids[row, last] != eos_token_id)).any():
        raise ValueError("got an end of turn behind an answer, wanted it in both masks: does the same token pad?")
    return completion, last
