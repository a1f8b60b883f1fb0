"""ftlab.serve: answers against transformers in fp32, why llama.cpp needs a guard, how the server starts and ends.

The storm of requests, most of them bad, is that of bench/server.py, there 1,000 long.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from openai import BadRequestError, OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from scripts import script
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab import serve as module
from ftlab.export import adapters_to_gguf
from ftlab.serve import checked, serve

PROMPTS = [
    [{"role": "user", "content": "Where is order 618347?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of Japan?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "It's late."},
    ],
]


def said(server: module.Server, prompt: list[dict], max_tokens: int = 16, **extra) -> tuple[str, int]:
    """The greedy answer and the number of prompt tokens."""
    with OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
        reply = client.chat.completions.create(
            model="model", messages=prompt, temperature=0, max_tokens=max_tokens, extra_body=extra
        )
    return reply.choices[0].message.content, reply.usage.prompt_tokens


def generated(model, tokenizer, prompt: list[dict], max_new_tokens: int = 16) -> tuple[str, int]:
    """The same from transformers."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    n = ids["input_ids"].shape[1]
    output = model.eval().generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, n:], skip_special_tokens=True), n


@pytest.fixture(scope="module")
def server(gguf):
    with serve(gguf) as server:
        yield server


# --- The answers ------------------------------------------------------------------------------------------------------


def test_a_llama_3_answers_as_in_transformers(server, llama):
    """Text and number of prompt tokens: one <|begin_of_text|>, though template and tokenizer both write it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    assert [said(server, prompt) for prompt in PROMPTS] == [generated(model, tokenizer, prompt) for prompt in PROMPTS]


def test_each_request_is_answered_by_the_adapter_that_it_names(llama, gguf, tmp_path):
    """Also in one batch with requests for the other one and for the base."""
    tokenizer, wanted = AutoTokenizer.from_pretrained(llama), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / f"{seed}")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / f"{seed}")
        wanted.append([generated(model, tokenizer, prompt)[0] for prompt in PROMPTS])
    files = adapters_to_gguf({f"{seed}": tmp_path / f"{seed}" for seed in (0, 1)}, llama, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(llama)
    wanted.append([generated(base, tokenizer, prompt)[0] for prompt in PROMPTS])
    bodies = [{"lora": [{"id": 0, "scale": 1.0}]}, {"lora": [{"id": 1, "scale": 1.0}]}, {}]
    with serve(gguf, files, n_ctx=256) as server, ThreadPoolExecutor(9) as pool:
        jobs = [[pool.submit(said, server, prompt, **body) for prompt in PROMPTS] for body in bodies]
        got = [[job.result()[0] for job in row] for row in jobs]
        again = [said(server, prompt)[0] for prompt in PROMPTS]
    assert got == wanted and again == wanted[2]
    assert all(len(set(answers)) == 3 for answers in zip(*wanted, strict=True))


def test_a_proxy_of_the_machine_sees_nothing(gguf, monkeypatch):
    """Here one that nobody serves, so that a request through it would fail."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.11")
    with serve(gguf, n_ctx=256, parallel=1) as server:
        assert os.environ["no_proxy"] == "127.0.0.11,127.0.0.1"
        assert said(server, PROMPTS[0])[1] > 0


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("*", "*"), ("127.0.0.1", "127.0.0.1"), ("intra.net", "intra.net,127.0.0.1"), ("", "localhost,127.0.0.1")],
)
def test_hosts_that_need_no_proxy_stay_as_they_are(name, before, after, monkeypatch):
    monkeypatch.setattr(module, "Server", lambda *_: None)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv(name, before)
    serve("x.gguf")
    assert os.environ["no_proxy"] == after


def test_a_stream_is_the_answer_in_pieces(server):
    options = {"model": "model", "messages": PROMPTS[0], "temperature": 0, "max_tokens": 16}
    with OpenAI(base_url=server.url, api_key="none") as client:
        pieces = [piece.choices[0].delta.content for piece in client.chat.completions.create(**options, stream=True)]
        assert [model.id for model in client.models.list()] == ["model"]
    assert len(pieces) > 10 and "".join(filter(None, pieces)) == said(server, PROMPTS[0])[0]


