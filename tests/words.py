"""A word-level tokenizer made on the spot, with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

SENTENCE = ("the", "capital", "of", "france", "is", "paris", "rome", "user", "model", ":")
WORDS = ("<pad>", "<s>", "</s>", "<unk>", *SENTENCE)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}model :{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    words = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast
