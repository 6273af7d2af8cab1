"""What a model is measured at, against transformers' own loss and a generation loop written by hand."""

import json
import math

import pytest
import tiny
import torch

from onward.data.batches import collate
from onward.data.encode import load_encoder
from onward.data.order import Draw
from onward.data.prepare import ResolvedSource, prepare
from onward.errors import InputError, PlanError, TrainingError
from onward.evaluate.generate import generate_answers
from onward.evaluate.measure import better, measure, predict
from onward.model.load import load_model
from onward.plan.schema import ANSWER_METRICS, TARGET_METRICS
from onward.runs.evaluate import evaluate

NEW_TOKENS = 8
METRICS = (*TARGET_METRICS, *ANSWER_METRICS)


def opened(directory, *files):
    encoder = load_encoder(directory, max_length=512, overlong="error", loss_on="assistant", date="2025-01-01")
    data = prepare([ResolvedSource(file) for file in files], encoder, on_bad_sample="stop")
    return encoder, data


def rows_of(data):
    draws = [Draw(0, row, 0) for row in range(data.rows)]
    return [(data.row(draw), data.origin(draw)) for draw in draws]


def learn(directory, file, steps, learning_rate):
    """Train a directory's model on a file until it knows it by heart, and save it there again."""
    encoder, data = opened(directory, file)
    model = load_model(directory, precision="fp32", device="cpu").model.requires_grad_(True)
    samples = [encoder.encode(row, origin) for row, origin in rows_of(data)]
    batch = collate(samples, encoder.pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text model that knows six rows by heart, and the rows."""
    folder = tmp_path_factory.mktemp("text")
    directory, file = tiny.text_model(folder / "model"), tiny.text_data(folder / "rows.jsonl", rows=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONWARD_CACHE", str(folder / "cache"))
        learn(directory, file, steps=60, learning_rate=1e-2)
    return directory, file


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A LLaVA that has learnt four colours, and pictures of them."""
    folder = tmp_path_factory.mktemp("colours")
    directory, file = tiny.llava(folder / "model"), tiny.colour_data(folder / "rows.jsonl", rows=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONWARD_CACHE", str(folder / "cache"))
        learn(directory, file, steps=80, learning_rate=3e-3)
    return directory, file


def spans_by_hand(tokenizer, messages):
    """Ids and labels of a ChatML conversation, put together from its pieces."""
    ids, labels = [], []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n", add_special_tokens=False)["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += head + body + tail
        is_learnt = message["role"] == "assistant"
        labels += [-100] * len(head) + (body if is_learnt else [-100] * len(body)) + [-100] * len(tail)
    return torch.tensor([ids]), torch.tensor([labels])


def test_loss_and_accuracy_are_those_of_transformers_one_sample_at_a_time(text):
    directory, file = text
    encoder, data = opened(directory, file)
    model = load_model(directory, precision="fp32", device="cpu").model.eval()
    loss, right, targets = 0.0, 0, 0
    with torch.no_grad():
        for line in file.read_text().splitlines():
            ids, labels = spans_by_hand(encoder.tokenizer, json.loads(line)["messages"])
            output = model(input_ids=ids, labels=labels)
            learnt = labels[:, 1:] != -100
            loss += output.loss.item() * int(learnt.sum())
            right += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:])[learnt].sum())
            targets += int(learnt.sum())
    for batch_size in (1, 4, 64):  # padding and the size of batches change nothing
        found = measure(model, encoder, data, TARGET_METRICS, batch_size=batch_size, max_new_tokens=1)
        assert found["loss"] == pytest.approx(loss / targets, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(loss / targets), rel=1e-5)
        assert found["token_accuracy"] == right / targets


