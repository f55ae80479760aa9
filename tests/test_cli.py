"""The command line: what a user types, and what they get when it is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from full_disk import fill_the_disk

from graphopt.cli import FAILED, INTERRUPTED, OK, WRONG, main
from graphopt.passes import Calibrate

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = MODELS / "fashion_mnist_calibration.npz"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a copy of the residual net in it."""
    shutil.copy(MODELS / "fmnist_resnet.onnx", tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_main_job_needs_no_other_flag(folder, capsys):
    assert main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq"]) == OK
    shown = capsys.readouterr()
    assert files(folder) == ["net.onnx", "net.opt.onnx"]
    onnx.checker.check_model(onnx.load("net.opt.onnx"), full_check=True)
    assert "made-up inputs" in shown.err
    assert "SQNR" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 100


def test_with_data_the_result_agrees_with_the_float_model(folder, capsys):
    command = [
        "optimize",
        "net.onnx",
        "--passes",
        "fold,calibrate,qdq",
        "--data",
        str(DATA),
        "--samples",
        "64",
        "--json",
    ]
    assert main(command) == OK
    report = json.loads(capsys.readouterr().out)
    (output,) = report["check"]["comparison"]["outputs"]
    assert output["sqnr_db"] > 20
    assert output["agreement"] > 0.9
    assert not report["synthetic"]
    assert [record["text"] for record in report["passes"]] == ["fold", "calibrate", "qdq"]
    assert report["check"]["other_nbytes"] < report["check"]["reference_nbytes"] / 2


@pytest.mark.parametrize("target", ["ort-cpu", "ort-arm", "tensorrt"])
def test_every_target_gives_a_model_that_runs(folder, target):
    command = ["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "--target", target, "-o", "out.onnx"]
    assert main([*command, "--data", str(DATA), "--samples", "16"]) == OK
    assert main(["check", "net.onnx", "out.onnx", "--data", str(DATA), "--samples", "16", "--min-sqnr", "20"]) == OK


def test_ranges_are_written_by_calibrate_and_read_without_it(folder):
    assert main(["optimize", "net.onnx", "--passes", "fold,calibrate", "--ranges", "r.json", "-o", "a.onnx"]) == OK
    assert main(["optimize", "a.onnx", "--passes", "qdq", "--ranges", "r.json", "-o", "b.onnx"]) == OK
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load("b.onnx").graph.node)


def test_a_report_is_written(folder):
    assert main(["optimize", "net.onnx", "--passes", "fold", "--report", "r.json"]) == OK
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["passes"][0]["rewrites"] > 0


def test_check_exits_with_1_under_a_limit(folder, capsys):
    assert main(["check", "net.onnx", "net.onnx", "--min-sqnr", "20", "--min-agreement", "1"]) == OK
    main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "-o", "q.onnx"])
    assert main(["check", "net.onnx", "q.onnx", "--min-sqnr", "200"]) == FAILED
    assert "below 200 dB" in capsys.readouterr().err


def test_check_shows_layers(folder, capsys):
    main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "-o", "q.onnx"])
    capsys.readouterr()
    assert main(["check", "net.onnx", "q.onnx", "--layers", "--samples", "4", "--json"]) == OK
    layers = json.loads(capsys.readouterr().out)["layers"]["outputs"]
    assert len(layers) > 5


def test_inspect_prints_one_json_document(folder, capsys):
    assert main(["inspect", "net.onnx", "--json"]) == OK
    shown = json.loads(capsys.readouterr().out)
    assert 150_000 < shown["parameters"] < 160_000


def test_passes_lists_options_with_defaults(capsys):
    assert main(["passes"]) == OK
    shown = capsys.readouterr().out
    for word in ("fold", "calibrate", "qdq", "method", "reduce_range"):
        assert word in shown


