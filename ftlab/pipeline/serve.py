"""A local server with OpenAI's API, and many questions at once: llama.cpp from a GGUF file, vLLM from a model folder.

    with serve("model-f16.gguf", lora="adapter.gguf") as server:
        answers = ask(server.base_url, prompts)

Both run as processes of their own, bound to 127.0.0.1: whatever happens to them, the notebook goes on, and they end
with it. This file is also the program of the llama.cpp one, so it imports nothing heavy.

llama.cpp's server follows the nesting of a request by recursion: 100,000 brackets in a JSON schema, a grammar or an
argument of the template end it with a segmentation fault, and a word of 10 MB keeps it busy for minutes. And when a
request that waited for a slot fails at its start (a broken grammar), those behind it wait until some later request is
through: for ever, if none comes. So a guard stands before it. It answers the unfit ones itself, in OpenAI's form of an
error, lets only as many in as there are slots, and turns away web pages, which any site could let a browser ask (they
send an Origin). What 1,000 requests do to it, most of them bad: bench/server.py.
"""

import asyncio
import atexit
import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 2**20  # of a request: a prompt of 100,000 tokens has half of it
MOST_DEPTH = 64  # brackets within brackets
MOST_SETTINGS = 2**15  # bytes of a request beside its messages or prompt: a grammar nests without JSON's brackets
PATIENCE = 30  # seconds in which a request must be there

ADAPTER = {"lora": [{"id": 0, "scale": 1.0}]}  # the `extra_body` of a request that wants the adapter


