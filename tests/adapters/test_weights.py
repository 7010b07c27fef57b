"""`--weights`: a list, or a JSON file."""

import json
from pathlib import Path

import pytest

from fedrot.adapters import parse_weights
from fedrot.errors import FedrotError

CLIENTS = [Path("runs/a"), Path("runs/b/")]


def test_forms(tmp_path):
    file = tmp_path / "samples.json"
    assert parse_weights(None, CLIENTS) is None
    assert parse_weights("3, 0.5", CLIENTS) == [3.0, 0.5]
    file.write_text("[3, 1]")
    assert parse_weights(str(file), CLIENTS) == [3.0, 1.0]
    file.write_text(json.dumps({"b": 1, "a": 3}))
    assert parse_weights(str(file), CLIENTS) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 3}, "no weight for 'b'"),
        ({"a": 3, "b": 1, "c": 1}, "'c' is none of the adapters"),
        ({"a": 3, "b": "many"}, "'b': 'many' is not a number"),
        ({"a": 3, "b": True}, "True is not a number"),
        ([1, 2, 3], "3 values for 2 adapters"),
        (5, "must hold a list or an object"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "samples.json"
    file.write_text(json.dumps(content))
    with pytest.raises(FedrotError, match=message):
        parse_weights(str(file), CLIENTS)


def test_bad_values(tmp_path):
    with pytest.raises(FedrotError, match="3 values for 2 adapters"):
        parse_weights("1,2,3", CLIENTS)
    with pytest.raises(FedrotError, match="'x' is not a number"):
        parse_weights("1,x", CLIENTS)
    with pytest.raises(FedrotError, match="no such file"):
        parse_weights(str(tmp_path / "none.json"), CLIENTS)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FedrotError, match="not valid JSON"):
        parse_weights(str(tmp_path / "bad.json"), CLIENTS)
    (tmp_path / "twice.json").write_text('{"a": 1, "b": 2, "a": 3}')
    with pytest.raises(FedrotError, match=r"twice\.json: not valid JSON .'a' stands there twice"):
        parse_weights(str(tmp_path / "twice.json"), CLIENTS)
    (tmp_path / "ok.json").write_text('{"a": 1}')
    with pytest.raises(FedrotError, match="two adapters are called 'a'"):
        parse_weights(str(tmp_path / "ok.json"), [Path("x/a"), Path("y/a")])
