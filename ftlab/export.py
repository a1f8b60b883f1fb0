"""What no library has between a trained model and a server: GGUF files, Ollama's Modelfile, the model card.

Merging needs nothing of ours, if it is done into the weights that the adapter was trained on: after QLoRA into
AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, quantization_config=BNB).dequantize(). The 16-bit BASE
gives other logits. So does a merge into 4-bit layers: PEFT rounds the sum to 4 bits again (tests/test_export.py).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from filelock import FileLock

from ftlab.data import fingerprint
from ftlab.models import pip_download
from ftlab.paths import CACHE, DATA, LLAMA_CPP
from ftlab.serve import serve

LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER = ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/")
TEXTS = (
    "Order 618347 cost ₹1,299.00 at 10:45,\r\n  and 12345678 more.\n\n\n\tIt's WE'LL ... x²=½; total:  12",
    "SELECT count(*) FROM orders WHERE city='Pune' AND minutes>45 -- naïve Straße Łódź “quoted” — dash…   ",
    "मेरा ऑर्डर कहाँ है? 我想退款。 Где мой заказ №48? 😀👩🏽‍🚀",
)


def fetch_converter(cache: Path = CACHE) -> Path:
    """The folder with llama.cpp's own converter, from the source package of llama-cpp-python (77 MB, fetched once).

    Of it the regular files of CONVERTER are written. Raises tarfile.FilterError if one leads out of the folder.
    """
    if (cache / LLAMA_CPP).is_dir():  # in a cache that one may only read, too
        return cache / LLAMA_CPP
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "llama.cpp.lock"), tempfile.TemporaryDirectory(dir=cache) as scratch:
        if not (cache / LLAMA_CPP).is_dir():  # another version has another folder
            sdist = pip_download(LLAMA_CPP, LLAMA_CPP_SHA256, Path(scratch), "--no-binary", "llama-cpp-python")
            with tarfile.open(sdist) as archive:
                for file in archive:
                    _, _, name = file.name.partition("/vendor/llama.cpp/")
                    if file.isfile() and name.startswith(CONVERTER):
                        archive.extract(file.replace(name=name), Path(scratch) / "llama.cpp", filter="data")
            os.replace(Path(scratch) / "llama.cpp", cache / LLAMA_CPP)
    return cache / LLAMA_CPP


def to_gguf(model: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """A GGUF file of a model folder (or hub id). kind: "f16", "q8_0" (8.5 bits a weight) or "q4_0" (4.5 bits).

    q4_0 keeps embedding and output in q8_0, as `llama-quantize` does for SmolLM2. Raises ValueError for another kind,
    no chat template or no weights; RuntimeError if llama.cpp's converter fails, if neither it nor `split_of` knows the
    tokenizer, or if it reads other token ids.
    """
    from transformers import AutoTokenizer

    if kind not in ("f16", "q8_0", "q4_0"):
        raise ValueError(f'got {kind!r}, wanted "f16", "q8_0" or "q4_0"')
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {model} has no chat template: save the one that was trained with")
    folder = _folder(model, ["*.json", "model*.safetensors", "*.model", "*.jinja"])
    if not all(any(Path(folder).glob(name)) for name in ("config.json", "model*.safetensors")):
        raise ValueError(f"{folder} lacks config.json or model*.safetensors: an adapter has to be merged first")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as scratch:
        part = Path(scratch) / "model.gguf"  # takes the file's place once it is whole
        _convert("convert_hf_to_gguf.py", kind, {part: [folder]})
        _compare_tokens(part, tokenizer)
        return part.replace(file)


def adapters_to_gguf(adapters: Mapping[str, str | Path], base: str | Path, folder: str | Path) -> list[Path]:
    """Adapters alone, in fp32, as folder/NAME.gguf: for `serve(base_gguf, lora=files)`.

    adapters: {name: PEFT folder}; base: a folder or hub id. One process converts all: its imports take the longest.
    Raises ValueError for rsLoRA and alpha_pattern, of whose scaling llama.cpp knows nothing.
    """
    for name, path in adapters.items():
        config = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        if odd := [key for key in ("use_rslora", "alpha_pattern") if config.get(key)]:
            raise ValueError(f"{name} has {odd[0]}, and llama.cpp scales all by lora_alpha / r: merge it into the base")
    base = _folder(base, ["config.json"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = {Path(scratch) / f"{name}.gguf": [str(path), "--base", base] for name, path in adapters.items()}
        _convert("convert_lora_to_gguf.py", "f32", parts)
        return [part.replace(Path(folder) / part.name) for part in parts]


def _folder(model: str | Path, files: list[str]) -> str:
    """The model's folder: itself, or for a hub id the one in Hugging Face's cache, with the files of these patterns."""
    from huggingface_hub import snapshot_download

    return str(model) if os.path.isdir(model) else snapshot_download(str(model), allow_patterns=files)


def _convert(script: str, kind: str, runs: Mapping[Path, list[str]]) -> None:
    """Runs llama.cpp's script in a process of its own, {file to write: arguments}."""
    folder, outtype = fetch_converter(), kind.replace("q4", "q8")
    calls = [[*arguments, "--outfile", str(file), "--outtype", outtype] for file, arguments in runs.items()]
    path = os.pathsep.join(map(str, (folder, folder / "gguf-py", Path(__file__).parents[1])))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "ftlab.export", str(folder / script), kind, json.dumps(calls)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{script} ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split_by(regex: str) -> list[dict]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, GPT2 | {"use_regex": False}]