def test_a_model_in_training_is_measured_without_dropout_and_left_as_it_was(text):
    directory, file = text
    encoder, data = opened(directory, file)
    model = load_model(directory, precision="fp32", device="cpu").model
    at_rest = measure(model.eval(), encoder, data, METRICS, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert not model.training
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    in_training = measure(model.train(), encoder, data, METRICS, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert model.training
    assert in_training == at_rest
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def answers_by_hand(model, tokenizer, rows):
    """Greedy answers: one row at a time, no padding, no cache, no `generate`."""
    said = []
    with torch.no_grad():
        for row in rows:
            ids = tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            begin = ids.shape[1]
            while ids.shape[1] < begin + NEW_TOKENS:
                token = model(input_ids=ids).logits[0, -1].argmax()
                if token == tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
            said.append(tokenizer.decode(ids[0, begin:], skip_special_tokens=True).strip())
    return said


def test_answers_are_greedy_whatever_the_models_own_generation_config_says(text):
    directory, file = text
    encoder, data = opened(directory, file)
    model = load_model(directory, precision="fp32", device="cpu").model.eval()
    expected = answers_by_hand(model, encoder.tokenizer, [row for row, _ in rows_of(data)])
    assert (
        len({len(answer) for answer in expected}) > 1
    )  # answers of several lengths: some end before others in a batch
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 5.0, 3, 7.0
    config.eos_token_id = None  # then the template's end of turn still ends an answer
    for batch_size in (1, 4, 64):
        answers = generate_answers(model, encoder, rows_of(data), NEW_TOKENS, batch_size=batch_size)
        assert [answer.said for answer in answers] == expected
    assert [answer.accepted for answer in answers] == [(row["messages"][-1]["content"],) for row, _ in rows_of(data)]
    sorted_by_length = predict(model, encoder, data, batch_size=2, max_new_tokens=NEW_TOKENS)
    assert [(answer.sample_id, answer.said) for answer in sorted_by_length] == [
        (origin.sample_id, said) for (_, origin), said in zip(rows_of(data), expected, strict=True)
    ]


def test_exact_match_counts_the_rows_answered_to_the_letter(colours, tmp_path):
    directory, file = colours
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "images").symlink_to(file.parent / "images")
    for row in rows[:4]:
        row["messages"][-1]["content"] += " it is"  # the model says the colour alone
    rows[4]["messages"][-1]["content"] = f"  {rows[4]['messages'][-1]['content']}\n"  # space around does not count
    falsified = tmp_path / "falsified.jsonl"
    falsified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder, data = opened(directory, falsified)
    model = load_model(directory, precision="fp32", device="cpu").model
    found = measure(model, encoder, data, ["exact_match"], batch_size=5, max_new_tokens=NEW_TOKENS)
    assert found == {"exact_match": 8 / 12}
    first = measure(model, encoder, data, ["exact_match"], batch_size=5, max_new_tokens=NEW_TOKENS, limit=5)
    assert first == {"exact_match": 1 / 5}


def test_the_command_measures_files_together_as_they_are_measured_in_a_run(colours):
    directory, file = colours
    encoder, data = opened(directory, file, file)
    model = load_model(directory, precision="fp32", device="cpu").model
    in_a_run = measure(model, encoder, data, METRICS, batch_size=8, max_new_tokens=NEW_TOKENS)
    report = evaluate(str(directory), [file, file], METRICS, max_new_tokens=NEW_TOKENS)
    assert (report.metrics, report.samples) == (in_a_run, 24)
    assert list(in_a_run) == list(METRICS)
    assert in_a_run["exact_match"] == 1.0


def test_what_cannot_be_measured_is_said_before_the_model_is_loaded(tmp_path):
    file = tiny.text_data(tmp_path / "rows.jsonl", rows=2)
    with pytest.raises(PlanError, match="no metric is called bleu"):
        evaluate(str(tmp_path / "no-model"), [file], ["bleu"])
    with pytest.raises(PlanError, match=r"missing\.jsonl: no such data file"):
        evaluate(str(tmp_path / "no-model"), [file, tmp_path / "missing.jsonl"], ["loss"])
    with pytest.raises(PlanError, match="no such model directory"):
        evaluate(str(tmp_path / "no-model"), [file], ["loss"])
    with pytest.raises(PlanError, match=r"nowhere:f is not found"):
        evaluate(str(tmp_path / "no-model"), [file], ["nowhere:f"])
    with pytest.raises(PlanError, match="none of the metrics needs answers"):
        evaluate(str(tmp_path / "no-model"), [file], ["loss"], out=tmp_path / "out.jsonl")


def test_a_row_without_an_answer_is_named(text):
    directory, file = text
    encoder, data = opened(directory, file)
    row, origin = rows_of(data)[2]
    model = load_model(directory, precision="fp32", device="cpu").model
    with pytest.raises(InputError, match=r"rows\.jsonl:3: no assistant turn"):
        generate_answers(model, encoder, [({"messages": row["messages"][:1]}, origin)], NEW_TOKENS)


def test_a_lower_loss_and_a_higher_share_are_better():
    assert better("loss", 0.1, 0.2) and not better("loss", 0.2, 0.1)
    assert better("perplexity", 1.1, 1.2) and better("mine:f", 1.2, 1.1)
    assert better("exact_match", 0.2, 0.1) and not better("exact_match", 0.1, 0.2)
    assert not better("loss", 0.1, 0.1) and not better("exact_match", 0.1, 0.1)


def test_several_answers_may_be_right_and_each_prediction_is_written(colours, tmp_path):
    directory, file = colours
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    (tmp_path / "images").symlink_to(file.parent / "images")
    said = [row["messages"][-1]["content"] for row in rows]  # the model knows them all
    for row, word in zip(rows[:3], said, strict=False):
        row["answers"] = ["none of these", word]
    rows[3]["answers"] = ["none of these", "nor this"]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(str(directory), [data], ["exact_match"], max_new_tokens=NEW_TOKENS, out=out)
    assert report.metrics == {"exact_match": 11 / 12}
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prediction"] for row in written] == said
    assert written[3] == {
        "id": "rows.jsonl:4", "prediction": said[3], "accepted": ["none of these", "nor this"], "exact_match": 0.0
    }  # fmt: skip
    assert [row["exact_match"] for row in written] == [1.0, 1.0, 1.0, 0.0] + [1.0] * 8
    rows[5]["answers"] = {"text": ["red"]}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows\.jsonl:6: answers is not a list of texts"):
        evaluate(str(directory), [data], ["exact_match"], max_new_tokens=NEW_TOKENS)


def test_a_function_of_the_users_measures_too(text, tmp_path, monkeypatch):
    directory, file = text
    (tmp_path / "mine_metric.py").write_text(
        "def length(prediction, reference, row):\n    return len(prediction) / len(reference)\n"
        "def turns(prediction, reference, row):\n    return len(row['messages'])\n"
        "def one(prediction):\n    return 1.0\n"
        "def broken(prediction, reference, row):\n    return row['no such key']\n"
    )
    monkeypatch.chdir(tmp_path)
    report = evaluate(str(directory), [file], ["mine_metric:length", "mine_metric:turns"], max_new_tokens=NEW_TOKENS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert report.metrics["mine_metric:turns"] == sum(len(row["messages"]) for row in rows) / len(rows)
    assert 0 < report.metrics["mine_metric:length"] < 2
    with pytest.raises(PlanError, match=r"mine_metric:one is to be called with \(prediction, reference, row\)"):
        evaluate(str(directory), [file], ["mine_metric:one"])
    with pytest.raises(InputError, match=r"rows\.jsonl:\d: metric mine_metric:broken failed: KeyError"):
        evaluate(str(directory), [file], ["mine_metric:broken"], max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize(("size", "said"), [(8, "--batch-size 4"), (1, "a single sample")])
def test_where_memory_ends_a_smaller_batch_is_named(text, monkeypatch, size, said):
    def run_out(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 bytes")

    directory, file = text
    monkeypatch.setattr("onward.evaluate.measure._over_targets", run_out)
    with pytest.raises(TrainingError, match=said):
        evaluate(str(directory), [file], ["loss"], batch_size=size)
