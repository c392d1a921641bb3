"""Which path an op takes, and how eff bench-kernels judges what it measures."""

import json
import platform
from pathlib import Path

import pytest
import torch

from eff.cli import main
from eff_kernels.bench import Case, Library, Made, Row, device_name, installed_peers, largest_error, ops, verdict
from eff_kernels.dispatch import Op
from eff_kernels.kv_quant import kv_dequantize, kv_quantize
from eff_kernels.partial_linear import partial_linear


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", "fast")
    with pytest.raises(ValueError, match="EFF_KERNELS is 'fast'; it must be one of auto, reference, cpu, triton"):
        Op("fake_quant").choose(torch.ones(1))


@pytest.mark.parametrize("word", ["", "auto"])
def test_an_empty_path_is_none(word, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", word)
    assert Op("fake_quant").choose(torch.ones(1)).reason == "CPU tensor"


def test_what_has_one_implementation_refuses_an_unknown_path_too(monkeypatch):
    keys, salient = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 1, dtype=torch.int64)
    cache = kv_quantize(keys, keys, salient)
    x, index = torch.ones(2, 3), torch.tensor([0])
    monkeypatch.setenv("EFF_KERNELS", "bogus")
    for call in (
        lambda: kv_quantize(keys, keys, salient),
        lambda: kv_dequantize(cache),
        lambda: partial_linear(x, torch.ones(4, 3), torch.ones(4, 1), index),
    ):
        with pytest.raises(ValueError, match="EFF_KERNELS is 'bogus'; it must be one of auto, reference, cpu, triton"):
            call()


