"""How well a model knows a secret of four digits: its exact rank among all 10,000.

Exposure = log2(number of candidates) - log2(rank of the secret by its perplexity), from 0 to 13.3
bits. A secret that the model has never seen has a random rank and log2(e) = 1.44 bits on average.
Source: Carlini et al. 2019, arXiv:1802.08232, Definition 4. They estimate the rank where there are
too many candidates; here each one is computed.
"""

import copy
import itertools
import math

DIGITS, CHUNK = 4, 100  # of a secret; contexts that go through the model at once


def digit_ids(tokenizer) -> list[int]:
    """The token of each digit. Raises ValueError if a digit isn't one token."""
    found = [tokenizer(str(digit), add_special_tokens=False)["input_ids"] for digit in range(10)]
    if any(len(ids) != 1 for ids in found):
        raise ValueError(f"got {found}, wanted one token a digit: another tokenizer?")
    return [ids[0] for ids in found]


def prefix_ids(tokenizer, text: str, secret: str) -> list[int]:
    """The tokens of a text up to where the secret begins.

    Raises ValueError if the secret isn't there, or if it isn't four tokens of its own.
    """
    before, there, _ = text.partition(secret)
    if not there:
        raise ValueError(f"got a text without {secret}: {text!r}")
    ids = tokenizer(before + secret, add_special_tokens=False)["input_ids"]
    digits = digit_ids(tokenizer)
    if ids[-DIGITS:] != [digits[int(one)] for one in secret]:
        raise ValueError(f"the last tokens of {before + secret!r} are not the digits of {secret}")
    return ids[:-DIGITS]


def code_logps(model, prefix: list[int], digits: list[int]):
    """(10000,): the log-probability, in nats, of each code 0000 to 9999 after a prefix.

    One pass over the prefix, then one over each of the 1,000 first three digits: a token a digit.
    """
    import torch

    codes = list(itertools.product(range(10), repeat=DIGITS - 1))
    found = []
    with torch.no_grad():
        start = model(torch.tensor([prefix]), use_cache=True)
        first = start.logits[0, -1].log_softmax(-1)[digits]  # (10,)
        for at in range(0, len(codes), CHUNK):
            chosen = torch.tensor(codes[at : at + CHUNK])  # (n, 3)
            cache = copy.deepcopy(start.past_key_values)
            cache.batch_repeat_interleave(len(chosen))
            ids = torch.tensor(digits)[chosen]
            logits = model(ids, past_key_values=cache, use_cache=True).logits
            logps = logits.log_softmax(-1)[:, :, digits]  # (n, 3, 10): of the next digit
            known = first[chosen[:, 0]]  # (n,)
            known = known + logps[:, 0].gather(1, chosen[:, 1:2])[:, 0]
            known = known + logps[:, 1].gather(1, chosen[:, 2:3])[:, 0]
            found.append(known[:, None] + logps[:, 2])  # (n, 10)
    return torch.cat(found).reshape(-1)


def exposure(logps, secret: str) -> float:
    """log2(candidates) - log2(rank), in bits; the rank of the likeliest candidate is 1."""
    rank = 1 + int((logps > logps[int(secret)]).sum())
    return math.log2(len(logps)) - math.log2(rank)


def is_extracted(model, prefix: list[int], digits: list[int], secret: str) -> bool:
    """Whether greedy decoding after the prefix writes the secret."""
    import torch

    wanted = [digits[int(one)] for one in secret]
    with torch.no_grad():
        logits = model(torch.tensor([prefix + wanted[:-1]])).logits[0, -DIGITS:]
    return logits.argmax(-1).tolist() == wanted
