"""Judge code: what passes, what does not, and that nothing an answer does gets it a pass or reaches the host.

Where the sandbox cannot be had (no Linux on x86_64, no user namespaces), the same tests check that it is refused.
"""

import importlib.util
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hfgen.judges import CodeJudge, extract_code
from hfgen.kit import judging, sandboxed, sandboxing
from hfgen.kit.sandboxing import Limits, SandboxError

MARK = os.getpid() / 1e8  # marks the processes of this run: their limits stand in their command line
TIGHT = Limits(cpu_seconds=1, wall_seconds=20 + MARK, memory_mb=128)
HOGGED = Limits(cpu_seconds=1, wall_seconds=1.2 + MARK, memory_mb=128, processes=3)
TESTS = "for n in range(2, 6):\n    r = f(n)\n    assert r == n * n, r\n"
SQUARE = "def f(n):\n    return n * n\n"
SECRET = "hf_THISISSECRET"


def _available():
    try:
        sandboxing.verify(Limits())
    except SandboxError:
        return False
    return True


AVAILABLE = _available()


def outcome(code, tests=TESTS, limits=TIGHT):
    """The sandbox's verdict; where there is none, that it is refused in words, and None."""
    if AVAILABLE:
        return sandboxing.run(code, tests, limits)
    with pytest.raises(SandboxError, match="cannot be run safely here.*user namespaces"):
        sandboxing.verify(limits)
    return None


def passes(code, tests=TESTS, limits=TIGHT):
    found = outcome(code, tests, limits)
    assert found is None or found == sandboxing.Outcome(True), found


def fails(code, tests=TESTS, limits=TIGHT, reason=""):
    found = outcome(code, tests, limits)
    if found is not None:
        assert not found.passed and found.reason and reason in found.reason, found
        assert SECRET not in found.reason
    return "" if found is None else found.reason


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """Afterwards no process of the run is left, the environment and a file that anybody may write are as before."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    canary.chmod(0o666)
    before, descriptors = dict(os.environ), len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    yield
    assert canary.read_text() == SECRET and {**os.environ, "PYTEST_CURRENT_TEST": ""} == {
        **before, "PYTEST_CURRENT_TEST": ""
    }  # fmt: skip
    assert remaining() == []
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors


def remaining():
    """Processes of this run's sandboxes; those the kernel is still taking down get a moment."""
    for _ in range(100):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if any(f'"wall_seconds": {w + MARK}'.encode() in path.read_bytes() for w in (20, 1.2, 0.5)):
                    found.append(path.parent.name)
            except OSError:  # gone meanwhile
                continue
        if not found:
            break
        time.sleep(0.02)
    return found


