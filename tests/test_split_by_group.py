"""ftlab.data on files of strangers: columns of any name and form, three parts by group, lengths, thinking."""

import copy
import csv
import json
import random
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ftlab import data
from ftlab.data import Parts, leakage, read_rows, split_by_group
from ftlab.paths import DATA

SIDES = ("training", "validation", "test")


def row(group, text: str, answer: str = "yes") -> dict:
    prompt = [{"role": "user", "content": text}]
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}],
        "group": group,
    }


def rows_of(sizes: dict[str, int]) -> list[dict]:
    """Rows whose prompts share no pair of words."""
    return [row(name, f"{name} number {i}") for name, size in sizes.items() for i in range(size)]


def texts(rows: list[dict]) -> list[str]:
    return [one["prompt"][-1]["content"] for one in rows]


def groups(rows: list[dict]) -> set[str]:
    return {one["group"] for one in rows}


def said(parts: Parts, words: str) -> bool:
    return any(words in note for note in parts.notes)


# --- Three parts ----------------------------------------------------------------------------------

SIZES = st.dictionaries(st.text("abcdé0", min_size=1, max_size=6), st.integers(1, 60), min_size=3, max_size=40)


@settings(deadline=None, max_examples=150)
@given(SIZES, st.sampled_from([0.1, 0.15, 0.2, 0.3]), st.randoms())
def test_each_row_is_in_one_part_and_no_group_in_two(sizes, held_out, rng):
    rows = rows_of(sizes)
    parts = split_by_group(rows, held_out)
    sides = [getattr(parts, side) for side in SIDES]
    assert sorted(text for side in sides for text in texts(side)) == sorted(texts(rows))
    assert all(sides)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not groups(sides[one]) & groups(sides[other])
    wanted = held_out * len(rows)
    if max(sizes.values()) <= wanted / 2:
        assert all(0.5 * wanted <= len(side) <= 1.5 * wanted for side in sides[1:])
    if max(sizes.values()) > len(rows) / 2:
        largest = max(sizes, key=sizes.get)
        assert largest in groups(parts.training) and said(parts, "of the rows")

    shuffled = rng.sample(rows, len(rows))
    again = split_by_group(shuffled, held_out)
    assert [groups(getattr(again, side)) for side in SIDES] == [groups(side) for side in sides]


def test_a_group_stays_where_it_is_when_others_come():
    rows = rows_of({f"customer {i}": 4 for i in range(300)})
    before = split_by_group(rows)
    after = split_by_group(rows + rows_of({f"new {i}": 4 for i in range(100)}))
    assert before.notes == [] == after.notes
    for side in SIDES:
        assert groups(getattr(before, side)) <= groups(getattr(after, side))


FILES = st.lists(SIZES, min_size=2, max_size=4)


@settings(deadline=None, max_examples=100)
@given(FILES, st.sampled_from([0.1, 0.15, 0.3]))
def test_with_a_manifest_no_group_ever_moves_whatever_the_file_becomes(tmp_path_factory, files, held_out):
    """Without one, half of these files move a group: the sizes decide anew each time."""
    manifest = tmp_path_factory.mktemp("split") / "splits.json"
    held: dict[str, str] = {}
    for sizes in files:
        try:
            parts = split_by_group(rows_of(sizes), held_out, manifest)
        except ValueError as error:
            assert "none is left for" in str(error)  # all of its groups were dealt to other parts
            continue
        for side in SIDES:
            for group in groups(getattr(parts, side)):
                assert held.setdefault(group, side) == side
        assert json.loads(manifest.read_text(encoding="utf-8")) == held


