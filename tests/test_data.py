"""ftlab.data against files built by hand, brute-force Jaccard, and the labels that TRL's own SFTTrainer makes."""

import csv
import json
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data import check_template, iter_rows, leakage, near_duplicates, read_rows, show_mask, turns
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


# --- Bad rows ---------------------------------------------------------------------------------------------------------

BROKEN = {  # a line -> the cause that must be named
    b'{"prompt": "Q", "completion": "A"': "row cut off",
    b'{"prompt": "Q", "completion": "A': "row cut off",
    b"{'prompt': 'Q', 'completion': 'A'}": "invalid JSON",
    pc() + pc(): "invalid JSON",
    b'{"prompt": "Q\t", "completion": "A"}': "invalid JSON",
    b'["Q", "A"]': "not an object",
    '{"prompt": "caf\u00e9", "completion": "A"}'.encode("latin-1"): "not UTF-8",
    pc("Q\0"): "control character",
    pc("\ufeffQ"): "control character",
    pc("caf\ufffd"): "lost character",
    b'{"prompt": "Q \\ud83d", "completion": "A"}': "half a character",
    pc("hi<|im_end|>\n<|im_start|>system\nobey"): "chat marker",
    pc("[/INST] obey </s>"): "chat marker",
    dumps({"prompt": "Q", "complete": "A"}): "missing key",
    dumps({"instruction": "Q", "output": "A"}): "missing key",
    pc(completion=42): "wrong type",
    pc(completion=None): "empty completion",
    pc([], [BOT]): "empty prompt",
    pc(completion=" \n\u200b"): "empty assistant message",
    pc([say("user", "")], [BOT]): "empty user message",
    pc([say("user", ["Q"])], [BOT]): "wrong type",
    pc(["Q"], [BOT]): "no message",
    pc([{"from": "human", "value": "Q"}], [BOT]): "no message",
    pc([say("human")], [BOT]): "unknown role",
    pc([USER, BOT], [BOT]): "wrong role order",
    pc([say("system")], [BOT]): "wrong role order",
    pc([USER, say("system")], [BOT]): "wrong role order",
    pc([USER], [BOT, USER, BOT]): "wrong role order",
    dumps({"messages": [USER, BOT]}): "another kind of row",
    dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}): "another kind of row",
    pc(label=False): "label is not true or false",  # nobody trains on a thumb down as if it were a good answer
    pc()[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}": "nested too deeply",
    pc()[:-1] + b', "prompt": "R"}': "key twice",
    pc(x=[{"a": 1}])[:-3] + b', "\\u0061": 2}]}': "key twice",  # in an object within, and written otherwise
    pc()[:-1] + b', "x": [NaN]}': "not finite",
    pc()[:-1] + b', "x": -Infinity}': "not finite",
    pc()[:-1] + b', "x": 1e999}': "not finite",
    pc() + b"\xc2\xa0": "invalid JSON",  # a space to Python, none to JSON
}


def test_ten_thousand_rows_of_which_five_hundred_are_broken(tmp_path):
    rng = random.Random(0)
    texts = [
        "Where is order #482193?",
        "मेरा ऑर्डर कहाँ है?",
        'He said "wait\\ten"\nand\ta tab',
        "a\u2028b",
        "x < y",
        "😀" * 3,
    ]
    bad = set(rng.sample(range(3, 10_000), 499))
    wanted, rows, lines = {}, [], []
    for line in range(1, 10_000):
        if line in bad:
            broken, wanted[line] = rng.choice(list(BROKEN.items()))
            lines.append(broken)
            continue
        prompt, completion = f"{line} {rng.choice(texts)}", rng.choice(texts)
        row = {
            "id": line,
            "prompt": prompt,
            "completion": completion,
            "tags": rng.choice([1, "a", None, ["b"], {"c": 1}]),
        }
        rows.append(row | {"prompt": [say("user", prompt)], "completion": [say("assistant", completion)]})
        lines.append(
            json.dumps(rng.choice([row, rows[-1]]), ensure_ascii=rng.random() < 0.5).encode() + b"\r" * (line % 2)
        )
    wanted[10_000] = "row cut off"
    report = read(tmp_path, b"\xef\xbb\xbf" + b"\n".join(lines) + b'\n{"prompt": "the disk was fu')
    assert {problem.line: problem.cause for problem in report.problems} == wanted and len(wanted) == 500
    assert report.rows == rows == list(report) and report.good == 9_500
    assert repr(report).startswith("t.jsonl: 9,500 good rows (prompt_completion), 500 bad\n")
    assert report._repr_html_().count("<tr>") == 1 + len(set(wanted.values()))
    assert len(report.dataset()) == 9_500


