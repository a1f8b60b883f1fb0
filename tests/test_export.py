"""ftlab.export: merges against logits, files read back with gguf, token ids and answers against transformers."""

import gc
import io
import json
import random
import re
import shutil
import tarfile
import urllib.request
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.utils import filter_repo_objects
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ftlab import export
from ftlab.evaluate import wilson_interval
from ftlab.models import model_path
from ftlab.paths import DATA
from ftlab.serve import serve

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where is order 618347?"}
BOT = {"role": "assistant", "content": "On its way."}
BNB = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def with_tokenizer(folder: Path, llama: Path, pre_tokenizer: dict, **model) -> Path:
    """The tiny model with a tokenizer.json that cuts texts in another way. model: settings of the merges."""
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spec = json.loads((folder / "tokenizer.json").read_text())
    changed = {"pre_tokenizer": pre_tokenizer, "model": spec["model"] | model}
    (folder / "tokenizer.json").write_text(json.dumps(spec | changed))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}


@pytest.fixture(scope="module")
def digits(llama, tmp_path_factory) -> Path:
    """The folder of the tiny model whose tokenizer cuts around every digit, as SmolLM2's does."""
    return with_tokenizer(tmp_path_factory.mktemp("digits") / "llama", llama, DIGITS, ignore_merges=False)


@pytest.fixture(scope="module")
def ggufs(gguf, digits, tmp_path_factory) -> dict[str, Path]:
    """The same weights twice; in q4_0 with the other tokenizer. And `micro`, of which q8_0 will do."""
    folder = tmp_path_factory.mktemp("gguf")
    q4_0 = export.to_gguf(digits, folder / "llama-q4_0.gguf", "q4_0")
    return {"f16": gguf, "q4_0": q4_0, "q8_0": export.to_gguf(model_path("micro"), folder / "micro.gguf", "q8_0")}


# --- Merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, BNB])
def test_a_merge_belongs_on_the_weights_that_were_trained_on(quantization, llama, tmp_path):
    """Merged logits = base + adapter logits. After QLoRA neither the 16-bit base nor the 4-bit layers give them."""
    options = {"dtype": torch.float32, **({"quantization_config": quantization} if quantization else {})}
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, **options), config)
    trained.train()  # in eval mode bitsandbytes multiplies in bf16, where the CPU has it
    trained.save_pretrained(tmp_path / "adapter")
    input_ids = torch.arange(5, 45)[None]
    wanted = trained(input_ids).logits

    def off(model) -> float:
        """By how much the logits differ once the adapter is merged into `model`."""
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload(safe_merge=True).eval()
        model.save_pretrained(tmp_path / "merged")
        return (model(input_ids).logits - wanted).abs().max().item()

    if quantization:
        assert off(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)) > 0.5  # the largest logit is 4
        with pytest.warns(UserWarning, match="rounding errors"):
            assert off(AutoModelForCausalLM.from_pretrained(llama, **options)) > 0.5
        assert off(AutoModelForCausalLM.from_pretrained(llama, **options).dequantize()) < 1e-4
    else:
        assert off(AutoModelForCausalLM.from_pretrained(llama, **options)) < 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (again(input_ids).logits - wanted).abs().max() < 1e-4


# --- The converter ----------------------------------------------------------------------------------------------------


ROOT_OF_IT = "llama_cpp_python-0.3.36/vendor/llama.cpp/"


def sdist(file: Path, evil: str | None = None) -> Path:
    """A source package with the converter's files, others, and links and a device that must not be written."""
    names = [
        "convert_hf_to_gguf.py",
        "conversion/base.py",
        "gguf-py/gguf/__init__.py",
        "src/llama.cpp",
        "conversions.py",
    ]
    with tarfile.open(file, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"{ROOT_OF_IT}{name}"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"{ROOT_OF_IT}gguf-py/link{kind[0]}")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
        archive.addfile(tarfile.TarInfo("/etc/conversion/evil.py"))
        if evil:
            member = tarfile.TarInfo(evil)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    return file


def test_the_converter_is_fetched_once_and_only_its_files_are_written(tmp_path, monkeypatch):
    asked = []

    def pip_download(requirement, sha256, folder, *flags):
        asked.append((requirement, sha256))
        return sdist(folder / "llama_cpp_python-0.3.36.tar.gz")

    monkeypatch.setattr(export, "pip_download", pip_download)
    assert export.fetch_converter(tmp_path / "cache") == export.fetch_converter(tmp_path / "cache")
    assert asked == [("llama-cpp-python==0.3.36", export.LLAMA_CPP_SHA256)]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    wanted = {"convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py"}
    assert files == {f"cache/{export.LLAMA_CPP}/{name}" for name in wanted} | {"cache/llama.cpp.lock"}


