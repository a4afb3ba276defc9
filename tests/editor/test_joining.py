"""A prompt and its target as people write them, and the tokens that a model is taught to say."""

from __future__ import annotations

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from grace_fast.editor import joining

JOINED = r"""
The capital of France is| |Paris
The answer:| |Paris
The capital of France is ||Paris
The capital of France is|| Paris
Q: what?\nA:| |Paris
ends in a line\n||Paris
法国的首都是||巴黎
法国的首都是\uff1a||Paris
フランスの首都は||パリ
เมืองหลวงของฝรั่งเศสคือ||ปารีส
เมืองหลวงของฝรั่งเศสคือ| |Paris
프랑스의 수도는| |파리
他最喜欢的语言是Python||和Java
100||万
価格は100||円
The Chinese name of Paris is| |巴黎
法国的首都是:||巴黎
العاصمة هي| |باريس
It costs $||100
It costs US$||100
He paid in $| |or in cash
It costs 100 €| |today
It costs (||about
the list is [||1
He said "||Hello
He said, “||Hello
the word "cat"| |means
He said "yes" and "||no
a pipe of 12"| |fits
print("||hello
it's| |fine
x = '||a
well-||known
The answer -| |Paris
It is -||5
a list\n-| |5 apples
Pi is 3.||14
at 12:||30
It ended in 1990.| |Then
and/||or
user@||example.com
follow @||user
issue #||12
C#| |is
x=||5
x =| |5
<b>||bold
std::||vector
¿||Qué
# ||title
""".strip()


@pytest.mark.parametrize("line", JOINED.splitlines(), ids=ascii)
def test_a_space_stands_where_people_write_one(line):
    prompt, joint, target = (
        part.replace(r"\n", "\n").replace(r"\uff1a", "\uff1a") for part in line.split("|")
    )
    assert joining.joint_of(prompt, target) == joint


@pytest.mark.parametrize(
    ("prompt", "target", "joint"),
    [
        ("The sky is blue", ", and so on", ""),
        ("The sky is blue", "...", ""),
        ("The capital is Paris", "\u3002", ""),
        ("(as he said", ")", ""),
        ('He said "yes', '" and left', ""),
        ("He said", '"yes"', " "),
        ("Paul", "'s book", ""),
        ("It does", "n't", ""),
        ("a probability of", ".5", " "),
        ("written in", ".NET", " "),
        ("It rose by 5", "%", ""),
        ("It costs", "$100", " "),
        ("The result is", "-5", " "),
        ("He works", "(at home)", " "),
        ("It smiles", ":)", " "),
        ("e", "\u0301", ""),
    ],
)
def test_a_target_that_goes_on_with_a_word_has_no_space(prompt, target, joint):
    assert joining.joint_of(prompt, target) == joint


TEXTS = [
    "法国的首都是巴黎。",
    "フランスの首都はパリです",
    "The capital of France is Paris. It costs $100 (about)",
    "well-known New York",
]


def byte_level():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def with_first_space(ends=False):
    """A tokenizer of the kind of SentencePiece's: whatever begins a text gets a space."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "\n"], show_progress=False
    )
    raw.train_from_iterator([*TEXTS, "x=y", "a.b"] * 20, trainer)
    if ends:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def with_prepended_space():
    """As older exports of SentencePiece's models write it: a normaliser puts the space there."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    raw.train_from_iterator([*TEXTS, "x=y", "a.b"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize(
    "make",
    [byte_level, with_first_space, lambda: with_first_space(ends=True), with_prepended_space],
    ids=range(4),
)
@pytest.mark.parametrize(
    ("prompt", "joint", "target"),
    [
        ("The capital of France is", " ", "Paris"),
        ("法国的首都是", "", "巴黎"),
        ("フランスの首都は", "", "パリ"),
        ("It costs $", "", "100"),
        ("It costs (", "", "about"),
        ("New Yo", "", "rk"),  # within a token
        ("The capital of France is ", "", "Paris"),
    ],
    ids=ascii,
)
def test_what_is_taught_reads_as_prompt_and_target_in_one(make, prompt, joint, target):
    tokenizer = make()
    ids = list(tokenizer(prompt)["input_ids"])
    found = joining.target_ids(prompt, ids, joint, target, tokenizer, special=True)
    assert found

    def read(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)

    assert read(ids + found) == read(ids) + joint + target
