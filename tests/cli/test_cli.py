"""The command line: what it prints, what it writes, and one line with the remedy for whatever is wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dfqlib
from dfqlib import recipes
from dfqlib.__main__ import main
from dfqlib.cli import commands
from dfqlib.cli.commands import read_settings
from dfqlib.errors import InputError
from dfqlib.training import distillation

TINY = [f"--set={name}" for name in ("images=8", "synthesis_steps=2", "steps=2", "batch=4")]
DIGITS = ["quantize", "--arch", "digits_resnet8", "--bits", "w3a3", "--quiet", *TINY]

MYNET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )

number = 3
def wrong():
    return [build()]
"""


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def dfq(capfd: Any) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*arguments: Any) -> Result:
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with an architecture of a user's, its weights and images of two classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    (tmp_path / "mynet.py").write_text(MYNET)
    scope: dict[str, Any] = {}
    exec(MYNET, scope)
    torch.save(scope["build"]().state_dict(), tmp_path / "my.pt")
    for name in ("day", "night"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "1.png")
    return tmp_path


# What it does


def test_digits_are_quantized_compared_and_written(dfq: Callable[..., Result], tmp_path: Path) -> None:
    result = dfq(*DIGITS, "--evaluate", "digits", "--output", tmp_path / "q.pt")
    assert (result.code, result.err) == (0, "")
    rows = {line.split("  ")[0]: line.split() for line in result.out.splitlines() if line}
    assert rows["FP32"] == ["FP32", "100.00"]
    network = dfqlib.load_quantized(tmp_path / "q.pt")
    found = dfqlib.compare(network, dfqlib.load_model("digits_resnet8"), dfqlib.load_data("digits"))
    change = f"{found.difference:+.2f} ± {found.standard_error:.2f}"
    assert rows["fine-tuned"][1:-1] == [f"{found.top1:.2f}", *change.split(), f"{found.agreement:.1f}"]
    assert float(rows["fine-tuned"][-1]) > 0
    assert len(rows["calibrated only"]) == 7
    assert "on 500 images of digits" in result.out
    assert "w3a3, first and last layer 8 bits, weights per tensor, skip quantized; express (quick)" in result.out


