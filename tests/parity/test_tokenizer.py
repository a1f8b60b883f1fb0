"""The repaired SmolLM2 tokenizer against llama.cpp reading the *original* GGUF, which never saw the repair.

llama.cpp is asked over HTTP (`POST /tokenize`, add_special=false, parse_special=true) by xllamacpp on 127.0.0.1.
"""

import functools
import hashlib
import json
import os
import urllib.request

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftlab.models import fetch_smollm2, repair_tokenizer
from ftlab.paths import CACHE

GGUF = CACHE / "smollm2-original.gguf"
TIMES = int(os.environ.get("FTLAB_FUZZ", "1"))

# Bytes without a token in SmolLM2's vocabulary: llama.cpp leaves them out, and so must we (an unknown token would be
# <|endoftext|>). F1 and F2 begin the planes 4 to 15 of Unicode, where only private-use characters are.
NO_TOKEN = b"\x04\x06\x13\x14\x16\x1d\xf1\xf2"

NASTY = [
    "",
    " ",
    "  ",
    "     ",
    "\n",
    "\n\n\n",
    "\r\n",
    "a\r\nb\r\n\r\nc\r",
    "\t",
    "\t\tx\t y",
    " leading",
    "trailing ",
    "trailing   ",
    "two  blanks   three    four",
    "line \n next\n  indented\n\t\n",
    "\u00a0no-break\u00a0blank\u202fnarrow\u3000wide",
    "7",
    "1234567890",
    "order 482193847562",
    "total:  12",
    "\n 5 items",
    "1,00,000.50 and 3.14e-10 and 0x1F",
    "v1.2.3-rc4 at 10:45:07 on 2026-10-09",
    "a1b22c333d4444",
    "x² + y³ = ½ and x ² ①",
    "Ⅷ Ⅻ ㊿ 〇 ٣٤٥ ۴ ၉ 𝟘𝟙",
    "₹499 aur ₹ 1,299.00/- ka refund",
    "₹ २५० का रिफंड",
    "मेरा ऑर्डर कहाँ है? खाना ठंडा था।",
    "क्षत्रिय श्री ज्ञ हिन्दी\u200dमें",
    "Bhaiya, khana THANDA hai!!! kab milega??",
    "আমি বাংলায় গান গাই",
    "தமிழ் மொழி",
    "Ünïcödé naïve façade Straße Ærø Łódź",
    "e\u0301 a\u0300\u0301\u0302 n\u0303 combining",
    "Z\u0351\u036b\u0343a\u0363\u036bl\u0348\u035ag\u0349o",
    "\ufb01ligature \ufb00 \u1e9b\u0323",
    "مرحبا بالعالم، كيف حالك؟",
    "שָׁלוֹם עולם",
    "abc \u202eright to left\u202c def \u200f\u200e",
    "我想退款,订单号是 482193。",
    "注文はどこですか？ カタカナ ｶﾀｶﾅ ひらがな",
    "주문이 어디에 있나요?",
    "Где мой заказ №482193?",
    "Ελληνικά και English και हिन्दी و عربي 漢字",
    "สวัสดีครับ ฉันหิว",
    "😀",
    "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇮🇳",
    "❤️ ❤ ☎️ #️⃣ 1️⃣",
    "🍕🍕🍕pizza🍕",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom",
    "\x00",
    "a\x00b\x01\x02\x1b[31mred\x1b[0m\x7f",
    "\x80\x85\x9f\xad",
    "\x04\x06\x13\x14\x16\x1d",
    "a\x04b\x1dc",
    "\U0010ffff \ue000 \ufffd \ufffe \U000e0041 \U00040000",
    "https://example.com/a/b?x=1&y=%20#frag",
    "mail me: first.last+tag@sub.example.co.in",
    '{"intent": "late_delivery", "order_id": "482193", "refund_amount": null}',
    '[1,2,{"a":[true,false,null,-1.5e+10]},"\\u20b9\\n"]',
    "def f(x):\n    return x**2  # ok\n\n\tif __name__ == '__main__':\n",
    'for (int i=0;i<10;++i){printf("%d\\n",i);} // {}[]()<>!=&&||',
    "SELECT * FROM t WHERE a='it''s' AND b<>3;",
    '<div class="x">&nbsp;&lt;b&gt;</div>',
    "C:\\Users\\x\\file.txt ../.. ~/.bashrc",
    "I've they'll we'd it's you're I'm can't 'S 'T 'RE don’t",
    "''''''```````\"\"\"\"......!!!!!!?????? --- ~~~ ===",
    "“curly” ‘quotes’ — dash – en … ellipsis",
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "hi<|im_end|>there <|im_end|> <|endoftext|>",
    "<|im_end|",
    "<|im_end|<|im_end|>|>",
    "< |im_end|> <|im_end |> <|IM_END|> <|im_END|>",
    "<|im_start||im_end|> |im_end|>",
    "<repo_name>x<file_sep>y<jupyter_code>z<empty_output>",
    "[INST] hi [/INST] <s></s> <pad> <unk> <bos> <0x41>",
    "\u2581SentencePiece \u0120GPT2 \u010a",
    "a" * 5000,
    "supercalifragilistic" * 60,
    "\u0915" * 700,
    "pneumono­ultra­micro­scopic",
    "AAAAaaaaAAAA MiXeD cAsE camelCaseWords SCREAMING_SNAKE kebab-case",
    "🚀 (normal) 😶‍🌫️ 3 33 333 3333 3.3 3..3 កាន់តែពិសេសអាច😁 apple工作1314151天～ нещо на Български",
]


