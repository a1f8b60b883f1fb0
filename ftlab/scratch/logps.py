"""From logits to log-probabilities: the only place that shifts logits against tokens.

The logits at position t score the token at t + 1, so T tokens have T - 1 log-probs, and the first token has none:

    input_ids         x0  x1  x2  x3       (B, T)
    per_token_logps       p0  p1  p2       (B, T-1), entry t scores token t + 1
    completion_mask    0   0   1   1       (B, T), 1 = the token counts in the loss

All natural logarithms, so nats. Equal to TRL's on its own batches: tests/parity/test_dpo.py.
"""

import torch
from torch import Tensor


def per_token_logps(logits: Tensor, input_ids: Tensor) -> Tensor:
    """log p(x[t+1] | x[0..t]), (B, T-1), fp32 or wider, from logits (B, T, V) and input_ids (B, T).

    TRL stays in the logits' dtype: in bf16, with 8 significant bits, a log-prob of -7.6 is off by up to 0.016.
    """
    if logits.dim() != 3 or logits.shape[:2] != input_ids.shape or input_ids.shape[1] < 2:
        got = f"got logits {_shape(logits)} and input_ids {_shape(input_ids)}"
        raise ValueError(f"{got}, wanted (B, T, V) and (B, T), T > 1: shifted already? This function does it")
    if input_ids.min() < 0 or input_ids.max() >= logits.shape[2]:
        ids = f"ids from {input_ids.min()} to {input_ids.max()}"
        raise ValueError(f"got {ids}, wanted 0 ... {logits.shape[2] - 1}: labels with -100? Give input_ids and a mask")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps = logits[:, :-1].log_softmax(-1, dtype=dtype)  # (B, T, V) -> (B, T-1, V)
    return logps.gather(2, input_ids[:, 1:, None]).squeeze(2)  # (B, T-1)


def entropy(logits: Tensor) -> Tensor:
    """Predictive entropy, -sum_v p(v) log p(v), (B, T-1), nats, ln V at most; entry t is that of token t + 1."""
    if logits.dim() != 3 or logits.shape[1] < 2:
        raise ValueError(f"got logits {_shape(logits)}, wanted (B, T, V), T > 1: a row without its batch dimension?")
    logps = logits[:, :-1].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)  # 0 log 0 = 0: a token with -inf


def sequence_logps(per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """The log-probability of each whole completion, (B,): the *sum* over the tokens that count; 0 if none does.

    per_token_logps (B, T-1), completion_mask (B, T) over the tokens, not shifted. What stands at the other positions,
    padding included, changes nothing, even if it is nan.
    """
    return per_token_logps.where(next_token_mask(per_token_logps, completion_mask), 0).sum(1)


def mean_logps(per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """The same per token, (B,): the *mean*, which says nothing about length. exp(-mean_logps) is the perplexity."""
    return masked_mean(per_token_logps, next_token_mask(per_token_logps, completion_mask), dim=1)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The mean of the values where mask is 1: over all of them, or along dim. Shapes of values and mask are the same.

    Over all, every token weighs the same. masked_mean(..., dim=1).mean(), the mean of the rows' means, is another
    number when lengths differ: there a token of a short row weighs more. Raises ValueError where no token counts.
    """
    mask = as_bool_mask(mask, values)
    number = mask.sum(dim)
    if (number == 0).any():
        raise ValueError(f"got a mask {_shape(mask)} without a 1 in {'it' if dim is None else 'a row'}: turned round?")
    return values.where(mask, 0).sum(dim) / number


def as_bool_mask(mask: Tensor, values: Tensor) -> Tensor:
    """mask as bool. Raises ValueError unless it has the shape of values and holds only 0 and 1."""
    check_shapes("a mask (B, T) beside log-probs (B, T-1)? Then mask[:, 1:] is meant", mask=mask, values=values)
    if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
        seen = f"values from {mask.min()} to {mask.max()}"
        raise ValueError(f"got a mask with {seen}, wanted only 0 and 1: are these labels? Then labels != -100")
    return mask.bool()


def check_shapes(hint: str, dim: int | None = None, **tensors: Tensor) -> None:
    """Raises ValueError unless all tensors have one shape, of dim dimensions: broadcasting would hide the mistake."""
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or (dim is not None and {len(shape) for shape in shapes.values()} != {dim}):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        wanted = {None: "one shape", 1: "one shape (B,)", 2: "one shape (B, T)"}[dim]
        raise ValueError(f"got {got}, wanted {wanted}: {hint}")


def next_token_mask(per_token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """completion_mask (B, T) as bool (B, T-1), in line with per_token_logps."""
    if completion_mask.dim() != 2 or per_token_logps.shape != completion_mask[:, 1:].shape:
        got = f"per_token_logps {_shape(per_token_logps)} and completion_mask {_shape(completion_mask)}"
        raise ValueError(f"got {got}, wanted (B, T-1) and (B, T): do not shift the mask, this function does")
    return as_bool_mask(completion_mask[:, 1:], per_token_logps)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
