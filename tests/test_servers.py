"""Questions to a server that answers late, wrongly, or not at all."""

import asyncio
import contextlib
import logging
import socket
import threading
import time

import pytest

from stable_opd import servers
from stable_opd.servers import Server, ServerError
from standing_in import DROP, first, late, standing_in

PATH = "/weight_info"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def serving():
    with standing_in("testbed:student", "student") as found:
        yield found


@pytest.fixture
def stand_in(serving):
    serving.fault, serving.asked, serving.keys = (lambda path, question, answer: answer), {}, []
    serving.version = "default"
    return serving


def server(stand_in, **options):
    return Server("student", stand_in.url, **{"timeout": 5.0, "retries": 2} | options)


def wrong(sent):
    return lambda path, question, answer: sent


@pytest.mark.parametrize(
    "sent",
    [500, 503, 429, DROP, b"<html>", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
    ids=lambda s: str(s)[:9],
)
def test_a_fault_that_goes_away_costs_a_few_tries(sent, stand_in):
    stand_in.fault = first(2, wrong(sent), PATH)
    assert server(stand_in).ask(PATH) == {"weight_version": "default"}
    assert stand_in.asked[PATH] == 3


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (500, "the status 500: .*error"),
        (DROP, "RemoteProtocolError|ReadError"),
        (b"<html>", "no JSON: '<html>'"),
    ],
    ids=["status", "drop", "garbage"],
)
def test_a_fault_that_stays_is_given_up_with_what_was_asked_of_whom_and_what_came(sent, match, stand_in):
    stand_in.fault = first(3, wrong(sent), PATH)
    with pytest.raises(ServerError, match=f"'student' at {stand_in.url}{PATH}, .* after asking 3 times.*{match}"):
        server(stand_in).ask(PATH)
    assert stand_in.asked[PATH] == 3


def test_a_late_answer_is_asked_for_again_and_then_given_up(stand_in):
    stand_in.fault = first(1, late(0.4), PATH)
    assert server(stand_in, timeout=0.2).ask(PATH) == {"weight_version": "default"}
    stand_in.fault = first(9, late(0.4), PATH)
    with pytest.raises(ServerError, match=r"asking 2 times.*no answer within 0\.2 seconds.*start it again"):
        server(stand_in, timeout=0.2, retries=1).ask(PATH)


