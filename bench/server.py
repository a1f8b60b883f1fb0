"""llama.cpp's server under 1,000 requests, most of them bad, 16 at once: does it stand, leak, and still answer right?

    python bench/server.py            about 4 minutes on two cores

SmolLM2 as F16 behind `ftlab.pipeline.serve.serve`, prompts of up to 512 tokens. First its greedy answers to 8 tickets.
Then ten rounds of 100 requests, mixed by a seed, 16 under way at once:

    good        one of the tickets; the answer must be, character for character, the one from before
    malformed   each of MALFORMED in turn: broken JSON and HTTP, wrong types, numbers out of range, deep nesting, 10 MB
    oversized   a prompt longer than the context
    gone        a streamed answer whose reader closes the socket after the first piece
    half        a request whose end never comes, from a reader who waits, and then closes the socket

After each round, with nothing under way: resident memory, open files and threads of the server's process. After the
last, 16 streams at once, all closed by their readers; then the tickets again. `tests/test_serve.py` runs a short storm
through the same functions.
"""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from ftlab.paths import DATA
from ftlab.pipeline.data import TRIAGE_SYSTEM
from ftlab.pipeline.serve import Server, ask, serve

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
NEW_TOKENS = 8
N_CTX = 512
AT_ONCE = 16
ROUND = 100


# --- Requests, as the bytes that go over the wire ---------------------------------------------------------------------


def request(body: bytes, path: str = CHAT, headers: str = "", method: str = "POST") -> bytes:
    length = "" if "content-length" in headers.lower() else f"Content-Length: {len(body)}\r\n"
    start = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{start}{length}{headers}\r\n".encode() + body


def chat(**settings) -> bytes:
    """The body of a short chat with these settings."""
    return json.dumps({"messages": HI, "max_tokens": 2, "temperature": 0} | settings).encode()


def nested(depth: int, start: bytes = b"[", end: bytes = b"]") -> bytes:
    return start * depth + end * depth


def text(content: object) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])