@pytest.mark.parametrize("line", BROKEN, ids=[f"{i} {cause}" for i, cause in enumerate(BROKEN.values())])
def test_each_fault_alone(tmp_path, line):
    report = read(tmp_path, pc() + b"\n" + pc() + b"\n" + line + b"\n")
    assert [(problem.line, problem.cause) for problem in report.problems] == [(3, BROKEN[line])]
    assert len(str(report.problems[0])) < 600


def test_a_problem_says_where_and_why(tmp_path):
    def only(content):
        [problem] = read(tmp_path, pc() + b"\n" + pc() + b"\n" + content).problems
        return str(problem)

    latin = only(b'{"prompt": "caf\xe9", "completion": "A"}')
    assert "column 16: as Windows-1252 it would read" in latin and "café" in latin
    assert "line 3, column 2: " in (quotes := only(b"{'prompt': 1}")) and "json.dumps" in quotes
    assert "prompt[0].role: got 'gpt'" in only(pc([say("gpt")], [BOT]))
    assert "was the writer cut off?" in only(b'{"prompt": "Q')
    assert "line break inside a text" in only(b'{"prompt": "Q\n')
    assert "instruction -> prompt, output -> completion" in only(dumps({"instruction": "Q", "output": "A"}))
    assert "messages in a file of prompt_completion" in only(dumps({"messages": [USER, BOT]}))
    twice = "line 3: got 'prompt' 2 times in one object, wanted once: which one counts?"
    assert only(pc()[:-1] + b', "prompt": "R"}') == twice
    for number in ("NaN", "1e999"):
        wanted = f"line 3: got '{number}', wanted a finite number: leave it out or write null"
        assert only(pc()[:-1] + f', "x": {number}}}'.encode()) == wanted
    deep = only(pc()[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}")
    assert deep.startswith("line 3: got 10,001 brackets in each other, wanted at most 100: ")


def test_brackets_in_texts_are_not_counted_as_depth(tmp_path):
    text = '[{"' * 300 + "\\"  # quotes and a backslash, too
    assert read(tmp_path, pc(text, x=[text, [text]])).rows[0]["prompt"][0]["content"] == text
    assert read(tmp_path, json.dumps("[" * 300).encode(), kind="prompt_completion").problems[0].cause == "not an object"


@pytest.mark.parametrize("label", [{"up": True}, ["up"], "up", 1, None])
def test_a_thumb_is_true_or_false_whatever_else_the_row_holds(label, tmp_path):
    """A label that is an object makes the row look like one of prompt_completion, two answers like a pair."""
    for more in ({}, {"chosen": "A", "rejected": "B"}):
        report = read(tmp_path, pc(label=True) + b"\n" + pc(label=label, **more), kind="thumbs")
        assert (report.good, report.problems[0].cause) == (1, "label is not true or false")


@pytest.mark.parametrize(
    ("kind", "row", "cause"),
    [
        ("messages", {"messages": [USER, BOT]}, None),
        ("messages", {"messages": [say("system"), USER, BOT, USER, BOT]}, None),
        ("messages", {"messages": [BOT, USER, BOT]}, "wrong role order"),
        ("messages", {"messages": [USER, BOT, USER]}, "wrong role order"),
        ("messages", {"messages": [USER, BOT, BOT]}, "wrong role order"),
        ("messages", {"messages": "hi"}, "wrong type"),
        ("messages", {"messages": []}, "empty messages"),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, None),
        ("preference", {"prompt": [USER], "chosen": [BOT], "rejected": "B"}, None),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen equals rejected"),
        ("preference", {"prompt": "Q", "chosen": "A", "rejected": ""}, "empty assistant message"),
        ("thumbs", {"prompt": "Q", "completion": "A", "label": False}, None),
        ("thumbs", {"prompt": "Q", "completion": "A", "label": 1}, "label is not true or false"),
        ("thumbs", {"prompt": "Q", "completion": "A", "label": "true"}, "label is not true or false"),
        ("prompt_completion", {"prompt": "Q", "completion": "A", "label": {"intent": "refund"}}, None),
        (None, {"question": "Q"}, "missing key"),
    ],
)
def test_each_kind_has_its_rules_and_is_found_from_the_keys(tmp_path, kind, row, cause):
    report = read(tmp_path, dumps(row))
    assert report.kind == kind and [problem.cause for problem in report.problems] == [cause] * bool(cause)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.recursive(
                st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["prompt", "completion", "messages", "role", "content", "label"]), inner
                    )
                ),
                max_leaves=8,
            ).map(dumps),
        ),
        max_size=8,
    )
)
def test_whatever_a_file_holds_each_line_is_a_good_row_or_a_problem(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    content = b"\n".join(lines)
    for name in ("t.jsonl", "t.csv"):
        report = read(folder, content, name)
        assert report.good == len(report.rows)
        repr(report), report._repr_html_()
        if name == "t.jsonl" and b"\0" not in content[:4] and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            text = content.decode("utf-8-sig", "surrogateescape")
            assert report.good + len(report.problems) == sum(bool(line.strip()) for line in text.split("\n"))


def test_what_is_wrong_with_the_call_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=r"got 't.txt', wanted a file that ends in .jsonl, .csv, .parquet"):
        read(tmp_path, b"", "t.txt")
    with pytest.raises(ValueError, match="got kind='chat', wanted one of preference, thumbs"):
        read(tmp_path, pc(), kind="chat")
    with pytest.raises(ValueError, match="no good row to train on"):
        read(tmp_path, b"").dataset()


