"""Sets the environment variables of the tests, independent of the shell, the container and the CI.

It is imported before torch and Ray. Time zone, locale and PYTHONHASHSEED are left unchanged, because nothing may depend
on them. CUDA_*, NCCL_* and GLOO_* are left unchanged too: they describe hardware and network. Processes that a test
starts inherit the result; they differ from it only in what the test adds.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import MutableMapping

MARK = "MYLLM_RAY_TESTS_HOME"
"""Variable with the home folder of the tests; where it equals HOME, the inherited environment is already clean."""

REMOVED_PREFIXES = (
    "RAY_",  # RAY_ADDRESS would join a cluster; RAY_AUTH_*, RAY_TRAIN_*, RAY_DATA_* change what Ray does
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",  # hub, caches, tokens, verbosity
    "ACCELERATE_",
    "FSDP_",
    "DS_",
    "DEEPSPEED_",  # backends read defaults from them
    "TORCH_",
    "TORCHELASTIC_",
    "PYTORCH_",
    "SLURM_",
    "OMPI_",
    "PMI_",  # launchers and torch's switches
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "NUMEXPR_",
    "KMP_",  # threads: they change the order of sums, and with it the last bits
    "WANDB_",
    "MLFLOW_",
    "TRACKIO_",
    "TOKENIZERS_",
    "XDG_",
    "MYLLM_RAY_",
)
REMOVED = (
    *(
        name
        for proxy in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")
        for name in (proxy, proxy.upper())
    ),
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",  # torchrun
    "NO_COLOR",
    "FORCE_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "_TYPER_FORCE_DISABLE_TERMINAL",
    "PYTHONWARNINGS",
    "BASH_ENV",
)
SET = {
    "HF_HUB_OFFLINE": "1",  # a test that contacts a hub fails immediately
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TMPDIR": "/tmp",  # sockets need a short path, and TMPDIR may be a long one
    "COLUMNS": "120",
    "LINES": "40",
    "TERM": "xterm",  # width at which rich and typer wrap
}


def neutralize(environment: MutableMapping[str, str]) -> None:
    """Removes and sets the variables of the lists above; HOME becomes an empty folder, which is removed at the end.

    No test finds Ray's token, a hub's cache or a netrc file, and no test needs write access to the user's home.
    """
    if environment.get(MARK) and environment[MARK] == environment.get("HOME"):
        return
    for name in [n for n in environment if n in REMOVED or n.startswith(REMOVED_PREFIXES)]:
        del environment[name]
    home = tempfile.mkdtemp(prefix="myllm-ray-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    environment.update(SET)
    environment.update({"HOME": home, MARK: home})


neutralize(os.environ)
