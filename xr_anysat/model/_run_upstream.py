"""Run upstream's hub module on stored inputs, in a separate process.

Upstream's ``hubconf.py`` changes ``sys.path`` and uses names such as ``models`` and ``src`` in ``sys.modules``, so it
never runs in the user's process. This file imports nothing of xr_anysat and is run by path:
``python -P _run_upstream.py REPO local|github SIZE FOLDER``. The folder contains ``weights.safetensors`` and
``cases.npz`` (``<i>.s2``, ``<i>.dates``, ``<i>.patch_size``); the results are written there as ``outputs.npz``
(``<i>.<output>``).
"""

import sys
import urllib.error
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

OUTPUTS = ("tile", "patch", "dense", "all")
UNREACHABLE = 3  # exit status: the repository could not be downloaded


def main(repo: str, source: str, size: str, folder: Path) -> int:
    """Write the outputs of every case; return the exit status."""
    try:
        hub_module = torch.hub.load(
            repo,
            "anysat",
            source=source,
            trust_repo=True,
            pretrained=False,
            flash_attn=False,  # upstream's flash branch mixes up heads and tokens
            model_size=size,
        )
    except (urllib.error.URLError, ConnectionError, TimeoutError, RuntimeError) as error:
        # torch.hub converts the URLError of its first request to a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(error, RuntimeError) and not isinstance(cause, urllib.error.URLError):
            raise
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        return UNREACHABLE
    hub_module.model.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    hub_module.eval()  # it starts in training mode, with dropout
    outputs = {}
    with np.load(folder / "cases.npz") as cases, torch.inference_mode():
        for i in sorted({name.partition(".")[0] for name in cases.files}):
            x = {"s2": torch.from_numpy(cases[f"{i}.s2"]), "s2_dates": torch.from_numpy(cases[f"{i}.dates"])}
            for output in OUTPUTS:
                value = hub_module(x, patch_size=int(cases[f"{i}.patch_size"]), output=output)
                outputs[f"{i}.{output}"] = value.numpy()
    np.savez(folder / "outputs.npz", **outputs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])))
