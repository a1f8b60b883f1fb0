"""data/templates against strings worked out by hand from the formats that its README names, and the traps in them."""

import copy
import datetime
import itertools
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftlab.data import check_template
from ftlab.models import fetch_smollm2
from ftlab.paths import DATA

FILES = {file.stem: file.read_text(encoding="utf-8") for file in (DATA / "templates").glob("*.jinja")}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, ANSWER, MORE = (
    {"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
)
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "deepseek": "<｜begin▁of▁sentence｜>", "gemma": "<bos>"}

HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "<|end|>"
)
LATER = {"mistral", "qwen3", "harmony"}  # what a later turn changes: the system message, the reasoning, the end of turn

# One conversation: system, user, assistant, user, then the beginning of an answer.
LONG = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi[/INST] Yes?</s>[INST] Be brief.\n\nBye[/INST]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "deepseek": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Yes?<｜end▁of▁sentence｜>"
    "<｜User｜>Bye<｜Assistant｜>",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "harmony": HARMONY + "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|>"
    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yes?<|end|>"
    "<|start|>user<|message|>Bye<|end|><|start|>assistant",
}
LONG["qwen3"] = LONG["chatml_tools"] = LONG["chatml"]
# A training example without a system message: user, assistant.
SHORT = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>",
    "mistral": "<s>[INST] Hi[/INST] Yes?</s>",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Yes?<｜end▁of▁sentence｜>",
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes?<|im_end|>\n",
    "harmony": HARMONY + "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yes?<|return|>",
}
SHORT["chatml_tools"] = SHORT["chatml"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(fetch_smollm2())


@pytest.fixture
def render(tokenizer):
    def render(name: str, messages: list[dict], add_generation_prompt: bool = False) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
        return tokenizer.apply_chat_template(messages, chat_template=FILES[name], **options)

    return render


def test_every_file_is_tested():
    assert FILES.keys() == LONG.keys() == SHORT.keys()


@pytest.mark.parametrize("name", LONG)
def test_several_turns_with_a_system_message(name, render):
    assert render(name, [SYSTEM, ASK, ANSWER, MORE], add_generation_prompt=True) == LONG[name]


@pytest.mark.parametrize("name", SHORT)
def test_one_answer_without_a_system_message(name, render):
    assert render(name, [ASK, ANSWER]) == SHORT[name]


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_is_the_beginning_of_its_training_text(name, render):
    """Or the loss mask would be wrong: the answer follows, after a blank, empty reasoning or the channel."""
    prompt, whole = render(name, [SYSTEM, ASK], add_generation_prompt=True), render(name, [SYSTEM, ASK, ANSWER])
    before = {"mistral": " ", "qwen3": "<think>\n\n</think>\n\n", "harmony": "<|channel|>final<|message|>"}
    assert whole.startswith(prompt + before.get(name, "") + "Yes?")


@pytest.mark.parametrize("name", FILES)
def test_a_longer_conversation_begins_with_the_shorter_one_except_in_three(name, render):
    shorter, longer = render(name, [SYSTEM, ASK, ANSWER]), render(name, [SYSTEM, ASK, ANSWER, MORE])
    assert longer.startswith(shorter) == (name not in LATER)


def test_mistral_repeats_the_system_message_nowhere_even_if_two_user_messages_are_equal(render):
    text = render("mistral", [SYSTEM, ASK, ANSWER, dict(ASK)])
    assert text == "<s>[INST] Hi[/INST] Yes?</s>[INST] Be brief.\n\nHi[/INST]"


@pytest.mark.parametrize("name", FILES)
def test_only_llama3_and_gemma_strip_a_message(name, render):
    text = render(name, [{"role": "user", "content": "  Hi\n"}])
    assert (text == render(name, [ASK])) == (name in ("llama3", "gemma"))
    assert ("  Hi\n" in text) == (name not in ("llama3", "gemma"))


def test_chatml_is_smollm2s_own_template_but_for_its_default_system_message(tokenizer, render):
    def own(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert own([SYSTEM, ASK, ANSWER, MORE]) == LONG["chatml"]
    added, rest = own([ASK])[: -len(render("chatml", [ASK], True))], render("chatml", [ASK], True)
    assert own([ASK]) == added + rest and added.startswith("<|im_start|>system\nYou are a helpful AI assistant")


# --- Reasoning and tools ----------------------------------------------------------------------------------------------


def run_sql(query: str) -> str:
    """Run one SQLite query on the table orders.

    Args:
        query: one SELECT
    """


def thinks(content: str, thought: str = "", query: str = "") -> dict:
    function = {"name": "run_sql", "arguments": {"query": query}}
    calls = {"tool_calls": [{"type": "function", "function": function}]} if query else {}
    return {"role": "assistant", "content": content, "reasoning_content": thought} | calls


CALL, ROWS, SAID = thinks("", "count", "SELECT '1'"), {"role": "tool", "content": '[["1"]]'}, thinks("One.", "easy")
TALKS = [
    [ASK], [SYSTEM, ASK], [ASK, SAID], [SYSTEM, ASK, SAID, ASK], [SYSTEM, ASK, SAID, ASK, SAID], [SYSTEM, ASK, CALL],
    [ASK, CALL, ROWS], [SYSTEM, ASK, CALL, ROWS, SAID], [SYSTEM, ASK, CALL, ROWS, SAID, ASK],
    [SYSTEM, ASK, CALL, ROWS, SAID, ASK, CALL, ROWS], [SYSTEM, ASK, CALL, ROWS, CALL, ROWS, SAID],
]  # fmt: skip


@pytest.mark.parametrize(("name", "theirs"), [("qwen3", "qwen3"), ("harmony", "gptoss")])
def test_qwen3_and_harmony_give_the_ids_of_the_published_templates(name, theirs, tokenizer):
    """TRL carries Qwen3's and gpt-oss's own files. gpt-oss writes the date, and calls the reasoning `thinking`."""
    from trl import chat_template_utils

    published = getattr(chat_template_utils, f"{theirs}_chat_template")
    today = {"current_date": datetime.date.today().isoformat()}
    for talk, more, tools in itertools.product(TALKS, (False, True), (None, [run_sql])):
        named = [m | {"thinking": m["reasoning_content"]} if m.get("reasoning_content") else m for m in talk]
        how = {"tools": tools, "add_generation_prompt": more, "return_dict": False, **today}
        mine = tokenizer.apply_chat_template(talk, chat_template=FILES[name], **how)
        assert mine == tokenizer.apply_chat_template(named, chat_template=published, **how), (talk, more, tools)


def test_qwen3_reads_reasoning_from_the_content_too_and_can_be_told_not_to_think(render, tokenizer):
    inside = [ASK, {"role": "assistant", "content": "<think>\neasy\n</think>\n\nOne."}]
    assert render("qwen3", inside) == render("qwen3", [ASK, SAID]) != render("qwen3", [ASK, thinks("One.")])
    assert render("qwen3", [*inside, MORE]) == render("qwen3", [ASK, thinks("One."), MORE])
    how = {"chat_template": FILES["qwen3"], "add_generation_prompt": True, "tokenize": False}
    quiet = tokenizer.apply_chat_template([ASK], enable_thinking=False, **how)
    assert quiet == tokenizer.apply_chat_template([ASK], **how) + "<think>\n\n</think>\n\n"


def test_chatml_tools_counts_calls_and_answers_with_their_ends_and_nothing_else(tokenizer):
    from datasets import Dataset

    (row,) = Dataset.from_list([{"messages": [SYSTEM, ASK, CALL, ROWS, SAID]}])  # Arrow writes None for what lacks
    how = {"chat_template": FILES["chatml_tools"], "tools": [run_sql], "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(row["messages"], return_dict=True, **how)
    ids = zip(found["input_ids"], found["assistant_masks"], strict=True)
    call = '<tool_call>{"name": "run_sql", "arguments": {"query": "SELECT \'1\'"}}</tool_call><|im_end|>\n'
    assert tokenizer.decode([i for i, counts in ids if counts]) == f"{call}One.<|im_end|>\n"
    text = tokenizer.decode(found["input_ids"])
    assert f"<|im_start|>tool\n{ROWS['content']}<|im_end|>\n" in text and '"name": "run_sql", "description"' in text


def test_a_call_is_written_alike_with_its_arguments_as_a_dict_and_as_a_string(tokenizer):
    function = CALL["tool_calls"][0]["function"]
    as_text = function | {"arguments": json.dumps(function["arguments"])}
    asked = CALL | {"tool_calls": [{"type": "function", "id": "call_0", "function": as_text}]}
    how = {"chat_template": FILES["chatml_tools"], "tokenize": False}
    both = [tokenizer.apply_chat_template([ASK, call, ROWS, SAID], **how) for call in (CALL, asked)]
    assert both[0] == both[1] and json.dumps(function["arguments"]) in both[0]


def reads_back(tokenizer):
    """A copy of the tokenizer with the way back of chatml_tools."""
    tokenizer = copy.deepcopy(tokenizer)
    template = (DATA / "templates" / "chatml_tools.json").read_text(encoding="utf-8")
    tokenizer.response_template = json.loads(template)
    return tokenizer


def test_what_chatml_tools_writes_is_read_back(tokenizer):
    """Messages with no call, one and two, with and without text before them and the end mark."""
    tokenizer = reads_back(tokenizer)
    call, arguments = CALL["tool_calls"][0], {"at": ["a", {"b": None}], "n": 1.5}
    other = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    how = {"chat_template": FILES["chatml_tools"], "tokenize": False}
    for calls, content in itertools.product([[], [call], [call, other]], ["", "Let me look."]):
        said = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
        start = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, **how)
        text = tokenizer.apply_chat_template([ASK, said], **how).removeprefix(start)
        for written in (text, text.removesuffix("<|im_end|>\n")):
            assert tokenizer.parse_response(written, prefix=start) == said


BROKEN = ['{"name": "run_sql", "arg', '{"name": "run_sql"}', "run_sql", '["run_sql"]']


@pytest.mark.parametrize("call", BROKEN)
def test_a_call_that_cannot_be_read_raises_value_error(tokenizer, call):
    text, prefix = f"<tool_call>{call}</tool_call>", "<|im_start|>assistant\n"
    with pytest.raises(ValueError):
        reads_back(tokenizer).parse_response(text, prefix=prefix)


# --- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOS)
def test_a_tokenizer_that_adds_bos_makes_two_and_check_template_says_so(name):
    """A tokenizer of the kind that ships with these models: BOS is one token, and is put in front of every text."""
    vocabulary = {"?": 0, BOS[name]: 1, "<end>": 2, "<pad>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([BOS[name], "<end>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="$0", special_tokens=[])
    with_bos = processors.TemplateProcessing(single=f"{BOS[name]} $0", special_tokens=[(BOS[name], 1)])
    special = {"bos_token": BOS[name], "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "?"}
    for processor, found in ((backend.post_processor, False), (with_bos, True)):
        backend.post_processor = processor
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=FILES[name], **special)
        text = tokenizer.apply_chat_template([ASK], tokenize=False)
        assert (tokenizer(text)["input_ids"][:2] == [1, 1]) == found
        assert tokenizer(text, add_special_tokens=False)["input_ids"][:2] != [1, 1]
        assert any(trap.startswith("double BOS") for trap in check_template(tokenizer)) == found