@pytest.mark.parametrize("way", ["offline", "gguf-py/../../../../evil.py", "gguf-py//../../evil.py"])
def test_a_download_that_fails_or_leads_out_of_its_folder_leaves_no_converter(way, tmp_path, monkeypatch):
    def pip_download(requirement, sha256, folder, *flags):
        if way == "offline":
            raise RuntimeError("offline")
        return sdist(folder / "llama_cpp_python-0.3.36.tar.gz", ROOT_OF_IT + way)

    monkeypatch.setattr(export, "pip_download", pip_download)
    with pytest.raises((RuntimeError, tarfile.FilterError)):
        export.fetch_converter(tmp_path / "cache")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["cache", "cache/llama.cpp.lock"]


def test_with_the_converter_in_the_cache_nothing_is_written(tmp_path):
    (tmp_path / export.LLAMA_CPP).mkdir()
    assert export.fetch_converter(tmp_path) == tmp_path / export.LLAMA_CPP
    assert [file.name for file in tmp_path.iterdir()] == [export.LLAMA_CPP]


# --- GGUF -------------------------------------------------------------------------------------------------------------


@cache
def read(file: Path) -> GGUFReader:
    return GGUFReader(file)


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in read(file).fields.items() if not name.startswith("GGUF.")}


def weights(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in read(file).tensors}


def test_f16_holds_the_weights_and_a_llama_3_tokenizer(llama, ggufs):
    """The vocabulary is one that llama.cpp has never met; its end of a turn and its pad token are its own."""
    tokenizer, made = AutoTokenizer.from_pretrained(llama), fields(ggufs["f16"])
    assert made["tokenizer.ggml.pre"] == "llama-bpe"
    assert made["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert made["tokenizer.ggml.padding_token_id"] == tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert made["tokenizer.chat_template"] == tokenizer.chat_template
    got, source = weights(ggufs["f16"]), load_file(llama / "model.safetensors")
    for ours, theirs in {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj"}.items():
        np.testing.assert_array_equal(got[f"{ours}.weight"], source[f"model.{theirs}.weight"].half().float().numpy())


def test_q4_0_weights_lie_within_one_step_of_their_block(ggufs):
    """A block is 32 weights and an fp16 scale; codes run from -8 to 7, so one end is a whole step off.

    Embedding and output are in q8_0, whose codes run from -127 to 127.
    """
    tensors = {tensor.name: tensor for tensor in read(ggufs["q4_0"]).tensors}
    exact, got = weights(ggufs["f16"]), weights(ggufs["q4_0"])
    assert got.keys() == exact.keys()
    layers = (f"blk.0.{part}.weight" for part in ("ffn_up", "ffn_down", "attn_q", "attn_output"))
    wanted = dict.fromkeys(layers, (4.5, 8)) | dict.fromkeys(("token_embd.weight", "output.weight"), (8.5, 127))
    for name, (bits, codes) in wanted.items():
        assert tensors[name].n_bytes * 8 / exact[name].size == bits
        error, absmax = (np.abs(x).reshape(-1, 32).max(1) for x in (got[name] - exact[name], exact[name]))
        assert error[absmax > 0].min() > 0 and (error <= 1.01 * absmax / codes).all()
    for name in ("output_norm", "blk.0.attn_norm"):
        np.testing.assert_array_equal(got[f"{name}.weight"], exact[f"{name}.weight"])


def test_q4_0_keeps_all_metadata_but_the_file_type(ggufs):
    """And an unknown tokenizer that cuts around every digit is read as one that does."""
    f16, q4_0 = fields(ggufs["f16"]), fields(ggufs["q4_0"])
    assert f16.pop("general.file_type") == 1 and q4_0.pop("general.file_type") == 2
    assert f16.pop("tokenizer.ggml.pre") == "llama-bpe" and q4_0.pop("tokenizer.ggml.pre") == "smollm"
    assert f16 == q4_0


PIECES = [*" \t\n\r0179²½٣aZé'<|>₹", "  ", "\r\n", "'s", "'LL", "order", " capital", "है", "我想", "👍🏽", "<|eot_id|>"]


def ids_by_llama_cpp(file: Path, texts: list[str]) -> list[list[int]]:
    """The token ids that a running llama.cpp reads off each text."""
    with serve(file, n_ctx=256, parallel=1) as server:
        bodies = [json.dumps({"content": text, "add_special": False, "parse_special": True}) for text in texts]
        asked = [urllib.request.Request(server.url.removesuffix("v1") + "tokenize", body.encode()) for body in bodies]
        return [json.load(urllib.request.urlopen(one))["tokens"] for one in asked]


NAMED = [("f16", "llama-bpe"), ("q4_0", "smollm"), ("q8_0", "gpt-2"), ("qwen", "qwen2")]


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_where_the_name_is_read_off_the_settings_llama_cpp_reads_the_tokenizers_ids(
    kind, name, llama, digits, qwen, ggufs, tmp_path
):
    """300 drawn texts. The four vocabularies are the course's own, so that the converter knows none of them."""
    folder = {"f16": llama, "q4_0": digits, "q8_0": model_path("micro"), "qwen": qwen}[kind]
    file = ggufs.get(kind) or export.to_gguf(folder, tmp_path / "qwen.gguf")
    assert fields(file)["tokenizer.ggml.pre"] == name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(300)]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids_by_llama_cpp(file, texts) == wanted


def spec_of(folder: Path) -> dict:
    return json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())


