"""`fedrot bench` on tiny problems, and the table of the README."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import readme
from fedrot.bench import cases, machine, run, suites
from fedrot.cli import app

TINY = (cases.Case("tiny-r2", 2, 2, ((12, 10),) * 2), cases.Case("tiny-r3", 3, 3, ((9, 14),)))
SWEEPS = {name: [("1", TINY[0]), ("2", TINY[1])] for name in ("clients", "rank")}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Everything small: problems, the limits' buffers, the time for a row."""
    monkeypatch.setattr(cases, "CASES", TINY)
    monkeypatch.setattr(run, "SHORT", ["tiny"])
    monkeypatch.setattr(run, "sweeps", lambda short: SWEEPS)
    monkeypatch.setattr(run.machine, "cold_bytes", lambda device: 2**16)
    monkeypatch.setattr("fedrot.bench.floor.CHUNK", 2**16)
    monkeypatch.setattr("fedrot.bench.floor.PRODUCT", {"cpu": 32, "cuda": 32})
    monkeypatch.setattr(run.Plan, "seconds", 0.0)
    monkeypatch.setattr(suites, "POLAR_RANKS", (2, 3))
    monkeypatch.setattr(suites, "TRUNCATIONS", TINY[1:])
    monkeypatch.setattr(run.baselines, "compiler_missing", lambda: "no compiler")


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


def test_full(tmp_path):
    done = bench("-o", tmp_path, "--threads", 2)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*-2threads.json")
    result = json.loads(path.read_text())
    assert result["machine"]["torch"] and result["machine"]["date"].endswith("UTC")
    assert [(r["case"], r["dtype"], r["align"]) for r in result["cases"]] == [
        (case, dtype, align)
        for dtype in ("float32", "bfloat16")
        for case in ("tiny-r2", "tiny-r3")
        for align in ("A", "joint")
    ]
    row = result["cases"][0]
    assert row["bytes"] == 4 * TINY[0].elements
    assert row["floor"] == max(row["bytes"] / row["bandwidth"], row["flops"] / row["sgemm"])
    forms = {"fedrot", "plan", "loop", "stacked", "per_layer", "mean", "foreach_mean"}
    assert set(row["times"]) == forms
    assert all(0 < t["q25"] <= t["median"] <= t["q75"] for t in row["times"].values())
    assert [r["threads"] for r in result["threads"]] == [1, 2, 1, 2]
    assert [r["rank"] for r in result["polar"]] == [2, 3]
    assert {"whole", "covariance", "polar", "soft", "apply"} < set(result["stages"][0])
    assert {"dense", "qr", "gram"} < set(result["truncation"][0])
    for picture in ("roofline", "scaling"):
        png = path.with_name(f"{path.stem}-{picture}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000
    assert "no compiler" in done.stdout and str(path) in done.stdout.replace("\n", "")
    line = next(line for line in done.stdout.splitlines() if "tiny-r3" in line)
    loop = row["times"]["loop"]["median"] / row["times"]["fedrot"]["median"]
    assert (f"{loop:.0f}x" if loop >= 10 else f"{loop:.1f}x") in done.stdout
    assert line.split()[1:3] == ["float32", "A"]


def test_selection_does_not_replace_a_full_run(tmp_path):
    done = bench("-o", tmp_path, "--cases", "r3", "--dtype", "float64", "--align", "B", "-q")
    assert (done.exit_code, done.stdout) == (0, "")
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-selection")
    result = json.loads(path.read_text())
    assert [(r["case"], r["dtype"], r["align"]) for r in result["cases"]] == [
        ("tiny-r3", "float64", "B")
    ]
    assert "stages" not in result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "gpt"], "cases must name some of tiny-r2, tiny-r3; got 'gpt'"),
        (["--dtype", "int8"], "dtype must be of float64, float32, bfloat16, float16; got 'int8'"),
        (["--align", "C"], "align must be of joint, A, B; got 'C'"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    done = bench("-o", tmp_path, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_show_the_results(page):
    """Made by ``python -m benchmarks.readme``, not typed."""
    text, results = (readme.ROOT / page).read_text(encoding="utf-8"), readme.load()
    assert len(results) > 1
    made = readme.block_of(page, results)
    assert readme.replaced(text, made) == text
    assert results[0]["cases"][0]["case"] in made
    with pytest.raises(ValueError, match="the page must hold the lines"):
        readme.replaced("no block", made)


def test_the_readme_shows_the_newest_run():
    rows = [{"case": "some", "dtype": dtype, "align": "A", "floor": 1.0} for dtype in readme.DTYPES]
    for row in rows:
        row["times"] = {name: {"median": 1.0} for name in ("fedrot", "stacked")}
    results = [
        {
            "machine": {
                **dict.fromkeys(("cpu", "instruction_set", "threads", "torch"), name),
                "date": date,
            },
            "cases": rows,
        }
        for name, date in (("old", "2026-01-02"), ("new", "2026-01-10"), ("older", "2025-12-31"))
    ]
    assert readme.block_of("README.md", results).startswith("new,")
    titles = [
        line
        for line in readme.block_of("docs/benchmarks.md", results).splitlines()
        if "align A" in line
    ]
    assert [title.split(",")[0] for title in titles] == 2 * ["old", "new", "older"]


def test_the_kind_of_a_machine(tmp_path):
    """Family and model where the name has no number, as in virtual machines."""
    info = tmp_path / "cpuinfo"
    first = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    second = "processor\t: 1\ncpu family\t: 6\nmodel\t\t: 1\nmodel name\t: Other\n"
    info.write_text(f"{first}\n{second}")
    assert machine.cpu_model(info) == "AMD EPYC family 25 model 17"
    found = {"device": "cpu", "system": "Linux x86_64", "instruction_set": "avx2", "threads": 2}
    kind = machine.kind({**found, "cpu": machine.cpu_model(info)})
    assert kind == "cpu-x86_64-amd-epyc-family-25-model-17-avx2-2threads"
    info.write_text(first.replace("AMD EPYC", "AMD EPYC 9B14"))
    assert machine.cpu_model(info) == "AMD EPYC 9B14"
    info.write_text("Hardware\t: board\n")
    assert machine.cpu_model(info) == machine.cpu_model(tmp_path / "none") != ""


def test_readme_table():
    times = {
        "fedrot": 2.0,
        "plan": 1.76,
        "loop": 100.0,
        "stacked": 24.0,
        "per_layer": 26.0,
        "mean": 3.0,
    }
    row = {
        "case": "some",
        "dtype": "float32",
        "align": "A",
        "floor": 1.6,
        "times": {name: {"median": t} for name, t in times.items()},
    }
    machine = {"cpu": "C", "instruction_set": "avx2", "threads": 2, "date": "2026-01-02 03:04 UTC"}
    result = {"machine": {**machine, "torch": "9"}, "cases": [row, {**row, "align": "joint"}]}
    lines = readme.block([result], "float32").splitlines()
    assert lines[0] == "C, avx2, 2 threads, float32, align A (2026-01-02, torch 9):"
    assert lines[4:] == ["| some | 50x | 12x | 1.5x |  | 1.25 | 1.10 |"]
    result["cases"].append({**row, "dtype": "bfloat16", "floor": 0.8})
    lines = readme.block([result], "bfloat16").splitlines()
    assert lines[0] == "C, avx2, 2 threads, bfloat16, align A (2026-01-02, torch 9):"
    assert lines[4:] == ["| some | 50x | 12x | 1.5x |  | 2.50 | 2.20 |"]
