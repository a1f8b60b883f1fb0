"""llama.cpp's server under 1,000 requests, most of them bad, 16 at once: does it stand, leak, and still answer right?

    python bench/server.py            about 6 minutes on two busy cores

SmolLM2 as F16 behind `ftlab.serve.serve`, requests of up to 512 tokens. First its greedy answers to 8
questions of data/general. Then rounds of 100 requests, mixed by a seed, 16 under way at once:

    good        one of the questions: the answer must be the one from before, character for character
    malformed   the next of MALFORMED: broken JSON and HTTP, wrong types, numbers out of range, deep nesting, 10 MB
    oversized   a prompt longer than the context
    gone        a streamed answer, whose reader closes the socket after the first piece
    half        a request whose end never comes; its sender closes the socket

After each round, when every slot is idle: resident memory, open files and threads of the server's process, and what it
has written to its log. Then 16 streams at once, all left by their readers, and the questions once more.

unguarded: what becomes of llama.cpp's server, a new one each time, when the guard lets one of these requests through.
guard_ms: what the guard in front of llama.cpp costs a request, by GET /health through it and past it.

tests/test_serve.py runs a short storm through the same functions.
"""

import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import psutil
from openai import OpenAI

from ftlab.export import to_gguf
from ftlab.models import model_path
from ftlab.paths import DATA
from ftlab.serve import Server, serve

REQUESTS, ROUND, AT_ONCE = 1000, 100, 16
N_CTX, NEW_TOKENS = 512, 8
SHARES = {"good": 30, "malformed": 40, "oversized": 10, "gone": 15, "half": 5}
FINE = {"good: right", "malformed: refused", "oversized: refused", "gone: left", "half: left"}
CHAT = "/v1/chat/completions"


# --- Requests as the bytes that go over the wire ----------------------------------------------------------------------


def post(body: bytes, path: str = CHAT, headers: str = "") -> bytes:
    length = "" if "Content-Length" in headers or "Transfer" in headers else f"Content-Length: {len(body)}\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{length}{headers}\r\n"
    return head.encode() + body


def chat(**settings) -> bytes:
    """A short chat with these settings."""
    messages = [{"role": "user", "content": "Hi"}]
    return post(json.dumps({"messages": messages, "max_tokens": 2, "temperature": 0} | settings).encode())


def said(content: object) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


def nested(start: bytes, end: bytes, before: bytes = b"", after: bytes = b"", inmost: bytes = b"1") -> bytes:
    """100,000 brackets within brackets, at a place of the body."""
    return post(before + start * 100_000 + inmost + end * 100_000 + after)


def schema(inner: object) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": inner}})


