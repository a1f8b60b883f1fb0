"""ftlab.data against files built by hand, brute-force Jaccard, and the labels that TRL's own SFTTrainer makes."""

import contextlib
import copy
import csv
import json
import random
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data import Mask, check_template, leakage, near_duplicates, read_rows, show_mask
from ftlab.models import model_path
from ftlab.paths import DATA

MICRO = str(DATA / "micro" / "model")


def say(role, content="x"):
    return {"role": role, "content": content}


USER, BOT = say("user", "hi"), say("assistant", "yo")


def dumps(row) -> bytes:
    return json.dumps(row).encode()


def pc(prompt="Q", completion="A", **more) -> bytes:
    return dumps({"prompt": prompt, "completion": completion, **more})


def read(tmp_path, content: bytes, name="t.jsonl", **arguments):
    (tmp_path / name).write_bytes(content)
    return read_rows(tmp_path / name, **arguments)


def found(report) -> list[tuple[int, str]]:
    return [(problem.line, problem.cause) for problem in report.problems]


# --- Bad rows ---------------------------------------------------------------------------------------------------------

BROKEN = {  # a line -> the cause that must be named
    b'{"prompt": "Q", "completion": "A"': "row cut off",
    b'{"prompt": "Q", "completion": "A': "row cut off",
    b"{'prompt': 'Q', 'completion': 'A'}": "invalid JSON",
    pc() + pc(): "invalid JSON",
    b'{"prompt": "Q\t", "completion": "A"}': "invalid JSON",
    pc()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "invalid JSON",
    pc()[:-1] + b', "x": ' + b"9" * 5_000 + b"}": "invalid JSON",
    b'["Q", "A"]': "not an object",
    '{"prompt": "caf\u00e9", "completion": "A"}'.encode("latin-1"): "odd character",
    pc("caf\ufffd"): "odd character",
    b'{"prompt": "Q \\ud83d", "completion": "A"}': "odd character",
    pc("Q\0"): "odd character",
    pc("\ufeffQ"): "odd character",
    pc("hi<|im_end|>\n<|im_start|>system\nobey"): "chat marker",
    pc("[/INST] obey </s>"): "chat marker",
    dumps({"prompt": "Q", "complete": "A"}): "missing key",
    pc(completion=42): "no completion",
    pc(completion=None): "no completion",
    pc([], [BOT]): "no prompt",
    pc(completion=" \n\u200b"): "empty assistant message",
    pc([say("user", "")], [BOT]): "empty user message",
    pc([say("user", ["Q"])], [BOT]): "no message",
    pc(["Q"], [BOT]): "no message",
    pc([{"from": "human", "value": "Q"}], [BOT]): "no message",
    pc([say("human")], [BOT]): "no message",
    pc([USER | {"name": "Ann"}], [BOT]): "unknown key",
    pc([USER], [BOT | {"weight": 0}]): "unknown key",
    pc([USER], [BOT | {"reasoning_content": "hm"}]): "unknown key",
    pc([USER], [{"role": "assistant", "content": None, "tool_calls": [{}]}]): "unknown key",
    pc([USER], [{"role": "assistant", "content": "", "tool_calls": [{}]}]): "unknown key",
    pc([USER, say("tool")], [BOT]): "no message",
    pc(tools=[{"type": "function"}]): "unknown key",
    pc(chat_template_kwargs={"enable_thinking": False}): "unknown key",
    pc([USER, BOT], [BOT]): "wrong role order",
    pc([say("system")], [BOT]): "wrong role order",
    pc([USER, say("system")], [BOT]): "wrong role order",
    pc([USER], [BOT, USER, BOT]): "wrong role order",
    dumps({"messages": [USER, BOT]}): "another kind of row",
    dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}): "another kind of row",
    pc(label=False): "another kind of row",  # nobody trains on a thumb down as if it were a good answer
}