def test_groups_that_were_dealt_by_size_stay_when_training_groups_grow(tmp_path):
    sizes = {f"topic {i}": 30 + i for i in range(9)}
    before = split_by_group(rows_of(sizes), 0.15, tmp_path / "splits.json")
    grown = {name: 8 * size if name in groups(before.training) else size for name, size in sizes.items()}
    moved = [groups(before.test) & groups(split_by_group(rows_of(of)).training) for of in (sizes, grown)]
    assert not moved[0] and moved[1]  # what happens without the manifest
    after = split_by_group(rows_of(grown), 0.15, tmp_path / "splits.json")
    assert [groups(getattr(after, side)) for side in SIDES] == [groups(getattr(before, side)) for side in SIDES]
    assert "by size" in before.dealt and "before: 9 groups" in after.dealt
    assert said(after, "far from their shares")
    more = split_by_group(rows_of(grown | {f"new {i}": 60 for i in range(10)}), 0.15, tmp_path / "splits.json")
    assert groups(before.test) < groups(more.test) and "10 new ones" in more.dealt


def test_rows_without_groups_keep_their_part_when_lines_are_put_before_them(tmp_path):
    def read(count: int) -> list[dict]:
        made = [{"text": f"order {i} number {i * 7}", "label": "ab"[i % 2]} for i in range(count)][::-1]
        file = written(tmp_path, made)
        return read_rows(file, columns={"prompt": "text", "completion": "label", "group": None}).rows

    parts = [split_by_group(read(count), 0.15, tmp_path / "splits.json") for count in (200, 260)]
    for side in SIDES:
        assert set(texts(getattr(parts[0], side))) <= set(texts(getattr(parts[1], side)))