SPLITS = {  # llama.cpp's name -> how tokenizer.json says that a text is cut before any merge, and the merges' settings
    "gpt-2": ([GPT2], {"type": "BPE"}),
    "smollm": ([{"type": "Digits", "individual_digits": True}, GPT2], {"type": "BPE"}),
    "qwen2": (_split_by(QWEN2_REGEX), {"type": "BPE"}),
    "llama-bpe": (_split_by(LLAMA3_REGEX), {"type": "BPE", "ignore_merges": True}),
}


def split_of(spec: dict) -> str:
    """llama.cpp's name for the way in which a tokenizer, the content of its tokenizer.json, cuts a text.

    For a vocabulary of one's own, whose checksum llama.cpp's converter lacks: the name does not depend on the
    vocabulary, so it is read off the settings. All of them have to be those of SPLITS; nothing is guessed. What counts
    is the tokenizer as transformers has loaded it: of `micro` it drops the cut around digits that the file has.
    Raises NotImplementedError for others. tests/test_export.py asks llama.cpp for the ids of drawn texts.
    """
    parts = (spec["pre_tokenizer"] or {}).get("pretokenizers", [spec["pre_tokenizer"]])
    merges = {key: value for key, value in spec["model"].items() if value and key not in ("vocab", "merges")}
    for name, wanted in SPLITS.items():
        if (parts, merges) == wanted and not spec["normalizer"]:
            return name
    raise NotImplementedError(
        f"llama.cpp's converter does not know this tokenizer: got normalizer {spec['normalizer']}, pre-tokenizer "
        f"{parts} and model {merges}, wanted a vocabulary that it knows by its checksum, or the settings of "
        f"{' or '.join(SPLITS)}, to the letter. Is the model newer than this llama.cpp, or was its tokenizer changed? "
        "A name that is nearly right gives other token ids, and no error. Convert it with a newer llama.cpp"
    )


def _run_converter(script: str, kind: str, calls: str) -> None:
    """llama.cpp's script, with two things more: `split_of` a vocabulary of one's own, and q4_0 in place of q8_0."""
    sys.modules["torchvision"] = None  # it would be imported, and nothing here needs it
    import gguf
    from conversion.base import ModelBase, TextModel

    known, file_type = TextModel.get_vocab_base_pre, gguf.GGUFWriter.add_file_type

    def get_vocab_base_pre(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if not hasattr(tokenizer, "backend_tokenizer"):
                raise
            return split_of(json.loads(tokenizer.backend_tokenizer.to_str()))

    def tensor_force_quant(self, name, new_name, bid, n_dims):  # the layers' matrices, but not a router's
        return n_dims > 1 and bid is not None and "_inp" not in new_name and gguf.GGMLQuantizationType.Q4_0

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    if kind == "q4_0":
        ModelBase.tensor_force_quant = tensor_force_quant
        gguf.GGUFWriter.add_file_type = lambda self, _: file_type(self, gguf.LlamaFileType.MOSTLY_Q4_0)
    for arguments in json.loads(calls):
        sys.argv = [script, *arguments]
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
                raise RuntimeError(f"at {tokenizer.decode(wanted[:n])[-40:]!r} llama.cpp reads {theirs}, not {ours}")


def modelfile(gguf: str | Path, tokenizer, folder: str | Path) -> Path:
    """Ollama's Modelfile for a GGUF file: `ollama create NAME -f Modelfile`.

    For chat templates like ChatML's and Llama 3's: each message opened with its role, all closed alike; ValueError or
    jinja2's TemplateError for others. What the template adds (a default system turn, dates) is copied as of today.
    Ollama itself never ran: the tests render the file with a small reader of Go's templates.
    """
    bos = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""  # Ollama puts it first

    def prompt(*messages: dict, begun: bool = True) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun).removeprefix(bos)

    system, user, bot = ({"role": role, "content": f"The {role}'s."} for role in ("system", "user", "assistant"))
    start = prompt(user).removeprefix(prompt(user, begun=False))
    before, end = prompt(user, begun=False).split(user["content"])
    opening = {role: start.replace("assistant", role) for role in ("system", "user", "assistant")}
    default, system_start = before.removesuffix(opening["user"]), prompt(system, user).split(system["content"])[0]
    for messages in ((user,), (system, user), (user, bot, user), (system, user, bot, user)):
        turns = [(system_start if m is system else opening[m["role"]]) + m["content"] + end for m in messages]
        made = "".join([default * (messages[0] is not system), *turns, start])
        if made != prompt(*messages) or not end.strip() or "{{" in default + system_start:
            raise ValueError(f"no template like ChatML's or Llama 3's: wanted {prompt(*messages)!r}")
    opened = start.replace("assistant", "{{ .Role }}")
    if system_start != opening["system"]:
        opened = '{{ if eq .Role "system" }}' + system_start + "{{ else }}" + opened + "{{ end }}"
    if default:
        default = '{{ if ne (index .Messages 0).Role "system" }}' + default + "{{ end }}"
    template = default + "{{ range .Messages }}" + opened + "{{ .Content }}" + end + "{{ end }}" + start
    file = Path(folder) / "Modelfile"
    file.write_text(
        f'FROM ./{os.path.relpath(gguf, folder)}\nTEMPLATE """{template}"""\n'
        f'PARAMETER stop "{end.strip()}"\nPARAMETER temperature 0\nPARAMETER num_ctx 2048\n',
        encoding="utf-8",
    )
    return file