# --- what passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (SQUARE, TESTS),
        (SQUARE, "def check(candidate):\n    assert candidate(3) == 9\ncheck(f)"),
        ("def f(*a, **k):\n    return (a, k)", "assert f(1, [2], x={3: {4}}) == ((1, [2]), {'x': {3: {4}}})"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert sum(f(4)) == 6"),
        ("import math\ndef f(n):\n    return math.factorial(n)", "import math\nassert f(2000) == math.factorial(2000)"),
        ("import math\ndef f(n):\n    return math.sqrt(n)", "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)"),
        ("def f():\n    return [b'a', bytearray(b'b'), 1j, None, True, -0.5, 'é', (), frozenset({1})]",
         "assert f() == [b'a', bytearray(b'b'), 1j, None, True, -0.5, 'é', (), frozenset({1})]\n"
         "assert [type(x).__name__ for x in f()[:2]] == ['bytes', 'bytearray']"),
        ("def f():\n    return float('nan'), float('inf')", "a, b = f()\nassert a != a and b > 1e308"),
        ("from collections import Counter, OrderedDict, deque\ndef f(x):\n    return Counter(x)\n"
         "def g():\n    return OrderedDict(a=1), deque([1, 2])",
         "assert f('aab') == {'a': 2, 'b': 1}\nd, q = g()\nassert d == {'a': 1} and list(q) == [1, 2] and len(q) == 2"),
        ("class Stack:\n    def __init__(self):\n        self.x = []\n    def push(self, v):\n        self.x.append(v)\n"
         "    def pop(self):\n        return self.x.pop()\n    def __str__(self):\n        return 'stack'",
         "s = Stack()\ns.push(1)\ns.push('b')\nassert s.pop() == 'b' and s.x == [1] and str(s) == 'stack' and s"),
        ("def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x",
         "try:\n    f(-1)\n    assert False\nexcept ValueError as exc:\n    assert 'negative' in str(exc)"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef f(p):\n    return p.x",
         "assert f(P(3)) == 3"),
        ("import re, json, itertools, heapq, bisect, string, random, datetime, decimal\ndef f():\n    return re.sub('a', 'b', 'aa')",
         "assert f() == 'bb'"),
        (SQUARE + "if __name__ == '__main__':\n    print(f(int(input())))", TESTS),
        ("def f(p):\n    open('x', 'w').write(p)\n    return open('x').read()", "assert f('text') == 'text'"),
        ("import os\nline = b'passed ' * 150_000\nfor i in range(1024):\n    os.write(1 + i % 2, line)\n" + SQUARE, TESTS),  # 1 GB
    ],
)  # fmt: skip
def test_right_answers_pass(code, tests):
    passes(code, tests)


@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        ("def f(n):\n    return n", TESTS, "AssertionError: 2"),
        ("def f(n)\n    return n * n", TESTS, "SyntaxError"),
        ("", TESTS, "NameError: name 'f' is not defined"),
        ("def f(n):\n    return 1 / 0", TESTS, "ZeroDivisionError: division by zero"),
        ("class E(Exception):\n    pass\ndef f(n):\n    raise E('own')", TESTS, "Answer: E: own"),
        ("import numpy", TESTS, "ModuleNotFoundError"),
        ("def f(n):\n    return f(n)", TESTS, "RecursionError"),
        ("def f():\n    return []", "for v in f():\n    assert v == 1", "no assert was run"),
        ("def f(x):\n    return x(2)", "assert f(lambda n: n * n) == 4", "only plain data can be given"),
        ("class P:\n    pass\ndef f():\n    return P()", "assert f() == f()", "AssertionError"),
    ],
)
def test_wrong_answers_fail_with_a_reason(code, tests, reason):
    fails(code, tests, reason=reason)


# --- attacks: to pass without an answer ---------------------------------------------------------------------------

