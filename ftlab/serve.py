"""OpenAI's API on this machine: llama.cpp answers from a GGUF file, in a process of its own on 127.0.0.1.

    with serve("ask-q8_0.gguf", lora=["ask-adapter.gguf"]) as server:
        client = OpenAI(base_url=server.url, api_key="none")
        client.chat.completions.create(model="model", messages=messages, extra_body={"lora": [{"id": 0, "scale": 1.0}]})

A guard stands before llama.cpp, for four reasons (xllamacpp 2026.10; bench/server.py). 100,000 brackets in a
JSON schema, a grammar or a template argument end it with a segmentation fault. One word of 10 MB keeps it busy for
minutes. A request that waits for a slot and then fails leaves those behind it waiting for ever. And any page that a
browser shows could ask it. This file is also that process's program, so it imports nothing heavy.
"""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 2**20  # of a request: a prompt of 100,000 tokens has half of it
MOST_DEPTH = 64  # brackets within brackets
MOST_SETTINGS = 2**15  # bytes of a request beside its messages or prompt: a grammar nests without JSON's brackets


class Server(contextlib.AbstractContextManager):
    """A running server: `url` for the `openai` client. It ends with `stop()`, its `with` block, or this process."""

    def __init__(self, *settings: object) -> None:
        command = [sys.executable, "-P", __file__, json.dumps(settings)]
        env = {**os.environ, "GOMP_SPINCOUNT": "2000"}  # threads that spin make a shared machine 20 times slower
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self.process = subprocess.Popen(command, **pipes, env=env, start_new_session=True)  # Ctrl-C is not for it
        try:
            self.url = self.process.stdout.readline().decode().strip()
        except BaseException:  # a cell that is stopped meanwhile gets no Server that it could stop
            self.stop()
            raise
        if not self.url:
            self.stop()
            self._log.seek(0)
            raise RuntimeError(f"no start; the log ends:\n{self._log.read().decode(errors='replace')[-2000:]}")

    def stop(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    __exit__ = stop


def serve(gguf: str | Path, lora: Sequence[str | Path] = (), n_ctx: int = 2048, parallel: int = 4) -> Server:
    """llama.cpp's server on a GGUF file, ready to answer at a free port; its model is called "model".

    lora: adapters as GGUF. The base answers, unless a request names an adapter by its place. n_ctx: tokens of one
    request, prompt and answer. parallel: how many are decoded in one batch; more wait their turn. Greedy answers of an
    F16 file equal transformers' in fp32: the KV cache is fp32; flash attention, fp16 on a CPU, is off. 127.0.0.1 joins
    this process's `no_proxy`, so that no proxy sees the questions. Raises RuntimeError with llama.cpp's log.
    """
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "localhost"
    os.environ["no_proxy"] = hosts if hosts == "*" or "127.0.0.1" in hosts.split(",") else f"{hosts},127.0.0.1"
    return Server(str(gguf), [str(file) for file in lora], n_ctx, parallel)


def _depth(part: object) -> int:
    parts = part.values() if isinstance(part, dict) else part
    return 1 + max(map(_depth, parts), default=0) if isinstance(part, dict | list) else 0


def checked(body: bytes) -> bytes:
    """The body as llama.cpp may read it, written anew. Raises ValueError or RecursionError for one that it must not."""
    asked = json.loads(body)
    if _depth(asked) > MOST_DEPTH:
        raise ValueError(f"more than {MOST_DEPTH} brackets within brackets")
    settings = {k: v for k, v in asked.items() if k not in ("messages", "prompt")} if isinstance(asked, dict) else {}
    if len(json.dumps(settings)) > MOST_SETTINGS:
        raise ValueError(f"more than {MOST_SETTINGS} bytes of settings")
    return json.dumps(asked).encode()


async def _guard(inner: str, key: str, parallel: int, ready: int) -> None:
    """Passes fit requests to llama.cpp at `inner`, `parallel` at a time, until stdin closes; tells `ready` its URL."""
    import aiohttp
    from aiohttp import web

    slots, headers = asyncio.Semaphore(parallel), {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async def meet(request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers or request.url.host not in ("127.0.0.1", "localhost"):
            raise web.HTTPForbidden(text="this server answers programs on this machine, not web pages")
        try:
            body = checked(await request.read()) if request.method == "POST" else None
        except (ValueError, RecursionError) as error:
            raise web.HTTPBadRequest(text=f"the request is refused: {error}") from error
        async with (
            slots if body else contextlib.nullcontext(),
            session.request(request.method, inner + request.raw_path, data=body, headers=headers) as answer,
        ):
            reply = web.StreamResponse(status=answer.status)
            reply.content_type, reply.content_length = answer.content_type, answer.content_length
            await reply.prepare(request)
            async for piece in answer.content.iter_any():
                await reply.write(piece)
        return reply

    app = web.Application(client_max_size=MOST_BYTES)
    app.router.add_route("*", "/{path:.*}", meet)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)  # a reader that leaves frees its slot
    unlimited, for_ever = aiohttp.TCPConnector(limit=0, force_close=True), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=unlimited, timeout=for_ever) as session:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        os.write(ready, f"http://127.0.0.1:{runner.addresses[0][1]}/v1\n".encode())
        await asyncio.to_thread(sys.stdin.read)


def _llama_cpp(gguf: str, lora: list[str], n_ctx: int, parallel: int) -> None:
    """Runs llama.cpp's server and the guard in this process, until stdin closes."""
    import xllamacpp

    ready, threads = os.dup(1), os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    os.dup2(2, 1)  # what llama.cpp prints belongs to the log
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = gguf, {"model"}
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [secrets.token_hex()]  # for the guard alone
    params.n_ctx, params.n_parallel = n_ctx * parallel, parallel
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib = 0  # no store of old prompts: its default may take 8 GiB
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(str(threads).split(",")[0])
    params.ui = params.warmup = False
    params.cache_prompt = not lora  # a slot must not go on from what it computed with another adapter
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0.0) for file in lora]  # off unless asked for
    server = xllamacpp.Server(params)  # answers from threads of its own
    asyncio.run(_guard(server.listening_address, params.api_keys[0], parallel, ready))
    os._exit(0)  # without a wait for answers that nobody reads any more


if __name__ == "__main__":
    _llama_cpp(*json.loads(sys.argv[1]))