def test_the_same_command_writes_the_same_network(dfq: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        assert dfq(*DIGITS, "--output", tmp_path / name, "--threads", 1).code == 0
    first, second = (dfqlib.load_quantized(tmp_path / name).state_dict() for name in ("a.pt", "b.pt"))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_real_images_are_the_ceiling(dfq: Callable[..., Result], tmp_path: Path) -> None:
    given = ["--recipe", "real", "--images", "digits", "--set=steps=2", "--set=batch=4", "--bits", "w3a3", "--quiet"]
    done = dfq("quantize", "--arch", "digits_resnet8", *given, "--output", tmp_path / "q.pt")
    assert done.code == 0, done.err
    assert "real (quick)" in done.out
    without = dfq("quantize", "--arch", "digits_resnet8", "--recipe", "real", "--output", tmp_path / "none.pt")
    assert (without.code, "name them with --images" in without.err) == (2, True)
    saved: Any = dfqlib.load_quantized(tmp_path / "q.pt").meta
    assert saved["saved"]["settings"]["images"].startswith("1297x1x16x16")


def test_without_data_the_agreement_is_on_the_synthetic_images(dfq: Callable[..., Result], tmp_path: Path) -> None:
    options = ("--edge-bits", 4, "--granularity", "channel", "--scheme", "affine", "--step", "fixed", "--skip", "float")
    result = dfq(*DIGITS, *options, "--output", tmp_path / "q.pt")
    assert result.code == 0
    assert "on the 8 synthetic images; --evaluate compares on real ones" in result.out
    assert "top-1" not in result.out
    spec = dfqlib.QuantSpec(3, 3, 4, granularity="channel", scheme="affine", step="fixed", skip="float")
    assert dfqlib.load_quantized(tmp_path / "q.pt").meta["spec"] == spec


def test_a_real_checkpoint_is_compared_on_real_images(
    dfq: Callable[..., Result], shared_data: Path, tmp_path: Path
) -> None:
    result = dfq(
        "quantize", shared_data / "models" / "resnet20-12fca82f.th", "--arch", "cifar10_resnet20", "--evaluate",
        shared_data / "cifar10" / "test", "--output", tmp_path / "q.pt", "--sha256", "12fca82f",
        "--set", "steps=2", "--set", "synthesis_steps=2", "--set", "images=16", "--set", "batch=8",
    )  # fmt: skip
    assert result.code == 0
    assert "91.64" in result.out  # 932 of 1,017
    assert "on 1,017 images of" in result.out
    assert "fine-tuning:" in result.err
    assert dfqlib.load_quantized(tmp_path / "q.pt").meta["saved"]["arch"] == "cifar10_resnet20"


def test_photographs_of_any_size_are_scaled_and_cropped(dfq: Callable[..., Result], mynet: Path) -> None:
    Image.new("RGB", (9, 7)).save(mynet / "photos" / "day" / "2.png")
    own = ("--arch", "mynet:build", "--image-shape", "3,6,6", "--classes", "day,night", "--quiet", *TINY)
    found = ("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--evaluate", "photos")
    refused = dfq("quantize", "my.pt", *own, *found, "--output", "q.pt")
    assert refused.code == 2
    assert "make all of one size" in refused.err
    result = dfq("quantize", "my.pt", *own, *found, "--resize", "7", "--output", "q.pt")
    assert (result.code, result.err) == (0, "")
    assert "on 3 images of photos" in result.out


def test_an_architecture_of_ones_own(dfq: Callable[..., Result], mynet: Path) -> None:
    result = dfq(
        "quantize", "my.pt", "--arch", "mynet:build", "--image-shape", "3,6,6", "--mean", "0.5,0.5,0.5",
        "--std", "0.2,0.2,0.2", "--classes", "day,night", "--evaluate", "photos", "--output", "q.pt", "--quiet", *TINY,
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert "on 2 images of photos" in result.out
    network = dfqlib.load_quantized(mynet / "q.pt", sys.modules["mynet"].build())
    saved = network.meta["saved"]
    assert (saved["arch"], saved["classes"], saved["mean"]) == (None, ["day", "night"], [0.5, 0.5, 0.5])


def test_class_names_come_from_a_file_too(dfq: Callable[..., Result], mynet: Path) -> None:
    (mynet / "names.txt").write_text("night\nday\n")
    arguments = ("quantize", "my.pt", "--arch", "mynet:build", "--image-shape", "3,6,6", "--output", "q.pt", "--quiet")
    assert dfq(*arguments, "--classes", "names.txt", *TINY).code == 0
    network = dfqlib.load_quantized(mynet / "q.pt", sys.modules["mynet"].build())
    assert network.meta["saved"]["classes"] == ["night", "day"]
    assert "neither names with commas nor a file" in dfq(*arguments, "--classes", "none.txt").err


def test_as_a_program_it_ends_with_the_exit_code_and_one_line(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "dfqlib", "quantize"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    remedy = 'the following arguments are required: --arch, --output; see "dfqlib quantize --help"'
    assert run.stderr == f"dfqlib: error: {remedy}\n"


def test_help_shows_a_command_to_start_with(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["quantize", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "dfqlib quantize --arch digits_resnet8 --bits w2a2 --evaluate digits --output q.pt" in shown


def test_networks_and_recipes_are_listed(dfq: Callable[..., Result]) -> None:
    listed = dfq("models").out
    assert all(name in listed for name in dfqlib.models.names())
    listed = dfq("recipes").out
    assert all(f"{name}: " in listed for name in recipes.names())
    assert "synthesis_steps=200" in listed
    explained = dfq("recipes", "express").out
    assert "    cutmix=1.0" in explained
    assert "a box of each image comes from another (from 0 to 1)" in explained
    assert "zeroq" not in explained
    assert "known are" in dfq("recipes", "magic").err


def test_both_kinds_of_file_are_described_by_the_same_facts(dfq: Callable[..., Result], tmp_path: Path) -> None:
    shares = {}
    for name, share in (("q.pt", "0%"), ("q.onnx", "20%")):
        printed = dfq(*DIGITS, "--output", tmp_path / name).out
        assert f"fine-tuned in integers, as an exported file computes: {share} of the iterations\n" in printed
        assert "channels stored in 7 bits instead of 8, to compute the same on any processor: " in printed
        (shares[name],) = [line for line in printed.splitlines() if "multiply-accumulates are quantized" in line]
    assert shares["q.pt"] == shares["q.onnx"]


# Ctrl-C and resuming


def test_ctrl_c_writes_what_is_done_and_the_same_command_goes_on(
    dfq: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part, resume = (tmp_path / name for name in ("whole.pt", "part.pt", "run.ckpt"))
    assert dfq(*DIGITS, "--output", whole).code == 0
    cutmix = distillation.cutmix

    def pressed(images: torch.Tensor) -> tuple[torch.Tensor, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return cutmix(images)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "cutmix", pressed)
        result = dfq(*DIGITS, "--output", part, "--resume", resume)
    assert result.code == 130
    assert f"interrupted; {part} has what was done; the same command resumes from {resume}" in result.err
    assert result.out == ""
    calibrated = dfqlib.load_quantized(part).state_dict()
    assert dfq(*DIGITS, "--output", part, "--resume", resume).code == 0
    ours, unbroken = dfqlib.load_quantized(part).state_dict(), dfqlib.load_quantized(whole).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in unbroken.items())
    assert not all(torch.equal(calibrated[name], value) for name, value in unbroken.items())


def test_ctrl_c_before_the_work_leaves_nothing(
    dfq: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_subject", stop)
    result = dfq(*DIGITS, "--output", tmp_path / "q.pt")
    assert (result.code, result.err) == (130, "dfqlib: interrupted; nothing more is written\n")
    assert list(tmp_path.iterdir()) == []


# What is wrong, said before the work


@pytest.fixture
def refused(dfq: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of an error; the work has not begun and nothing was written."""
    monkeypatch.setattr(recipes, "_run", lambda *_, **__: pytest.fail("the work began"))

    def run(*arguments: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = dfq(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("dfqlib: error: ")
        assert result.err.count("\n") == 1
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before
        return result.err

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "w4"], "bits='w4'"),
        (["--bits", "w1a4"], "weight_bits=1"),
        (["--edge-bits", "40"], "edge_bits=40"),
        (["--arch", "resnet1000"], 'arch="resnet1000"'),
        (["--recipe", "magic"], 'recipe="magic"'),
        (["--budget", "huge"], 'budget="huge"'),
        (["--set", "stepz=3"], "stepz="),
        (["--set", "steps"], '--set "steps" must be NAME=VALUE'),
        (["--set", "steps=few"], "steps='few'"),
        (["--seed", "-1"], "seed=-1"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'; see \"dfqlib quantize --help\""),
        (["--granularity", "layer"], "argument --granularity: invalid choice: 'layer' (choose from"),
        (["--threads", "0"], '"0" must be a whole number of at least 1'),
        (["--device", "abacus"], 'device="abacus"'),
        (["--image-shape", "32"], '"32" must be channels,height,width, for example 3,32,32'),
        (["--mean", "grey"], '"grey" must be one number per channel'),
        (["--evaluate", "cifar11"], '--evaluate="cifar11" is neither a folder nor one of digits, mnist'),
        (["--sha256", "00000000"], "00000000"),
        (["--images", "digits"], "--recipe express makes its own; calibrate and real take some"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    options: list[str], message: str, dfq: Callable[..., Result], tmp_path: Path
) -> None:
    result = dfq(*DIGITS, "--output", tmp_path / "q.pt", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("dfqlib: error: ")
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_said_before_the_work(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--output=" in refused(*DIGITS, "--output", tmp_path)
    assert "does not exist; create it first" in refused(*DIGITS, "--output", tmp_path / "none" / "q.pt")
    path = tmp_path / "teacher.pt"
    torch.save(dfqlib.load_model("digits_resnet8").state_dict(), path)
    assert "is the file of CHECKPOINT too" in refused(DIGITS[0], path, *DIGITS[1:], "--output", path)
    assert "is the file of --resume too" in refused(*DIGITS, "--output", tmp_path / "q", "--resume", tmp_path / "q")


def test_a_file_to_resume_from_that_is_something_else(dfq: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "run.ckpt").write_bytes(b"something else")
    result = dfq(*DIGITS, "--output", tmp_path / "q.pt", "--resume", tmp_path / "run.ckpt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is not the resume file of a dfqlib run; name another file or remove it" in result.err
    assert (tmp_path / "run.ckpt").read_bytes() == b"something else"
    assert not (tmp_path / "q.pt").exists()


def test_checkpoints_that_cannot_be_used(refused: Callable[..., str], tmp_path: Path) -> None:
    output = ("--output", tmp_path / "q.pt")
    path = tmp_path / "teacher.pt"
    state = dfqlib.load_model("digits_resnet8").state_dict()
    torch.save(state, path)
    whole = path.read_bytes()
    assert "does not exist" in refused(DIGITS[0], tmp_path / "none.pt", *DIGITS[1:], *output)
    wrong = ["--arch", "cifar10_resnet20"]
    assert "does not fit CifarResNet" in refused(DIGITS[0], path, *DIGITS[1:], *output, *wrong)
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(DIGITS[0], path, *DIGITS[1:], *output)
    torch.save(nn.Linear(2, 2), path)
    assert "nothing in it was run" in refused(DIGITS[0], path, *DIGITS[1:], *output)
    name = next(iter(state))
    torch.save({**state, name: state[name] * torch.nan}, path)
    assert f"{name} has NaN or infinite values" in refused(DIGITS[0], path, *DIGITS[1:], *output)


def test_image_folders_that_cannot_be_used(refused: Callable[..., str], mynet: Path) -> None:
    own = ("quantize", "my.pt", "--arch", "mynet:build", "--image-shape", "3,6,6", "--output", "q.pt", "--quiet")
    norm = ("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2")
    assert "needs --mean and --std" in refused(*own, "--evaluate", "photos")
    assert "not among classes=" in refused(*own, *norm, "--evaluate", "photos", "--classes", "noon,night")
    wrong_shape = (*own[:5], "3,8,8", *own[6:])
    assert "has images of shape (3, 6, 6), the network takes (3, 8, 8)" in refused(
        *wrong_shape, *norm, "--evaluate", "photos"
    )
    (mynet / "photos" / "noon").mkdir()
    assert "noon" in refused(*own, *norm, "--evaluate", "photos")
    Image.new("RGB", (6, 6)).save(mynet / "photos" / "noon" / "1.png")
    assert "has 3 classes, the network 2; give all names" in refused(*own, *norm, "--evaluate", "photos")
    (mynet / "empty").mkdir()
    assert "must hold <class>/<image>" in refused(*own, *norm, "--evaluate", "empty")
    (mynet / "photos" / "day" / "1.png").write_text("not a picture")
    assert "is no image that can be read" in refused(*own, *norm, "--evaluate", "photos")


def test_architectures_of_ones_own_that_cannot_be_used(refused: Callable[..., str], mynet: Path) -> None:
    def message(arch: str, *options: str) -> str:
        return refused("quantize", "my.pt", "--arch", arch, "--output", "q.pt", *options)

    shape = ("--image-shape", "3,6,6")
    assert "is your own, so --image-shape C,H,W is needed too" in message("mynet:build")
    assert "so CHECKPOINT is needed too" in refused("quantize", "--arch", "mynet:build", "--output", "q.pt", *shape)
    assert "no module yournet here; run in the folder that holds it" in message("yournet:build", *shape)
    assert "mynet has no callable built" in message("mynet:built", *shape)
    assert "mynet has no callable number" in message("mynet:number", *shape)
    assert "made a list; it must return a torch.nn.Module" in message("mynet:wrong", *shape)
    assert "must be module:callable" in message("mynet.py:", *shape)


def test_errors_inside_a_users_module_are_not_hidden(mynet: Path) -> None:
    (mynet / "broken.py").write_text("import a_module_that_nobody_has")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        main(["quantize", "my.pt", "--arch", "broken:build", "--image-shape", "3,6,6", "--output", "q.pt"])


def test_settings_have_the_type_of_their_default() -> None:
    texts = ["steps=20", "lr=1", "bf16=false", "flip=True", "cutmix=5e-1"]
    settings = read_settings(texts, "express", "quick")
    assert settings == {"steps": 20, "lr": 1.0, "bf16": False, "flip": True, "cutmix": 0.5}
    assert isinstance(settings["lr"], float)
    for text in ("flip=2", "steps=2.5", "lr=fast", "cutmix=2", "bf16=yes"):
        with pytest.raises(InputError, match=text.partition("=")[0]):
            read_settings([text], "express", "quick")