def test_the_settings_of_smollm2_have_the_name_that_its_checksum_has():
    """llama.cpp's own list calls SmolLM2's checksum so: tests/parity/test_tokenizer.py."""
    assert export.split_of(spec_of(model_path("smollm2"))) == "smollm"


def nearly(spec: dict, what: str) -> dict:
    """The settings with one of them changed."""
    split, level = spec["pre_tokenizer"]["pretokenizers"]
    changed = {
        "regex": [split | {"pattern": {"Regex": export.LLAMA3_REGEX.replace("{1,3}", "{1,2}")}}, level],
        "behavior": [split | {"behavior": "Removed"}, level],
        "one more": [{"type": "Whitespace"}, split, level],
        "one less": [level],
        "order": [level, split],
        "prefix": [split, level | {"add_prefix_space": True}],
    }
    if what == "normalizer":
        return spec | {"normalizer": {"type": "NFC"}}
    if what == "nothing":
        return spec | {"pre_tokenizer": None}
    if what in ("ignore_merges", "byte_fallback"):
        return spec | {"model": spec["model"] | {what: not spec["model"][what]}}
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": changed[what]}}


@pytest.mark.parametrize("what", [
    "regex", "behavior", "one more", "one less", "order", "prefix", "normalizer", "nothing", "ignore_merges",
    "byte_fallback",
])  # fmt: skip
def test_settings_that_are_nearly_those_of_a_name_have_none(what, llama):
    spec = spec_of(llama)
    assert export.split_of(spec) == "llama-bpe"
    with pytest.raises(NotImplementedError, match=r"got normalizer .*, wanted a vocabulary .*\. Is the model newer"):
        export.split_of(nearly(spec, what))