class Server:
    """A server process that answers at `base_url`; ends with `stop()`, with its `with` block, or with this process.

    Raises RuntimeError with the end of its log if it ends, or does not answer /health within `timeout` seconds.
    """

    def __init__(self, command: list[str], port: int, timeout: float, env: dict[str, str] | None = None) -> None:
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes when this process ends, even by SIGKILL: `_llama_cpp` waits for that
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # a process group of its own: vLLM starts workers, and Ctrl-C is not for it
            env={**os.environ, **(env or {})},
        )
        atexit.register(self.stop)
        deadline = time.monotonic() + timeout
        try:
            while not _healthy(port):
                if (code := self._process.poll()) is not None:
                    raise RuntimeError(f"the server ended with exit code {code}; the end of its log:\n{self._tail()}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer after {timeout:.0f} s; the end of its log:\n{self._tail()}")
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and its workers; a second call does nothing."""
        atexit.unregister(self.stop)
        for kill in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, kill)
                try:
                    self._process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    continue
        self._process.stdin.close()
        self._log.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]


def serve(
    gguf: str | Path,
    lora: str | Path | Sequence[str | Path] | None = None,
    port: int | None = None,
    n_ctx: int = 2048,
    parallel: int = 4,
    alias: str = "model",
) -> Server:
    """llama.cpp's server on a GGUF file, ready to answer.

    lora: an adapter as GGUF, or several. A request is answered by the base, unless its `extra_body` says which adapter
    it wants: ADAPTER for the first one, `{"lora": [{"id": 1, "scale": 1.0}]}` for the second.
    port: None takes a free one. n_ctx: tokens (prompt + answer) of *one* request; llama.cpp's own setting of that name
    is shared by all slots, so it gets n_ctx * parallel. parallel: requests decoded in one batch; more wait their turn.

    The KV cache is fp32 and flash attention, which a CPU does in fp16, is off: with either default some greedy answers
    are no longer those of transformers in fp32. Equal: tests/test_serve.py.

    Raises FileNotFoundError or ValueError if a file is no GGUF, RuntimeError if the port is taken or the start fails.
    """
    lora = [str(file) for file in ([lora] if isinstance(lora, str | Path) else lora or [])]
    for file in (gguf, *lora):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} does not exist. Was it made, with `to_gguf` or `adapter_to_gguf`?")
        with Path(file).open("rb") as stream:
            if (magic := stream.read(4)) != b"GGUF":
                raise ValueError(f"{file} starts with {magic!r}, a GGUF file with b'GGUF': is it a safetensors file?")
    port = _free_port(port)
    options = json.dumps([str(gguf), lora, port, n_ctx, parallel, alias])
    # llama.cpp's threads wait for each other by spinning. Where something else wants the cores too, that made the
    # server 20 times slower (24 answers: 230 s against 10.5 alone); after 2,000 turns they sleep: 43 s, and 10.8 alone.
    return Server([sys.executable, "-P", __file__, options], port, timeout=120, env={"GOMP_SPINCOUNT": "2000"})


def serve_vllm(
    folder: str | Path,
    lora: dict[str, str | Path] | None = None,
    port: int | None = None,
    n_ctx: int = 2048,
    alias: str = "model",
    python: str | Path | None = None,
) -> Server:
    """vLLM's server on a model folder, in the environment that `make vllm` makes; ready in half a minute to two.

    lora: adapters, PEFT folders by name. A request names one as its model, or `alias` for the base.
    On a GPU with vLLM's own defaults; on a CPU in fp32, without compilation, with a KV cache of 0.5 GiB.
    python: another interpreter that has vLLM.

    Raises RuntimeError if there is no such environment, the port is taken, or the start fails.
    """
    port = _free_port(port)
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return Server(vllm_command(folder, port, lora, n_ctx, alias, python), port, timeout=600, env=env)


def vllm_command(
    folder: str | Path,
    port: int,
    lora: dict[str, str | Path] | None = None,
    n_ctx: int = 2048,
    alias: str = "model",
    python: str | Path | None = None,
) -> list[str]:
    """The command line of `serve_vllm`: what one would type on a server."""
    import torch

    cpu = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "512M"]
    adapters = []
    if wrong := [name for name in lora or () if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)]:
        raise ValueError(f"adapter names: got {wrong}, wanted letters, digits, - _ and .: vLLM is given `name=folder`")
    if lora:  # max-loras: how many may meet in one batch; vLLM's default is one, and the others wait
        ranks = [json.loads((Path(path) / "adapter_config.json").read_text())["r"] for path in lora.values()]
        adapters = ["--enable-lora", "--max-loras", str(len(lora)), "--max-lora-rank", str(max(ranks))]
        adapters += ["--lora-modules", *(f"{name}={path}" for name, path in lora.items())]
    return [
        str(python or environment("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(n_ctx), "--served-model-name", alias,
        *([] if torch.cuda.is_available() else cpu), *adapters,
    ]  # fmt: skip


def environment(name: str) -> Path:
    """The interpreter of .venv-<name>, an environment for a library that does not fit into the course's own.

    Raises RuntimeError, saying what to run, if it is not there.
    """
    python = Path(__file__).resolve().parents[2] / f".venv-{name}" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(f"{python} is not there: run `make {name}` in the course's folder (needs the network once)")
    return python


@dataclass(frozen=True)
class Answer:
    """What the server said to one prompt; `seconds` counts from sending it, waiting for a slot too."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def ask(
    base_url: str,
    prompts: list[list[dict]],
    model: str = "model",
    max_tokens: int = 80,
    workers: int = 8,
    extra_body: dict | None = None,
) -> list[Answer]:
    """The greedy answers to prompts (each a list of messages), in their order, through the `openai` client.

    `workers` requests are under way at once: at least the server's `parallel`, or some of its slots stay empty.
    """
    import httpx
    from openai import OpenAI

    direct = httpx.Client(trust_env=False, timeout=600)  # a proxy of the machine must not see 127.0.0.1
    with OpenAI(base_url=base_url, api_key="none", http_client=direct, max_retries=0) as client:

        def answer(messages: list[dict]) -> Answer:
            start = time.perf_counter()
            reply = client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=max_tokens, extra_body=extra_body
            )
            text, usage = reply.choices[0].message.content, reply.usage
            return Answer(text, usage.prompt_tokens, usage.completion_tokens, time.perf_counter() - start)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(answer, prompts))


# --- what the functions above need ------------------------------------------------------------------------------------


def _free_port(port: int | None) -> int:
    """`port` if it is free, or any free one for None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise RuntimeError(f"port {port} is taken ({error}): stop what uses it, or leave port=None") from error
        return probe.getsockname()[1]


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _llama_cpp(gguf: str, lora: list[str], port: int, n_ctx: int, parallel: int, alias: str) -> None:
    """Runs llama.cpp's server in this process, behind the guard at `port`, until standard input closes."""
    import xllamacpp

    key = secrets.token_hex()  # so that nobody goes round the guard
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.model_alias = {alias}
    params.hostnames = ["127.0.0.1"]
    params.port = _free_port(None)
    params.api_keys = [key]
    params.n_ctx = n_ctx * parallel
    params.n_parallel = parallel
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib = 0  # no store of old prompts: its default may take 8 GiB
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.ui = False
    if lora:
        params.cache_prompt = False  # a slot must not go on from what it computed with the adapter for one without
        # scale 0 unless the request says otherwise
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0.0) for file in lora]
    server = xllamacpp.Server(params)  # answers from threads of its own
    asyncio.run(_guard(port, params.port, key, parallel))
    del server


