import datetime

import data_templates
import pytest
from data_helpers import build_tokenizer

from onward.data.chat import render
from onward.data.encode import load_encoder
from onward.data.rows import read_conversation
from onward.data.samples import BadSample
from onward.data.template import TEMPLATES, load_template, named_templates
from onward.errors import InputError

DATE = "2026-01-31"


def m(role, content, **keys):
    return {"role": role, "content": content, **keys}


def learnt(tokenizer, messages, origin, loss_on="assistant", **row):
    """The trained pieces of text; also asserts that the text is the one that transformers renders."""
    template = load_template(tokenizer, None, DATE, "model")
    rendered = render(read_conversation({"messages": messages, **row}, origin), template, loss_on, origin)
    return [rendered.text[begin:end] for begin, end in rendered.trained]


TALK = [
    m("user", "One?"),
    m("assistant", "The first."),
    m("user", "Two?"),
    m("assistant", "The second."),
]
# Template → what a server stops at, and what the model must say after each prompt that the server makes.
EXPECTED = {
    "QWEN2": ["The first.<|im_end|>", "The second.<|im_end|>"],
    "QWEN3": ["The first.<|im_end|>", "<think>\n\n</think>\n\nThe second.<|im_end|>"],
    "LLAMA3": ["The first.<|eot_id|>", "The second.<|eot_id|>"],
    "LLAMA2": [" The first. </s>", " The second. </s>"],
    "MISTRAL": ["The first.</s>", "The second.</s>"],
    "VICUNA": [" The first.</s>", " The second.</s>"],
    "PHI3": ["The first.<|end|>", "The second.<|end|>"],
    "QWQ": ["The first.<|im_end|>", "The second.<|im_end|>"],
}


@pytest.fixture
def tokenizer(request, tokenizers):
    name = request.param
    return tokenizers(name, eos="</s>" if name in ("LLAMA2", "MISTRAL", "VICUNA") else "<|im_end|>")


@pytest.mark.parametrize(("tokenizer", "expected"), EXPECTED.items(), indirect=["tokenizer"])
def test_trained_is_what_follows_each_prompt(tokenizer, expected, origin):
    assert learnt(tokenizer, TALK, origin) == expected
    assert learnt(tokenizer, TALK, origin, "last") == expected[1:]
    # What is learnt begins where the prompt of transformers ends, the prompt that a server would make.
    prompt = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    if tokenizer.chat_template != data_templates.QWQ:
        assert whole.startswith(prompt + expected[1])


@pytest.mark.parametrize("tokenizer", EXPECTED, indirect=True)
def test_rendering_is_that_of_transformers(tokenizer, origin):
    template = load_template(tokenizer, None, datetime.date.today().isoformat(), "model")
    rendered = render(read_conversation({"messages": TALK}, origin), template, "all", origin)
    assert rendered.text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert rendered.trained == [(0, len(rendered.text))]


def test_date_is_frozen(tokenizers, origin):
    template = load_template(tokenizers("LLAMA3"), None, "2001-09-08", "model")
    assert template.prints_date
    text = render(read_conversation({"messages": TALK}, origin), template, "assistant", origin).text
    assert "Today Date: 08 Sep 2001\n" in text
    assert not load_template(tokenizers("QWEN2"), None, DATE, "model").prints_date


def test_date_string_without_a_default_is_given(origin):
    tokenizer = build_tokenizer("{{ date_string }}\n" + data_templates.QWEN2)
    template = load_template(tokenizer, None, DATE, "model")
    text = render(read_conversation({"messages": TALK}, origin), template, "assistant", origin).text
    assert text.startswith("31 Jan 2026\n<|im_start|>")


def test_clock_with_unknown_format_is_refused(origin):
    tokenizer = build_tokenizer("{% set f = '%Y' %}{{ strftime_now(f) }}\n" + data_templates.QWEN2)
    with pytest.raises(InputError, match="does not render"):
        load_template(tokenizer, None, DATE, "model")


def test_reasoning_and_tool_calls_are_learnt(tokenizers, origin):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        m("user", "1+1?"),
        {"role": "assistant", "content": None, "reasoning_content": "Sums are for tools.", "tool_calls": [call]},
        m("tool", "2"),
        m("assistant", "<think>\nIt says 2.\n</think>\n\nTwo."),
        m("user", "Sure?"),
        m("assistant", "Yes.", reasoning_content="I am."),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert learnt(tokenizers("QWEN3"), messages[:4], origin, tools=tools) == [
        "<think>\nSums are for tools.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\nIt says 2.\n</think>\n\nTwo.<|im_end|>",
    ]
    assert learnt(tokenizers("QWEN3"), messages, origin) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "Two.<|im_end|>",
        "<think>\nI am.\n</think>\n\nYes.<|im_end|>",
    ]


def test_opening_of_the_generation_prompt_is_not_learnt(tokenizers, origin):
    thought = [m("user", "One?"), m("assistant", "<think>\nHm.\n</think>\n\nYes.")]
    assert learnt(tokenizers("QWQ"), thought, origin) == ["Hm.\n</think>\n\nYes.<|im_end|>"]


@pytest.mark.parametrize("name", ["QWEN2", "QWEN3", "LLAMA3", "VICUNA", "PHI3"])
def test_consecutive_assistant_turns(name, tokenizers, origin):
    messages = [m("user", "Go."), m("assistant", "One."), m("assistant", "Two."), m("assistant", "Two.")]
    pieces = learnt(tokenizers(name), messages, origin)
    assert [piece.split("<")[0].strip() or piece.split("\n")[-1].split("<")[0] for piece in pieces] == [
        "One.",
        "Two.",
        "Two.",
    ]


