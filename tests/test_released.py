"The released layout: a small copy with invented records is read, checked and written; every kind of fault is found and named."
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small import make_base, rows, short_spec, timeless

from strlora import again, runs
from strlora.cli import main
from strlora.core import CheckpointError, RecordError, SpecError, read_json
from strlora.data import images as image_files
from strlora.data.images import PLACEHOLDER, ImageFile, inner_path
from strlora.data.layout import SETS, local_folder, sizes_of
from strlora.data.mini.bench import mini_stream
from strlora.data.mini.export import export_mini
from strlora.data.released import balanced_samples, released_stream
from strlora.data.rows import records
from strlora.data.verify import verify
from strlora.request import asked
from strlora.spec import as_dict, digest, resolve

SIZE = {"chunks": 3, "chunk_size": 12, "test_size": 2, "proxy_size": 2}  # of `small.SHORT`


def write(folder, file, value):
    (folder/file).parent.mkdir(parents=True, exist_ok=True)
    (folder/file).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def train_row(image, ask="What is it?\nAnswer in one word.", answer="a thing"):
    return {"messages": [{"role": "user", "content": f"<image>\n{ask}"}, {"role": "assistant", "content": answer}],
            "images": [f"{PLACEHOLDER}/{image}"]}


def test_row(i, name, image):
    row = {"question_id": i, "text": f"What is number {i}?\nAnswer in one word.", "image": f"{PLACEHOLDER}/{image}"}
    if name == "Grounding": return {**row, "answer_bbox": "[0.10,0.20,0.30,0.40]", "size": [8, 8]}
    return {**row, "answer": ["a thing", "some thing"] if name == "TextCaps" else "a thing"}


test_row.__test__ = False


@pytest.fixture
def copy(tmp_path):
    "Three chunks of four records, eleven test sets of three, proxies of two but for ChartQA."
    folder, made = tmp_path/"copy", []
    def picture(path):
        made.append(path)
        (folder/"images"/path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * len(made), 255 - 5 * len(made), 0)).save(folder/"images"/path)
        return path
    for chunk in (1, 2, 3):
        write(folder, f"train/data_00{chunk}.json", [train_row(picture(f"GQA/{chunk}{i}.jpg")) for i in range(4)])
    write(folder, "train/record.json", {"not": "rows"})
    for name in SETS:
        whole = [test_row(i, name, picture(f"{name}/test/{i}.png")) for i in range(3)]
        write(folder, f"test/{name}/test.json", whole)
        if name != "ChartQA": write(folder, f"test/{name}/test_proxy.json", whole[1:])
    write(folder, "manifest.json", {"name": "StrCVIT"})
    return folder


# --- a good copy ---------------------------------------------------------------------------------------------------

def test_a_good_copy_is_read_and_has_no_faults(copy):
    stream = released_stream(copy)
    assert [len(chunk.samples) for chunk in stream.chunks] == [4, 4, 4] and tuple(stream.tests) == stream.tasks == tuple(SETS.values())
    assert all(test.proxy == ((0, 1, 2) if test.task == SETS["ChartQA"] else (1, 2)) for test in stream.tests.values())
    assert "ChartQA" in stream.source["remarks"][0]
    caption, box = stream.tests[SETS["TextCaps"]].samples[0], stream.tests[SETS["Grounding"]].samples[0]
    assert (caption.answer, caption.references, box.answer) == ("a thing", ("a thing", "some thing"), "[0.10,0.20,0.30,0.40]")
    sample = stream.chunks[1].samples[3]
    assert (sample.instruction, sample.answer) == ("What is it?\nAnswer in one word.", "a thing")
    assert stream.plan == ({SETS["GQA"]: 4},) * 3, "told by the folder of the images"
    found = verify(copy)
    assert found["ok"] and found["images"] == {"named": 45, "opened": 45} and any("ChartQA" in note for note in found["notes"])


