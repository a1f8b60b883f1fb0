"""ftlab.pipeline.export: weights against W0 + B A by hand, files read back with gguf, answers of llama.cpp's server."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from ftlab.models import fetch_smollm2
from ftlab.pipeline import export, serve

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where is order 618347?"}
BOT = {"role": "assistant", "content": "On its way."}
PROMPTS = [[SYSTEM, USER], [USER, BOT, USER]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """The folder of a random Llama of 2 layers, width 64, with SmolLM2's whole tokenizer, which the converter knows."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch_smollm2()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> Path:
    """A run folder with a LoRA adapter for `llama` that changes its answers: r = 4, lora_alpha = 8, random A and B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora).save_pretrained(run / "adapter")
    return run


@pytest.fixture(scope="module")
def ggufs(llama, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: export.to_gguf(llama, folder / f"llama-{kind}.gguf", kind) for kind in ("f16", "q8_0", "q4_0")}


# --- Merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_w0_plus_scaled_b_a(dtype, llama, adapter, tmp_path):
    """Computed here from the files: scaling = 8 / 4 = 2; layers without an adapter keep every bit."""
    folder = export.merge(adapter, llama, tmp_path / "merged", PROMPTS, dtype)
    before, after = load_file(llama / "model.safetensors"), load_file(folder / "model.safetensors")
    update = load_file(adapter / "adapter" / "adapter_model.safetensors")
    name = "layers.1.mlp.down_proj"
    b, a = (update[f"base_model.model.model.{name}.lora_{x}.weight"] for x in "BA")
    wanted = before[f"model.{name}.weight"].float() + 2 * b @ a
    torch.testing.assert_close(after[f"model.{name}.weight"], wanted.to(getattr(torch, dtype)))
    kept = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[kept], before[kept].to(getattr(torch, dtype)))


def test_a_merge_is_saved_in_16_bit_and_keeps_the_template(llama, adapter, tmp_path):
    from transformers import AutoTokenizer

    folder = export.merge(adapter / "adapter", llama, tmp_path / "merged", PROMPTS)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    tokenizers = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(folder)
    rendered = [tokenizer.apply_chat_template(PROMPTS[1], tokenize=False) for tokenizer in tokenizers]
    assert rendered[0] == rendered[1]


def test_a_merge_that_fails_leaves_nothing(llama, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_max_diff", lambda a, b: float("nan"))
    with pytest.raises(RuntimeError, match="differ by nan"):
        export.merge(adapter, llama, tmp_path / "merged", PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_merge_refuses_a_quantized_base_and_a_folder_of_something_else(llama, adapter, tmp_path, monkeypatch):
    model, tokenizer = export.load(llama)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(FileExistsError, match="no model"):
        export.merge(adapter, llama, tmp_path / "thesis", PROMPTS)
    model.config.quantization_config = {"load_in_4bit": True}
    monkeypatch.setattr(export, "load", lambda *_, **__: (model, tokenizer))
    with pytest.raises(ValueError, match="quantized"):
        export.merge(adapter, llama, tmp_path / "merged", PROMPTS)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter1.tex"]


# --- GGUF -------------------------------------------------------------------------------------------------------------


@cache
def read(file: Path) -> GGUFReader:
    return GGUFReader(file)


def weights(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in read(file).tensors}


def test_f16_holds_the_weights_and_the_tokenizer(llama, ggufs):
    reader, source = read(ggufs["f16"]), load_file(llama / "model.safetensors")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2
    got = weights(ggufs["f16"])
    for ours, theirs in {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj"}.items():
        np.testing.assert_array_equal(got[f"{ours}.weight"], source[f"model.{theirs}.weight"].half().float().numpy())


@pytest.mark.parametrize(("kind", "bits", "steps"), [("q8_0", 8.5, 127), ("q4_0", 4.5, 8)])
def test_quantized_weights_lie_within_one_step_of_their_block(ggufs, kind, bits, steps):
    """A block is 32 weights and an fp16 scale; Q4_0's codes run from -8 to 7, so one end is a whole step off."""
    tensors = {tensor.name: tensor for tensor in read(ggufs[kind]).tensors}
    exact, got = weights(ggufs["f16"]), weights(ggufs[kind])
    assert got.keys() == exact.keys()
    name = "blk.0.ffn_up.weight"
    assert tensors[name].n_bytes * 8 / exact[name].size == bits
    error, absmax = (np.abs(x).reshape(-1, 32).max(1) for x in (got[name] - exact[name], exact[name]))
    assert error.min() > 0 and (error <= 1.01 * absmax / steps).all()
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    np.testing.assert_array_equal(got["output_norm.weight"], exact["output_norm.weight"])