FORGERS = {
    "exit": "import sys\nsys.exit(0)",
    "exit in the function": "import sys\ndef f(n):\n    sys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "_exit in the function": "import os\ndef f(n):\n    os._exit(0)",
    "prints passed": "print('passed')\nprint('OK')\nimport os\nos._exit(0)",
    "the nonce's form on every descriptor": (
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'0123456789abcdef' * 2)\n    except OSError:\n"
        "        pass\nos._exit(0)"
    ),
    "the nonce's form, framed": (
        "import os, struct\nfor x in (b'true', b'{\"value\": [\"f\"]}', b'{\"value\": 4}') * 9:\n"
        "    os.write(4, struct.pack('I', len(x)) + x)\nos._exit(0)"
    ),
    "equal to everything": (
        "class A:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\n    def __ne__(self, o):\n"
        "        return False\n    def __bool__(self):\n        return True\ndef f(n):\n    return A()"
    ),
    "an int equal to everything": (
        "class A(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\ndef f(n):\n    return A(7)"
    ),
    "frames": (
        "import sys\ndef f(n):\n    frame = sys._getframe()\n    while frame:\n        for v in list(frame.f_locals.values()):\n"
        "            if isinstance(v, dict) and 'nonce' in v:\n                print(v['nonce'])\n        frame = frame.f_back\n"
        "    return f"
    ),
    "gc": (
        "import gc\ndef f(n):\n    found = [o for o in gc.get_objects() if isinstance(o, dict) and ('nonce' in o or 'tests' in o)]\n"
        "    return [o.get('tests') for o in found if isinstance(o.get('tests'), str)]"
    ),
    "builtins": (
        "import builtins\nfor n in ('AssertionError', 'range', 'isinstance', 'len', 'abs', 'all', 'any', 'compile'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\ndef f(n):\n    return None"
    ),
    "json and os": (
        "import sys, json, os, struct\nm = sys.modules['__main__']\n"
        "for n in list(vars(m)):\n    if n.isupper() and isinstance(vars(m)[n], int):\n        setattr(m, n, 0)\n"
        "m.check = m.main = lambda *a: (0, 'passed')\njson.loads = lambda *a, **k: {}\ndef f(n):\n    return 0"
    ),
    "trace": (
        "import sys\ndef trace(frame, event, arg):\n    frame.f_globals['r'] = 1\n    return trace\nsys.settrace(trace)\n"
        "def f(n):\n    return 0"
    ),
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemExit(0)",
    "defines what the tests use": "range = lambda *a: []\ndef f(n):\n    return 0",
    "fails like a pass": "def f(n):\n    raise SystemExit(0)",
    "ends the tests' loop": "def f(n):\n    raise StopIteration",
    "generator exit": "def f(n):\n    raise GeneratorExit",
    "interrupts": "def f(n):\n    raise KeyboardInterrupt",
    "marks of the checker": "__hfgen_ran__ = 1\n__name__ = 'tests'\nr = 4\nn = 2\ndef f(n):\n    return 1",
    "infinite data": "def f(n):\n    x = []\n    x.append(x)\n    return x",
    "deep data": "def f(n):\n    x = []\n    for _ in range(10**5):\n        x = [x]\n    return x",
    "broken messages": (
        "import os, struct\ndef f(n):\n    for x in (b'[', b'{}', b'[1]', b'{\"value\": {\"set\": [[]]}}', b'\\xff', b'[' * 10**5):\n"
        "        os.write(4, struct.pack('I', len(x)) + x)"
    ),
    "huge message": "import os, struct\nos.write(4, struct.pack('I', 2**32 - 1) + b'x' * 60_000)\ndef f(n):\n    return n",
    "huge value": "def f(n):\n    return 'x' * 5_000_000",
    "errors that cannot be told": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\ndef f(n):\n    raise E"
    ),
    "the harness's exit codes": "import os\ndef f(n):\n    os._exit(77)",
    "unhashable names": "globals()[5] = 1\nimport sys\nsys.modules['answer'].__dict__[()] = []\ndef f(n):\n    return 0",
}


@pytest.mark.parametrize("name", FORGERS)
def test_no_forger_passes(name):
    fails(FORGERS[name])


def test_what_the_answer_can_see_of_the_tests_are_their_inputs():
    code = (
        "import sys, gc\nseen = []\ndef f(n):\n    seen.append(n)\n    return 4\ndef log():\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))]\n"
        "    return seen, '_'.join(['EXPECTED', '17']) in repr(texts), sys.argv[1:], sys.path, sorted(sys.modules['__main__'].__dict__)"
    )
    reason = fails(code, "f(2)\nx = 'EXPECTED_17'\nassert False, log()")
    assert not AVAILABLE or "AssertionError: ([2], False, " in reason


def test_tests_of_the_answers_own_words_are_its_own():
    """`isclose` was not imported by the tests: a module is taken from Python, a bare name cannot be."""
    fake = "class math:\n    isclose = lambda *a, **k: True\ndef f(n):\n    return 0"
    fails(fake, "assert math.isclose(f(2), 4)")
    fails("def abs(x):\n    return 0\ndef f(n):\n    return 9", "assert abs(f(2) - 4) < 1e-6", reason="redefines abs")


# --- attacks: on the host -----------------------------------------------------------------------------------------

_TRY = "def tried(*actions):\n    done = []\n    for i, a in enumerate(actions):\n        try:\n            done.append((i, a()))\n        except (OSError, MemoryError, ValueError) as exc:\n            pass\n    return done\n"

