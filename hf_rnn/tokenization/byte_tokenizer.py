"""A byte-level tokenizer, built offline: 256 bytes and three special tokens; any text round-trips."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def byte_tokenizer(mask_token: str | None = None) -> PreTrainedTokenizerFast:
    """Token b is the byte b, 256 is padding, 257 begins and 258 ends a text; pads on the left, ready to generate.

    Args:
        mask_token: how a masked byte is written, "<|mask|>" for example, token 259; None: there is none, since texts
            are not to contain such.

    Saved with a checkpoint it loads through `AutoTokenizer` anywhere, with or without this package. Bytes that are no
    UTF-8 (half a character, say) decode to U+FFFD, as in every byte-level tokenizer; ids are never lost.
    """
    vocab = {character: byte for byte, character in sorted(bytes_to_unicode().items())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL_TOKENS | ({} if mask_token is None else {"mask_token": mask_token})
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