def test_images_are_opened_when_they_are_looked_at(copy, monkeypatch):
    monkeypatch.setattr(image_files.Image, "open", lambda *_, **__: pytest.fail("opened"))
    sample = released_stream(copy).chunks[0].samples[0]
    monkeypatch.undo()
    assert sample.images[0]().size == (8, 8) and sample.images[0]().mode == "RGB"
    (copy/"images/GQA/10.jpg").write_text("words")
    with pytest.raises(RecordError, match=r"train/data_001.json, record 0, field 'images\[0\]'.*GQA/10.jpg"): sample.images[0]()


def test_sizes_cut_and_nothing_is_cut_by_defaults(copy):
    whole = resolve({"stream": {"data": str(copy)}}).stream
    assert (whole.name, whole.chunks, whole.chunk_size, whole.test_size, whole.proxy_size) == ("strcvit", 3, 4, 3, 3)
    spec, _ = asked(["--data", str(copy), "--images", str(copy/"images"), "--limit", "2"])
    assert (spec.stream.chunks, spec.stream.chunk_size, spec.stream.test_size, spec.stream.proxy_size) == (3, 2, 2, 2)
    less = released_stream(copy, chunks=2, chunk_size=3, test_size=2, proxy_size=1)
    assert [len(c.samples) for c in less.chunks] == [3, 3]
    for test in less.tests.values(): assert len(test.samples) == 2 and len(test.proxy_samples) == 1
    assert less.tests["AD"].proxy_samples[0].id == "AD-1"
    with pytest.raises(SpecError, match="stream.chunks"): released_stream(copy, chunks=4)


def test_a_stream_in_memory_has_the_record_and_the_name_that_it_had():
    assert "data" not in as_dict(resolve())["stream"] and digest(resolve()) == ""
    with pytest.raises(SpecError, match="stream.images"): resolve({"stream": {"images": "somewhere"}})


def test_reading_needs_no_torch(copy):
    code = (f"import sys; from strlora.data.released import released_stream; from strlora.data.verify import verify\n"
            f"released_stream({str(copy)!r}).chunks[0].samples[0].images[0](); assert verify({str(copy)!r})['ok']\n"
            "assert 'datasets' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_the_hub(copy, monkeypatch):
    import huggingface_hub
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **words: calls.append((name, words["revision"])) or str(copy))
    assert sizes_of("hf://datasets/someone/some@v1")["chunks"] == 3 and local_folder("hf://datasets/someone/some") == copy
    assert calls == [("someone/some", "v1"), ("someone/some", None)]
    monkeypatch.undo()
    with pytest.raises(RecordError, match="someone/some.*hub.*Check name and network"): local_folder("hf://datasets/someone/some")


def test_joint_training_draws_from_the_files(copy):
    with pytest.raises(SpecError, match="joint"): balanced_samples(2, released_stream(copy))


# --- faults --------------------------------------------------------------------------------------------------------

def change(folder, file, edit):
    value = json.loads((folder/file).read_text())
    write(folder, file, edit(value) or value)