def _broken(name):
    content = {
        "text.onnx": b"hello, this is a text file\n" * 10,
        "empty.onnx": b"",
        "short.onnx": (MODELS / "fmnist_resnet.onnx").read_bytes()[:300_000],
    }
    Path(name).write_bytes(content[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net.onnx", "--passes", "fold,qqd"], ["'qqd'", "did you mean 'qdq'"]),
        (["net.onnx", "--passes", "calibrate:methd=entropy"], ["'methd'", "method"]),
        (["net.onnx", "--passes", "calibrate:method=best"], ["minmax|", "'best'"]),
        (["net.onnx", "--passes", "qdq"], ["needs ranges", "calibrate"]),
        (["net.onnx", "--passes", "qdq", "--ranges", "none.json"], ["none.json"]),
        (["net.onnx", "--passes", "fold", "--target", "gpu"], ["'gpu'", "ort-cpu"]),
        (["none.onnx", "--passes", "fold"], ["none.onnx", "no such file"]),
        ([".", "--passes", "fold", "-o", "out.onnx"], ["folder"]),
        (["text.onnx", "--passes", "fold"], ["text.onnx", "text file"]),
        (["empty.onnx", "--passes", "fold"], ["empty.onnx", "empty"]),
        (["short.onnx", "--passes", "fold"], ["short.onnx", "its end is missing"]),
        (["net.onnx", "--passes", "fold", "-o", "net.onnx"], ["it is an input"]),
        (["net.onnx", "--passes", "fold", "-o", "net.onnx", "--overwrite"], ["it is an input"]),
        (["net.onnx", "--passes", "fold", "-o", "there.onnx"], ["there.onnx", "--overwrite"]),
        (["net.onnx", "--passes", "fold", "-o", "no/such/out.onnx"], ["no/such", "create it first"]),
        (["net.onnx", "--passes", "fold", "--report", "r.txt"], [".json", "r.txt"]),
        (["net.onnx", "--passes", "fold", "--data", "none.npz"], ["none.npz", "no such file"]),
        (["net.onnx", "--passes", "fold", "--data", "names.npz"], ["'input'", "'image'"]),
        (["net.onnx", "--passes", "fold", "--data", "shapes.npz"], ["(4, 3, 28, 28)", "[N, 1, 28, 28]"]),
        (["net.onnx", "--passes", "fold", "--data", "types.npz"], ["uint8", "scale it yourself"]),
        (["net.onnx", "--passes", "fold", "--samples", "0", "--data", "types.npz"], ["at least 1"]),
        (["net.onnx", "--passes", "fold", "--samples", "-3"], ["at least 1", "-3"]),
        (["net.onnx", "--passes", "fold", "--data", ""], ["path is empty", ".npz"]),
        (["net.onnx", "--passes", "fold", "--data", "fake.npz"], ["fake.npz", "another kind of file"]),
        (["net.onnx", "--passes", "fold", "--data", "feeds.py:leave"], ["feeds.py, line 2", "SystemExit"]),
        (["net.onnx", "--passes", "fold", "--data", "feeds.py:two_lines"], ["feeds.py, line 4", "one two"]),
        (["net.onnx", "--passes", "fold", "-o", ""], ["it is a folder"]),
        (["net.onnx", "--passes", "fold", "-o", "/dev/null", "--overwrite"], ["not a regular file"]),
        (["net.onnx", "--passes", "fold", "-o", "names.npz", "--data", "names.npz", "--overwrite"], ["is an input"]),
        (
            ["net.onnx", "--passes", "fold", "-o", "feeds.py", "--data", "feeds.py:leave", "--overwrite"],
            ["is an input"],
        ),
        (["net.onnx", "--passes", "fold", "-o", "link.onnx", "--overwrite"], ["it is an input"]),
        (["net.onnx", "--passes", "fold", "-o", "nowhere.onnx"], ["there is no folder", "gone; create it first"]),
        (["net.onnx", "--passes", "fold", "--report", "no/such/r.json"], ["no/such", "create it first"]),
        (["net.onnx", "--passes", "fold", "--report", "there.json"], ["there.json", "--overwrite"]),
        (["net.onnx", "--passes", "fold", "--report", "a.json", "-o", "./a.json"], ["-o and --report", "a.json"]),
        (["net.onnx", "--passes", "calibrate", "--ranges", "net.onnx", "--overwrite"], ["it is an input"]),
        (["net.onnx", "--passes", "calibrate", "--ranges", "no/such/r.json"], ["no/such", "create it first"]),
        (["net.onnx", "--passes", "calibrate", "--ranges", "."], ["it is a folder"]),
        (["net.onnx", "--passes", "calibrate", "--ranges", "there.json"], ["there.json", "--overwrite"]),
        (["net.onnx", "--passes", "calibrate", "--ranges", "r.json", "--report", "r.json"], ["--report and --ranges"]),
    ],
)
def test_a_mistake_is_one_clear_line_and_leaves_no_file(folder, capsys, monkeypatch, arguments, words):
    if arguments[0] in ("text.onnx", "empty.onnx", "short.onnx"):
        _broken(arguments[0])
    Path("there.onnx").write_bytes(b"mine")
    Path("there.json").write_bytes(b"mine")
    Path("fake.npz").write_bytes(b"not a zip file")
    Path("feeds.py").write_text(
        "def leave():\n    raise SystemExit(0)\ndef two_lines():\n    raise OSError('one\\ntwo')\n"
    )
    Path("link.onnx").symlink_to("net.onnx")
    Path("nowhere.onnx").symlink_to("gone/out.onnx")
    np.savez("names.npz", image=np.zeros((4, 1, 28, 28), np.float32))
    np.savez("shapes.npz", input=np.zeros((4, 3, 28, 28), np.float32))
    np.savez("types.npz", input=np.zeros((4, 1, 28, 28), np.uint8))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.exists()}
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of feeds.py
    assert main(["optimize", *arguments]) == WRONG
    shown = capsys.readouterr()
    assert shown.out == ""
    message = shown.err.strip()
    assert message.startswith("error:")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.exists()} == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(folder, capsys, monkeypatch):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("graphopt.files.os.open", refuse)  # root, who may run the tests, may write everywhere
    assert main(["optimize", "net.onnx", "--passes", "fold", "-o", "out.onnx"]) == WRONG
    message = capsys.readouterr().err.strip()
    assert message == "error: cannot write out.onnx: Permission denied"
    assert files(folder) == ["net.onnx"]