def test_an_unknown_tokenizer_is_refused_though_the_texts_that_are_compared_do_not_tell_it_apart(llama, gguf, tmp_path):
    """It cuts around "pit", which none of TEXTS holds, and is Llama 3's in all else: a guess would be let through."""
    split, level = spec_of(llama)["pre_tokenizer"]["pretokenizers"]
    more = split | {"pattern": {"String": "pit"}}
    sequence = {"type": "Sequence", "pretokenizers": [more, split, level]}
    folder = with_tokenizer(tmp_path / "model", llama, sequence)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export._compare_tokens(gguf, tokenizer)  # a file that says it is Llama 3's: nothing is found
    text = "What is the capital of France?"
    assert ids_by_llama_cpp(gguf, [text]) != [tokenizer(text, add_special_tokens=False)["input_ids"]]
    with pytest.raises(RuntimeError, match=r"does not know this tokenizer: got normalizer None.*'String': 'pit'"):
        export.to_gguf(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(digits, gguf, tmp_path, monkeypatch):
    """One that cuts around every digit, in a file that says it is Llama 3's."""
    monkeypatch.setattr(export, "_convert", lambda script, kind, runs: shutil.copy(gguf, *runs))
    (tmp_path / "x.gguf").write_text("before")
    with pytest.raises(RuntimeError, match=r"at 'Order 6183' llama.cpp reads \['47', .*not \['4', '7'"):
        export.to_gguf(digits, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "before" and len(list(tmp_path.glob("x.*"))) == 1


def test_what_is_no_complete_model_is_refused_before_time_is_spent(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_convert", lambda *_: pytest.fail("it was converted"))
    folder = with_tokenizer(tmp_path / "model", llama, BYTES)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        export.to_gguf(folder, tmp_path / "x.gguf")
    for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises((ValueError, OSError)):
            export.to_gguf(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_is_no_model_is_refused_before_time_is_spent(name, llama, tmp_path, monkeypatch):
    """Without weights llama.cpp's converter would end well and write a file that no server starts with."""
    monkeypatch.setattr(export, "_convert", lambda *_: pytest.fail("it was converted"))
    folder = with_tokenizer(tmp_path / "model", llama, BYTES)
    (folder / name).unlink()
    if name == "model.safetensors":
        (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"lacks config.json or model\*.safetensors"):
        export.to_gguf(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("kind", ["q4_k_m", "Q8_0", "f32", "q8_k_m"])
def test_a_kind_that_is_none_of_the_three_is_refused_by_its_name(kind, llama, tmp_path):
    with pytest.raises(ValueError, match=f'got \'{kind}\', wanted "f16", "q8_0" or "q4_0"'):
        export.to_gguf(llama, tmp_path / "x.gguf", kind)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_each_of_the_three_kinds_is_converted(kind, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_convert", lambda script, kind, runs: next(iter(runs)).write_text(kind))
    monkeypatch.setattr(export, "_compare_tokens", lambda *_: None)
    assert export.to_gguf(llama, tmp_path / "x.gguf", kind).read_text() == kind


@pytest.fixture
def hub(llama, tmp_path, monkeypatch) -> Path:
    """The folder in Hugging Face's cache of "some/llama", of which tokenizer and config have been fetched."""
    home = tmp_path / "cache" / "models--some--llama"
    folder = home / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    for file in llama.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


def online(hub: Path, llama: Path, monkeypatch) -> None:
    """As if there were a network: what is asked for by its patterns comes into the cache."""

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == "some/llama"
        for name in filter_repo_objects([file.name for file in llama.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(llama / name, hub)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_the_weights_of_a_hub_id_are_fetched_before_they_are_converted(hub, llama, tmp_path, monkeypatch):
    found = []

    def convert(script, kind, runs):
        ((part, (folder,)),) = runs.items()
        found.extend(load_file(Path(folder) / "model.safetensors"))
        part.touch()

    monkeypatch.setattr(export, "_convert", convert)
    monkeypatch.setattr(export, "_compare_tokens", lambda *_: None)
    with pytest.raises(ValueError, match="lacks"):  # offline, and the cache holds none
        export.to_gguf("some/llama", tmp_path / "x.gguf")
    online(hub, llama, monkeypatch)
    assert export.to_gguf("some/llama", tmp_path / "x.gguf").is_file() and "model.norm.weight" in found


@pytest.mark.parametrize("setting", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}], ids=" ".join)
def test_an_adapter_that_llama_cpp_would_scale_otherwise_is_refused(setting, llama, tmp_path, monkeypatch):
    """llama.cpp multiplies every B A by lora_alpha / r."""
    monkeypatch.setattr(export, "_convert", lambda *_: pytest.fail("it was converted"))
    LoraConfig(r=16, **setting).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"mine has {next(iter(setting))}.*merge it"):
        export.adapters_to_gguf({"mine": tmp_path}, llama, tmp_path / "ggufs")


def test_adapters_need_the_base_models_config_alone_and_a_failure_leaves_nothing(hub, llama, tmp_path, monkeypatch):
    def convert(script, kind, runs):
        for file, (_, _, base) in runs.items():
            assert (Path(base) / "config.json").is_file()
            file.write_text("half")
        raise RuntimeError("the second one")

    online(hub, llama, monkeypatch)
    monkeypatch.setattr(export, "_convert", convert)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="the second one"):
        export.adapters_to_gguf({"a": tmp_path / "a", "b": tmp_path / "b"}, "some/llama", tmp_path / "new" / "ggufs")
    assert list((tmp_path / "new" / "ggufs").iterdir()) == [] and not list(hub.glob("*.safetensors"))


# --- Modelfile --------------------------------------------------------------------------------------------------------


def rendered(file: Path, messages: list[dict]) -> str:
    """The prompt that Ollama makes of the messages: Go's text/template, as far as `modelfile` uses it."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
    tokens = iter(re.split(r"\{\{ (.*?) \}\}", template))  # text, action, text, ..., action, text

    def parse() -> tuple[list, str | None]:
        nodes = [next(tokens)]
        for action in tokens:
            if action in ("end", "else"):
                return nodes, action
            if action.startswith(("if ", "range ")):
                body, ended = parse()
                nodes.append((action, body, parse()[0] if ended == "else" else []))
            else:
                nodes.append((action, [], []))
            nodes.append(next(tokens))
        return nodes, None

    def execute(nodes: list, dot: dict) -> str:
        text = ""
        for node in nodes:
            match node:
                case str():
                    text += node
                case ("range .Messages", body, _):
                    text += "".join(execute(body, message) for message in messages)
                case ('if ne (index .Messages 0).Role "system"', body, other):
                    text += execute(body if messages[0]["role"] != "system" else other, dot)
                case ('if eq .Role "system"', body, other):
                    text += execute(body if dot["role"] == "system" else other, dot)
                case (".Role" | ".Content", _, _):
                    text += dot[node[0][1:].lower()]
                case _:
                    raise ValueError(f"{file}: action {node[0]!r} is not among those that `modelfile` writes")
        return text

    return execute(parse()[0], {})


DATED = """{{- bos_token }}{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n" }}
{%- if messages[0]['role'] == 'system' %}
{{- messages[0]['content'] | trim }}{%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


def tokenizer_with(name: str, llama: Path):
    """The tokenizer with the chat template of this name."""
    tokenizer = AutoTokenizer.from_pretrained(llama if name.startswith("llama") else model_path("smollm2"))
    if name == "llama3.1":
        tokenizer.chat_template = DATED
    if name == "chatml":
        tokenizer.chat_template = (DATA / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "smollm2", "chatml"])
def test_ollama_would_render_the_tokenizers_prompts(name, llama, tmp_path):
    """But for <|begin_of_text|>, which Ollama's tokenizer puts first."""
    tokenizer = tokenizer_with(name, llama)
    file = export.modelfile(tmp_path / "x.gguf", tokenizer, tmp_path)
    assert file.read_text().startswith("FROM ./x.gguf\nTEMPLATE")
    stop = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"
    assert file.read_text().endswith(f'PARAMETER stop "{stop}"\nPARAMETER temperature 0\nPARAMETER num_ctx 2048\n')
    go = {"role": "user", "content": "{{ .Role }} <b>& 'assistant' \n x"}
    for messages in ([USER], [SYSTEM, USER], [go, BOT, USER], [SYSTEM, USER, BOT, go, BOT, USER]):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered(file, messages) == wanted.removeprefix("<|begin_of_text|>")
        assert wanted.startswith("<|begin_of_text|>") == name.startswith("llama")


def test_a_modelfile_names_a_gguf_in_another_folder_by_its_way_there(llama, tmp_path):
    (tmp_path / "model").mkdir()
    file = export.modelfile(tmp_path / "ggufs" / "x.gguf", AutoTokenizer.from_pretrained(llama), tmp_path / "model")
    assert file.read_text().startswith("FROM ./../ggufs/x.gguf\n")


GO_RENDERED = {  # what text/template of Go 1.24.11 made of the two files, run once by hand
    "llama3.1": "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nS {{ x }} \n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n <b>&\n<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "smollm2": "<|im_start|>system\nS {{ x }} \n<|im_end|>\n<|im_start|>user\n <b>&\n<|im_end|>\n"
    "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", GO_RENDERED)
def test_our_reader_of_go_templates_agrees_with_go(name, llama, tmp_path):
    """Blanks, braces and HTML in messages pass as they are: Go does not strip, as Llama 3's own template does."""
    file = export.modelfile(tmp_path / "x.gguf", tokenizer_with(name, llama), tmp_path)
    messages = [{"role": "system", "content": "S {{ x }} \n"}, {"role": "user", "content": " <b>&\n"}]
    assert rendered(file, messages) == GO_RENDERED[name]


@pytest.mark.parametrize("name", ["mistral", "deepseek", "gemma"])
def test_another_template_gets_no_modelfile_and_the_one_before_stays(name, llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    file = export.modelfile(tmp_path / "x.gguf", tokenizer, tmp_path)
    before, tokenizer.chat_template = (
        file.read_text(),
        (DATA / "templates" / f"{name}.jinja").read_text(encoding="utf-8"),
    )
    with pytest.raises((ValueError, TemplateError)):
        export.modelfile(tmp_path / "x.gguf", tokenizer, tmp_path)
    assert file.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["Modelfile"]


# --- The model card, and whole files ----------------------------------------------------------------------------------


def test_the_model_card_is_read_by_the_hub_library(tmp_path):
    class Score:
        def __init__(self, right, n):
            self.mean, (self.low, self.high) = right / n, wilson_interval(right, n)

    data = ModelCardData(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        datasets=["ask"],
        tags=["lora", "text-to-sql"],
        library_name="peft",
    )
    scores = {"this adapter": Score(62, 100), "rules (control)": Score(98, 100)}
    file = export.model_card(tmp_path, data, {"rows": 500, "seed": 0}, scores, "One table only.")
    card = ModelCard.load(file)
    assert card.data.to_dict() == data.to_dict()
    assert "| this adapter | 62.0% | 52.2% to 70.9% |\n| rules (control) | 98.0% |" in card.text
    assert "\n# SmolLM2-135M-Instruct, fine-tuned\n" in card.text
    assert "| seed | 0 |" in card.text and card.text.rstrip().endswith("## Limits\n\nOne table only.")


def folder_with(card: str | None, folder: Path) -> Path:
    """A model's folder with this README.md, or none."""
    folder.mkdir(parents=True)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("place", "card", "wanted"), [
    ("mine", "---\nlicense: mit\n---\n# Mine\n", {"base_model": "mine", "license": "mit"}),
    ("models--Qwen--Qwen3-0.6B/snapshots/0a1b2c", "---\nlicense: apache-2.0\n---\n",
     {"base_model": "Qwen/Qwen3-0.6B", "license": "apache-2.0"}),
    ("models--a--b.c/snapshots/1", "---\nlicense: other\nlicense_name: l3\nlicense_link: LICENSE\n---\n",
     {"base_model": "a/b.c", "license": "other", "license_name": "l3", "license_link": "LICENSE"}),
])  # fmt: skip
def test_base_and_licence_are_read_off_the_card_of_the_model(tmp_path, place, card, wanted):
    assert export.base_of(folder_with(card, tmp_path / place)).to_dict() == wanted


def test_the_models_of_the_course_are_known_by_their_folders(tmp_path):
    known = export.base_of(model_path("smollm2"))
    assert (known.base_model, known.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    copied = folder_with(None, tmp_path / "smollm2")  # the name alone says nothing
    with pytest.raises(ValueError, match="licence of smollm2 cannot be read"):
        export.base_of(copied)


@pytest.mark.parametrize("card", [None, "# A model without metadata\n", "---\ntags: [x]\n---\n"])
def test_a_licence_that_cannot_be_read_is_asked_for_and_not_guessed(tmp_path, card):
    folder = folder_with(card, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"licence of bare cannot be read \(.+\).+licence="):
        export.base_of(folder)
    assert export.base_of(folder, "mit").to_dict() == {"base_model": "bare", "license": "mit"}
    with pytest.raises(ValueError, match=r"licence of nobody/nothing cannot be read \(\w+: "):
        export.base_of("nobody/nothing")  # the tests have no network


class Trainer:
    """What `run_of` reads of a trainer."""

    def __init__(self, data_seed: int | None = None, template: str = "{{ messages }}", **config) -> None:
        self.model, self.train_dataset = torch.nn.Linear(2, 2).requires_grad_(False), range(48)
        self.model.config = SimpleNamespace(**config)
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
        self.args = SimpleNamespace(learning_rate=2e-3, seed=7, data_seed=data_seed, **sizes)
        self.state = SimpleNamespace(global_step=12, best_global_step=9)
        self.processing_class = SimpleNamespace(chat_template=template)


def test_the_card_shows_the_seed_and_the_numbers_of_the_run(tmp_path):
    score = SimpleNamespace(mean=0.5, low=0.4, high=0.6)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    base, cards = model_path("micro"), []
    for trainer in (Trainer(), Trainer(data_seed=3, template="other"), Trainer(quantization_config=nf4)):
        facts = export.run_of(trainer, base) | {"system prompt": "Sort it.\nAs A | B."}
        cards.append(export.card_of(facts, base, tmp_path, {"tuned": score}, "Toys only.").read_text("utf-8"))
    assert all("| rows | 48 |" in card and "| seed | 7 |" in card and "Toys only." in card for card in cards)
    assert "seed of the rows" not in cards[0] and "| seed of the rows | 3 |" in cards[1]
    assert "| base in | float32 |" in cards[0] and "held in" not in cards[0]
    assert "| base in | 4 bits (nf4) |" in cards[2] and "was held in 4 bits (nf4)" in cards[2]
    for card in cards:
        assert "| rows a step | 12 |" in card and "| steps | 12, step 9 kept, the best on validation |" in card
        assert r"| system prompt | Sort it. As A \| B. |" in card  # in one cell
        assert f"transformers {transformers.__version__}" in card and f"torch {torch.__version__}" in card
    templates = [re.search(r"\| chat template \| SHA-256 (\w{12}) \|", card)[1] for card in cards]
    assert templates[0] != templates[1] and templates[0] == templates[2]
    with pytest.raises(ValueError, match="got no scores"):
        export.card_of(export.run_of(Trainer(), base), base, tmp_path, {}, "")


def test_what_a_run_was_is_known_after_its_trainer_is_gone(tmp_path):
    trainer = Trainer()
    facts, gone = export.run_of(trainer, "some/model"), weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert gone() is None and "12, step 9" in facts["steps"]


def test_the_card_names_the_rows_by_a_hash_and_the_base_by_its_revision(tmp_path):
    score = SimpleNamespace(mean=0.5, low=0.4, high=0.6)

    def card(rows, base="some/model", **config) -> str:
        facts = export.run_of(Trainer(**config), base, rows)
        made = export.card_of(facts, base, tmp_path, {"tuned": score}, "", "mit")
        return made.read_text(encoding="utf-8")

    says = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    rows = [{"prompt": says[0], "completion": says[1], "group": str(i)} for i in range(48)]
    others = [rows[0] | {"completion": says[0]}, *rows[1:]]
    lines = [re.search(r"\| rows \| 48 \(SHA-256 (\w{12})\) \|", card(of))[1] for of in (rows, rows, others)]
    assert lines[0] == lines[1] != lines[2]
    with pytest.raises(ValueError, match="got 47 rows, but 48 were trained on"):
        card(rows[1:])

    def revision(*args, **more) -> str:
        return re.search(r"\| revision of the base \| (.*) \|", card(*args, **more))[1]

    assert revision(rows, "some/model", _commit_hash="0a1b2c") == "0a1b2c"
    assert revision(rows, "some/model") == "unknown"
    cached = folder_with(None, tmp_path / "models--a--b" / "snapshots" / "99f0")
    assert revision(rows, cached) == "99f0"
    mine = folder_with(None, tmp_path / "mine")
    for bits in (b"one", b"two", b"one"):
        (mine / "model.safetensors").write_bytes(bits)
        lines.append(revision(rows, mine))
    assert lines[-1] == lines[-3] != lines[-2] and lines[-1].startswith("weights with SHA-256 ")


def test_an_export_that_fails_leaves_what_was_there(llama, tmp_path, monkeypatch):
    """Killed in the middle too: the file is written beside its place, which it takes at the end."""
    file = tmp_path / "x.gguf"
    file.write_text("before")
    monkeypatch.setattr(export, "fetch_converter", lambda: tmp_path / "a folder without it")
    with pytest.raises(RuntimeError, match=r"exit code 1:(.|\n)*No module named 'conversion'"):
        export.to_gguf(llama, file)

    def killed(script, kind, runs):
        (part,) = runs
        part.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        export.to_gguf(llama, file)
    assert file.read_text() == "before"


def test_two_kernels_may_export_to_one_file_at_once(llama, tmp_path, monkeypatch):
    """The second from start to end while the first converts."""
    kernels = iter(("first", "second"))

    def convert(script, kind, runs):
        (part,) = runs
        part.write_text(kernel := next(kernels))
        if kernel == "first":
            assert export.to_gguf(llama, tmp_path / "x.gguf").read_text() == "second"

    monkeypatch.setattr(export, "_convert", convert)
    monkeypatch.setattr(export, "_compare_tokens", lambda *_: None)
    assert export.to_gguf(llama, tmp_path / "x.gguf").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