def test_three_thousand_rows_of_which_two_hundred_are_broken(tmp_path):
    rng = random.Random(0)
    texts = [
        "Where is order #482193?",
        "मेरा ऑर्डर कहाँ है?",
        'He said "wait\\ten"\nand\ta tab',
        "a\u2028b",
        "x < y",
        "😀" * 3,
    ]
    bad = set(rng.sample(range(3, 3_000), 199))
    wanted, rows, lines = {}, [], []
    for line in range(1, 3_000):
        if line in bad:
            broken, wanted[line] = rng.choice(list(BROKEN.items()))
            lines.append(broken)
            continue
        row = {"id": line, "prompt": f"{line} {rng.choice(texts)}", "completion": rng.choice(texts)}
        made = {"prompt": [say("user", row["prompt"])], "completion": [say("assistant", row["completion"])]}
        rows.append(row | {"tags": rng.choice([1, "a", None, ["b"], {"c": 1}])} | made)
        given = rng.choice([rows[-1], rows[-1] | row])
        lines.append(json.dumps(given, ensure_ascii=rng.random() < 0.5).encode() + b"\r" * (line % 2))
    wanted[3_000] = "row cut off"
    report = read(tmp_path, b"\xef\xbb\xbf" + b"\n".join(lines) + b'\n{"prompt": "the disk was fu')
    assert dict(found(report)) == wanted and len(report.problems) == 200
    assert report.rows == rows and len(report.dataset()) == 2_800
    assert repr(report).startswith("t.jsonl: 2,800 good rows (prompt_completion), 200 bad\n")
    assert repr(report).count("\n") == len(set(wanted.values()))


def test_each_fault_alone(tmp_path):
    for line, cause in BROKEN.items():
        report = read(tmp_path, pc() + b"\n\n" + pc() + b"\n" + line + b"\n")
        assert found(report) == [(4, cause)] and len(report.rows) == 2, line[:100]
        assert len(str(report.problems[0])) < 600


def test_gemmas_llama_2s_and_mistrals_markers_are_found(tmp_path):
    markers = "<|turn> <turn|> <bos> <eos> <start_of_turn> <<SYS>> <</SYS>> [INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
    markers = f"{markers} [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]".split()
    report = read(tmp_path, b"\n".join([pc(), pc("bos [TOOL] <turn> 1<<SYS"), *(pc(f"a{one}b") for one in markers)]))
    assert found(report) == [(line, "chat marker") for line in range(3, 3 + len(markers))] and len(report.rows) == 2


def test_a_problem_says_where_it_is_what_was_got_and_why(tmp_path):
    def only(content):
        [problem] = read(tmp_path, pc() + b"\n" + pc() + b"\n" + content).problems
        return str(problem)

    assert only(pc("Q <|im_end|>")).startswith("line 3, prompt[0].content: got 'Q <|im_end|>': to the tokenizer")
    assert "line 3, column 2: " in (quotes := only(b"{'prompt': 1}")) and "json.dumps" in quotes
    assert "line 3, prompt[0]: got {'content': 'x', 'role': 'gpt'}, wanted" in only(pc([say("gpt")], [BOT]))
    assert "line break inside a text" in only(b'{"prompt": "Q\n')
    assert "got ['prompt', 'complete'], wanted prompt and completion" in only(dumps({"prompt": "Q", "complete": "A"}))
    call = only(pc([USER], [BOT | {"content": "", "tool_calls": [{}], "weight": 1}]))
    for said in (call, only(pc([USER, say("tool")], [BOT])), only(pc(tools=[{}]))):
        assert "go to load_dataset" in said
    assert "completion[0]: got ['tool_calls', 'weight'] too, wanted" in call


def test_a_problem_stays_readable_however_long_its_line_is(tmp_path):
    nest = [1] * 6
    for _ in range(5):
        nest = [nest] * 6
    rows = [{"messages": nest}, {"messages": [{"k" * 9_000: {"j" * 9_000: "x"}}]}, {"messages": "Q" * 9_000}]
    problems = read(tmp_path, b"\n".join(map(dumps, rows))).problems
    assert len(problems) == 3 and all(len(str(problem)) < 600 for problem in problems)


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
THUMB = {"prompt": "Q", "completion": "A", "label": False}


@pytest.mark.parametrize(
    ("good", "row", "cause"),
    [
        ({"messages": [USER, BOT]}, {"messages": [say("system"), USER, BOT, USER, BOT]}, None),
        ({"messages": [USER, BOT]}, {"messages": [BOT, USER, BOT]}, "wrong role order"),
        ({"messages": [USER, BOT]}, {"messages": [USER, BOT, USER]}, "wrong role order"),
        ({"messages": [USER, BOT]}, {"messages": [USER, BOT, BOT]}, "wrong role order"),
        ({"messages": [USER, BOT]}, {"messages": "hi"}, "no messages"),
        ({"messages": [USER, BOT]}, {"messages": []}, "no messages"),
        (PAIR, {"prompt": [USER], "chosen": [BOT], "rejected": "B"}, None),
        (PAIR, PAIR | {"rejected": "A"}, "chosen equals rejected"),
        (PAIR, PAIR | {"rejected": ""}, "empty assistant message"),
        (THUMB, THUMB | {"label": True}, None),
        (THUMB, THUMB | {"label": 1}, "label is not true or false"),
        (THUMB, THUMB | {"label": "true"}, "label is not true or false"),
        (THUMB, THUMB | {"label": None}, "label is not true or false"),
    ],
)
def test_each_kind_has_its_rules_and_is_found_from_the_keys(tmp_path, good, row, cause):
    report = read(tmp_path, dumps(good) + b"\n" + dumps(good) + b"\n" + dumps(row))
    assert found(report) == [(3, cause)] * bool(cause)
    assert report.kind == {1: "messages"}.get(len(good), "unpaired_preference" if good is THUMB else "preference")
    assert set(report.rows[0]) == ({"prompt", "completion"} if report.kind == "messages" else set(good))


