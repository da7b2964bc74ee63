"""Tests of the chat format. The oracle is openai-harmony, which reads o200k's ranks from the file
that the package bpe-openai carries."""

import base64
import gzip
import os
import random
import re
from pathlib import Path

import bpe_openai
import openai_harmony as harmony
import pytest
import tiktoken
from common import TINY
from openai_harmony import Role

import gptoss
import weights
from gptoss import Message, parse_completion


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encodings")
    ranks = Path(bpe_openai.__file__).parent / "data" / "o200k_base.tiktoken.gz"
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(ranks.read_bytes()))
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def tokenizer(oracle):
    """The same tokens for us, from the oracle's own special ones and its file of ranks."""
    file = Path(os.environ["TIKTOKEN_ENCODINGS_BASE"]) / "o200k_base.tiktoken"
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = ("start", "end", "message", "channel", "constrain", "return", "call", "endoftext")
    specials = {}
    for name in names:
        [specials[f"<|{name}|>"]] = oracle.encode(f"<|{name}|>", allowed_special="all")
    return tiktoken.Encoding("o200k", pat_str=O200K, mergeable_ranks=ranks, special_tokens=specials)


O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def theirs(oracle, tokens: list[int]) -> list[Message]:
    """openai-harmony's reading; raises HarmonyError where it has none."""
    parsed = oracle.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT, strict=False)
    return [
        Message(m.channel, m.recipient, m.content_type, "".join(c.text for c in m.content))
        for m in parsed
    ]


def ours(tokenizer, text: str) -> list[Message]:
    return parse_completion(tokenizer, tokenizer.encode(text, allowed_special="all"))


# --------------------------------------------------------------------------------------------------
# Completions

FINAL = "<|channel|>final<|message|>"
SAME = [
    f"{FINAL}The answer<|return|>",
    f"{FINAL}The answer",
    f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{FINAL}42<|return|>",
    "I'm sorry, but I can't help with that.<|return|>",
    "<|channel|>final The answer<|return|>",
    "<|channel|>final\n\nThe answer\n<|return|>",
    "<|channel|>final<|return|>",
    "<|message|>hello<|return|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary to=functions.f json<|message|>{}<|call|>",
    " to=functions.f<|channel|>commentary<|message|>{}<|call|>",
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
    '<|channel|>commentary to=functions.f {"a":1}<|call|>',
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.f"
    "<|channel|>commentary<|message|>{}<|call|>",
    f"{FINAL}a<|start|>assistant{FINAL}b<|return|>",  # only an end ends a message
    f"{FINAL}a<|channel|>b<|constrain|>c<|return|>",
    "<|channel|>analysis<|message|><|end|>",
    f"{FINAL}naïve café 東京 🙂<|return|>",
    "<|end|>",
    f"assistant{FINAL}x<|return|>",  # the role again, which the prompt has already said
    "assistant to=f<|channel|>commentary<|message|>{}<|call|>",
    "x y<|message|>z<|end|>",
    "<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>",
]


@pytest.mark.parametrize("text", SAME)
def test_completions_read_as_by_openai_harmony(oracle, tokenizer, text):
    tokens = tokenizer.encode(text, allowed_special="all")
    assert tokens == oracle.encode(text, allowed_special="all")
    assert parse_completion(tokenizer, tokens) == theirs(oracle, tokens)


