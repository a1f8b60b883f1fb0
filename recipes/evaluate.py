"""Score a model or an adapter on held-out rows, with intervals, and compare two of them.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*" numpy
    python evaluate.py --model BASE --file test.jsonl --out base.json
    python evaluate.py --adapter runs/sft/adapter --file test.jsonl --out tuned.json \
        --against base.json
    python evaluate.py --tiny --out runs/tiny.json                   # seconds on a CPU

Answers are greedy. --scorer my_module:my_function takes a score(answer, row) of yours, from 0 to
1; without it an answer is right if it is the row's completion, word for word. The intervals speak
of other rows of the same kind. Another training run of the same method may differ by more.
"""

import argparse
import hashlib
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from common import base_of, loading, now, read_rows, write_record

GPU = torch.cuda.is_available()
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)
DTYPE = torch.bfloat16 if BF16 else torch.float16 if GPU else torch.float32
DATA = Path(__file__).resolve().parents[1] / "data"
TINY = {
    "model": str(DATA / "micro" / "model"),
    "file": str(DATA / "ask" / "validation.jsonl"),
    "limit": 24,
    "max_new_tokens": 48,
}
Z = 1.96  # of a 95 % interval


def load(name, revision, load_in_4bit):
    """The base as it was in training."""
    how = {"dtype": DTYPE, "device_map": {"": torch.cuda.current_device() if GPU else "cpu"}}
    if load_in_4bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        )
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, use_safetensors=True, **how
    )
    for module in model.modules():
        if isinstance(module, Linear4bit) and not GPU:  # else a CPU with bf16 takes another
            module.support_avx512bf16_for_cpu = False  # product than in training
    return model


def text_of(prompt, tokenizer):
    """What the model reads: a text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


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
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        print(f"{len(answers)} of {len(prompts)}", file=sys.stderr)
    return answers, cut


def exact_match(answer, row):
    wanted = row["completion"]
    wanted = wanted if isinstance(wanted, str) else wanted[-1]["content"]
    return answer.strip() == wanted.strip()


def scorer_of(name):
    if name is None:
        return exact_match
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        sys.exit(f"--scorer {name}: {error}; wanted module:function, from where Python finds it")


def bootstrap(values, draws=10_000):
    """The middle 95 % of the means of as many rows, drawn with replacement."""
    values, random = np.asarray(values, float), np.random.default_rng(0)
    means = [random.choice(values, len(values)).mean() for _ in range(draws)]
    return tuple(float(bound) for bound in np.percentile(means, [2.5, 97.5]))


def interval(scores):
    """95 % for the mean: Wilson's of zeros and ones, of other scores a bootstrap over rows."""
    n, mean = len(scores), sum(scores) / len(scores)
    if not set(scores) <= {0.0, 1.0}:
        return bootstrap(scores)
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def paired_interval(scores, others):
    """95 % for the mean difference over the same rows.

    Of zeros and ones Agresti and Min's (2005), widened to zero unless McNemar's exact test finds a
    difference; of other scores a bootstrap over rows.
    """
    gaps = [a - b for a, b in zip(scores, others, strict=True)]
    if not set(gaps) <= {-1.0, 0.0, 1.0}:
        return bootstrap(gaps)
    better, worse, n = gaps.count(1.0), gaps.count(-1.0), len(gaps) + 2
    centre = (better - worse) / n
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / n) / n
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    changed = better + worse  # as many coins, all fair, fall at least this unevenly:
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return (low, high) if 2 * tail < 0.05 else (min(low, 0.0), max(high, 0.0))


def compare(scores, digest, against):
    if not Path(against).is_file():
        sys.exit(f"no file {against}: --against takes what --out has written")
    other = json.loads(Path(against).read_text())
    if other["rows"] != digest:
        sys.exit(f"{against} is of other rows: only the same ones can be compared pair by pair")
    if len(scores) < 6:
        sys.exit(f"{len(scores)} rows are too few to compare two models")
    low, high = paired_interval(scores, other["scores"])
    pairs = list(zip(scores, other["scores"], strict=True))
    mean = sum(a - b for a, b in pairs) / len(pairs)
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    settled = low > 0 or high < 0
    print(
        f"against {against}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {better} rows better, "
        f"{worse} worse. The interval {'excludes' if settled else 'includes'} zero"
        f"{'' if settled else ', so these rows do not settle it'}."
    )


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a name on the hub, or a folder")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--adapter", help="a folder; its base is loaded as it was in training")
    parser.add_argument("--file", help="JSON lines with prompt and completion")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--scorer", help="module:function, called with (answer, row)")
    parser.add_argument("--out", required=True, help="a JSON file: scores, answers, what ran")
    parser.add_argument("--against", help="what --out wrote for another model on these rows")
    parser.add_argument("--tiny", action="store_true")
    if "--tiny" in arguments:
        parser.set_defaults(**TINY)
    asked = parser.parse_args(arguments)
    if not asked.file or not (asked.model or asked.adapter):
        parser.error("give --file, and --model or --adapter")

    score = scorer_of(asked.scorer)
    name, revision, load_in_4bit = asked.model, asked.revision, False
    if asked.adapter:
        name, revision, load_in_4bit = base_of(asked.adapter)
    with loading(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(asked.adapter or name, revision=revision)
    rows = read_rows(asked.file, tokenizer, asked.limit)
    with loading(name, revision):
        model = load(name, revision, load_in_4bit)
    if asked.adapter:
        model = PeftModel.from_pretrained(model, asked.adapter)
    model.eval()

    begin = now()
    prompts = [row["prompt"] for row in rows]
    answers, cut = generate(model, tokenizer, prompts, asked.batch_size, asked.max_new_tokens)
    seconds = now() - begin
    scores = [float(score(answer, row)) for answer, row in zip(answers, rows, strict=True)]
    mean, (low, high) = sum(scores) / len(scores), interval(scores)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    write_record(
        asked.out,
        recipe=Path(__file__).stem,
        model=asked.adapter or name,
        seconds=seconds,
        mean=mean,
        interval=[low, high],
        cut=cut,
        rows=digest,
        scores=scores,
        answers=answers,
    )
    for row, answer in list(zip(rows, answers, strict=True))[:3]:
        print(f"{row['completion']!r}\n  -> {answer!r}")
    print(f"{mean:.3f} [{low:.3f}, {high:.3f}], the mean of {len(scores)} rows, {seconds:.0f} s")
    if cut:
        print(f"{cut} answers were cut at max_new_tokens={asked.max_new_tokens}")
    if asked.against:
        compare(scores, digest, asked.against)


if __name__ == "__main__":
    main()
