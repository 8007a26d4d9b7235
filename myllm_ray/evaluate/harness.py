"""Tasks of lm-evaluation-harness (`lm_eval`, the extra `eval`), on models of this process.

The harness's own adapter of transformers models (`HFLM`) gets the wrapped model, so the requests, the scores and the
numbers are those of the harness's command line on the exported folder. Nothing is downloaded: tasks read local data, or
data sets that are in the cache of `datasets`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from myllm_ray.common import distributed
from myllm_ray.common.extras import require, require_installed
from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.common.seeds import preserved_random_state, seed_all
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.models.causal_lm import CausalLM

PACKAGE = "myllm_ray[eval]"
_WHY = "a task of lm-evaluation-harness"
_SEED = 1234
"""The seed of the harness's command line for the examples in the prompt."""
_BOOTSTRAP = 100_000
"""The number of resamples of the harness's command line, for metrics whose standard error has no closed form."""


class HarnessTask(NamedTuple):
    """A task or group of the harness.

    `name`: the name of a task, or a YAML file. `folder`: folder with the YAML files of further tasks, or None.
    `few_shot`: number of examples in the prompt; None: the task's. `limit`: number of documents of each task; None:
    all.
    """

    name: str
    folder: str | None = None
    few_shot: int | None = None
    limit: int | None = None


def check_installed() -> None:
    """Checks that the harness is installed, without importing it.

    Raises:
        UserError: it is not installed.
    """
    require_installed("lm_eval", PACKAGE, _WHY)


def load_tasks(task: HarnessTask, key: str = "--task") -> Any:
    """Returns a task with its data, as the harness loads it.

    Args:
        task: the task.
        key: the option or config key that names the task, for error messages.

    Raises:
        UserError: the harness is not installed.
        ConfigError: there is no such task, its file is not valid, or its data is not on this machine.
    """
    with _offline():
        require("lm_eval", PACKAGE, _WHY)
        name, folder = _named(task, key)
        manager = _manager(folder)
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "list them with `lm-eval ls tasks`"
            raise ConfigError(
                f"{key}: lm-evaluation-harness has no task {name!r}: {hint} (--task-folder adds a folder)"
            )
        try:
            with without_progress_bars():
                loaded = manager.load([name])
                for found in loaded["tasks"].values():
                    _prepare(found, task.few_shot)
        except UserError:
            raise
        except Exception as error:  # the code of a task, `datasets` and file systems raise any type
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"{key}: the data of task {name!r} can't be loaded: {reason} (only local files and data sets in the "
                "cache are read; nothing is downloaded)"
            ) from None
    if not loaded["tasks"]:
        raise ConfigError(f"{key}: {name!r} contains no task")
    return loaded


def digest(loaded: Any) -> str:
    """Returns a SHA-256 of tasks: their settings and the documents that they are evaluated on."""
    found = hashlib.sha256()
    for name, task in sorted(loaded["tasks"].items()):
        settings = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        found.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
        for document in task.eval_docs:
            found.update(json.dumps(document, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _named(task: HarnessTask, key: str) -> tuple[str, str | None]:
    """Returns the name of a task and the folder of further tasks. A YAML file is a task in its own folder."""
    if task.folder is not None and not Path(task.folder).is_dir():
        raise ConfigError(f"{key}: no folder {task.folder!r} with tasks (working directory: {Path.cwd()})")
    if not task.name.endswith((".yaml", ".yml")):
        return task.name, task.folder
    path = Path(task.name).expanduser()
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Tags)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}: {path} can't be read: {' '.join(str(error).split())[:200]}") from None
    name = given.get("task", given.get("group")) if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"{key}: {path} is not a task of lm-evaluation-harness: it has no key `task` or `group`")
    return name, str(path.absolute().parent)


class _Tags(yaml.SafeLoader):
    """Reads YAML in which `!function module.name` names Python code. The code is not run."""


_Tags.add_multi_constructor("!", lambda loader, suffix, node: None)


