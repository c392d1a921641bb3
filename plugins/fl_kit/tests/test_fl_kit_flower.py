"""The Flower backend: against a grid that is made of plain Python, and with real processes behind TLS (slow)."""

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("flwr", reason="the extra flower is not installed")
pytest.importorskip("cryptography", reason="the extra flower is not installed")

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from eff.errors import OutputError, RequestError, RunError
from eff.files import STATE_FILE
from eff.runner import apply, resume
from eff.schemas import Recipe, TrainOptions
from eff_fl_kit import rounds
from eff_fl_kit.flower import client as node_side
from eff_fl_kit.flower.app_folder import write_app
from eff_fl_kit.flower.certificates import make_certificates
from eff_fl_kit.flower.processes import local_federation, watch
from eff_fl_kit.flower.records import from_record, to_record
from eff_fl_kit.flower.server import FlowerBackend

OPTIONS = {"rounds": 4, "n_clients": 6, "active_ratio": 1.0, "local_epochs": 1, "batch_size": 16}
RECIPE = Recipe(
    model="eff.testing.samples:tiny_cnn",
    data="eff.testing.samples:blobs",
    methods=({"name": "fl_fedspeed", "options": OPTIONS},),
    device="cpu",
)


class PlainGrid:
    """A grid whose nodes run the ClientApp's own functions here; those in `dead` take messages and say nothing."""

    def __init__(self, nodes):
        self.contexts = {
            100 + index: Context(0, 100 + index, {"partition-id": index, "num-partitions": nodes}, RecordDict(), {})
            for index in range(nodes)
        }
        self.dead = set()
        self.gone = set()
        self.broken = set()
        self.replies = {}
        self.trained = []

    def get_node_ids(self):
        return [node for node in self.contexts if node not in self.gone]

    def push_messages(self, messages):
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            identifier = str(len(self.replies))
            self.replies[identifier] = None
            identifiers.append(identifier)
            message.metadata._message_id = identifier
            if message.metadata.message_type == "train":
                self.trained.append((node, "model" in message.content))
            if node in self.broken:
                self.replies[identifier] = Message(Error(3, "it broke"), reply_to=message)
            elif node not in self.dead:
                act = {"query": node_side.greet, "train": node_side.train}[message.metadata.message_type]
                try:
                    self.replies[identifier] = act(message, self.contexts[node])
                except Exception as error:  # so does Flower
                    self.replies[identifier] = Message(Error(3, f"Traceback\n{error}"), reply_to=message)
        return identifiers

    def pull_messages(self, identifiers):
        return [self.replies[identifier] for identifier in list(identifiers) if self.replies[identifier] is not None]


@pytest.fixture
def on_grid(monkeypatch):
    """Give a function that runs the recipe over a grid; `before_round` may change the grid."""
    for name in ("_run_id", "_node_id", "_task_id"):  # a ServerApp's process has these
        monkeypatch.setattr(TaskIdentity, name, 0)

    def run(grid, out, before_round=lambda index: None, recipe=RECIPE, round_timeout=0.3, log=None):
        class Backend(FlowerBackend):
            def reachable(self):
                before_round(self.round)
                return super().reachable()

        def make(method, run, parts):
            return Backend(grid, recipe, run, len(parts), round_timeout, 1.0)

        monkeypatch.setattr(rounds, "make_backend", make)
        try:
            return apply(recipe, out, force=True, log=log)
        finally:
            monkeypatch.setattr(rounds, "make_backend", None)

    return run


def rounds_of(count):
    return RECIPE.model_copy(update={"train": TrainOptions(epochs=count)})


def weights_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def rows_of(report):
    return report.after.metrics.tables["rounds"]


def test_over_a_grid_and_in_process_the_same_model_and_the_same_bytes_come_out(on_grid, tmp_path):
    grid = PlainGrid(3)
    there, here = on_grid(grid, tmp_path / "grid"), apply(RECIPE, tmp_path / "here")
    assert rows_of(there) == rows_of(here)
    a, b = weights_of(tmp_path / "grid"), weights_of(tmp_path / "here")
    assert all(torch.equal(a[name], b[name]) for name in a)
    # The whole model goes to a node once; its clients' memories stay there.
    assert [first for _, first in grid.trained] == [True] * 3 + [False] * 9
    assert "client/4" in grid.contexts[101].state and "client/4" not in grid.contexts[100].state


