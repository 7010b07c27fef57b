"""The forms of benchmarks/peft_merge.py do what their table says, on a small layer."""

import pytest

from benchmarks.peft_merge import ALONE, FORMS, cases, error, layer, tables

SMALL = cases(48, 4)
BY_NAME = {form.name: form for form in FORMS}


# PEFT says so of a density of 1.
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_copies_of_one_adapter_are_that_adapter(name):
    model, names = layer(SMALL["copies"])
    assert error(BY_NAME[name], model, names, density=1.0) < 1e-5
    assert list(model.peft_config) == ["default", *names]


def test_errors_where_adapters_are_in_bases_of_their_own():
    model, names = layer(SMALL["bases of their own"])
    found = {name: error(BY_NAME[name], model, names) for name in BY_NAME}
    assert found["linear"] == pytest.approx(found["fedrot: FedIT()"], rel=1e-3) and (
        found["linear"] > 0.5
    )
    assert found["svd"] == pytest.approx(found["fedrot: FlexLoRA()"], rel=1e-3)
    assert found["svd"] <= found["fedrot: FedRot(1.0), improper"] < 0.1
    assert found["cat"] < 1e-6


def test_tables():
    result = {
        "times": {"svd": {"median": 2.5}, "fedrot: FedRot(1.0)": {"median": 0.025}},
        "errors": {"one basis": {"svd": 0.25, "ties_svd": 1e-16, "fedrot: FedRot(1.0)": 0.5}},
        "accuracy": {"apart": {ALONE: [0.5, 0.7], "svd": [0.25]}},
    }
    assert tables(result).splitlines()[2:] == [
        "| `svd` | 2.50 s | 100x | 0.25 |",
        "| `ties_svd` |  |  | 0 |",
        "| `fedrot: FedRot(1.0)` | 25 ms | 1.0x | 0.5 |",
        "",
        "| form | apart |",
        "| --- | --- |",
        "| one client alone | 0.600 ± 0.141 |",
        "| `svd` | 0.250 ± 0.000 |",
    ]