CHUNK, TEST, PROXY = "train/data_002.json", "test/AD/test.json", "test/AD/test_proxy.json"
FAULTS = {
    "truncated": ("file", lambda f: write(f, CHUNK, (f/CHUNK).read_text()[:-40])),
    "an empty list": ("file", lambda f: write(f, CHUNK, [])),
    "an object": ("file", lambda f: write(f, CHUNK, {"rows": []})),
    "no text": ("file", lambda f: (f/CHUNK).write_bytes(b"\xff\xfe\x00")),
    "too deep": ("file", lambda f: write(f, CHUNK, "[" * 100_000)),
    "a gap": ("file", lambda f: (f/CHUNK).unlink()),
    "no test.json": ("file", lambda f: (f/TEST).unlink()),
    "no test set": ("file", lambda f: [(f/file).unlink() for file in (TEST, PROXY)]),
    "unknown test set": ("file", lambda f: write(f, "test/ADD/test.json", [])),
    "not a record": ("record", lambda f: change(f, CHUNK, lambda v: v + [7])),
    "no answer": ("record", lambda f: change(f, CHUNK, lambda v: v[1]["messages"].pop() and v)),
    "several turns": ("record", lambda f: change(f, CHUNK, lambda v: v[1]["messages"].extend(v[1]["messages"]) or v)),
    "a system turn": ("record", lambda f: change(f, CHUNK, lambda v: v[1]["messages"].insert(0, {"role": "system", "content": "s"}))),
    "too many marks": ("record", lambda f: change(f, CHUNK, lambda v: v[1]["messages"][0].update(content="<image><image>what?"))),
    "a late mark": ("record", lambda f: change(f, CHUNK, lambda v: v[1]["messages"][0].update(content="what?<image>"))),
    "no placeholder": ("record", lambda f: change(f, CHUNK, lambda v: v[1].update(images=["GQA/10.jpg"]))),
    "upwards": ("image outside the root", lambda f: change(f, CHUNK, lambda v: v[1].update(images=[PLACEHOLDER + "/a/../../b.png"]))),
    "absolute": ("image outside the root", lambda f: change(f, TEST, lambda v: v[1].update(image="/etc/hostname"))),
    "a link": ("image outside the root", lambda f: link(f, "images/GQA/20.jpg")),
    "a linked folder": ("image outside the root", lambda f: link(f, "images/GQA")),
    "missing": ("image missing", lambda f: (f/"images/GQA/20.jpg").unlink()),
    "a loop": ("image missing", lambda f: ((f/"images/GQA/20.jpg").unlink(), (f/"images/GQA/20.jpg").symlink_to("20.jpg"))),
    "words": ("image unreadable", lambda f: write(f, "images/GQA/20.jpg", "no picture")),
    "half": ("image unreadable", lambda f: (f/"images/AD/test/0.png").write_bytes((f/"images/AD/test/0.png").read_bytes()[:50])),
    "postscript": ("image unreadable", lambda f: write(f, "images/GQA/20.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "large": ("image too large", lambda f: Image.new("1", (9500, 9500)).save(f/"images/GQA/20.jpg", "PNG")),
    "huge": ("image too large", lambda f: (f/"images/GQA/20.jpg").write_bytes(huge())),
    "twice": ("duplicate record", lambda f: change(f, CHUNK, lambda v: v + v[:1])),
    "twice in a test": ("duplicate record", lambda f: change(f, TEST, lambda v: v + [{**v[0], "question_id": 9}])),
    "leak": ("leak", lambda f: change(f, CHUNK, lambda v: v + [train_row("AD/test/0.png", "what is  Number 0?\nAnswer in one word.", "x")])),
    "leak of a copy": ("leak", lambda f: leaked_copy(f)),
    "another proxy": ("proxy", lambda f: change(f, PROXY, lambda v: v[0].update(answer="another"))),
    "count": ("manifest", lambda f: write(f, "manifest.json", {"files": manifest_files(f) | {CHUNK: {"records": 5}}})),
    "hash": ("manifest", lambda f: write(f, "manifest.json", {"files": manifest_files(f) | {CHUNK: {"sha256": "0"}}})),
    "one more": ("manifest", lambda f: write(f, "manifest.json", {"files": {k: v for k, v in manifest_files(f).items() if k != CHUNK}})),
    "one less": ("manifest", lambda f: write(f, "manifest.json", {"files": manifest_files(f) | {"train/data_004.json": {}}})),
    "images": ("manifest", lambda f: write(f, "manifest.json", {"files": manifest_files(f), "images": {"count": 3}})),
    "no manifest": ("manifest", lambda f: (f/"manifest.json").unlink()),
}


def link(folder, path):
    "Move what is there out of the root and leave a link."
    (folder/path).rename(folder.parent/"outside")
    (folder/path).symlink_to(folder.parent/"outside")


def huge():
    "A PNG whose header promises 60,000 x 60,000 pixels."
    import struct
    import zlib
    parts = (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in parts)


def leaked_copy(folder):
    "The picture of a test under another name."
    (folder/"images/GQA/copied.png").write_bytes((folder/"images/AD/test/0.png").read_bytes())
    change(folder, CHUNK, lambda v: v + [train_row("GQA/copied.png", "What is number 0?\nAnswer in one word.")])


def manifest_files(folder):
    return {p.relative_to(folder).as_posix(): {"records": len(json.loads(p.read_text()))} for kind in ("train/data_*.json", "test/*/*.json")
            for p in folder.glob(kind)}


@pytest.mark.parametrize("name", FAULTS)
def test_every_kind_of_fault_is_found(copy, name):
    kind, damage = FAULTS[name]
    damage(copy)
    found = verify(copy)
    assert not found["ok"] and kind in found["faults"], found["faults"]
    row = found["faults"][kind]
    assert row["count"] >= len(row["listed"]) >= 1 and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", [n for n, (kind, _) in FAULTS.items() if kind in ("file", "record", "proxy") and n != "no test set"]
                         + ["upwards", "absolute", "count"])
def test_what_verify_finds_in_records_is_not_loaded(copy, name):
    FAULTS[name][1](copy)
    with pytest.raises((RecordError, SpecError)) as caught: released_stream(copy)
    assert caught.value.remedy or caught.value.where


def test_everything_is_reported_and_the_list_is_limited(copy):
    for name in ("words", "leak", "another proxy", "not a record"): FAULTS[name][1](copy)
    change(copy, "test/RS/test.json", lambda v: [{} for _ in range(30)])
    found = verify(copy, limit=4)
    assert set(found["faults"]) == {"image unreadable", "leak", "proxy", "record"}
    assert found["faults"]["record"]["count"] == 121 and len(found["faults"]["record"]["listed"]) == 4
    change(copy, CHUNK, lambda v: v[0].update(videos=[1]))
    assert any("videos (1)" in note for note in verify(copy)["notes"])


def test_empty_and_missing_folders(tmp_path):
    for folder in (tmp_path, tmp_path/"none"):
        assert not verify(folder)["ok"]
        with pytest.raises(RecordError): sizes_of(folder)
        with pytest.raises(RecordError): released_stream(folder)


def test_images_elsewhere(copy, tmp_path):
    (copy/"images").rename(tmp_path/"pictures")
    with pytest.raises(RecordError, match="--images"): released_stream(copy)
    assert verify(copy)["images"]["opened"] == 0 and verify(copy)["ok"] and not verify(copy, copy/"none")["ok"]
    assert verify(copy, tmp_path/"pictures")["images"]["opened"] == 45
    assert released_stream(copy, tmp_path/"pictures").chunks[0].samples[0].images[0]().size == (8, 8)


# --- two hundred malformed records ---------------------------------------------------------------------------------

JUNK = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
BLANK = st.sampled_from(["", " ", "\n\t", "\ud800"])
NO_TEXT = JUNK | BLANK | st.lists(st.integers(), max_size=2)
NO_LIST = JUNK | BLANK | st.text(max_size=5)
NAME = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
ESCAPE = st.one_of(NAME.map("/{}".format), NAME.map("../{}".format), NAME.map("a/../../{}".format), NAME.map("C:\\{}".format),
                   NAME.map("\\\\host\\{}".format), NAME.map("c:/{}".format), NAME.map("{}\0".format))
NO_PATH = st.one_of(NO_TEXT, ESCAPE, ESCAPE.map(f"{PLACEHOLDER}/{{}}".format), st.just(PLACEHOLDER))
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=5)}), max_size=4)
NO_TURNS = NO_LIST | TURNS.filter(lambda turns: [t["role"] for t in turns] != ["user", "assistant"]) | st.lists(JUNK, max_size=3)
NO_BOX = NO_TEXT | st.sampled_from(["[]", "[0.1,0.2,0.3]", "0.1,0.2,0.3,0.4", "[0.1,0.2,0.3,nan]", "[a,b,c,d]", "[0.1,0.2,0.3,0.4,0.5]"])
GOOD = {"train/data_001.json": train_row("a.png"), **{f"test/{name}/test.json": test_row(1, name, "a.png") for name in ("AD", "TextCaps", "Grounding")}}
BAD = [  # file, field of the row, path to the value, bad values
    *(("train/data_001.json", field, path, bad) for field, path, bad in (
        ("messages", ("messages",), NO_TURNS), ("messages[0].content", ("messages", 0, "content"), NO_TEXT | st.just("<image>\n ")),
        ("messages[1].content", ("messages", 1, "content"), NO_TEXT), ("images", ("images",), NO_LIST | st.just([])),
        ("images[0]", ("images", 0), NO_PATH | NAME), ("id", ("id",), NO_TEXT), ("references", ("references",), NO_LIST),
        ("task", ("task",), JUNK))),
    *((f"test/{name}/test.json", field, (field,), bad) for name, field, bad in (
        ("AD", "text", NO_TEXT), ("AD", "image", NO_PATH), ("AD", "answer", NO_TEXT), ("TextCaps", "answer", NO_LIST | st.just([])),
        ("AD", "question_id", st.none() | BLANK | st.booleans() | st.lists(st.integers(), max_size=1)), ("Grounding", "answer_bbox", NO_BOX)))]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(BAD), gone=st.booleans(), place=st.integers(0, 4), data=st.data())
