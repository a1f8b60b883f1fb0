"""ftlab.classroom.mask: which tokens count, worked out by hand as text; the faults it passes on; the menus."""

import copy
import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ftlab.classroom.mask import LOSSES, View, as_text, from_text, mask_viewer, view
from ftlab.models import fetch_smollm2
from ftlab.paths import DATA
from ftlab.pipeline import data

TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in (DATA / "templates").glob("*.jinja")}
TALK = {
    "messages": [
        {"role": "user", "content": "Where is my food?"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Since when?"},
        {"role": "assistant", "content": "Five minutes."},
    ]
}
LATER = "<|im_start|>user\nSince when?<|im_end|>\n<|im_start|>assistant\n"
WHOLE = (
    "<|im_start|>user\nWhere is my food?<|im_end|>\n<|im_start|>assistant\nOn its way.<|im_end|>\n"
    f"{LATER}Five minutes.<|im_end|>\n"
)
COUNTED = {  # in bare ChatML
    "every answer": "On its way.<|im_end|>\nFive minutes.<|im_end|>\n",
    "the last answer": "Five minutes.<|im_end|>\n",
    "everything": WHOLE,
    "from the first answer on": f"On its way.<|im_end|>\n{LATER}Five minutes.<|im_end|>\n",
    "without the end of turn": "On its way.\nFive minutes.\n",
    "one token late": " its way.<|im_end|>\n<|im_start|> minutes.<|im_end|>\n",
    "one token early": "\nOn its way.<|im_end|>\nFive minutes.<|im_end|>",
}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def loaded():
    return AutoTokenizer.from_pretrained(fetch_smollm2())


@pytest.fixture
def with_template(loaded):
    def with_template(name: str):
        tokenizer = copy.deepcopy(loaded)
        tokenizer.chat_template = TEMPLATES[name]
        return tokenizer

    return with_template


def add_bos(tokenizer):
    """The tokenizer, which now begins every text with the beginning-of-sequence token."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def counted(shown) -> str:
    return "".join(token for token, bit in zip(shown.tokens, shown.mask, strict=True) if bit)


def causes(shown) -> list[str]:
    return [what for what, _ in shown.faults]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_counts_by_hand(with_template, loss):
    shown = view(data, TALK, with_template("chatml"), loss)
    assert counted(shown) == COUNTED[loss] and shown.text == "".join(shown.tokens) == WHOLE
    assert shown.trained == sum(shown.mask) and shown.faults == ()
    assert "".join(t for t, bit in zip(shown.tokens, shown.answers, strict=True) if bit) == COUNTED["every answer"]


def test_of_one_answer_it_is_the_mask_that_training_takes(loaded):
    for row in data.triage_rows(DATA / "triage" / "validation.jsonl")[::10]:
        rendered = data.render(row, loaded)
        for loss in ("every answer", "the last answer", "from the first answer on"):
            shown = view(data, row, loaded, loss)
            assert (shown.mask, shown.input_ids) == (rendered.completion_mask, rendered.input_ids)


def test_a_name_that_is_none_is_refused(loaded):
    with pytest.raises(ValueError, match="got loss='all', wanted one of every answer"):
        view(data, TALK, loaded, "all")


# --- Faults -----------------------------------------------------------------------------------------------------------


def test_pad_is_eos_and_a_second_bos_are_told(loaded):
    assert view(data, TALK, loaded).faults == ()
    broken, twice = copy.deepcopy(loaded), copy.deepcopy(loaded)
    broken.pad_token = broken.eos_token
    (found,) = data.check_template(broken)
    said = f"{found.seen}; {found.why}. Remedy: {found.fix}."
    assert view(data, TALK, broken).faults == (("pad is the end token", said),)
    shown = view(data, TALK, add_bos(twice))
    assert causes(shown) == ["double BOS"]
    assert shown.input_ids.count(twice.bos_token_id) == 5, "rendering itself adds none"


def test_a_template_of_another_model_has_no_end_that_this_vocabulary_knows(with_template):
    shown = view(data, TALK, with_template("gemma"), "without the end of turn")
    assert causes(shown) == ["no end-of-turn"]
    assert counted(shown) == "On its way.<end_of_turn>\nFive minutes.<end_of_turn>\n", "no marker, so none is left out"
    knows = with_template("gemma")
    knows.add_tokens("<end_of_turn>")  # a marker, though not one of the special tokens
    assert counted(view(data, TALK, knows, "without the end of turn")) == "On its way.\nFive minutes.\n"


def test_where_no_mask_is_right_none_is_shown(with_template):
    """SmolLM2's tokenizer takes two line breaks for one token at the end of a text, and for two before a word."""
    tokenizer = add_bos(with_template("llama3"))  # which is no part of a rendered text
    shown = view(data, TALK, tokenizer, "everything")
    assert shown.trained == 0 and shown.loss == "no mask is right" and "not the beginning" in shown.note
    assert re.fullmatch(r"[^:]+[^.:]\.", shown.note), "one sentence, without the texts"
    assert "generation prompt differs from training" in causes(shown) and "".join(shown.tokens) == shown.text
    assert f"0 of {len(shown.input_ids)} tokens count" in shown.page()


def test_mistral_writes_earlier_turns_anew(with_template):
    """With a system message the first question is written differently once there is a second one."""
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *TALK["messages"]]}
    shown = view(data, talk, with_template("mistral"))
    assert causes(shown)[-1] == "only the last answer can be trained on" and counted(shown) == " Five minutes.</s>"
    assert "only the last answer can be trained on" not in causes(view(data, TALK, with_template("mistral")))


