"""Talking to a model: in a pipe and turn by turn, against transformers' own template and generation."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from onward.cli.chat import talk
from onward.errors import InputError
from onward.runs.chat import open_chat


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.text_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.colour_data(folder / "rows.jsonl", rows=2)
    return tiny.llava(folder / "model"), [folder / f"images/rows-{i}.png" for i in (0, 1)]


def opened(model, **options):
    return open_chat(str(model), **{"base": None, "temperature": 0.0, "seed": 0, "max_new_tokens": 8, **options})


def by_transformers(directory, messages):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_turns_follow_one_another_as_the_template_has_them(text):
    chat, pieces = opened(text), []
    chat.system("be brief")
    messages = [{"role": "system", "content": "be brief"}]
    for said in ("what colour is the picture ?", "say it again please"):
        messages.append({"role": "user", "content": said})
        answer = chat.say(said, pieces.append)
        assert answer == by_transformers(text, messages) and answer
        messages.append({"role": "assistant", "content": answer})
    assert "".join(pieces).count(answer) >= 1, "it was streamed"
    assert chat.messages == messages
    chat.reset()
    assert chat.messages == messages[:1]


def test_a_temperature_draws_by_the_seed(text):
    def said(**options):
        return opened(text, temperature=3.0, **options).say("one two three", lambda piece: None)

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(4)}) > 1
    greedy = opened(text).say("one two three", lambda piece: None)
    assert greedy == opened(text, seed=7).say("one two three", lambda piece: None)


def test_images_go_with_the_next_turn(llava):
    model, (first, second) = llava
    chat = opened(model)
    chat.show(first)
    chat.show(second)
    chat.say("what colours ?", lambda piece: None)
    kinds = [part["type"] for part in chat.messages[0]["content"]]
    assert kinds == ["image", "image", "text"] and chat.images == []
    chat.say("and now ?", lambda piece: None)  # the earlier turn's images are still seen
    with pytest.raises(InputError, match="no such image"):
        chat.show(first / "nothing")


def test_a_terminals_lines(text, capsys, tmp_path):
    lines = iter(["", "/system be brief", "one two", f"/image {tmp_path}", "/what", "/reset", "/quit", "never read"])
    chat = opened(text)
    talk(chat, lambda prompt: next(lines))
    out, err = capsys.readouterr()
    assert "/image FILE" in out and "no such image" in err
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    assert next(lines) == "never read"

    def end(prompt):
        raise EOFError

    talk(chat, end)


def test_a_model_that_takes_no_images_says_so(text, llava):
    _, (image, _) = llava
    with pytest.raises(InputError, match="this model takes no images"):
        opened(text).show(image)


@pytest.mark.parametrize("as_json", [False, True])
def test_one_answer_in_a_pipe(text, as_json):
    words = [sys.executable, "-m", "onward", "chat", str(text), "--max-new-tokens", "8"]
    prompt = "what colour is the picture ?"
    words += ["--prompt", prompt, "--json"] if as_json else []
    done = subprocess.run(
        words, input=prompt, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answer"] if as_json else done.stdout.strip()
    assert answer == by_transformers(text, [{"role": "user", "content": prompt}])