def test_malformed_records_are_refused_by_file_index_and_field(tmp_path, case, gone, place, data):
    file, field, path, bad = case
    made = [json.loads(json.dumps(GOOD[file])) for _ in range(5)]
    last, row = path[-1], made[place]
    for key in path[:-1]: row = row[key]
    if gone and isinstance(last, str) and last in row: del row[last]
    else:
        value = data.draw(bad)
        if isinstance(row, list): row[last] = value
        else: row[last] = value
    write(tmp_path, file, made)
    with pytest.raises(RecordError) as caught: records(tmp_path, file)
    assert str(caught.value).startswith(f"{file}, record {place}, field '{field}"), str(caught.value)
    assert caught.value.expected and caught.value.found and caught.value.remedy


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["..", ".", "a", "b.png", "", "~", "C:", "\\", "\0"]), min_size=1, max_size=6), st.booleans())
def test_no_path_leads_out_of_the_root(parts, bare):
    text = "/".join(parts) if bare else f"{PLACEHOLDER}/{'/'.join(parts)}"
    with contextlib.suppress(RecordError):
        inside = Path("/images", inner_path(text, bare))
        assert inside.is_relative_to("/images") and ".." not in inside.parts and inside != Path("/images")


def test_a_folder_is_no_picture(copy):
    assert ImageFile(copy/"images", "GQA", "f", 0, "images[0]").load().kind == "image missing"
    assert ImageFile(copy/"images", "x" * 5000, "f", 0, "images[0]").load().kind == "image missing"


