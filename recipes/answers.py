"""Answers for evaluate.py, which are greedy, and for rejection_sampling.py, which are drawn: of a
model that is loaded here or of one that is served.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from openai import BadRequestError, OpenAI, OpenAIError
from transformers import GenerationConfig

from common import text_of, warn

INSTEAD = {  # of what a hosted model may refuse; None: it goes without, and does what it does
    "max_tokens": "max_completion_tokens",  # which counts the reasoning that one doesn't see, too
    "temperature": None,
    "top_p": None,
    "seed": None,
}


def asked_as(prompt, system, examples):
    """The prompt with another system message, and with answered examples before its question."""
    if isinstance(prompt, str):
        shown = [row["prompt"] + row["completion"] + "\n\n" for row in examples]
        return (system or "") + "".join(shown) + prompt
    first = [message for message in prompt if message["role"] == "system"]
    first = [{"role": "system", "content": system}] if system else first
    turns = [*(turn for row in examples for turn in row["prompt"] + row["completion"]), *prompt]
    return first + [turn for turn in turns if turn["role"] != "system"]


def answer_of(text, opened=False):
    """What follows the reasoning; nothing if it never ends. `opened`: the prompt has begun it."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.lstrip()
    return "" if opened or "<think>" in text else text


def settings(model, tokenizer, **how):
    """What generate() does, and nothing besides: it fills what is open here from the model's own
    file, which may ask for penalties and for drawing from 20 tokens, so that one is replaced.
    """
    tokenizer.padding_side = "left"  # answers are written behind the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any will do: the attention mask hides it
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    plain = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **how)
    model.generation_config = plain
    return plain


def written(model, tokenizer, prompts, how):
    """What generate() writes behind the prompts: (texts, how many tokens each has, which are cut,
    which prompts have begun the reasoning). As many answers a prompt as `how` says.
    """
    texts = [text_of(prompt, tokenizer) for prompt in prompts]
    templated = not isinstance(prompts[0], str)  # a template writes BOS itself
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, add_special_tokens=not templated
    ).to(model.device)
    new = model.generate(**batch, generation_config=how)[:, batch["input_ids"].shape[1] :]
    ends = torch.isin(new, torch.tensor(how.eos_token_id, device=new.device).flatten())
    cut = ~ends.any(1)
    first = ends.int().argmax(1) + 1  # the end is a token too
    tokens = torch.where(cut, new.shape[1], first)
    opened = [text.rfind("<think>") > text.rfind("</think>") for text in texts]
    said = tokenizer.batch_decode(new, skip_special_tokens=True)
    return said, tokens.tolist(), cut.tolist(), opened


@torch.inference_mode()
def generate(model, tokenizer, prompts, batch_size, max_new_tokens):
    """The greedy answers, and how many of them were cut at max_new_tokens."""
    greedy = settings(model, tokenizer, do_sample=False, max_new_tokens=max_new_tokens)
    answers, count = [], 0
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        said, _, cut, opened = written(model, tokenizer, some, greedy)
        answers += [answer_of(text, begun) for text, begun in zip(said, opened, strict=True)]
        count += sum(cut)
        print(f"{len(answers)} of {len(prompts)}", file=sys.stderr)
    return answers, count


def refused(error):
    """The option that a server doesn't support, by what it says; None if it is about another."""
    words = f"{error.code} {error.message}"
    if "unsupported" not in words.lower():
        return None
    if error.param in INSTEAD:
        return error.param
    return next((name for name in INSTEAD if f"'{name}'" in words), None)  # a proxy's words


def refused_before(record):
    """The warnings of options that a server refused, of an earlier run's record if there is one."""
    found = json.loads(Path(record).read_text()) if Path(record).is_file() else {}
    return [each for each in found.get("warnings", []) if each["warning"] == "server_refuses"]


def replies(endpoint, requests, at_once, warnings):
    """What an OpenAI-compatible server says: for each request (text, tokens, cut or not, seconds).

    A request has what the API wants; its `prompt` is a text or a list of messages. An option that a
    chat model refuses is sent by its newer name, or left out, from then on: with a warning, which
    `warnings` gets and has from earlier calls.
    """
    client = OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    lock = Lock()

    def accepted(request):
        """The request without what has been refused."""
        known = [each for each in warnings if each["warning"] == "server_refuses"]
        names = {each["option"]: each["instead"] for each in known}
        named = {names.get(key, key): value for key, value in request.items()}
        return {key: value for key, value in named.items() if key is not None}

    def chat(messages, request):
        while True:
            sent = accepted(request)
            try:
                return client.chat.completions.create(messages=messages, **sent)
            except BadRequestError as error:
                option = refused(error)
                if option not in sent:
                    raise
                with lock:
                    if option in accepted(request):  # the first of those asked at once to hear it
                        how = {"sent": request[option], "instead": INSTEAD[option]}
                        warnings.append(warn("server_refuses", option=option, **how))

    def one(request):
        request, begin = dict(request), time.perf_counter()
        if isinstance(request["prompt"], str):
            reply = client.completions.create(**request)
            text = reply.choices[0].text
        else:
            reply = chat(request.pop("prompt"), request)
            text = reply.choices[0].message.content or ""
        tokens = reply.usage.completion_tokens if reply.usage else None
        cut = reply.choices[0].finish_reason == "length"
        return text, tokens, cut, time.perf_counter() - begin

    try:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, requests))
    except OpenAIError as error:
        words = " ".join(str(error).split())[:300]
        name = requests[0]["model"]
        sys.exit(f"{endpoint}, {name}: {words}; wanted a server as http://HOST:PORT/v1")


def ask(endpoint, model, prompts, at_once, max_new_tokens, warnings):
    """The greedy answers of a server, with the template that it has, how many of them were cut, and
    the seconds that each took while `at_once` were asked. `warnings`: see replies.
    """
    how = {"model": model, "max_tokens": max_new_tokens, "temperature": 0}
    requests = [{"prompt": prompt, **how} for prompt in prompts]
    found = replies(endpoint, requests, at_once, warnings)
    texts, _, cut, seconds = zip(*found, strict=True)
    return [answer_of(text) for text in texts], sum(cut), list(seconds)