def test_a_manifest_that_says_nothing_of_these_rows_or_something_else_is_refused(tmp_path):
    file = tmp_path / "splits.json"
    for content in ("{", "[1]", '{"a": "nowhere"}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="no manifest of a split"):
            split_by_group(rows_of({"a": 9, "b": 9, "c": 9}), manifest=file)
        assert file.read_text() == content
    file.unlink()
    one = rows_of({"only": 60})
    split_by_group(one, manifest=file)  # by row: one group
    with pytest.raises(ValueError, match="would move between training and test"):
        split_by_group(one + rows_of({"b": 30, "c": 30}), manifest=file)


def test_lengths_are_read_off_training_and_validation_and_not_off_the_test(micro):
    rows = rows_of({f"customer {i}": 4 for i in range(100)})
    parts = split_by_group(rows)
    parts.test[0]["completion"][0]["content"] = "word " * 50
    within = parts.within(micro, 10**6)
    seen = parts.training + parts.validation
    assert within.longest_row == max(len(data.show_mask(one, micro).input_ids) for one in seen)
    assert len(within.test) == len(parts.test)


def test_a_row_that_repeats_what_was_shown_is_no_test_any_more():
    answer = "The parcel came two days late."
    shown = [row("a", "teh parcel came tow days late", answer), row("a", "where is it", "late")]
    rows = [
        row("a", "the parcle cam two days late", answer),  # another note of that sentence
        row("a", "Where is it?", "lost"),  # the same prompt, a capital and a mark apart
        row("a", "when does it come", "late"),  # a class may be right twice
        row("a", "the tea is cold", "The tea is cold again today."),
    ]
    assert data.unseen(rows, shown) == rows[2:] and data.unseen(rows, []) == rows


def test_a_file_sorted_by_customer_gives_parts_whose_beginning_is_a_fair_sample():
    parts = split_by_group(rows_of({f"customer {i:02}": 20 for i in range(40)}))
    assert len(groups(parts.training[:40])) > 12
    assert groups(parts.test[:15]) == groups(parts.test)


def test_one_group_with_most_rows_is_trained_on_and_said_to_be():
    parts = split_by_group(rows_of({"big": 500, **{f"small {i}": 5 for i in range(40)}}))
    assert groups(parts.training) >= {"big"} and said(parts, "'big' has 71% of the rows")
    assert len(parts.validation) >= 50 and len(parts.test) >= 50


@pytest.mark.parametrize("count", [3, 4, 6])
def test_of_few_groups_none_of_the_parts_is_empty_and_the_test_is_said_to_be_of_few(count):
    parts = split_by_group(rows_of({f"document {i}": 30 for i in range(count)}))
    assert parts.training and parts.validation and parts.test
    assert said(parts, "groups in the test: 1") and "by size" in parts.dealt


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_groups_than_parts_are_split_by_row_and_that_is_said(count):
    parts = split_by_group(rows_of({f"document {i}": 60 for i in range(count)}))
    assert said(parts, "split by row") and said(parts, "not about a new group")
    assert all(4 * count <= len(side) <= 14 * count for side in (parts.validation, parts.test))
    assert len(parts.training) + len(parts.validation) + len(parts.test) == 60 * count


def test_independent_rows_are_split_by_row():
    parts = split_by_group(rows_of({f"row {i}": 1 for i in range(400)}))
    assert parts.notes == ["each row is a group: split by row"]
    assert 40 < len(parts.test) < 80


def test_twelve_rows_are_split_and_the_test_is_said_to_be_too_small():
    parts = split_by_group(rows_of({f"row {i}": 1 for i in range(12)}))
    assert sum(len(getattr(parts, side)) for side in SIDES) == 12
    assert said(parts, "too few to tell two models apart")


SENTENCE = "The parcel {0} came two days late and the box {0} was wet on one side, please send it {0} again"


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_what_nearly_repeats_a_training_prompt_is_not_scored_and_is_counted(rng):
    rows = rows_of({f"customer {i}": 3 for i in range(60)})
    for number in range(20):  # the same words under two customers, a capital and a stop apart
        text = SENTENCE.format(f"K{number}")
        rows += [row(f"customer {rng.randrange(60)}", text)]
        rows += [row(f"customer {rng.randrange(60)}", text.lower() + "!")]
    parts = split_by_group(rows)
    assert leakage(texts(parts.training), texts(parts.validation + parts.test)) == []
    assert leakage(texts(parts.validation), texts(parts.test)) == []
    left_out = len(rows) - sum(len(getattr(parts, side)) for side in SIDES)
    counted = [int(note.split()[0]) for note in parts.notes if "left out" in note]
    assert sum(counted) == left_out


@pytest.mark.parametrize("held", ["validation", "test"])
def test_what_was_held_out_before_stays_and_the_new_row_that_repeats_it_goes(held, tmp_path):
    rows, file = rows_of({f"customer {i}": 4 for i in range(60)}), tmp_path / "splits.json"
    before = split_by_group(rows, manifest=file)
    asked = getattr(before, held)[:3]
    new = [row(f"new customer {i}", f"{text.upper()}!") for i in range(40) for text in texts(asked)]
    after = split_by_group(rows + new, manifest=file)
    assert {id(one) for one in getattr(before, held)} <= {id(one) for one in getattr(after, held)}
    assert leakage(texts(after.training), texts(after.validation + after.test)) == []
    assert leakage(texts(after.validation), texts(after.test)) == []
    assert any("held out before" in note for note in after.notes)


def test_a_long_answer_in_training_and_in_the_test_is_counted_and_stays():
    rows = rows_of({f"customer {i}": 3 for i in range(40)})
    long, short = "The parcel came two days late.", "late"
    for answer, told in ((long, 1), (short, 0)):
        answered = [one | {"completion": [{"role": "assistant", "content": answer}]} for one in rows]
        parts = split_by_group(answered)
        assert sum("training has too" in note for note in parts.notes) == told
        assert sum(len(getattr(parts, side)) for side in SIDES) == len(rows)


def test_rows_of_one_template_are_refused_and_the_likely_group_is_named():
    letter = " ".join(f"word{k}" for k in range(60))
    rows = [row(f"row {i}", f"{letter} {i}") for i in range(60)]
    with pytest.raises(ValueError, match=r"nearly repeats a training row.+template"):
        split_by_group(rows)


def test_two_rows_or_rows_without_a_group_are_refused():
    with pytest.raises(ValueError, match="2 rows, wanted at least three"):
        split_by_group(rows_of({"a": 2}))
    bare = [{key: value for key, value in one.items() if key != "group"} for one in rows_of({"a": 9})]
    with pytest.raises(ValueError, match="without a group"):
        split_by_group(bare)


# --- Lengths --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro():
    return AutoTokenizer.from_pretrained(DATA / "micro" / "model")


def test_rows_that_training_would_cut_are_left_out_and_counted(micro):
    rng = random.Random(0)
    rows = [row(f"g{i}", "word " * rng.randint(1, 120), "yes " * rng.randint(1, 30)) for i in range(90)]
    parts = Parts(rows[:60], rows[60:75], rows[75:])
    within = parts.within(micro, 100)

    def tokens(messages, **more) -> int:
        return len(micro.apply_chat_template(messages, tokenize=True, return_dict=False, **more))

    lengths = [tokens(one["prompt"] + one["completion"]) for one in rows]
    kept = [one for side in SIDES for one in getattr(within, side)]
    assert kept == [one for one, length in zip(rows, lengths, strict=True) if length <= 100]
    assert said(within, f"{90 - len(kept)} rows of more than 100 tokens left out")
    assert said(within, f"longest has {max(lengths):,}") and parts.notes == []
    assert within.longest_row == max(length for length in lengths[:75] if length <= 100)
    seen = within.training + within.validation
    asked = [tokens(one["prompt"], add_generation_prompt=True) for one in seen]
    whole = [tokens(one["prompt"] + one["completion"]) for one in seen]
    assert within.longest_answer == max(b - a for a, b in zip(asked, whole, strict=True))


def test_a_context_that_no_row_fits_is_refused(micro):
    rows = rows_of({f"g{i}": 3 for i in range(10)})
    with pytest.raises(ValueError, match="training rows, none of at most 3 tokens"):
        split_by_group(rows).within(micro, 3)


def test_the_hash_of_rows_is_of_prompts_answers_and_their_order():
    rows = rows_of({"a": 3, "b": 2})
    mark = data.fingerprint(rows)
    assert mark == data.fingerprint(copy.deepcopy(rows)) and len(mark) == 12
    assert mark == data.fingerprint([one | {"group": "other", "id": 7} for one in rows])
    others = [
        rows[::-1],
        rows[:-1],
        [row("a", "else"), *rows[1:]],
        [*rows[:-1], row("b", "b number 1", "no")],
    ]
    assert len({mark, *map(data.fingerprint, others)}) == 5


# --- Columns --------------------------------------------------------------------------------------

CELL = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffd\ufeff<>[]"))
GOOD = CELL.map(lambda text: f"a{text}")


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(GOOD, GOOD, st.integers(0, 5)), min_size=1, max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.booleans(),
)
def test_a_table_of_any_delimiter_is_read_under_its_own_names(tmp_path_factory, table, delimiter, bom):
    file = tmp_path_factory.mktemp("any") / ("t.tsv" if delimiter == "\t" else "t.csv")
    with file.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(["Nr, of the row", "What was said", "label", "who"])
        for number, (asked, answer, who) in enumerate(table):
            writer.writerow([number, asked, answer, f"customer {who}"])
    columns = {"prompt": "What was said", "completion": "label", "group": "who"}
    report = read_rows(file, system="Sort it.", columns=columns)
    assert report.problems == [] and report.kind == "prompt_completion"
    found = [(one["prompt"][-1]["content"], one["completion"][0]["content"], one["group"]) for one in report.rows]
    assert found == [(asked.strip(), answer.strip(), f"customer {who}") for asked, answer, who in table]
    assert all(one["prompt"][0] == {"role": "system", "content": "Sort it."} for one in report.rows)
    assert report.rows[-1]["Nr, of the row"] == str(len(table) - 1)  # for a scorer that wants it


