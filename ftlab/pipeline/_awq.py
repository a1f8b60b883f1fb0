"""The part of `export.to_awq` and `export.ask_awq` that runs in .venv-awq: reads a job from a file, writes its result.

It imports nothing of ftlab: that environment has llmcompressor and transformers, not the course.
"""

import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(model: str, texts: list[str], folder: str, group_size: int) -> dict:
    """Writes the AWQ model; seconds, peak memory of this process, and the version that did it."""
    import llmcompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

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
    network.to(torch.bfloat16).save_pretrained(folder, save_compressed=True)  # what stays unquantized, in 16 bit
    tokenizer.save_pretrained(folder)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "llmcompressor": llmcompressor.__version__,
    }


def answer(model: str, prompts: list[list[dict]], max_new_tokens: int) -> list[str]:
    """Greedy answers, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        batch = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            output = network.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    job, result = sys.argv[1:]
    with open(job, encoding="utf-8") as stream:
        what, arguments = json.load(stream)
    value = {"quantize": quantize, "answer": answer}[what](**arguments)
    with open(result, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