# --- written and read ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["windows", "strcvit"])
def test_the_mini_benchmark_in_files_is_the_one_in_memory(tmp_path, name):
    export_mini(tmp_path/"mini", name, seed=5, **SIZE)
    made, memory = released_stream(tmp_path/"mini"), mini_stream(name, seed=5, **SIZE)
    def plain(samples):
        return [(s.id, s.instruction, s.answer, s.task, s.references, s.form, *((i() if callable(i) else i).tobytes() for i in s.images)) for s in samples]
    for a, b in zip(made.chunks, memory.chunks, strict=True): assert plain(a.samples) == plain(b.samples) and a.composition == b.composition
    for a, b in zip(made.tests.values(), memory.tests.values(), strict=True):
        assert plain(a.samples) == plain(b.samples) and (a.task, a.proxy) == (b.task, b.proxy)
    assert {k: v for k, v in made.manifest().items() if k != "source"} == memory.manifest() and list(made.plan[0]) == list(memory.plan[0])
    assert verify(tmp_path/"mini")["ok"] and resolve({"stream": {"data": str(tmp_path/"mini")}}).stream.name == name
    next((tmp_path/"mini/images/RS").iterdir()).write_bytes((tmp_path/"mini/images/GQA").iterdir().__next__().read_bytes())
    assert "manifest" in verify(tmp_path/"mini")["faults"], "another picture under the name of one"


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    from strlora.data.mini import export
    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(export, "write_json", fail)
    with pytest.raises(OSError): export_mini(tmp_path/"mini", **SIZE)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, "mini/mine.txt", "mine")
    with pytest.raises(SpecError, match="new or an empty"): export_mini(tmp_path/"mini", **SIZE)
    assert [p.name for p in (tmp_path/"mini").iterdir()] == ["mine.txt"]


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def test_command_line(tmp_path):
    words = [w for name, n in SIZE.items() for w in (f"--{name.replace('_', '-')}", n)]
    code, out, _ = said("data", "export-mini", tmp_path/"mini", *words, "--json")
    assert code == 0 and json.loads(out)["files"][CHUNK]["records"] == 12
    assert said("data", "verify", tmp_path/"mini")[0] == 0
    code, out, err = said("data", "verify", tmp_path/"mini", "--images", tmp_path, "--json", "--limit", "2")
    found = json.loads(out)["faults"]["image missing"]
    assert code == 1 and (found["count"], len(found["listed"])) == (58, 2)
    assert said("data", "verify", tmp_path/"none")[0] == 1 and said("data", "verify", tmp_path/"mini", "--limit", "0")[0] == 2
    assert said("data", "export-mini", tmp_path/"mini")[0] == 2 and "'windows'" in said("data", "export-mini", tmp_path/"x", "--stream", "window")[2]
    code, out, _ = said("run", "--data", tmp_path/"mini", "--dry-run", "--json")
    shown = {row["name"]: row["value"] for row in json.loads(out)}
    assert code == 0 and shown["stream.data"] == str(tmp_path/"mini") and {f"stream.{k}": v for k, v in SIZE.items()}.items() <= shown.items()
    code, _, err = said("run", "--data", tmp_path/"none", "--dry-run")
    assert code == 2 and re.match(r"strlora: .*none: expected a folder", err) and err.count("\n") == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def test_a_task_without_rules_of_scoring_is_refused_before_training(base, tmp_path):
    export_mini(tmp_path/"mini", **SIZE)
    for kind in ("test", "test_proxy"): change(tmp_path/"mini", f"test/AD/{kind}.json", lambda v: [{**row, "task": "driving"} for row in v])
    with pytest.raises(SpecError, match="driving"): runs.start(short_spec(base, f"stream.data={str(tmp_path/'mini')!r}"), tmp_path/"run")


