from html.parser import HTMLParser

import pytest

from moss_rlhf.reporting import render_page, write_page
from moss_rlhf.reporting.facts import in_words as fact_in_words

HOSTILE = '<script>alert("1")</script><img src=http://evil.example/x onerror=alert(2)>'


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.identifiers, self.handlers = [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value)
            if name == "id":
                self.identifiers.append(value)
            if name.startswith("on"):
                self.handlers.append(value)

    def handle_data(self, data):
        if not self.tags or self.tags[-1] not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


@pytest.fixture
def read(report):
    return lambda **changes: Page(render_page({**report, **changes}))


def test_every_headline_number_appears(read):
    text = read().text
    for number in (
        "0.871 → 0.865",
        "−0.006",
        "4.2× faster",
        "9.1× lower",
        "5.3× smaller",
        "90.9 MB → 17.1 MB",
        "35 min 3 s",
    ):
        assert number in text
    for number in (
        "8.21 ms → 0.902 ms, median for one text",
        "142 /s → 597 /s",
        "1.8× the time",
        "22,713,986",
        "0.866 (0.843 to 0.889)",
        "57 of 872",
    ):
        assert number in text
    for name in ("avx512_vnni", "9c1185a5c5e9fc54612808977ee8f548b2258d31", "also in test", "16.7 GB", "runs/评论"):
        assert name in text


def test_nothing_is_loaded_from_elsewhere(read):
    page = read()
    assert page.links == []
    assert "link" not in page.tags


def test_charts_stand_on_the_page_under_distinct_names(read):
    charts = [name for name in read().identifiers if name.startswith("chart-")]
    assert charts == ["chart-throughput", "chart-latency_ms", "chart-history-1", "chart-history-3"]


def hostile_report(report):
    report["changed"][0] = {"text": HOSTILE, "label": HOSTILE, "before": HOSTILE, "after": "a"}
    report["confusion"]["labels"][0] = HOSTILE
    report["recipe"]["model"] = HOSTILE
    report["notes"] = [HOSTILE]
    report["stages"][0]["facts"] = {HOSTILE: [HOSTILE] * 9, "nested": {HOSTILE: HOSTILE}}
    report["data"]["train"]["classes"] = {HOSTILE: 3}
    report["data"]["train"]["layout"] = HOSTILE
    report["after"]["metrics"][HOSTILE] = report["after"]["metrics"]["accuracy"]
    report["stages"][0]["history"]["validation"][0][HOSTILE] = 0.5
    return report


def test_hostile_names_and_texts_stay_text(read, report):
    harmless = read()
    page = Page(render_page(hostile_report(report)))
    assert page.tags.count("script") == harmless.tags.count("script")
    assert "img" not in page.tags
    assert page.links == page.handlers == []
    assert HOSTILE in page.text


def test_without_gain_the_page_says_why_and_shows_the_result(read, report):
    alone = {"gain": None, "before": None, "reference": None, "notes": ["The head was never trained."], "changed": []}
    text = read(**alone, confusion={**report["confusion"], "before": None}).text
    assert "Nothing to compare with" in text
    assert "The head was never trained." in text
    assert "0.865 (0.842 to 0.888)" in text
    assert "Texts whose answer changed" not in text


def without_numbers(value):
    if isinstance(value, dict):
        return {key: without_numbers(item) for key, item in value.items()}
    return None if isinstance(value, int | float) else value


def test_numbers_that_were_not_measured_say_so(read, report):
    for field in ("after", "before", "reference", "cost", "machine"):
        report[field] = without_numbers(report[field])
    report["gain"] = None
    for stage in report["stages"]:
        stage.update(seconds=None, flops=None, peak_memory_bytes=None, measurement=None, history=None)
    text = read().text
    assert "not measured" in text
    assert "None" not in text


def test_equal_reports_give_equal_pages(report):
    assert render_page(report) == render_page(report)


def test_fifty_classes_give_fifty_rows_a_side(read):
    square = [[int(row == column) for column in range(50)] for row in range(50)]
    labels = [f"类{number}" for number in range(50)]
    page = read(confusion={"labels": labels, "before": square, "after": square})
    fewer = read(confusion={"labels": labels[:1], "before": [[1]], "after": [[1]]})
    assert page.tags.count("td") - fewer.tags.count("td") == 2 * (50 * 50 - 1)


def test_facts_in_words():
    assert fact_in_words({"kept_heads": [[0, 2], [1]], "tied": True}) == "kept heads [0, 2], [1], tied yes"
    assert fact_in_words(16_700_000_000, "memory_bytes") == "16.7 GB"
    assert fact_in_words(725.0, "seconds") == "12 min 5 s"
    assert fact_in_words(0.03125, "error") == "0.0312"
    assert fact_in_words(0.004, "cut_share") == "0.4 %"
    assert fact_in_words(None) == "not measured"


def test_a_language_model_shows_the_texts_whose_perplexity_moved(read, report):
    moved = [{"text": HOSTILE, "before": 12.3456, "after": 4567.8}]
    page = read(moved=moved, confusion=None, changed=None)
    assert HOSTILE in page.text
    assert "12.35" in page.text
    assert "4,568" in page.text
    assert "Where it errs" not in page.text
    assert "img" not in page.tags


def test_write_page_leaves_one_whole_file(report, tmp_path):
    write_page(report, tmp_path / "run" / "report.html")
    assert [place.name for place in (tmp_path / "run").iterdir()] == ["report.html"]
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")


def test_what_cleaning_found_is_shown_and_escaped(report):
    example = {
        "line": 17,
        "label": "negative",
        "action": "drop",
        "reason": "91% alike",
        "partner": "test line 4",
        "text": HOSTILE,
    }
    found = {"leaks": {"count": 7, "actions": {"drop": 6, "flag": 1}, "examples": [example] * 7}}
    effect = {
        "raw_accuracy": 0.8,
        "cleaned_accuracy": 0.82,
        "delta": 0.02,
        "low": 0.005,
        "high": 0.036,
        "p_value": 0.01,
    }
    train = report["data"]["train"] | {"findings": found, "cleaning_effect": effect}
    page = Page(render_page({**report, "data": report["data"] | {"train": train}}))
    assert "Leaks in train: 7" in page.text
    assert "6 dropped, 1 listed only" in page.text
    assert page.text.count("test line 4") == 5
    assert HOSTILE in page.text  # as text, not as elements
    assert "img" not in page.tags
    assert "0.820 on validation" in page.text
    assert "+0.020 (+0.005 to +0.036)" in page.text
    assert "What cleaning found" not in Page(render_page(report)).text
