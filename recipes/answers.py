"""Greedy answers for evaluate.py, of a model that is loaded here or of one that is served."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from openai import OpenAI, OpenAIError
from transformers import GenerationConfig

from common import text_of


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


@torch.inference_mode()
def generate(model, tokenizer, prompts, batch_size, max_new_tokens):
    """The greedy answers, and how many of them were cut at max_new_tokens."""
    tokenizer.padding_side = "left"  # answers are written behind the prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any will do: the attention mask hides it
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    greedy = GenerationConfig(  # a new one: a model's own file may ask for drawing and penalties
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = torch.tensor(ends, device=model.device).flatten()
    answers, cut = [], 0
    for start in range(0, len(prompts), batch_size):
        texts = [text_of(prompt, tokenizer) for prompt in prompts[start : start + batch_size]]
        templated = not isinstance(prompts[start], str)  # a template writes BOS itself
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not templated
        ).to(model.device)
        new = model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]
        cut += int((~torch.isin(new, ends).any(1)).sum())
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        for text, answer in zip(texts, said, strict=True):
            opened = text.rfind("<think>") > text.rfind("</think>")
            answers.append(answer_of(answer, opened))
        print(f"{len(answers)} of {len(prompts)}", file=sys.stderr)
    return answers, cut


def ask(endpoint, model, prompts, at_once, max_new_tokens):
    """The same from an OpenAI-compatible server, with the template that it has."""
    client = OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    how = {"model": model, "max_tokens": max_new_tokens, "temperature": 0}

    def one(prompt):
        if isinstance(prompt, str):
            choice = client.completions.create(prompt=prompt, **how).choices[0]
            text = choice.text
        else:
            choice = client.chat.completions.create(messages=prompt, **how).choices[0]
            text = choice.message.content or ""
        return answer_of(text), choice.finish_reason == "length"

    try:
        with ThreadPoolExecutor(at_once) as pool:
            answers, cut = zip(*pool.map(one, prompts), strict=True)
    except OpenAIError as error:
        words = " ".join(str(error).split())[:300]
        sys.exit(f"{endpoint}, {model}: {words}; wanted a server as http://HOST:PORT/v1")
    return list(answers), sum(cut)