def test_triton_cannot_be_forced_on_a_dtype_without_a_kernel(monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", "triton")
    with pytest.raises(
        ValueError, match=r"EFF_KERNELS=triton, but (triton is not installed|there is no Triton kernel)"
    ):
        Op("fake_quant").choose(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_a_path_can_be_forced(path, monkeypatch):
    monkeypatch.setenv("EFF_KERNELS", path)
    op = Op("fake_quant")
    assert op.choose(torch.ones(1)).reason == f"EFF_KERNELS={path}"
    assert op.implementation(torch.ones(1)).__name__ == f"eff_kernels.fake_quant.{path}"


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_an_op_says_what_runs_where_there_is_no_kernel(path, monkeypatch):
    monkeypatch.delenv("EFF_KERNELS", raising=False)
    choice = Op("fake_quant", without_kernel=path).choose(torch.ones(1, device="meta"))
    assert (choice.path, choice.reason) == (path, "no kernel of fake_quant for torch.float32 on meta")


def rows(ours, **peers):
    times = {"eff": ours, **peers}
    kinds = {"eff": "ours", "bound": "bound"}
    return [
        Row("op", "case", name, kinds.get(name, "peer"), time, time / ours, None, None, "cpu", None)
        for name, time in times.items()
    ]


def test_a_slower_path_is_never_called_faster():
    assert verdict(rows(2.0, a=1.0, b=4.0)) == "slower: 2.00x the time of a"
    assert verdict(rows(1.0, a=3.0, b=2.0)) == "2.00x faster than b"
    assert verdict(rows(1.0, a=1.04)) == "as fast as a"
    assert verdict(rows(1.0)) == ""
    assert verdict(rows(1.0, a=3.0, bound=0.1)) == "3.00x faster than a"


def test_nan_and_differences_are_errors():
    right = torch.tensor([1.0, -2.0])
    assert largest_error(right, right) == 0
    assert largest_error(torch.tensor([1.0, -1.0]), right) == pytest.approx(0.5)
    assert largest_error(torch.tensor([1.0, torch.nan]), right) == float("inf")


@pytest.fixture
def tiny(monkeypatch):
    """One op with one case: eff doubles, the peer sleeps on it a while, the reference is exact."""
    x = torch.arange(1000.0)

    def cases(op, device, factor=2.0):
        slow = [lambda: [x * 2 for _ in range(50)]]
        choice = Op("fake_quant").choose(x).by("vectorised")
        return iter([Case("1000 values", [lambda: x * factor], {"loop": slow}, choice, 8000, reference=lambda: x * 2)])

    monkeypatch.setattr("eff_kernels.bench._cases", cases)
    return lambda factor: monkeypatch.setattr("eff_kernels.bench._cases", lambda op, device: cases(op, device, factor))


def run(capsys, *words):
    """Run the command; return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        main(["bench-kernels", *words])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_every_op_says_which_path_it_takes(capsys):
    code, out, _ = run(capsys, "--explain")
    assert code == 0
    for op in ops():
        assert f"{op}, " in out


def test_the_paths_are_json_too(capsys, tmp_path, tiny):
    file = tmp_path / "paths.json"
    code, out, _ = run(capsys, "--op", "fake_quant", "--explain", "--json", "--out", str(file))
    expected = {"op": "fake_quant", "case": "1000 values", "path": "cpu", "reason": "CPU tensor; vectorised"}
    assert code == 0 and json.loads(out) == json.loads(file.read_text()) == [expected]


def test_the_processor_is_named(monkeypatch):
    cpu = torch.device("cpu")
    text = "processor : 0\nmodel name\t: Fast Processor 9000 @ 3.0GHz\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert device_name(cpu) == "Fast Processor 9000 @ 3.0GHz"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: "processor : 0\n")  # as on ARM
    assert device_name(cpu) == (platform.processor() or platform.machine())


def test_the_table_is_json_too(capsys, tmp_path, tiny):
    code, _, _ = run(capsys, "--op", "fake_quant", "--seconds", "0.01", "--json", "--out", str(tmp_path / "table.json"))
    assert code == 0
    found = json.loads((tmp_path / "table.json").read_text())
    ours, peer = found["rows"]
    assert ours["implementation"] == "eff" and ours["error"] == 0 and ours["over_ours"] == 1
    assert peer["implementation"] == "loop" and peer["over_ours"] == peer["milliseconds"] / ours["milliseconds"]
    limits = found["limits"]
    assert limits["copy_gb_s"] > 0 and limits["torch"] == torch.__version__
    assert limits["device"] == device_name(torch.device("cpu")) and limits["threads"] == torch.get_num_threads()


def test_a_wrong_result_is_said_and_fails(capsys, tiny):
    tiny(2.1)
    code, out, _ = run(capsys, "--op", "fake_quant", "--seconds", "0.01")
    assert code == 1
    assert "WRONG" in out and "faster" not in out


def with_library(module, make):
    x = torch.arange(4.0)
    choice = Op("fake_quant").choose(x)
    library = {"theirs": Library(module, make)}
    return Case("4 values", [lambda: x * 2], {}, choice, reference=lambda: x * 2, libraries=library)


@pytest.mark.parametrize(
    ("module", "made", "said"),
    [
        ("json", Made([lambda: torch.arange(4.0) + torch.arange(4.0)]), None),
        ("json", Made([lambda: torch.arange(4.0) ** 2], expected=lambda: torch.arange(4.0).square()), None),
        ("json", Made([lambda: torch.arange(4.0) ** 2]), "theirs left out: its result differs by 0.5, expected 1e-05"),
        ("json", ImportError("needs a GPU\nand more"), "theirs left out: needs a GPU"),
        ("no_such_library", ImportError("is not asked"), ""),
    ],
)
def test_a_library_is_a_peer_where_it_is_installed_and_right(module, made, said, capsys):
    def make():
        if isinstance(made, Exception):
            raise made
        return made

    peers = dict(installed_peers(with_library(module, make)))
    assert peers == ({"theirs": made} if said is None else {})
    assert capsys.readouterr().err.strip() == (said or "")


def test_a_library_is_measured_beside_the_other_peers(capsys, monkeypatch):
    case = with_library("json", lambda: Made([lambda: torch.arange(4.0) * 2], memory=7))
    monkeypatch.setattr("eff_kernels.bench._cases", lambda op, device: iter([case]))
    _, out, _ = run(capsys, "--op", "fake_quant", "--seconds", "0.01", "--json")
    rows = {row["implementation"]: row for row in json.loads(out)["rows"]}
    assert rows["theirs"]["kind"] == "peer" and rows["theirs"]["memory"] == 7


def test_an_unknown_op_is_suggested_and_a_wrong_path_refused(capsys, monkeypatch):
    code, _, err = run(capsys, "--op", "fake_qant")
    assert code == 2 and "fake_quant" in err
    monkeypatch.setenv("EFF_KERNELS", "fast")
    code, _, err = run(capsys, "--op", "fake_quant", "--explain")
    assert code == 2 and "EFF_KERNELS is 'fast'" in err