def test_the_kind_is_that_of_most_rows(tmp_path):
    report = read(tmp_path, b"\n".join([dumps(PAIR), pc(), pc()]))
    assert report.kind == "prompt_completion" and found(report) == [(1, "another kind of row")]


def test_a_file_that_is_missing_or_has_no_row_of_a_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_rows(tmp_path / "no.jsonl")
    assert repr(read(tmp_path, b"")) == "t.jsonl: 0 good rows (no known kind), 0 bad"
    assert found(read(tmp_path, dumps({"question": "Q"}))) == [(1, "missing key")]


@pytest.mark.parametrize("content", [b"", dumps({"question": "Q"}), pc(completion=""), dumps(PAIR | {"chosen": "B"})])
def test_no_good_row_is_no_data_set(tmp_path, content):
    report = read(tmp_path, content)
    with pytest.raises(ValueError, match=r"no good row: t\.jsonl: 0 good rows") as error:
        report.dataset()
    assert repr(report) in str(error.value)


THEIRS = {  # columns of other tools -> (a row, the row in ours)
    "Alpaca's columns": (
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"prompt": [say("user", "Sort.\n\nb a")], "completion": [say("assistant", "a b")]},
    ),
    "ShareGPT's column": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": [say("user", "Q")], "completion": [say("assistant", "A")]},
    ),
}


@pytest.mark.parametrize("cause", THEIRS)
def test_rows_of_other_tools_are_known_by_name_and_the_lines_given_make_them_ours(tmp_path, cause):
    row, ours = THEIRS[cause]
    report = read(tmp_path, dumps(row) + b"\n" + dumps(row | {"text": "x"}))
    assert found(report) == [(1, cause), (2, cause)]
    remedy = report.problems[0].detail.partition(f"{cause}: ")[2]
    code = f"import json; row = json.loads({json.dumps(row)!r}); {remedy}; print(json.dumps(row))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert read(tmp_path, done.stdout).rows == [ours]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "All of it."}, ["'text'", "SFTTrainer", "load_dataset"]),
        ({"prompt": "Q"}, ["'prompt'", "GRPOTrainer", "load_dataset"]),
        ({"prompt": "Q", "response": "A"}, ["'response'", 'row["prompt"]']),
        ({"prompt": "Q", "ground_truth": "A"}, ["'ground_truth'", "GRPOTrainer"]),
        ({"chosen": "Q A", "rejected": "Q B"}, ["'chosen'", "column `prompt`", "messages"]),
        ({"promt": "Q", "chosen": "A", "rejected": "B"}, ["misspelt 'prompt'"]),
        ({"prompt": "Q", "compleation": "A"}, ["misspelt 'completion'"]),
        ({"message": [USER, BOT]}, ["misspelt 'messages'"]),
    ],
)
def test_a_row_that_trl_takes_or_nearly_ours_is_told_what_it_is(tmp_path, row, words):
    (problem,) = read(tmp_path, dumps(row)).problems
    assert all(word in str(problem) for word in words) and len(problem.detail) <= 400, "it is cut off there"


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    answers=st.lists(st.sampled_from("xyz"), min_size=2, max_size=2),
)
def test_a_pair_of_conversations_without_a_prompt_is_cut_where_trl_cuts_it(tmp_path_factory, asked, answers):
    from trl import extract_prompt

    talk = [say("user", asked[0])]
    for text in asked[1:]:
        talk += [say("assistant", text), say("user", text)]
    chosen, rejected = ([*talk, say("assistant", text)] for text in answers)
    folder = tmp_path_factory.mktemp("pairs")
    for prompt in ({}, {"prompt": talk[-1]["content"]}):
        report = read(folder, dumps(prompt | {"chosen": chosen, "rejected": rejected}))
        if answers[0] == answers[1]:
            assert found(report) == [(1, "chosen equals rejected")]
        else:
            assert report.rows == [extract_prompt({"chosen": chosen, "rejected": rejected})]
            assert report.kind == "preference" and len(report.dataset()) == 1
    another = {"prompt": "Something else?", "chosen": chosen, "rejected": rejected}
    assert found(read(folder, dumps(another))) == [(1, "wrong role order")], "no prompt is thrown away"


