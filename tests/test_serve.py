"""ftlab.pipeline.serve: answers against transformers in fp32, what can go wrong, and that none outlives its owner.

The storm of requests, most of them bad, is that of bench/server.py, there 1,000 long.
"""

import asyncio
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
from ftlab.pipeline.export import adapter_to_gguf, to_gguf
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


def behind(prompt: list[dict], text: str) -> float:
    """By how much transformers' logit of a token of the answer is below the greatest one there, at most."""
    model, tokenizer = load("smollm2", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer.tolist()])).logits[0, len(ids) - 1 : -1]
    return (logits.amax(-1) - logits.gather(1, answer[:, None])[:, 0]).max().item()


def test_requests_that_are_decoded_together_are_answered_so_too(server, prompts, wanted):
    """Their sums go in another order, so that a tie may go the other way: two logits 0.004 apart once did."""
    got = ask(server.base_url, prompts, max_tokens=NEW_TOKENS)
    assert [answer.prompt_tokens for answer in got] == [tokens for _, tokens in wanted]
    others = [i for i, (answer, (text, _)) in enumerate(zip(got, wanted, strict=True)) if answer.text != text]
    assert len(others) <= 1 and all(behind(prompts[i], got[i].text) < 0.02 for i in others), [got[i] for i in others]
    assert behind(prompts[0], wanted[0][0]) == 0 and behind(prompts[0], wanted[1][0]) > 1  # what is no tie is seen


def test_each_request_is_answered_by_the_adapter_that_it_names(gguf, adapters, prompts, wanted, tmp_path):
    """Also in one batch with requests for the other one; the answers are PEFT's, greedy in fp32."""
    files = [adapter_to_gguf(folder, "smollm2", tmp_path / f"{name}.gguf") for name, folder in adapters.items()]
    bodies = [{"lora": [{"id": i, "scale": 1.0}]} for i in range(len(files))]
    assert bodies[0] == ADAPTER
    with serve(gguf, files, n_ctx=256) as server, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(ask, server.base_url, prompts[:2], max_tokens=8, extra_body=b) for b in (*bodies, None)]
        *tuned, base = [[answer.text for answer in job.result()] for job in jobs]
    assert tuned == [peft_answers(folder, prompts[:2]) for folder in adapters.values()]
    assert all(text and whole.startswith(text) for text, (whole, _) in zip(base, wanted, strict=False))
    assert tuned[0] != tuned[1] and base not in tuned


def models_of(server) -> list:
    import httpx
    from openai import OpenAI

    direct = httpx.Client(trust_env=False)
    with OpenAI(base_url=server.base_url, api_key="none", http_client=direct) as client:
        return list(client.models.list())


def test_it_knows_its_alias(server):
    assert [model.id for model in models_of(server)] == ["model"]


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


# --- Under bad requests -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    """bench/server.py as a module; harness, which it imports, lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("server")
    del sys.modules["server"], sys.modules["harness"]