BREAKOUTS = {  # f gives a list of what worked
    "files outside": (
        "def w(p):\n    with open(p, 'a') as file:\n        return file.write('x')\ndef f(n):\n    return tried(*[lambda p=p: w(p) for p in "
        "('/x', '/etc/x', '/usr/lib/x', '/root/x', '/home/x', '/var/tmp/x', '/dev/shm/x', 'CANARY', '../../x/y', '/proc/1/mem')])"
    ),
    "secrets in files": (
        "def f(n):\n    return tried(*[lambda p=p: open(p).read() for p in ('CANARY', '/etc/passwd', '/proc/self/environ', "
        "'/proc/1/environ', '/proc/PARENT/environ', '/proc/PARENT/mem', '/proc/PARENT/cmdline', '/root/.cache/huggingface/token')])"
    ),
    "secrets in the environment": (
        "import os, ctypes\ndef f(n):\n    own = [x for x in os.environ if x != 'LC_CTYPE']\n"
        "    return own + [x for x in ('HF_TOKEN', 'PATH', 'HOME') if ctypes.CDLL(None).getenv(x.encode())]"
    ),
    "network": (
        "import socket\ndef s(*a):\n    return socket.socket(*a)\ndef f(n):\n    return tried(s, lambda: s(socket.AF_UNIX), "
        "lambda: s(socket.AF_INET, socket.SOCK_RAW), lambda: s(40), lambda: s(16, 3), lambda: socket.create_connection(('127.0.0.1', 22), 1),"
        " lambda: socket.getaddrinfo('example.org', 80))"
    ),
    "kill": (
        "import os, signal\ndef f(n):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    return tried(lambda: os.kill(PARENT, 9), "
        "lambda: os.killpg(PARENT, 9), lambda: os.kill(2, 9), lambda: os.kill(-1, 9), lambda: os.setpriority(os.PRIO_PROCESS, PARENT, 19))"
    ),
    "processes": (
        "import os, subprocess, threading\ndef t():\n    try:\n        threading.Thread(target=print).start()\n    except RuntimeError:\n"
        "        raise OSError\ndef f(n):\n    return tried(os.fork, t, lambda: os.execv('/bin/sh', ['sh']), "
        "lambda: subprocess.run(['/bin/true']), lambda: os.posix_spawn('/bin/sh', ['sh'], {}), lambda: os.system('true') == 0 or 1 / int(0 or '0x' and 1) and open('/no'))"
    ),
    "system calls": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef c(*a):\n    if libc.syscall(*a) < 0:\n"
        "        raise OSError\n    return a\ndef f(n):\n    return tried(*[lambda a=a: c(*a) for a in ((101, 0, 0, 0, 0), (101, 16, PARENT, 0, 0), "
        "(272, 0x10000000), (308, 3, 0), (165, 0, b'/tmp', b'tmpfs', 0, 0), (29, 0, 1 << 20, 0o1600), (319, b'm', 0), (41, 40, 1, 0), "
        "(435, 0, 0), (56, 0x10000011, 0, 0, 0, 0), (56, 0x20000011, 0, 0, 0, 0), (310, PARENT, 0, 0, 0, 0, 0), (434, PARENT, 0), (105, 0), "
        "(106, 0), (161, b'/tmp'), (155, b'.', b'.'), (425, 8, 0), (321, 0, 0, 0), (170, b'h', 1), (133, b'n', 0o60600, 0), "
        "(0x40000000 + 39,))])"
    ),
    "limits up": (
        "import resource\ndef up(k):\n    resource.setrlimit(k, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\ndef f(n):\n"
        "    return tried(*[lambda k=k: up(getattr(resource, k)) for k in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', "
        "'RLIMIT_NOFILE', 'RLIMIT_CORE')])"
    ),
    "links": (
        "import os\ndef r(p, to):\n    os.symlink(to, p)\n    with open(p) as file:\n        return file.read()\ndef f(n):\n    return tried("
        "lambda: r('a', 'CANARY'), lambda: r('b', '/etc/passwd'), lambda: r('c', '../' * 20 + 'etc/passwd'), lambda: os.link('CANARY', 'd'), "
        "lambda: r('e', '/proc/self/root/etc/passwd'), lambda: os.mknod('k', 0o60666, os.makedev(254, 0)))"
    ),
    "10 GB": (
        "import mmap\ndef many():\n    held = []\n    while len(held) < 10_000:\n        held.append(bytearray(1 << 20))\n    return 'got'\n"
        "def f(n):\n    return tried(lambda: len(bytearray(10 << 30)), many, lambda: len(mmap.mmap(-1, 10 << 30)), lambda: len('x' * (10 << 30)))"
    ),
    "full disk": (
        "import os\ndef one():\n    with open('big', 'wb') as file:\n        file.seek(10 << 30)\n        file.write(b'x')\n"
        "def many():\n    for i in range(500):\n        with open(str(i), 'wb') as file:\n            file.write(bytes(1 << 20))\n    return i\n"
        "def empty():\n    for i in range(500):\n        open(f'e{i}', 'w').close()\n    return i\ndef fds():\n"
        "    return [os.open('.', 0) for _ in range(100)]\ndef f(n):\n    return tried(one, many, empty, fds)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKOUTS)
def test_nothing_gets_out(name, tmp_path):
    code = _TRY + BREAKOUTS[name].replace("CANARY", str(tmp_path / "canary")).replace("PARENT", str(os.getpid()))
    reason = fails(code, "r = f(1)\nassert r != [], 'nothing worked'\nassert False, r")
    assert not AVAILABLE or reason == "AssertionError: nothing worked", reason


HOGS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "loop that catches": "def f(n):\n    while True:\n        try:\n            f(n)\n        except BaseException:\n            pass",
    "daemon that outlives": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True:\n            time.sleep(1)\n"
        "    os._exit(0)\nos._exit(0)"
    ),
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\ndef f(n):\n    return n",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1)",
    "huge integer": "def f(n):\n    return 10 ** 10 ** 10",
    "many lists": "def f(n):\n    x = [0]\n    while True:\n        x += x",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "infinite generator": "def f(n):\n    while True:\n        yield 1",
}