@pytest.mark.slow
@pytest.mark.parametrize("method, pairs", [("strlora", ()), ("replay", ()), ("lora", ("train_projector=true",))])
def test_a_run_on_files_is_the_run_in_memory(base, tmp_path, method, pairs):
    export_mini(tmp_path/"mini", seed=0, **SIZE)
    pairs = (f"method={method}", "full_every=3", *pairs)
    one = runs.start(short_spec(base, *pairs), tmp_path/"memory")
    two = runs.start(short_spec(base, *pairs, f"stream.data={str(tmp_path/'mini')!r}"), tmp_path/"files")
    assert rows(one) == rows(two) and timeless(rows(one, "train")) == timeless(rows(two, "train"))
    if method == "strlora": assert rows(one, "routing") == rows(two, "routing")
    told = read_json(two/"stream.json")
    assert told.pop("source")["remarks"] == [] and told == read_json(one/"stream.json")
    assert again.what(two, ["proxy", "full"]) | {"run": ""} == again.what(one, ["proxy", "full"]) | {"run": ""}


@pytest.mark.slow
def test_joint_training_on_files(base, tmp_path):
    export_mini(tmp_path/"mini", "uniform", **{**SIZE, "chunk_size": 22})
    run = runs.start(short_spec(base, "method=joint", f"stream.data={str(tmp_path/'mini')!r}", "chunk_size=22"), tmp_path/"run")
    assert sum(row["samples"] for row in rows(run, "train")) == 66


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_files_only(base, tmp_path, monkeypatch):
    export_mini(tmp_path/"mini", **SIZE)
    true = runs.Recorder.step_done
    def press(self, run, row):
        if run.total == 4: self.stop = True
        true(self, run, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    with pytest.raises(runs.Interrupted): runs.start(short_spec(base, f"stream.data={str(tmp_path/'mini')!r}"), tmp_path/"run")
    monkeypatch.undo()
    before = (tmp_path/"mini"/CHUNK).read_text()
    change(tmp_path/"mini", CHUNK, lambda v: v[::-1])
    with pytest.raises(CheckpointError, match="files that the run began with"): runs.resume(tmp_path/"run")
    write(tmp_path/"mini", CHUNK, before)
    assert runs.status_of(runs.resume(tmp_path/"run")) == "finished"
