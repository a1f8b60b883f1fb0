"""AWQ: 4-bit weights whose scales are chosen with sample texts, for vLLM and transformers; and answers of such a model.

    make awq                                                                        once: the environment .venv-awq
    .venv-awq/bin/python tools/awq.py quantize MODEL texts.jsonl FOLDER             writes FOLDER, prints what it took
    .venv-awq/bin/python tools/awq.py answer FOLDER prompts.jsonl answers.jsonl     greedy answers, one a line

MODEL is a folder of merged 16-bit weights, as `model.merge_and_unload()` and `save_pretrained` leave it. A line of
texts.jsonl is one calibration text as a JSON string, rendered as in use, prompt and answer; 32 or more are wanted. A
line of prompts.jsonl is a list of messages, a line of answers.jsonl a JSON string. --group-size: weights that share one
scale; it must divide the columns of every layer (SmolLM2: 576 = 9 * 64). FOLDER appears when it is complete.

It imports nothing of ftlab: that environment has llmcompressor and transformers, not the course.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def quantize(model: str, texts: list[str], folder: Path, group_size: int = 64) -> dict:
    """Writes the AWQ model; seconds, peak memory of this process, and the version that did it."""
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # llmcompressor 0.14 pins without looking
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [tokenizer(text, truncation=True, max_length=512, add_special_tokens=False) for text in texts]
    int4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    recipe = [
        AWQModifier(),  # scales the salient channels up, and their inputs down
        QuantizationModifier(ignore=["lm_head"], config_groups={"int4": {"targets": ["Linear"], "weights": int4}}),
    ]
    data = Dataset.from_list([dict(row) for row in rows])
    oneshot(model=network, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=512,
            num_calibration_samples=len(rows))  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", suffix=".part") as scratch:
        new = Path(scratch) / folder.name
        network.to(torch.bfloat16).save_pretrained(new, save_compressed=True)  # what stays unquantized, in 16 bit
        tokenizer.save_pretrained(new)
        new.rename(folder)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "llmcompressor": llmcompressor.__version__,
    }


def answer(model: str, prompts: list[list[dict]], max_new_tokens: int = 80) -> list[str]:
    """Greedy answers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        batch = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            output = network.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="AWQ weights of a model folder, and answers of such a model")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, option, default in (("quantize", "--group-size", 64), ("answer", "--max-new-tokens", 80)):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("read", type=Path, help="a JSON value a line")
        command.add_argument("write", type=Path, help="must not be there yet")
        command.add_argument(option, type=int, default=default)
    asked = parser.parse_args()
    if asked.write.exists():
        sys.exit(f"{asked.write} is there already: choose another name, or remove it")
    rows = [json.loads(line) for line in asked.read.read_text(encoding="utf-8").splitlines() if line.strip()]
    if asked.command == "quantize":
        print(json.dumps(quantize(asked.model, rows, asked.write, asked.group_size)))
    else:
        answers = answer(asked.model, rows, asked.max_new_tokens)
        asked.write.write_text("".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in answers), "utf-8")


if __name__ == "__main__":
    main()