def test_a_prompt_longer_than_one_request_may_be_is_an_error(gguf):
    long = [{"role": "user", "content": "a " * 150}]
    with serve(gguf, n_ctx=256, parallel=2) as server:
        tokens = said(server, long, max_tokens=2)[1]
        assert 128 < tokens < 256  # which would not fit into half of it
        with pytest.raises(BadRequestError, match="256"):
            said(server, [{"role": "user", "content": "a " * 300}])


# --- Why there is a guard ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    return script("bench/server.py")


@pytest.mark.parametrize("name", ["a nested schema", "a nested grammar", "nested template arguments"])
def test_without_the_guard_llama_cpp_dies(name, gguf, bench):
    assert bench.unguarded(gguf, name) == "SIGSEGV"


def test_it_stands_a_storm_and_answers_as_before(server, bench):
    """Every malformed request twice, the second time among others. Nothing is left open, and the second half takes no
    more memory than two of the largest requests. (Over ten rounds of 100 it stood at 83 MB from the fourth one on.)
    """
    questions = bench.questions(2)
    before = [said(server, question, bench.NEW_TOKENS)[0] for question in questions]
    storm = bench.Storm(server, questions, before, bench.NEW_TOKENS)
    every = ["malformed"] * len(bench.MALFORMED)
    left = {"malformed: refused": len(every), "gone: left": 8, "half: left": 8}
    assert storm.rage(["gone", "half"] * 8 + every) == left
    first = storm.held()
    kinds = every + ["good"] * 4 + ["oversized", "half", "gone"] * 8
    assert storm.rage(random.Random(0).sample(kinds, len(kinds))) == {**left, "good: right": 4, "oversized: refused": 8}
    last = storm.held()
    assert last["resident_bytes"] < first["resident_bytes"] + 20e6 and last["open_files"] <= first["open_files"] + 1
    assert [said(server, question, bench.NEW_TOKENS)[0] for question in questions] == before


def test_a_request_that_fails_does_not_keep_those_behind_it_waiting(gguf, bench):
    """All of them behind a stream that has the only slot, and whose reader then leaves."""
    bad, good = bench.MALFORMED["a broken grammar"], bench.chat(max_tokens=1)
    with serve(gguf, parallel=1) as server, ThreadPoolExecutor(3) as pool:
        port = bench.port_of(server)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as reader:
            reader.sendall(bench.chat(max_tokens=1900, stream=True, ignore_eos=True))
            reader.recv(1)
            waiting = [pool.submit(bench.exchange, port, request) for request in (bad, good, good)]
        assert [one.result(timeout=60)[0] for one in waiting] == [400, 200, 200]


def test_a_short_request_does_not_wait_for_a_long_one(server, bench):
    port = bench.port_of(server)
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port), timeout=60) as reader:
        reader.sendall(bench.chat(max_tokens=1900, stream=True, ignore_eos=True))
        reader.recv(1)
        rest = pool.submit(lambda: [*iter(lambda: reader.recv(2**16), b"")])
        assert bench.exchange(port, bench.chat(max_tokens=1))[0] == 200 and not rest.done()
        reader.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("header", ["Origin: http://example.com", "Host: rebound.example.com"])
def test_a_web_page_gets_no_answer(server, bench, header):
    """By its origin, or by a name of its own that it lets point to this machine."""
    host = "" if header.startswith("Host") else "Host: 127.0.0.1\r\n"
    request = bench.chat().replace(b"Host: 127.0.0.1", f"{host}{header}".encode())
    assert bench.exchange(bench.port_of(server), request)[0] == 403
    assert bench.exchange(bench.port_of(server), bench.chat())[0] == 200


