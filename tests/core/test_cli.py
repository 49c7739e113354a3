"""The commands that list and show: ls, show, env."""

import json
import subprocess
import sys

from tests.fixtures import dists


def hfgen(*arguments, check=True, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-m", "hfgen", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", **env},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_ls():
    out = hfgen("ls").stdout
    assert "svfit" in out and "loldu" in out and "s3ft" in out
    rows = json.loads(hfgen("ls", "--json").stdout)
    svfit = next(r for r in rows if r["name"] == "svfit")
    assert svfit["kind"] == "adapters" and svfit["status"] == "ok" and svfit["exports"] == ["SVFitConfig"]
    assert svfit["distribution"] == "hfgen" and svfit["file"].endswith("svfit/__init__.py")
    assert {r["kind"] for r in json.loads(hfgen("ls", "adapters", "--json").stdout)} == {"adapters"}


def test_ls_shows_what_is_broken_or_blocked(tmp_path):
    dists.make(tmp_path, "stranger-z", "strangerz", card="raise RuntimeError('boom')")
    rows = json.loads(hfgen("ls", "--json", PYTHONPATH=str(tmp_path), HFGEN_BLOCK="loldu").stdout)
    states = {r["name"]: (r["status"], r["reason"]) for r in rows}
    assert states["strangerz"] == ("broken", "RuntimeError: boom")
    assert states["loldu"] == ("blocked", "HFGEN_BLOCK names it") and states["svfit"][0] == "ok"
    assert "RuntimeError: boom" in hfgen("ls", PYTHONPATH=str(tmp_path)).stdout


def test_show():
    out = hfgen("show", "svfit").stdout
    for words in ("arXiv:2409.05926", "from hfgen.adapters import SVFitConfig", "installed by", "deviations"):
        assert words in out, words
    assert json.loads(hfgen("show", "s3ft", "--json").stdout)["claims"][0]["id"] == "less-forgetting"


def test_wrong_names_are_one_line_on_stderr():
    for arguments, words in (
        (("show", "svfitt"), "did you mean 'svfit'"),
        (("ls", "adapter"), "did you mean 'adapters'"),
    ):
        done = hfgen(*arguments, check=False)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_env():
    report = json.loads(hfgen("env", "--json", HFGEN_BLOCK="nothere").stdout)
    assert report["pickup"] == "on" and report["switches_naming_nothing"] == ["HFGEN_BLOCK=nothere"]
    hosts = {h["name"]: h for h in report["hosts"]}
    assert {"torch", "transformers", "peft", "trl", "accelerate", "datasets"} <= set(hosts)
    assert all(h["verdict"] == "supported" for h in hosts.values()), hosts
    assert hosts["peft"]["wants"] == "<0.22,>=0.21"
    assert {p["health"] for p in report["plugins"]} == {"ok"}
    assert json.loads(hfgen("env", "--json", HFGEN_AUTOLOAD="0").stdout)["pickup"] == "off"
    text = hfgen("env").stdout
    assert "adapters svfit: ok (hfgen 0.1.0, " in text and "peft: 0.21" in text


def test_env_names_a_missing_module_and_an_untested_host(tmp_path):
    dists.make(tmp_path, "stranger-q", "strangerq")
    (tmp_path / "stranger_q_impl.py").unlink()
    info = tmp_path / "peft-0.22.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.22.0\n")
    report = json.loads(hfgen("env", "--json", PYTHONPATH=str(tmp_path)).stdout)
    health = {p["name"]: p["health"] for p in report["plugins"]}
    assert health["strangerq"] == "broken: no module stranger_q_impl"
    assert next(h for h in report["hosts"] if h["name"] == "peft")["verdict"] == "broken: outside the supported range"
