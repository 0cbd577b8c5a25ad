"""Between text and tokens, as they come."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The form of a chat for models whose tokenizer has no template. It ends where the next message would begin.
PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
PLAIN_STOP = "\n\nuser:"
_MARK = "hf_rnn"  # stands for an answer


class Texts:
    """What a server asks of a tokenizer. Several threads may use it.

    Args:
        tokenizer: one of the tokenizers library.

    Raises:
        ValueError: another kind of tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"tokenizer: expected one of the tokenizers library, got a {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self._marked, self._plain = Tokenizer.from_str(backend.to_str()), Tokenizer.from_str(backend.to_str())
        for mine in (self._marked, self._plain):
            mine.no_padding()
            mine.no_truncation()
        self._plain.encode_special_tokens = True  # as text
        self._bytes = None
        if isinstance(backend.decoder, decoders.ByteLevel):
            self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self.has_template = tokenizer.chat_template is not None

    def encode(self, text: str, begins: bool) -> list[int]:
        """A text's tokens; special ones that are written in it are text.

        Args:
            begins: whether nothing is before it; then the tokens come first with which the tokenizer begins a text, and
                a text of none is the one that begins them all.
        """
        ids = self._plain.encode(text, add_special_tokens=begins).ids
        bos = self.tokenizer.bos_token_id
        return [bos] if begins and not ids and bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are no text."""
        return self._marked.decode(list(ids), skip_special_tokens=True)

    def token(self, token: int) -> tuple[str, list[int]]:
        """A token by itself, and its bytes in UTF-8, which may be a part of a character."""
        piece = self._marked.id_to_token(token) or ""
        if self._bytes is not None and all(character in self._bytes for character in piece):
            found = bytes(self._bytes[character] for character in piece)
            return found.decode("utf-8", "replace"), list(found)
        text = self._marked.decode([token], skip_special_tokens=False)
        return text, list(text.encode())

    def chat(self, messages: list[dict[str, str]], begins: bool) -> list[int]:
        """Messages, and the beginning of the answer, as tokens, by the tokenizer's chat template or `PLAIN_CHAT`.

        Args:
            begins: whether nothing is before them. Else what is before ends with an answer, whose end comes first.

        Raises:
            ValueError: messages that the template refuses; that hold a special token; or a template that writes what is
                before in another way as soon as something follows, so that its state is of no use.
        """
        for message in messages:
            if found := [x for x in self.tokenizer.all_special_tokens if x in message["content"]]:
                raise ValueError(f"messages: expected no special token, found {found[0]!r}")
        if begins:
            return self._marked.encode(self._render(messages, True), add_special_tokens=False).ids
        before = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        past, whole = self._render(before, False), self._render([*before, *messages], True)
        if not whole.startswith(past) or past.count(_MARK) != 2:
            raise ValueError("session: this tokenizer's chat template writes a chat anew with each message")
        return self._marked.encode(whole[past.rindex(_MARK) + len(_MARK) :], add_special_tokens=False).ids

    def _render(self, messages: list[dict[str, str]], answer: bool) -> str:
        template = None if self.has_template else PLAIN_CHAT
        options: dict[str, Any] = dict(tokenize=False, add_generation_prompt=answer, chat_template=template)
        try:
            return self.tokenizer.apply_chat_template(messages, **options)  # type: ignore[return-value]
        except Exception as error:  # whatever a template raises
            raise ValueError(f"messages: the chat template refuses them: {error}") from error


class TextOut:
    """A text that comes token by token, as far as it may be shown: no part of a character, and nothing that may be the
    beginning of a stop string.

    Args:
        decode: tokens to text.
        stop: strings with which the text ends, without them.

    Attributes:
        shown: characters so far.
        stopped: there was a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []  # the last ones
        self._whole = 0  # characters of theirs that will not change
        self._open = 0  # characters behind them, which may change
        self._parts = 0  # tokens since there are such
        self._held = ""
        self.shown = 0
        self.stopped = False

    @property
    def holds(self) -> bool:
        """Whether there is text that is not shown."""
        return bool(self._held) or self._parts > 0

    @property
    def length(self) -> int:
        """Characters so far, shown or not."""
        return self.shown + len(self._held) + self._open

    def push(self, token: int) -> str:
        """What is to be shown with the next token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        self._parts = self._parts + 1 if text.endswith("\ufffd") else 0
        self._open = max(len(text) - self._whole, 0)
        if 0 < self._parts < 4:  # maybe a character's beginning, with which some tokenizers write anew what is before
            return ""
        new, self._whole = text[self._whole : _whole(text)], max(self._whole, _whole(text))
        self._open = len(text) - self._whole
        if len(self._ids) > 16:
            self._forget(text)
        return self._show(new)

    def end(self) -> str:
        """What is to be shown behind the last token."""
        shown = self._show(self._decode(self._ids)[self._whole :])
        if self.stopped:
            return shown
        rest, self._held = self._held, ""
        self.shown += len(rest)
        return shown + rest

    def _forget(self, text: str) -> None:
        """All tokens but the last few, where a character begins."""
        for count in range(8, 0, -1):
            rest = self._decode(self._ids[-count:])
            if text.endswith(rest) and not rest.startswith("\ufffd"):
                self._ids, self._whole = self._ids[-count:], _whole(rest)
                return

    def _show(self, new: str) -> str:
        self._held += new
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else len(self._held) - self._beginning()
        shown, self._held = self._held[:cut], "" if found else self._held[cut:]
        self.shown += len(shown)
        return shown

    def _beginning(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stop):
                return count
        return 0


def _whole(text: str) -> int:
    """Characters of a decoded text that no further token changes: bytes that are not yet a character are U+FFFD, one
    for up to three of them or, in some tokenizers, for each."""
    ends = len(text)
    while ends > max(len(text) - 3, 0) and text[ends - 1] == "\ufffd":
        ends -= 1
    return ends
