"""data/templates against strings worked out by hand from the formats that its README names, and the traps in them."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftlab.models import fetch_smollm2
from ftlab.paths import DATA
from ftlab.pipeline.data import check_template

FILES = {file.stem: file.read_text(encoding="utf-8") for file in (DATA / "templates").glob("*.jinja")}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, ANSWER, MORE = (
    {"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
)
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "deepseek": "<｜begin▁of▁sentence｜>", "gemma": "<bos>"}

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
}
# A training example without a system message: user, assistant.
SHORT = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>",
    "mistral": "<s>[INST] Hi[/INST] Yes?</s>",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Yes?<｜end▁of▁sentence｜>",
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n",
}


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
    """Or the loss mask would be wrong: the answer follows, after Mistral's blank."""
    prompt, whole = render(name, [SYSTEM, ASK], add_generation_prompt=True), render(name, [SYSTEM, ASK, ANSWER])
    assert whole.startswith(prompt)
    assert whole.removeprefix(prompt).lstrip(" ").startswith("Yes?")


@pytest.mark.parametrize("name", FILES)
def test_a_longer_conversation_begins_with_the_shorter_one_except_in_mistral(name, render):
    shorter, longer = render(name, [SYSTEM, ASK, ANSWER]), render(name, [SYSTEM, ASK, ANSWER, MORE])
    assert longer.startswith(shorter) == (name != "mistral")


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
        assert ("double BOS" in {finding.cause for finding in check_template(tokenizer)}) == found