MAILS = """Nr;From;Message ;Team;Cost €
1;Firma Groß;"It is broken again.
Since today.";Breakdown;1,50
2;Firma Groß;Please send tea;Supplies ;
;;;;
3;Weiß & Co;Überall Milch;breakdown;2,00

4;Weiß & Co;"He said ""no"" for 9 €";Breakdown;
5;Weiß & Co;"He said ""no"" for 9 €";Breakdown;
6;Weiß & Co;Nothing to say;;
"""


def test_a_table_as_a_german_excel_saves_it(tmp_path):
    file = tmp_path / "mails.csv"
    file.write_bytes(MAILS.replace("\n", "\r\n").encode("cp1252"))
    for name in ("Message", "Message "):
        report = read_rows(file, columns={"prompt": name, "completion": "Team", "group": "From"})
        assert [one["completion"][0]["content"] for one in report.rows] == [
            "Breakdown",
            "Supplies",
            "breakdown",
            "Breakdown",
            "Breakdown",
        ]
        assert texts(report.rows)[0].split() == ["It", "is", "broken", "again.", "Since", "today."]
        assert texts(report.rows)[2:4] == ["Überall Milch", 'He said "no" for 9 €']
        assert groups(report.rows) == {"Firma Groß", "Weiß & Co"}
        assert [problem.cause for problem in report.problems] == ["empty assistant message"]
        printed = repr(report)
        for words in (
            "not UTF-8: read as Windows-1252",
            "dropped: 'Message '",
            "blank rows skipped: 1",
            "'Breakdown' (3), 'breakdown' (1)",
            "repeat another word for word: 1",
        ):
            assert words in printed, words


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("abcdeßéüñ", min_size=1), min_size=1, max_size=5), st.sampled_from(["utf-8", "cp1252"]))
def test_letters_come_back_from_either_encoding_and_only_one_of_them_is_named(tmp_path_factory, words, encoding):
    """Without the euro sign: "é€€" in Windows-1252 is one letter in UTF-8, and nobody can tell which was meant."""
    file = tmp_path_factory.mktemp("letters") / "t.csv"
    file.write_bytes("\n".join(["text,label", *(f"{word},a" for word in words)]).encode(encoding))
    report = read_rows(file, columns={"prompt": "text", "completion": "label"})
    assert texts(report.rows) == words
    odd = any(ord(letter) > 127 for word in words for letter in word)
    assert ("Windows-1252" in repr(report)) == (odd and encoding == "cp1252")


