"""What no library has between a trained model and a server: GGUF files, Ollama's Modelfile, the model card.

Merging needs nothing of ours, if it is done into the weights that the adapter was trained on:

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)  # LoRA. For QLoRA these two instead:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, quantization_config=BNB).dequantize()
    model = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(safe_merge=True)
    model.save_pretrained(FOLDER), tokenizer.save_pretrained(FOLDER)

After QLoRA, the 16-bit BASE gives other logits. So does a merge into 4-bit layers: PEFT rounds the sum to 4 bits again.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

from ftlab.models import pip_download
from ftlab.paths import CACHE
from ftlab.serve import serve

LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_ROOT = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
CONVERTER = ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/")

SPLITS = {  # how tokenizer.json cuts a text -> llama.cpp's name for it, for vocabularies that it knows no checksum of
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "ByteLevel",
    ): "llama-bpe",
    ("Digits", "ByteLevel"): "smollm",
    ("ByteLevel",): "gpt-2",
}
TEXTS = (
    "Order 618347 cost ₹1,299.00 at 10:45,\r\n  and 12345678 more.\n\n\n\tIt's WE'LL ... x²=½; total:  12",
    "SELECT count(*) FROM orders WHERE city='Pune' AND minutes>45 -- naïve Straße Łódź “quoted” — dash…   ",
    "मेरा ऑर्डर कहाँ है? 我想退款。 Где мой заказ №48? 😀👩🏽‍🚀",
)


def fetch_converter(cache: Path = CACHE) -> Path:
    """The folder with llama.cpp's own converter, from the source package of llama-cpp-python (77 MB, fetched once).

    Raises RuntimeError if the package index cannot be reached or the checksum differs. Nothing half-made stays behind.
    """
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "llama.cpp.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not (cache / "llama.cpp").is_dir():
            sdist = pip_download(LLAMA_CPP, LLAMA_CPP_SHA256, Path(scratch), "--no-binary", "llama-cpp-python")
            extract_converter(sdist, Path(scratch) / "llama.cpp")
            os.replace(Path(scratch) / "llama.cpp", cache / "llama.cpp")
    return cache / "llama.cpp"


def extract_converter(sdist: Path, folder: Path) -> None:
    """Writes the regular files of CONVERTER. Raises tarfile.FilterError if one leads out of the folder."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(LLAMA_CPP_ROOT)
            if member.isfile() and name != member.name and name.startswith(CONVERTER):
                archive.extract(member.replace(name=name), folder, filter="data")


def _folder(model: str | Path) -> Path:
    """The model's folder: itself, or the one in Hugging Face's cache for a hub id."""
    from transformers.utils import cached_file

    return Path(model) if Path(model).is_dir() else Path(cached_file(str(model), "config.json")).parent


def to_gguf(model: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """A GGUF file of a model folder (or hub id). kind: "f16", "q8_0" (8.5 bits a weight) or "q4_0" (4.5 bits).

    llama.cpp must read TEXTS and a chat as the token ids of transformers: other ids would be other inputs than in
    training. q4_0 keeps embedding and output in q8_0, as `llama-quantize` does for SmolLM2.

    Raises ValueError for another kind, an incomplete folder, a tokenizer without chat template; RuntimeError if the
    converter fails or the ids differ.
    """
    from transformers import AutoTokenizer

    if kind not in ("f16", "q8_0", "q4_0"):
        raise ValueError(f"kind: got {kind!r}, wanted 'f16', 'q8_0' or 'q4_0'")
    folder = _folder(model)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}: merge an adapter first, then save model and tokenizer there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {folder} has no chat template: save the one that was trained with")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {"type": "none"}
    parts = [part.get("pattern", {}).get("Regex") or part["type"] for part in spec.get("pretokenizers", [spec])]
    with whole(file) as new:
        _convert("convert_hf_to_gguf.py", kind, SPLITS.get(tuple(parts), ""), [[str(folder), "--outfile", str(new)]])
        _compare_tokens(new, tokenizer)
    return Path(file)


def adapters_to_gguf(adapters: Mapping[str, str | Path], base: str | Path, folder: str | Path) -> list[Path]:
    """Adapters alone, in fp32, as folder/NAME.gguf: for `serve(base_gguf, lora=files)`.

    adapters: {name: PEFT folder}; base: a folder or hub id. One process converts all: its imports take the longest.
    """
    files, runs = [Path(folder) / f"{name}.gguf" for name in adapters], []
    with contextlib.ExitStack() as stack:
        for file, adapter in zip(files, adapters.values(), strict=True):
            new = stack.enter_context(whole(file))
            runs.append([str(adapter), "--base", str(_folder(base)), "--outfile", str(new)])
        _convert("convert_lora_to_gguf.py", "f32", "", runs)
    return files