@pytest.mark.parametrize("name", HOGS)
def test_hogs_are_stopped(name):
    """With three processes allowed, so that those which fork can."""
    start = time.monotonic()
    fails(HOGS[name], "assert list(f(2)) == [1]" if "generator" in name else TESTS, HOGGED)
    assert time.monotonic() - start < 1.2 + sandboxing._GRACE


def test_a_loop_ends_with_its_processor_time():
    fails("while True:\n    pass", reason="the answer ended its process, or a limit did")


def test_sleep_ends_with_the_wall_time():
    limits = Limits(wall_seconds=0.5 + MARK)
    fails("import time\ndef f(n):\n    time.sleep(60)", limits=limits, reason="not done after 0.5")


def test_a_sandbox_whose_parent_dies_ends_by_itself(run_python):
    if not AVAILABLE:
        return outcome(SQUARE)
    code = (
        "import os, threading, time\nfrom hfgen.kit.sandboxing import *\n"
        f"limits = Limits(wall_seconds=1.5 + {os.getpid()} / 1e8)\n"
        "threading.Timer(0.5, lambda: os._exit(7)).start()\nrun('while True:\\n    __import__(\"time\").sleep(1)', 'assert f()', limits)"
    )
    assert run_python(code, check=False).returncode == 7
    mark = f'"wall_seconds": {1.5 + os.getpid() / 1e8}'.encode()
    for _ in range(100):
        alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark in _bytes(p)]
        if not alive:
            return None
        time.sleep(0.05)
    raise AssertionError(alive)


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


# --- the walls, one by one ----------------------------------------------------------------------------------------


