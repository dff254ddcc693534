"""Software engineering: who mends the bug earns 1, and nobody else does."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import threading
import time

import pytest
from absl import flags

from experiments import entry  # noqa: F401 (before the fixture: its flags are for all)
from glm_jax.envs import registry
from glm_jax.envs.scripted import idle, play
from glm_jax.envs.software import alteration, environment, guard, judge, mutation, tasks
from glm_jax.envs.software.environment import Software
from glm_jax.envs.software.mutation import Mutation
from glm_jax.envs.software.repository import Record, load, make_environment, read_sdist
from glm_jax.rollouts.task import Task, read_tasks
from tests.envs import pocket
from tests.sandboxes import needs_sandbox

pytestmark = needs_sandbox
SUM_TESTS = [f"tests/test_core.py::test_total[{name}]"
             for name in ("numbers1-1", "numbers2-6", "numbers3-2")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("software")
    pocket.make_folder(path)
    return path


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """These tests take milliseconds: a cheat that never ends need not go on for long."""
    short = dataclasses.replace(judge.LIMITS, cpu_seconds=4, wall_seconds=20.0)
    monkeypatch.setattr(judge, "LIMITS", short)


@pytest.fixture(scope="module")
def record(folder) -> Record:
    return load(str(folder), pocket.NAME)[1]


@pytest.fixture(scope="module")
def task(folder, record) -> Task:
    change = Mutation(**pocket.BROKEN)
    repository, _ = load(str(folder), pocket.NAME)
    run = judge.run_tests(repository, tasks.broken(repository, change), folder, traceback="short")
    line = tasks.task_of(folder, pocket.NAME, record, change, tasks.failing(record, run), run.texts)
    return as_task(line)


def as_task(line) -> Task:
    message = {"role": "user", "content": line["prompt"]}
    return Task(line["id"], line["group"], line["verifier"], (message,), line["answer"])


def call(name, **arguments):
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"type": "function", "function": function}


def turn(*calls):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


@pytest.fixture
def episode(task):
    found = Software()
    found.reset(task, 0)
    yield found
    found.close()


def ask(episode, name, **arguments) -> str:
    step = episode.step(turn(call(name, **arguments)))
    assert not step.done
    [message] = step.messages
    assert message["role"] == "tool"
    return message["content"]


# --- what a fix earns ---


def test_the_record_says_what_the_tests_do(record):
    counts = {o: list(record.tests.values()).count(o) for o in ("passed", "skipped", "failed")}
    assert counts == {"passed": 22, "skipped": 1, "failed": 1}
    assert record.license == "MIT"
    no_control = set(record.passed) - set(record.controls)
    assert no_control == {"tests/test_core.py::test_without_a_claim"}


def test_the_question_names_the_failing_tests_and_not_the_bug(task):
    [message] = task.messages
    assert all(f"- {name}" in message["content"] for name in task.answer["fail_to_pass"])
    assert "assert -6 == 6" in message["content"] or "assert -1 == 1" in message["content"]
    assert "found" not in message["content"].replace("be found", "")
    assert task.answer["fail_to_pass"][:3] == SUM_TESTS
    assert len(task.answer["fail_to_pass"]) + task.answer["pass_to_pass"] == 22


def test_the_expert_earns_1_and_doing_nothing_0(task):
    registry.check([task])
    played = play(Software(), task, environment.expert_of(task))
    assert played.reward == 1
    assert [m["role"] for m in played.messages] == ["user", "assistant", "tool", "assistant"]
    assert play(Software(), task, idle).reward == 0


FIXES = {
    "another way": ("found -= number", "found = found + number", 1),
    "in the package alone": ("found -= number", "found = sum([found, number])", 1),
    "nothing but a comment": ("found -= number", "found -= number  # mended", 0),
    "another bug": ("found -= number", "found += 2 * number", 0),
    "syntax error": ("found -= number", "found +=", 0),
    "breaks another test": ("found -= number", "found += number\n    global longest\n"
                            "    longest = len", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXES)
def test_what_a_fix_earns(episode, name):
    old, new, due = FIXES[name]
    assert ask(episode, "edit", path="pocket/core.py", old=old, new=new) == "edited pocket/core.py"
    step = episode.step(turn(call("submit")))
    assert step.done and not step.messages
    assert step.reward.value == due and step.reward.parts["changed"] == 1


def test_a_fix_in_a_new_module_counts(episode):
    ask(episode, "run", command="echo 'add = lambda a, b: a + b' > pocket/adding.py")
    ask(episode, "edit", path="pocket/core.py", old="found -= number",
        new="from pocket.adding import add\n        found = add(found, number)")  # fmt: skip
    assert episode.step({"content": "Done."}).reward.value == 1


def test_a_fix_earns_nothing_where_a_source_is_missing(episode):
    ask(episode, "run", command="sed -i 's/-= number/+= number/' pocket/core.py")
    ask(episode, "run", command="rm pocket/__init__.py; echo 'x = 1' > pocket/more.py")
    step = episode.step(turn(call("submit")))
    assert step.done and step.reward.parts["changed"] == 1


# --- cheats ---


@pytest.mark.parametrize("name", pocket.CHEATS)
def test_a_cheat_earns_nothing(episode, name):
    said = ask(episode, "run", command=pocket.CHEATS[name])
    assert said.endswith("[exit code 0]")
    if name in pocket.FOOLS_PYTEST:
        said = ask(episode, "run", command="python -m pytest -q --deselect "
                   "tests/test_core.py::test_wrong_from_the_beginning")  # fmt: skip
        assert said.endswith("[exit code 0]"), said
    step = episode.step(turn(call("submit")))
    assert step.done and step.reward.value == 0


def handed_in(task, name) -> dict[str, bytes]:
    """The sources of an episode in which a cheat was done."""
    cheating = Software()
    cheating.reset(task, 0)
    try:
        ask(cheating, "run", command=pocket.CHEATS[name])
        asked = cheating._thread.submit(cheating._ask, {"do": "sources", "args": {}}, 5.0)
        reply = asked.result()["result"]
    finally:
        cheating.close()
    return {path: text.encode("latin-1") for path, text in reply.items()}


@pytest.mark.parametrize("name", [n for n, c in pocket.CHEATS.items() if "pocket/core.py" in c])
def test_what_a_cheat_earns_without_the_guard(folder, record, task, name):
    """The report and the altered tests are hurdles of their own; judge.py says what gets over
    both.
    """
    repository, _ = load(str(folder), pocket.NAME)
    sources = handed_in(task, name)
    reward = judge.judge(repository, record, folder, sources, guarded=False)
    assert reward.value == (name == "tells altered tests from original ones")
    if name in pocket.FORGES:
        forged = judge.run_tests(repository, repository.with_sources(sources), folder).outcomes
        assert all(forged[test] == "passed" for test in record.passed)
        assert reward.parts["forged"] == 1 - reward.value


def test_the_solution_is_nowhere_in_the_sandbox(episode):
    """Not installed, not in a history, not in a cache, not in a wheel."""
    said = ask(episode, "run", command="grep -rlsF 'found += number' /tmp /environment")
    assert said == "[exit code 1]"
    said = ask(episode, "run", command="find / -name '*.whl' -o -name '.git' 2>/dev/null")
    assert said.splitlines()[-1].startswith("[exit code") and "/" not in said
    said = ask(episode, "run", command="git log")
    assert "not a git repository" in said or "not found" in said
    assert "No module named pip" in ask(episode, "run", command="python -m pip download pocket")


def test_a_package_of_the_environment_is_refused(folder, tmp_path):
    """Its solution could be read there."""
    files = {p.replace("pocket", "pluggy"): t for p, t in pocket.FILES.items()}
    sdist = pocket.write_sdist(tmp_path / "pluggy-9.tar.gz", files)
    with pytest.raises(ValueError, match="pluggy-9: pluggy is in the environment"):
        tasks.record(folder, sdist)


# --- tools ---


def test_the_tools_answer(episode):
    assert ask(episode, "run", command="ls; exit 3").split("\n")[-1] == "[exit code 3]"
    assert ask(episode, "read", path="pocket/core.py", first=6, last=7) == (
        "6\t    for number in numbers:\n7\t        found -= number"
    )
    said = ask(episode, "run", command="python -m pytest -q tests 2>&1 | tail -1")
    assert re.match(r"5 failed, 18 passed, 1 skipped", said)
    said = ask(episode, "run", command="python -c 'import pocket.core as c; print(c.total([1]))'")
    assert said == "-1\n[exit code 0]"


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("read", {"path": "no.py", "first": 1, "last": 2}, "No such file"),
        ("read", {"path": "README", "first": 3, "last": 2}, "lines 3 to 2: README has the lines"),
        ("read", {"path": "/dev/zero", "first": 1, "last": 2}, "/dev/zero is no file"),
        ("read", {"path": "README", "first": 1}, "read has the arguments path, first, last, not"),
        ("read", {"path": "README", "first": "1", "last": 2}, "first must be of type integer"),
        ("edit", {"path": "README", "old": "o", "new": "u"}, "stands 3 times in README"),
        ("edit", {"path": "README", "old": "xyz", "new": "u"}, "stands 0 times in README"),
        ("edit", {"path": "/environment/pytest/__init__.py", "old": "__version__ ", "new": ""},
         ""),
        ("write", {}, "there is no tool 'write'; valid: run, read, edit, submit"),
        ("run", {}, "run has the arguments command, not none"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_answered_with_an_error(episode, name, arguments, error):
    said = ask(episode, name, **arguments)
    assert said.startswith("error: ") and error in said


def test_a_call_that_is_no_json_is_answered_with_an_error(episode):
    function = {"name": "run", "arguments": "{"}
    step = episode.step(turn({"type": "function", "function": function}))
    assert step.messages[0]["content"].startswith("error: call.arguments")


def test_output_is_cut_in_the_middle(episode):
    said = ask(episode, "run", command="seq 1 1000000")
    assert len(said) < environment.CHARACTERS + 100
    assert said.startswith("1\n2\n") and said.endswith("1000000\n[exit code 0]")
    assert "left out" in said
    said = ask(episode, "run", command="yes")  # ended by the limit on a file's size
    assert "left out" in said
    ask(episode, "run", command="seq 1 100000 > long")
    said = ask(episode, "read", path="long", first=1, last=100000)
    assert said.endswith(f"[... cut after {environment.CHARACTERS} characters ...]")


def test_a_command_that_hangs_is_stopped_with_all_that_it_started(episode, monkeypatch):
    monkeypatch.setattr(environment, "TURN_SECONDS", 4.0)
    started = time.monotonic()
    step = episode.step(
        turn(
            call("run", command="(setsid sleep 99 &) ; echo begun; sleep 99"),
            call("run", command="true"),
        )
    )
    assert time.monotonic() - started < 40
    stopped, late = (message["content"] for message in step.messages)
    assert re.fullmatch(r"begun\n\[stopped after \d.* seconds\]", stopped)
    assert late == "error: the 4 seconds of this turn are used up"
    said = ask(episode, "run", command="cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "setsid" not in said and "sleep 99" not in said


def test_a_turn_has_a_limited_number_of_calls(episode):
    step = episode.step(turn(*[call("run", command="true")] * (environment.MAX_CALLS + 2)))
    said = [message["content"] for message in step.messages]
    assert said[: environment.MAX_CALLS] == ["[exit code 0]"] * environment.MAX_CALLS
    assert said[environment.MAX_CALLS :] == ["error: a turn may have 8 calls"] * 2


@pytest.mark.parametrize("ending", ["kill -9 -1", "kill -9 $PPID", "kill -STOP $PPID"])
def test_who_brings_down_the_sandbox_has_lost(episode, monkeypatch, ending):
    monkeypatch.setattr(environment, "TURN_SECONDS", 2.0)
    monkeypatch.setattr(environment, "SLACK_SECONDS", 1.0)
    step = episode.step(turn(call("run", command=ending)))
    if not step.done:  # the shell alone has ended: of kill -1, itself is left out
        step = episode.step(turn(call("submit")))
    assert step.done and step.reward.value == 0


def test_what_the_sandbox_says_is_not_trusted(task):
    """The agent may answer in the place of the program that holds the repository."""
    for reply in ({"result": {"pocket/core.py": 5}}, {"result": "text"}, {"result": None}, {}):
        cheating = Software()
        cheating.reset(task, 0)
        cheating._ask = lambda message, seconds, reply=reply: reply
        step = cheating.step(turn(call("submit")))
        cheating.close()
        assert step.done and step.reward.value == 0


# --- the end of an episode ---


def processes() -> set[str]:
    return {
        pid for pid in os.listdir("/proc")
        if pid.isdigit() and b"bwrap" in read_bytes(f"/proc/{pid}/cmdline")
        and b"%d" % os.getpid() in read_bytes(f"/proc/{pid}/stat").split()[3:4]
    }  # fmt: skip


def read_bytes(path) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("where", ["before", "idle", "command", "judge"])
def test_close_leaves_nothing_behind_even_beside_a_step(task, where):
    before, threads = processes(), threading.active_count()
    episode = Software()
    if where != "before":
        episode.reset(task, 0)
        assert len(processes()) == len(before) + 1
        ask(episode, "edit", path="pocket/core.py", old="found -= number",
            new="found += number\n        while True: pass")  # fmt: skip
    working, errors = None, []

    def work():
        step = call("run", command="sleep 99") if where == "command" else call("submit")
        with pytest.raises(OSError, match="was closed"):
            episode.step(turn(step))
        errors.append("of the machine, not the model's")

    if where in ("command", "judge"):
        working = threading.Thread(target=work)
        working.start()
        time.sleep(0.7)
    started = time.monotonic()
    episode.close()
    assert time.monotonic() - started < 30  # the command has 99 seconds
    if working is not None:
        working.join(30)
        assert not working.is_alive() and errors
    assert processes() == before and threading.active_count() == threads


def test_an_episode_belongs_to_no_thread(task):
    """The rollout worker calls each method in a thread of its own, which ends after it."""
    episode, found = Software(), []
    for work in (
        lambda: episode.reset(task, 0),
        lambda: found.append(ask(episode, "run", command="echo alive")),
        episode.close,
    ):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["alive\n[exit code 0]"]


# --- making tasks ---


def test_attempts_make_tasks_that_hold(folder):
    """Each task's bug breaks the tests that it names and no other, run once more."""
    repository, record = load(str(folder), pocket.NAME)
    lines = list(tasks.attempts(folder, pocket.NAME, 0, 0))
    made = [as_task(line) for line in lines if line is not None]
    assert len(made) >= 4 and None in lines
    environment.check(made)
    assert len({task.id for task in made}) == len(made)
    for task in made[:3]:
        files = tasks.broken(repository, Mutation(**task.answer["mutation"]))
        run = judge.run_tests(repository, files, folder)
        broken = [t for t in record.passed if run.outcomes[t] != "passed"]
        assert broken == task.answer["fail_to_pass"]
        registry.check_rewards(environment.KIND, task)


