"""The loop: stop and resume at every step, processes, checkpoints, and what a user may get wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from schemas.errors import PairmillError
from tests.make import make_dataset
from training.checkpoint import Run
from training.config import resolve
from training.train import load_run, train

STEPS = 5
MODELS = {
    "clip": {
        "family": "clip",
        "tokenizer": "clip",
        "model": {"embed": 8, "image_size": 32, "patch": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2,
                  "context": 16, "text_width": 16, "text_layers": 1, "text_heads": 2},
        "image_size": 32, "patch": 16, "max_text_len": 16, "augmentation": "clip-crop",
        "objectives": [{"name": "contrastive"}],
    },
    "vilt": {
        "family": "vilt",
        "tokenizer": "wordpiece:256",
        "model": {"width": 16, "layers": 1, "heads": 2, "vocab": 256, "max_text_len": 16, "image_size": 32, "patch": 16,
                  "max_image_len": 5, "dropout": 0.1},
        "transform": "vilt", "image_size": 32, "patch": 16, "max_text_len": 16, "augmentation": "vilt-randaug",
        "objectives": [{"name": "masked_language"}, {"name": "matching"}, {"name": "alignment", "weight": 0.1}],
    },
}  # fmt: skip
COMMON = {"batch_size": 4, "steps": STEPS, "lr": 1e-3, "warmup": 2, "log_every": 1, "device": "cpu", "clip_norm": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("train") / "ds", shards=2, rows=9, fail={(0, 4): "timeout"})


def preset(folder: Path, name: str, **changes) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**MODELS[name], **COMMON, **changes}))
    return str(file)


def run(folder, name, dataset, output, given=None, val=None, **changes):
    return train(resolve(preset(folder, name, **changes), given or {}), [dataset.url], output, lambda event: None, val)


def losses(output):
    return [m["loss"] for m in Run(output).metrics() if "loss" in m]


def weights(output):
    return load_run(output)[0].state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize("name", MODELS)
def test_stop_and_resume_at_every_step_gives_the_same_run(tmp_path, dataset, name):
    whole = run(tmp_path, name, dataset, tmp_path / "whole")
    assert whole.finished
    for stop in range(1, STEPS):
        output = tmp_path / f"stopped{stop}"
        first = run(tmp_path, name, dataset, output, {"stop": stop})
        assert (first.step, first.finished) == (stop, False)
        assert run(tmp_path, name, dataset, output).loss == whole.loss
        assert losses(output) == losses(tmp_path / "whole")
        assert equal(weights(output), weights(tmp_path / "whole"))
    assert len(set(losses(tmp_path / "whole"))) == STEPS


def test_objectives_take_part_in_their_span_and_resume_in_it(tmp_path, dataset):
    spans = [
        {"name": "masked_language", "end": 0.6},
        {"name": "matching", "begin": 0.4},
        {"name": "alignment", "weight": 0.1, "begin": 0.4},
    ]
    run(tmp_path, "vilt", dataset, tmp_path / "whole", objectives=spans)
    told = [sorted({"mlm_loss", "itm_loss", "alignment_loss"} & m.keys()) for m in Run(tmp_path / "whole").metrics()]
    rest = ["alignment_loss", "itm_loss"]
    assert told == [["mlm_loss"], ["mlm_loss"], [*rest, "mlm_loss"], rest, rest]
    for stop in range(1, STEPS):
        run(tmp_path, "vilt", dataset, tmp_path / f"stopped{stop}", {"stop": stop}, objectives=spans)
        run(tmp_path, "vilt", dataset, tmp_path / f"stopped{stop}", objectives=spans)
        assert losses(tmp_path / f"stopped{stop}") == losses(tmp_path / "whole")
        assert equal(weights(tmp_path / f"stopped{stop}"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ([{"name": "masked_language", "end": 0.5}, {"name": "matching", "begin": 0.6}], "after 0.5 of the run"),
        ([{"name": "masked_language", "begin": 0.1}], "after 0 of the run"),
        ([{"name": "masked_language"}, {"name": "matching", "begin": 0.5, "end": 0.4}], "begins at 0.5"),
    ],
)
def test_a_run_without_an_objective_at_some_step_is_refused(tmp_path, spans, text):
    with pytest.raises(PairmillError, match=text):
        resolve(preset(tmp_path, "vilt", objectives=spans), {})


def test_objectives_that_share_a_pass_share_a_span(tmp_path, dataset):
    spans = [{"name": "masked_language"}, {"name": "matching", "begin": 0.5}, {"name": "alignment"}]
    with pytest.raises(PairmillError, match="the same `begin` and `end`"):
        run(tmp_path, "vilt", dataset, tmp_path / "run", objectives=spans)


def test_average_and_accumulation_resume_too(tmp_path, dataset):
    settings = {"ema": 0.5, "accumulate": 2}
    run(tmp_path, "vilt", dataset, tmp_path / "whole", **settings)
    run(tmp_path, "vilt", dataset, tmp_path / "stopped", {"stop": 2}, **settings)
    run(tmp_path, "vilt", dataset, tmp_path / "stopped", **settings)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    run(tmp_path, "vilt", dataset, tmp_path / "plain", accumulate=2)
    assert losses(tmp_path / "plain") == losses(tmp_path / "whole")  # the average is saved, not trained
    assert not equal(weights(tmp_path / "plain"), weights(tmp_path / "whole"))


def test_metrics_after_the_checkpoint_are_written_again(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run", {"stop": 3})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 4, "loss": 99.0}) + '\n{"step": 5, "lo')
    run(tmp_path, "clip", dataset, tmp_path / "run")
    assert [m["step"] for m in Run(tmp_path / "run").metrics()] == [1, 2, 3, 4, 5]
    assert 99.0 not in losses(tmp_path / "run")


def test_validation_chooses_best(tmp_path, dataset):
    result = run(tmp_path, "clip", dataset, tmp_path / "run", {"eval_every": 1, "keep": 1}, val=dataset.url)
    values = {m["step"]: m["val_loss"] for m in Run(tmp_path / "run").metrics() if "val_loss" in m}
    best = min(values, key=values.get)
    assert list(values) == [1, 2, 3, 4, 5]
    assert result.best == values[best]
    assert Run(tmp_path / "run").pointer("best") == best
    assert Run(tmp_path / "run").steps() == sorted({best, STEPS})
    assert Run(tmp_path / "run").chosen().name.endswith(str(best))


def test_without_validation_there_is_no_best(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run")
    assert Run(tmp_path / "run").pointer("best") is None
    assert Run(tmp_path / "run").pointer("last") == STEPS
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_another_setting_in_the_same_folder_is_an_error_that_names_it(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run", {"stop": 1})
    with pytest.raises(PairmillError, match=r"`lr` was 0.001, now 0.5") as error:
        run(tmp_path, "clip", dataset, tmp_path / "run", {"lr": 0.5})
    assert "another -o" in str(error.value)
    run(tmp_path, "clip", dataset, tmp_path / "run", {"threads": 1, "keep": 2})  # execution may change


def test_a_rerun_of_a_finished_run_does_nothing(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}
    result = run(tmp_path, "clip", dataset, tmp_path / "run")
    assert result.finished
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")} == before


def test_a_half_written_checkpoint_is_not_seen_and_goes_away(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run", {"stop": 2})
    half = tmp_path / "run" / "checkpoints" / ".tmp-host-1-00000004"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut")
    run(tmp_path, "clip", dataset, tmp_path / "run")
    assert not half.exists()


def test_bf16_trains(tmp_path, dataset):
    result = run(tmp_path, "vilt", dataset, tmp_path / "run", precision="bf16")
    assert result.loss is not None
    assert result.loss != run(tmp_path, "vilt", dataset, tmp_path / "fp32").loss


def test_computing_activations_again_changes_no_loss(tmp_path, dataset):
    run(tmp_path, "vilt", dataset, tmp_path / "kept")
    run(tmp_path, "vilt", dataset, tmp_path / "again", {"checkpointing": True})
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


def test_tensorboard_files_are_written(tmp_path, dataset):
    run(tmp_path, "clip", dataset, tmp_path / "run", {"tensorboard": True, "stop": 2})
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"contrastive_loss" in file.read_bytes()


def test_a_compiled_model_trains_alike(tmp_path, dataset, monkeypatch):
    """Traced and differentiated by torch.compile; without the code generator, which takes minutes on two cores."""
    run(tmp_path, "clip", dataset, tmp_path / "plain", {"stop": 2})
    calls = []

    def traced(module):
        calls.append(module)
        return compile_module(module, backend="aot_eager")

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    run(tmp_path, "clip", dataset, tmp_path / "compiled", {"stop": 2, "compile": True})
    assert len(calls) == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_fp16_without_a_gpu_is_an_error(tmp_path, dataset):
    with pytest.raises(PairmillError, match="fp16 needs a GPU"):
        run(tmp_path, "clip", dataset, tmp_path / "run", precision="fp16")


def test_starting_from_weights_loads_and_slows_them(tmp_path, dataset):
    run(tmp_path, "vilt", dataset, tmp_path / "first")
    start = str(Run(tmp_path / "first").chosen() / "model.safetensors")
    events = []
    config = resolve(preset(tmp_path, "vilt", weights=start, new_lr=10.0), {"stop": 1})
    train(config, [dataset.url], tmp_path / "second", events.append)
    assert any("loaded" in getattr(e, "text", "") for e in events)
    with pytest.raises(PairmillError, match="none of its weights is of a clip"):
        run(tmp_path, "clip", dataset, tmp_path / "third", weights=start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "wordpiece:many"}, "wordpiece:SIZE"),
        ({"objectives": [{"name": "contrastiv"}]}, "vilt has no objective `contrastiv`"),
        ({"model": {"size": "huge"}}, "no size of vilt"),
        ({"input": "patches"}, "has no features/patches"),
        ({"tokenizer": "clip"}, "room for 256"),
        ({"batchsize": 4}, "Did you mean `batch_size`"),
    ],
)
def test_what_a_user_may_get_wrong(tmp_path, dataset, changes, message):
    with pytest.raises(PairmillError, match=message):
        run(tmp_path, "vilt", dataset, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, dataset):
    with pytest.raises(PairmillError, match="Lower --lr"):
        run(tmp_path, "clip", dataset, tmp_path / "run", lr=1e30, warmup=0, clip_norm=None)


def command(file, dataset, output, *flags):
    return [sys.executable, "-m", "cli.main", "train", file, dataset.url, "-o", str(output), *flags]


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, dataset):
    file = preset(tmp_path, "clip", steps=4000)
    process = subprocess.Popen(command(file, dataset, tmp_path / "run"), stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    step = Run(tmp_path / "run").pointer("last")
    assert step is not None
    assert step < 4000
    result = train(resolve(file, {"stop": step + 1}), [dataset.url], tmp_path / "run", lambda event: None)
    assert result.step == step + 1


def two_processes(file, dataset, output, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            command(file, dataset, output, *flags),
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
        )
        for r in (0, 1)
    ]
    errors = [p.communicate(timeout=120)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors


WORDS_FIRST = [
    {"name": "masked_language", "end": 0.6},
    {"name": "matching", "begin": 0.6},
    {"name": "alignment", "weight": 0.1, "begin": 0.6},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in MODELS), ("vilt", {"objectives": WORDS_FIRST})], ids=str
)
def test_two_processes_train_as_one_does(tmp_path, dataset, name, changes):
    model = {**MODELS[name]["model"], **({"dropout": 0.0} if name == "vilt" else {})}
    file = preset(tmp_path, name, model=model, **changes)
    one = train(resolve(file, {}), [dataset.url], tmp_path / "one", lambda event: None)
    two_processes(file, dataset, tmp_path / "two", "--stop", "2")
    two_processes(file, dataset, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert one.finished
    # Adam turns rounding errors of near-zero gradients into steps, so the weights are compared as a whole.
    a, b = (torch.cat([t.flatten() for t in weights(tmp_path / n).values()]) for n in ("one", "two"))
    assert (a - b).norm() < 1e-3 * a.norm()