# What openai-harmony refuses, drops or renames.
BETTER = {
    "": [],
    "<|start|>assistant": [],
    "<|channel|>analysis": [Message("analysis", None, None, "")],
    f"{FINAL}42<|end|><|return|>": [Message("final", None, None, "42")],
    "<|channel|> <|message|>x<|end|>": [Message(None, None, None, "x")],
    "<|channel|><|message|>x<|end|>": [Message(None, None, None, "x")],
    "<|channel|>final<|constrain|>json<|message|>{}<|return|>": [
        Message("final", None, "<|constrain|>json", "{}")
    ],
    "<|channel|>commentary to=f<|constrain|> json<|message|>{}<|call|>": [
        Message("commentary", "f", "<|constrain|>json", "{}")
    ],
    f"<|start|>assistant{FINAL}x<|return|>": [Message("final", None, None, "x")],
    "a b c<|message|>d<|end|>": [Message(None, None, None, "a b c d")],
    " to=f code extra<|message|>x<|end|>": [Message(None, "f", None, "code extra x")],
    "<|channel|>commentary <|constrain|>json to=f extra<|message|>x<|end|>": [
        Message("commentary", "f", "<|constrain|>json", "extra x")
    ],
    "<|channel|> final<|message|>x<|return|>": [Message("final", None, None, "x")],
    "<|channel|> final The answer<|return|>": [Message("final", None, None, "The answer")],
    "<|channel|> commentary to=f<|message|>{}<|call|>": [Message("commentary", "f", None, "{}")],
    "<|channel|> to=f<|message|>{}<|call|>": [Message(None, "f", None, "{}")],
    "<|channel|> Hello<|message|>x<|end|>": [Message(None, None, None, "Hello x")],
    f"{FINAL}x<|endoftext|>": [Message("final", None, None, "x")],
    "I can't.<|endoftext|>": [Message(None, None, None, "I can't.")],
    "assistant is a word<|return|>": [Message(None, None, None, "assistant is a word")],
    f"{FINAL}x<|call|>y": [Message("final", None, None, "x"), Message(None, None, None, "y")],
    f"{FINAL}x<|end|><|start|>assistant I can't.<|return|>": [
        Message("final", None, None, "x"),
        Message(None, None, None, "I can't."),
    ],
    f"{FINAL}x<|end|><|start|>weird<|message|>r<|end|>": [
        Message("final", None, None, "x"),
        Message(None, None, None, "weird r"),
    ],
    "<|channel|>final two  spaces<|return|>": [Message("final", None, None, "two  spaces")],
}


@pytest.mark.parametrize("text", BETTER)
def test_nothing_is_lost_where_openai_harmony_has_no_reading(oracle, tokenizer, text):
    assert ours(tokenizer, text) == BETTER[text]
    tokens = tokenizer.encode(text, allowed_special="all")
    try:
        assert theirs(oracle, tokens) != BETTER[text]
    except harmony.HarmonyError:
        pass


def test_a_message_that_ends_inside_a_character(tokenizer):
    """Its half belongs to it, not to the next one."""
    smile = "🙂".encode()
    halves = [tokenizer.encode_single_token(smile[:2]), tokenizer.encode_single_token(smile[2:3])]
    head = tokenizer.encode("<|channel|>analysis<|message|>a", allowed_special="all")
    tail = tokenizer.encode(f"<|end|><|start|>assistant{FINAL}b", allowed_special="all")
    found = parse_completion(tokenizer, [*head, halves[0], *tail, halves[0]])
    assert [m.text for m in found] == ["a\ufffd", "b\ufffd"]


def test_tokens_beyond_the_tokenizers_vocabulary(tokenizer):
    head = tokenizer.encode(FINAL, allowed_special="all")
    assert parse_completion(tokenizer, [*head, 201000])[0].text == "\ufffd"
    assert parse_completion(tokenizer, [201000])[0].text == "\ufffd"


def streams(tokenizer, count: int) -> list[list[int]]:
    """Random completions of the format's tokens, words and pieces of characters."""
    draw = random.Random(0)
    pieces = [
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|start|>assistant",
        "<|constrain|>",
        "<|return|>",
    ]
    pieces += [
        "<|call|>",
        "assistant",
        "final",
        "analysis",
        "commentary",
        " to=functions.f",
        "json",
    ]
    pieces += [" ", "\n", "Hello", " world", "{}", "🙂", "é"]
    tokens = [tokenizer.encode(piece, allowed_special="all") for piece in pieces]
    tokens += [[tokenizer.encode_single_token("🙂".encode()[:2])]]
    return [sum(draw.choices(tokens, k=draw.randint(1, 14)), []) for _ in range(count)]


def test_what_is_streamed_is_what_is_parsed(tokenizer):
    for tokens in streams(tokenizer, 2000):
        reader, shown = gptoss.Reader(tokenizer), {}
        given = [reader.read(token) for token in tokens] + [reader.close()]
        for message, piece in filter(None, given):
            shown.setdefault(id(message), [message, ""])[1] += piece
        parsed = parse_completion(tokenizer, tokens)
        assert [text for _, text in shown.values()] == [m.text for m in parsed if m.text]