def test_attempts_go_on_where_they_stopped(folder, monkeypatch):
    monkeypatch.setattr(tasks, "run_tests", lambda *args, **kwargs: judge.TestRun({}, {}, None))
    monkeypatch.setattr(tasks, "failing", lambda record, run: ["a"])
    every = list(tasks.attempts(folder, pocket.NAME, 3, 0))
    assert every[4:] == list(tasks.attempts(folder, pocket.NAME, 3, 4))
    assert every != list(tasks.attempts(folder, pocket.NAME, 4, 0))


@pytest.fixture
def software_tasks(monkeypatch):
    """The command, with flags of its own: others of this process have some of the same names."""
    own = flags.FlagValues()
    for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_bool"):
        monkeypatch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=own))
    return importlib.import_module("experiments.software_tasks")


def test_the_command_resumes(software_tasks, folder, tmp_path, monkeypatch, capsys):
    output, packages = tmp_path / "tasks.jsonl", tmp_path / "packages.txt"
    packages.write_text("pocket==1.0 --hash=sha256:0  # MIT\n")
    values = {"FOLDER": str(folder), "OUTPUT": str(output), "PACKAGES": str(packages), "COUNT": 3,
              "ATTEMPTS": 40, "SEED": 1, "WORKERS": 1, "CHECK": True}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(software_tasks, name, type("Flag", (), {"value": value}))
    software_tasks.main()
    assert "pocket==1.0: 3\n3 tasks" in capsys.readouterr().out
    first = read_tasks(output)
    [attempts] = (folder / "attempts").iterdir()
    whole = attempts.read_bytes()
    attempts.write_bytes(whole[:-30])  # stopped within a line
    tried, run_tests = [], tasks.run_tests
    monkeypatch.setattr(
        tasks, "run_tests", lambda *args, **kwargs: tried.append(1) or run_tests(*args, **kwargs)
    )
    software_tasks.main()
    assert read_tasks(output) == first and attempts.read_bytes() == whole and len(tried) == 1
    packages.write_text("pocket\n")
    with pytest.raises(ValueError, match="'pocket' must read like 'NAME==VERSION"):
        software_tasks.main()


