"""A temperature goes with the network it was fitted on: through files, exports and answers."""

import dataclasses
import json

import numpy as np
import pytest

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.temperature import Temperature
from moss_rlhf.serving import Predictor
from moss_rlhf.tasks.loading import encoded


@pytest.fixture
def fitted(tiny_model, rows):
    model = tiny_model()
    model.network.classifier.weight.data *= 40  # sure, and half of the time wrong
    assert moss_rlhf.fit_temperature(model, rows) > 1.5
    return model


def test_scaling_is_reported_beside_the_plain_numbers(fitted, rows):
    report = moss_rlhf.evaluate(fitted, rows, resamples=200)
    plain, scaled = report["metrics"], report["calibration"]["metrics"]
    assert set(plain) == {"accuracy", "macro_f1", "log_loss", "expected_calibration_error"}
    for name in scaled:
        assert scaled[name]["value"] < plain[name]["value"]
        assert scaled[name]["low"] <= scaled[name]["value"] <= scaled[name]["high"]


def test_it_is_saved_and_loaded_while_the_network_is_the_same(fitted, tmp_path):
    moss_rlhf.save(fitted, tmp_path / "one")
    again = moss_rlhf.load(tmp_path / "one")
    assert again.temperature == fitted.temperature
    again.network.classifier.bias.data += 1
    moss_rlhf.save(again, tmp_path / "two")
    assert moss_rlhf.load(tmp_path / "two").temperature is None


def test_predictions_are_scaled_and_answers_stay(fitted, rows, tmp_path):
    moss_rlhf.save(fitted, tmp_path / "model")
    moss_rlhf.export(fitted, tmp_path / "onnx")
    ours = json.loads((tmp_path / "onnx" / "config.json").read_text())["moss_rlhf"]
    assert ours["temperature"] == fitted.temperature.value
    texts = [row["text"] for row in rows[:6]]
    for place in ("model", "onnx"):
        predictor = Predictor.open(tmp_path / place)
        scaled = list(predictor.predict(texts))
        plain = list(dataclasses.replace(predictor, temperature=1.0).predict(texts))
        assert [answer.label for answer in scaled] == [answer.label for answer in plain]
        odds = [[np.log(a.probability / (1 - a.probability)) for a in answers] for answers in (scaled, plain)]
        np.testing.assert_allclose(np.array(odds[0]) * fitted.temperature.value, odds[1], rtol=1e-4)


def test_what_is_no_temperature_is_refused(tmp_path, tiny_model, rows, rows_of):
    for value in (0, -1, "warm", True, float("inf")):
        with pytest.raises(ModelError, match="must be a number above 0"):
            Temperature.read({"temperature": value}, tmp_path)
    assert Temperature.read({}, tmp_path) is None
    with pytest.raises(ModelError, match="is for classifiers"):
        moss_rlhf.fit_temperature(tiny_model("gpt2"), rows_of("text-generation"))
    with pytest.raises(DataError, match="no rows to fit on"):
        moss_rlhf.fit_temperature(tiny_model(), encoded(tiny_model(), rows).select([]))