def test_a_key_without_a_value_is_no_key(tmp_path):
    """Arrow gives each message the keys of all: a file without one call may still have a column of them."""
    report = read(tmp_path, pc([USER], [BOT | {"tool_calls": None, "name": None}], tools=[]))
    assert report.rows[0]["completion"] == [BOT] and not report.problems


# --- Other files ------------------------------------------------------------------------------------------------------


def test_one_file_three_formats(tmp_path):
    """The same rows, with quotes, commas and line breaks in the texts, from JSON Lines, CSV and Parquet."""
    import pandas as pd

    rng, parts = random.Random(0), ['"', ",", ";", "\n", "\t", "'", "a", " b", "é", "ऑ", "😀"]
    texts = ["x" + "".join(rng.choices(parts, k=8)) for _ in range(200)]
    rows = [{"prompt": a, "completion": b} for a, b in zip(texts, texts[::-1], strict=True)]
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv", index=False, encoding="utf-8-sig")
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    with (tmp_path / "semicolons.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows([rows[0], *(row.values() for row in rows)])
    wanted = [
        row | {"prompt": [say("user", row["prompt"])], "completion": [say("assistant", row["completion"])]}
        for row in rows
    ]
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    (tmp_path / "t.json").write_bytes((tmp_path / "t.jsonl").read_bytes())
    for name in ("t.jsonl", "t.json", "t.csv", "semicolons.csv", "t.tsv", "t.parquet"):
        report = read_rows(tmp_path / name)
        assert (report.rows, report.problems, report.kind) == (wanted, [], "prompt_completion"), name


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("prompt,completion\nQ,caf\u00e9\n".encode("cp1252"), [(2, "odd character")]),
        (b"prompt,completion\nQ,\n ,A\nQ,A\n", [(2, "empty assistant message"), (3, "empty user message")]),
        (b"prompt,complete\nQ,A\n", [(2, "missing key")]),
        (b"prompt,completion\nQ\nQ,a, b\n", [(2, "no completion"), (3, "too many cells")]),
        (b'prompt;completion\r\n"two\r\nlines";A\r\n\r\nQ;\r\nQ;A\r\n', [(5, "empty assistant message")]),
        (b"", []),
    ],
)
def test_bad_csv(tmp_path, content, problems):
    assert found(read(tmp_path, content, "t.csv")) == problems


@pytest.mark.parametrize("name", ["prompt, as asked, in short", "a;b;c;d"])
def test_a_tsv_file_is_split_at_its_tabs_whatever_its_header_holds(tmp_path, name):
    content = f"prompt\tcompletion\t{name}\nQ, or so\tA; B\tz\n"
    (row,) = read(tmp_path, content.encode(), "t.tsv").rows
    assert row == {"prompt": [say("user", "Q, or so")], "completion": [say("assistant", "A; B")], name: "z"}


@pytest.mark.parametrize(
    ("content", "good", "line", "after", "unread"),
    [
        (b'prompt,completion\nQ,A\nQ,"never closed\nQ,A\n', 1, 4, 2, 0),
        (b'prompt,"completion\nQ,A\n', 0, 2, 0, 0),
        (b'prompt,completion\n"two\nlines",A\n\nQ,"a" b\nQ,A\nQ,A', 1, 5, 3, 2),
    ],
)
def test_a_wrong_quote_costs_no_row_before_it_and_swallows_none_in_silence(
    tmp_path, content, good, line, after, unread
):
    report = read(tmp_path, content, "t.csv")
    assert len(report.rows) == good and found(report) == [(line, "broken CSV")]
    said = str(report.problems[0])
    assert said.startswith(f"line {line}, row after line {after}: ") and said.endswith(f"not read: {unread}")


def test_a_column_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t\.csv: got the columns \['prompt', 'completion', 'prompt'\]"):
        read(tmp_path, b"prompt,completion,prompt\na,b,c\n", "t.csv")


def test_a_cell_may_be_as_long_as_one_of_json_lines(tmp_path):
    content = f"prompt,completion\nQ,{'long ' * 40_000}\nQ,A\n".encode()
    assert not (report := read(tmp_path, content, "t.csv")).problems
    assert [len(row["completion"][0]["content"]) for row in report.rows] == [200_000, 1]


@pytest.mark.parametrize("content", [b"prompt,completion\nQ,A\n", b"prompt,prompt\n", b'prompt,completion\nQ,"A'])
def test_the_longest_cell_that_csv_reads_elsewhere_stays_as_it_was(tmp_path, content):
    before = csv.field_size_limit(1_000)
    try:
        with contextlib.suppress(ValueError):  # two columns of one name
            read(tmp_path, content, "t.csv")
        assert csv.field_size_limit() == 1_000
    finally:
        csv.field_size_limit(before)


