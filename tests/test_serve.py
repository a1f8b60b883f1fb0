"""ftlab.pipeline.serve: `ask`, and vLLM's server; llama.cpp's is tested in tests/test_new_serve.py."""

import json
import signal
import socket
import sys
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch
from local_api import JsonHandler
from peft import LoraConfig, PeftModel, get_peft_model

from ftlab.paths import DATA
from ftlab.pipeline import serve as module
from ftlab.pipeline.data import TRIAGE_SYSTEM
from ftlab.pipeline.export import to_gguf
from ftlab.pipeline.models import load
from ftlab.pipeline.serve import ADAPTER, ask, environment, serve, serve_vllm, vllm_command

NEW_TOKENS = 24
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def prompts() -> list[list[dict]]:
    lines = (DATA / "triage" / "hand_test.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    system = {"role": "system", "content": TRIAGE_SYSTEM}
    return [[system, {"role": "user", "content": json.loads(line)["ticket"]}] for line in lines]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return to_gguf("smollm2", tmp_path_factory.mktemp("gguf") / "smollm2-f16.gguf")


@pytest.fixture(scope="module")
def server(gguf):
    with serve(gguf) as server:
        yield server


@pytest.fixture(scope="module")
def wanted(prompts) -> list[tuple[str, int]]:
    """transformers' greedy answers in fp32, and the number of prompt tokens."""
    model, tokenizer = load("smollm2", dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        n = ids["input_ids"].shape[1]
        output = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append((tokenizer.decode(output[0, n:], skip_special_tokens=True), n))
    return answers


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Two PEFT folders for SmolLM2: the course's, and one with random numbers that changes every answer."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    noise = tmp_path_factory.mktemp("noise")
    get_peft_model(load("smollm2", dtype=torch.float32)[0], config).save_pretrained(noise)
    return {"triage": DATA / "triage_adapter", "noise": noise}


def peft_answers(folder: Path, prompts: list[list[dict]], max_new_tokens: int = 8) -> list[str]:
    """transformers' greedy answers in fp32 with the adapter beside the weights."""
    model, tokenizer = load("smollm2", dtype=torch.float32)
    model, answers = PeftModel.from_pretrained(model, str(folder)).eval(), []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_answers_are_those_of_transformers_in_fp32(server, prompts, wanted):
    """A hard case, since the base model's likeliest tokens are often close: with an fp16 KV cache or flash attention,
    1 to 3 of 20 such answers differ.
    """
    got = ask(server.base_url, prompts, max_tokens=NEW_TOKENS, workers=1)
    assert [(answer.text, answer.prompt_tokens) for answer in got] == wanted
    assert all(0 < answer.completion_tokens <= NEW_TOKENS and answer.seconds > 0 for answer in got)


class Echo(JsonHandler):
    """Answers a chat with what it was asked; the first question is answered last."""

    def reply(self, body):
        asked = json.loads(body)
        said = asked["messages"][0]["content"]
        time.sleep(0.3 * (said == "first"))
        self.server.asked.append(asked)
        message = {"role": "assistant", "content": f"{said}!"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        shown = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "usage": usage}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return {**shown, "choices": choices}


def test_what_ask_sends_and_in_which_order_it_answers(monkeypatch):
    """Not through the machine's proxy: here one that nobody serves."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo:
        echo.asked = []
        thread = Thread(target=echo.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{echo.server_port}/v1"
            prompts = [[{"role": "user", "content": name}] for name in ("first", "second")]
            answers = ask(url, prompts, "triage", max_tokens=5, extra_body=ADAPTER)
        finally:
            echo.shutdown()
            thread.join()
    assert [(a.text, a.prompt_tokens, a.completion_tokens) for a in answers] == [("first!", 7, 3), ("second!", 7, 3)]
    assert answers[0].seconds > 0.3 > answers[1].seconds
    (second, first), sent = echo.asked, {"model": "triage", "temperature": 0, "max_tokens": 5, **ADAPTER}
    assert (first, second) == ({"messages": prompts[0], **sent}, {"messages": prompts[1], **sent})


# --- What can go wrong at the start and at the end --------------------------------------------------------------------


def test_a_server_that_never_answers_is_ended_after_its_time():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before, start = psutil.Process().children(), time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer after 1 s(.|\n)*still loading"):
        module.Server([sys.executable, "-c", "print('still loading', flush=True); input()"], port, timeout=1)
    assert time.monotonic() - start < 5
    assert psutil.Process().children() == before


def test_a_server_that_does_not_listen_to_a_friendly_word_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_healthy", lambda port: (tmp_path / "deaf").is_file())
    code = (
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(tmp_path / 'deaf')!r}, 'w'); input()"
    )
    server = module.Server([sys.executable, "-c", code], 1, timeout=20)
    wait = server._process.wait
    monkeypatch.setattr(server._process, "wait", lambda timeout: wait(timeout=timeout / 50))  # 20 s are long in a test
    server.stop()
    assert server._process.returncode == -signal.SIGKILL


def test_vllm_listens_on_this_machine_only_and_says_what_to_run_when_absent(tmp_path, monkeypatch):
    command = vllm_command("folder", 8123, python="python")
    assert command[command.index("--host") + 1] == "127.0.0.1" and command[command.index("--port") + 1] == "8123"
    named = vllm_command("folder", 8123, n_ctx=512, alias="base", python="python")
    assert named[3:11] == ["--model", "folder", "--host", "127.0.0.1", "--port", "8123", "--max-model-len", "512"]
    assert named[11:13] == ["--served-model-name", "base"]
    on_a_cpu = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "512M"]
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert vllm_command("folder", 8123, python="python")[13:] == ([] if gpu else on_a_cpu)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "ftlab" / "pipeline" / "serve.py"))
    with pytest.raises(RuntimeError, match="make vllm"):
        serve_vllm("folder")


def test_vllm_lets_adapters_meet_in_one_batch(adapters):
    command = vllm_command("folder", 8123, adapters, python="python")
    options = command[command.index("--enable-lora") :]
    names = [f"{name}={folder}" for name, folder in adapters.items()]
    assert options[1:] == ["--max-loras", "2", "--max-lora-rank", "16", "--lora-modules", *names]
    other_way = vllm_command("folder", 8123, dict(reversed(adapters.items())), python="python")
    assert other_way[other_way.index("--max-lora-rank") + 1] == "16"
    assert {json.loads((folder / "adapter_config.json").read_text())["r"] for folder in adapters.values()} == {8, 16}
    assert "--enable-lora" not in vllm_command("folder", 8123, python="python")


def test_vllm_answers_as_transformers_does(prompts, wanted):
    try:
        environment("vllm")
    except RuntimeError as error:
        pytest.skip(f"VLLM NOT TESTED: {error}")
    from ftlab.models import fetch_smollm2

    adapter = DATA / "triage_adapter"
    with serve_vllm(fetch_smollm2(), {"triage": adapter}) as server:
        got = ask(server.base_url, prompts[:5], max_tokens=NEW_TOKENS)
        tuned = ask(server.base_url, prompts[:2], "triage", max_tokens=8)
    assert [(answer.text, answer.prompt_tokens) for answer in got] == wanted[:5]
    assert [answer.text for answer in tuned] == peft_answers(adapter, prompts[:2])