def test_the_seccomp_program_decides_as_it_should():
    """An interpreter of the few BPF instructions used, against the list."""

    def decide(number, arch=sandboxed._ARCH, flags=0, network=False, processes=2):
        program, at, value = sandboxed.system_call_filter(network, processes), 0, None
        while True:
            code, yes, no, k = program[at]
            if code == 0x06:
                return k
            if code == 0x20:
                value = {0: number, 4: arch, 16: flags}[k]
            else:
                holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
                at += yes if holds else no
            at += 1

    allowed, refused, missing = 0x7FFF0000, 0x00050001, 0x00050026
    for number in range(500):
        expected = refused if number in (*sandboxed._DENIED, 41) else missing if number == 435 else allowed
        assert decide(number) == expected, number
    assert decide(41, network=True) == allowed and decide(59, network=True) == refused
    assert [decide(n, processes=1) for n in (56, 57, 58, 435, 59, 1)] == [refused] * 3 + [missing, refused, allowed]
    assert decide(56, flags=0x11) == allowed and decide(56, flags=0x10000011) == refused
    assert decide(0x40000000 + 39) == refused and decide(39, arch=0x40000003) == 0x80000000
    assert len(set(sandboxed._DENIED)) == len(sandboxed._DENIED)


def test_plain_data_survive_the_way(tmp_path):
    held = []

    def hold(value):
        held.append(value)
        return len(held) - 1

    values = [
        None,
        True,
        2**53,
        -(2**70),
        0.1,
        "\ud800\0é",
        [()],
        {1: {2}, (3,): frozenset({4})},
        b"\0",
        1j,
        {"set": [1]},
        object(),
    ]
    for value in values:
        back = sandboxed.decode(json.loads(json.dumps(sandboxed.encode(value, hold))), held.__getitem__)
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize("missing", ["unshare", "mount", "capset", "prctl"])
def test_a_wall_that_cannot_be_built_is_refused_in_words(monkeypatch, tmp_path, missing):
    """The script with one libc function failing: no verdict is given."""
    if not AVAILABLE:
        return outcome(SQUARE)
    source = Path(sandboxed.__file__).read_text()
    broken = tmp_path / "sandboxed.py"
    broken.write_text(
        source.replace(
            "def call(what, name, *args):",
            f"def call(what, name, *args):\n    if name == {missing!r}:\n        raise NoSandbox(what + ': no')",
        )
    )
    monkeypatch.setattr(sandboxing, "_SCRIPT", broken)
    with pytest.raises(
        SandboxError, match="cannot be run safely here: the sandbox cannot be had: .*: no; it takes Linux 5.12"
    ):
        sandboxing.run(SQUARE, TESTS, TIGHT)
    return None


def test_a_script_that_breaks_gives_no_verdict(monkeypatch, tmp_path):
    if not AVAILABLE:
        return outcome(SQUARE)
    broken = tmp_path / "sandboxed.py"
    monkeypatch.setattr(sandboxing, "_SCRIPT", broken)
    for source in ("raise SystemError('no')", "import nothing_of_that_name", "(", None):
        if source is not None:
            broken.write_text(source)
        else:
            broken.unlink()
        with pytest.raises(
            SandboxError,
            match=r"(?s)cannot be run safely here: .*(SystemError: no|nothing_of_that_name|never closed|open file)",
        ):
            sandboxing.run(SQUARE, TESTS, TIGHT)
    return None


@pytest.mark.parametrize(
    ("wall", "holes"),
    [  # two where there are two walls
        ("processes", {'("NPROC", processes),': "", "(() if processes > 1 else (_CLONE, *_FORKS))": "()"}),
        ("memory", {'("AS", limits["memory_bytes"]),': ""}),
        ("network", {"(() if network else _SOCKET)": "()", '(0 if limits["network"] else NEWNET)': "0"}),
        ("files", {'"QQQQ", _RDONLY |': '"QQQQ",', "mode=755": "mode=777"}),
        ("environment", {"    os.setsid()  #": "    os.environ['HF_TOKEN'] = 'x'  #"}),
    ],
)
def test_a_wall_with_a_hole_is_found(monkeypatch, tmp_path, wall, holes):
    """`verify` tries every wall: without one of them the judge is refused, before anything has run."""
    if not AVAILABLE:
        return outcome(SQUARE)
    source = Path(sandboxed.__file__).read_text()
    for whole, hole in holes.items():
        assert source.count(whole) == 1
        source = source.replace(whole, hole)
    broken = tmp_path / "sandboxed.py"
    broken.write_text(source)
    monkeypatch.setattr(sandboxing, "_SCRIPT", broken)
    with pytest.raises(SandboxError, match="the walls that hold are only: AssertionError: ") as caught:
        sandboxing.verify(Limits(memory_mb=64, wall_seconds=20 + MARK + len(wall) / 1e3))
    assert f"'{wall}'" not in str(caught.value)
    return None