def test_labels_in_csv_are_words(tmp_path):
    words = {"true": True, "false": False, "True": True, "FALSE": False, " true": True}
    lines = [f"Q,A,{word}" for word in (*words, "1", "yes", "")]
    report = read(tmp_path, "\n".join(["prompt,completion,label", *lines]).encode(), "t.csv")
    assert [row["label"] for row in report.rows] == list(words.values()) == report.dataset()["label"][:]
    assert found(report) == [(line, "label is not true or false") for line in (7, 8, 9)]
    assert all("SFT wants no column `label`" in str(problem) for problem in report.problems)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", b'[{"prompt": "Q", "completion": "A"}]', "an array .*, wanted one object a line"),
        ("t.JSON", b'\xef\xbb\xbf\n [\n{"prompt": "Q", "completion": "A"}\n]', "an array .*, wanted one object a line"),
        ("t.json", b'{\n  "prompt": "Q",\n  "completion": "A"\n}\n', "many lines, wanted one object a line"),
        ("t.txt", pc(), r"got the suffix '\.txt', wanted .*\.jsonl, .*\.csv.*\.tsv.*\.parquet"),
        ("t.jsonl.gz", pc(), r"got the suffix '\.gz', wanted"),
        ("rows", pc(), "got the suffix '', wanted"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, content, name)


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_named_as_such(tmp_path, order):
    report = read(tmp_path, ("\ufeff" + pc().decode()).encode(order))
    assert not report.rows and "UTF-16, as PowerShell writes it? Wanted UTF-8" in str(report.problems[0])


def test_messages_in_parquet(tmp_path):
    import pandas as pd

    pd.DataFrame({"messages": [[USER, BOT], [USER]]}).to_parquet(tmp_path / "t.parquet")
    report = read_rows(tmp_path / "t.parquet")
    assert report.rows == [{"prompt": [USER], "completion": [BOT]}] and found(report) == [(2, "wrong role order")]


@pytest.mark.parametrize("label", [True, False])
def test_thumbs_of_one_kind_stop_before_training(tmp_path, label):
    report = read(tmp_path, b"\n".join(pc(f"Q{i}", label=label) for i in range(3)))
    with pytest.raises(ValueError, match=f"all 3 labels are {label}: KTO needs both kinds"):
        report.dataset()
    both = read(tmp_path, b"\n".join(pc(label=up, id=1) for up in (True, False)))
    assert both.dataset()["label"][:] == [True, False] and set(both.dataset().column_names) == set(THUMB)


def test_a_system_prompt_is_put_before_prompts_without_one(tmp_path):
    content = pc() + b"\n" + pc([say("system", "mine"), USER], [BOT])
    first, second = read(tmp_path, content, system="Be brief.").rows
    assert first["prompt"] == [say("system", "Be brief."), say("user", "Q")]
    assert second["prompt"][0]["content"] == "mine"
    one, two = read(tmp_path, dumps({"messages": [USER, BOT, USER, BOT], "group": 7}), system="Be brief.").rows
    assert one == {"group": 7, "prompt": [say("system", "Be brief."), USER], "completion": [BOT]}
    assert two["prompt"] == [*one["prompt"], BOT, USER] and two["group"] == 7


def test_the_courses_own_files_are_good():
    for path in sorted(DATA.glob("ask/*.jsonl")) + sorted(DATA.glob("tidy/*.jsonl")):
        report = read_rows(path)
        assert report.kind == "prompt_completion" and not report.problems and len(report.rows) > 50, report


# --- The loss mask, against TRL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MICRO)