AS_USUAL = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, '
MALFORMED = {  # each must be answered with an error
    "no JSON": post(b"{not json"),
    "no body": post(b""),
    "no UTF-8": post(b'{"messages": [{"role": "user", "content": "\xff\xfe\x80"}]}'),
    "half a surrogate": post(rb'{"messages": [{"role": "user", "content": "\ud800"}]}'),
    "a list": post(b"[]"),
    "null": post(b"null"),
    "1e999": post(b"1e999"),
    "NaN": chat(temperature=float("nan")),
    "no messages": post(b'{"model": "model"}'),
    "messages: null": chat(messages=None),
    "messages: text": chat(messages="Hi"),
    "messages: a number": chat(messages=7),
    "a message: null": chat(messages=[None]),
    "a message without role": chat(messages=[{"content": "Hi"}]),
    "a message without content": chat(messages=[{"role": "user"}]),
    "role: a number": chat(messages=[{"role": 5, "content": "Hi"}]),
    "content: a number": said(5),
    "content: a mapping": said({"a": 1}),
    "content: numbers": said([1]),
    "content: a file": said([{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]),
    "content: an address": said([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]),
    "max_tokens: text": chat(max_tokens="many"),
    "max_tokens: -5": chat(max_tokens=-5),
    "max_tokens: 2**70": chat(max_tokens=2**70),
    "max_tokens: 1e30": chat(max_tokens=1e30),
    "max_tokens: a list": chat(max_tokens=[1]),
    "5,000 digits": post(AS_USUAL + b'"seed": ' + b"9" * 5000 + b"}"),
    "temperature: text": chat(temperature="hot"),
    "seed: text": chat(seed="x"),
    "n: 0": chat(n=0),
    "n: 1,000": chat(n=1000),
    "stream: text": chat(stream="x"),
    "lora: text": chat(lora="x"),
    "repeat_penalty: 0": chat(repeat_penalty=0, temperature=1),
    "samplers: numbers": chat(samplers=[5]),
    "a broken grammar": chat(grammar="root ::= ("),
    "a grammar of itself": chat(grammar='root ::= root "a" | "a"'),
    "a grammar of 1e9 a": chat(grammar='root ::= "a"{1000000000}'),
    "a schema of itself": schema({"$ref": "#"}),
    "a schema elsewhere": schema({"$ref": "https://127.0.0.1:9/x"}),
    "a schema of 1e9 items": schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}),
    "tools: text": chat(tools="x"),
    "tools: numbers": chat(tools=[1], tool_choice="required"),
    "unknown tokens": post(b'{"prompt": [1, 99999999], "max_tokens": 2}', "/v1/completions"),
    "tokens below 0": post(b'{"prompt": [-1], "max_tokens": 2}', "/v1/completions"),
    "text of unknown tokens": post(b'{"tokens": [1000000000, -5]}', "/detokenize"),
    "a slot to a file": post(b'{"filename": "../../x"}', "/slots/0?action=save"),
    "another model": post(b'{"model": "../x"}', "/models/load"),
    "an unknown path": post(b"{}", "/nothing"),
    "a path upwards": post(b"{}", "/../../etc/hostname"),
    # nesting: where llama.cpp alone would end, or not come to an end
    "nested lists": nested(b"[", b"]"),
    "nested mappings": nested(b'{"a":', b"}"),
    "nested content": nested(b"[", b"]", b'{"messages": [{"role": "user", "content": ', b"}]}"),
    "nested template arguments": nested(b"[", b"]", AS_USUAL + b'"chat_template_kwargs": {"a": ', b"}}"),
    "nested tools": nested(b"[", b"]", AS_USUAL + b'"tools": ', b"}"),
    "a nested schema": nested(
        b'{"type": "array", "items": ',
        b"}",
        AS_USUAL + b'"response_format": {"type": "json_schema", "json_schema": {"schema": ',
        b"}}}",
        b'{"type": "string"}',
    ),
    "a nested grammar": chat(grammar="root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000),
    # too much
    "10 MB of one word": said("x" * 10_000_000),
    "10 MB of words": said("word " * 2_000_000),
    "10 MB of no JSON": post(b"x" * 10_000_000),
    "10,000 headers": post(b"{}", headers="".join(f"X-{i}: {i}\r\n" for i in range(10_000))),
    "a header of 1 MB": post(b"{}", headers=f"X: {'x' * 1_000_000}\r\n"),
    "a path of 100 kB": post(b"{}", path="/" + "x" * 100_000),
    # HTTP
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "a line without a colon": post(b"{}", headers="X\r\n"),
    "Content-Length: -5": post(b"{}", headers="Content-Length: -5\r\n"),
    "Content-Length: 10**30": post(b"{}", headers=f"Content-Length: {10**30}\r\n"),
    "two lengths": post(b"{}", headers="Content-Length: 2\r\nContent-Length: 40\r\n"),
    "broken chunks": post(b"zz\r\n{}\r\n", headers="Transfer-Encoding: chunked\r\n"),
    "from a web page": post(b"{}", headers="Origin: http://example.com\r\n"),
}


# --- One of each kind -------------------------------------------------------------------------------------------------


def port_of(server: Server) -> int:
    return int(server.url.split(":")[2].split("/")[0])


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, body = answer.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), body


