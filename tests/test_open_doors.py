"""No command of any page or script opens a server to the network: it binds this machine, or asks for a key."""

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from scripts import ROOT
from test_repo import committed

# What starts a server, and what closes it. None: it binds this machine unless it is told otherwise; where that is said:
# sglang python/sglang/srt/server_args.py (host), llama.cpp common/common.h (hostname), llama-cpp-python
# llama_cpp/server/settings.py, ollama envconfig/config.go (Host), jupyter_server serverapp.py (_default_ip; a token,
# too), tensorboard program.py (without --bind_all), uvicorn config.py, gradio networking.py (LOCALHOST_NAME; trackio
# shows its pages with it), mlflow cli.py, mlx_lm/server.py, ray dashboard/consts.py.
# A pattern: without it the server listens on all interfaces. vllm entrypoints/openai/api_server.py (host None), trl
# scripts/vllm_serve.py, text-generation-inference launcher/src/main.rs, http/server.py of Python, streamlit config.py
# (server.address), LLaMA-Factory src/llamafactory/webui/interface.py and api/app.py, litellm proxy/proxy_cli.py.
HERE = r"(?:127\.0\.0\.1|localhost|\[?::1\]?)(?![\w.])"
HOST, KEY = rf"--host[= ]{HERE}", r"--api-key[= ][\"'$]*\w"
SERVERS = {
    r"\bvllm serve\b": rf"{HOST}|{KEY}",
    r"\bvllm\.entrypoints\.[\w.]*api_server\b": rf"{HOST}|{KEY}",
    r"\btrl vllm-serve\b": HOST,
    r"\btext-generation-launcher\b": rf"--hostname[= ]{HERE}",
    r"-m http\.server\b": rf"(?:--bind|-b)[= ]{HERE}",
    r"\bstreamlit run\b": rf"--server\.address[= ]{HERE}",
    r"\bllamafactory-cli (?:webui|webchat)\b": rf"GRADIO_SERVER_NAME={HERE}",
    r"\bllamafactory-cli api\b": rf"API_HOST={HERE}|API_KEY=\S",
    r"\blitellm (?=--)": HOST,
    rf"\bdocker run\b.*(?: -p|--publish)[= ]?(?!{HERE})\d": "nothing closes it",
    r"\bsglang serve\b|\bsglang\.launch_server\b": None,
    r"\bllama-server\b": None,
    r"-m llama_cpp\.server\b": None,
    r"\bollama serve\b": None,
    r"\bjupyter[ -](?:lab|notebook|server)\b(?! workspaces)": None,
    r"\btensorboard --": None,
    r"\buvicorn \w+:": None,
    r"\b(?:gradio \w+\.py|trackio show)\b": None,
    r"\bmlflow (?:ui|server)\b": None,
    r"\bmlx_lm\.server\b": None,
    r"\bray start\b": None,
}
OPENED = r"0\.0\.0\.0|--bind_all|--(?:host|ip|hostname|bind|dashboard-host)[= ][\"']?(?:\*|::(?!1)|\$)|--share\b"
PAGES = {".md", ".ipynb", ".yaml", ".yml", ".json", ".py", ".sh", ".js", ".html", ".svg", ".toml", ".txt", ".jinja", ""}


def strings(value) -> Iterator[str]:
    """All text within lists and dicts; a list of words is a command, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list | tuple):
        words = [each for each in value if isinstance(each, str)]
        yield " ".join(words) if all("\n" not in word for word in words) else ""
        for each in value:
            yield from strings(each)


def python_strings(code: str) -> Iterator[str]:
    """Its strings, and its lists and calls of strings as one command; what is not a constant becomes a ?."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a cell with %magic
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        parts = getattr(node, "elts", None) or getattr(node, "args", None)
        if isinstance(parts, list):
            values = [getattr(part, "value", "?") for part in parts]
            yield " ".join(value if isinstance(value, str) else "?" for value in values)