def test_q4_0_keeps_all_metadata_but_the_file_type(ggufs):
    f16, q4_0 = (
        {name: field.contents() for name, field in read(ggufs[kind]).fields.items()} for kind in ("f16", "q4_0")
    )
    assert f16.pop("general.file_type") == 1 and q4_0.pop("general.file_type") == 2
    assert f16 == q4_0


def test_a_damaged_tokenizer_is_refused(llama, tmp_path):
    """Without the split into words, merges cross word boundaries and give other tokens than it was trained on."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in llama.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    spec = json.loads((damaged / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
    (damaged / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RuntimeError, match="does not know the tokenizer"):
        export.to_gguf(damaged, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [damaged]


def test_another_pre_tokenizer_or_kind_is_refused(llama, ggufs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_convert", lambda *args: Path(args[3]).write_bytes(ggufs["f16"].read_bytes()))
    with pytest.raises(RuntimeError, match="'smollm', wanted 'qwen2'"):
        export.to_gguf(llama, tmp_path / "x.gguf", pre="qwen2")
    with pytest.raises(ValueError, match="'q4_k_m', wanted 'f16'"):
        export.to_gguf(llama, tmp_path / "x.gguf", "q4_k_m")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "without").write_bytes(ggufs["f16"].read_bytes().replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.pry"))
    assert export._pre_tokenizer(tmp_path / "without") is None and export._pre_tokenizer(ggufs["f16"]) == "smollm"


def test_an_adapter_is_answered_with_only_when_asked_for(llama, adapter, ggufs, tmp_path):
    """Off: what a server that never had the adapter says. On: what a server with the merged weights says."""
    prompts = [[USER], [SYSTEM, USER], [USER, BOT, USER], [BOT | {"role": "user"}]]
    lora = export.adapter_to_gguf(adapter, llama, tmp_path / "adapter.gguf")
    merged = export.merge(adapter, llama, tmp_path / "merged", PROMPTS, dtype="float32")
    base, tuned = (
        answers(file, prompts) for file in (ggufs["f16"], export.to_gguf(merged, tmp_path / "m.gguf", "f16"))
    )
    assert all(x != y for x, y in zip(base, tuned, strict=True))
    assert answers(ggufs["f16"], prompts, lora, None, serve.ADAPTER, None) == base + tuned + base


def answers(gguf: Path, prompts: list, lora: Path | None = None, *bodies: dict | None) -> list[str]:
    with serve.serve(gguf, lora=lora) as server:
        asked = [serve.ask(server.base_url, prompts, max_tokens=4, extra_body=body) for body in bodies or (None,)]
    return [answer.text for answers in asked for answer in answers]


# --- AWQ --------------------------------------------------------------------------------------------------------------

AWQ = Path(__file__).parents[1] / "tools" / "awq.py"


def test_awq_quantizes_and_answers(llama, tmp_path):
    from transformers import AutoTokenizer

    try:
        python = serve.environment("awq")
    except RuntimeError as error:
        pytest.skip(f"AWQ NOT TESTED: {error}")

    def run(*given) -> str:
        return subprocess.run([python, "-P", AWQ, *given], stdout=subprocess.PIPE, check=True, text=True).stdout

    texts, prompts, made = tmp_path / "texts.jsonl", tmp_path / "prompts.jsonl", tmp_path / "awq"
    text = AutoTokenizer.from_pretrained(llama).apply_chat_template([USER, BOT], tokenize=False)
    texts.write_text(f"{json.dumps(text)}\n" * 4)
    record = json.loads(run("quantize", llama, texts, made).splitlines()[-1])
    assert record["llmcompressor"] == "0.14.0.1" and record["seconds"] > 0
    packed = load_file(made / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.dtype == torch.int32 and packed.numel() * 4 == 128 * 64 / 2  # two 4-bit weights in a byte
    prompts.write_text(json.dumps([USER]))
    run("answer", made, prompts, tmp_path / "answers.jsonl", "--max-new-tokens", "4")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
    assert not list(tmp_path.glob(".*"))


def test_awq_leaves_alone_what_is_there(tmp_path):
    (tmp_path / "texts.jsonl").write_text('"text"')
    command = [sys.executable, AWQ, "quantize", "model", tmp_path / "texts.jsonl", tmp_path]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "is there already" in done.stderr
