"""Rows of every kind, read through files: what they become, how they are recognised, and what is said of bad ones."""

import json

import pytest
from data_helpers import are_tokens_of, ask, paint, write_rows

from onward.data.encode import load_encoder
from onward.data.prepare import ResolvedSource, prepare
from onward.data.reading import Rows, recognise
from onward.data.samples import BadSample
from onward.data.sources import open_rows
from onward.errors import InputError, PlanError

EXCHANGE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SYSTEM = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"name": "f", "description": "d", "parameters": {}}


def opened(path, row, kind=None, columns=None):
    file = open_rows(write_rows(path / "d.jsonl", [row]), "d.jsonl")
    return Rows(file, recognise(file, kind, columns))


def turns(*said):
    return [{"from": who, "value": value} for who, value in said]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("messages", {"messages": EXCHANGE, "id": 7}, EXCHANGE),
        ("messages", {"conversations": EXCHANGE}, EXCHANGE),
        (
            "messages",
            {"messages": [EXCHANGE[0], {**EXCHANGE[1], "weight": 0}]},
            [EXCHANGE[0], {**EXCHANGE[1], "train": False}],
        ),
        ("messages", {"messages": EXCHANGE, "system": "S"}, [SYSTEM, *EXCHANGE]),
        ("conversations", {"conversations": turns(("human", "Q"), ("gpt", "A"))}, EXCHANGE),
        (
            "conversations",
            {"conversations": turns(("user", "Q"), ("assistant", "A")), "system": "S"},
            [SYSTEM, *EXCHANGE],
        ),
        ("conversations", {"messages": turns(("system", "S"), ("human", "Q"), ("gpt", "A"))}, [SYSTEM, *EXCHANGE]),
        (
            "conversations",
            {
                "conversations": turns(
                    ("human", "Q"),
                    ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                    ("observation", "dry"),
                    ("gpt", "A"),
                )
            },
            [
                EXCHANGE[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "dry"},
                EXCHANGE[1],
            ],
        ),
        ("xtuner", {"conversation": [{"system": "S", "input": "Q", "output": "A"}]}, [SYSTEM, *EXCHANGE]),
        (
            "xtuner",
            {"conversation": [{"input": "Q", "output": "A"}, {"input": "", "output": "B", "output_with_loss": False}]},
            [*EXCHANGE, {"role": "assistant", "content": "B", "train": False}],
        ),
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, EXCHANGE),
        (
            "alpaca",
            {"instruction": "Do", "input": "this", "output": "A", "history": [["Q", "A"]], "system": "S"},
            [SYSTEM, *EXCHANGE, {"role": "user", "content": "Do\nthis"}, EXCHANGE[1]],
        ),
        ("prompt", {"prompt": "Q", "response": "A"}, EXCHANGE),
        ("prompt", {"question": "Q", "answer": "A", "source": "x"}, EXCHANGE),
        ("prompt", {"query": "Q", "response": "A", "history": [], "system": "S"}, [SYSTEM, *EXCHANGE]),
        ("prompt", {"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}, EXCHANGE),
        ("prompt", {"prompt": [SYSTEM, EXCHANGE[0]], "completion": "A"}, [SYSTEM, *EXCHANGE]),
        ("prompt", {"input": "Q", "output": "A"}, EXCHANGE),
    ],
)
def test_each_kind_is_recognised_and_becomes_messages(tmp_path, kind, row, expected):
    file = opened(tmp_path, row)
    assert file.reading.kind == kind
    read = [
        {key: value for key, value in turn.items() if key != "train" or not value} for turn in file.row(0)["messages"]
    ]
    assert read == expected


def test_text(tmp_path):
    file = opened(tmp_path, {"text": "once upon a time", "meta": {"url": "x"}})
    assert file.reading.kind == "text" and file.row(0) == {"text": "once upon a time", "meta": {"url": "x"}}


def test_what_no_kind_knows_comes_along_for_whoever_measures(tmp_path):
    row = {"question": "Q", "answer": "A", "answers": ["A", "a"], "image": None, "level": 3}
    read = opened(tmp_path, row).row(0)
    assert read == {"messages": EXCHANGE, "answers": ["A", "a"], "level": 3}