def test_other_systems_are_refused(monkeypatch):
    for system, machine in (("darwin", "x86_64"), ("linux", "aarch64")):
        monkeypatch.setattr(sandboxing.sys, "platform", system)
        monkeypatch.setattr(sandboxing.platform, "machine", lambda m=machine: m)
        with pytest.raises(SandboxError, match=f"this is {system} on {machine}; it takes Linux"):
            sandboxing.verify(Limits(files=17))


# --- the judge ----------------------------------------------------------------------------------------------------


def judge(**options):
    """The judge, or None where it is refused."""
    if AVAILABLE:
        return CodeJudge(allow_code_execution=True, **options)
    with pytest.raises(SandboxError, match="user namespaces"):
        CodeJudge(allow_code_execution=True, **options)
    return None


def test_refused_without_the_flag():
    for options in ({}, {"allow_code_execution": False}):
        with pytest.raises(
            ValueError, match="allow_code_execution is False; judge code executes .* give allow_code_execution=True"
        ):
            judging.resolve_judge("code", options)
    with pytest.raises(TypeError, match="allow_code_execution is 'true'"):
        CodeJudge(allow_code_execution="true")


def test_the_judge_reads_answers_and_columns():
    made = judge(tests="test_list")
    if made is None:
        return
    mbpp = {
        "test_list": ["assert f(2) == 4", "assert math.floor(f(3)) == 9"],
        "test_imports": ["import math"],
        "task_id": 5,
    }
    answer = f"Here it is:\n```python\n{SQUARE}```\nIt is called so:\n```\nf(3)\n```"
    assert made("q", answer, None, **mbpp) is True and made("q", SQUARE, "gold", **mbpp) is True
    assert made("q", answer.replace("n * n", "n + n"), None, **mbpp) is False
    setup = {"test_list": "assert g(Node(3)) == 3", "test_setup_code": ""}
    assert made(
        "q", "class Node:\n    def __init__(self, v):\n        self.v = v\ndef g(n):\n    return n.v", None, **setup
    )
    human = {"test_list": "def check(candidate):\n    assert candidate(3) == 9", "entry_point": "f"}
    assert made("q", SQUARE, None, **human) and not made("q", "def f(n):\n    return 1", None, **human)
    found = made.explain("q", "def f(n):\n    return 1", None, **human)
    assert not found.passed and found.reason.startswith("AssertionError")
    assert not made.explain("q", "#" * 300_000, None, **human).passed


def test_extract_code():
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("a\n```\nx\n```\n```py\ny\n```\n```python\nz\n```") == "y\n"
    assert extract_code("```Python title=a\nx\n```") == "x\n" and extract_code("``` \nx\n") == "``` \nx\n"
    started = time.process_time()
    extract_code("```python\n" * 50_000)
    assert time.process_time() - started < 2


