"""Finding and reading models and data: folders, the cache, and what is missing."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from fedrot import hub
from fedrot.errors import FedrotError
from fedrot.hub import data_folder, model_folder
from fedrot.tasks.files import column, part_files, read_file, read_part

# A separate process, as huggingface_hub reads the environment once. After the imports, so that the
# time is that of the search.
MISSING = """
import time, torch, transformers, huggingface_hub
from fedrot.config import load
from fedrot.errors import FedrotError
config = load({"task": {"name": "NAME"}})
began = time.perf_counter()
try:
    config.task.prepare(0)
except FedrotError as error:
    print(time.perf_counter() - began)
    print(error)
"""


def missing(task: str, home, **environment: str) -> tuple[float, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    environment = {**kept, "HF_HOME": str(home), **environment}
    code = MISSING.replace("NAME", task)
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    seconds, *lines = out.stdout.splitlines()
    assert len(lines) == 1 and "Traceback" not in out.stderr
    return float(seconds), lines[0]


@pytest.mark.parametrize(
    ("task", "environment", "words"),
    [
        # A name that no server resolves, an address that swallows everything, and offline.
        ("sst2", {"HF_ENDPOINT": "https://hub.invalid"}, "hub.invalid does not answer"),
        ("gsm8k", {"HF_ENDPOINT": "https://192.0.2.1"}, "192.0.2.1 does not answer"),
        ("mnli", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_missing_is_one_line_within_two_seconds(tmp_path, task, environment, words):
    seconds, line = missing(task, tmp_path, **environment)
    model = "meta-llama/Meta-Llama-3-8B" if task == "gsm8k" else "FacebookAI/roberta-large"
    assert seconds < 2
    assert line.startswith(f"{model} is not in the cache and ") and words in line
    assert f"`hf download {model}`" in line and "--task digits or --task strings" in line
    assert "task.model=PATH" in line


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_answers", lambda endpoint: False)
    return tmp_path / "hub"


def put(cache, repository: str, source) -> None:
    """As `hf download` leaves a repository."""
    folder = cache / repository
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, folder / "snapshots" / ("0" * 40))


def test_cache_before_network(hub_cache, roberta):
    with pytest.raises(FedrotError, match="acme/tiny is not in the cache"):
        model_folder("acme/tiny")
    put(hub_cache, "models--acme--tiny", roberta)
    found = model_folder("acme/tiny")
    assert (found / "config.json").read_bytes() == (roberta / "config.json").read_bytes()
    (found / "model.safetensors").unlink()  # only a part was downloaded
    with pytest.raises(FedrotError, match="acme/tiny is not in the cache"):
        model_folder("acme/tiny")


def test_shards_must_all_be_there(hub_cache, roberta, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(roberta, folder)
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    with pytest.raises(FedrotError, match=r"must hold config\.json and the model's weights"):
        model_folder(str(folder))
    (folder / "two.safetensors").touch()
    assert model_folder(str(folder)) == folder


def test_a_path_is_never_asked_of_the_hub(hub_cache, tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere/here", "~/nowhere", "nowhere", "a/b/c"):
        with pytest.raises(FedrotError, match=r"task\.model: there is no folder"):
            model_folder(name)


def test_data_of_the_cache_needs_the_files_asked_for(hub_cache, tmp_path):
    source = tmp_path / "glue"
    (source / "sst2").mkdir(parents=True)
    (source / "sst2" / "train.jsonl").write_text('{"sentence": "good", "label": 1}\n')
    put(hub_cache, "datasets--acme--glue", source)
    assert (data_folder("acme/glue", files=("sst2/*",)) / "sst2" / "train.jsonl").is_file()
    wanted = r"hf download acme/glue --repo-type dataset --include 'rte/\*'`"
    with pytest.raises(FedrotError, match=wanted):
        data_folder("acme/glue", files=("rte/*",))


def test_formats_hold_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {"text": ["a, b", 'say "c"', "ü\nd"], "label": [0, 1, 0]}
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json").write_text(lines)
    parquet.write_table(pyarrow.table(columns), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert read_file(file) == columns, file
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "g.parquet"
    )
    with pytest.raises(FedrotError, match=r"g\.parquet must hold rows"):
        read_file(tmp_path / "g.parquet")
    (tmp_path / "f.csv").write_text('text,label\n"a, b",0\n"say ""c""",1\n"ü\nd",0\n')
    assert read_file(tmp_path / "f.csv") == {**columns, "label": ["0", "1", "0"]}
    for name in ("a.jsonl", "c.json", "f.csv"):  # as Excel saves them
        marked = tmp_path / f"marked-{name}"
        marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert read_file(marked) == read_file(tmp_path / name)