@cache
def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _prepare(task: Any, few_shot: int | None) -> None:
    """Applies the settings that the harness's `simple_evaluate` applies before it evaluates a task."""
    own = task.get_config("num_fewshot")
    if few_shot is not None and own != 0:  # the harness never changes a task that sets 0
        task.set_config(key="num_fewshot", value=few_shot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    loaded: Any,
    batch_size: int,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    several_ranks: bool = False,
    errors: bool = True,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the metrics of tasks by `<task>/<metric>`, and their standard errors by `<task>/<metric>_stderr`.

    A metric of a filter other than `none` is named `<task>/<metric>,<filter>`. The state of the generators of random
    numbers is the same afterwards.

    Args:
        model: a `CausalLM`, possibly wrapped, in evaluation mode.
        tokenizer: its tokenizer, which is not modified.
        loaded: the result of `load_tasks`.
        batch_size: requests per forward pass.
        limit: number of documents of each task; None: all.
        autocast: returns the context of the forward passes.
        several_ranks: divide the requests over the ranks. Every rank calls this function, and rank 0 returns the
            metrics. A task with fewer documents than ranks is evaluated by each rank.
        errors: whether to compute standard errors, which takes long for some metrics of texts.
        on_batch: called before each forward pass.

    Raises:
        ConfigError: the model is not a causal language model of transformers, or a task can't be evaluated.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, CausalLM):
        raise ConfigError(f"{_WHY} needs a causal language model of transformers, not a {type(inner).__name__}")
    with _offline(), preserved_random_state(), autocast(), torch.no_grad():
        from lm_eval.evaluator import evaluate

        seed_all("harness", _SEED)
        # The harness fails on a rank without documents.
        fewest = min(len(task.eval_docs) for task in loaded["tasks"].values())
        several_ranks &= min(fewest, limit or fewest) >= distributed.world_size()
        lm = _adapter(inner.model, copy.deepcopy(tokenizer), batch_size, several_ranks, on_batch)
        try:
            iterations = _BOOTSTRAP if errors else 0
            found = evaluate(lm, copy.copy(loaded), limit=limit, log_samples=False, bootstrap_iters=iterations)
        except (ValueError, RuntimeError, AssertionError, TypeError, KeyError) as error:
            if distributed.lost_a_peer(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"{_WHY} failed: {type(error).__name__}: {reason}") from error
    return {} if found is None else _flat(found["results"])


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, used_filter = name.partition(",")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and used_filter:
                shown = metric if used_filter == "none" else f"{metric},{used_filter}"
                found[f"{task}/{shown}"] = float(value)
    return found


def _adapter(model: Any, tokenizer: Any, batch_size: int, several_ranks: bool, on_batch: Callable[[], None]) -> Any:
    """Returns the harness's adapter of a model, which is not modified."""
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        """Divides the requests over the ranks of the run's process group."""

        def all_gather(self, tensor: Tensor) -> Tensor:
            parts = distributed.gather_objects(tensor.flatten().tolist())
            return torch.tensor([value for part in parts for value in part])

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            parts = distributed.gather_objects(obj)
            return parts if self.rank == dst else None

        def barrier(self) -> None:
            distributed.barrier()

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            on_batch()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            on_batch()
            return super()._model_generate(*args, **kwargs)

    # The constructor ties weights. They are tied already, and a backend that shards them must not find other ones.
    model.tie_weights = lambda *args, **kwargs: None
    try:
        adapter = Adapter(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        del model.tie_weights
    if several_ranks:
        adapter._rank, adapter._world_size = distributed.rank(), distributed.world_size()
    return adapter


@contextmanager
def _offline() -> Iterator[None]:
    """Prevents downloads, and hides the log messages and progress bars of the harness."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TQDM_DISABLE")
    before = {name: os.environ.get(name) for name in names}
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    os.environ.update(dict.fromkeys(names, "1"))
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with _without_downloads():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Sets the offline switches that the libraries read from the environment when they are imported."""
    import huggingface_hub.constants as hub

    try:
        import datasets.config as sets
    except ModuleNotFoundError:  # only with the extra
        yield
        return
    before = hub.HF_HUB_OFFLINE, sets.HF_DATASETS_OFFLINE, sets.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = sets.HF_DATASETS_OFFLINE = sets.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, sets.HF_DATASETS_OFFLINE, sets.HF_HUB_OFFLINE = before
