"The page of `strlora report --html`: what was asked, from wherever it lies; streams apart; names that want to be something else."
import contextlib
import html
import io
import json
import re

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.text import Text

from strlora import examples, page, plots, report
from strlora.artefacts import load_run, specimen
from strlora.cli import main
from strlora.core import SpecError, write_json
from strlora.data.mini.export import export_mini
from strlora.data.released import released_stream
from strlora.data.rules import score_rows, version_of

matplotlib.use("agg")
SIZE = {"chunks": 2, "chunk_size": 22, "test_size": 3, "proxy_size": 2}
EVIL = "<script>alert(1)</script><img src=x onerror=y>"


def run_on(data, folder, images="", method="lora", seed=0, **info):
    "What a run over the files of a folder writes; right in its first chunk, wrong in the second."
    stream = released_stream(data, images or data/"images")
    rows = [{"after_chunk": k, "split": "proxy", "task": task, "sample_id": s.id, "form": s.form, "prompt_hash": "0",
             "prediction": s.answer if k == 1 else "no", "answer": s.answer, "references": "\n".join(s.references),
             "task_version": version_of(task)}
            for k in range(3) for task, questions in stream.tested("proxy").items() for s in questions]
    scores = score_rows(rows)
    spec = {"method": method, "seed": seed, "scale": "mini", "stream": {"name": stream.name, "data": str(data), "images": str(images)}}
    write_json(folder/"run.json", {"schema": 1, "method": method, "spec": spec, "status": "invented", **info})
    write_json(folder/"stream.json", stream.manifest())
    pd.DataFrame(rows).assign(score=scores).to_parquet(folder/"predictions.parquet")
    return folder


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def shown(run, file):
    "The page of a run, by the command; nothing in it is fetched or runs."
    code, _, err = said("report", run, "--html", file)
    assert code == 0, err
    text = file.read_text(encoding="utf-8")
    assert "<script" not in text and not re.search(r"(src|href)=[\"'](?!data:)|<img src=x", text)
    return text


def headers(text): return re.findall(r'<div class="card"><header>(.*?)</header>', text)


