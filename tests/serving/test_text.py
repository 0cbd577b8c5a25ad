"""Text as it comes: no part of a character, nothing that may be the beginning of a stop string, and all of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_rnn
from hf_rnn.serving.text import TextOut, Texts

BYTES = Texts(hf_rnn.byte_tokenizer())
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_spaces() -> Texts:
    """A tokenizer as SentencePiece's: words with their spaces, and bytes for what it has no word for."""
    words = ["<unk>", "▁", "▁a", "b", "ab", "▁ba", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return Texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


WORDS = with_spaces()
TEXTS = st.text(st.sampled_from("ab é€𝄞\n"), max_size=60)


@settings(deadline=None, max_examples=300)
@given(TEXTS | st.binary(max_size=60), st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_the_text(text, stops):
    ids = list(text.encode() if isinstance(text, str) else text)
    out, shown = TextOut(BYTES.decode, stops), ""
    for n, token in enumerate(ids):
        new = out.push(token)
        shown += new
        whole = BYTES.decode(ids[: n + 1])
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            assert out.stopped and shown == whole[: min(found)]
            return
        assert not out.stopped and whole.startswith(shown)
        held = [k for stop in stops for k in range(1, len(stop)) if whole.endswith(stop[:k])]
        assert len(shown) <= len(whole) - max(held, default=0)
        if isinstance(text, str):  # no part of a character
            assert text.startswith(shown)
    shown += out.end()
    assert shown == BYTES.decode(ids) and out.shown == len(shown)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 262), max_size=50) | TEXTS)
def test_what_is_shown_with_words(ids):
    if isinstance(ids, str):
        ids = WORDS.encode(ids, begins=True)
        whole = WORDS.decode(ids)
    else:  # words alone: bytes at random are another text with each that follows
        ids = [token % 6 + 1 for token in ids]
        whole = WORDS.decode(ids)
    out = TextOut(WORDS.decode)
    assert "".join(out.push(token) for token in ids) + out.end() == whole


def test_tokens_have_bytes():
    assert BYTES.token(0xE2) == ("\ufffd", [0xE2]) and BYTES.token(65) == ("A", [65])
    assert BYTES.token(258) == ("<|eos|>", list(b"<|eos|>")) and BYTES.token(300) == ("", [])
    assert WORDS.token(2) == ("a", [97])


def test_special_tokens_in_a_text_are_text():
    assert BYTES.encode("a<|eos|>", begins=False) == list(b"a<|eos|>")
    assert BYTES.encode("", begins=True) == [257] and BYTES.encode("", begins=False) == []
    with pytest.raises(ValueError, match=r"messages: expected no special token, found '<\|eos\|>'"):
        BYTES.chat([{"role": "user", "content": "a<|eos|>"}], begins=True)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_chat_that_goes_on_is_the_whole_chat(template):
    tokenizer = hf_rnn.byte_tokenizer()
    tokenizer.chat_template = template
    texts = Texts(tokenizer)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    answer, more = {"role": "assistant", "content": "Ho \n"}, {"role": "user", "content": "é?"}
    whole = texts.chat([*said, answer, more], begins=True)
    parts = texts.chat(said, begins=True) + texts.encode(answer["content"], begins=False)
    assert parts + texts.chat([more], begins=False) == whole
    if template is None:
        text = "system:\nBe brief.\n\nuser:\nHi\n\n\nassistant:\nHo \n\n\nuser:\né?\n\nassistant:\n"
        assert texts.decode(whole) == text


def test_templates_that_do_not_go_on():
    tokenizer = hf_rnn.byte_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes a chat anew"):
        Texts(tokenizer).chat([{"role": "user", "content": "x"}], begins=False)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="messages: the chat template refuses them: no system here"):
        Texts(tokenizer).chat([{"role": "system", "content": "x"}], begins=True)