def test_a_marker_in_a_message_is_told(loaded):
    row = {"prompt": "Hi<|im_end|>", "completion": "Yes?"}
    shown = view(data, row, loaded)
    assert shown.faults[0][0] == "chat marker at messages[0].content" and shown.input_ids.count(2) == 4


# --- On a page --------------------------------------------------------------------------------------------------------


def test_each_token_says_its_id_and_whether_it_counts(with_template):
    shown = view(data, TALK, with_template("chatml"), "one token late")
    page = shown.page()
    tags = re.findall(r'<(span|mark|ins|del) [^>]*title="id (\d+): ([^"]*)">', page)
    assert [int(id) for _, id, _ in tags] == shown.input_ids
    names = {"span": (0, 0), "mark": (1, 1), "ins": (1, 0), "del": (0, 1)}
    assert [names[tag] for tag, _, _ in tags] == list(zip(shown.mask, shown.answers, strict=True))
    assert {name for _, _, name in tags} == {
        "only read", "of an answer, counting", "of no answer, and counting", "of an answer, left out",
    }  # fmt: skip
    assert "2 of an answer, left out" in page and "1 of no answer, and counting" in page and "<sub" not in page
    assert [int(id) for id in re.findall(r"<sub[^>]*>(\d+)</sub>", shown.page(ids=True))] == shown.input_ids


def test_a_page_by_hand():
    """Three tokens only read, one that counts; what does not occur is not in the legend."""
    tokens, counts = ["<a>\n", "b", "c", "\n"], [0, 1, 0, 0]
    shown = View("<a>\nbc\n", tokens, [5, 6, 7, 8], counts, counts, (("x < y", "1 & 2"),), "one token late", "So.")
    style = "color: #111; padding: 1px 1px; margin-right: 1px"
    read, counting = f'<span style="background: #e4e4e4; {style}"', f'<mark style="background: #9fe0cd; {style}"'
    assert shown.page() == (
        '<div style="line-height: 1.5; max-width: 60em">'
        '<p role="status"><b>1 of 4 tokens count: one token late</b> (25%). So.</p>'
        '<p style="border-left: 4px solid #D55E00; padding-left: 0.8em; margin: 0.4em 0">'
        "<b>x &lt; y</b><br>1 &amp; 2</p>"
        f"<p>{read}>3 only read</span> {counting}>1 of an answer, counting</mark></p>"
        '<p style="font-family: monospace; white-space: pre-wrap; line-height: 1.8">'
        f'{read} title="id 5: only read">&lt;a&gt;↵</span><br>'
        f'{counting} title="id 6: of an answer, counting">b</mark>'
        f'{read} title="id 7: only read">c</span>{read} title="id 8: only read">↵</span><br></p>'
        "<details><summary>The text, 7 characters</summary>"
        '<pre style="white-space: pre-wrap">&lt;a&gt;\nbc\n</pre></details></div>'
    )
    assert shown._repr_html_() == shown.page()
    assert "0 of 0 tokens count: everything</b> (0%)" in View("", [], [], [], [], (), "everything", "").page()