def change(path, edit):
    path.write_text(json.dumps(edit(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.fixture
def mine(tmp_path):
    "A stream in files, as somebody has it whose questions want to be markup."
    export_mini(tmp_path/"mine", seed=3, **SIZE)
    for file in (tmp_path/"mine/test").glob("*/*.json"):
        change(file, lambda rows: [{**row, "text": f"{row['text']} {EVIL}"} for row in rows])
    return tmp_path/"mine"


# --- questions in files --------------------------------------------------------------------------------------------

def test_questions_and_pictures_of_a_stream_in_files_are_on_the_page(mine, tmp_path):
    run = run_on(mine, tmp_path/"run")
    found, stream = headers(shown(run, tmp_path/"page.html")), released_stream(mine)
    asked = {s.id: s for questions in stream.tested("proxy").values() for s in questions}
    assert found and all(card.startswith('<img src="data:image/png') and "&lt;script&gt;" in card for card in found)
    assert not [card for card in found if "not at hand" in card or any(name in card for name in asked)], "words instead of names"
    known = examples.asked(load_run(run))
    assert {name: text for name, (text, _) in known.items()} == {name: s.instruction for name, s in asked.items()}
    assert all(known[name][1]().tobytes() == s.images[0]().tobytes() for name, s in asked.items())


def test_a_large_picture_is_scaled_down_and_kept_as_it_was():
    from PIL import Image
    large = Image.effect_noise((1600, 1200), 80).convert("RGB")
    assert len(examples.embedded(large)) < 200_000 and large.size == (1600, 1200)


def test_files_that_have_gone_are_named_on_the_cards(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_on(mine.relative_to(tmp_path), tmp_path/"run")
    (mine/"images").rename(mine/"pictures")
    found = headers(shown(run, tmp_path/"page.html"))
    assert found and all("picture not at hand: no such file: " in card and "&lt;script&gt;" in card for card in found)
    (mine/"train").rename(mine/"gone")
    (mine/"test/GQA/test.json").write_text("no list")
    assert any("(question not at hand: mine/test/GQA/test.json cannot be read: " in text for text, _ in examples.asked(load_run(run)).values())
    mine.rename(tmp_path/"elsewhere")
    text = shown(run, tmp_path/"page.html")
    assert all("(question not at hand: mine is gone)" in card for card in headers(text)) and str(tmp_path) not in text


def test_a_test_set_that_has_gone_is_named(mine, tmp_path):
    for file in (mine/"test/AD").glob("*.json"): change(file, lambda rows: [{k: v for k, v in row.items() if k != "task"} for row in rows])
    run = run_on(mine, tmp_path/"run", images=mine/"images")
    (mine/"test/AD/test.json").unlink()
    known = load_run(run).predictions.drop_duplicates("sample_id").set_index("sample_id")["task"]
    for name, (text, picture) in examples.asked(load_run(run)).items():
        assert (picture is None) == (f"{mine}/test/AD/test.json is gone" in text) == (known[name] == "AD")


def test_another_answer_is_another_question(mine, tmp_path):
    run = run_on(mine, tmp_path/"run")
    change(mine/"test/VQAv2/test.json", lambda rows: [{**row, "answer": "something else", "text": "Another question?"} for row in rows])
    lost = [text for text, _ in examples.asked(load_run(run)).values() if "not at hand" in text]
    assert len(lost) == SIZE["proxy_size"] and not any("Another" in text for text in lost)


def test_a_page_fetches_nothing(mine, tmp_path, monkeypatch):
    import huggingface_hub
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: calls.append(how["local_files_only"]) or str(mine))
    run = run_on(mine, tmp_path/"run")
    change(run/"run.json", lambda v: {**v, "spec": {**v["spec"], "stream": {**v["spec"]["stream"], "data": "hf://datasets/a/b"}}})
    assert all(picture for _, picture in examples.asked(load_run(run)).values()) and calls == [True]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("not cached")))
    assert page.page([load_run(run)]).count("(question not at hand: hf://datasets/a/b is gone)") > 1


# --- runs of several streams ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Two methods on one stream, one of them on another as well."
    place = tmp_path_factory.mktemp("mixed")
    folders = [specimen(place/name, method, 0, chunks=4, tasks=("ocr", "vqa", "textcaps"), questions=4, experts=4 * (method == "strlora"))
               for name, method in (("a", "strlora"), ("b", "lora"), ("c", "lora"))]
    for name in ("run", "stream"):
        renamed = json.dumps(json.loads((folders[2]/f"{name}.json").read_text())).replace("invented", "other")
        (folders[2]/f"{name}.json").write_text(renamed, encoding="utf-8")
    return folders


def test_streams_have_tables_of_their_own(mixed):
    text = page.page(map(load_run, mixed))
    scores = text.split("<h2>Scores</h2>")[1].split("<h2>")[0]
    one, other = scores.split("<h3>invented</h3>")[1].split("<h3>other</h3>")
    assert "different streams are not compared" in scores and scores.count("<th>difference</th>") == one.count("<th>difference</th>") == 1
    assert "<td>strlora</td>" in one and "<td>lora</td>" in one and "<td>strlora</td>" not in other and "<td>lora</td>" in other
    assert "from strlora, over the <b>pairs</b>" in scores and "<th>pairs</th>" not in other
    for head in ("Over the stream", "Examples"):
        part = text.split(f"<h2>{head}</h2>")[1].split("<h2>")[0]
        one, other = part.split("<h3>invented</h3>")[1].split("<h3>other</h3>")
        assert (one.count("<img"), other.count("<img")) == ((3, 2) if head == "Over the stream" else (0, 0))
        if head == "Examples":
            assert "Chosen by rule from strlora, seed 0" in one and "Chosen by rule from lora, seed 0" in other
            assert one.count('class="strip"') == 2 * one.count('class="card"') > 0 and other.count('class="strip"') == other.count('class="card"') > 0


def test_a_legend_explains_the_columns_that_there_are(mixed):
    text = page.page(map(load_run, mixed[1:]))
    assert "are not compared" in text and not any(word in text for word in ("<th>pairs</th>", "<b>difference</b>", "<b>p (t)</b>"))
    text = page.page(map(load_run, mixed[:2]))
    assert "are not compared" not in text and "<h3>" not in text and "<b>difference</b>" in text
    with pytest.raises(SpecError, match="reference"): page.page(map(load_run, mixed), reference="ewc")


def test_runs_whose_answers_are_not_shown_are_named(mixed, tmp_path):
    runs = [load_run(mixed[0]), load_run(specimen(tmp_path, "lora", 1, chunks=4, tasks=("ocr", "vqa", "textcaps"), questions=4))]
    text = page.page(runs)
    assert "Not shown: lora, seed 1, which answered other questions." in text
    assert "no differences are given" in text and "<th>pairs</th>" not in text and "<b>difference</b>" not in text


def test_the_command_prints_a_table_a_stream(mixed):
    code, out, err = said("report", *mixed)
    assert code == 0, err
    _, one, other = re.split(r"^stream \w+$", out, flags=re.M)
    assert [line.split()[:3] for line in one.strip().splitlines()][1:3] == [["MAP", "strlora", "1"], ["MAP", "lora", "1"]]
    assert other.count("lora") == 3 and "strlora" not in other and out.rstrip().endswith("different streams are not compared.")
    alone = said("report", *mixed[:2])[1]
    assert "stream " not in alone and "not compared" not in alone and alone.rstrip().endswith(one.strip())
    assert "stream " not in said("report", mixed[0])[1]


def test_other_files_under_one_name_are_another_stream(mine, tmp_path):
    first = run_on(mine, tmp_path/"first")
    change(mine/"train/data_001.json", lambda rows: rows[::-1])
    second = run_on(mine, tmp_path/"second", method="ewc")
    text = page.page(map(load_run, (first, second)))
    assert len(set(re.findall(r"<h3>(windows \(files: [0-9a-f]{8}\))</h3>", text))) == 2 and "<th>pairs</th>" not in text


# --- names that want to be something else --------------------------------------------------------------------------

HOSTILE = ["my$\\frac$x", "$", "$$", r"a\\$b$", "$\\undefined{$", "_hidden", "{%s}", "<b>&", "two\nlines"]


@pytest.fixture
def named(tmp_path):
    "A maker of runs whose method, stream and unknown task are called as one likes."
    def make(name, experts=4):
        folder = specimen(tmp_path/"named", chunks=3, tasks=("ocr", "vqa"), questions=2, experts=experts)
        change(folder/"run.json", lambda v: {**v, "method": name, "spec": {**v["spec"], "method": name, "model": {"base": f"base/{name}"}}})
        change(folder/"stream.json", lambda v: {**v, "name": name, "chunks": [{**c, "composition": {**c["composition"], name: 7}} for c in v["chunks"]]})
        return load_run(folder)
    return make


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_drawn_as_they_are_written(named, tmp_path, name):
    run = named(name)
    assert len(plots.pictures(run, tmp_path)) == 3
    text = page.write([run], tmp_path/"page.html").read_text(encoding="utf-8")
    assert "<b>&<" not in text and html.escape(name) in text
    draw = (plots.accuracy_over_stream, plots.accuracy_by_task, plots.score_heatmap, plots.expert_activation, plots.experts_over_stream,
            plots.first_experts, lambda r: plots.composition(r.stream), lambda r: plots.accuracy_panels([r]),
            lambda r: plots.comparison(report.compare([r], draws=5), report.summary([r])))
    for axes in map(lambda f: f(run), draw):
        figure = (axes[0] if isinstance(axes, list) else axes).figure
        figure.canvas.draw()
        assert not [text.get_text() for text in figure.findobj(Text) if text._preprocess_math(text.get_text())[1]], "no mathematics"
    plt.close("all")


def test_a_name_with_dollars_is_seen_in_the_picture(named, tmp_path):
    drawn = plots.save(plots.accuracy_over_stream(named("my$\\frac$x")), tmp_path/"drawn.svg").read_text(encoding="utf-8")
    assert drawn.count("my$\\frac$x") >= 4 and "\\$" not in drawn, "the line, the task, the stream and the base"
    legend = plots.accuracy_by_task(named("_hidden"))[0].figure.legends[0]
    assert [t.get_text().strip("\u200b") for t in legend.get_texts()] == ["_hidden"]


def test_who_routes_nothing_is_named(named):
    run = named("$\\frac$", experts=0)
    (run.folder/"routing.parquet").unlink(missing_ok=True)
    plots.expert_activation(load_run(run.folder)).figure.canvas.draw()
    plt.close("all")
