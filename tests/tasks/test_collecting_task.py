"""`collect` with tiny models: what ranks, what is passed over, what is written."""

import json
import math

import numpy as np
import pytest
import torch

from moss_rlhf import collect
from moss_rlhf.errors import DataError, RecipeError
from moss_rlhf.tasks.collecting import text_perplexities
from moss_rlhf.tasks.embedding import embed_texts, mean_pool


@pytest.fixture
def corpus(rows, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(row | {"id": place}) for place, row in enumerate(rows)), "utf-8")
    return path


def test_pooling_by_hand():
    states = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    pooled = mean_pool(states, torch.tensor([[1, 1, 0]]))
    assert pooled[0].tolist() == pytest.approx([0.6, 0.8])  # (1.5, 2) scaled


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_vector_does_not_depend_on_its_batch(family, tiny_model, rows):
    model, texts = tiny_model(family), [row["text"] for row in rows[:9]]
    together = embed_texts(model, texts, batch_size=9)
    alone = embed_texts(model, texts, batch_size=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_examples_themselves_are_the_most_alike(tiny_model, corpus, rows, tmp_path):
    model, examples = tiny_model(), [rows[7]["text"], rows[40]["text"]]
    out = tmp_path / "chosen.jsonl"
    found = collect(corpus, count=2, like=examples, model=model, diversity=0, output=out)
    assert {row["text"] for row in found} == set(examples)
    assert all(row["score"] == pytest.approx(1, abs=1e-4) for row in found)
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == found
    assert set(found[0]) == {"text", "label", "id", "line", "score", "reason"}
    assert found[0]["reason"].startswith("like example ")
    assert rows[found[0]["line"] - 1]["text"] == found[0]["text"]


def test_keywords_alone_need_no_model(corpus, rows):
    found = collect(corpus, count=100, keywords=["hotel", "lovely"], diversity=0)
    expected = {row["text"] for row in rows if "hotel" in row["text"].split() or "lovely" in row["text"].split()}
    assert {row["text"] for row in found} == expected
    assert "hotel" in found[0]["text"]
    assert "lovely" in found[0]["text"]
    assert found[0]["score"] == 1
    assert found[0]["reason"] == "holds hotel, lovely"


def test_diversity_takes_texts_that_are_less_alike(tiny_model, corpus, rows):
    model = tiny_model()

    def spread(diversity):
        found = collect(corpus, count=6, like=[rows[0]["text"]], model=model, diversity=diversity)
        vectors = embed_texts(model, [row["text"] for row in found])
        return float((vectors @ vectors.T).sum())

    assert spread(0.9) < spread(0.0) - 1e-3


def test_perplexity_ranks_and_filters_as_the_network_says(tiny_model, corpus, rows):
    model = tiny_model("gpt2")
    texts = [row["text"] for row in rows[:3]]
    values = text_perplexities(model, [*texts, ""])
    ids = model.tokenizer(texts[1], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model.network(ids, labels=ids).loss
    assert values[1] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert values[3] == math.inf
    every = text_perplexities(model, [row["text"] for row in rows])
    found = collect(corpus, count=5, perplexity=model, diversity=0)
    assert found[0]["text"] == rows[int(every.argmin())]["text"]
    with pytest.raises(DataError, match="no text fits"):
        collect(corpus, count=5, perplexity=model, max_perplexity=float(every.min()) * 0.9, diversity=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "keywords": ["a"], "diversity": 0}, "count: 0"),
        ({"keywords": ["a"], "diversity": 2}, "diversity: 2"),
        ({"diversity": 0}, "at least one of like, keywords and perplexity"),
        ({"keywords": [" "], "diversity": 0}, "an empty word"),
        ({"keywords": ["a"]}, "model: is needed"),
        ({"like": ["a"], "diversity": 0}, "model: is needed"),
        ({"keywords": ["a"], "diversity": 0, "max_perplexity": 9.0}, "needs perplexity"),
        ({"like": ["a"], "model": "m", "perplexity": "p"}, "max_perplexity: is needed"),
        (
            {"perplexity": "p", "max_perplexity": 1.0, "diversity": 0},
            r"1\.0 can't be used; it must be greater than 1",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, corpus):
    with pytest.raises(RecipeError, match=message):
        collect(corpus, **{"count": 5, **arguments})