# --- The guard: one request a connection, looked at before llama.cpp reads it -----------------------------------------


class _RefusedError(Exception):
    """(HTTP status, what is wrong)"""


async def _guard(port: int, inner: int, key: str, parallel: int) -> None:
    """Passes what `_request` lets through from `port` to llama.cpp at `inner`, until standard input closes."""
    slots = asyncio.Semaphore(parallel)

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, TimeoutError), contextlib.closing(writer):  # gone: nobody to tell
            try:
                async with asyncio.timeout(PATIENCE):
                    request = await _request(reader, key)
            except _RefusedError as refused:
                writer.write(_refusal(*refused.args))
                writer.write_eof()
                async with asyncio.timeout(PATIENCE):
                    await _until_gone(reader)  # a client that is still sending would not read the answer
                return
            async with slots if request.startswith(b"POST") else contextlib.nullcontext():
                answer, asked = await asyncio.open_connection("127.0.0.1", inner)
                with contextlib.closing(asked):  # with which llama.cpp ends an answer that nobody reads any more
                    asked.write(request)
                    await _first_of(_pass_on(answer, writer), _until_gone(reader))

    async with await asyncio.start_server(meet, "127.0.0.1", port, backlog=1024):
        await asyncio.to_thread(sys.stdin.read)


async def _request(reader: asyncio.StreamReader, key: str) -> bytes:
    """The next request, with `key` and as the last of its connection. Raises _RefusedError for one that is unfit."""
    try:
        start, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
    except asyncio.LimitOverrunError as error:
        raise _RefusedError(431, "the header is longer than 64 KiB") from error
    if not re.fullmatch(rb"[A-Z]+ /[!-~]* HTTP/1\.[01]", start) or not all(b":" in line for line in lines):
        raise _RefusedError(400, "this is not HTTP/1.1")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    if any(name == b"origin" for name, _ in headers):
        raise _RefusedError(403, "this server answers programs, not web pages")
    if any(name == b"transfer-encoding" for name, _ in headers):
        raise _RefusedError(411, "wanted a Content-Length")
    lengths = [value for name, value in headers if name == b"content-length"] or [b"0"]
    if len(lengths) > 1 or not lengths[0].isdigit():
        raise _RefusedError(400, f"Content-Length: got {lengths!r:.80}, wanted one number")
    if len(lengths[0]) > 9 or int(lengths[0]) > MOST_BYTES:
        raise _RefusedError(413, f"the request is longer than {MOST_BYTES} bytes")
    body = await reader.readexactly(int(lengths[0]))
    if body:
        _check_body(body)
    ours = {b"connection": b"close", b"content-length": b"%d" % len(body), b"authorization": b"Bearer " + key.encode()}
    kept = [header for header in headers if header[0] not in ours]
    return b"\r\n".join([start, *(b"%b: %b" % header for header in [*kept, *ours.items()]), b"", body])


def _check_body(body: bytes) -> None:
    """Raises _RefusedError if llama.cpp would not survive this, or it is no JSON."""
    try:
        asked = json.loads(body)
    except RecursionError as error:
        raise _RefusedError(400, f"more than {MOST_DEPTH} brackets within brackets") from error
    except ValueError as error:
        raise _RefusedError(400, f"the body is no JSON in UTF-8: {error}") from error
    level, depth = [asked], 0
    while level := [whole for whole in level if isinstance(whole, dict | list)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise _RefusedError(400, f"more than {MOST_DEPTH} brackets within brackets")
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
    if isinstance(asked, dict):
        settings = {name: value for name, value in asked.items() if name not in ("messages", "prompt")}
        if len(json.dumps(settings)) > MOST_SETTINGS:
            raise _RefusedError(400, f"more than {MOST_SETTINGS} bytes of settings")


def _refusal(status: int, message: str) -> bytes:
    error = {"error": {"code": status, "message": message, "type": "invalid_request_error"}}
    body = json.dumps(error).encode()
    head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while piece := await source.read(2**16):
        target.write(piece)
        await target.drain()


async def _until_gone(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**16):
        pass


async def _first_of(*several) -> None:
    """Waits until one of them ends, and ends the others."""
    tasks = [asyncio.create_task(one) for one in several]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    for task in done:
        task.result()


if __name__ == "__main__":
    _llama_cpp(*json.loads(sys.argv[1]))