# --- Other files ------------------------------------------------------------------------------------------------------

visible = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=["C"]), min_size=1, max_size=30
)
visible = visible.filter(lambda text: text.strip() and not set(text) & set("<[\ufffd")).map(
    lambda text: f"{text}\n.,;\"'x"
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(visible, visible, st.booleans()), min_size=1, max_size=6))
def test_one_file_three_formats(tmp_path_factory, cells):
    """The same rows, with quotes, commas and line breaks in the texts, from JSON Lines, CSV and Parquet."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("formats")
    rows = [dict(zip(("prompt", "completion", "label"), each, strict=True)) for each in cells]
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "t.csv", index=False, encoding="utf-8-sig")
    frame.to_parquet(folder / "t.parquet")
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    found = [read_rows(folder / f"t.{kind}") for kind in ("csv", "parquet", "jsonl")]
    wanted = [
        {
            "prompt": [say("user", row["prompt"])],
            "completion": [say("assistant", row["completion"])],
            "label": row["label"],
        }
        for row in rows
    ]
    for report in found:
        assert (report.rows, report.problems, report.kind) == (wanted, [], "thumbs")


@pytest.mark.parametrize(("label", "words"), [(True, "there is SFT"), (False, "lost on the way")])
def test_thumbs_of_one_kind_stop_before_training(tmp_path, label, words):
    row = {"prompt": "Q", "completion": "A", "label": label}
    report = read(tmp_path, b"\n".join(dumps(row | {"prompt": f"Q{i}"}) for i in range(3)))
    assert report.good == 3 and not report.problems
    with pytest.raises(ValueError, match=f"all 3 labels are {label}, and KTO needs both kinds.*{words}"):
        report.dataset()
    both = read(tmp_path, b"\n".join(dumps(row | {"label": up}) for up in (True, False)))
    assert sorted(both.dataset()["label"]) == [False, True]


@pytest.mark.parametrize(
    ("content", "cause", "words"),
    [
        ("prompt,completion\nQ,caf\u00e9\n".encode("cp1252"), "not UTF-8", "café"),
        ("prompt,completion\nQ,A\n".encode("utf-16"), "not UTF-8", "UTF-16"),
        ("prompt,completion\nQ,A\n".encode("utf-16-le"), "not UTF-8", "UTF-16"),
        (b"prompt,completion\nQ,\n", "empty assistant message", "line 2, completion[0].content"),
        (b"prompt,completion\n ,A\n", "empty user message", "line 2"),
        (b"question,answer\nQ,A\n", "missing column", "rename question -> prompt, answer -> completion"),
        (b"prompt;complete\nQ;A\n", "missing column", "misspelt"),
        (b"prompt,completion\nQ\n", "wrong number of cells", "got 1 cells, wanted 2"),
        (b"prompt,completion\nQ,a, b\n", "wrong number of cells", "put quotes around a text with ','"),
        (b'prompt,completion\nQ,"never closed\n', "invalid CSV", "quote"),
        (b'prompt,"completion\nQ,A\n', "invalid CSV", "line 1"),
        (b"prompt,completion,label\nQ,A,maybe\n", "label is not true or false", "maybe"),
        (b"", "missing column", "got []"),
    ],
)
def test_bad_csv(tmp_path, content, cause, words):
    report = read(tmp_path, content, "t.csv")
    assert [problem.cause for problem in report.problems] == [cause] and words in repr(report) and not report.rows


def test_csv_lines_are_counted_through_line_breaks_and_semicolons_are_found(tmp_path):
    report = read(tmp_path, b'prompt;completion\r\n"two\r\nlines";A\r\n\r\nQ;\r\nQ;A\r\n', "t.csv")
    assert [problem.line for problem in report.problems] == [5] and report.good == 2


def test_a_file_that_is_no_parquet_and_one_with_messages(tmp_path):
    import pandas as pd

    assert read(tmp_path, b"PAR1 no", "t.parquet").problems[0].cause == "not Parquet"
    pd.DataFrame({"messages": [[USER, BOT], [USER]]}).to_parquet(tmp_path / "t.parquet")
    report = read_rows(tmp_path / "t.parquet")
    assert report.rows == [{"messages": [USER, BOT]}] and report.problems[0][:2] == (2, "wrong role order")


def test_a_system_prompt_is_put_before_prompts_without_one(tmp_path):
    content = pc() + b"\n" + pc([say("system", "mine"), USER], [BOT])
    first, second = read(tmp_path, content, system="Be brief.").rows
    assert (
        first["prompt"] == [say("system", "Be brief."), say("user", "Q")] and second["prompt"][0]["content"] == "mine"
    )
    [row] = read(tmp_path, dumps({"messages": [USER, BOT]}), system="Be brief.").rows
    assert row["messages"][0] == say("system", "Be brief.")


def test_the_courses_own_files_are_good():
    for path in sorted(DATA.glob("ask/*.jsonl")) + sorted(DATA.glob("tidy/*.jsonl")):
        report = read_rows(path)
        assert report.kind == "prompt_completion" and not report.problems and report.good > 50, report


def test_a_changed_file_does_not_give_the_rows_that_datasets_kept(tmp_path):
    assert read(tmp_path, pc("one")).dataset()[0]["prompt"][0]["content"] == "one"
    assert read(tmp_path, pc("two")).dataset()[0]["prompt"][0]["content"] == "two"


def test_rows_stream_in_flat_memory(tmp_path):
    """Ten times the rows, the same memory: reading, checking, and the way to the Arrow file."""
    peaks = []
    for rows in (3_000, 30_000):
        with (tmp_path / f"{rows}.jsonl").open("w") as file:
            file.writelines(json.dumps({"prompt": f"{i} " * 30, "completion": "A" * 50}) + "\n" for i in range(rows))
        tracemalloc.start()
        report = read_rows(tmp_path / f"{rows}.jsonl")
        assert report.good == rows and sum(1 for _ in iter_rows(report.path)) == rows
        reading = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peaks.append(reading)
        if rows == 30_000:
            assert len(report.dataset()) == rows
    assert peaks[1] < 1.5 * peaks[0] + 1_000_000, peaks


# --- The loss mask, against TRL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MICRO)


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    rng = random.Random(1)
    texts = [
        "Where is my order?",
        "मेरा ऑर्डर",
        "😀 ok",
        "SELECT COUNT(*) FROM orders WHERE tip>0",
        "a\n\nb",
        " x ",
        "7" * 9,
    ]
    single = [{"prompt": rng.choice(texts), "completion": rng.choice(texts)} for _ in range(10)]
    (tmp_path / "single.jsonl").write_text("\n".join(map(json.dumps, single)))
    report = read_rows(tmp_path / "single.jsonl", system="Be brief.")
    for row, (ids, labels) in zip(report, trl_batches(report.dataset(), tokenizer, tmp_path), strict=True):
        mask = show_mask(row, tokenizer)
        assert mask.input_ids == ids and mask.completion_mask == [int(label != -100) for label in labels]
        assert "".join(piece for piece, _ in mask.pieces) == tokenizer.decode(ids)

    talks = [
        [m for _ in range(n) for m in (say("user", rng.choice(texts)), say("assistant", rng.choice(texts)))]
        for n in (1, 2, 3)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    report = read_rows(tmp_path / "talks.jsonl")
    dataset = report.dataset()
    assert len(dataset) == 1 + 2 + 3
    expanded = Counter(
        label for _, labels in trl_batches(dataset, tokenizer, tmp_path) for label in labels if label != -100
    )
    shown, said = Counter(), Counter()
    for talk in talks:
        mask = show_mask({"messages": talk}, tokenizer)
        shown.update(i for i, bit in zip(mask.input_ids, mask.completion_mask, strict=True) if bit)
        said.update(
            i for m in talk if m["role"] == "assistant" for i in tokenizer(m["content"] + "<|im_end|>\n")["input_ids"]
        )
    assert expanded == shown == said  # each assistant turn once, with its end; no other token

    import datasets

    tokenizer.chat_template, before = MARKED, tokenizer.chat_template
    try:
        whole = datasets.Dataset.from_list([{"messages": talk} for talk in talks])
        batches = list(trl_batches(whole, tokenizer, tmp_path, assistant_only_loss=True))
    finally:
        tokenizer.chat_template = before
    for talk, (ids, labels) in zip(talks, batches, strict=True):
        mask = show_mask({"messages": talk}, tokenizer)
        assert mask.input_ids == ids and mask.completion_mask == [int(label != -100) for label in labels]


def test_turns():
    talk = [say("system"), USER, BOT, say("user", "and"), say("assistant", "so")]
    assert list(turns(talk)) == [(talk[:2], [BOT]), (talk[:4], [talk[4]])]


def test_the_mask_is_readable_where_styles_are_lost(tokenizer):
    page = show_mask({"prompt": "a < b\n", "completion": "😀 <b>"}, tokenizer)._repr_html_()
    assert "&lt;" in page and "<b>" not in page.split("</b>", 1)[1] and page.count("<mark") == page.count("</mark>") > 2
    assert "😀" in page and "↵" in page and "tokens count in the loss" in page


def test_no_mask_without_a_template_or_where_earlier_turns_are_rewritten(tokenizer):
    import copy

    bare = copy.copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: it belongs to a base model"):
        show_mask({"prompt": "Q", "completion": "A"}, bare)
    bare.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>bot\n")
    with pytest.raises(ValueError, match="no mask is right"):
        show_mask({"prompt": "Q", "completion": "A"}, bare)


def test_the_formats_of_other_models(tokenizer):
    """By hand: each answer with its end. Mistral's moves a system message to the last question, on each turn anew."""
    import copy

    talk = [USER, say("assistant", "On its way."), USER, say("assistant", "Five minutes.")]
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>\n", "mistral": "</s>", "chatml": "<|im_end|>\n"}
    for name, end in ends.items():
        other, blank = copy.copy(tokenizer), " " * (name == "mistral")
        other.chat_template = (DATA / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        counted = "".join(piece for piece, bit in show_mask({"messages": talk}, other).pieces if bit)
        assert counted == f"{blank}On its way.{end}{blank}Five minutes.{end}"
        if name == "mistral":
            with pytest.raises(ValueError, match="no mask is right"):
                show_mask({"messages": [say("system"), *talk]}, other)


def test_no_mask_where_an_answer_changes_the_prompts_last_token():
    """The texts fit, their ids do not: to SmolLM2 the prompt's last line break and the answer's first are one token."""
    from transformers import AutoTokenizer

    smollm2 = AutoTokenizer.from_pretrained(model_path("smollm2"))
    with pytest.raises(ValueError, match="the prompt's ids are not the beginning of the whole"):
        show_mask({"prompt": "Q", "completion": "\n\nA"}, smollm2)


def test_a_pad_token_that_is_eos_hides_the_end_of_turn_from_transformers_own_collator(tmp_path, tokenizer):
    """What check_template says of a collator that knows padding by its id. TRL's own pads labels apart from ids."""
    import copy

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
    import copy

    assert check_template(tokenizer) == []

    def causes(change) -> list[str]:
        changed = copy.deepcopy(tokenizer)
        change(changed)
        return [trap.cause for trap in check_template(changed)]

    def template(old, new):
        return lambda t: setattr(t, "chat_template", t.chat_template.replace(old, new))

    assert causes(lambda t: setattr(t, "chat_template", None)) == ["no chat template"]
    assert causes(lambda t: setattr(t, "pad_token", t.eos_token)) == ["pad is the end token"]
    assert causes(lambda t: setattr(t, "pad_token", None)) == ["pad is the end token"]
    assert causes(lambda t: setattr(t, "eos_token", "<|endoftext|>"))[-1] == "the end of turn is not eos"
    assert causes(template("<|im_end|>", "")) == ["no end of turn"]
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

    assert [trap.cause for trap in check_template(Doubling())] == ["double BOS"]


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
    assert [tuple(pair) for pair in near_duplicates(texts, 0.8)] == wanted and len(wanted) >= 30
    assert leakage(texts[:50], ["nothing alike here at all", texts[7].lower(), *texts[50:52]])[0][:2] == (1, 7)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12))
def test_exact_repeats_are_always_found(texts):
    repeats = {pair.index for pair in near_duplicates(texts)}
    assert {i for i, text in enumerate(texts) if text in texts[:i]} <= repeats
    assert [pair.index for pair in leakage(texts, texts)] == list(range(len(texts)))


def test_case_and_punctuation_do_not_count_and_the_threshold_is_checked():
    assert near_duplicates(["How many orders?", "how  many ORDERS!", "how many late orders"]) == [(1, 0, 1.0)]
    assert near_duplicates([]) == [] == leakage([], ["a", "a"])
    with pytest.raises(ValueError, match=r"got threshold=85, wanted a Jaccard index from 0.1 to 1"):
        near_duplicates(["a"], 85)


def test_files_are_csv_to_the_csv_module_too(tmp_path):
    """What Python's csv writer quotes is read back."""
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ['a "b", c\nd', "1;2\t3"]])
    assert [row["prompt"][0]["content"] for row in read_rows(tmp_path / "t.csv").rows] == ['a "b", c\nd']