def test_it_listens_on_this_machine_only(server, bench):
    """Its sockets as the kernel lists them (/proc/net/tcp), and a knock at every other address of the machine."""
    process, port = psutil.Process(server._process.pid), bench.port_of(server)
    listening = {one.laddr for one in process.net_connections(kind="inet") if one.status == "LISTEN"}
    assert {address.ip for address in listening} == {"127.0.0.1"} and port in {address.port for address in listening}
    addresses = [one for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    others = {one.address for one in addresses} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_nobody_goes_round_the_guard(server, bench):
    process = psutil.Process(server._process.pid)
    ports = {one.laddr.port for one in process.net_connections(kind="inet") if one.status == "LISTEN"}
    (inner,) = ports - {bench.port_of(server)}
    assert bench.exchange(inner, bench.chat())[0] == 401


def test_it_stands_a_storm_and_answers_as_before(server, bench):
    """Every malformed request twice, the second time among others; some would end llama.cpp, did the guard not stand
    before it. Nothing is left open, and the second half leaves the memory where the first one took it, but for 1 in 20.
    """
    questions = bench.questions(2)
    before = ask(server.base_url, questions, max_tokens=bench.NEW_TOKENS)
    storm = bench.Storm(server, questions, [answer.text for answer in before], bench.NEW_TOKENS)
    every = ["malformed"] * len(bench.MALFORMED)
    left = {"malformed: refused": len(every), "gone: left": 8, "half: left": 8}
    assert storm.rage(["gone", "half"] * 8 + every) == left
    first = storm.held()
    kinds = every + ["good"] * 4 + ["oversized", "half", "gone"] * 8
    assert storm.rage(random.Random(0).sample(kinds, len(kinds))) == {**left, "good: right": 4, "oversized: refused": 8}
    last = storm.held()
    assert last["resident_bytes"] < 1.05 * first["resident_bytes"] and last["open_files"] <= first["open_files"] + 1
    after = ask(server.base_url, questions, max_tokens=bench.NEW_TOKENS)
    assert [answer.text for answer in after] == [answer.text for answer in before]


def test_a_request_that_fails_does_not_keep_those_behind_it_waiting(gguf, bench):
    """All of them behind a stream that has the only slot, and whose reader then leaves."""
    bad, good = bench.MALFORMED["a broken grammar"], bench.chat(max_tokens=1)
    with serve(gguf, n_ctx=256, parallel=1) as server, ThreadPoolExecutor(3) as pool:
        port = bench.port_of(server)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as reader:
            reader.sendall(bench.stream([{"role": "user", "content": "Hi"}]))
            reader.recv(1)
            waiting = []
            for request in (bad, good, good):
                waiting.append(pool.submit(bench.exchange, port, request))
                time.sleep(0.2)
            assert not any(one.done() for one in waiting)
        assert [one.result(timeout=60)[0] for one in waiting] == [400, 200, 200]


def test_a_request_may_come_in_pieces(server, bench):
    request = bench.chat(max_tokens=1)
    with socket.create_connection(("127.0.0.1", bench.port_of(server)), timeout=60) as connection:
        for piece in (request[:9], request[9:-20], request[-20:]):
            connection.sendall(piece)
            time.sleep(0.05)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def let_through(request: bytes) -> bytes:
    """What the guard sends on, or the error that it answers with."""

    async def read() -> bytes:
        reader = asyncio.StreamReader(limit=2**16)
        reader.feed_data(request)
        reader.feed_eof()
        return await module._request(reader, "key")

    return asyncio.run(read())


def test_the_guard_sends_on_one_request_with_its_own_key(bench):
    """Not what follows in the same connection, and none of the headers that it sets itself."""
    headers = "Authorization: Bearer none\r\nconnection:keep-alive\r\nX-Kept: a: b\r\n"
    got = let_through(bench.post(b'{"a": 1}', "/v1/x?y=1", headers) + b"GET /slots HTTP/1.1\r\n\r\n")
    head = b"POST /v1/x?y=1 HTTP/1.1\r\nhost: 127.0.0.1\r\nx-kept: a: b\r\nconnection: close\r\n"
    assert got == head + b'content-length: 8\r\nauthorization: Bearer key\r\n\r\n{"a": 1}'


@pytest.mark.parametrize("fits", [True, False])
def test_the_guards_limits_are_what_they_say(fits, bench):
    """The last request that fits, and the first that does not, for each of the three limits."""
    more = 0 if fits else 1
    deep = module.MOST_DEPTH + more
    settings = len(json.dumps({"a": ""}))
    bodies = {
        f"more than {module.MOST_DEPTH} brackets": b"[" * deep + b"]" * deep,
        "bytes of settings": json.dumps(
            {"a": "x" * (module.MOST_SETTINGS - settings + more), "prompt": "x" * 99999}
        ).encode(),
        "longer than": json.dumps("x" * (module.MOST_BYTES - 2 + more)).encode(),
    }
    for message, body in bodies.items():
        if fits:
            assert let_through(bench.post(body)).endswith(body)
        else:
            with pytest.raises(module._RefusedError, match=message):
                let_through(bench.post(body))


def test_the_guard_waits_for_a_request_only_so_long(monkeypatch, bench):
    """In this process, before a llama.cpp that nobody asks; a request that it has refused it does not keep either."""
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    inner, port = module._free_port(None), module._free_port(None)
    end = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(end[0]))
    guard = Thread(target=lambda: asyncio.run(module._guard(port, inner, "key", 1)))
    guard.start()
    try:
        while not knocks(port):
            time.sleep(0.01)
        answers = []
        for request in (b"", b"POST / HTTP", bench.post(b"{", headers="Content-Length: 9\r\n"), b"junk\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(request)
                answers.append(connection.recv(12))
                while connection.recv(2**16):
                    pass
    finally:
        os.close(end[1])
        guard.join()
    assert answers == [b"", b"", b"", b"HTTP/1.1 400"] and not knocks(port)


def knocks(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- What can go wrong at the start and at the end --------------------------------------------------------------------


def test_a_prompt_longer_than_one_request_may_be_is_an_error(gguf):
    from openai import BadRequestError

    with serve(gguf, n_ctx=256, parallel=2, alias="small") as server:
        with pytest.raises(BadRequestError, match="256"):
            ask(server.base_url, [[{"role": "user", "content": "word " * 300}]])
        (long,) = ask(server.base_url, [[{"role": "user", "content": "word " * 200}]], max_tokens=2)
        assert 128 < long.prompt_tokens < 256  # which would not fit into half of it
        assert [model.id for model in models_of(server)] == ["small"]


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"to_gguf"):
        serve(tmp_path / "missing.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="safetensors"):
        serve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("several", [False, True])
def test_an_adapter_that_is_no_gguf_is_an_error_however_it_is_given(several, tmp_path):
    model, missing, other = tmp_path / "model.gguf", tmp_path / "missing.gguf", tmp_path / "adapter_model.safetensors"
    model.write_bytes(b"GGUF")
    other.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for as_given in (str, Path):
        with pytest.raises(FileNotFoundError, match=f"^{missing} does not exist"):
            serve(model, [as_given(missing)] if several else as_given(missing))
        with pytest.raises(ValueError, match=f"^{other} starts with"):
            serve(model, [as_given(other)] if several else as_given(other))


def test_a_truncated_gguf_is_an_error_with_the_log(gguf, tmp_path):
    with gguf.open("rb") as stream:
        (tmp_path / "half.gguf").write_bytes(stream.read(20_000_000))
    with pytest.raises(RuntimeError, match=r"ended with exit code(.|\n)*tensor"):
        serve(tmp_path / "half.gguf")


def test_a_taken_port_is_an_error(gguf, server):
    port = int(server.base_url.split(":")[2].split("/")[0])
    with pytest.raises(RuntimeError, match=f"port {port} is taken"):
        serve(gguf, port=port)


def test_stop_ends_the_process_and_may_be_called_twice(gguf):
    server = serve(gguf, parallel=1)
    server.stop()
    server.stop()
    assert server._process.returncode is not None


def test_it_does_not_outlive_a_killed_notebook(gguf):
    code = f"from ftlab.pipeline.serve import serve; print(serve({str(gguf)!r})._process.pid, flush=True); input()"
    notebook = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(notebook.stdout.readline())
    assert psutil.pid_exists(pid)
    os.kill(notebook.pid, signal.SIGKILL)
    notebook.communicate()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


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
    from ftlab.pipeline.models import fetch_smollm2

    adapter = DATA / "triage_adapter"
    with serve_vllm(fetch_smollm2(), {"triage": adapter}) as server:
        got = ask(server.base_url, prompts[:5], max_tokens=NEW_TOKENS)
        tuned = ask(server.base_url, prompts[:2], "triage", max_tokens=8)
    assert [(answer.text, answer.prompt_tokens) for answer in got] == wanted[:5]
    assert [answer.text for answer in tuned] == peft_answers(adapter, prompts[:2])
