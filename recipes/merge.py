"""Merge an adapter into the weights that it was trained on, and check that nothing changed.

    pip install "transformers==5.17.*" "peft==0.21.*" "bitsandbytes==0.50.*"
    python merge.py --adapter runs/qlora_8b/adapter --out runs/qlora_8b/merged
    python evaluate.py --model runs/qlora_8b/merged --file test.jsonl --out merged.json \
        --against tuned.json

An adapter of qlora_8b.py was trained on rounded weights. So its base is rounded to 4 bits again
and turned back into 16-bit numbers (record.json beside the adapter says so): merged into 4-bit
weights, most of a small update would be lost, and the original weights it has never seen.
The check compares the merged model with the one that was trained, token by token on held-out rows.
In 16 bits an 8B takes 16 GB and a 32B 65: --device cpu merges in the computer's memory where the
card has no room for that. There is no --tiny: give it the adapter of sft.py --tiny or of
qlora_8b.py --tiny.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from common import (
    GPU,
    base_of,
    load,
    loading,
    now,
    read_rows,
    record_of,
    said,
    text_of,
    weights_in_4_bits,
    write_record,
)

MOST_TOKENS = 64  # of a row: a distribution over the vocabulary is kept for each
MOST_LOST = 0.1  # of what the adapter changes


@torch.inference_mode()
def logps(model, tokenizer, row):
    """Log-probabilities over the vocabulary before each token of the completion, (T, V)."""
    prompt, words = text_of(row["prompt"], tokenizer), isinstance(row["prompt"], str)
    before = len(tokenizer(prompt, add_special_tokens=words)["input_ids"])
    text = prompt + said(row["completion"])
    ids = tokenizer(text, add_special_tokens=words, return_tensors="pt").to(model.device)
    logits = model(**ids).logits[0, before - 1 : before - 1 + MOST_TOKENS]
    return logits.float().log_softmax(-1).cpu()


def kl(trained, model, tokenizer, rows):
    """KL(trained || model) of each token, in nats."""
    found = []
    for p, row in zip(trained, rows, strict=True):
        q = logps(model, tokenizer, row)
        found.append((p.exp() * (p - q)).sum(-1).clamp(min=0))  # below it is rounding
    return torch.cat(found)


def check_room(model, dtype, free):
    """Stops before the base is turned back into numbers of 16 bits, where they have no room.

    free: bytes. What is in 4 bits goes while they come, so its half byte a weight counts as room.
    """
    four = weights_in_4_bits(model)[0]
    wanted = four * (dtype.itemsize - 0.5)
    if wanted > free:
        sys.exit(
            f"the base needs {wanted / 1e9:.1f} GB more in {dtype}, and the card has "
            f"{free / 1e9:.1f} GB free: merge with --device cpu, which wants "
            f"{four * dtype.itemsize / 1e9:.0f} GB of the computer's memory and some more"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="the folder that training has written")
    parser.add_argument("--out", required=True, help="a new folder for the merged model")
    parser.add_argument("--device", default="cuda" if GPU else "cpu")
    parser.add_argument("--file", help="rows for the check; without it training's validation rows")
    parser.add_argument("--rows", type=int, default=50, help="at most so many of them")
    asked = parser.parse_args(arguments)
    if Path(asked.out).exists():
        sys.exit(f"{asked.out} is there already: name a new folder")

    record, (name, revision, how) = record_of(asked.adapter), base_of(asked.adapter)
    begin = now()
    tokenizer = AutoTokenizer.from_pretrained(asked.adapter)
    file = asked.file or record.get("validation_file")
    if file is None:
        sys.exit(f"{asked.adapter}/record.json names no validation_file: give --file for the check")
    columns = ["prompt", "completion"]
    if not asked.file:  # of dpo.py prompt and chosen
        columns = record.get("validation_columns", columns)
    rows = read_rows(file, tokenizer, asked.rows, columns)
    rows = [{"prompt": row[columns[0]], "completion": row[columns[1]]} for row in rows]
    with loading(name, revision):
        model = load(name, revision, how, asked.device)
    if model.device.type == "cuda":
        check_room(model, how["dtype"], torch.cuda.mem_get_info()[0])
    model = PeftModel.from_pretrained(model, asked.adapter).eval()
    trained = [logps(model, tokenizer, row) for row in rows]
    with model.disable_adapter():
        moved = kl(trained, model, tokenizer, rows).mean().item()
    if moved == 0:
        sys.exit(f"{asked.adapter} changes nothing: was it trained?")

    if "quantization_config" in how:
        model = PeftModel.from_pretrained(model.unload().dequantize(), asked.adapter)
    merged = model.merge_and_unload(safe_merge=True).eval()  # safe: refuses nan and infinity
    losses = kl(trained, merged, tokenizer, rows)
    lost = losses.mean().item()
    print(
        f"mean KL a token, {len(losses)} tokens of {len(rows)} rows: by the adapter {moved:.2g} "
        f"nats, by the merge {lost:.2g}, which is {lost / moved:.1%} of it"
    )
    if lost > MOST_LOST * moved:
        sys.exit(f"more than {MOST_LOST:.0%}: the merge changes the model, and nothing is written")
    merged.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)
    record = write_record(
        Path(asked.out, "record.json"),
        recipe=Path(__file__).stem,
        **{key: record[key] for key in ("base", "revision", "dtype", "load_in_4bit")},
        seconds=now() - begin,
        rows=len(rows),
        tokens=len(losses),
        adapter_kl_nats=moved,
        merge_kl_nats=lost,
    )
    print(record)


if __name__ == "__main__":
    main()
