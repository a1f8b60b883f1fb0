"""What no library has between a trained model and a server: GGUF files, Ollama's Modelfile, the model card.

Merging needs nothing of ours. The adapter belongs on the weights that it was trained on:

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)     # after LoRA
    model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=BNB, dtype=torch.float32).dequantize()  # QLoRA
    model = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(safe_merge=True)
    model.save_pretrained(FOLDER), tokenizer.save_pretrained(FOLDER)

After QLoRA the 16-bit BASE gives other logits, and so does a merge into the 4-bit layers, which PEFT rounds to 4 bits
again: tests/test_new_export.py. Every file appears under its name only when it is complete.
"""

import contextlib
import glob
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ftlab.models import pip_download
from ftlab.paths import CACHE
from ftlab.serve import serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_ROOT = PurePosixPath("llama_cpp_python-0.3.36/vendor/llama.cpp")
CONVERTER = ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how tokenizer.json cuts a text before BPE -> llama.cpp's name for it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % "{1,3}" + " ByteLevel": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % "" + " ByteLevel": "qwen2",
    "Digits ByteLevel": "smollm",
    "ByteLevel": "gpt-2",
}
# llama.cpp's converter knows a vocabulary by the checksum of a text's ids; SPLITS speaks for those that it has never met.
DRIVER = """
import runpy, sys
from conversion.base import TextModel
script, split = sys.argv[1:3]
del sys.argv[1:3]
known = TextModel.get_vocab_base_pre
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if not split:
            raise
        return split
TextModel.get_vocab_base_pre = get_vocab_base_pre
runpy.run_path(script, run_name="__main__")
"""
TEXTS = (  # llama.cpp must cut them into the tokens that transformers cuts
    "Order 618347 cost ₹1,299.00 at 10:45,\r\n  and 12345678 more.\n\n\n\tIt's WE'LL ... x²=½; total:  12",
    "SELECT count(*) FROM orders WHERE city='Pune' AND minutes>45 -- naïve Straße Łódź",
    "मेरा ऑर्डर कहाँ है? 我想退款。 Где мой заказ №48? 😀👩🏽‍🚀 “quoted” — dash…   ",
)


def fetch_converter(cache: Path = CACHE) -> Path:
    """The folder with llama.cpp's own converter, from the source package of llama-cpp-python (77 MB, fetched once).

    Raises RuntimeError if the package index cannot be reached or the checksum differs. Nothing half-made stays behind.
    """
    from filelock import FileLock

    folder = cache / "llama.cpp"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "llama.cpp.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
            if not folder.is_dir():
                sdist = pip_download(LLAMA_CPP, LLAMA_CPP_SHA256, Path(scratch), "--no-binary", "llama-cpp-python")
                extract_converter(sdist, Path(scratch) / "llama.cpp")
                os.replace(Path(scratch) / "llama.cpp", folder)
    return folder