def test_several_are_judged_at_a_time_in_their_order(monkeypatch):
    made = judge(workers=3)
    if made is None:
        return
    answers = [SQUARE if i % 3 else "def f(n):\n    return n" for i in range(9)]
    calls = [("q", a, None, {"tests": TESTS}, i) for i, a in enumerate(answers)]
    threads = []
    monkeypatch.setattr(ThreadPoolExecutor, "__init__", _listing(ThreadPoolExecutor.__init__, threads))
    assert judging.scores(made, calls) == [0, 1, 1] * 3 and threads == [3]
    with pytest.raises(ValueError, match=r"raised ValueError: column 'tests' is missing or empty.* on row 4; mend"):
        judging.scores(made, [c if c[4] != 4 else (*c[:3], {"other": 1}, 4) for c in calls])
    assert judging.describe(made) == judging.describe(judge(workers=1)) != judging.describe(judge(memory_mb=256))


def _listing(original, found):
    def init(self, workers, *args, **kwargs):
        found.append(workers)
        original(self, workers, *args, **kwargs)

    return init


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({}, ValueError, "column 'tests' is missing or empty.*the row has no columns"),
        ({"tests": [" "], "b": 1}, ValueError, "missing or empty.*the row has b, tests"),
        ({"tests": 5}, TypeError, "column 'tests' holds 5; give a text or a list of texts"),
        ({"tests": ["assert True", 5]}, TypeError, "column 'tests' holds"),
        ({"tests": "assert ("}, ValueError, "the tests are no Python: .*; give Python code with at least one assert"),
        ({"tests": "f(3)"}, ValueError, "the tests hold no assert"),
        ({"tests": "assert 1" + " " * 300_000}, ValueError, "holds 300008 characters"),
        ({"tests": "assert 1", "test_imports": 5}, TypeError, "column 'test_imports' holds 5"),
    ],
)
def test_rows_that_cannot_be_judged(columns, error, message):
    made = judge()
    if made is not None:
        with pytest.raises(error, match=message):
            made("q", SQUARE, None, **columns)
        with pytest.raises(TypeError, match="reads an answer's text, not None"):
            made("q", None, None, tests="assert 1")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tests": ""}, TypeError, "CodeJudge.tests is ''"),
        ({"cpu_seconds": 0}, ValueError, "CodeJudge.cpu_seconds is 0"),
        ({"memory_mb": 1}, ValueError, "CodeJudge.memory_mb is 1; give an integer of at least 64"),
        ({"memory_mb": 1.5}, TypeError, "CodeJudge.memory_mb is 1.5"),
        ({"processes": 0}, ValueError, "CodeJudge.processes is 0"),
        ({"workers": True}, TypeError, "CodeJudge.workers is True"),
        ({"wall_seconds": 0}, ValueError, "CodeJudge.wall_seconds is 0"),
        ({"wall_seconds": float("inf")}, ValueError, "CodeJudge.wall_seconds is inf"),
        ({"allow_network": 1}, TypeError, "CodeJudge.allow_network is 1"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        CodeJudge(allow_code_execution=True, **options)


def test_throughput():
    """The bar is 20 a second on two cores; a tenth of it must be had on any machine, however busy."""
    made = judge()
    if made is not None:
        start = time.monotonic()
        assert judging.scores(made, [("q", SQUARE, None, {"tests": TESTS}, i) for i in range(20)]) == [1.0] * 20
        assert time.monotonic() - start < 10


def test_the_bench_at_toy_size(monkeypatch, tmp_path):
    """Its report's shape, and that it checks verdicts; no timing."""
    path = Path(__file__).parents[2] / "recipes" / "bench" / "judges.py"
    spec = importlib.util.spec_from_file_location("bench_judges", path)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_judges", bench)  # dataclasses look their module up
    spec.loader.exec_module(bench)
    with pytest.raises(RuntimeError, match="is wrong"):
        bench.judge_all(lambda prompt, answer, gold, tests: True, 2)
    if judge() is not None:
        out = tmp_path / "judges.json"
        monkeypatch.setattr(
            sys, "argv", ["judges.py", "--answers", "2", "--rounds", "1", "--workers", "2", "--out", str(out)]
        )
        bench.main()
        report = json.loads(out.read_text())
        assert set(report["answers_per_second"]) == {"code, 2 at a time", "bare start", "exact"}
        assert report["met"] == (report["answers_per_second"]["code, 2 at a time"]["median"] >= bench.BAR)