def test_a_file_where_a_folder_should_be_is_one_clear_line(folder, capsys):
    Path("sealed").write_bytes(b"")
    assert main(["optimize", "net.onnx", "--passes", "fold", "-o", "sealed/out.onnx"]) == WRONG
    message = capsys.readouterr().err.strip()
    assert "sealed" in message
    assert "\n" not in message


def test_a_full_disk_leaves_nothing_behind(folder, capsys, monkeypatch):
    fill_the_disk(monkeypatch)
    assert main(["optimize", "net.onnx", "--passes", "fold"]) == WRONG
    assert "No space left on device" in capsys.readouterr().err
    assert files(folder) == ["net.onnx"]


def test_the_installed_command_runs_in_a_shell(folder):
    done = subprocess.run(
        [sys.executable, "-m", "graphopt.cli", "optimize", "none.onnx", "--passes", "fold"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (WRONG, "")
    assert done.stderr.strip() == "error: none.onnx: no such file"


def test_what_cannot_be_written_is_refused_before_the_work(folder, monkeypatch):
    def work(self, graph, context):
        raise AssertionError("calibrated first")

    monkeypatch.setattr(Calibrate, "apply", work)
    for flag in ("-o", "--report", "--ranges"):
        assert main(["optimize", "net.onnx", "--passes", "calibrate", flag, "no/such/file.json"]) == WRONG


def test_a_folder_that_is_read_only_is_refused_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr("graphopt.model_io.os.access", lambda path, mode: False)  # root may write everywhere
    assert main(["optimize", "net.onnx", "--passes", "fold", "-o", "out.onnx"]) == WRONG
    assert "the folder . cannot be written to" in capsys.readouterr().err


def test_the_files_with_the_weights_of_the_input_are_never_written(folder, capsys):
    onnx.save(onnx.load("net.onnx"), "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    before = Path("big.bin").read_bytes()
    for flags in (["-o", "big.bin"], ["--ranges", "big.bin"]):
        assert main(["optimize", "big.onnx", "--passes", "fold,calibrate", *flags, "--overwrite"]) == WRONG
        assert "it is an input" in capsys.readouterr().err
    assert Path("big.bin").read_bytes() == before


@pytest.mark.parametrize("limit", [["--min-agreement", "2"], ["--min-agreement", "nan"], ["--min-sqnr", "nan"]])
def test_a_limit_that_says_nothing_is_one_clear_line(folder, capsys, limit):
    with pytest.raises(SystemExit) as stopped:
        main(["check", "net.onnx", "net.onnx", *limit])
    assert stopped.value.code == WRONG
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"error: argument {limit[0]}: invalid")
    assert "\n" not in message


def test_a_command_that_is_missing_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == WRONG
    assert capsys.readouterr().err == "error: the following arguments are required: COMMAND; see graphopt --help\n"


def test_an_interrupt_leaves_no_file(folder, capsys, monkeypatch):
    Path("feeds.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for number in range(99):\n"
        "        if number == 5:\n"
        "            raise KeyboardInterrupt\n"
        "        yield {'input': np.zeros((1, 1, 28, 28), np.float32)}\n"
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    command = ["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "--data", "feeds.py:feeds"]
    assert main([*command, "--ranges", "r.json", "--report", "report.json"]) == INTERRUPTED
    assert files(folder) == ["feeds.py", "net.onnx"]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "interrupted: no file is left half written\n")


def test_json_stays_one_document_when_there_are_warnings(folder, capsys):
    assert main(["optimize", "net.onnx", "--passes", "fold,calibrate,qdq", "--json"]) == OK
    shown = capsys.readouterr()
    assert json.loads(shown.out)["warnings"]
    assert "warning:" in shown.err


def test_ranges_from_made_up_inputs_stay_marked(folder, capsys):
    assert main(["optimize", "net.onnx", "--passes", "calibrate", "--ranges", "r.json", "-o", "a.onnx"]) == OK
    capsys.readouterr()
    command = ["optimize", "net.onnx", "--passes", "qdq", "--ranges", "r.json", "--data", str(DATA), "--samples", "4"]
    assert main([*command, "-o", "b.onnx"]) == OK
    assert "the ranges were found on made-up inputs" in capsys.readouterr().err


def test_a_result_that_was_compared_without_data_says_so(folder, capsys):
    data = ["--data", str(DATA), "--samples", "4"]
    assert main(["optimize", "net.onnx", "--passes", "calibrate", "--ranges", "r.json", "-o", "a.onnx", *data]) == OK
    capsys.readouterr()
    assert main(["optimize", "net.onnx", "--passes", "qdq", "--ranges", "r.json", "-o", "b.onnx"]) == OK
    assert "compared with the float model on made-up inputs" in capsys.readouterr().err


def test_names_are_shown_as_they_are(folder, capsys):
    odd = Path("a [red]net[bold] é.v2.onnx")
    shutil.copy("net.onnx", odd)
    assert main(["optimize", str(odd), "--passes", "fold"]) == OK
    assert main(["inspect", str(odd)]) == OK
    shown = capsys.readouterr().out
    assert "wrote a [red]net[bold] é.v2.opt.onnx" in shown
    assert shown.count(str(odd)) == 2


def test_inspect_reads_like_a_sentence(folder, capsys):
    assert main(["inspect", "net.onnx"]) == OK
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    rows = {name: " ".join(rest) for name, *rest in map(str.split, lines) if name}
    assert rows["input"] == "│ input float32 [N, 1, 28, 28]"
    assert rows["output"] == "│ output float32 [N, 10]"
    assert rows["MACs"] == "│ 13.0 M"
    assert rows["weights"].startswith("│ 610 kB (float32 610 kB in 55 tensors")
    assert max(map(len, lines)) <= 100


def test_a_model_that_onnxruntime_cannot_run_is_folded_without_verification(folder, capsys):
    text = """<ir_version: 8, opset_import: ["" : 17, "plugins" : 1]>
        g (float[N] x) => (float[N] y) { a = plugins.Swish(x) b = Identity(a) y = Relu(b) }"""
    onnx.save(onnx.parser.parse_model(text), "plugin.onnx")
    assert main(["optimize", "plugin.onnx", "--passes", "fold"]) == WRONG
    assert "--no-verify" in capsys.readouterr().err
    assert main(["optimize", "plugin.onnx", "--passes", "fold", "--no-verify", "-o", "out.onnx"]) == OK
    assert [node.op_type for node in onnx.load("out.onnx").graph.node] == ["Swish", "Relu"]


def test_a_reader_that_goes_away_is_no_error(folder):
    command = [sys.executable, "-m", "graphopt.cli", "inspect", "net.onnx"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == OK


def test_a_damaged_model_is_one_clear_line_or_still_a_model(folder, capsys):
    """Truncations and flipped bits, most of them where the structure is."""
    content = (MODELS / "fmnist_mbv2.onnx").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        if rng.random() < 0.2:
            del damaged[rng.integers(len(content)) :]
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(min(12_000, len(damaged))) if rng.random() < 0.8 else rng.integers(len(damaged))
            damaged[place] ^= 1 << int(rng.integers(8))
        Path("damaged.onnx").write_bytes(damaged)
        for command in (["inspect"], ["optimize", "--passes", "fold", "--overwrite", "-o", "out.onnx"]):
            code = main([command[0], "damaged.onnx", *command[1:]])
            message = capsys.readouterr().err.strip()
            assert code in (OK, FAILED, WRONG)
            assert code != WRONG or (message.startswith("error: ") and "\n" not in message)


def test_inspect_counts_macs_behind_sizes_that_the_graph_computes(tmp_path, capsys):
    onnx.save(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[1,3,8,8] x, float[4,3,3,3] w) => (float[A,B,C,D] y)
            <int64[1] one = {1}, int64[1] zero = {0}, int64[1] four = {4}>
            { r = Shape(one) n = Mul(r, four) z = ConstantOfShape<value = int64[1] {0}>(n) o = Add(z, one)
              hw = Slice(o, zero, one) nc = Mul(hw, zero) p = Concat<axis=0>(nc, nc, hw, hw, nc, nc, hw, hw)
              b = Pad(x, p) y = Conv(b, w) }"""
        ),
        tmp_path / "pads.onnx",
    )
    assert main(["inspect", str(tmp_path / "pads.onnx"), "--json"]) == OK
    shown = json.loads(capsys.readouterr().out)
    assert (shown["macs"], shown["macs_unknown"]) == (4 * 8 * 8 * 27, 0)
    assert shown["ops"]["Pad"] == 1