SOURCE = b"""
def f(a, b):
    if a < b and not a:
        return (a) + (b * 2)
    for x in range(3):
        break
    a += 1
    return True
"""
CHANGES = [
    "if a <= b and not a:", "if a < b or not a:", "if a < b and a:", "if not (a < b and not a):",
    "return (a) - (b * 2)", "return (a) + (b + 2)", "return (a) + (b * 3)", "return None",
    "for x in range(4):", "continue", "a -= 1", "a += 2", "return False", "return None",
]  # fmt: skip


def test_the_mutations_of_a_function():
    found = mutation.mutations("f.py", SOURCE)
    assert sorted(change.after.strip() for change in found) == sorted(CHANGES)
    for change in found:
        undo = dataclasses.replace(change, before=change.after, after=change.before)
        assert mutation.compiles(broken := change.apply(SOURCE)) and broken != SOURCE
        assert undo.apply(broken) == SOURCE
        with pytest.raises(ValueError, match=f"line {change.line} of f.py is"):
            undo.apply(SOURCE)


@pytest.mark.parametrize(
    "source", [b"x = 1 < 2\n", b"def f(:\n", b"\xff", b"def f():\n    \x0cx = 1\n\x0c\n", b""]
)
def test_what_has_no_mutations(source):
    assert mutation.mutations("f.py", source) == []


