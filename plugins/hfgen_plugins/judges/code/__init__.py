"""Judge `code`: the code in the answer passes the row's tests, in a sandbox (Linux on x86_64, opt-in)."""

import lazy_loader

from hfgen.card import MethodCard

CARD = MethodCard(
    name="code",
    kind="judges",
    summary="True when the Python code in the answer passes the row's tests; it runs in a sandbox, after an opt-in.",
    target="hfgen_plugins.judges.code.judge:CodeJudge",
    exports=("CodeJudge", "extract_code"),
    needs=(
        "allow_code_execution=True",
        "Linux 5.12 or later on x86_64 where user namespaces may be made; refused in words elsewhere",
        "a column of tests: Python with asserts, a text or a list of them (MBPP: tests='test_list')",
        "memory: up to twice memory_mb for each of `workers` judgements at a time",
    ),
    conflicts=(
        "answers that use third-party packages, start processes or threads, or read their input",
        "tests that give the answer functions or objects of their own, look at what it printed or at arguments that it "
        "changed in place: what the answer gets and gives is copied as plain data, and the answer counts as wrong",
        "tests that compare objects of a class that the answer defines: these equal only themselves",
        "tests that use a name of a helper without importing it: it is the answer's then, and proves nothing",
    ),
    defaults=(
        "CPU 5 s, 512 MiB, files of 1 MiB, 32 open files: our method sheet; wall time 10 s, one process and twice "
        "as many judgements at a time as there are cores, at most four: our choice"
    ),
    deviations=(
        "tests run in a process apart from the answer, which never sees them: an answer that changes its interpreter "
        "or returns an object equal to everything does not pass, nor does one whose values are no plain data",
        "output of the answer goes to /dev/null: none of it is kept",
        "holes of the kernel, and of tests that too many programs pass, are outside what it can hold",
    ),
    sources="none: namespaces, limits and seccomp from the Linux manual pages (from memory)",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"judge": ["CodeJudge", "extract_code"]})
