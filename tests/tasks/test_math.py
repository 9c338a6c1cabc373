"""Mathematics: extraction, grading by value, and limits that hold against any input."""

import copy
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from stable_opd import MathVerify
from stable_opd.tasks.math import final_answer

HOSTILE = r"\boxed{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def task():
    return MathVerify()


@pytest.fixture
def impatient():
    return MathVerify(seconds=1.0)


def process_of(task):
    task.grade(r"\boxed{\frac{1}{2}}", {"answer": "0.5"})  # so that it is there
    return task._grader._process


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{\left\{ x : x > 1 \right\}}", r"\left\{ x : x > 1 \right\}"),
        (r"\boxed 7", "7"),
        (r"\boxed\{", "\\"),
        (r"\fbox{8}", "8"),
        (r"\boxed{$9$}", "9"),
        (r"\boxed{1} but \boxed{2", None),  # cut
        (r"\boxed{}", None),
        (r"\boxed", None),
        (r"\boxedx{3}", None),  # another command
        ("The answer is 42.", "42"),
        ("the final answer is: $x = 3$.", "x = 3"),
        ("**Answer:** 6", "6"),
        ("Answer: 4\nbecause", "4"),
        ("2 + 2 = 4 #### 4", "4"),
        ("the answer is 1. No, the answer is 2.", "1. No, the answer is 2"),
        (r"The answer is 3, that is \boxed{4}", "4"),
        ("no idea, 12", None),
        ("", None),
    ],
)
def test_final_answer_is_that_of_the_last_box_or_else_what_is_said_to_be_it(solution, answer):
    assert final_answer(solution) == answer


@pytest.mark.parametrize(
    ("right", "given", "grade"),
    [
        ("0.5", r"\frac{1}{2}", 1.0),
        ("1/2", "0.5", 1.0),
        ("1/2", "0.51", 0.0),
        ("27.0", "27", 1.0),
        (27.0, "27", 1.0),  # a column of numbers
        (33, "033", 1.0),
        ("33", "34", 0.0),
        (r"\sqrt{8}", r"2\sqrt2", 1.0),
        ("x^2-1", "(x-1)(x+1)", 1.0),
        ("(1,2)", "(1, 2)", 1.0),
        ("(1,2)", "(2, 1)", 0.0),
        ("$3$", "3", 1.0),
        (["$2$", "$3$"], "3, 2", 1.0),
        (["$2$", "$3$"], "2", 0.0),
        (r"\text{even}", r"\text{even}", 1.0),
        ("5", "x = 5", 1.0),
        ("5", r"\frac{", 0.0),
    ],
)
def test_answers_are_compared_by_their_value(task, right, given, grade):
    assert task.grade(rf"thus \boxed{{{given}}}", {"answer": right}) == grade
    assert task.ungraded == 0


def test_a_solution_without_an_answer_is_wrong_and_costs_no_process():
    task = MathVerify()
    assert task.grade("12 12 12", {"answer": "12"}) == 0.0
    assert task.grade(r"\boxed{12}", {"answer": "12"}) == 1.0
    assert task._grader._process is None


def test_one_process_grades_all_answers(task):
    process = process_of(task)
    assert [task.grade(rf"\boxed{{{n}.0}}", {"answer": str(n % 2)}) for n in range(4)] == [1.0, 1.0, 0.0, 0.0]
    assert task._grader._process is process


def test_examples_without_an_answer_name_the_column_to_set(task):
    with pytest.raises(ValueError, match=r"right answer.*data\.columns\.answer"):
        task.grade(r"\boxed{1}", {"prompt": "1"})


@pytest.mark.parametrize("answer", [HOSTILE, r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}"], ids=["tower", "nest"])
def test_an_answer_that_takes_too_long_is_wrong_and_counted_and_grading_goes_on(impatient, answer, caplog):
    first = process_of(impatient)
    start = time.monotonic()
    assert impatient.grade(answer, {"answer": "7"}) == 0.0
    assert time.monotonic() - start < 5
    assert impatient.ungraded == 1
    assert first.returncode == -signal.SIGALRM
    assert "could not be graded in 1 s" in caplog.text
    assert impatient.grade(r"\boxed{\frac{14}{2}}", {"answer": "7"}) == 1.0


def test_a_process_that_is_killed_by_others_is_replaced_and_the_answer_graded(task):
    process_of(task).kill()
    assert task.grade(r"\boxed{\frac{3}{6}}", {"answer": "0.5"}) == 1.0
    assert task.ungraded == 0


def test_a_process_that_cannot_start_is_no_wrong_answer():
    task = MathVerify(memory=24)
    with pytest.raises(
        RuntimeError, match=r"load in 24 MiB, but its process ended with \d+\. Give the task more memory"
    ):
        task.grade(r"\boxed{\frac{3}{6}}", {"answer": "0.5"})


def test_an_interrupted_answer_leaves_no_verdict_for_the_next(task):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    process_of(task)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            task.grade(HOSTILE, {"answer": "7"})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [task.grade(rf"\boxed{{{n}.0}}", {"answer": "1"}) for n in (1, 2, 1)] == [1.0, 0.0, 1.0]


def test_memory_is_limited(task):
    limits = Path(f"/proc/{process_of(task).pid}/limits").read_text()
    (line,) = (each for each in limits.splitlines() if each.startswith("Max address space"))
    assert int(line.split()[3]) == 2048 << 20


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_has_a_process_of_its_own(task, clone):
    process, twin = process_of(task), clone(task)
    assert twin._grader._process is None
    assert process_of(twin).pid != process.pid
    assert process_of(task) is process


def test_a_dropped_task_ends_its_process():
    task = MathVerify()
    process = process_of(task)
    del task
    assert process.returncode == -signal.SIGKILL


def test_threads_take_turns(task):
    found = {}

    def work(number):
        found[number] = [task.grade(rf"\boxed{{{number}.0}}", {"answer": str(each)}) for each in range(6)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [float(each == number) for each in range(6)] for number in range(6)}


def forked(work):
    """Run something in a fork of this process that never returns; give its number, and what it writes as one line."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(writer)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        return child, told.readline()


@pytest.mark.filterwarnings("ignore:.*fork.*may lead to deadlocks")
def test_a_forked_process_starts_its_own_and_leaves_ours_alone(task):
    def work(writer):
        grade = task.grade(r"\boxed{\frac{1}{4}}", {"answer": "0.25"})
        os.write(writer, f"{grade} {process_of(task).pid == process.pid}\n".encode())

    process = process_of(task)
    child, told = forked(work)
    os.waitpid(child, 0)
    assert told == "1.0 False\n"
    assert process.poll() is None
    assert process_of(task) is process


@pytest.mark.filterwarnings("ignore:.*fork.*may lead to deadlocks")
@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_its_parent_whatever_it_is_doing(impatient, state, ending):
    def work(writer):
        os.write(writer, f"{process_of(impatient).pid}\n".encode())
        if state == "busy":
            impatient.grade(HOSTILE, {"answer": "7"})
        time.sleep(60)

    parent, pid = forked(work)
    assert is_running(int(pid))
    time.sleep(0.2)
    os.kill(parent, ending)
    os.waitpid(parent, 0)
    assert wait_for(lambda: not is_running(int(pid)))


@pytest.mark.parametrize("options", [{"seconds": 0}, {"memory": -1}])
def test_limits_must_leave_something(options):
    with pytest.raises(ValueError, match=r"Expected seconds and memory above 0, but got"):
        MathVerify(**options)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"math-verify.*stable-opd\[math\]"):
        MathVerify()