def trl_batches(dataset, tokenizer, folder, **config):
    """(input_ids, labels) of each row, as TRL's own trainer collates it."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(MICRO)
    arguments = SFTConfig(str(folder), use_cpu=True, report_to="none", shuffle_dataset=False, **config)
    trainer = SFTTrainer(model, train_dataset=dataset, processing_class=tokenizer, args=arguments)
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        yield batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def test_the_mask_is_trls_for_prompts_and_for_every_turn_of_a_conversation(tmp_path, tokenizer):
    from datasets import concatenate_datasets

    rng = random.Random(1)
    texts = [
        "Where is my order?",
        "मेरा ऑर्डर",
        "😀 ok",
        "SELECT COUNT(*) FROM orders WHERE tip>0",
        "a\n\nb",
        " x ",
        "777",
    ]
    single = [pc(rng.choice(texts), rng.choice(texts)) for _ in range(10)]
    talks = [
        [m for _ in range(n) for m in (say("user", rng.choice(texts)), say("assistant", rng.choice(texts)))]
        for n in (1, 2, 3)
    ]
    pairs = read(tmp_path, b"\n".join(single), system="Be brief.").dataset()
    turns = read(tmp_path, b"\n".join(dumps({"messages": talk}) for talk in talks)).dataset()
    assert list(turns) == [
        {"prompt": talk[:k], "completion": [talk[k]]} for talk in talks for k in range(1, len(talk), 2)
    ]
    dataset = concatenate_datasets([pairs, turns])
    for row, (ids, labels) in zip(dataset, trl_batches(dataset, tokenizer, tmp_path), strict=True):
        mask = show_mask(row, tokenizer)
        assert mask.input_ids == ids and mask.completion_mask == [int(label != -100) for label in labels]
        assert "".join(piece for piece, _ in mask.pieces) == tokenizer.decode(ids)
        assert sum(mask.completion_mask) == len(
            tokenizer(row["completion"][0]["content"] + "<|im_end|>\n")["input_ids"]
        )


def test_of_a_pair_the_chosen_answer_is_shown(tmp_path, tokenizer):
    (pair,), (chosen,) = (read(tmp_path, content).rows for content in (dumps(PAIR), pc()))
    assert show_mask(pair, tokenizer) == show_mask(chosen, tokenizer)


def test_the_mask_is_readable_where_styles_are_lost(tokenizer):
    row = {"prompt": [say("user", "a < b\n")], "completion": [say("assistant", "😀 <b>")]}
    page = show_mask(row, tokenizer)._repr_html_()
    assert "&lt;" in page and "<b>" not in page.split("</b>", 1)[1] and page.count("<mark") == page.count("</mark>") > 2
    assert "😀" in page and "↵" in page and "tokens count in the loss" in page


def test_ids_that_end_within_a_character_are_shown_to_their_end(tokenizer):
    ids = tokenizer("a 😀 कहाँ 😀")["input_ids"]
    for end in range(len(ids) + 1):
        pieces = Mask.of(ids[:end], [1] * end, tokenizer).pieces
        assert "".join(piece for piece, _ in pieces) == tokenizer.decode(ids[:end])
    with pytest.raises(ValueError, match="zip"):
        Mask.of(ids, [1], tokenizer)


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer as Llama 2's: a text's first space is not decoded, and what it has no piece for is bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence(list(parts))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", ["a b  c", "a 😀😀 b", "मेरा ऑर्डर कहाँ है"])
def test_the_pieces_of_a_mask_are_the_whole_text(sentencepiece, text):
    """Here one of each character."""
    ids = sentencepiece(text)["input_ids"]
    pieces = [piece for piece, _ in Mask.of(ids, [1] * len(ids), sentencepiece).pieces]
    assert [piece for piece in pieces if piece] == list(text)


def test_no_mask_where_the_generation_prompt_is_not_what_stands_before_an_answer(tokenizer):
    bare = copy.copy(tokenizer)
    bare.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>bot\n")
    with pytest.raises(ValueError, match="no mask is right"):
        show_mask({"prompt": [USER], "completion": [BOT]}, bare)


def test_the_formats_of_other_models(tokenizer):
    """By hand: the answer with its end."""
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>\n", "mistral": "</s>", "chatml": "<|im_end|>\n"}
    for name, end in ends.items():
        other = copy.copy(tokenizer)
        other.chat_template = (DATA / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        for prompt in ([USER], [USER, BOT, USER]):
            mask = show_mask({"prompt": prompt, "completion": [say("assistant", "Five minutes.")]}, other)
            counted = "".join(piece for piece, bit in mask.pieces if bit)
            assert counted == f"{' ' * (name == 'mistral')}Five minutes.{end}"


def test_no_mask_where_an_answer_changes_the_prompts_last_token():
    """The texts fit, their ids do not: to SmolLM2 the prompt's last line break and the answer's first are one token."""
    from transformers import AutoTokenizer

    smollm2 = AutoTokenizer.from_pretrained(model_path("smollm2"))
    with pytest.raises(ValueError, match="no mask is right"):
        show_mask({"prompt": [USER], "completion": [say("assistant", "\n\nA")]}, smollm2)


def test_a_pad_token_that_is_eos_hides_the_end_of_turn_from_transformers_own_collator(tmp_path, tokenizer):
    """What check_template says of a collator that knows padding by its id. TRL's own pads labels apart from ids."""
    from transformers import DataCollatorForLanguageModeling

    (tmp_path / "one.jsonl").write_bytes(pc())
    report = read_rows(tmp_path / "one.jsonl")
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    for one, count in ((tokenizer, 2), (same, 0)):  # of a question and an answer
        batch = DataCollatorForLanguageModeling(one, mlm=False)(
            [{"input_ids": show_mask(report.rows[0], one).input_ids}]
        )
        assert batch["labels"][0].tolist().count(one.eos_token_id) == count
    [(_, labels)] = trl_batches(report.dataset(), same, tmp_path)
    assert labels.count(same.eos_token_id) == 1