def test_an_answer_that_trickles_in_is_late():
    """Each piece comes in time, and the whole never does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(60):
                    connection.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(ServerError, match="no answer within"):
            Server("student", url, timeout=0.3, retries=0).ask(PATH)
        assert time.monotonic() - begun < 2
        thread.join()


def test_nobody_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"{url}{PATH}, .* asking 2 times.*ConnectError"):
            Server("student", url, timeout=1, retries=1).ask(PATH)


@pytest.mark.parametrize(
    ("sent", "way_out"), [(400, "the request, or the options"), (404, "docs/vllm.md"), (401, "SECRET")]
)
def test_a_question_that_is_refused_is_not_asked_again(sent, way_out, stand_in):
    stand_in.fault = wrong(sent)
    with pytest.raises(ServerError, match=f"the status {sent}: .*{way_out}"):
        server(stand_in, api_key_variable="SECRET").ask(PATH)
    assert stand_in.asked == {PATH: 1}


def test_waits_grow_and_differ(stand_in, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(servers.asyncio, "sleep", sleep)
    monkeypatch.setattr(servers, "FIRST_WAIT", 2.0)
    stand_in.fault = wrong(500)
    for _ in range(2):
        with pytest.raises(ServerError):
            server(stand_in, retries=4).ask(PATH)
    one, two = waits[:4], waits[4:]
    for some in (one, two):
        assert all(0.5 * 2 * 3**n <= wait <= 1.5 * 2 * 3**n for n, wait in enumerate(some))
    assert one != two


def test_many_questions_are_answered_in_their_order_and_a_few_at_a_time(stand_in):
    under_way, most = [0], [0]

    def count(path, question, answer):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        under_way[0] -= 1
        return question

    stand_in.fault = count
    questions = [{"new_version": str(number)} for number in range(12)]
    assert server(stand_in, parallel=4).ask_all("/update_weight_version", questions) == questions
    assert 1 < most[0] <= 4


def test_who_waits_for_a_turn_is_not_late(stand_in):
    stand_in.fault = late(0.3)
    asked = server(stand_in, parallel=1, timeout=1.0, retries=0)
    assert len(asked.ask_all("/tokenize", [{"prompt": "1"}] * 4)) == 4


def test_one_question_that_is_given_up_ends_the_others_at_once(stand_in):
    def fault(path, question, answer):
        if question["prompt"] == "7":
            return 400
        time.sleep(1)
        return answer

    stand_in.fault = fault
    begun = time.monotonic()
    with pytest.raises(ServerError, match="the status 400"):
        server(stand_in).ask_all("/tokenize", [{"prompt": each} for each in ("1", "7", "2")])
    assert time.monotonic() - begun < 0.9


def test_questions_can_be_asked_in_a_notebook_which_has_a_loop_of_its_own(stand_in):
    async def cell():
        return server(stand_in).ask(PATH)

    assert asyncio.run(cell()) == {"weight_version": "default"}


def test_key_is_sent_and_is_in_no_message_and_no_log(stand_in, monkeypatch, caplog):
    monkeypatch.setenv("SECRET", "hush-hush")
    asked = server(stand_in, api_key_variable="SECRET")
    stand_in.fault = first(1, wrong(500), PATH)
    with caplog.at_level(logging.DEBUG):
        asked.ask(PATH)
        stand_in.fault = wrong(403)
        with pytest.raises(ServerError) as refused:
            asked.ask(PATH)
    assert stand_in.keys == ["Bearer hush-hush"] * 3
    assert "hush" not in f"{refused.value} {caplog.text} {asked!r}"
    monkeypatch.delenv("SECRET")
    stand_in.fault = lambda path, question, answer: answer
    asked.ask(PATH)
    assert stand_in.keys[-1] is None


@pytest.mark.parametrize("key", ["hu\nsh-hush", "hush-hüsh", "hush\x7fhush"])
def test_key_that_cannot_be_sent_is_refused_and_not_repeated(key, stand_in, monkeypatch):
    monkeypatch.setenv("SECRET", key)
    with pytest.raises(ServerError, match="printable ASCII characters in the environment variable SECRET") as refused:
        server(stand_in, api_key_variable="SECRET").ask(PATH)
    assert "hush" not in str(refused.value)
    assert stand_in.asked == {}


def test_key_that_a_server_repeats_is_not_shown(stand_in, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hush-hush")
    stand_in.fault = wrong(b"There is no key hush-hush here.")
    with pytest.raises(ServerError, match=r"no JSON: 'There is no key \.\.\. here\.'"):
        server(stand_in, retries=0).ask(PATH)


def test_key_of_a_file_that_ends_with_a_line_break(stand_in, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hush-hush\n")
    server(stand_in).ask(PATH)
    assert stand_in.keys == ["Bearer hush-hush"]


def test_proxies_of_the_environment_are_not_asked(stand_in, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert server(stand_in).ask(PATH)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": "127.0.0.1:8000"}, "address such as"),
        ({"url": "ftp://127.0.0.1"}, "address such as"),
        ({"url": "http://127.0.0.1:99999"}, "a port from 0 to 65535"),
        ({"timeout": 0.0}, "timeout above 0"),
        ({"retries": -1}, "retries of at least 0"),
        ({"parallel": 0}, "parallel of at least 1"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Server("student", **options)


@pytest.mark.parametrize("url", ["http://me:hush@127.0.0.1:8000", "http://127.0.0.1:8000?key=hush"])
def test_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="environment variable VLLM_API_KEY") as refused:
        Server("student", url)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        (
            {"data": [{"id": "teacher", "max_model_len": 9}]},
            "the server of 'student' .*, but it serves 'teacher'.*--served-model-name",
        ),
        ({"data": []}, "but it serves nothing"),
        ({"data": [{"id": "student"}]}, "Expected a list of models of the server"),
        ({"data": None}, "a list of models"),
        ([1, 2], "a list of models"),
    ],
    ids=str,
)
def test_model_that_is_not_served(sent, match, stand_in):
    stand_in.fault = wrong(sent)
    with pytest.raises(ServerError, match=match):
        server(stand_in).context_length()