def test_files_of_a_part_are_joined_in_order(tmp_path):
    (tmp_path / "train-00001.jsonl").write_text('{"a": 2, "b": 1}\n')
    (tmp_path / "train-00000.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"a": 9}\n')
    assert read_part(tmp_path, "train") == {"a": [1, 2]}
    with pytest.raises(FedrotError, match="holds no validation part"):
        read_part(tmp_path, "validation")


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"a": "text of some length"}\n' * 50)
    for name, content in (
        ("cut", whole[:-20]),
        ("plain", b'{"a": 1}\n'),
        ("bad", whole[:10] + b"x" * 30),
    ):
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(FedrotError, match=f"{name}.jsonl.gz cannot be read: "):
            read_file(file)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": }\n')
    with pytest.raises(FedrotError, match=r"a.jsonl, line 2, column 7 is not JSON: "):
        read_file(tmp_path / "a.jsonl")


def test_a_part_is_a_whole_word_of_a_file_or_folder(tmp_path):
    folder = tmp_path / "test"  # what is above the given folder does not count
    names = ["contest-train.jsonl", "data/train-0.csv", "train/a.json", "Train_2.parquet"]
    names.append("train2.csv")
    others = ["latest.csv", "trainer/b.csv", "retrain.jsonl", "train.txt", "testing.jsonl"]
    for name in [*names, *others, "data/test-0.jsonl", "my.test/0.jsonl.gz"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert part_files(folder, "train") == sorted(folder / name for name in names)
    found = [folder / "data/test-0.jsonl", folder / "my.test/0.jsonl.gz"]
    assert part_files(folder, "test") == found
    assert part_files(folder, "validation", needed=False) == []
    matched = folder / "validation_matched-0.csv"
    for file in (matched, folder / "validation_mismatched-0.csv"):
        file.touch()
    assert part_files(folder, "validation_matched") == [matched]
    shared = folder / "train" / "test.csv"
    shared.touch()
    for part in ("train", "test"):
        with pytest.raises(FedrotError, match=r"train/test\.csv is of both the train and the test"):
            part_files(folder, part)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "^F, row 2, column x: the value is missing"),
        ([1.0, 2.0, float("nan")], "^F, row 3, column x: the value is missing"),
        ([" "], "^F, row 1, column x: the value is missing"),
        ([0, ["a", "b"]], r"^F, row 2, column x: must be a text or a number, got \['a', 'b'\]"),
        ([0, {"a": 1}], r"^F, row 2, column x: must be a text or a number, got \{'a': 1\}"),
    ],
)
def test_values_that_are_none(values, message):
    with pytest.raises(FedrotError, match=message):
        column({"x": values}, ["x"], "F", blank=False)
    assert column({"x": ["", 0, False]}, ["y", "x"], "F") == ["", 0, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl, line 2, column 5 is not JSON: "),
        ("a.jsonl", b"[1]\n", "must hold rows with named columns"),
        ("a.csv", b"", "must hold rows with named columns"),
        ("a.csv", b"text,label\na,b\nc, d,e\n", "row 2: more values than .* columns .*: 'e'"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.parquet", b"not parquet", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(FedrotError, match=message) as error:
        read_file(file)
    assert name in str(error.value)


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FedrotError, match=r"train\.parquet .* pip install 'fedrot\[hub\]'"):
        read_file(tmp_path / "train.parquet")


def test_an_answer_is_awaited_for_a_limited_time(monkeypatch):
    over = threading.Event()

    def never(*args, **kwargs):
        over.wait()
        raise OSError

    monkeypatch.setattr(hub.urllib.request, "urlopen", never)
    began = time.perf_counter()
    assert not hub._answers("https://hub.invalid")
    assert time.perf_counter() - began < 2
    over.set()
