"""Zero-import pickup: the hook, its switches, every import order, and that it never harms an import."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures import dists
from tests.fixtures.venvs import LinkedVenv

ROOT = Path(__file__).parents[2]
IMPORTS = "import torch, peft, transformers\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved SVFit adapter of the sandbox model, with the sum of its logits."""
    import torch
    from peft import get_peft_model

    from hfgen import sandbox
    from hfgen.adapters import SVFitConfig

    out = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = sandbox.load_model().eval()
    base.save_pretrained(out / "base")
    base.config._name_or_path = base.name_or_path = str(out / "base")
    model = get_peft_model(
        base, SVFitConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(out / "adapter")
    with torch.no_grad():
        total = model.eval()(torch.arange(2, 12)[None]).logits.double().sum().item()
    (out / "sum.json").write_text(json.dumps(total))
    return out


# Each way runs in a fork of one process that has imported the hosts and never hfgen: what one way registers cannot help
# the next.
WAYS = """
import json, os, sys
import torch, peft, transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
assert not any(m.startswith('hfgen') for m in sys.modules), 'hfgen was imported'
folder, want = sys.argv[1], json.load(open(sys.argv[1] + '/sum.json'))
def total(model):
    with torch.no_grad():
        return model.eval()(torch.arange(2, 12)[None]).logits.double().sum().item()
ways = {
    'PeftConfig': lambda: type(PeftConfig.from_pretrained(folder + '/adapter')).__name__ == 'SVFitConfig',
    'PeftModel': lambda: total(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + '/base'), folder + '/adapter')) == want,
    'AutoPeftModel': lambda: total(AutoPeftModelForCausalLM.from_pretrained(folder + '/adapter')) == want,
    'AutoModel': lambda: total(AutoModelForCausalLM.from_pretrained(folder + '/adapter')) == want,
}
for name, way in ways.items():
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            print(name, way())
        except Exception as exc:
            print(name, type(exc).__name__, exc)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def run_ways(folder, tmp_path, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", WAYS, str(folder)],
        env={**os.environ, **env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(
        line.split(" ", 1)
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in ("PeftConfig", "PeftModel", "AutoPeftModel", "AutoModel")
    )


def test_four_of_four_without_importing_hfgen(folder, tmp_path):
    assert run_ways(folder, tmp_path) == dict.fromkeys(
        ("PeftConfig", "PeftModel", "AutoPeftModel", "AutoModel"), "True"
    )


@pytest.mark.parametrize("env", [{"HFGEN_AUTOLOAD": "0"}, {"HFGEN_BLOCK": "svfit"}, {"HFGEN_PLUGINS": "loldu"}])
def test_switched_off_it_is_the_hosts_own_error(folder, tmp_path, env):
    found = run_ways(folder, tmp_path, **env)
    assert set(found.values()) == {"KeyError 'SVFIT'"}, found


def test_a_broken_plugin_says_why_and_only_when_asked(folder, tmp_path, run_python):
    dists.make(tmp_path / "site", "stranger-x", "strangerx", impl="raise RuntimeError('boom')")
    dists.make(tmp_path / "site", "stranger-y", "strangery", card="raise RuntimeError('bang')")
    out = run_python(
        IMPORTS
        + f"""
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as M
import sys
assert 'LORA' in M and 'NOSUCH' not in M and not any(m.startswith('stranger') for m in sys.modules)
assert type(PeftConfig.from_pretrained({str(folder / "adapter")!r})).__name__ == 'SVFitConfig'
assert not any(m.startswith('stranger') for m in sys.modules), 'a plugin nobody asked for was imported'
for name in ('STRANGERX', 'STRANGERY'):
    try: M[name]
    except ValueError as exc: print(exc)
""",
        env={"PYTHONPATH": str(tmp_path / "site")},
    ).stdout
    assert "boom" in out and "bang" in out and "stranger-x 1.0" in out


ORDERS = {
    "explicit first": "from hfgen.adapters import SVFitConfig\nimport peft\n",
    "plugin's module first": "from hfgen_plugins.adapters.svfit import SVFitConfig\nSVFitConfig(r=1)\nimport peft\n",
    "lazy first": "import peft\npeft.PEFT_TYPE_TO_CONFIG_MAPPING['SVFIT']\nfrom hfgen.adapters import SVFitConfig\n",
    "host, then explicit": "import peft\nfrom hfgen.adapters import SVFitConfig\n",
    "quantizers before torch": "import transformers.quantizers.auto\nimport peft\nfrom hfgen.adapters import SVFitConfig\n",
    "peft.mapping first": "import peft.mapping\nfrom hfgen.adapters import SVFitConfig\n",
    "hook off, explicit": "import os; os.environ['HFGEN_AUTOLOAD'] = '0'\nimport peft\nfrom hfgen.adapters import SVFitConfig\n",
    "hook late": (
        "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nimport peft, sys\n"
        "assert 'SVFIT' not in peft.PEFT_TYPE_TO_CONFIG_MAPPING and '_hfgen_autoload' not in sys.modules\n"
        "import logging; logging.basicConfig(level='INFO')\nimport hfgen\n"
        "assert {'SVFIT', 'LOLDU'} <= set(peft.PEFT_TYPE_TO_CONFIG_MAPPING), 'not filled in place'\n"
        "from hfgen.adapters import SVFitConfig\n"
    ),
    "two threads": (
        "import peft, threading\nfound = []\n"
        "def lazy():\n found.append(peft.PEFT_TYPE_TO_CONFIG_MAPPING['SVFIT'])\n"
        "def explicit():\n from hfgen.adapters import SVFitConfig\n found.append(SVFitConfig)\n"
        "threads = [threading.Thread(target=t) for t in (lazy, explicit) * 4]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(found) == 8 and len(set(found)) == 1, found\nSVFitConfig = found[0]\n"
    ),
}
AFTER = """
import peft.config, peft.peft_model, peft.utils.hotswap, sys
import peft.mapping
M = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
assert M is peft.PEFT_TYPE_TO_CONFIG_MAPPING is peft.peft_model.PEFT_TYPE_TO_CONFIG_MAPPING
assert M is peft.utils.hotswap.PEFT_TYPE_TO_CONFIG_MAPPING, 'an upstream module holds another dict'
assert M['SVFIT'] is SVFitConfig and list(M).count('SVFIT') == 1
assert peft.PeftType('SVFIT').value == 'SVFIT' and SVFitConfig(r=1).peft_type is peft.PeftType.SVFIT
assert 'NOSUCH' not in M
try: M['NOSUCH']
except KeyError as exc: assert exc.args == ('NOSUCH',)
else: raise AssertionError('no KeyError')
"""


@pytest.mark.parametrize("order", ORDERS)
def test_every_import_order(order, run_python):
    done = run_python(ORDERS[order] + AFTER)
    if order == "hook late":
        assert (
            "registered adapters with an already imported host: increlora, intrinsic, loldu, sara, soma, svfit"
            in done.stderr
        )


SNAPSHOT = """
import json, sys
import torch, peft, transformers, trl
import peft.mapping, peft.utils.peft_types, transformers.quantizers.auto, transformers.integrations.peft
from peft import PeftType
if len(sys.argv) > 1: peft.PEFT_TYPE_TO_CONFIG_MAPPING['SVFIT']
def look(module):
    return {k: f'{type(v).__module__}.{type(v).__qualname__} {getattr(v, "__module__", "")}.{getattr(v, "__qualname__", "")}'
            for k, v in vars(module).items() if not k.startswith('__')}
modules = ['peft', 'peft.mapping', 'peft.mapping_func', 'peft.config', 'peft.peft_model', 'peft.utils', 'peft.utils.peft_types', 'peft.utils.save_and_load',
           'peft.tuners.tuners_utils', 'transformers.quantizers.auto', 'transformers.integrations.peft', 'trl']
out = {m: look(sys.modules[m]) for m in modules if m in sys.modules}
out['PeftType'] = sorted(PeftType.__members__)
for name in ('CONFIG', 'TUNER', 'PREFIX', 'MIXED_MODEL'):
    out[name] = sorted(k.value for k in getattr(peft.mapping, f'PEFT_TYPE_TO_{name}_MAPPING'))
print(json.dumps(out))
"""


def test_upstream_is_as_it_was(run_python):
    """Only PeftType's members and the mappings' content change (and the mapping is a dict subclass while the hook is on)."""
    off = json.loads(run_python(SNAPSHOT, env={"HFGEN_AUTOLOAD": "0"}).stdout)
    idle = json.loads(run_python(SNAPSHOT).stdout)
    used = json.loads(run_python(SNAPSHOT.replace("len(sys.argv) > 1", "True")).stdout)
    for seen, added in ((idle, set()), (used, {"SVFIT"})):
        for key in ("PeftType", "CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
            assert set(seen.pop(key)) - set(off[key]) == (added if key != "MIXED_MODEL" else set())
        for module, names in seen.items():
            changed = {k for k in names.keys() | off[module].keys() if names.get(k) != off[module].get(k)}
            assert changed <= {
                "PEFT_TYPE_TO_CONFIG_MAPPING",
                "AUTO_QUANTIZATION_CONFIG_MAPPING",
                "AUTO_QUANTIZER_MAPPING",
            }, (
                module,
                changed,
            )


def test_hfgen_broken_on_purpose(tmp_path, run_python):
    (tmp_path / "site" / "hfgen").mkdir(parents=True)
    (tmp_path / "site" / "hfgen" / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    done = run_python(
        IMPORTS + "try: peft.PEFT_TYPE_TO_CONFIG_MAPPING['SVFIT']\nexcept KeyError as exc: print(exc)",
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.stdout == "'SVFIT'\n" and "broken on purpose" in done.stderr


def test_a_target_that_is_half_way_through_when_the_hook_arrives(tmp_path, run_python):
    """The module that owns a mapping may itself be what imports torch first."""
    package = tmp_path / "site" / "halfway"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "owner.py").write_text(
        "import _hfgen_autoload as a\na._TARGETS['halfway.owner'] = ('adapters', ('MAP',))\na.install()\nMAP = {'a': 1}\n"
    )
    run_python(
        "import halfway.owner as o, sys\nassert type(o.MAP).__name__ == 'LazyMapping' and o.MAP['a'] == 1 and 'nosuch' not in o.MAP\n"
        "assert o.MAP.get('nosuch', 5) == 5 and not [w for w in sys.modules if w == 'torch']",
        env={"PYTHONPATH": str(tmp_path / "site")},
    )


@pytest.mark.slow
def test_wheel_editable_moved_clone_uninstalled(tmp_path, folder):
    """`import torch, peft, transformers` works in every state; pickup works whenever hfgen is there."""
    clone = tmp_path / "clone"
    shutil.copytree(
        ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "dist", ".hypothesis", "*_cache")
    )
    venv = LinkedVenv(tmp_path)
    ask = (
        IMPORTS
        + f"from peft import PeftConfig\nprint(type(PeftConfig.from_pretrained({str(folder / 'adapter')!r})).__name__)"
    )
    venv.run(IMPORTS)  # never installed
    venv.install(str(clone))
    assert venv.run(ask).stdout == "SVFitConfig\n"
    venv.pip("uninstall", "-q", "-y", "hfgen")
    assert "KeyError: 'SVFIT'" in venv.run(ask, check=False).stderr
    venv.run(IMPORTS)
    venv.install("-e", str(clone))
    assert venv.run(ask).stdout == "SVFitConfig\n"
    clone.rename(tmp_path / "moved")
    venv.run(IMPORTS)
    moved = venv.run(ask, check=False)
    assert "KeyError: 'SVFIT'" in moved.stderr and "reinstall it or set HFGEN_AUTOLOAD=0" in moved.stderr
    venv.pip("uninstall", "-q", "-y", "hfgen")
    venv.run(IMPORTS)
    assert not [f for f in venv.site.rglob("*hfgen*") if f.is_file()], "uninstalling leaves files behind"