def _convert(script: str, kind: str, split: str, runs: list[list[str]]) -> None:
    """Runs llama.cpp's script in a process of its own, once for each list of arguments."""
    folder = fetch_converter()
    path = os.pathsep.join(map(str, (folder, folder / "gguf-py", Path(__file__).parents[1])))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "ftlab.export", str(folder / script), kind, split, json.dumps(runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def _run_converter(script: str, kind: str, split: str, runs: str) -> None:
    """llama.cpp's script, with two things more: `split` for an unknown vocabulary, and q4_0 in the place of q8_0."""
    import gguf
    from conversion.base import ModelBase, TextModel

    known, file_type = TextModel.get_vocab_base_pre, gguf.GGUFWriter.add_file_type

    def get_vocab_base_pre(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if not split:
                raise
            return split

    def tensor_force_quant(self, name, new_name, bid, n_dims):  # the layers' matrices, but not a router's
        return n_dims > 1 and bid is not None and "_inp" not in new_name and gguf.GGMLQuantizationType.Q4_0

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    if kind == "q4_0":
        ModelBase.tensor_force_quant = tensor_force_quant
        gguf.GGUFWriter.add_file_type = lambda self, _: file_type(self, gguf.LlamaFileType.MOSTLY_Q4_0)
    for arguments in json.loads(runs):
        sys.argv = [script, *arguments, "--outtype", kind.replace("q4", "q8")]
        runpy.run_path(script, run_name="__main__")


def _compare_tokens(gguf: Path, tokenizer) -> None:
    chat = [{"role": role, "content": TEXTS[1]} for role in ("user", "assistant", "user")]
    with serve(gguf, n_ctx=256, parallel=1) as server:
        for text in (*TEXTS, tokenizer.apply_chat_template(chat, tokenize=False)):
            body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
            with urllib.request.urlopen(server.url.removesuffix("v1") + "tokenize", body) as answer:
                got, wanted = json.load(answer)["tokens"], tokenizer(text, add_special_tokens=False)["input_ids"]
            if got != wanted:
                n = [a == b for a, b in zip_longest(got, wanted)].index(False)
                theirs, ours = (tokenizer.convert_ids_to_tokens(ids[n : n + 5]) for ids in (got, wanted))
                raise RuntimeError(
                    f"after {tokenizer.decode(wanted[:n])[-40:]!r} llama.cpp reads {theirs}, transformers {ours}. Is "
                    "tokenizer.json damaged? Llama 2, Mistral and Gemma also need tokenizer.model in the folder."
                )


def modelfile(gguf: str | Path, tokenizer, folder: str | Path) -> Path:
    """Ollama's Modelfile for a GGUF file: `ollama create NAME -f Modelfile`.

    For chat templates like ChatML's and Llama 3's: each message opened with its role, all closed alike. What the
    template adds (a default system turn, Llama 3.1's dates) is copied as of today. For four conversations the pieces
    must make the tokenizer's prompts. Ollama itself never ran: the tests render the file with a small reader of Go's
    templates. Go cannot strip blanks around a message, as Llama 3's template does.

    Raises ValueError for others: Mistral and DeepSeek (no end of a user's turn), Gemma (no system turn).
    """
    bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""  # Ollama puts it first

    def prompt(*messages: dict, begun: bool = True) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun).removeprefix(bos)

    def joined(*messages: dict) -> str:
        opened = [system_start if m is system else start.replace("assistant", m["role"]) for m in messages]
        turns = [o + m["content"] + end for o, m in zip(opened, messages, strict=True)]
        return "".join([default * (messages[0] is not system), *turns, start])

    system, user, bot = ({"role": role, "content": f"The {role}'s."} for role in ("system", "user", "assistant"))
    try:
        start = prompt(user).removeprefix(prompt(user, begun=False))
        before, end = prompt(user, begun=False).split(user["content"])
        system_start = prompt(system, user).split(system["content"])[0]
        default = before.removesuffix(start.replace("assistant", "user"))
        for messages in ((user,), (system, user), (user, bot, user), (system, user, bot, user)):
            if joined(*messages) != prompt(*messages) or not end.strip() or "{{" in default + system_start:
                raise ValueError(f"got {joined(*messages)!r}, wanted {prompt(*messages)!r}")
    except Exception as error:
        raise ValueError(f"Ollama cannot have a chat template unlike ChatML's and Llama 3's: {error}") from error
    opened = start.replace("assistant", "{{ .Role }}")
    if system_start != start.replace("assistant", "system"):
        opened = '{{ if eq .Role "system" }}' + system_start + "{{ else }}" + opened + "{{ end }}"
    if default:
        default = '{{ if ne (index .Messages 0).Role "system" }}' + default + "{{ end }}"
    template = default + "{{ range .Messages }}" + opened + "{{ .Content }}" + end + "{{ end }}" + start
    path, file = os.path.relpath(gguf, folder), Path(folder) / "Modelfile"
    text = f'FROM {path if path.startswith("..") else "./" + path}\nTEMPLATE """{template}"""\n'
    text += f'PARAMETER stop "{end.strip()}"\nPARAMETER temperature 0\nPARAMETER num_ctx 2048\n'
    file.write_text(text, encoding="utf-8")
    return file


def model_card(folder: str | Path, data, training: dict, scores: dict, limits: str) -> Path:
    """README.md of an adapter or model folder for the Hugging Face hub, in the place of the library's empty one.

    data: huggingface_hub.ModelCardData(base_model, license, datasets, tags, library_name). training: facts by name,
    seed and hardware among them. scores: {name: Score or anything with mean, low, high}, the model's own first, then
    the controls. limits: what it cannot do, in sentences.
    """
    facts = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    rows = "\n".join(f"| {name} | {s.mean:.1%} | {s.low:.1%} to {s.high:.1%} |" for name, s in scores.items())
    file = Path(folder) / "README.md"
    file.write_text(
        f"---\n{data.to_yaml()}\n---\n\n# {Path(folder).resolve().name}\n\nMade from {data.base_model}.\n\n"
        f"## Training\n\n| | |\n|---|---|\n{facts}\n\n"
        f"## Scores\n\n| | score | 95 % interval |\n|---|---|---|\n{rows}\n\n## Limits\n\n{limits}\n",
        encoding="utf-8",
    )
    return file


@contextlib.contextmanager
def whole(file: str | Path) -> Iterator[Path]:
    """A path beside `file`, whose place it takes at the end: a killed process leaves the old file or none."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        _run_converter(*sys.argv[1:])
    else:
        print(f"llama.cpp's converter is ready in {fetch_converter()}")
