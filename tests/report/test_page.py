import re
from html.parser import HTMLParser

import pytest

from report.made import collapsing, quiet, write_run
from stable_opd.report.answers import MOST_EVALUATIONS, evaluations, marked
from stable_opd.report.page import Picture, page
from stable_opd.report.panels import panels
from stable_opd.report.runs import read_runs
from stable_opd.report.text import escaped, number, one_line, visible
from stable_opd.report.verdict import judge

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;\x00\x1b[31m\u202egnorw\u2066\ufeff\ud800"
VOID = {"meta", "img", "source", "br"}


class Reader(HTMLParser):
    """Checks that tags are closed in their order, and collects them with the text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def render(*folders):
    runs = read_runs(folders)
    verdicts = [judge(run) for run in runs]
    return page(runs, verdicts, [Picture(panel, b"light", b"dark") for panel in panels(runs)])


def sample(step=0, **fields):
    return {"step": step, "index": 3, "prompt": "Q", "completion": "abc abc", "grade": 0.0} | fields


def test_the_verdict_stands_before_everything_else(tmp_path):
    made = render(write_run(tmp_path, collapsing()))
    text = read(made).text
    assert "collapsed" in text
    assert "Truncation passed 0.9 at step" in text
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", made)
    assert headings == [
        *("Verdict", "Key figures", "Plots", "Sample answers"),
        *("What moved, and when", "Configuration", "How this is decided", "Versions"),
    ]


@pytest.mark.parametrize("where", ["completion", "prompt", "index", "name", "config", "metric"])
def test_what_a_model_or_a_user_wrote_does_nothing(tmp_path, where):
    hostile = HOSTILE.replace("\x00", "").replace("\ud800", "").replace("/", "") if where == "name" else HOSTILE
    train = quiet() | ({'train/loss/"><script>': quiet()["train/loss"]} if where == "metric" else {})
    kept = sample(**{where: hostile}) if where in ("completion", "prompt", "index") else sample()
    config = f"a: |\n  {HOSTILE.encode('utf-8', 'replace').decode()}\n" if where == "config" else "a: 1\n"
    folder = tmp_path / (hostile if where == "name" else "run") / "v"
    write_run(folder, train, samples=[kept], config=config)
    write_run(tmp_path / "other", quiet())
    for made in (render(folder), render(folder, tmp_path / "other")):
        reader = read(made)
        names = {tag for tag, _ in reader.tags}
        assert not names & {"script", "iframe", "object", "link", "base", "form"}
        assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
        assert not set(made) & set("\x00\x1b\u202e\u2066\ufeff\ud800")


def test_hostile_text_can_still_be_read(tmp_path):
    text = read(render(write_run(tmp_path, quiet(), samples=[sample(completion=HOSTILE)]))).text
    assert "<script>alert(1)</script>" in text
    assert "⟨U+202E⟩gnorw" in text
    assert "⟨U+0000⟩" in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    made = render(write_run(tmp_path, collapsing(), samples=[sample()]))
    links = [value for _, each in read(made).tags for name, value in each.items() if name in ("src", "srcset", "href")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "http" not in re.sub(r'http-equiv="', "", made)
    assert "url(" not in made
    assert "@import" not in made
    assert "default-src 'none'" in made


def test_every_link_leads_somewhere_and_every_picture_is_told_in_words(tmp_path):
    tags = read(render(write_run(tmp_path, collapsing()))).tags
    places = {each["id"] for _, each in tags if "id" in each}
    assert {each["href"][1:] for tag, each in tags if tag == "a"} <= places
    assert all(len(each["alt"]) > 40 for tag, each in tags if tag == "img")
    assert sum(tag == "img" for tag, _ in tags) == sum(tag == "source" for tag, _ in tags) > 5


def test_what_scrolls_can_be_reached_by_the_keyboard(tmp_path):
    tags = read(render(write_run(tmp_path, collapsing(), samples=[sample()]))).tags
    assert all(each.get("tabindex") == "0" for tag, each in tags if tag == "pre" or each.get("class") == "wide")
    assert [tag for tag, _ in tags].count("h1") == 1


def test_keys_that_differ_are_shown_and_no_others(tmp_path):
    write_run(tmp_path / "a", quiet(), config="model: {lr: 0.5, same: 7}\n")
    write_run(tmp_path / "b", quiet(), config="model: {lr: 0.25, same: 7}\n")
    text = read(render(tmp_path)).text
    shown = text.partition("Keys that differ")[2].partition("The whole configuration")[0]
    assert "model.lr" in shown
    assert "0.25" in shown
    assert "model.same" not in shown


def test_a_run_without_anything_beside_its_metrics_has_a_page(tmp_path):
    text = read(render(write_run(tmp_path, {"train/loss": quiet()["train/loss"]}, {}, config=None))).text
    assert "Too short to say" in text.capitalize() or "too short to say" in text
    assert "None were kept" in text
    assert "no config.yaml" in text


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (4, 'a&lt;b <span class="turn">⟲ repeats</span><mark>a&lt;b</mark>'),
        (0, '<span class="turn">⟲ repeats</span><mark>a&lt;b a&lt;b</mark>'),
        (None, "a&lt;b a&lt;b"),
        (7, "a&lt;b a&lt;b"),
        (-1, "a&lt;b a&lt;b"),
        (True, "a&lt;b a&lt;b"),
        ("4", "a&lt;b a&lt;b"),
    ],
)
def test_the_part_that_repeats_is_marked(start, expected):
    assert marked({"completion": "a<b a<b", "repeated_from": start}) == expected


def test_few_evaluations_are_shown_with_the_first_and_the_last():
    shown = evaluations([sample(step) for step in range(0, 1000, 10) for _ in range(2)])
    assert len(shown) == MOST_EVALUATIONS
    assert (shown[0], shown[-1]) == (0, 990)
    assert evaluations([sample(5), sample(0)]) == [0, 5]
    assert evaluations([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\tc", "a\nb\tc"),
        ("a\rb", "a⟨U+000D⟩b"),
        ("\u061c\u200e\u200f\u2028\U000e0041", "⟨U+061C⟩⟨U+200E⟩⟨U+200F⟩⟨U+2028⟩⟨U+E0041⟩"),
        ("naïve 解 שלום 👩‍🔬", "naïve 解 שלום 👩‍🔬"),
    ],
)
def test_unseen_characters_are_spelt_out_and_scripts_stay(text, expected):
    assert visible(text) == expected


def test_long_names_lose_their_middle():
    assert one_line("a" * 10 + "b" * 10, 7) == "aaa…bbb"
    assert one_line("a\n b", 7) == "a b"


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "-"), (0.0, "0"), (3.0, "3"), (0.12345, "0.123"), (1e9, "1e+09")]
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_escaped_text_may_stand_in_an_attribute():
    assert escaped("\"'<>&") == "&quot;&#x27;&lt;&gt;&amp;"


def test_what_the_guard_did_is_told_without_what_it_only_noted(tmp_path):
    events = [
        {"step": 40, "action": "notice", "reason": "the entropy fell"},
        {"step": 41, "action": "raise", "reason": f"the length rose {HOSTILE}", "done": "anchor counts 2 times"},
    ]
    found = read(render(write_run(tmp_path, collapsing(), events=events)))
    for told in ("What the guard did", "step 41", "raise", "the length rose", "anchor counts 2 times"):
        assert told in found.text
    assert "the entropy fell" not in found.text
    assert "script" not in [tag for tag, _ in found.tags]


def test_without_a_guard_there_is_no_section_for_it(tmp_path):
    assert "What the guard did" not in read(render(write_run(tmp_path, collapsing()))).text
