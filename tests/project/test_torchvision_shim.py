"""torchvision imports beside any torch, and only the failure we know of is worked around."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from dfqlib.network._torchvision import _no_fake_kernels, import_torchvision


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: an import can only be tried once in this one."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_the_library_needs_of_torchvision_works():
    torchvision = import_torchvision()
    image = torch.rand(1, 3, 8, 8)
    assert torchvision.transforms.functional.hflip(image).equal(image.flip(-1))
    assert torchvision.utils.make_grid(image.repeat(4, 1, 1, 1), nrow=2, padding=0).shape == (3, 16, 16)
    assert torchvision.datasets.ImageFolder
    assert torchvision.models.resnet18


def test_a_second_call_returns_the_same_module():
    assert import_torchvision() is import_torchvision() is sys.modules["torchvision"]


def test_torch_is_left_as_it_was():
    before = torch.library.register_fake
    import_torchvision()
    assert torch.library.register_fake is before
    with pytest.raises(KeyError), _no_fake_kernels("torchvision::"):
        raise KeyError
    assert torch.library.register_fake is before


def test_only_the_named_operators_are_skipped():
    library = torch.library.Library("dfqlib_shim_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    with _no_fake_kernels("absent::"):
        torch.library.register_fake("absent::nms")(lambda x: x)

        @torch.library.register_fake("dfqlib_shim_test::twice", lib=library)
        def _(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x)

    meta = torch.empty(3, device="meta")
    assert torch.ops.dfqlib_shim_test.twice(meta).shape == (3,)


def test_missing_operators_do_not_stop_the_import(tmp_path):
    """A stand-in torchvision that registers a fake kernel for an operator nobody compiled."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import datasets, registrations\n")
    (package / "datasets.py").write_text("name = 'datasets'\n")
    (package / "registrations.py").write_text(
        "import torch\n\n\n@torch.library.register_fake('torchvision::absent')\ndef fake(x):\n    return x\n"
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from dfqlib.network._torchvision import import_torchvision
        torchvision = import_torchvision()
        assert torchvision.__file__.startswith({str(tmp_path)!r}), torchvision.__file__
        assert torchvision.datasets.name == "datasets"
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_another_failure_is_not_swallowed(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('a broken install')\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from dfqlib.network._torchvision import import_torchvision
        import_torchvision()
    """
    done = run_python(code)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("RuntimeError: a broken install")