def extract_converter(sdist: Path, folder: Path) -> None:
    """Writes the regular files of CONVERTER, and nothing outside `folder`: links, devices and `..` are left out."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or ".." in path.parts or not path.is_relative_to(LLAMA_CPP_ROOT):
                continue
            path = path.relative_to(LLAMA_CPP_ROOT)
            if path.parts[0] in CONVERTER:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(archive.extractfile(member).read())


def to_gguf(model_folder: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """A GGUF file of a model folder with its tokenizer. kind: "f16", "q8_0" (8.5 bits a weight) or "q4_0" (4.5 bits).

    llama.cpp then reads TEXTS and a rendered chat: its token ids must be those of transformers, or the served model
    would see other tokens than it was trained on.

    Raises ValueError for another kind, a folder that is no complete model, or a tokenizer without a chat template;
    RuntimeError if the converter fails or the ids differ.
    """
    from transformers import AutoTokenizer

    if kind not in ("f16", "q8_0", "q4_0"):
        raise ValueError(f"kind: got {kind!r}, wanted 'f16', 'q8_0' or 'q4_0'")
    names = [path.name for path in Path(model_folder).glob("*.json")]
    if "config.json" not in names or "tokenizer_config.json" not in names:
        why = (
            "an adapter: merge it first" if "adapter_config.json" in names else "were model and tokenizer saved there?"
        )
        raise ValueError(f"{model_folder} lacks config.json or tokenizer_config.json: {why}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {model_folder} has no chat_template: save the one that was trained with")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {"type": ""}
    parts = [part.get("pattern", {}).get("Regex") or part["type"] for part in spec.get("pretokenizers", [spec])]
    with whole(file) as new:
        made = new.with_name("f16") if kind == "q4_0" else new
        outtype = "f16" if kind == "q4_0" else kind
        command = [str(model_folder), "--outfile", str(made), "--outtype", outtype]
        _convert("convert_hf_to_gguf.py", *command, split=SPLITS.get(" ".join(parts), ""))
        if kind == "q4_0":
            _quantize_q4_0(made, new)
        _compare_tokens(new, tokenizer)
    return Path(file)


def adapter_to_gguf(adapter_folder: str | Path, base_folder: str | Path, file: str | Path) -> Path:
    """The adapter alone as a GGUF file, in fp32: for `serve(base_gguf, lora=file)`."""
    with whole(file) as new:
        command = [str(adapter_folder), "--base", str(base_folder), "--outfile", str(new), "--outtype", "f32"]
        _convert("convert_lora_to_gguf.py", *command)
    return Path(file)


def _convert(script: str, *arguments: str, split: str = "") -> None:
    folder = fetch_converter()
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'gguf-py'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", DRIVER, str(folder / script), split, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if "NotImplementedError: BPE pre-tokenizer" in done.stdout:
        raise RuntimeError(f"llama.cpp knows no tokenizer that cuts texts as that of {arguments[0]} does")
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def _compare_tokens(gguf: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    chat = [
        {"role": "user", "content": TEXTS[1]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "2"},
    ]
    with serve(gguf, n_ctx=256, parallel=1) as server:
        for text in (*TEXTS, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)):
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
            with urllib.request.urlopen(server.url.removesuffix("v1") + "tokenize", body) as answer:
                got = json.load(answer)["tokens"]
            if got != wanted:
                raise RuntimeError(
                    f"llama.cpp reads {text!r} as {got}, transformers as {wanted}: the served model would see other "
                    "tokens than it was trained on. Is tokenizer.json damaged, or saved by a GGUF import?"
                )


def _quantize_q4_0(source: Path, target: Path) -> None:
    """An F16 file's matrices in blocks of 32 weights, one fp16 scale and 32 codes; embedding and output get Q8_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
        elif name != "general.architecture" and not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if kind == GGMLQuantizationType.F16:
            wide = tensor.name in ("token_embd.weight", "output.weight")
            kind = GGMLQuantizationType.Q8_0 if wide else GGMLQuantizationType.Q4_0
            data = quantize(dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(gguf: str | Path, tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> Path:
    """Ollama's Modelfile for a GGUF file: `ollama create NAME -f Modelfile`.

    Its template is taken from what the tokenizer renders, for templates like ChatML and Llama 3: each message is opened
    with its role and closed the same way. What comes before (a default system turn, Llama 3.1's dates) is copied as it is
    today. Three conversations put together from these pieces must be the tokenizer's prompts. Ollama itself never ran: the
    tests render the file with a small Go template reader of ours. Go cannot strip blanks around a message, as Llama 3 does.

    Raises ValueError for another template: Mistral and DeepSeek (no end after a user's turn), Gemma (no system turn).
    """

    def prompt(*messages: dict, start: bool = True) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=start)
        return text.removeprefix(bos)

    bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""  # Ollama puts it first
    system, user, bot = ({"role": role, "content": f"What {role} says."} for role in ("system", "user", "assistant"))
    wrong = "the chat template is none of {opened with the role} message {closed alike}, as ChatML and Llama 3"
    try:
        opened = prompt(user)[len(prompt(user, start=False)) :]
        before, closed = prompt(user, start=False).split(user["content"])
        system_opened = prompt(system, user).split(system["content"])[0]
    except Exception as error:
        raise ValueError(f"{wrong}: {error}") from error
    default = before.removesuffix(opened.replace("assistant", "user"))

    def joined(*messages: dict) -> str:
        text = "" if messages[0] is system else default
        for message in messages:
            text += system_opened if message is system else opened.replace("assistant", message["role"])
            text += message["content"] + closed
        return text + opened

    for messages in ((user,), (system, user), (user, bot, user), (system, user, bot, user)):
        if joined(*messages) != prompt(*messages) or not closed.strip():
            raise ValueError(f"{wrong}: wanted\n{prompt(*messages)!r}, got\n{joined(*messages)!r}")
    role = opened.replace("assistant", "{{ .Role }}")
    if system_opened != opened.replace("assistant", "system"):
        role = f'{{{{ if eq .Role "system" }}}}{system_opened}{{{{ else }}}}{role}{{{{ end }}}}'
    if default:
        default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{default}{{{{ end }}}}'
    template = f"{default}{{{{ range .Messages }}}}{role}{{{{ .Content }}}}{closed}{{{{ end }}}}{opened}"
    path = os.path.relpath(gguf, folder)
    lines = [f"FROM {path if path.startswith('..') else './' + path}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{closed.strip()}"', "PARAMETER temperature 0", "PARAMETER num_ctx 2048"]
    with whole(Path(folder) / "Modelfile") as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(folder) / "Modelfile"


def model_card(
    folder: str | Path,
    base_model: str,
    license: str,
    datasets: list[str],
    tags: list[str],
    training: dict,
    scores: dict,
    limits: str,
) -> Path:
    """README.md of an adapter or model folder, in the form that the Hugging Face hub reads; replaces PEFT's empty one.

    training: facts by name (rows, steps, learning rate, seed, hardware). scores: {name: anything with mean, low, high},
    the model's own first, then the controls. limits: what it cannot do, in sentences.
    """
    from huggingface_hub import ModelCardData

    library = "peft" if (Path(folder) / "adapter_config.json").is_file() else "transformers"
    data = ModelCardData(base_model=base_model, license=license, datasets=datasets, tags=tags, library_name=library)
    facts = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    rows = "\n".join(f"| {name} | {s.mean:.1%} | {s.low:.1%} to {s.high:.1%} |" for name, s in scores.items())
    with whole(Path(folder) / "README.md") as new:
        new.write_text(
            f"---\n{data.to_yaml()}\n---\n\n# {Path(folder).resolve().name}\n\nMade from {base_model}.\n\n"
            f"## Training\n\n| | |\n|---|---|\n{facts}\n\n"
            f"## Scores\n\n| | score | 95 % interval |\n|---|---|---|\n{rows}\n\n## Limits\n\n{limits}\n",
            encoding="utf-8",
        )
    return Path(folder) / "README.md"


@contextlib.contextmanager
def whole(file: str | Path) -> Iterator[Path]:
    """A path to write to, beside `file`: takes its place at the end, and is gone if anything fails.

    What a killed process left there is removed. Raises FileExistsError if `file` is a folder, OSError if the disk is full.
    """
    file = Path(file)
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder, wanted the name of a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{glob.escape(file.name)}-????????.part"):
        shutil.rmtree(left)
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-", suffix=".part") as scratch:
            yield Path(scratch) / file.name
            os.replace(Path(scratch) / file.name, file)
    except Exception as error:
        if "No space left" in str(error):  # also in the converter's last words
            free = shutil.disk_usage(file.parent).free / 1e6
            raise OSError(28, f"{file} was not written: the disk is full ({free:.0f} MB are free there)") from error
        raise


if __name__ == "__main__":
    print(f"llama.cpp's converter is ready in {fetch_converter()}")
