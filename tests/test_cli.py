"The command line: help without torch, one line for a mistake, JSON, and a whole run."
import contextlib
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from small import SHORT, make_base, rows

from strlora.cli import main, parser
from strlora.core import write_json
from strlora.folder import locked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def sets(base): return [x for pair in (f"model.base={base!r}", *SHORT) for x in ("--set", pair)]


@pytest.mark.parametrize("words", [["--help"], *([v, "--help"] for v in ("run", "resume", "eval", "report", "plan", "tune", "ablate", "compare", "methods", "data", "convert", "chat", "bench", "interference"))])
def test_help_needs_nothing(words):
    code = ("import sys, strlora.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit as e: assert e.code == 0\n"
            "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: strlora" in done.stdout, done.stderr


@pytest.mark.parametrize("words, found", [
    (["run", "--method", "strlroa"], "'strlora'"), (["run", "--set", "lrr=1"], "'lr'"), (["run", "none.toml"], "no such file"),
    (["run", "--limit", "0"], "--limit"), (["resume", "none"], "run.json"), (["eval", "none"], "run.json"), (["report", "none"], "none"),
    (["resume", "none", "--set", "lr=1"], "as if it had never stopped"), (["eval", "none", "--set", "lr=1"], "eval.prompts"),
    (["eval", "none", "--limit", "0"], "--limit"), (["resume", "none", "--set", "threads"], "key=value"),
    (["tune", "lroa"], "'lora'"), (["tune", "zero_shot"], "nothing to tune"), (["compare", "lroa"], "'lora'"),
    (["compare", "lora", "--seeds", "0,100"], "100"), (["compare", "lora", "--jobs", "0", "--limit", "1"], "--jobs"),
    (["compare", "lora", "--reference", "x"], "x"), (["tune", "lora", "--stream", "windws", "--dry-run"], "'windows'"),
    (["ablate", "lroa", "r=8"], "'lora'"), (["ablate", "lora", "r"], "NAME=VALUE"), (["ablate", "lora", "r=64"], "another value"),
    (["ablate", "lora", "r=32", "--seeds", "0"], "100 to 109"), (["ablate", "lora", "rr=32"], "'r'"),
])
def test_a_mistake_is_one_line(words, found):
    code, out, err = said(*words)
    assert code == 2 and not out and err.startswith("strlora: ") and err.count("\n") == 1 and found in err


def test_dry_run_and_methods_are_json():
    code, out, _ = said("run", "--dry-run", "--json", "--seed", "3", "--method", "lora")
    shown = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and shown["seed"]["value"] == 3 and shown["method"]["value"] == "lora" and all(r["source"] for r in shown.values())
    assert {m["name"] for m in json.loads(said("methods", "--json")[1])} >= {"strlora", "strlora_released", "lora", "joint", "zero_shot"}
    assert "train.lr" in said("run", "--dry-run")[1]


@pytest.mark.parametrize("pair, found", [("lora_dropout=2", "lora_dropout"), ("kl_weight=-1", "kl_weight"), ("num_experts=3", "num_experts"),
                                         ("stage1='none'", "stage1"), ("init_experts=odd", "init_experts")])
def test_a_dry_run_refuses_what_a_run_would(pair, found):
    code, out, err = said("run", "--dry-run", "--set", pair)
    assert code == 2 and not out and found in err and err.count("\n") == 1


def test_a_limit_makes_everything_smaller():
    shown = {row["name"]: row["value"] for row in json.loads(said("run", "--limit", "4", "--dry-run", "--json")[1])}
    assert (shown["stream.chunk_size"], shown["stream.proxy_size"], shown["stream.test_size"]) == (4, 4, 4)


def test_every_verb_is_there():
    from strlora.cli import VERBS
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    assert set(verbs) == set(VERBS) == {"run", "resume", "eval", "report", "plan", "tune", "ablate", "compare", "methods", "data", "convert", "chat", "bench",
                                       "interference"}


def test_run_report_eval(base, tmp_path):
    folder = tmp_path/"run"
    wanted = [*sets(base), "--set", "full_every=3", "--set", "test_size=3"]
    code, out, err = said("run", *wanted, "--out", folder, "--profile")
    assert code == 0, err
    assert "MAP" in out and "MAF" in out and str(folder) in out and err.count("chunk ") == 3
    phases = {r["phase"]: r for r in json.loads((folder/"run.json").read_text())["profile"]}
    assert phases.keys() >= {"forward", "backward", "optimizer", "answers", "checkpoints", "the rest"} and all(p in err for p in phases)
    steps = len(pq.read_table(folder/"train.parquet"))
    assert phases["forward"]["calls"] == phases["optimizer"]["calls"] == steps
    assert sum(r["share"] for r in phases.values()) == pytest.approx(1, abs=0.01)
    assert {p.name for p in folder.glob("*.png")} >= {"accuracy.png", "experts.png"}
    assert {p.name for p in folder.iterdir()} >= {"run.json", "stream.json", "train.parquet", "predictions.parquet", "routing.parquet", "checkpoint"}
    before = rows(folder)
    code, out, err = said("run", *wanted, "--out", folder)
    assert code == 0 and "finished" in err and "MAP" in out, "a finished run is shown, not run again"
    found = json.loads(said("report", folder, "--json")[1])
    assert found[0]["method"] == "strlora" and len(found[0]["final"]) == 11
    code, out, _ = said("eval", folder, "--split", "both", "--json")
    assert code == 0 and set(json.loads(out)) == {"proxy", "full"}
    key = lambda r: (r["after_chunk"], r["split"], r["task"], r["sample_id"])
    assert sorted(rows(folder), key=key) == sorted(before, key=key), "the same model gives the same answers"
    final = {task: score for task, score in json.loads(out)["proxy"].items()}
    assert final == pytest.approx(found[0]["final"], abs=1e-6)
    asks_less(folder)
    looks_inside(folder, tmp_path)


def looks_inside(folder, tmp_path):
    "A page of the run, a look at its routing, and what its tasks do to each other."
    code, out, err = said("report", folder, "--html", tmp_path/"new"/"report.html")
    text = (tmp_path/"new"/"report.html").read_text(encoding="utf-8")
    assert code == 0 and "MAP" in out and "report.html" in err and "<h2>Examples</h2>" in text and "<script" not in text
    picture = tmp_path/"red.png"
    Image.new("RGB", (48, 48), "red").save(picture)
    asked = ["chat", folder, "--image", picture, "what color ?", "--tokens", "3"]
    plain = said(*asked)[1]
    code, out, err = said(*asked, "--routing", tmp_path/"look.html")
    assert code == 0 and out == plain, err
    assert "what color ?" in (tmp_path/"look.html").read_text(encoding="utf-8")
    assert said(*asked, "--routing", tmp_path)[0] == 2, "a folder is no file"
    before = rows(folder)
    code, out, err = said("interference", folder, "--samples", "4", "--proxy", "1", "--json")
    assert code == 0 and set(json.loads(out)[str(folder)]) == {"cka", "overlap", "agreement", "cosine", "rise", "astray", "opposed"}, err
    assert len((folder/"interference.csv").read_text().splitlines()) == 1 + 11 * 11 and rows(folder) == before
    assert said("interference", folder, "--samples", "0")[0] == 2


def asks_less(folder):
    "Of a finished run: what would be asked, a part of it, and that its answers stay."
    before = rows(folder)
    plan = json.loads(said("eval", folder, "--split", "both", "--limit", "1", "--dry-run", "--json")[1])
    assert plan["chunk"] == "after 3 of 3" and plan["proxy questions"] == plan["full questions"] == 11 and not plan["stored"]
    assert "33" in said("eval", folder, "--dry-run")[1]
    code, out, err = said("eval", folder, "--limit", "1", "--set", "prompts=3", "--set", "threads=1", "--json")
    assert code == 0 and set(json.loads(out)["full"].values()) <= {0.0, 100.0}, err
    assert rows(folder) == before
    assert "finished" in said("resume", folder, "--dry-run")[2]
    with locked(folder):
        code, out, err = said("eval", folder)
        assert code == 2 and not out and "in use" in err, "another process writes there"
        assert said("eval", folder, "--limit", "1")[0] == 0, "nothing is stored"


def test_only_the_first_process_prints_what_was_asked(monkeypatch):
    from strlora import again
    monkeypatch.setattr(again, "ask_again", lambda *_: {"full": {"gqa": 50.0}})
    monkeypatch.setattr(again, "what", lambda *_: {"run": "RUN"})
    assert "gqa" in said("eval", "RUN")[1] and "RUN" in said("eval", "RUN", "--dry-run")[1]
    monkeypatch.setenv("RANK", "1")
    assert said("eval", "RUN") == said("eval", "RUN", "--dry-run") == (0, "", "")


def test_resume_says_where_and_takes_settings_of_execution(base, tmp_path, monkeypatch):
    from strlora import runs
    true = runs.Recorder.step_done
    def press(self, run, row):
        if run.total == 4: self.stop = signal.SIGINT
        true(self, run, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    code, _, err = said("run", *sets(base), "--out", tmp_path/"run")
    assert code == 130 and "strlora resume" in err
    monkeypatch.undo()
    plan = json.loads(said("resume", tmp_path/"run", "--dry-run", "--json", "--threads", "1", "--set", "save_every=1")[1])
    assert (plan["chunk"], plan["step"], plan["steps done"], plan["train.save_every"]) == ("2 of 3", 1, 4, 1)
    code, out, err = said("resume", tmp_path/"run", "--set", "save_every=1")
    assert code == 0 and "MAP" in out, err
    info = json.loads((tmp_path/"run"/"run.json").read_text())
    assert info["spec"]["train"]["save_every"] == 1 and info["state"] == 0


def test_zero_shot_and_joint_end_in_a_table(base, tmp_path):
    for method, words in (("zero_shot", sets(base)[:-4]), ("joint", sets(base))):
        code, out, err = said("run", "--method", method, *words, "--out", tmp_path/method)
        assert code == 0 and "final AP" in out, err
    code, out, _ = said("report", tmp_path/"zero_shot", tmp_path/"joint", "--json")
    assert [r["method"] for r in json.loads(out)] == ["zero_shot", "joint"]


def test_the_first_steps_are_commands_that_exist():
    text = (Path(__file__).resolve().parents[1]/"nbs"/"start.md").read_text(encoding="utf-8")
    said = [line for block in text.split("```")[1::2] for line in block.splitlines()] + re.findall("`(strlora [^`]+)`", text)
    words = [line.split() for line in said if line.startswith("strlora ") and "--help" not in line]
    assert {line[1] for line in words} == {"run", "report", "compare", "resume"}
    for _, *rest in words: parser().parse_args(rest)


def test_chat_takes_its_words_in_either_order():
    for words in (["chat", "RUN", "--image", "a.png", "What?"], ["chat", "--image", "a.png", "RUN", "What?"]):
        args = parser().parse_args(words)
        assert (args.run, args.question, args.image) == ("RUN", "What?", ["a.png"])


def test_chat_names_a_picture_that_cannot_be_read(tmp_path):
    code, _, err = said("chat", tmp_path, "--image", tmp_path/"none.png", "What?")
    assert code == 2 and "none.png" in err and "a picture" in err


def test_processes_do_not_remove_a_run_under_each_other(tmp_path, monkeypatch, capsys):
    write_json(tmp_path/"run.json", {"status": "finished", "method": "strlora", "spec": {"method": "strlora"}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "--again", "--out", str(tmp_path)]) == 2
    assert "Move the folder away first" in capsys.readouterr().err and (tmp_path/"run.json").exists()


def test_chat_names_a_device_that_is_not_there(tmp_path, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    picture = tmp_path/"red.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    for name in ("cuda", "foo", "cuda:9", "mps"):
        code, out, err = said("chat", tmp_path, "--image", picture, "--device", name, "What?")
        assert code == 2 and not out and err.count("\n") == 1 and "--device: expected a device of this machine: cpu" in err, name