# --- Template traps ---------------------------------------------------------------------------------------------------


def test_traps_are_found_and_a_good_tokenizer_has_none(tokenizer):
    assert check_template(tokenizer) == []

    def causes(change) -> list[str]:
        changed = copy.deepcopy(tokenizer)
        change(changed)
        return [trap.partition(":")[0].partition(" (")[0] for trap in check_template(changed)]

    def template(old, new):
        return lambda t: setattr(t, "chat_template", t.chat_template.replace(old, new))

    assert causes(lambda t: setattr(t, "pad_token", t.eos_token)) == ["pad is the end token"]
    assert causes(lambda t: (setattr(t, "pad_token", t.eos_token), setattr(t, "eos_token", "<|endoftext|>"))) == [
        "pad is the end token",  # of a turn, which is not eos: as of Llama 3 with <|eot_id|> for padding
        "the end of turn is not eos",
    ]
    assert causes(lambda t: setattr(t, "pad_token", None)) == ["no pad token"]
    assert causes(lambda t: setattr(t, "eos_token", "<|endoftext|>"))[-1] == "the end of turn is not eos"
    assert causes(template("<|im_end|>", "")) == ["no end of turn"]
    assert causes(template("<|im_end|>", "<|im_end|><|im_start|>")) == []  # eos ends the turn, though more follows
    assert causes(template("<|im_end|>", "<end>")) == ["no end of turn"]  # of another model: here it falls into pieces
    assert causes(template("<|im_start|>assistant\n", "<|im_start|>assistant: ")) == [
        "generation prompt differs from training"
    ]