def test_one_broken_byte_in_a_file_in_utf_8_is_a_bad_row_and_leaves_the_others_their_letters(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes("text,label\nMüller,a\nbroken @,a\nWeiß,b\n".encode().replace(b"@", b"\xfc"))
    report = read_rows(file, columns={"prompt": "text", "completion": "label"})
    assert texts(report.rows) == ["Müller", "Weiß"] and "Windows-1252" not in repr(report)
    assert [problem.cause for problem in report.problems] == ["odd character"]


def test_two_columns_that_differ_in_blanks_alone_are_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("text,text ,label\na,b,c\n")
    with pytest.raises(ValueError, match="wanted each name once"):
        read_rows(file, columns={"prompt": "text", "completion": "label"})


@pytest.mark.parametrize("cell", ['"quoted" at first', '"', 'an 8" screen', '"open', "'single'"])
def test_a_table_with_tabs_and_without_quoting(tmp_path, cell):
    file = tmp_path / "t.tsv"
    file.write_text(f"mail\tbooking\nplain\tx=1\n\n\n{cell} one\tx=2 \nlast\tx=3\n", encoding="utf-8")
    report = read_rows(file, columns={"prompt": "mail", "completion": "booking", "group": None})
    assert texts(report.rows) == ["plain", f"{cell} one", "last"] and report.problems == []
    assert [one["completion"][0]["content"] for one in report.rows] == ["x=1", "x=2", "x=3"]


def test_json_lines_with_repeats_and_empty_answers_are_counted(tmp_path):
    rows = [{"note": f"lift {i}", "update": f"Lift {i} is back. ", "who": "a"} for i in (1, 2, 2, 3, 3, 3)]
    file = written(tmp_path, [*rows, {"note": "lift 4", "update": " ", "who": "a"}])
    file.write_text(file.read_text().replace("\n", "\n\n", 2), encoding="utf-8")
    report = read_rows(file, columns={"prompt": "note", "completion": "update", "group": "who"})
    assert len(report.rows) == 6 and report.rows[0]["completion"][0]["content"] == "Lift 1 is back."
    assert [problem.cause for problem in report.problems] == ["empty assistant message"]
    assert "repeat another word for word: 3" in repr(report)


def written(tmp_path, rows: list[dict], name: str = "t.jsonl"):
    file = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, one.values())) for one in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("value", [3, 2.5, True, "True", {"a": "é"}, ["x", "y"]], ids=str)