def test_a_silent_node_is_left_out_paused_and_asked_again(on_grid, tmp_path):
    grid = PlainGrid(3)

    def before_round(index):
        grid.dead = {101} if index == 1 else set()

    report = on_grid(grid, tmp_path / "out", before_round, rounds_of(6))
    assert [row["answered"] for row in rows_of(report)] == [6, 4, 4, 4, 6, 6]
    assert [row["drawn"] for row in rows_of(report)] == [6, 6, 4, 4, 6, 6]
    assert any("round 2: nothing usable from client 1, 4" in warning for warning in report.warnings)


def test_a_node_that_is_gone_is_not_asked_and_comes_back_with_the_model_sent_anew(on_grid, tmp_path):
    grid = PlainGrid(2)

    def before_round(index):
        grid.gone = {100} if index in (1, 2) else set()

    report = on_grid(grid, tmp_path / "out", before_round)
    assert [row["drawn"] for row in rows_of(report)] == [6, 3, 3, 6]
    assert any("SuperNode 0 is gone" in warning for warning in report.warnings)


def test_a_node_that_fails_is_reported_with_its_reason(on_grid, tmp_path):
    grid = PlainGrid(3)

    def before_round(index):
        grid.broken = {102} if index == 2 else set()

    report = on_grid(grid, tmp_path / "out", before_round)
    assert "a SuperNode failed: it broke" in report.warnings
    assert rows_of(report)[2]["answered"] == 4


def test_without_any_node_the_run_ends_with_one_line(on_grid, tmp_path):
    started = time.monotonic()
    with pytest.raises(RunError, match="no client can be reached"):
        on_grid(PlainGrid(0), tmp_path / "out")
    assert time.monotonic() - started < 10


def test_a_node_that_does_not_know_its_partition_is_told_how_and_left_out(on_grid, tmp_path):
    grid = PlainGrid(3)
    del grid.contexts[102].node_config["partition-id"]
    report = on_grid(grid, tmp_path / "out")
    assert [row["drawn"] for row in rows_of(report)] == [4, 4, 4, 4]
    assert any("start the SuperNode with --node-config 'partition-id=0" in warning for warning in report.warnings)
    assert "started with 2 of 3 SuperNodes" in report.warnings


def test_nodes_that_disagree_end_the_run(on_grid, tmp_path):
    grid = PlainGrid(2)
    grid.contexts[101].node_config["num-partitions"] = 5
    with pytest.raises(RunError, match="num-partitions=2, another 5; start all with the same"):
        on_grid(grid, tmp_path / "out")


def test_a_node_may_train_on_its_own_data(on_grid, tmp_path):
    grid = PlainGrid(3)
    grid.contexts[102].node_config["data"] = "eff.testing.samples:blobs?train=48"
    report = on_grid(grid, tmp_path / "out")
    plain = apply(RECIPE, tmp_path / "here")
    assert rows_of(report)[0]["steps"] != rows_of(plain)[0]["steps"]


def test_a_run_on_flower_cannot_be_resumed_without_its_clients(on_grid, tmp_path):
    from eff.log import Log

    class Stop(Log):
        def warn(self, message):
            super().warn(message)
            if "is gone" in message:
                raise KeyboardInterrupt

    grid, out = PlainGrid(2), tmp_path / "out"

    def before_round(index):
        grid.gone = {100} if index == 2 else set()

    with pytest.raises(KeyboardInterrupt):
        on_grid(grid, out, before_round, log=Stop())
    assert (out / STATE_FILE).exists()
    with pytest.raises(RequestError, match="clients were on Flower.*start the run anew"):
        resume(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_travel_bit_for_bit(dtype):
    tensors = {
        "a": torch.randn(3, 2).to(dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "scalar": torch.tensor(2).to(dtype),
    }
    back = from_record(to_record(tensors), torch.device("cpu"))
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensors[name]) for name in tensors)


def test_the_app_folder_is_one_that_flower_accepts(tmp_path):
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    write_app(tmp_path / "app", RECIPE, tmp_path / "out", tmp_path / "notes", 60, 30)
    config, _ = load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert Recipe.model_validate_json(config["tool"]["flwr"]["app"]["config"]["recipe"]) == RECIPE
    assert build_fab_from_disk(tmp_path / "app")
    with pytest.raises(OutputError, match="is not empty; name another folder"):
        write_app(tmp_path / "app", RECIPE, tmp_path / "out", tmp_path / "notes", 60, 30)