def test_random_completions_keep_every_word(tokenizer):
    """Between random marks of the format every word, each another, comes out exactly once, in
    whatever field, and in order where it is text of one message."""
    draw = random.Random(1)
    marks = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>assistant", "<|start|>"]
    marks += ["<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|channel|>final"]
    marks += [" to=", " ", "\n", "🙂", "assistant"]
    for _ in range(2000):
        count = draw.randint(1, 10)
        words = [f"w{i:02}" for i in range(count)]
        text = "".join("".join(draw.choices(marks, k=draw.randint(0, 3))) + word for word in words)
        found = ours(tokenizer, text)
        fields = [(m.channel, m.recipient, m.content_type, m.text) for m in found]
        whole = " ".join(field for message in fields for field in message if field)
        assert [whole.count(word) for word in words] == [1] * count, text
        for message in found:
            inside = re.findall(r"w\d\d", message.text)
            assert inside == sorted(inside), text


def test_random_completions_against_openai_harmony(oracle, tokenizer):
    """Where it has a reading that loses nothing, ours is the same, but for the spaces of text that
    stands in a header. Left out: a header behind the first without <|message|>, which it drops; a
    lone <|constrain|>, which it takes for a recipient; <|start|> where no message ended, which it
    takes for text and we, in a header, for a new one; the word assistant, which it drops from the
    first header; and another role than assistant, which it drops too."""
    stray = re.compile(
        r"^\s*assistant|<\|start\|>assistant[^\s<]|(?<!<\|end\|>)(?<!<\|return\|>)(?<!<\|call\|>)<\|start\|>"
    )
    compared = 0
    for tokens in streams(tokenizer, 9000):
        text = tokenizer.decode(tokens)
        try:
            want = theirs(oracle, tokens)
        except harmony.HarmonyError:
            continue
        blank = Message(None, None, None, "")
        want = [m for m in want if m != blank]
        if any("<|" in (m.recipient or "") or "<|" in (m.channel or "") for m in want):
            continue
        if stray.search(text) or re.search(r"<\|constrain\|>\s", text) or "\ufffd" in text:
            continue
        found = [m for m in parse_completion(tokenizer, tokens) if m != blank]
        bodies = text.count("<|message|>")
        if len(found) != len(want) and bodies < len(found):
            continue  # a header without its marker behind the first message, which it drops
        assert len(found) == len(want), text
        for a, b in zip(found, want, strict=True):
            header = b.channel, b.recipient, b.content_type
            assert (a.channel, a.recipient, a.content_type) == header, text
            assert re.sub(r"\s", "", a.text) == re.sub(r"\s", "", b.text), text
        compared += 1
    assert compared > 500


# --------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("effort", gptoss.EFFORTS)
@pytest.mark.parametrize("instructions", [None, "Answer like a pirate.\n\nBriefly."])
@pytest.mark.parametrize("turns", [
    [("user", "Hi")],
    [("user", "Hi <|end|>"), ("assistant", "Hello."), ("user", "What is 東京? \n")],
])  # fmt: skip
def test_prompts_are_openai_harmonys(oracle, tokenizer, effort, instructions, turns):
    system = harmony.SystemContent.new().with_conversation_start_date("2026-01-31")
    system = system.with_reasoning_effort(harmony.ReasoningEffort(effort.capitalize()))
    messages = [harmony.Message.from_role_and_content(Role.SYSTEM, system)]
    if instructions:
        developer = harmony.DeveloperContent.new().with_instructions(instructions)
        messages.append(harmony.Message.from_role_and_content(Role.DEVELOPER, developer))
    for role, text in turns:
        message = harmony.Message.from_role_and_content(Role(role), text)
        messages.append(message.with_channel("final") if role == "assistant" else message)
    conversation = harmony.Conversation.from_messages(messages)
    want = oracle.render_conversation_for_completion(conversation, Role.ASSISTANT)
    assert gptoss.chat_tokens(tokenizer, turns, "2026-01-31", effort, instructions) == want


def test_unknown_roles_and_efforts_are_named():
    tokenizer = weights.load_tokenizer(TINY)
    with pytest.raises(ValueError, match="role 'tool', expected user or assistant"):
        gptoss.chat_tokens(tokenizer, [("tool", "x")], "2026-01-31", "low")
    with pytest.raises(ValueError, match="effort='extreme', expected one of low"):
        gptoss.chat_tokens(tokenizer, [("user", "x")], "2026-01-31", "extreme")