def test_numbers_and_objects_become_text(tmp_path, value):
    file = written(tmp_path, [{"text": "q", "label": value}] * 3)
    report = read_rows(file, columns={"prompt": "text", "completion": "label"})
    text = report.rows[0]["completion"][0]["content"]
    assert text == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    assert len(report.rows) == 3 and report.problems == []


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_several_columns_are_one_prompt_and_one_answer_in_json(tmp_path, name):
    rows = [{"subject": f"Order {i}", "body": "It came late", "kind": "late", "days": str(i)} for i in range(3)]
    columns = {"prompt": ["subject", "body"], "completion": ["kind", "days"], "group": "subject"}
    report = read_rows(written(tmp_path, rows, name), columns=columns)
    assert texts(report.rows)[2] == "subject: Order 2\nbody: It came late"
    assert json.loads(report.rows[2]["completion"][0]["content"]) == {"kind": "late", "days": "2"}
    assert report.rows[2]["group"] == "Order 2"


def test_chats_in_a_column_of_another_name_are_cut_at_their_answers(tmp_path):
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    file = written(tmp_path, [{"talk": talk, "who": "x"}])
    report = read_rows(file, columns={"messages": "talk", "group": "who"})
    assert [one["completion"][0]["content"] for one in report.rows] == ["b", "d"]
    assert {one["group"] for one in report.rows} == {"x"}


def test_names_that_mean_something_here_do_no_harm_in_a_file_where_they_mean_something_else(
    tmp_path,
):
    other = {
        "label": "x",
        "chosen": "y",
        "rejected": "z",
        "tools": "hammer",
        "messages": 3,
        "group": 9,
    }
    file = written(tmp_path, [{"text": "q", "class": "a", **other}] * 2)
    report = read_rows(file, columns={"prompt": "text", "completion": "class", "group": None})
    assert report.problems == [] and [one["group"] for one in report.rows] == ["row 1", "row 2"]
    assert not {"label", "tools", "chosen", "messages"} & report.rows[0].keys()
    assert "not used: label, chosen, rejected, tools, messages, group" in repr(report)


def test_an_empty_group_is_no_group(tmp_path):
    rows = [{"text": f"q {i}", "to": "a", "who": "" if i % 2 else "x"} for i in range(6)]
    for name in ("t.csv", "t.jsonl"):
        report = read_rows(
            written(tmp_path, rows, name),
            columns={"prompt": "text", "completion": "to", "group": "who"},
        )
        assert Counter(one["group"] for one in report.rows)["x"] == 3 and len(groups(report.rows)) == 4
        assert "each taken as its own: 3" in repr(report)


def test_an_empty_answer_is_named_with_its_line_and_costs_no_other_row(tmp_path):
    rows = [{"text": f"q {i}", "to": "" if i == 2 else "a", "who": i} for i in range(5)]
    report = read_rows(written(tmp_path, rows, "t.csv"), columns={"prompt": "text", "completion": "to"})
    assert len(report.rows) == 4 and [problem.line for problem in report.problems] == [4]


def test_one_answer_few_answers_and_disputed_prompts_are_noted(tmp_path):
    def notes(rows):
        return repr(read_rows(written(tmp_path, rows), columns={"prompt": "q", "completion": "a"}))

    assert "every answer is 'x'" in notes([{"q": str(i), "a": "x"} for i in range(9)])
    told = notes([{"q": str(i), "a": "x" if i % 4 else "y"} for i in range(40)])
    assert "2 different answers; 'x' is right in 75% of the rows" in told
    assert "different answers" not in notes([{"q": str(i), "a": str(i)} for i in range(40)])
    assert "two different answers: 1" in notes([{"q": "same", "a": "x"}, {"q": "same", "a": "y"}, {"q": "z", "a": "x"}])