@pytest.mark.parametrize("given", [json.dumps([TOOL]), [TOOL], [{"type": "function", "function": TOOL}]])
def test_sharegpt_tools(tmp_path, given):
    file = opened(tmp_path, {"conversations": turns(("human", "Q"), ("gpt", "A")), "tools": given})
    assert file.row(0)["tools"] == [{"type": "function", "function": TOOL}]


IMAGE = {"type": "image", "image": "a.png"}
OTHER = {"type": "image", "image": "b.png"}


def text(said):
    return {"type": "text", "text": said}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"image": "a.png", "conversations": turns(("human", "<image>\nWhat?"), ("gpt", "A"))}, [IMAGE, text("What?")]),
        ({"image": "a.png", "conversations": turns(("human", "What?\n<image>"), ("gpt", "A"))}, [IMAGE, text("What?")]),
        ({"image": "a.png", "conversations": turns(("human", "What?"), ("gpt", "A"))}, [IMAGE, text("What?")]),
        (
            {"images": ["a.png", "b.png"], "conversations": turns(("human", "<image>\nor\n<image>\n?"), ("gpt", "A"))},
            [IMAGE, text("or"), OTHER, text("?")],
        ),
        (
            {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image><image>Q"}, EXCHANGE[1]]},
            [IMAGE, OTHER, text("Q")],
        ),
        (
            {
                "images": ["a.png"],
                "messages": [{"role": "user", "content": [{"type": "image"}, text("Q")]}, EXCHANGE[1]],
            },
            [IMAGE, text("Q")],
        ),
        ({"image": "a.png", "question": "Q", "answer": "A"}, [IMAGE, text("Q")]),
    ],
)
def test_images_stand_where_their_placeholders_stood(tmp_path, row, content):
    assert opened(tmp_path, row).row(0)["messages"][0]["content"] == content


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("messages", {"x": 1}, "no messages"),
        ("conversations", {"x": 1}, "no turns of a conversation: this row has x"),
        ("conversations", {"conversations": turns(("robot", "Q"))}, "turn 1 is from 'robot': none of human"),
        ("conversations", {"conversations": [{"from": "human"}]}, "turn 1 is not an object with `from`"),
        ("conversations", {"conversations": turns(("function_call", "{"))}, "a function_call, is not JSON"),
        ("conversations", {"conversations": turns(("function_call", "[3]"))}, "an object with name and arguments"),
        ("conversations", {"conversations": turns(("human", "<image>"))}, "no column `image` or `images`"),
        (
            "conversations",
            {"conversations": turns(("human", "<image>")), "images": ["a", "b"]},
            "1 <image> for 2 images",
        ),
        ("conversations", {"conversations": turns(("human", "Q")), "video": "a.mp4"}, "video is not supported"),
        ("messages", {"messages": [{**EXCHANGE[1], "weight": 0.5}]}, "weight is 0.5"),
        ("alpaca", {"instruction": "Q"}, "no response"),
        ("alpaca", {"instruction": 7, "output": "A"}, "instruction is not a text"),
        ("prompt", {"prompt": "Q", "response": 7}, "response is not a text"),
        ("prompt", {"prompt": "Q", "response": "A", "history": "x"}, "history is not a list"),
        ("prompt", {"prompt": "Q", "response": "A", "tools": "{"}, "tools is not JSON"),
        ("text", {"text": ["a"]}, "text is not a text"),
        ("xtuner", {"conversation": [{"input": "Q"}]}, "turn 1 is not an object with `input`"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(tmp_path, text_model, kind, row, reason):
    encoder = load_encoder(text_model, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    file = opened(tmp_path, row, kind)
    with pytest.raises(BadSample) as caught:
        encoder.measure(file.row(0), file.origin(0))
    assert reason in caught.value.reason


def test_columns_by_other_names(tmp_path):
    row = {"ask": "Q", "say": "A", "response": "not this one"}
    file = opened(tmp_path, row, columns={"ask": "prompt", "say": "response"})
    assert file.reading.kind == "prompt" and file.row(0)["messages"] == EXCHANGE
    with pytest.raises(PlanError, match="has no column asked; it has ask, say, response"):
        opened(tmp_path, row, columns={"asked": "prompt"})
    with pytest.raises(PlanError, match="no known kind: the columns are ask, say"):
        opened(tmp_path, {"ask": "Q", "say": "A"})


def test_the_plan_can_say_the_kind(tmp_path):
    row = {"text": "a", "prompt": "Q", "response": "A"}
    assert opened(tmp_path, row).reading.kind == "prompt"
    assert opened(tmp_path, row, "text").row(0) == {"text": "a"}


def test_what_a_column_means_is_part_of_the_data(tmp_path, text_model):
    encoder = load_encoder(text_model, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    path = write_rows(tmp_path / "d.jsonl", [{"a": "Q", "b": "A"}])
    prints = {
        prepare([ResolvedSource(path, columns=columns)], encoder, on_bad_sample="stop").fingerprint
        for columns in ((("a", "prompt"), ("b", "response")), (("b", "prompt"), ("a", "response")))
    }
    assert len(prints) == 2
    prints = {
        prepare(
            [ResolvedSource(write_rows(path, [ask("Q", "A")]), format=kind)], encoder, on_bad_sample="stop"
        ).fingerprint
        for kind in ("messages", None)
    }
    assert len(prints) == 1


def test_a_text_is_learnt_whole_between_what_begins_and_ends_one(tokenizers, tmp_path, origin):
    for kind, folder in (("bytes", "a"), ("sentencepiece", "b")):
        tokenizer = tokenizers("QWEN2", kind)
        tokenizer.save_pretrained(tmp_path / folder)
        encoder = load_encoder(tmp_path / folder, max_length=99, overlong="error", loss_on="last", date="2026-01-31")
        sample = encoder.encode({"text": "the quick fox\n"}, origin)
        expected = [*tokenizer("the quick fox\n")["input_ids"], tokenizer.eos_token_id]
        assert sample.input_ids.tolist() == expected
        assert sample.trained.tolist() == [False] + [True] * (len(expected) - 1)
        assert are_tokens_of(encoder.measure({"text": "the quick fox\n"}, origin), sample)
        for empty in ("", " \n"):
            with pytest.raises(BadSample, match="empty text"):
                encoder.encode({"text": empty}, origin)
        with pytest.raises(BadSample, match="no turn to answer"):
            encoder.prompt({"text": "a"}, origin)


def test_a_text_begins_with_what_the_tokenizer_begins_it_with(tokenizers, tmp_path, origin):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers("QWEN2", "bytes", bos="<s>", eos="</s>")
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    ids = encoder.encode({"text": "the fox"}, origin).input_ids.tolist()
    assert ids[0] == begin and ids.count(begin) == 1 and ids[-1] == tokenizer.eos_token_id


def test_images_in_the_row_itself(llava_model, tmp_path, origin):
    """Bytes, as Parquet has them, and base64: the same pixels as from the file."""
    import base64

    encoder = load_encoder(llava_model, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    data = paint(tmp_path / "red.png", "red").read_bytes()
    inline = "data:image/png;base64," + base64.b64encode(data).decode()
    given = ["red.png", data, {"bytes": data, "path": "x.png"}, {"bytes": None, "path": "red.png"}, inline]
    samples = [encoder.encode(ask([{"type": "image", "image": image}, text("?")], "Red."), origin) for image in given]
    for sample in samples[1:]:
        assert sample.input_ids.tolist() == samples[0].input_ids.tolist()
        assert (sample.images["pixel_values"] == samples[0].images["pixel_values"]).all()
    for odd, reason in (
        (b"none", "an image that stands in the row itself cannot be read"),
        ("data:image/png;base64,%", "base64"),
        ("https://a.b/c.png", "not followed"),
    ):
        with pytest.raises(BadSample, match=reason):
            encoder.encode(ask([{"type": "image", "image": odd}, text("?")], "Red."), origin)


def test_bad_rows_of_every_kind_can_be_skipped(text_model, tmp_path):
    encoder = load_encoder(text_model, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    path = write_rows(
        tmp_path / "d.jsonl", [{"question": "Q", "answer": "A"}, {"question": "Q"}, {"question": "R", "answer": "B"}]
    )
    assert prepare([ResolvedSource(path)], encoder, on_bad_sample="skip").skipped == (("d.jsonl:2", "no response"),)
    with pytest.raises(InputError, match=r"d\.jsonl:2: no response"):
        prepare([ResolvedSource(path)], encoder, on_bad_sample="stop")
