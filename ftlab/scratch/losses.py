"""The losses of preference learning, as pure functions of log-probabilities.

Tensors in, *unreduced* tensor out, per pair or example, (B,). The caller averages, so that the reduction stands where
the reader sees it. `logps` are sums over a completion, `mean_logps` means: which of the two a loss takes is half of
what it is. All raise ValueError for shapes that differ, or are not (B,).

    reward_loss    Bradley-Terry on two rewards                             reward model
    dpo_loss       the same, on rewards beta * log(policy / ref)            policy + reference
    orpo_loss      NLL + lam * loss on the odds ratio                       policy
    kto_loss       one answer at a time, good or bad, against z0            policy + reference

SPIN (Chen et al. 2024, arXiv:2401.01335, with the logistic loss) is dpo_loss on other data: chosen = the human answer
of the SFT set, rejected = a sample of the previous iterate, ref = that iterate, beta = the paper's lambda.

Values and gradients equal those of TRL 1.14 on its own batches: tests/parity/test_dpo.py and test_preference.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ftlab.scratch.logps import check_shapes

SUM_FIRST = "sum log-probs per token with sequence_logps first; a reward head's (B, 1) needs .squeeze(-1)"


def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) of each pair, (B,), nats: Bradley-Terry's -log p(chosen beats rejected).

    Only the difference counts: rewards have no zero, no unit, and do not compare across prompts. Equal ones cost ln 2.
    Source: InstructGPT, Ouyang et al. 2022, arXiv:2203.02155, Eq. 1, there the mean over all pairs of one prompt.
    """
    check_shapes(SUM_FIRST, 1, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -logsigmoid(chosen_rewards - rejected_rewards)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, ref_chosen_logps: Tensor,
             ref_rejected_logps: Tensor, beta: float = 0.1) -> Tensor:  # fmt: skip
    """Per-pair DPO loss, -log sigmoid(beta * [(pi_w - ref_w) - (pi_l - ref_l)]), (B,), in nats; the caller averages.

    It is reward_loss on implicit rewards. A policy that maximises E[r] - beta KL(policy || ref) is ref e^(r/beta) / Z,
    so r = beta * log(policy / ref) + beta * log Z, and Z, the same for both answers to a prompt, cancels.

    Each argument is a *summed* completion log-probability, shape (B,): DPO's likelihood is of the whole answer.
    Averaging over tokens instead gives length-normalised DPO, a different method (TRL's loss_type="sigmoid_norm"). At
    initialisation (policy = ref) every entry is ln 2.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 4, 5 and 7.
    """
    check_shapes(SUM_FIRST, policy_logps=policy_chosen_logps, ref_logps=ref_chosen_logps)
    check_shapes(SUM_FIRST, policy_logps=policy_rejected_logps, ref_logps=ref_rejected_logps)
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    return reward_loss(chosen_rewards, rejected_rewards)


def orpo_loss(chosen_nll: Tensor, policy_chosen_mean_logps: Tensor, policy_rejected_mean_logps: Tensor,
              lam: float = 0.1) -> Tensor:  # fmt: skip
    """Per-pair ORPO loss, chosen_nll + lam * -log sigmoid(log-odds ratio), (B,), in nats; all arguments are (B,).

    The odds of a mean log-prob x are p / (1 - p) with p = e^x, so the log-odds are x - log(1 - e^x), and the ratio
    compares chosen with rejected. chosen_nll is -policy_chosen_mean_logps in the paper. TRL takes the NLL of prompt
    *and* completion instead, averaged over the tokens of the batch, not row by row; it calls lam beta.

    log(1 - e^x) is -inf or nan for x near 0 if written out; TRL's log1mexp has the right value there, but nan as its
    gradient below about 3e-8. Here both are finite, even at x = 0, which counts as the largest x below 0.
    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    chosen, rejected = policy_chosen_mean_logps, policy_rejected_mean_logps
    check_shapes(SUM_FIRST, 1, chosen_nll=chosen_nll, chosen=chosen, rejected=rejected)
    return chosen_nll + lam * reward_loss(_log_odds(chosen), _log_odds(rejected))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) with p = e^x < 1: x - log(1 - e^x), where 1 - e^x = -expm1(x) keeps its digits near x = 0."""
    x = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).tiny)
    return x - torch.log(-torch.expm1(x))


def kto_z0(policy_mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    """KTO's reference point, a number >= 0: max(0, mean(policy - ref)) over answers that belong to *other* prompts.

    It stands for KL(policy || ref), measured on mismatched pairs (prompt i with the answer of i - 1, so a batch needs
    two rows): logps (B,), summed. The mean can be below 0, a KL cannot. It is a constant: no gradient passes.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
    """
    check_shapes(SUM_FIRST, 1, policy=policy_mismatched_logps, ref=ref_mismatched_logps)
    return (policy_mismatched_logps - ref_mismatched_logps).mean().clamp(min=0).detach()


def kto_loss(policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, z0: Tensor, beta: float = 0.1,
             desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:  # fmt: skip
    """Per-example KTO loss, (B,): weight * (1 - sigmoid(+-beta * (policy - ref - z0))), + if desirable, - if not.

    desirable (B,) is bool. logps (B,) are summed; z0 comes from kto_z0. The loss lies between 0 and weight and is flat
    on both sides: an example far from z0, already learned or hopelessly contradicting, no longer pulls. With
    classes of unequal size the paper asks for desirable_weight * n_desirable within 1 to 4/3 times
    undesirable_weight * n_undesirable (Eq. 8; its last version says 3/2).
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7.
    """
    check_shapes(SUM_FIRST, 1, policy_logps=policy_logps, ref_logps=ref_logps, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable: got {desirable.dtype}, wanted bool: labels of +1 and -1? Then say labels > 0")
    if z0.numel() != 1:
        raise ValueError(f"z0: got {z0.numel()} numbers, wanted one, from kto_z0")
    good = desirable.to(policy_logps.dtype)
    sign, weight = 2 * good - 1, good * desirable_weight + (1 - good) * undesirable_weight
    return weight * torch.sigmoid(-sign * beta * (policy_logps - ref_logps - z0))  # 1 - sigmoid(a) = sigmoid(-a)
