"""A local server with OpenAI's API, and many questions at once: llama.cpp from a GGUF file, vLLM from a model folder.

    with serve("model-f16.gguf", lora="adapter.gguf") as server:
        answers = ask(server.base_url, prompts)

llama.cpp's server is `ftlab.serve`. Both run as processes of their own, bound to 127.0.0.1: whatever happens to them,
the notebook goes on, and they end with it.
"""

import atexit
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ftlab import serve as new

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
            stdin=subprocess.PIPE,
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


def serve(gguf: str | Path, lora=None, n_ctx: int = 2048, parallel: int = 4) -> new.Server:
    """`ftlab.serve.serve`, with `base_url` for `ask`."""
    server = new.serve(gguf, lora, n_ctx, parallel)
    server.base_url = server.url
    return server


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
