"Where runs go: published ones to results, all others to scratch under the digest of their settings; nothing replaces a run unasked."
import contextlib
import io
import json
import shutil

import pytest
from small import SHORT, make_base

from strlora import folder, request
from strlora.cli import main
from strlora.core import CheckpointError, SpecError, write_json
from strlora.spec import as_dict, resolve


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def test_only_files_of_this_repository_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "commit", lambda: ("abc", False))
    ours = request.PUBLISHED/"mini"/"windows"/"lora.toml"
    assert folder.folder_of(*request.asked([str(ours)])).parts == ("results", "mini", "windows", "lora", "seed0")
    theirs = [tmp_path/"experiments"/name for name in ("a.toml", "b.toml")]
    theirs[0].parent.mkdir()
    for file, lr in zip(theirs, ("1e-4", "5e-2")): file.write_text(f"[train]\nlr = {lr}\n")
    found = {folder.folder_of(*request.asked([str(file)])) for file in theirs}
    assert len(found) == 2 and {path.parts[0] for path in found} == {"scratch"}


def test_backbones_of_the_paper_have_folders_of_their_own(monkeypatch):
    monkeypatch.setattr(folder, "commit", lambda: ("abc", False))
    found = [folder.folder_of(*request.asked([str(request.PUBLISHED/"paper"/name/"lora.toml")])) for name in ("internvl3_5_8b", "gemma3_4b")]
    assert [path.parts for path in found] == [("results", "paper", name, "lora", "seed42") for name in ("internvl3_5_8b", "gemma3_4b")]


def test_changed_code_publishes_nothing(monkeypatch):
    monkeypatch.setattr(folder, "commit", lambda: ("abc", True))
    path = folder.folder_of(*request.asked([str(request.PUBLISHED/"mini"/"windows"/"lora.toml")]))
    assert path.parts[0] == "scratch" and path.name.startswith("seed0-")


def run_file(path, **spec):
    path.mkdir(exist_ok=True)
    write_json(path/"run.json", {"status": "finished", "method": "lora", "spec": as_dict(resolve({"method": "lora", **spec}))})


def test_a_finished_run_answers_for_its_own_settings_only(tmp_path):
    run_file(tmp_path, train={"lr": 0.1})
    folder.same_run(tmp_path, resolve({"method": "lora", "train": {"lr": 0.1, "threads": 2}}))
    with pytest.raises(CheckpointError, match="a run of another spec: train.lr is 0.001 here and 0.1 in that run. --again"):
        folder.same_run(tmp_path, resolve({"method": "lora"}))
    code, out, err = said("run", "--method", "lora", "--out", tmp_path)
    assert code == 2 and not out and "train.lr" in err


def test_a_run_is_replaced_once_another_has_begun(tmp_path):
    run = tmp_path/"run"
    run_file(run, seed=1)
    with pytest.raises(SpecError, match="base"), folder.replacing(run): raise SpecError("no such base")
    assert folder.info_of(run)["spec"]["seed"] == 1 and [p.name for p in tmp_path.iterdir()] == ["run"]
    with folder.replacing(run): run_file(run, seed=2)
    assert folder.info_of(run)["spec"]["seed"] == 2 and [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(KeyboardInterrupt), folder.replacing(run):
        run_file(run, seed=3)
        raise KeyboardInterrupt
    assert folder.info_of(run)["spec"]["seed"] == 3, "the new one has begun and can be resumed"


def test_what_a_killed_replacement_left_is_put_right(tmp_path, monkeypatch):
    "The run comes back, also from beside the beginning of another; it goes once another has begun; strangers stay."
    run, old = tmp_path/"run", tmp_path/".run.before"
    assert folder.put_right(run) == ""
    for beginning in (False, True):
        run_file(old, seed=1)
        if beginning: (run/"parts").mkdir(parents=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, _, err = said("run", "--method", "lora", "--out", run)
        assert code == 2 and ".run.before beside it" in err and old.exists()
        monkeypatch.delenv("WORLD_SIZE")
        code, out, err = said("run", "--method", "lora", "--out", run)
        assert code == 2 and err.startswith("put back the run") and "a run of another spec" in err, err
        assert folder.info_of(run)["spec"]["seed"] == 1 and [p.name for p in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(run)
    run_file(old, seed=1)
    run_file(run, seed=2)
    code, _, err = said("resume", run)
    assert code == 2 and err.startswith("removed what an interrupted --again had replaced") and "is finished" in err
    assert folder.info_of(run)["spec"]["seed"] == 2 and not old.exists()
    shutil.rmtree(run)
    run_file(old, seed=1)
    run.mkdir()
    (run/"notes.txt").write_text("mine")
    with pytest.raises(SpecError, match="notes.txt"): folder.put_right(run)
    assert (run/"notes.txt").exists() and old.exists()


def test_files_of_others_are_not_removed(tmp_path):
    run_file(tmp_path)
    (tmp_path/"notes.txt").write_text("mine")
    with pytest.raises(SpecError, match="notes.txt"), folder.replacing(tmp_path): pass
    code, _, err = said("run", "--method", "lora", "--again", "--out", tmp_path)
    assert code == 2 and "notes.txt" in err and (tmp_path/"run.json").exists()


def test_a_bad_setting_leaves_the_old_run(tmp_path):
    run_file(tmp_path)
    code, _, err = said("run", "--method", "lora", "--set", "lora_dropout=1.5", "--again", "--out", tmp_path)
    assert code == 2 and "lora_dropout" in err and json.loads((tmp_path/"run.json").read_text())["status"] == "finished"


def test_again(base, tmp_path):
    words = ["run", *(x for pair in (f"model.base={base!r}", *SHORT, "method=lora", "stream.chunks=1", "eval.before=false")
                      for x in ("--set", pair)), "--out", tmp_path/"run"]
    assert said(*words)[0] == 0
    before = folder.info_of(tmp_path/"run")
    assert said(*words, "--set", "seed=5", "--again")[0] == 0
    assert (before["spec"]["seed"], folder.info_of(tmp_path/"run")["spec"]["seed"]) == (0, 5)


def test_an_older_run_has_new_settings_at_their_defaults(tmp_path):
    "Adding a setting does not make every finished run another one; a setting that is gone does."
    spec = resolve({"method": "lora"})
    stored = as_dict(spec)
    del stored["eval"]["prompts"], stored["train"]["threads"]
    run = {"status": "finished", "method": "lora", "spec": stored}
    write_json(tmp_path/"run.json", run)
    folder.same_run(tmp_path, spec)
    with pytest.raises(CheckpointError, match="eval.prompts"): folder.same_run(tmp_path, resolve({"method": "lora", "eval": {"prompts": 4}}))
    write_json(tmp_path/"run.json", run | {"spec": stored | {"gone": 1}})
    with pytest.raises(CheckpointError, match="gone"): folder.same_run(tmp_path, spec)
