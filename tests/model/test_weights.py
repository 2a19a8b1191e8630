"""Weights: naming them, finding them, refusing the wrong ones, converting them, loading them once."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from dask.base import tokenize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.hub_server import COMMIT, Hub
from support.paths import ROOT

import xr_anysat.model.anysat as anysat
from xr_anysat.config import DEVICE, MODEL, PRECISION, config
from xr_anysat.errors import AnySatWarning, DeviceError, OptionError, WeightsError
from xr_anysat.model import checkpoint as official_checkpoint
from xr_anysat.model import random_weights, state_dict, weights
from xr_anysat.model.linear import Linear
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.spec import Size
from xr_anysat.model.weights import EncoderSpec, encoder_spec, get_encoder, load_model, load_state

# Models of a few hundred kilobytes, with the structure and the eleven sensors of the real ones.
SMALL_SIZES = {
    "tiny": Size(32, 1, 2),
    "small": Size(64, 1, 2),
    "base": Size(32, 2, 2),
}
PATCH_SIZES = (
    "import xr_anysat.model.anysat as a, xr_anysat.model.spec as s; a.SIZES.update(tiny=s.Size(32, 1, 2))"
)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """No test sees the user's files, the user's options, or what another test loaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(weights, "_loaded", {})
    for name, size in SMALL_SIZES.items():
        monkeypatch.setitem(anysat.SIZES, name, size)
    with config.set(cache_dir=str(tmp_path / "cache"), weights=None, offline=False):
        yield


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def state():
    return random_weights.random_state("tiny", 3)


@pytest.fixture
def checkpoint(tmp_path, state):
    """A file as the published one is made."""
    path = tmp_path / "mine.pth"
    torch.save({"state_dict": state}, path)
    return path


