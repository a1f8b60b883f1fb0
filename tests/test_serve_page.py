"""recipes/serve.md: its commands are parsed by the tools' own parsers, stay on this machine, and ran if it says so."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from scripts import ROOT, script

from ftlab.paths import CACHE
from ftlab.paths import LLAMA_CPP as SOURCE

serve = script("tools/serve.py")
PAGE = serve.PAGE.read_text(encoding="utf-8")
RECORD = json.loads(serve.RECORD.read_text(encoding="utf-8"))
COMMANDS = serve.commands(PAGE)
CONVERTERS = [name for name in COMMANDS if name.startswith("convert_")]


def hf_parses(words: list[str]) -> dict:
    """What huggingface_hub's own parser makes of a line; click raises UsageError. Nothing is run."""
    from huggingface_hub.cli.hf import app

    command, context, rest = app, None, words[1:]
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name, rest[:1], parent=context, resilient_parsing=True)
        _, command, rest = command.resolve_command(context, rest)
    return command.make_context(command.name, list(rest), parent=context).params


def converter_parses(words: list[str]) -> subprocess.CompletedProcess:
    """llama.cpp's script, as far as its parse_args; SystemExit 2 is a refusal."""
    folder = CACHE / SOURCE
    code = (
        "import runpy, sys\nsys.modules['torchvision'] = None\nsys.argv = sys.argv[1:]\n"
        "print(runpy.run_path(sys.argv[0])['parse_args']())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "gguf-py")])}
    line = [sys.executable, "-c", code, str(folder / words[1]), *words[2:]]
    return subprocess.run(line, env=env, capture_output=True, text=True)


def unsafe(words: list[str]) -> bool:
    """Starts a server that would listen beyond this machine."""
    starts = words[0] == "llama-server" or words[:2] == ["vllm", "serve"]
    hosts = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--host"]
    hosts += [word.partition("=")[2] for word in words if word.startswith("--host=")]
    return starts and hosts != ["127.0.0.1"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("hf ")])
def test_hf_takes_its_lines(name):
    params = hf_parses(COMMANDS[name])
    if name == "hf download":
        assert params["repo_id"] == "meta-llama/Llama-3.1-8B-Instruct" and params["local_dir"] == "base"
    if name == "hf upload":
        assert params["local_path"] == "runs/a/adapter" and params["private"] is True


def test_hf_refuses_a_flag_that_it_does_not_have():
    import click

    with pytest.raises(click.UsageError):
        hf_parses(["hf", "upload", "YOU/a", "folder", "--secret"])


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_converter_takes_its_line(name):
    done = converter_parses(COMMANDS[name])
    assert done.returncode == 0, done.stderr[-500:]
    assert "outfile=" in done.stdout and COMMANDS[name][2] in done.stdout


def test_a_converter_refuses_a_format_that_it_cannot_write():
    done = converter_parses(["python", CONVERTERS[0], "m", "--outfile", "a.gguf", "--outtype", "q4_k_m"])
    assert done.returncode == 2 and "invalid choice" in done.stderr


def test_the_converter_refuses_a_tokenizer_that_it_does_not_know(tmp_path):
    """The trap of the page's table, with the course's micro model."""
    folder = CACHE / SOURCE
    env = os.environ | {"PYTHONPATH": str(folder / "gguf-py")}
    line = [sys.executable, folder / "convert_hf_to_gguf.py", ROOT / "data" / "micro" / "model"]
    done = subprocess.run([*line, "--outfile", tmp_path / "m.gguf"], env=env, capture_output=True, text=True)
    assert done.returncode and "BPE pre-tokenizer was not recognized" in done.stderr + done.stdout
    assert "BPE pre-tokenizer was not recognized" in PAGE


def test_evaluate_takes_its_line():
    asked = script("recipes/evaluate.py").parsed(COMMANDS["evaluate.py"][2:])
    assert asked.model == "a" and asked.endpoint.startswith("http://127.0.0.1:")


def test_no_server_listens_beyond_this_machine():
    assert {name for name, words in COMMANDS.items() if unsafe(words)} == set()
    for line in ("vllm serve m", "llama-server -m a --host 0.0.0.0", "vllm serve m --host=::"):
        assert unsafe(shlex.split(line))
    addresses = re.findall(r"https?://([^/:\s]+)[:/]", "\n".join(shlex.join(c) for c in COMMANDS.values()))
    assert set(addresses) == {"127.0.0.1"}


def test_the_rank_and_the_context_are_those_that_fit_the_course():
    words = COMMANDS["vLLM's serve --enable-lora"]
    rank = int(words[words.index("--max-lora-rank") + 1])
    assert rank in (8, 16, 32, 64, 128, 256, 320, 512)
    for adapter in ("ask_adapter", "triage_adapter"):  # what ran as a and b
        assert json.loads((ROOT / "data" / adapter / "adapter_config.json").read_text())["r"] <= rank


def test_what_is_said_to_have_run_has_a_record():
    assert serve.with_table(PAGE, RECORD) == PAGE
    ran = {name for name in COMMANDS if RECORD["commands"][name]["here"].startswith("ran")}
    for name in ran:
        assert re.search(r"\d", RECORD["commands"][name]["with"]), f"{name}: no version"
    served = {one["what"] for one in RECORD["served"]}
    assert {name for name in ran if name.startswith(("llama-server", "vLLM"))} <= served
    assert {name for name in served if name in COMMANDS} <= ran
    for one in RECORD["served"]:
        assert 0 <= one["right"] <= 1 and one.get("listens_on", ["127.0.0.1"]) == ["127.0.0.1"]
    assert set(RECORD["commands"]) == set(COMMANDS)


def test_the_chain_gave_the_answers_that_the_page_says():
    told = {one["model"]: one for one in RECORD["served"] if one["what"].startswith("llama-server")}
    assert set(told) == {"a.gguf", "a-q8_0.gguf", "a-q4_k_m.gguf", "base.gguf"}
    assert all(one["same_as_transformers"] == one["rows"] == 40 for one in told.values())
    assert "all 40 validation questions" in PAGE
    words = COMMANDS["llama-server"]  # -c is of all slots together
    assert told["a-q8_0.gguf"]["slots"] == int(words[words.index("-np") + 1])
    per_slot = int(words[words.index("-c") + 1]) // told["a-q8_0.gguf"]["slots"]
    assert told["a-q8_0.gguf"]["context_of_a_slot"] == per_slot == 4096


def test_what_ran_is_what_the_page_says():
    for name, what in RECORD["commands"].items():
        assert what["command"] == shlex.join(COMMANDS[name]), f"{name} has changed since it was checked"


def test_every_link_leads_somewhere():
    for place in re.findall(r"\]\(([^)]+)\)", PAGE):
        if place.startswith("http"):
            assert place.startswith("https://")
            continue
        file, _, part = place.partition("#")
        target = serve.PAGE.parent / file
        assert target.exists(), place
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not part or part in slugs, place
    assert "(serve.md)" in (serve.PAGE.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_is_one_page_of_narrow_lines_and_no_command_stands_twice():
    with pytest.raises(ValueError, match="twice"):
        serve.commands("```bash\nhf auth login\nhf auth login\n```")
    assert len(PAGE.split()) < 2_600
    assert serve.name_of(["llama-server", "-m", "x", "--lora", "y"]) == "llama-server --lora"
    assert serve.name_of(["hf", "auth", "login"]) == "hf auth login"