# --- The model card ---------------------------------------------------------------------------------------------------

OURS = {  # a model of the course -> its name, its licence, what was done to its weights before
    CACHE / "smollm2": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "The weights of the base were once rounded to 4 bits (Q4_1).",
    ),
    DATA / "micro" / "model": ("micro", "apache-2.0", ""),
}


def card_of(
    facts: dict,
    base: str | Path,
    folder: str | Path,
    scores: dict,
    limits: str,
    licence: str | None = None,
) -> Path:
    """The model card of a run, README.md in the folder of the merged model.

    facts: what `run_of` gave before the trainer was freed, and whatever else belongs into the table.
    Name and licence are read off `base`, a folder or a hub id. scores: {name: Score}, controls
    last. Raises ValueError if there are no scores, and where no licence can be read or is given: a
    card with a guess is worse than no card.
    """
    if not scores:
        raise ValueError("got no scores: a card without any says nothing; want {name: Score}")
    notes = filter(None, (limits, _before(base), _rounding(facts.get("base in", ""))))
    return model_card(folder, base_of(base, licence), facts, scores, " ".join(notes))


def revision_of(base: str | Path, model) -> str:
    """The hub's commit of a base; of a folder that is none of the hub's, the SHA-256 of its weights."""
    cached = re.search(r"models--[^/]+/snapshots/([^/]+)", Path(base).as_posix() + "/")
    if cached:
        return cached[1]
    weights = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    if not weights:
        return getattr(model.config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256()
    for file in weights:
        digest.update(_sha256(file))
    return f"weights with SHA-256 {digest.hexdigest()[:12]}"


def sha256_of(file: str | Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256: which weights were scored."""
    return _sha256(Path(file)).hex()[:12]


def _sha256(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def base_of(model: str | Path, licence: str | None = None):
    """A ModelCardData with a model's name as base_model and its licence, given or as its card says.

    The card is the README.md of a folder, or that of a hub id. "other" keeps the licence's name and
    link. Raises ValueError where there is no card, or no licence in it.
    """
    from huggingface_hub import ModelCardData

    for path, (name, its_licence, _) in OURS.items():
        if Path(model).resolve() == path.resolve():
            return ModelCardData(base_model=name, license=licence or its_licence)
    name = _name(model)
    if licence:
        return ModelCardData(base_model=name, license=licence)
    card, why = _card(model)
    if card is None or not card.license:
        raise ValueError(
            f"the licence of {name} cannot be read ({why}). Look it up with its authors and give it "
            "as licence=..., a name of huggingface.co/docs/hub/repositories-licenses"
        )
    data = ModelCardData(base_model=name, license=card.license)
    data.license_name, data.license_link = card.license_name, card.license_link  # of "other"
    return data


def _name(model: str | Path) -> str:
    """A hub id, where the folder is one of the hub's cache; else the folder's name, or the id given."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", Path(model).as_posix() + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def _card(model: str | Path) -> tuple:
    """(the data of a model's card or None, why there is none)."""
    from huggingface_hub import ModelCard

    file = Path(model) / "README.md"
    if Path(model).is_dir() and not file.is_file():
        return None, "its folder has no README.md"
    try:
        card = ModelCard.load(file if file.is_file() else str(model))
    except (OSError, ValueError) as error:  # no such model, no network, no YAML
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return card.data, "its card names none"


def run_of(trainer, base: str | Path, rows: list[dict] | None = None) -> dict:
    """What a trainer knows of its run, for the card; its model may be freed afterwards.

    rows: those that were trained on, for their hash. The seed is the one that ordered the rows.
    Raises ValueError for as many rows as the trainer has not.
    """
    args, state = trainer.args, trainer.state
    adapter = getattr(trainer.model, "peft_config", {}).get("default")
    found = {"rows": len(trainer.train_dataset)}
    if rows is not None:
        if len(rows) != found["rows"]:
            raise ValueError(f"got {len(rows)} rows, but {found['rows']} were trained on: which ones?")
        found["rows"] = f"{len(rows)} (SHA-256 {fingerprint(rows)})"
    found["rows a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
    best = state.best_global_step
    kept = f"step {best} kept, the best on validation" if best else "the last one kept"
    found["steps"] = f"{state.global_step}, {kept}"
    found["learning rate"] = args.learning_rate
    if adapter:
        found |= {"rank": adapter.r, "alpha": adapter.lora_alpha}
    found["seed"] = args.seed
    if args.data_seed is not None:
        found["seed of the rows"] = args.data_seed
    found["base in"] = _number_format(trainer.model)
    found["revision of the base"] = revision_of(base, trainer.model)
    template = getattr(trainer.processing_class, "chat_template", None) or ""
    found["chat template"] = f"SHA-256 {hashlib.sha256(template.encode()).hexdigest()[:12]}"
    return found | {"trained on": _hardware(), "with": _versions()}


def _hardware() -> str:
    """The card, or the processor's kind and how many threads torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"a CPU ({platform.machine()}), {threads} thread{'s' * (threads > 1)}"


def _versions() -> str:
    packages = ("trl", "peft", "transformers", "torch", "bitsandbytes")
    known = {one.metadata["Name"].lower() for one in importlib.metadata.distributions()}
    return ", ".join(f"{one} {importlib.metadata.version(one)}" for one in packages if one in known)


def _number_format(model) -> str:
    """How the frozen weights are held: "float32", "bfloat16", "4 bits (nf4)"."""
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is None:
        frozen = (p for p in model.parameters() if not p.requires_grad)
        return str(next(frozen, next(model.parameters())).dtype).removeprefix("torch.")
    how = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if how.get("load_in_4bit"):
        return f"4 bits ({how.get('bnb_4bit_quant_type')})"
    return "8 bits" if how.get("load_in_8bit") else f"the format of {how.get('quant_method')}"


def _before(base: str | Path) -> str:
    """What had been done to the weights of a model of the course; of others nothing is known."""
    notes = {path.resolve(): note for path, (_, _, note) in OURS.items()}
    return notes.get(Path(base).resolve(), "")


def _rounding(held: str) -> str:
    """held: what `_number_format` says."""
    if not held or "float" in held:
        return ""
    return f"The base was held in {held} while the adapter was trained on it."


def model_card(folder: str | Path, data, training: dict, scores: dict, limits: str) -> Path:
    """README.md of a model's folder for the Hugging Face hub, in the place of the library's empty one.

    data: a huggingface_hub.ModelCardData. training: facts by name. scores: {name: Score}, controls last. limits: text.
    """
    facts = "\n".join(f"| {name} | {_cell(value)} |" for name, value in training.items())
    rows = "\n".join(f"| {name} | {s.mean:.1%} | {s.low:.1%} to {s.high:.1%} |" for name, s in scores.items())
    file, title = Path(folder) / "README.md", f"{data.base_model.rpartition('/')[2]}, fine-tuned"
    file.write_text(
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nMade from {data.base_model}.\n\n"
        f"## Training\n\n| | |\n|---|---|\n{facts}\n\n"
        f"## Scores\n\n| | score | 95 % interval |\n|---|---|---|\n{rows}\n\n## Limits\n\n{limits}\n",
        encoding="utf-8",
    )
    return file


def _cell(value: object) -> str:
    """A value that stays in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:]:
        _run_converter(*sys.argv[1:])
    else:
        print(f"llama.cpp's converter is ready in {fetch_converter()}")
