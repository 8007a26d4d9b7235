"""Architecture rules: import layers, file and function sizes, and where names may be used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "myllm_ray"
FILES = sorted(PACKAGE.rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 50


def test_layers() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_no_file_over_400_lines_and_no_function_over_80() -> None:
    long_files = [
        f"{p.relative_to(ROOT)}: {n}"
        for p in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
        if (n := len(p.read_text().splitlines())) > 400
    ]
    long_functions = [
        f"{p.relative_to(ROOT)}:{f.name}: {n}"
        for p in FILES
        for f in functions(ast.parse(p.read_text()))
        if (n := (f.end_lineno or 0) - f.lineno + 1) > 80
    ]
    assert long_files == []
    assert long_functions == []


def test_the_loop_fits_on_a_page() -> None:
    tree = ast.parse((PACKAGE / "engine" / "loop.py").read_text())
    sizes = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree)}
    assert sizes["train"] + sizes["_train_batch"] + sizes["training_step"] < 120


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "deepspeed", "accelerate", "nccl", "gloo"])
def test_no_backend_name_in_conditions_outside_accelerators(backend: str) -> None:
    found = []
    for path in FILES:
        if path.parent.name in ("accelerators", "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            tests = [node.test] if isinstance(node, (ast.If, ast.IfExp)) else []
            found += [
                f"{path}:{t.lineno}"
                for t in tests
                for c in ast.walk(t)
                if isinstance(c, ast.Constant) and c.value == backend
            ]
    assert found == []


def test_everything_below_orchestration_works_with_ray_blocked() -> None:
    """Imports every module below orchestration while `import ray` fails."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if "orchestration" not in p.parts
    ]
    code = (
        "import sys, importlib\nsys.modules['ray'] = None\n"
        f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_base_config_and_the_command_line_need_neither_torch_nor_ray() -> None:
    """A trainer's section needs torch: its class is in the trainer's file."""
    code = (
        "import sys\nimport myllm_ray, myllm_ray.cli\n"
        "from myllm_ray.config import TrainerConfig, load_config, validate\n"
        "TrainerConfig.model_json_schema()\nassert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_rays_actors_import_does_not_need_torch() -> None:
    """Each actor that holds a dataset or display events would spend seconds on the import."""
    code = (
        "import sys\nimport myllm_ray.orchestration.driver_events, myllm_ray.orchestration.ray_data\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{path.relative_to(ROOT)}:{node.name}")
    allowed = {
        "rank",
        "world_size",
        "is_main",
        "is_distributed",
        "barrier",
        "write_json",
        "folder_of",
        "checkpoints_of",
        "read_manifest",
    }
    assert [
        m
        for m in missing
        if m.split(":")[1] not in allowed and not m.split(":")[1].endswith(("Section", "Reducer", "SourceReport"))
    ] == []


def test_public_names() -> None:
    import myllm_ray

    for name in myllm_ray.__all__:
        if name not in ("train", "pretrain_loop", "sft_loop"):  # these need Ray; tests/ray uses them
            assert getattr(myllm_ray, name) is not None


def test_the_tests_for_gpus_can_be_imported_and_are_marked() -> None:
    """CI has no GPU: it collects and type-checks tests/gpu, and skips its tests."""
    import importlib

    tests = importlib.import_module("gpu.test_gpu")
    assert tests.pytestmark.name == "gpu"
    assert sum(name.startswith("test_") for name in vars(tests)) > 10
    assert '"tests/gpu"' in (ROOT / "pyproject.toml").read_text()
