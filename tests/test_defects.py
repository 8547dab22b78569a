"""Known defects of the released code: each has a guard that exists, or a reason why it needs none."""
import ast
import csv
from pathlib import Path

import pytest

from strlora.data.tasks import TASKS, score

HERE = Path(__file__).parent
ROWS = list(csv.DictReader((HERE / "defects.csv").open(encoding="utf-8")))


def test_numbers_run_through():
    assert [int(row["id"]) for row in ROWS] == list(range(1, len(ROWS) + 1))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_every_defect_has_a_guard_or_a_reason(row):
    assert row["area"] and row["defect"] and row["here"]
    assert row["tests"] or row["here"].startswith("None needed")
    for reference in row["tests"].split():
        file, _, name = reference.partition("::")
        names = {n.name for n in ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}
        assert name in names, reference


ANSWERS = {task: {"grounding": "[ 0 2 2 4 ]", "textcaps": "a red star above the moon"}.get(task, "nine") for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_is_a_right_answer(task):
    assert score(task, ANSWERS[task], ANSWERS[task], (ANSWERS[task],)) == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("nothing", ["", " ", ".", "n", "["])
def test_nothing_is_never_right(task, nothing):
    assert score(task, nothing, ANSWERS[task], (ANSWERS[task],)) == 0


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("grounding", "textcaps")])
@pytest.mark.parametrize("prediction, answer", [("1", "2017"), ("10", "0"), ("nothing", "no"), ("no", "nothing"), ("cat", "catfish")])
def test_a_part_of_the_answer_is_not_the_answer(task, prediction, answer):
    assert score(task, prediction, answer, (answer,)) == 0