def test_characters_of_several_bytes_and_line_ends_stay():
    source = "def f(x):\r\n    return 'é' * 3 == x\r\n".encode()
    after = {change.apply(source) for change in mutation.mutations("f.py", source)}
    assert "def f(x):\r\n    return 'é' * 3 != x\r\n".encode() in after


@pytest.mark.parametrize(
    ("test", "after"),
    [
        ("assert f() == 3", "assert f() == 4"),
        ("assert f() == 'a' and g() == b'a'", "assert f() == 'ax' and g() == (b'a', 0)"),
        ("assert f() == [1]", "assert f() == [1, 0]"),
        ("assert f() == (1, 2), 'why'", "assert f() == (1, 2, 0), 'why'"),
        ("assert f() == True", "assert f() == False"),
        ("assert 3 == f()", "assert 3 == (f(), 0)"),
        ("self.assertEqual(f(), {1: 2})", "self.assertEqual(f(), ({1: 2}, 0))"),
        ("assert f()", "assert f()\n    raise AssertionError('altered')"),
        ("assert f() != 3", "assert f() != 3\n    raise AssertionError('altered')"),
    ],
)
def test_the_alteration_of_a_test(test, after):
    found = alteration.altered(f"def test_f():\n    {test}".encode()).decode()
    assert found == f"def test_f():\n    {after}"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import re, math\nfrom pocket import core\nfrom . import core", None),
        ("import os", "imports os"),
        ("import os.path as re", "imports os.path"),
        ("from sys import modules as m", "imports sys"),
        ("import warnings\nwarnings.sys", "uses sys"),
        ("import enum\nenum._sys", "uses _sys"),
        ("from collections import _sys", "uses _sys"),
        ("def f(x): return x.__globals__", "uses __globals__"),
        ("getattr(1, 'real')", "uses getattr"),
        ("class A:\n    def __eq__(self, other): return True", "uses __eq__"),
        ("class A:\n    __eq__ = lambda a, b: True", "uses __eq__"),
        ("try:\n    f()\nexcept BaseException: pass", "uses BaseException"),
        ("x = eval", "uses eval"),
        ("# -*- coding: utf-7 -*-\n+AGkAbQBwAG8AcgB0ACAAbwBz-", "imports os"),
        ("x =", "is no Python"),
        ("x = '\0'", "is no Python"),
    ],
)
def test_the_guard(code, reason):
    found = guard.refusal(b"", code.encode(), {"pocket"})
    assert (found or "").startswith(reason or "") and (found is None) == (reason is None)
    assert guard.refusal(code.encode(), code.encode(), {"pocket"}) is None or "no Py" in reason