def test_it_listens_on_this_machine_only_and_nobody_goes_round_the_guard(server, bench):
    """Its sockets as the kernel lists them (/proc/net/tcp), and a knock at every other address of the machine."""
    process, port = psutil.Process(server.process.pid), bench.port_of(server)
    listening = {one.laddr for one in process.net_connections(kind="inet") if one.status == "LISTEN"}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    addresses = [one for each in psutil.net_if_addrs().values() for one in each if one.family == socket.AF_INET]
    for address in {one.address for one in addresses} - {"127.0.0.1"}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)
    (inner,) = {address.port for address in listening} - {port}
    assert bench.exchange(inner, bench.chat())[0] == 401


def test_a_request_may_come_in_pieces(server, bench):
    request = bench.chat(max_tokens=1)
    with socket.create_connection(("127.0.0.1", bench.port_of(server)), timeout=60) as connection:
        for piece in (request[:9], request[9:-20], request[-20:]):
            connection.sendall(piece)
            time.sleep(0.05)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_the_limits_are_what_they_say():
    """The last body that fits, and the first that does not."""
    deep, settings, long = module.MOST_DEPTH, module.MOST_SETTINGS - len(json.dumps({"a": ""})), "x" * 99999
    fits = [b"[" * deep + b"]" * deep, json.dumps({"a": "x" * settings, "prompt": long, "messages": long}).encode()]
    assert [json.loads(checked(body)) for body in fits] == [json.loads(body) for body in fits]
    for more in (deep + 1, 100_000):
        with pytest.raises((ValueError, RecursionError)):
            checked(b"[" * more + b"]" * more)
    with pytest.raises(ValueError, match="bytes of settings"):
        checked(json.dumps({"a": "x" * (settings + 1)}).encode())


def test_what_is_checked_is_what_llama_cpp_reads():
    """A field that stands there twice could be one thing here and another there."""
    assert checked(b'{"grammar": "((((", "grammar": "x"}') == b'{"grammar": "x"}'


# --- The start and the end --------------------------------------------------------------------------------------------


def test_a_file_that_is_none_or_no_gguf_or_half_of_one_is_an_error_with_the_log(gguf, tmp_path):
    for name, content in (("other.gguf", b"\x08\0\0\0\0\0\0\0{}"), ("half.gguf", gguf.read_bytes()[:-50_000])):
        (tmp_path / name).write_bytes(content)
    for name in ("missing.gguf", "other.gguf", "half.gguf"):
        with pytest.raises(RuntimeError, match=rf"no start(.|\n)*{name}"):
            serve(tmp_path / name)
    with pytest.raises(RuntimeError, match=r"no start(.|\n)*missing.gguf"):
        serve(gguf, [tmp_path / "missing.gguf"])


def test_stop_ends_the_process_and_may_be_called_twice(gguf):
    server = serve(gguf, parallel=1)
    server.stop()
    server.stop()
    assert not psutil.pid_exists(server.process.pid)


def test_a_start_that_is_stopped_leaves_no_process(monkeypatch):
    """Jupyter's stop button while a server that never gets ready is waited for."""
    started, popen = [], subprocess.Popen
    press = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))

    def silent(command, **pipes):
        started.append(popen(["sleep", "60"], **pipes))
        press.start()
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", silent)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            serve("some.gguf")
        assert started[0].poll() is not None
    finally:
        signal.signal(signal.SIGINT, before)
        started[0].kill()


def test_it_does_not_outlive_a_killed_notebook(gguf, bench):
    """Here in the middle of an answer; the server sees its standard input end, whatever it does."""
    code = f"from ftlab.serve import serve; s = serve({str(gguf)!r}); print(s.process.pid, s.url, flush=True); input()"
    notebook = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, url = notebook.stdout.readline().split()
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as reader:
        reader.sendall(bench.chat(max_tokens=1900, stream=True, ignore_eos=True))
        reader.recv(1)
        os.kill(notebook.pid, signal.SIGKILL)
        notebook.communicate()
        deadline = time.monotonic() + 20
        while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not psutil.pid_exists(int(pid))