def leave(port: int, request: bytes, seen: bytes, abruptly: bool = False) -> None:
    """Sends the request and closes the socket when `seen` has come; with a reset instead of an end, if abruptly."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(request)
        got = b""
        while seen not in got:
            got += connection.recv(2**16) or b"closed" + seen
        if abruptly:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if got.endswith(b"closed" + seen):
        raise ConnectionError(f"the server closed the connection first, after {got[:200]!r}")


def stream(prompt: list[dict]) -> bytes:
    return chat(messages=prompt, max_tokens=400, stream=True, ignore_eos=True)


class Storm:
    """Requests of all kinds at a server, each checked; `wanted` are its answers to `prompts` from before."""

    def __init__(self, server: Server, prompts: list[list[dict]], wanted: list[str], new_tokens: int) -> None:
        self.server, self.port = server, port_of(server)
        self.prompts, self.wanted, self.new_tokens = prompts, wanted, new_tokens
        self.process = psutil.Process(server.process.pid)
        self.malformed = 0  # how many of them were sent

    def rage(self, kinds: list[str]) -> Counter:
        """How often each (kind, outcome) came of these requests, AT_ONCE under way at a time."""
        numbered, seen = [], Counter()
        for kind in kinds:
            numbered.append((kind, seen[kind] + (self.malformed if kind == "malformed" else 0)))
            seen[kind] += 1
        self.malformed += seen["malformed"]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return Counter(pool.map(lambda one: f"{one[0]}: {getattr(self, '_' + one[0])(one[1])}", numbered))

    def _good(self, i: int) -> str:
        which = i % len(self.prompts)
        status, body = exchange(self.port, chat(messages=self.prompts[which], max_tokens=self.new_tokens))
        text = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else status
        return "right" if text == self.wanted[which] else f"{text!r} instead of {self.wanted[which]!r}"

    def _malformed(self, i: int) -> str:
        name = list(MALFORMED)[i % len(MALFORMED)]
        try:
            status, _ = exchange(self.port, MALFORMED[name])
        except ConnectionError:  # closed before all of it was read
            status = 400
        return "refused" if 400 <= status < 600 else f"{name}: {status}"

    def _oversized(self, i: int) -> str:
        status, body = exchange(self.port, said(f"{i} " + "word " * 4 * N_CTX))
        return (
            "refused" if status == 400 and b"exceeds the available context size" in body else f"{status} {body!r:.200}"
        )

    def _gone(self, i: int) -> str:
        leave(self.port, stream(self.prompts[i % len(self.prompts)]), b"data: ", abruptly=i % 2 == 0)
        return "left"

    def _half(self, i: int) -> str:
        request = post(b'{"messages": ', headers="Content-Length: 1000\r\n")
        leave(self.port, request[: len(request) - 13 * (i % 3)], b"")
        return "left"

    def idle(self) -> None:
        """Waits until every slot is idle. Raises TimeoutError if one of them still writes for nobody."""
        deadline = time.monotonic() + 60
        while any(slot["is_processing"] for slot in json.loads(exchange(self.port, _get("/slots"))[1])):
            if time.monotonic() > deadline:
                raise TimeoutError("a slot is still at work, with no request under way")
            time.sleep(0.1)

    def held(self) -> dict[str, int]:
        """What the server's process holds, with nothing under way."""
        self.idle()
        listening = self.process.net_connections(kind="inet")
        while any(connection.status != "LISTEN" for connection in listening):  # closing
            time.sleep(0.05)
            listening = self.process.net_connections(kind="inet")
        memory, log = self.process.memory_info().rss, self.server._log.seek(0, 2)
        return {
            "resident_bytes": memory,
            "open_files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "log_bytes": log,
        }


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