MISSING = {  # header, columns -> what the error says
    "misspelt": ("Text;Label", {"prompt": "text", "completion": "Label"}, "do you mean 'Text'"),
    "no group": (
        "text;label",
        {"prompt": "text", "completion": "label", "group": "customer"},
        '"group": None',
    ),
    "a delimiter that nobody has": (
        "text^label",
        {"prompt": "text", "completion": "label"},
        "parted by",
    ),
    "others": ("id;note;x", {"prompt": "question", "completion": "x"}, "name your own columns"),
    "a key": ("id;note", {"input": "note", "completion": "id"}, "got the key 'input'"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_column_that_is_not_there_is_named_with_the_likely_reason(tmp_path, case):
    header, columns, reason = MISSING[case]
    (tmp_path / "t.csv").write_text(f"{header}\n{header}\n", encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        read_rows(tmp_path / "t.csv", columns=columns)
    assert reason in str(raised.value)


def test_excels_unicode_text_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("text\tlabel\nq\ta\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"UTF-16.+CSV UTF-8"):
        read_rows(tmp_path / "t.csv", columns={"prompt": "text", "completion": "label"})


def test_a_file_that_is_not_there_is_named_with_what_is(tmp_path):
    written(tmp_path, [{"a": 1}], "orders_2026.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file .+orders_2025.jsonl.+orders_2026.jsonl"):
        read_rows(tmp_path / "orders_2025.jsonl")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .+nowhere"):
        read_rows(tmp_path / "nowhere" / "t.csv")


# --- Thinking -------------------------------------------------------------------------------------


def test_what_stands_before_the_answer_of_a_thinking_model_is_cut_off():
    assert data.answer_of("late") == "late" and data.answer_of(" late") == " late"
    assert data.answer_of("<think>\n\n</think>\n\nlate") == "late"
    assert data.answer_of("<think>late? or lost?</think>late\n") == "late\n"
    assert data.answer_of("so it is late</think>\n\nlate") == "late"  # the prompt opened it
    assert data.answer_of("<think>it may be la") == ""


REASONS = {  # rows -> what counts in the loss as they are, and once settle_thinking has looked at them
    "no reasoning": ("late", "<think>\n\n</think>\n\nlate<|im_end|>\n", "late<|im_end|>\n"),
    "an empty one": (
        "<think>\n\n</think>\n\nlate",
        "<think>\n\n</think>\n\nlate<|im_end|>\n",
        "late<|im_end|>\n",
    ),
    "reasoning": (
        "<think>\nit took a week\n</think>\n\nlate",
        "<think>\nit took a week\n</think>\n\nlate<|im_end|>\n",
        "<think>\nit took a week\n</think>\n\nlate<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_thinking_base_learns_the_answer_or_the_reasoning_of_its_rows(qwen, case):
    answer, before, after = REASONS[case]
    rows = [row(f"g{i}", f"Order {i}?", answer) for i in range(6)]

    def counted(tokenizer) -> str:
        mask = data.show_mask(rows[0], tokenizer)
        return "".join(piece for piece, bit in mask.pieces if bit)

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    assert counted(tokenizer) == before
    [trap] = [trap for trap in data.check_template(tokenizer) if trap.startswith("thinking")]
    assert "<think>" in trap and "enable_thinking=False" in trap
    told = data.settle_thinking(tokenizer, rows)
    assert counted(tokenizer) == after
    switched_off = case != "reasoning"
    assert ("switched off" in told) == switched_off
    assert any("thinking" in trap for trap in data.check_template(tokenizer)) != switched_off
    template = tokenizer.chat_template
    data.settle_thinking(tokenizer, rows)
    assert tokenizer.chat_template == template  # once is enough


def test_rows_of_which_some_reason_are_named_and_a_base_that_never_thinks_is_left_alone(qwen, micro):
    rows = [
        row("a", "q", "<think>hm</think>a"),
        row("b", "r", "b"),
        row("c", "s", "<think></think>c"),
    ]
    assert data.settle_thinking(AutoTokenizer.from_pretrained(qwen), rows).startswith("1 of 3 rows reason")
    template = micro.chat_template
    assert "no switch" in data.settle_thinking(micro, rows[1:]) and micro.chat_template == template
    assert data.check_template(micro) == []