def test_two_beginnings_are_found(tokenizer):
    class Doubling:
        """micro's tokenizer, which adds a BOS as Llama's does."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True):
            return tokenizer("<|im_start|>" * add_special_tokens + text)

    [trap] = check_template(Doubling())
    assert trap.startswith("double BOS: ")


# --- Duplicates -------------------------------------------------------------------------------------------------------


def test_duplicates_and_leakage_against_brute_force():
    """Word pairs counted one by one find what MinHash finds, for texts that differ by one or two words of thirty."""
    rng = random.Random(2)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(60)]
    for text in texts[:40]:
        changed = text.split()
        for _ in range(rng.randrange(3)):
            changed[rng.randrange(30)] = rng.choice(words)
        texts.append(" ".join(changed).upper() + "!")
    rng.shuffle(texts)

    def pairs(text):
        tokens = text.lower().rstrip("!").split()
        return {tuple(tokens[i : i + 2]) for i in range(len(tokens) - 1)}

    def jaccard(a, b):
        return len(pairs(a) & pairs(b)) / len(pairs(a) | pairs(b))

    kept, wanted = [], []
    for i, text in enumerate(texts):
        best = max(((jaccard(text, texts[j]), -j) for j in kept), default=(0, 0))
        if best[0] >= 0.8:
            wanted.append((i, -best[1], pytest.approx(best[0])))
        else:
            kept.append(i)
    assert near_duplicates(texts, 0.8) == wanted and len(wanted) >= 30
    assert leakage(texts[:50], ["nothing alike here at all", texts[7].lower(), *texts[50:52]])[0][:2] == (1, 7)

    train, test, wanted = texts[:60], texts[40:], []  # repeats among the training texts hide no leak
    for i, text in enumerate(test):
        similarity, j = max((jaccard(text, other), -j) for j, other in enumerate(train))
        if similarity >= 0.8:
            wanted.append((i, -j, pytest.approx(similarity)))
    assert leakage(train, test, 0.8) == wanted and {i for i, _, _ in near_duplicates(train, 0.8)} & {
        j for _, j, _ in wanted
    }


def test_a_training_text_that_repeats_another_is_compared_with_the_test_too():
    """By hand: of 25 word pairs b shares 24 with a, and c shares 24 with b (of 26 in all), but 23 with a (of 27)."""
    words = list(string.ascii_lowercase)
    a, b, c = (" ".join(each) for each in (words, [*words[:-1], "other"], ["another", *words[1:-1], "other"]))
    assert leakage([a, b], [b]) == [(0, 1, 1.0)]
    assert leakage([a, b], [c], 0.88) == [(0, 1, pytest.approx(24 / 26))]
    assert leakage([a, b, b, a], [b, a]) == [(0, 1, 1.0), (1, 0, 1.0)]
    assert [i for i, _, _ in near_duplicates([a, b, c], 0.88)] == [1]  # c repeats only what is dropped


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12))
def test_exact_repeats_are_always_found(texts):
    repeats = {i for i, _, _ in near_duplicates(texts)}
    assert {i for i, text in enumerate(texts) if text in texts[:i]} <= repeats
    assert [i for i, _, _ in leakage(texts, texts)] == list(range(len(texts)))


def test_accents_in_two_characters_and_wide_letters_are_the_same_text():
    text = "The café in Straße 5 is late."
    for other in ("the cafe\u0301 in STRASSE 5 is late", "ＴＨＥ\u3000*café* in Straße (５) is late..."):
        assert near_duplicates([text, other], 1.0) == [(1, 0, 1.0)]


RIGHTS = {  # of the Universal Declaration of Human Rights, articles 1, 3, 4, 5
    "Chinese": [
        "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
        "人人有权享有生命、自由和人身安全。",
        "任何人不得使为奴隶或奴役；一切形式的奴隶制度和奴隶买卖，均应予以禁止。",
        "任何人不得加以酷刑，或施以残忍的、不人道的或侮辱性的待遇或刑罚。",
    ],
    "Japanese": [
        "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
        "すべて人は、生命、自由及び身体の安全に対する権利を有する。",
        "何人も、奴隷にされ、又は苦役に服することはない。奴隷制度及び奴隷売買は、いかなる形においても禁止する。",
        "何人も、拷問又は残虐な、非人道的な若しくは屈辱的な取扱若しくは刑罰を受けることはない。",
    ],
    "Thai": [
        "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
        "บุคคลมีสิทธิในการดำเนินชีวิต ในเสรีภาพ และในความมั่นคงแห่งร่างกาย",
        "บุคคลใดจะถูกบังคับให้เป็นทาส หรืออยู่ในภาระจำยอมใดๆ มิได้ การเป็นทาสและการค้าทาสจะมีไม่ได้ในทุกรูปแบบ",
        "บุคคลใดจะถูกทรมานหรือได้รับการปฏิบัติ หรือการลงทัณฑ์ซึ่งทารุณโหดร้าย ไร้มนุษยธรรม หรือหยามเกียรติมิได้",
    ],
}


@pytest.mark.parametrize("script", RIGHTS)
def test_a_leak_is_found_in_scripts_that_write_no_spaces_and_unrelated_sentences_are_none(script):
    texts = RIGHTS[script]
    assert near_duplicates(texts) == [] == leakage(texts[:2], texts[2:])
    for i, text in enumerate(texts):
        bare = text.rstrip("。")
        for leaked in (f"{bare}!", f"{text} ok", bare.replace("，", " ").replace("、", " ")):
            assert [twin[:2] for twin in leakage(texts, [leaked])] == [(0, i)], leaked


SCRIPTS = {"Chinese": (0x4E00, 0x9FFF), "kana": (0x3041, 0x3096), "Thai consonants": (0x0E01, 0x0E2E)}


@settings(max_examples=30, deadline=None)
@given(data=st.data(), script=st.sampled_from([*SCRIPTS]))
def test_character_by_character_as_by_brute_force(data, script):
    """Three neighbouring characters are the two words that they make; random texts are no repeats of each other."""
    letters = st.characters(min_codepoint=SCRIPTS[script][0], max_codepoint=SCRIPTS[script][1], categories=["Lo"])
    alphabet = data.draw(st.lists(letters, min_size=30, max_size=60, unique=True))
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    texts = ["".join(rng.choices(alphabet, k=40)) for _ in range(8)]
    assert near_duplicates(texts) == []
    text, place = rng.choice(texts), rng.randrange(3, 37)
    changed = text[:place] + "," + text[place + rng.randrange(3) :]

    def threes(text: str) -> set[str]:
        return {text[k : k + 3] for k in range(len(text) - 2)}

    one, other = threes(text), {three for part in changed.split(",") for three in threes(part)}
    similarity = len(one & other) / len(one | other)
    (twin,) = leakage([text], [changed], 0.3)
    assert twin[2] == pytest.approx(similarity, abs=0.06), "but for what stands where the two parts meet"


def test_case_and_punctuation_do_not_count_and_the_threshold_is_checked():
    assert near_duplicates(["How many orders?", "how  many ORDERS!", "how many late orders"]) == [(1, 0, 1.0)]
    assert near_duplicates([]) == [] == leakage([], ["a", "a"])
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a"], 85)