def python(code, tmp_path, **env):
    """Run code in a new process; its standard output, parsed from JSON."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XR_ANYSAT_", "HUGGING"))}
    clean |= {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XR_ANYSAT_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------- specs


def test_a_spec_needs_no_torch_and_is_the_same_in_every_process(tmp_path):
    code = """
        import json, sys
        from xr_anysat.model.weights import encoder_spec
        specs = [encoder_spec("tiny", ("random", 7)), encoder_spec()]
        loaded = [m for m in ("torch", "safetensors") if m in sys.modules]
        from dask.base import tokenize
        print(json.dumps([loaded, tokenize(specs), specs[0].sha256]))
    """
    loaded, token, sha256 = python(code, tmp_path)
    assert loaded == []
    specs = [encoder_spec("tiny", ("random", 7)), encoder_spec()]
    assert token == tokenize(specs)
    assert sha256 == specs[0].sha256
    assert tokenize(specs[0]) != tokenize(replace(specs[0], precision="bfloat16"))


def test_a_spec_is_small_plain_and_hashable(checkpoint):
    spec = encoder_spec("tiny", checkpoint)
    assert spec == EncoderSpec("tiny", WeightsSource("file", str(checkpoint)), spec.sha256, "auto", "float32")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len(pickle.dumps(spec)) < 1000
    # the defaults of the public functions are of a subclass of str, which must not reach a worker
    spec = encoder_spec(MODEL, None, DEVICE, PRECISION)
    assert {type(spec.size), type(spec.device), type(spec.precision)} == {str}
    assert len({spec, copy.copy(spec)}) == 1


def test_a_path_is_made_absolute_and_hashed(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    monkeypatch.chdir(checkpoint.parent)
    specs = {encoder_spec("tiny", given) for given in (checkpoint, "mine.pth", "~/mine.pth")}
    (spec,) = specs
    assert str(spec.source) == str(checkpoint)
    assert spec.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "given", ["random:7", ("random", 7), ["random", 7], json.loads(json.dumps(("random", 7)))]
)
def test_random_weights_are_named_by_their_recipe(given):
    spec = encoder_spec("tiny", given)
    assert str(spec.source) == "random:7"
    assert spec.sha256 == hashlib.sha256(b"xr_anysat random weights v1 size=tiny seed=7").hexdigest()
    assert str(encoder_spec("tiny", "random").source) == "random:0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "huge"}, r"model='huge': expected one of 'tiny', 'small', 'base', or an AnySat module"),
        ({"model": 3}, r"model=3: expected one of 'tiny', 'small', 'base', or an AnySat module"),
        ({"weights": 3}, r"weights=3: expected None \(the official checkpoint\), a path, 'random'"),
        ({"weights": ("random", -1)}, r"weights=\('random', -1\): expected a seed from 0"),
        ({"weights": ("random", True)}, r"expected a seed from 0 to 2\*\*63 - 1"),
        ({"weights": "random:x"}, r"weights='random:x': expected a seed"),
        ({"device": "gpu"}, r"device='gpu': expected 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps'"),
        ({"device": "cuda:"}, r"device='cuda:': expected"),
        ({"device": 0}, r"device=0: expected"),
        (
            {"precision": "float64"},
            r"precision='float64': expected one of 'float32', 'bfloat16', 'float16', 'int8'",
        ),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(OptionError, match=message):
        encoder_spec(**arguments)


@pytest.mark.parametrize("given", [None, "official"])
def test_only_base_has_an_official_checkpoint(given):
    with pytest.raises(WeightsError, match=r"no official checkpoint of model='tiny', only of 'base': pass "):
        encoder_spec("tiny", given)


def test_the_names_are_those_of_the_model():
    assert set(state_dict.MODELS) == set(anysat.SIZES)


# ---------------------------------------------------------------------------- files that are none


def test_a_missing_file_says_what_weights_takes():
    with pytest.raises(
        WeightsError, match=r"there is no weights file '.*/offical' on this machine.*'random'"
    ):
        encoder_spec("tiny", "offical")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        ("a.pth", b"\n<!DOCTYPE html><html>" + b"x" * 200_000, "is a web page instead of the file"),
        ("a.bin", b"PK\x03\x04" + b"x" * 1000, r"is only 1,004 bytes, expected at least 100,000.*delete it"),
        ("a.onnx", b"x" * 200_000, r"ends in '.onnx'; expected .pth, .pt, .ckpt, .bin .* or .safetensors"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_refused_before_it_is_loaded(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        encoder_spec("tiny", tmp_path / name)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="is a folder; expected the checkpoint file in it"):
        encoder_spec("tiny", tmp_path)


def test_an_unreadable_file_says_why(tmp_path):
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    with pytest.raises(WeightsError, match=r"loop.pth' cannot be read: .*pass the path of another copy"):
        encoder_spec("tiny", loop)


# ---------------------------------------------------------------------------- files that are read


def half(state):
    return {name: tensor.half() for name, tensor in state.items()}


def hub_module(state):
    """The state dict of upstream's hub module: the model under .model, its spatial encoder twice."""
    twice = {name: tensor for name, tensor in state.items() if name.startswith("spatial_encoder.")}
    return twice | {f"model.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".PTH"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_torch_files_are_read_bare_or_wrapped(tmp_path, state, suffix, wrap):
    path = tmp_path / f"a{suffix}"
    torch.save(wrap(state), path)
    assert same(load_state(encoder_spec("tiny", path)), state)


def test_the_old_format_of_torch_is_read(tmp_path, state):
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(load_state(encoder_spec("tiny", tmp_path / "a.pth")), state)


def test_parameters_are_tensors(tmp_path, state):
    torch.save({k: torch.nn.Parameter(v) for k, v in state.items()}, tmp_path / "a.pth")
    assert same(load_state(encoder_spec("tiny", tmp_path / "a.pth")), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_is_widened(tmp_path, state, suffix):
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else save_file)(half(state), path)
    read = load_state(encoder_spec("tiny", path))
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    assert same(half(read), half(state))


def test_the_hub_modules_names_are_mapped(tmp_path, state):
    torch.save(hub_module(state), tmp_path / "a.pth")
    assert same(load_state(encoder_spec("tiny", tmp_path / "a.pth")), state)


def test_two_copies_of_one_tensor_must_agree(tmp_path, state):
    twice = hub_module(state)
    twice["spatial_encoder.cls_token"] = twice["spatial_encoder.cls_token"] + 1
    torch.save(twice, tmp_path / "a.pth")
    message = "holds 'spatial_encoder.cls_token' and 'model.spatial_encoder.cls_token' with different values"
    with pytest.raises(WeightsError, match=message):
        load_state(encoder_spec("tiny", tmp_path / "a.pth"))


def test_safetensors_are_read_without_a_second_copy_on_disk(tmp_path, state, cache):
    save_file(state, tmp_path / "a.safetensors")
    spec = encoder_spec("tiny", tmp_path / "a.safetensors")
    read = load_state(spec, ("s2",))
    assert set(read) == set(anysat.AnySat("tiny", ("s2",)).state_dict())
    assert all(torch.equal(read[name], state[name]) for name in read)
    assert not cache.exists()


class Code:
    """Unpickling it would make a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_does_not_run(tmp_path, state, zipped):
    mark, path = tmp_path / "mark", tmp_path / "a.pth"
    loaded = {"state_dict": state, "more": Code(mark)}
    torch.save(loaded, path, _use_new_zipfile_serialization=zipped)
    spec = encoder_spec("tiny", path)
    message = (
        r"contains code \((posix|nt).mkdir\), not only tensors.*torch.load\('a.pth', weights_only=False\)"
    )
    with pytest.raises(WeightsError, match=message):
        load_state(spec)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the mark is one: without the guard it would be there
    assert mark.exists()


def test_a_pickled_module_is_code(tmp_path):
    torch.save(anysat.AnySat("tiny"), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"contains code \(xr_anysat.model.anysat.AnySat\)"):
        load_state(encoder_spec("tiny", tmp_path / "a.pth"))


@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning", "ignore::DeprecationWarning")
def test_torchscript_is_code(tmp_path):
    torch.jit.script(torch.nn.Linear(200, 200)).save(tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"contains code \(a TorchScript program\)"):
        load_state(encoder_spec("tiny", tmp_path / "a.pt"))


def cut(path):
    path.write_bytes(path.read_bytes()[:150_000])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_torch_file(tmp_path, state, zipped):
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    cut(path)
    message = (
        r"a.pth' \(150,000 bytes\) is damaged or cut short, or is not a file of torch.save .*copy it again"
    )
    with pytest.raises(WeightsError, match=message):
        load_state(encoder_spec("tiny", path))


def test_a_truncated_safetensors_file(tmp_path, state):
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    cut(path)
    message = (
        r"a.safetensors' \(150,000 bytes\) is damaged or cut short, or is not a safetensors file .*again"
    )
    with pytest.raises(WeightsError, match=message):
        load_state(encoder_spec("tiny", path))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_noise_is_no_checkpoint(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello world " * 10_000)
    with pytest.raises(WeightsError, match="is damaged or cut short, or is no"):
        load_state(encoder_spec("tiny", tmp_path / name))


def drop(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("projector_aerial")}


def edit(name, change):
    return lambda state: state | {name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"18 of 293 tensors are missing \('projector_aerial.patch_embed.weight', .*, …\)\. Expected"),
        (lambda s: s | {"b": torch.zeros(1), "a": torch.zeros(1)}, r"checkpoint: 2 are unknown \('b', 'a'\)"),
        (
            edit("cls_token", lambda t: t[..., :-1]),
            r"checkpoint: 1 have another shape \('cls_token' \(1, 1, 31\), expected \(1, 1, 32\)\)",
        ),
        (
            edit("cls_token", lambda t: t * float("nan")),
            r"'cls_token' in the weights file .* holds 32 values that are not finite",
        ),
        (
            edit("cls_token", lambda t: t.double()),
            r"'cls_token' .* is torch.float64; expected float32, float16",
        ),
        (lambda s: s | {"epoch": 3}, r"holds 'epoch' besides or instead of tensors; expected a state dict"),
        (lambda s: list(s.values()), r"holds a list; expected a state dict"),
        (
            lambda s: random_weights.random_state("small", 0),
            r"is a 'small' checkpoint, .*: pass model='small'",
        ),
    ],
)
def test_what_is_not_exactly_the_checkpoint_is_refused(tmp_path, state, change, message):
    torch.save(change(state), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        load_state(encoder_spec("tiny", tmp_path / "a.pth"))


# ---------------------------------------------------------------------------- conversion


READ = f"""
    import json, sys
    {PATCH_SIZES}
    import torch
    if "--no-pickle" in {{arguments}}:
        def refuse(*a, **k): raise AssertionError("a pickle was read")
        torch.load = refuse
    from xr_anysat.model.weights import encoder_spec, load_state
    state = load_state(encoder_spec("tiny", {{path!r}}))
    print(json.dumps(float(sum(t.double().sum() for t in state.values()))))
"""


@pytest.mark.slow
def test_a_pickle_is_read_once_for_all_processes(tmp_path, checkpoint, state, cache):
    spec = encoder_spec("tiny", checkpoint)
    assert same(load_state(spec), state)
    total = python(READ.format(arguments=["--no-pickle"], path=str(checkpoint)), tmp_path)
    assert total == float(sum(tensor.double().sum() for tensor in state.values()))
    assert [p.name for p in cache.iterdir()] == [f"{spec.sha256}.safetensors"]
    assert same(load_file(cache / f"{spec.sha256}.safetensors"), state)


@pytest.mark.slow
def test_processes_may_convert_at_once(tmp_path, checkpoint, cache):
    code = READ.format(arguments=[], path=str(checkpoint))
    with ThreadPoolExecutor(2) as pool:
        totals = set(pool.map(lambda _: python(code, tmp_path), range(2)))
    assert len(totals) == 1
    assert len(list(cache.iterdir())) == 1


def test_the_converted_file_is_as_shared_as_its_folder(checkpoint, cache):
    cache.mkdir()
    cache.chmod(0o750)
    load_state(encoder_spec("tiny", checkpoint))
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_failed_conversion_leaves_nothing(checkpoint, state, cache, monkeypatch):
    def fail(tensors, path, about):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.warns(AnySatWarning, match=r"could not be cached at .*no space left.*config.set\(cache_dir="):
        assert same(load_state(encoder_spec("tiny", checkpoint)), state)
    assert list(cache.iterdir()) == []


def test_an_unwritable_cache_folder_is_warned_about_only(tmp_path, checkpoint, state):
    (tmp_path / "file").touch()
    with (
        config.set(cache_dir=str(tmp_path / "file" / "cache")),
        pytest.warns(AnySatWarning, match="every process reads and checks the checkpoint again"),
    ):
        assert same(load_state(encoder_spec("tiny", checkpoint)), state)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def of_another_source(path):
    state = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(state, path, {"source_sha256": "0" * 64, "converter": state_dict.CONVERTER})


def lose_a_tensor(path):
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    state = {name: tensor.clone() for name, tensor in load_file(path).items() if name != "cls_token"}
    save_file(state, path, about)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut, lambda path: path.write_bytes(b"?"), of_another_source, lose_a_tensor]
)
def test_a_damaged_converted_file_is_rebuilt(checkpoint, state, cache, damage):
    spec = encoder_spec("tiny", checkpoint)
    load_state(spec)
    (file,) = cache.iterdir()
    damage(file)
    assert same(load_state(spec), state)
    assert same(load_file(file), state)


def test_a_converted_file_does_not_hide_the_wrong_size(checkpoint):
    load_state(encoder_spec("tiny", checkpoint))
    with pytest.raises(WeightsError, match=r"is a 'tiny' checkpoint, and model='small' was requested"):
        load_state(encoder_spec("small", checkpoint))


def test_writing_to_loaded_weights_leaves_the_file_alone(checkpoint, state):
    spec = encoder_spec("tiny", checkpoint)
    load_state(spec)
    load_state(spec)["cls_token"].add_(1)
    assert same(load_state(spec), state)


def test_a_file_that_changed_since_the_plan_is_refused(checkpoint, state):
    spec = encoder_spec("tiny", checkpoint)
    torch.save(state | {"cls_token": state["cls_token"] + 1}, checkpoint)
    message = rf"has changed since the embedding was planned: its sha256 is \w+, expected {spec.sha256}"
    with pytest.raises(WeightsError, match=message):
        get_encoder(spec)


# ---------------------------------------------------------------------------- random weights


def test_random_weights_are_a_function_of_seed_and_name():
    whole, part = random_weights.random_state("tiny", 5), random_weights.random_state("tiny", 5, ("s2",))
    assert 0 < len(part) < len(whole)
    assert all(torch.equal(part[name], whole[name]) for name in part)
    assert not torch.equal(part["cls_token"], random_weights.random_state("tiny", 6, ("s2",))["cls_token"])


def test_random_weights_are_the_same_everywhere():
    digest = hashlib.sha256()
    for name, tensor in sorted(random_weights.random_state("tiny", 5).items()):
        digest.update(name.encode() + tensor.numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == "630d06d119deabacd78b887a915e927560e19e05e7d873387a1fa666c63cc794"


def test_random_weights_keep_the_scale_of_what_passes():
    state = random_weights.random_state("small", 1)
    linear = state["blocks.0.mlp.fc1.weight"]
    assert linear.std().item() == pytest.approx(linear.shape[1] ** -0.5, rel=0.05)
    assert abs(linear.mean().item()) < 0.01
    assert state["blocks.0.norm1.weight"].sub(1).abs().max() <= 0.1
    assert state["projector_s2.pad_parameter"] == 0


# ---------------------------------------------------------------------------- encoders


def run(model):
    x = {"s2": torch.linspace(-1, 1, 320).view(1, 2, 10, 4, 4), "s2_dates": torch.tensor([[10, 200]])}
    with torch.inference_mode():
        return model(x, patch_size=20, output="dense")


def test_the_encoder_is_ready_to_run(checkpoint, state):
    encoder = get_encoder(encoder_spec("tiny", checkpoint, device="cpu"))
    assert isinstance(encoder, anysat.AnySat)
    assert not encoder.training
    assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    packed = [n for n, layer in encoder.named_modules() if isinstance(layer, Linear)]
    names = {f"{n}.{kind}" for n in packed for kind in ("weight", "bias")}
    assert names.isdisjoint(encoder.state_dict())
    assert names | set(encoder.state_dict()) == set(state_dict.state_shapes("tiny", ("s2",)))
    plain = anysat.AnySat("tiny").eval()
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(run(encoder), run(plain), rtol=0, atol=1e-5)
    assert torch.equal(run(encoder), run(plain.pack("float32")))


def test_threads_share_one_encoder_that_is_loaded_once(checkpoint, monkeypatch):
    calls, load = [], load_state
    monkeypatch.setattr(weights, "load_state", lambda *a: calls.append(a) or load(*a))
    spec, start = encoder_spec("tiny", checkpoint, device="cpu"), threading.Barrier(8)

    def get(_):
        start.wait()
        return get_encoder(pickle.loads(pickle.dumps(spec)))

    with ThreadPoolExecutor(8) as pool:
        encoders = list(pool.map(get, range(8)))
    assert len({id(encoder) for encoder in encoders}) == 1
    assert len(calls) == 1
    assert get_encoder(replace(spec, precision="bfloat16")) is not encoders[0]  # its products are others


def test_one_load_does_not_wait_for_another(monkeypatch):
    slow, fast = encoder_spec("tiny", "random:1"), encoder_spec("tiny", "random:2")
    entered, release, load = threading.Event(), threading.Event(), load_state

    def wait(spec, sensors):
        if spec == slow:
            entered.set()
            assert release.wait(30)
        return load(spec, sensors)

    monkeypatch.setattr(weights, "load_state", wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(get_encoder, slow)
        assert entered.wait(30)
        get_encoder(fast)  # would never come back behind one lock
        assert not future.done()
        release.set()
        assert future.result(30) is get_encoder(slow)


def test_a_failure_is_not_kept(checkpoint):
    spec = encoder_spec("tiny", checkpoint)
    aside = checkpoint.rename(checkpoint.with_name("aside.pth"))
    with pytest.raises(WeightsError, match=r"there is no weights file '.*mine.pth' on this machine"):
        get_encoder(spec)
    aside.rename(checkpoint)
    assert get_encoder(spec) is get_encoder(spec)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = (
        r"device='cuda' was requested, but PyTorch .* sees only cpu.* Pass device='auto' or device='cpu'"
    )
    with pytest.raises(DeviceError, match=message):
        get_encoder(encoder_spec("tiny", "random", device="cuda"))
    assert weights.resolve_device("auto") == torch.device("cpu")


def test_devices_where_there_are_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert weights.resolve_device("auto") == weights.resolve_device("cuda") == torch.device("cuda:0")
    assert weights.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        DeviceError, match=r"device='cuda:2' .* sees only cpu, cuda:0, cuda:1 on this machine"
    ):
        weights.resolve_device("cuda:2")
    with pytest.raises(DeviceError, match="device='mps'"):
        weights.resolve_device("mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_encoder_on_a_gpu():
    encoder = get_encoder(encoder_spec("tiny", "random", device="cuda"))
    assert {p.device for p in encoder.parameters()} == {weights.resolve_device("cuda")}


def test_the_hash_is_known_where_there_is_one(checkpoint):
    spec = encoder_spec("tiny", checkpoint)
    assert weights.loaded_sha256(spec) == spec.sha256
    assert weights.loaded_sha256(encoder_spec(anysat.AnySat("tiny"))) is None


# ---------------------------------------------------------------------------- module objects


class HubModule(torch.nn.Module):
    """Wraps the model as upstream's hub module does, born in train mode."""

    def __init__(self):
        super().__init__()
        self.model = anysat.AnySat("tiny")
        self.spatial_encoder = self.model.spatial_encoder

    def forward(self, x, patch_size, output="patch"):
        return self.model(x, patch_size, output)


def test_a_module_is_used_as_it_is_but_in_eval_mode():
    module = HubModule()
    spec = encoder_spec(module)
    assert spec.size == "tiny"
    assert spec.sha256 is None
    assert module.training
    assert get_encoder(spec) is module
    assert not module.training
    assert encoder_spec(module) != spec  # its weights may have changed: no result may be reused


def test_a_module_that_is_gone():
    spec = encoder_spec(anysat.AnySat("tiny"))
    gc.collect()
    with pytest.raises(
        WeightsError, match=r"passed as model no longer exists: keep a reference .*weights=PATH"
    ):
        get_encoder(spec)


def test_a_module_in_another_process():
    spec = EncoderSpec("tiny", WeightsSource("module", "of-another-process"), None, "auto", "float32")
    message = (
        r"lives in one process only, and this is another one; or save its weights.*model='tiny', weights=PATH"
    )
    with pytest.raises(WeightsError, match=message):
        get_encoder(spec)


def test_a_module_elsewhere_than_asked_for():
    module = anysat.AnySat("tiny").to("meta")
    with pytest.raises(
        DeviceError, match=r"is on 'meta', and device='cpu' was requested. Call model.to\('cpu'\)"
    ):
        get_encoder(encoder_spec(module, device="cpu"))
    assert get_encoder(encoder_spec(module)) is module


def test_modules_that_are_no_anysat():
    with pytest.raises(
        OptionError, match=r"a Linear with cls tokens of width none; expected an AnySat module"
    ):
        encoder_spec(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match=r"weights='random' and a module object as model"):
        encoder_spec(anysat.AnySat("tiny"), "random")


# ---------------------------------------------------------------------------- load_model


def test_load_model_is_the_whole_model_and_a_new_one_each_time(checkpoint, state):
    model = load_model("tiny", weights=checkpoint, device="cpu")
    assert same(model.state_dict(), state)
    assert not model.training
    assert load_model("tiny", weights=checkpoint, device="cpu") is not model


def test_load_model_reads_the_options(checkpoint, state):
    with config.set(model="tiny", weights=str(checkpoint), device="cpu"):
        assert same(load_model().state_dict(), state)
        assert not same(load_model(weights="random").state_dict(), state)


def test_load_model_takes_names_only():
    with pytest.raises(OptionError, match="model=AnySat: expected one of 'tiny', 'small', 'base'"):
        load_model(anysat.AnySat("tiny"))


# ---------------------------------------------------------------------------- the official checkpoint


# What the test server calls the official checkpoint: 12 MiB, for the hub's client keeps a broken
# download by pieces of 10 MiB.
CONTENT = bytes(range(256)) * 49152
KEY = f"{official_checkpoint.OFFICIAL.repo}/{official_checkpoint.OFFICIAL.filename}"


def official(content):
    """An `Official` whose known ends of the hash are those of `content`."""
    sha256 = hashlib.sha256(content).hexdigest()
    prefix, suffix = sha256[:8], sha256[-4:]
    return replace(
        official_checkpoint.OFFICIAL, sha256_prefix=prefix, sha256_suffix=suffix, min_bytes=SMALLEST
    )


SMALLEST = official_checkpoint.MIN_FILE_BYTES
FIND = f"""
    import json, time
    from xr_anysat.errors import WeightsError
    from xr_anysat.model import checkpoint
    checkpoint.OFFICIAL = checkpoint.{official(CONTENT)!r}
    time.sleep = lambda seconds: None  # between the retries of the hub's client
    try:
        print(json.dumps([str(checkpoint.official_path()), ""]))
    except WeightsError as error:
        print(json.dumps([None, str(error)]))
"""


@pytest.fixture
def hub():
    with Hub({KEY: CONTENT}) as server:
        yield server


def find(hub, tmp_path, **env):
    """`official_path` in a new process: the path, and the message of the WeightsError."""
    return python(FIND, tmp_path, HF_ENDPOINT=hub.url, **env)


@pytest.mark.slow
def test_it_is_downloaded_once(hub, tmp_path):
    path, _ = find(hub, tmp_path)
    assert Path(path).read_bytes() == CONTENT
    assert COMMIT in path
    assert hub.count("GET") == 1
    seen = len(hub.requests)
    assert find(hub, tmp_path) == [path, ""]
    assert find(hub, tmp_path, XR_ANYSAT_OFFLINE="1") == [path, ""]
    assert len(hub.requests) == seen  # what is here is used without asking


def test_a_broken_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.break_after = 11 * 2**20
    path, message = find(hub, tmp_path)
    if path is None:  # the hub's client resumes only from version 1.0 on; before, the next call does
        assert "IncompleteRead" in message
        path, _ = find(hub, tmp_path)
    assert Path(path).read_bytes() == CONTENT
    (requested,) = hub.ranges
    assert int(requested.removeprefix("bytes=").removesuffix("-")) > 0


@pytest.mark.slow
def test_a_wrong_file_is_named_and_once_deleted_downloaded_again(hub, tmp_path):
    hub.files[KEY] = CONTENT[::-1]
    _, message = find(hub, tmp_path)
    seen, expected = hashlib.sha256(CONTENT[::-1]).hexdigest(), official(CONTENT)
    assert (
        f"its sha256 is {seen}, expected {expected.sha256_prefix}…{expected.sha256_suffix}. Delete" in message
    )
    Path(re.search(r"Delete '([^']+)'", message).group(1)).unlink()
    hub.files[KEY] = CONTENT
    path, _ = find(hub, tmp_path)
    assert Path(path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "env", "cause"),
    [
        (404, {}, "could not be downloaded: .*404"),
        (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be downloaded: .*refused"),
        (None, {"HF_HUB_OFFLINE": "1"}, "could not be downloaded: .*offline mode is enabled"),
        (None, {"XR_ANYSAT_OFFLINE": "1"}, r"option offline \(XR_ANYSAT_OFFLINE\) forbids its download"),
    ],
)
def test_no_download_says_where_to_put_the_file(hub, tmp_path, status, env, cause):
    hub.status = status
    path, message = python(FIND, tmp_path, **{"HF_ENDPOINT": hub.url} | env)
    assert path is None
    assert re.search(cause, message, re.S | re.I), message
    by_hand = tmp_path / "cache" / "AnySat.pth"
    remedy = f"/resolve/main/models/AnySat.pth on a machine with a network and place it at {str(by_hand)!r}, or pass"
    assert remedy in message
    assert "weights=PATH (or XR_ANYSAT_WEIGHTS=PATH)" in message


def test_what_was_placed_by_hand_is_used_without_asking(hub, tmp_path, cache):
    cache.mkdir()
    (cache / "AnySat.pth").write_bytes(CONTENT)
    assert find(hub, tmp_path) == [str(cache / "AnySat.pth"), ""]
    assert hub.requests == []


def test_what_was_placed_by_hand_is_checked(cache, monkeypatch):
    monkeypatch.setattr(official_checkpoint, "OFFICIAL", official(CONTENT))
    cache.mkdir()
    placed = cache / "AnySat.pth"
    placed.write_bytes(CONTENT[::-1])
    with pytest.raises(WeightsError, match=r"is not the official checkpoint.*Delete '.*AnySat.pth' and call"):
        encoder_spec()
    placed.write_bytes(CONTENT[:1000])
    with pytest.raises(WeightsError, match=r"is only 1,000 bytes, expected at least 100,000"):
        encoder_spec()


def test_the_real_one_is_not_mistaken():
    known = official_checkpoint.Official(
        "g-astruc/AnySat", "models/AnySat.pth", "base", "ce124652", "3d4f", 500_000_000
    )
    assert known == official_checkpoint.OFFICIAL


def test_an_official_spec_learns_its_hash_when_it_is_loaded(tmp_path, cache, monkeypatch):
    torch.save({"state_dict": random_weights.random_state("base", 1)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(official_checkpoint, "OFFICIAL", official(content))
    early = encoder_spec(device="cpu")
    assert early == EncoderSpec("base", WeightsSource("official"), None, "cpu", "float32")
    with config.set(offline=True), pytest.raises(WeightsError, match="option offline"):
        get_encoder(early)
    assert weights.loaded_sha256(early) is None
    cache.mkdir()
    (cache / "AnySat.pth").write_bytes(content)
    encoder = get_encoder(early)
    assert weights.loaded_sha256(early) == sha256
    late = encoder_spec(device="cpu")
    assert late.sha256 == sha256
    assert get_encoder(late) is encoder


def test_offline_is_a_truth_value():
    for given, value in {True: True, 0: False, "yes": True, "False": False}.items():
        with config.set(offline=given):
            assert official_checkpoint.offline() is value
    with config.set(offline="maybe"), pytest.raises(OptionError, match=r"offline='maybe' .*expected 1 or 0"):
        official_checkpoint.offline()


def test_the_default_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with config.set(cache_dir=None):
        assert official_checkpoint.cache_dir().name == "xr_anysat"
    with config.set(cache_dir="~/there"):
        assert official_checkpoint.cache_dir() == Path.home() / "there"