def questions(count: int = 8) -> list[list[dict]]:
    """Of the facts with the lowest ids."""
    lines = (DATA / "general" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = sorted(map(json.loads, lines), key=lambda fact: fact["id"])
    return [[{"role": "user", "content": fact["question"]}] for fact in facts[:count]]


# --- Without the guard ------------------------------------------------------------------------------------------------

DEADLY = (
    "nested template arguments",
    "a nested schema",
    "a nested grammar",
    "nested tools",
    "10 MB of one word",
)
UNGUARDED = """import json, sys
from ftlab import serve
serve.MOST_BYTES = 10**8
serve.checked = lambda body: body
serve._llama_cpp(*json.loads(sys.argv[1]))"""


def unguarded(gguf: Path, name: str, seconds: float = 20) -> str:
    """How the server ends, or answers, this request, the guard's eyes closed."""
    command = [sys.executable, "-c", UNGUARDED, json.dumps([str(gguf), [], N_CTX, 4])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        port = int(process.stdout.readline().split(b":")[2].split(b"/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
            connection.sendall(MALFORMED[name])
            try:
                answer = connection.recv(2**16)
            except TimeoutError:
                answer = b"no answer in %.0f s" % seconds
            except ConnectionError:
                answer = b""
        if answer:
            process.kill()
            return answer.split(b"\r\n")[0].decode()
        return signal.Signals(-process.wait(timeout=60)).name


# --- The whole storm --------------------------------------------------------------------------------------------------


def greedy(server: Server, prompts: list[list[dict]]) -> list[str]:
    """The answers to the prompts, one after another."""
    how = {"model": "model", "temperature": 0, "max_tokens": NEW_TOKENS}
    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        replies = [client.chat.completions.create(messages=prompt, **how) for prompt in prompts]
    return [reply.choices[0].message.content for reply in replies]


def milliseconds(port: int, requests: int = 300) -> float:
    """Median time of a GET /health."""
    taken = []
    for _ in range(requests):
        start = time.perf_counter()
        assert exchange(port, _get("/health"))[0] == 200
        taken.append(1000 * (time.perf_counter() - start))
    return harness.spread(taken)["median"]


def main() -> None:
    kinds = random.Random(0).choices(list(SHARES), list(SHARES.values()), k=REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        gguf = to_gguf(model_path("smollm2"), Path(folder) / "smollm2.gguf")
        with serve(gguf, n_ctx=N_CTX) as server:
            prompts = questions()
            before = greedy(server, prompts)
            storm = Storm(server, prompts, before, NEW_TOKENS)
            held, outcomes, seconds = [{"requests": 0} | storm.held()], Counter(), []
            for done in range(0, REQUESTS, ROUND):
                with harness.stopwatch() as taken:
                    outcomes += storm.rage(kinds[done : done + ROUND])
                held.append({"requests": done + ROUND} | storm.held())
                seconds.append(taken["seconds"])
                print(held[-1], flush=True)
            left = storm.rage(["gone"] * AT_ONCE)
            last = storm.held()
            after = greedy(server, prompts)
            listening = (one for one in storm.process.net_connections(kind="inet") if one.status == psutil.CONN_LISTEN)
            (inner,) = {one.laddr.port for one in listening} - {storm.port}
            guard = {"through": milliseconds(storm.port), "past": milliseconds(inner)}
            alive = server.process.poll() is None
        ends = {name: unguarded(gguf, name) for name in DEADLY}
    flat = [row for row in held if row["requests"] >= 200]
    result = {
        "requests": REQUESTS,
        "at_once": AT_ONCE,
        "outcomes": dict(sorted(outcomes.items())),
        "malformed_kinds": len(MALFORMED),
        "seconds_per_round": [round(one, 1) for one in seconds],
        "held": held,
        "resident_growth_200_to_1000": flat[-1]["resident_bytes"] / flat[0]["resident_bytes"] - 1,
        "resident_growth_500_to_1000": flat[-1]["resident_bytes"] / flat[3]["resident_bytes"] - 1,
        "open_files_200_to_1000": sorted({row["open_files"] for row in flat}),
        "streams_left_at_once": dict(left),
        "held_after_that": last,
        "alive": alive,
        "answers": after,
        "answers_equal_those_before": after == before,
        "unguarded": ends,
        "guard_ms": guard,
    }
    print(harness.write("server", result))
    assert alive and after == before and outcomes.keys() | left.keys() <= FINE
    assert result["resident_growth_500_to_1000"] < 0.01  # the allocator's pools fill until then; a leak would go on
    assert len(result["open_files_200_to_1000"]) <= 2


if __name__ == "__main__":
    main()
