"Every method in the table is trained for a few steps and looked at; see nbs/14d_checks.ipynb."
import pytest

from strlora.checks import CHECKS
from strlora.methods.table import METHODS
from strlora.spec import resolve
from strlora.trial import Bench
from strlora.tune import MOST, check_method, defaults, stage, stages

TRAINED = [name for name, method in METHODS.items() if method.adapter]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHECKS)
def test_method(bench, method, name):
    "Skipped, with the reason, where a check does not apply."
    if why := CHECKS[name](bench, method): pytest.skip(f"{method} {why}")


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_tuned_exists_and_keeps_to_the_budget(method):
    if METHODS[method].follows: pytest.skip(f"{method} takes the settings of {METHODS[method].follows}")
    check_method(method)
    start = defaults(method)
    settings = [s for name in stages(method, False) for s in stage(method, name, start)]
    assert len(settings) <= MOST
    for setting in settings:
        values = {}
        for name, value in setting.items(): values.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value
        resolve({"method": method, **values})


@pytest.mark.parametrize("method", TRAINED)
def test_what_weighs_a_penalty_is_a_setting(method):
    names = {f"settings.{name}" for name in METHODS[method].settings.__dataclass_fields__}
    assert set(METHODS[method].weights) <= names
    assert METHODS[method].neighbour in (*METHODS, "")