def test_what_cannot_be_parsed_is_refused_in_a_sandbox(folder, monkeypatch):
    repository, _ = load(str(folder), pocket.NAME)
    crash = "\nimport os\nos.abort()\n"
    for source in (b"x = " + b"(" * 100_000, b"-" * 3_000_000 + b"1", b"x = '\\udcff\xff'"):
        files = repository.with_sources({"pocket/__init__.py": source})
        assert judge.refusal(repository, files) is not None
    files = repository.with_sources({"pocket/__init__.py": b"x = 1", "pocket/core.py": b"y = 2"})
    assert judge.refusal(repository, files) is None
    monkeypatch.setattr(judge, "GUARD", crash)
    assert judge.refusal(repository, files) == "the changed files cannot be parsed"


# --- what is wrong with a task ---


def changed(task, **fields):
    return dataclasses.replace(task, answer={**task.answer, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": "no/where"}, "no repository 'pocket-1.0' in 'no/where'; valid: none"),
        ({"repository": "purse-1"}, "no repository 'purse-1' in"),
        ({"repository": 3}, "answer: repository=3 must be str"),
        ({"sha256": "0"}, "answer: sha256='0' must be '"),
        ({"more": 1}, "must have folder, repository, sha256, mutation, fail_to_pass"),
        ({"mutation": {}}, "answer: mutation must have after, before, file, line"),
        ({"mutation": {**pocket.BROKEN, "line": 8}}, "line 8 of pocket/core.py is '    return fo"),
        ({"mutation": {**pocket.BROKEN, "file": "setup.py"}}, "'setup.py' is no source file of"),
        ({"fail_to_pass": ["test_x"]}, "fail_to_pass: 'test_x' is no test that can be judged"),
        ({"fail_to_pass": []}, "0 fail_to_pass and 18 pass_to_pass must make 22"),
        ({"pass_to_pass": 1}, "4 fail_to_pass and 1 pass_to_pass must make 22"),
    ],
)
def test_a_bad_task_is_named_with_its_value(task, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        environment.check([task, changed(task, **fields)])
    assert str(error.value).startswith(f"task {task.id!r}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests/test_core.py": None}, "has no tests"),
        ({"pocket/core.py": None, "pocket/__init__.py": None}, "has no Python sources"),
        ({"PKG-INFO": None}, "has no PKG-INFO"),
        ({"data": "x" * (9 << 20)}, "bytes, at most 8388608"),
    ],
)
def test_what_is_no_source_distribution_with_tests_is_refused(tmp_path, change, message):
    files = {p: t for p, t in (pocket.FILES | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        read_sdist(pocket.write_sdist(tmp_path / "pocket-1.0.tar.gz", files))


def test_a_distribution_that_has_changed_is_refused(tmp_path):
    pocket.make_folder(tmp_path)
    sdist = tmp_path / "sdists" / "pocket-1.0.tar.gz"
    pocket.write_sdist(sdist, pocket.FILES | {"README": "another"})
    with pytest.raises(ValueError, match="its sha256 is"):
        load(str(tmp_path), pocket.NAME)
    with pytest.raises(ValueError, match="'nothing' is not installed"):
        make_environment(tmp_path, ["nothing"])


def test_tests_that_fail_or_change_make_no_tasks(folder, tmp_path):
    few = pocket.FILES | {"tests/test_core.py": "def test_one(): pass\n"}
    with pytest.raises(ValueError, match="1 of 1 tests pass, at least 10 must"):
        tasks.record(folder, pocket.write_sdist(tmp_path / "few-1.tar.gz", few))
    chance = "import random\ndef test_chance(): assert random.random() < 0.5\n" * 1
    chance += "".join(f"def test_{n}(): assert random.random() < 0.5\n" for n in range(60))
    with pytest.raises(ValueError, match="its tests are not the same in two runs"):
        tasks.record(
            folder,
            pocket.write_sdist(
                tmp_path / "some-1.tar.gz", pocket.FILES | {"tests/test_core.py": chance}
            ),
        )