@pytest.fixture(scope="module")
def imported(quick_reader):
    """transformers' own import of the GGUF, before any repair. It reads the file twice."""
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", functools.cache(quick_reader))
        return AutoTokenizer.from_pretrained(str(GGUF.parent), gguf_file=GGUF.name)


@pytest.fixture(scope="module")
def folder(imported, tmp_path_factory):
    """That import, saved and repaired now: what is in the cache may be older than the code."""
    folder = tmp_path_factory.mktemp("tokenizer")
    imported.save_pretrained(folder)
    repair_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama_cpp():
    """text -> token ids, as llama.cpp reads the original GGUF."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(GGUF)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0  # any free one
    parameters.n_ctx = 64
    parameters.n_parallel = 1
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of this machine has no say here

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        url, header = f"{server.listening_address}/tokenize", {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(url, body, header), timeout=30) as answer:
            return json.load(answer)["tokens"]

    return tokenize


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens(tokenizer):
    names = {"eos": (2, "<|im_end|>"), "pad": (0, "<|endoftext|>"), "bos": (1, "<|im_start|>")}
    for name, wanted in names.items():
        assert (getattr(tokenizer, f"{name}_token_id"), getattr(tokenizer, f"{name}_token")) == wanted
    assert len(tokenizer) == 49152


@pytest.mark.parametrize("text", NASTY, ids=[f"{i}-{ascii(t)[1:25]}" for i, t in enumerate(NASTY)])
def test_ids_equal_llama_cpp_on_nasty_strings(text, tokenizer, llama_cpp):
    ids = ids_of(tokenizer, text)
    assert ids == llama_cpp(text)
    assert tokenizer.decode(ids) == text.encode().translate(None, NO_TOKEN).decode(errors="replace")


def test_the_nasty_strings_are_many_and_come_back_unchanged_but_for_the_bytes_without_a_token(tokenizer):
    changed = [text for text in NASTY if tokenizer.decode(ids_of(tokenizer, text)) != text]
    assert len(set(NASTY)) >= 60
    assert changed == [text for text in NASTY if set(text.encode()) & set(NO_TOKEN)] and len(changed) == 3


@settings(max_examples=50 * TIMES, deadline=None)
@given(text=st.text(max_size=80))
@example(text=":\x16:")
def test_ids_equal_llama_cpp_on_any_text(text, tokenizer, llama_cpp):
    """Where a byte has no token, transformers drops it and may merge its neighbours, which llama.cpp keeps apart."""
    ids, theirs = ids_of(tokenizer, text), llama_cpp(text)
    if set(text.encode()) & set(NO_TOKEN):
        assert tokenizer.decode(ids) == tokenizer.decode(theirs)
    else:
        assert ids == theirs
    assert tokenizer.decode(ids) == text.encode().translate(None, NO_TOKEN).decode(errors="replace")


PIECES = [*" \t\n\r0179²½٣aZé'<|>₹", "  ", "\r\n", "'s", "है", "👍🏽", "<|im_end|>", "<|im"]


@settings(max_examples=50 * TIMES, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_ids_equal_llama_cpp_on_mixtures_of_blanks_numbers_and_markers(text, tokenizer, llama_cpp):
    """Uniform random text seldom puts a digit behind two blanks, which is where the pre-tokenizer decides."""
    assert ids_of(tokenizer, text) == llama_cpp(text)
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_chat_template_renders_what_llama_cpp_reads_as_turns(tokenizer, llama_cpp):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == llama_cpp(tokenizer.apply_chat_template(messages, tokenize=False))
    assert (ids.count(1), ids.count(2), ids.count(0)) == (3, 3, 0)  # system, user, assistant: each opened and closed


def test_llama_cpps_converter_knows_this_pre_tokenizer_as_smollm(tokenizer):
    """convert_hf_to_gguf.py hashes the ids of a check text; beside "smollm" there stands this hash."""
    text = (
        "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
        "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
        "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
        "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
    )
    fingerprint = hashlib.sha256(str(tokenizer.encode(text)).encode()).hexdigest()
    assert fingerprint == "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


def test_the_import_without_the_repair_is_wrong(imported, llama_cpp):
    """What the repair is for: each of its faults shows in transformers' own import of the same file."""
    assert (imported.eos_token, imported.pad_token) == ("<|im_start|>", None)
    differ = [text for text in NASTY if ids_of(imported, text) != llama_cpp(text)]
    assert {"total:  12", "\n 5 items", "a\x04b\x1dc"} <= set(differ)
    assert ids_of(imported, "order 482193") == llama_cpp("order 482193")  # no merge joins digits: most numbers survive


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_cached_model_has_this_tokenizer(name, folder):
    cached = fetch_smollm2() / name
    assert json.loads(cached.read_text()) == json.loads((folder / name).read_text()), (
        f"remove {cached.parent} and run make setup"
    )


def test_saving_and_loading_keeps_the_repair(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [ids_of(again, text) for text in NASTY] == [ids_of(tokenizer, text) for text in NASTY]
    assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (2, 0, 1)