def texts(file: Path) -> Iterator[str]:
    """What a reader sees of a file, piece by piece."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            source = "".join(cell["source"])
            yield source
            yield from python_strings(source) if cell["cell_type"] == "code" else ()
            for output in cell.get("outputs", []):
                yield "".join(output.get("text", ""))
                yield "\n".join(output.get("traceback", ""))
                for kind, page in output.get("data", {}).items():
                    yield "".join(page) if kind.startswith("text") else ""
        return
    if file.suffix == ".json":
        yield from strings(json.loads(text))
    elif file.suffix in (".yaml", ".yml"):  # which may break a line wherever it wants
        for part in yaml.safe_load_all(text):
            yield from strings(part)
        yield from re.findall(r"(?m)(?:^| )#.*", text)
    else:
        yield text
        yield from python_strings(text) if file.suffix == ".py" else ()


def commands(text: str) -> Iterator[str]:
    """The commands within a text: lines put together again, cut where another command or text begins."""
    text = html.unescape(re.sub(r"</?(?:code|pre|p|b|br|span|li|div)\b[^>]*>", "\n", text))
    text = re.sub(r"\\\\?(?:\n|\\n)\s*", " ", text)
    text = re.sub(r"(?<!`)`[^`]{1,300}`(?!`)", lambda code: code[0].replace("\n", " "), text)
    yield from re.split(r"\n|`|;|&&|\|", re.sub(r"[ \t]+", " ", text))


def is_open(command: str) -> bool:
    """Whether a command starts a server that listens to the network and asks for no key."""
    for program, closed in SERVERS.items():
        if re.search(program, command):
            if closed is None and re.search(OPENED, command) and not re.search(KEY, command):
                return True
            if closed is not None and not re.search(closed, command):
                return True
    return False


def open_doors(files: list[Path]) -> list[str]:
    return sorted({
        f"{file.name}: {command.strip()[:120]}"
        for file in files for text in texts(file) for command in commands(text) if is_open(command)
    })  # fmt: skip


def test_no_command_opens_a_server_to_the_network():
    files = [file for file in committed() if ROOT / "tests" not in file.parents]
    pages = [file for file in files if file.suffix in PAGES]
    kinds = {file.suffix for file in pages}
    assert {".md", ".ipynb", ".yaml", ".json", ".py", ".sh", ".js", ""} <= kinds and len(pages) > 150
    assert open_doors(pages) == []


def test_the_reader_meets_the_commands_that_are_here():
    """Else it would find nothing wrong because it finds nothing."""
    seen = {"README.md": "http.server", "notebooks/05_practical_pipeline.ipynb": "vllm serve",
            "notebooks/09_serve_and_scale.ipynb": "vllm serve", "tools/vllm.sh": "vllm.entrypoints",
            "Makefile": "jupyter lab", "book/static/memory.js": "http.server"}  # fmt: skip
    for name, program in seen.items():
        found = [command for text in texts(ROOT / name) for command in commands(text) if program in command]
        assert any(re.search(server, command) for server in SERVERS for command in found), name


def notebook(kind: str, text: str) -> str:
    lines = text.splitlines(keepends=True)
    outputs = {
        "stream": [{"output_type": "stream", "name": "stdout", "text": lines}],
        "html": [{"output_type": "display_data", "data": {"text/html": [f"<code>{html.escape(text)}</code>"]}}],
    }.get(kind, [])
    cell = {"cell_type": "markdown" if kind == "markdown" else "code", "source": [] if outputs else lines}
    return json.dumps({"cells": [cell | ({"outputs": outputs} if kind != "markdown" else {})]})


PLANTS = {
    "page.md": lambda c: f"Then run `{c}` and ask.",
    "wrapped.md": lambda c: "Then run `" + "\n".join(c.rsplit(" ", 1)) + "` and ask.",
    "fenced.md": lambda c: "```bash\n" + " \\\n  ".join(c.split(" ")).replace("serve", "serve", 1) + "\n```",
    "source.ipynb": lambda c: notebook("code", f"!{c}\nprint(1)"),
    "string.ipynb": lambda c: notebook("code", f"subprocess.run({c.split()!r})"),
    "prose.ipynb": lambda c: notebook("markdown", f"```bash\n{c}\n```"),
    "stream.ipynb": lambda c: notebook("stream", f"Serve it:\n{c}\n"),
    "shown.ipynb": lambda c: notebook("html", c),
    "card.yaml": lambda c: yaml.safe_dump({"cards": [{"answer": f"I would run {c}"}]}, width=30),
    "folded.yaml": lambda c: "run: >-\n  " + "\n  ".join(c.split(" ")),
    "made.json": lambda c: json.dumps({"how": c}),
    "docstring.py": lambda c: f'def serve():\n    """One starts it:\n\n    {c}\n    """\n',
    "joined.py": lambda c: "command = (\n" + "\n".join(f"    {word + ' '!r}" for word in c.split()) + "\n)\n",
    "words.py": lambda c: f"Popen({c.split()!r} + more)\n",
    "comment.py": lambda c: f"# {c}\n",
    "start.sh": lambda c: "cd here && " + " \\\n    ".join(c.split(" ")) + "\n",
    "Makefile": lambda c: f"serve:\n\t{c}\n",
    "page.js": lambda c: f'say("run {c}");\n',
}


@pytest.mark.parametrize("page", PLANTS)
@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("vllm serve MODEL --port 8000", "vllm serve MODEL --port 8000 --host 127.0.0.1"),
        ("vllm serve MODEL --host 0.0.0.0", "vllm serve MODEL --host 0.0.0.0 --api-key $KEY"),
        ("python3 -m http.server 80", "python3 -m http.server 80 --bind 127.0.0.1"),
        ("llama-server -m x.gguf --host 0.0.0.0", "llama-server -m x.gguf"),
        ("docker run -p 80:80 server", "docker run -p 127.0.0.1:80:80 server"),
    ],
)
def test_an_open_door_is_found_on_every_kind_of_page(page, opened, closed, tmp_path):
    file = tmp_path / page
    file.write_text(PLANTS[page](opened), encoding="utf-8")
    assert open_doors([file])
    file.write_text(PLANTS[page](closed), encoding="utf-8")
    assert open_doors([file]) == []