def test_the_certificates_make_a_connection_and_strangers_do_not(tmp_path):
    ours, strangers = tmp_path / "a", tmp_path / "b"
    ours.mkdir()
    strangers.mkdir()
    certificates = make_certificates(ours)
    assert certificates.key.stat().st_mode & 0o077 == 0
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificates.server, certificates.key)
    assert _handshake(served, certificates.authority) is None
    assert "CERTIFICATE_VERIFY_FAILED" in str(_handshake(served, make_certificates(strangers).authority))


def _handshake(served, authority):
    """Return what goes wrong between a server and a client that trusts `authority`, in memory."""
    trusting = ssl.create_default_context(cafile=str(authority))
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trusting.wrap_bio(a, b, server_hostname="127.0.0.1"), served.wrap_bio(b, a, server_side=True)
    try:
        for _ in range(4):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as error:
        return error
    return None


def test_watching_a_run_that_never_ends_ends(tmp_path):
    notes = tmp_path / "notes"
    notes.write_text(json.dumps({"event": "round", "done": 1, "total": 2, "note": ""}) + "\nhalf a li")
    seen = []
    with pytest.raises(RunError, match="has not ended after 0.5 s"):
        watch(notes, 0.5, seen.append)
    assert [note["done"] for note in seen] == [1]


@pytest.mark.parametrize("text", ["1", "3@1", "0@0", "a@b"])
def test_a_wrong_kill_is_refused(text, tmp_path):
    from eff_fl_kit.flower.commands import flower_demo

    with pytest.raises(RequestError, match="write NODE@ROUND"):
        flower_demo(tmp_path / "recipe.yaml", tmp_path / "out", nodes=3, kill=text)


# --- real processes; about a minute and a half on two cores

HARD_LIMIT = 420


@pytest.fixture
def hard_limit():
    """End the test whatever hangs."""
    timer = threading.Timer(HARD_LIMIT, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.cancel()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_a_federation_that_is_stopped_in_the_middle_leaves_no_process(tmp_path, hard_limit):
    folder, notes = tmp_path / "flower", tmp_path / "notes"
    folder.mkdir()
    write_app(tmp_path / "app", rounds_of(50), tmp_path / "out", notes, 60, 120)

    class Enough(Exception):
        pass

    def seen(note):
        if note["event"] == "round":
            raise Enough

    with pytest.raises(Enough), local_federation(folder, 2) as federation:
        federation.run_app(tmp_path / "app")
        watch(notes, HARD_LIMIT - 60, seen)
    assert not _left_running(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_on_flower_with_tls_training_goes_on_when_a_supernode_is_killed(tmp_path, hard_limit):
    """SuperLink and three SuperNodes as processes; one is killed after round 2 of 5."""
    recipe = rounds_of(5)
    out, notes, here = tmp_path / "out", tmp_path / "notes", tmp_path / "here"
    write_app(tmp_path / "app", recipe, out, notes, 45, 120)
    folder = tmp_path / "flower"
    folder.mkdir()
    with local_federation(folder, 3) as federation:
        assert _speaks_tls(federation)
        federation.run_app(tmp_path / "app")

        def seen(note):
            if note["event"] == "round" and note["done"] == 2:
                federation.kill("node-1")

        last = watch(notes, HARD_LIMIT - 60, seen)
    assert last["event"] == "done", last
    report = json.loads((out / "report.json").read_text())
    rows = report["after"]["metrics"]["tables"]["rounds"]
    assert [row["answered"] for row in rows] == [6, 6, 4, 4, 4]
    assert any("nothing usable from client 1, 4" in warning for warning in report["warnings"])
    # Until the kill the rounds are those in process, to the last bit of the loss and to the byte.
    whole = rows_of(apply(recipe, here))
    assert json.loads(json.dumps(whole[:2])) == rows[:2]
    assert not _left_running(folder)


def _left_running(folder):
    """Return the command lines of processes that still belong to the federation of `folder` after ten seconds."""
    import psutil

    deadline = time.monotonic() + 10
    while True:
        found = [
            line
            for process in psutil.process_iter(["cmdline"])
            if str(folder) in (line := " ".join(process.info["cmdline"] or ()))
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _speaks_tls(federation):
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, federation.address, str(federation.certificates.authority)], timeout=30
    )
    return done.returncode == 0


_CONNECT = """
import socket, ssl, sys
host, port = sys.argv[1].split(":")
context = ssl.create_default_context(cafile=sys.argv[2])
with socket.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain, server_hostname=host):
    pass
"""