def test_contents_that_look_like_the_template(tokenizers, origin):
    messages = [
        m("system", "<|im_start|>assistant\nnot me<|im_end|>"),
        m("user", "<|im_start|>assistant\nnor me<|im_end|>\n"),
        m("assistant", "say <|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nok"),
        m("user", "what"),
        m("assistant", ""),
    ]
    assert learnt(tokenizers("QWEN2"), messages, origin) == [messages[2]["content"] + "<|im_end|>", "<|im_end|>"]


def test_ambiguous_rendering_is_refused(tokenizers, origin):
    echo = "a<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nb"
    messages = [m("user", "Go."), m("assistant", echo), m("user", "what?"), m("assistant", "c")]
    with pytest.raises(BadSample, match="not found again"):
        learnt(tokenizers("QWEN2"), messages, origin)


@pytest.mark.parametrize("place", ["{count}%s", "%s{count}"])
def test_template_that_depends_on_the_answer_is_refused(origin, place):
    count = "{{ messages[-1]['content'] | length }}"
    with pytest.raises(BadSample, match="not found again"):
        learnt(
            build_tokenizer(place.replace("{count}", count) % data_templates.QWEN2),
            [*TALK, m("user", "a"), m("assistant", "b")],
            origin,
        )


def test_train_false(tokenizers, origin):
    messages = [TALK[0], {**TALK[1], "train": False}, *TALK[2:]]
    tokenizer = tokenizers("QWEN2")
    assert learnt(tokenizer, messages, origin) == ["The second.<|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learnt(tokenizer, messages, origin, "all") == whole.split("The first.<|im_end|>")
    with pytest.raises(BadSample, match="each says train: false"):
        learnt(tokenizer, [TALK[0], {**TALK[1], "train": False}], origin)


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("QWEN2", [m("user", "One?")], "no assistant turn to learn"),
        ("MISTRAL", [m("system", "Be."), *TALK], "must alternate"),
        ("LLAMA2", [m("user", "a"), m("assistant", "b"), m("assistant", "c")], "must alternate"),
    ],
)
def test_refused_conversations(name, messages, reason, tokenizers, origin):
    with pytest.raises(BadSample, match=reason) as caught:
        learnt(tokenizers(name), messages, origin)
    assert caught.value.where == origin.where


def test_turn_without_its_end_is_refused(origin):
    only_last = data_templates.VICUNA.replace("'</s>'", "('</s>' if loop.last else ' ')")
    with pytest.raises(BadSample, match=r"message 2: .* does not end this turn with '</s>'"):
        learnt(build_tokenizer(only_last), TALK, origin)


def test_template_that_drops_a_turn_is_refused(origin):
    short = data_templates.QWEN2.replace("in messages %}", "in messages[-2:] %}")
    with pytest.raises(BadSample, match="renders 1 of 2 assistant turns"):
        learnt(build_tokenizer(short), TALK, origin)


def test_end_token(tokenizers):
    assert load_template(tokenizers("QWEN2"), None, DATE, "model").has_end_token
    endless = build_tokenizer(data_templates.VICUNA.replace("</s>", "\\n"))
    assert not load_template(endless, None, DATE, "model").has_end_token


def test_model_without_a_template_takes_texts_alone(tmp_path, tokenizers, origin):
    tokenizers(None).save_pretrained(tmp_path / "base")
    encoder = load_encoder(tmp_path / "base", max_length=99, overlong="error", loss_on="assistant", date=DATE)
    assert len(encoder.encode({"text": "the fox"}, origin).input_ids) > 2
    with pytest.raises(InputError, match=r"no chat template(.|\n)*alpaca \| chatml \| internlm2") as caught:
        encoder.encode({"messages": TALK}, origin)
    assert caught.value.where.endswith("base")


@pytest.mark.parametrize("name", named_templates())
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_named_templates_show_what_is_learnt(name, kind, tokenizers, origin):
    """Each turn of the assistant with its end, and nothing else, from two turns of a conversation."""
    text = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = tokenizers(None, kind, eos="</s>")
    template = load_template(tokenizer, None, DATE, "model", text)
    assert template.has_end_token, name
    system = [] if name == "mistral" else [{"role": "system", "content": "Be brief."}]
    talk = [*system, *(m for m in TALK if m["role"] in ("user", "assistant"))]
    rendered = render(read_conversation({"messages": talk}, origin), template, "assistant", origin)
    spans = [rendered.text[begin:end] for begin, end in rendered.trained]
    said = [m["content"] for m in talk if m["role"] == "assistant"]
    assert [span.strip().removesuffix(template.end_of_turn).strip() for span in spans] == said
    assert all(span.endswith(template.end_of_turn) for span in spans)
    prompt = template.render(read_conversation({"messages": talk[:-1]}, origin).messages, generation_prompt=True)
    assert rendered.text.startswith(prompt), "what is learnt follows what a server asks with"


def test_qwen_template_renders_tools_as_qwen_does(tokenizers, origin):
    text = (TEMPLATES / "qwen2.5.jinja").read_text()
    template = load_template(tokenizers(None, "bytes"), None, DATE, "model", text)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    talk = [
        {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    row = {"messages": talk, "tools": [{"type": "function", "function": {"name": "weather"}}]}
    rendered = render(read_conversation(row, origin), template, "assistant", origin)
    spans = [rendered.text[begin:end] for begin, end in rendered.trained]
    assert spans == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "No.<|im_end|>",
    ]
    assert '<tools>\n{"type": "function", "function": {"name": "weather"}}\n</tools>' in rendered.text
    assert "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>" in rendered.text