def test_text_is_escaped(loaded):
    row = {"prompt": EVIL, "completion": EVIL}
    shown = view(data, row, loaded)
    chips = re.findall(r'title="id[^"]*">([^<]*)</', shown.page())
    assert [html.unescape(chip) for chip in chips] == [token.replace("\n", "↵") for token in shown.tokens]
    assert "<script" not in shown.page()
    made = mask_viewer(data, {EVIL: row}, {EVIL: loaded}, {EVIL: loaded.chat_template})
    assert "<script" not in made._repr_mimebundle_()["text/html"]


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1))
def test_messages_come_back_from_their_text(pairs):
    """But for a line that itself begins like a message."""
    messages = [{"role": role, "content": content} for role, content in pairs]
    if not any(re.search(r"^(system|user|assistant):", content, re.MULTILINE) for _, content in pairs):
        assert from_text(as_text(messages)) == messages


@pytest.mark.parametrize("text", ["", "hello", "hello\nuser: hi", "User: hi"])
def test_a_text_without_a_role_is_refused(text):
    with pytest.raises(ValueError, match="wanted each message to begin with"):
        from_text(text)


# --- The menus --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(loaded):
    broken = copy.deepcopy(loaded)
    broken.pad_token = broken.eos_token
    row = data.triage_rows(DATA / "triage" / "validation.jsonl")[0]
    templates = {"its own": loaded.chat_template, **TEMPLATES}
    return mask_viewer(data, {"ticket": row, "talk": TALK}, {"as loaded": loaded, "pad = eos": broken}, templates)


def test_every_control_changes_what_is_shown(made, loaded):
    first = made.view
    made.row.value = "talk"
    assert counted(made.view) == COUNTED["every answer"] and made.view != first
    made.loss.value = "one token early"
    assert "one token early" in made._said.value
    made.template.value = "chatml"
    assert made.view.text == WHOLE
    made.tokenizer.value = "pad = eos"
    assert "pad is the end token" in made._said.value
    made.ids.value = True
    assert "</sub>" in made._said.value
    assert loaded.chat_template == made._templates["its own"], "the reader's tokenizer is left as it is"


def test_every_control_is_on_the_page(made):
    keys, first, second, messages, ids, said = made._widget.children
    assert keys.value.startswith("With the keyboard") and first.children == (made.row, made.loss)
    assert second.children == (made.template, made.tokenizer)
    assert (messages, ids, said) == (made.messages, made.ids, made._said)
    assert made.messages.value == as_text([m for part in data.to_messages(made._rows["ticket"]) for m in part])


def test_messages_of_ones_own(made):
    made.messages.value = "user: 2 + 2?\nassistant: 4"
    assert made.view.text.endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n")
    made.messages.value = "2 + 2?"
    assert made._said.value == (
        '<p role="status"><b>Not yet a conversation:</b> wanted each message to begin with '
        "&quot;system: &quot;, &quot;user: &quot; or &quot;assistant: &quot; on a new line</p>"
    )
    made.messages.value = "\n\nuser: 2 + 3?\nassistant: 5"
    assert "2 + 3?" in made.view.text, "an empty line before it is no mistake"
    made.messages.value = "user: 2 + 2?"
    assert "wrong role order" in made._said.value and "0 of" in made._said.value


def test_it_can_be_read_without_a_kernel(made):
    bundle = made._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "ticket · template its own · tokenizer as loaded" in bundle["text/html"] and "<mark" in bundle["text/html"]
    assert bundle["text/plain"] == "ticket · template its own · tokenizer as loaded · every answer"
