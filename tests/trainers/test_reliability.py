"""Checkpoints are whole or not there, runs go on exactly or say why not, and nothing that is not finite is kept."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import hf_rnn
from hf_rnn import GRUConfig, GRUForCausalLM, NonFiniteLossError, RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn_trainers.reliability import manifest
from hf_rnn_trainers.reliability.checkpoints import CheckpointError, sweep
from hf_rnn_trainers.reliability.manifest import checkpoints, find_damage, newest_whole

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = {
    "backpropagation": (RecurrentTrainer, RecurrentTrainingArguments, dict(gradient_accumulation_steps=2)),
    "zo": (hf_rnn.ZOTrainer, hf_rnn.ZOConfig, dict(num_directions=4, optim="adamw_torch")),
    "smt": (hf_rnn.SMTTrainer, hf_rnn.SMTConfig, dict(context_size=8, positions_per_sequence=4)),
    "dmt": (hf_rnn.DMTTrainer, hf_rnn.DMTConfig, dict(context_size=8, label_every=4)),
    "rate": (
        hf_rnn.RateConstrainedTrainer,
        hf_rnn.RateConstrainedConfig,
        dict(rate_shrink=0.03, rate_every=2, target_bits=2.0, rate_finetune=0.3, quantization_aware=True),
    ),
}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def stop(control):
    control.should_save = control.should_training_stop = True


def make_trainer(folder, name="backpropagation", base=None, callbacks=None, stream=False, **settings):
    trainer_class, args_class, own = TRAINERS[name]
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, hidden_dropout=0.2, conv_kernel=0)
    model = GRUForCausalLM(GRUConfig(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    rows = torch.randint(0, 60, (11, 12))
    defaults = dict(max_steps=7, save_steps=2, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2)
    defaults |= dict(report_to="none", use_cpu=True, disable_tqdm=True, output_dir=str(folder))
    data = [{"input_ids": row, "labels": row} for row in rows]
    rows = data[:3]
    options = {}
    data = Rows(data) if stream else data
    if name == "dmt":
        options["teacher"] = hf_rnn.SMTTeacher.for_student(model, hidden_size=16, encoder_layers=1, decoder_layers=1)
    args = args_class(**defaults | own | settings)
    return (base or trainer_class)(model, args, train_dataset=data, eval_dataset=rows, callbacks=callbacks, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of seven steps with checkpoints 2, 4, 6 and 7."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, trainer


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


class TestExactResume:
    @pytest.mark.parametrize("name", list(TRAINERS))
    @pytest.mark.parametrize("step", [4, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 6)]])
    def test_bit_for_bit(self, name, step, tmp_path):
        """With dropout, in the middle of an epoch of six batches, and where one ends."""
        straight = make_trainer(tmp_path / "a", name, save_strategy="no")
        straight.train()
        make_trainer(tmp_path / "b", name, callbacks=[At(step, stop)], save_strategy="no").train()
        assert [path.name for path in checkpoints(tmp_path / "b")] == [f"checkpoint-{step}"]
        resumed = make_trainer(tmp_path / "b", name, save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7
        assert same(straight, resumed)
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
        assert losses[0] == losses[1]

    def test_an_evaluation_at_the_end_of_an_epoch_changes_nothing(self, tmp_path):
        """The checkpoint of the epoch's last step is from before the evaluation, which draws a random number."""
        settings = dict(eval_strategy="epoch", save_steps=3, gradient_accumulation_steps=2)
        straight = make_trainer(tmp_path, **settings)
        straight.train()
        resumed = make_trainer(tmp_path / "b", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert same(straight, resumed)

    @pytest.mark.parametrize("step", [2, 3, 5])
    def test_streams(self, step, tmp_path):
        """Of a length that nobody knows, in the second pass over it as well."""
        straight = make_trainer(tmp_path / "a", save_strategy="no", stream=True)
        straight.train()
        make_trainer(tmp_path / "b", callbacks=[At(step, stop)], save_strategy="no", stream=True).train()
        resumed = make_trainer(tmp_path / "b", save_strategy="no", stream=True)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7 and same(straight, resumed)

    def test_a_finished_run_makes_no_further_step(self, copy, run):
        trainer = make_trainer(copy)
        output = trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 7 and same(trainer, run[1])
        assert math.isnan(output.training_loss)

    def test_is_the_stock_trainer(self, run, tmp_path):
        args = run[1].args
        args = RecurrentTrainingArguments(
            **{k: getattr(args, k) for k in ("max_steps", "learning_rate", "use_cpu")},
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            output_dir=str(tmp_path),
            report_to="none",
        )
        base = make_trainer(tmp_path)
        stock = Trainer(base.model, args, train_dataset=base.train_dataset)
        stock.train()
        assert same(stock, run[1])


class TestCheckpoints:
    def test_what_a_run_leaves(self, run):
        folder, _ = run
        assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{n}" for n in (7, 6, 4, 2)]
        assert not (folder / "_saving").exists()
        for path in checkpoints(folder):
            assert find_damage(path) is None
        content = json.loads((folder / "checkpoint-7/manifest.json").read_text())
        names = {str(path.relative_to(folder / "checkpoint-7")) for path in (folder / "checkpoint-7").rglob("*")}
        assert set(content["files"]) == names - {"manifest.json"}
        assert (content["order"], content["world_size"], content["batch"]) == (4, 1, 4)

    @pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
    def test_every_file_counts(self, copy, how):
        newest = copy / "checkpoint-7"
        for path in sorted(p for p in newest.rglob("*") if p.is_file()):
            content = path.read_bytes()
            if how == "removed":
                path.unlink()
            else:
                half, rest = content[: len(content) // 2], content[len(content) // 2 :]
                path.write_bytes(half if how == "cut" else half + bytes([rest[0] ^ 4]) + rest[1:])
            damage = find_damage(newest)
            assert damage is not None and path.name in damage
            assert newest_whole(copy)[0] == copy / "checkpoint-6"
            path.write_bytes(content)
        assert find_damage(newest) is None

    def test_the_newest_whole_one_is_taken_and_the_others_are_named(self, copy, run, caplog):
        (copy / "checkpoint-7/optimizer.pt").unlink()
        weights = copy / "checkpoint-6/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        (copy / "checkpoint-8").mkdir()
        trainer = make_trainer(copy, save_strategy="no")
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train(resume_from_checkpoint=True)
        assert same(trainer, run[1])
        text = caplog.text
        assert "checkpoint-7: optimizer.pt is missing" in text and "checkpoint-8: manifest.json is missing" in text
        assert "checkpoint-6: model.safetensors has" in text and "checkpoint-4" not in text

    def test_none_whole(self, copy):
        for path in checkpoints(copy):
            (path / "scheduler.pt").unlink()
        with pytest.raises(
            ValueError, match=r"no whole checkpoint; checkpoint-7: scheduler.pt is missing; checkpoint-6"
        ):
            make_trainer(copy).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match=r"checkpoint-4: scheduler.pt is missing.*from_pretrained"):
            make_trainer(copy).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
        with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
            make_trainer(copy).train(resume_from_checkpoint=str(copy / "nowhere"))

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
    def test_another_trainer_s_checkpoint_by_its_path(self, copy, name, run, caplog):
        checkpoint = copy / "checkpoint-6"
        (checkpoint / "manifest.json").unlink()
        trainer = make_trainer(copy, save_strategy="no")
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert same(trainer, run[1]) and "no manifest.json" in caplog.text
        (checkpoint / name).unlink()
        with pytest.raises(ValueError, match=f"checkpoint-6: {name} is missing"):
            make_trainer(copy).train(resume_from_checkpoint=str(checkpoint))

    def test_weights_alone_are_not_resumed_from(self, tmp_path):
        make_trainer(tmp_path, save_only_model=True).train()
        with pytest.raises(ValueError, match="checkpoint-7: (optimizer.pt|rng_state.pth) is missing"):
            make_trainer(tmp_path).train(resume_from_checkpoint=True)

    def test_a_save_that_was_interrupted(self, copy, caplog):
        """Half of one is removed; a whole one, not yet in place, is put there."""
        staging = copy / "_saving"
        shutil.copytree(copy / "checkpoint-4", staging / "checkpoint-5")
        (staging / "checkpoint-5/optimizer.pt").unlink()
        sweep(copy)
        assert not staging.exists() and not (copy / "checkpoint-5").exists()
        shutil.copytree(copy / "checkpoint-7", staging / "checkpoint-7")
        shutil.move(copy / "checkpoint-7", staging / "replaced-checkpoint-7")
        sweep(copy)
        assert not staging.exists() and find_damage(copy / "checkpoint-7") is None

    def test_a_manifest_names_only_what_is_inside(self, copy, tmp_path):
        (tmp_path / "outside").write_text("x")
        content = manifest.read_manifest(copy / "checkpoint-7")
        content["files"]["../../outside"] = {"size": 1, "sha256": manifest._digest(tmp_path / "outside")}
        content["sha256"] = manifest._own_digest(content)
        (copy / "checkpoint-7/manifest.json").write_text(json.dumps(content))
        assert "outside of the checkpoint" in find_damage(copy / "checkpoint-7")

    def test_the_best_one_is_known_by_its_place(self, tmp_path):
        settings = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1)
        trainer = make_trainer(tmp_path, metric_for_best_model="loss", learning_rate=1.0, **settings)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.parent == tmp_path and find_damage(best) is None
        assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)

    def test_the_latest_is_the_one_saved_last(self, copy):
        """Not the one of the highest step: a run that went back, or another one in the same folder."""
        back = make_trainer(copy, learning_rate=1e-3, callbacks=[At(3, stop)], save_strategy="no", save_total_limit=2)
        back.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
        assert newest_whole(copy)[0] == copy / "checkpoint-3"
        assert [path.name for path in checkpoints(copy)] == ["checkpoint-3", "checkpoint-7"]

    def test_a_save_that_fails_at_its_very_end_loses_nothing(self, copy, monkeypatch):
        """The checkpoint of the same step, from before, is back in its place; and all was flushed."""
        trainer = make_trainer(copy)
        replace, flushed = os.replace, []
        fsync = os.fsync

        def fail(source, target):
            if "_saving" in str(source) and str(target).endswith("run/checkpoint-2") and "replaced" not in str(source):
                raise OSError(5, "Input/output error")
            return replace(source, target)

        monkeypatch.setattr(os, "replace", fail)

        def noted(file):
            flushed.append(os.readlink(f"/proc/self/fd/{file}"))
            fsync(file)

        monkeypatch.setattr(os, "fsync", noted)
        with pytest.raises(CheckpointError, match="Input/output error"):
            trainer.train()
        assert find_damage(copy / "checkpoint-2") is None and len(checkpoints(copy)) == 4
        names = {Path(path).name for path in flushed}
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "manifest.json", "checkpoint-2"} <= names

    def test_a_disk_that_cannot_be_read(self, copy, monkeypatch):
        digest = manifest._digest

        def broken(path):
            if "checkpoint-7" in str(path):
                raise OSError(5, "Input/output error")
            return digest(path)

        monkeypatch.setattr(manifest, "_digest", broken)
        path, damages = newest_whole(copy)
        assert path == copy / "checkpoint-6" and "cannot be read" in damages["checkpoint-7"]

    def test_another_batch_is_told(self, copy, caplog):
        trainer = make_trainer(copy, per_device_train_batch_size=4, save_strategy="no")
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
        assert "was trained with 4 sequences a step, this run has 8" in caplog.text

    def test_a_damaged_best_one(self, tmp_path):
        settings = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")

        class Damage(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                for path in tmp_path.glob("checkpoint-*/model.safetensors"):
                    path.write_bytes(path.read_bytes()[:-1] + b"x")

        with pytest.raises(CheckpointError, match="load_best_model_at_end: .*model.safetensors was changed"):
            make_trainer(tmp_path, callbacks=[Damage()], **settings).train()

    def test_disk_full(self, tmp_path, monkeypatch):
        """The reason is named, the last checkpoint stays the newest, nothing half is left."""
        trainer = make_trainer(tmp_path)
        save = torch.save

        def full(thing, path, *args, **kwargs):
            if "checkpoint-4" in str(path) and "optimizer" in str(path):
                raise OSError(28, "No space left on device")
            return save(thing, path, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"checkpoint-4.*No space left.*MiB are free.*checkpoint-2 is whole"):
            trainer.train()
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
        assert not (tmp_path / "_saving").exists()

    @pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
    def test_what_was_written_is_read_back(self, name, tmp_path, monkeypatch):
        """A disk that keeps half and says nothing."""
        trainer = make_trainer(tmp_path)

        def cut(control):
            save = trainer.accelerator.wait_for_everyone

            def lose():
                path = tmp_path / "_saving/checkpoint-4" / name
                if path.exists():
                    path.write_bytes(path.read_bytes()[:-9])
                save()

            monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lose)

        trainer.add_callback(At(3, cut))
        with pytest.raises(CheckpointError, match=f"{name} cannot be read back.*checkpoint-2 is whole"):
            trainer.train()

    def test_nothing_is_unpickled(self, copy):
        """A pickle in any file that resuming reads does not run."""

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(copy / "ran"),)

        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            checkpoint = copy / "checkpoint-6"
            (checkpoint / "manifest.json").unlink(missing_ok=True)
            original = (checkpoint / name).read_bytes()
            with (checkpoint / name).open("wb") as file:
                pickle.dump(Payload(), file)
            with pytest.raises(pickle.UnpicklingError):
                make_trainer(copy, save_strategy="no").train(resume_from_checkpoint=str(checkpoint))
            assert not (copy / "ran").exists()
            (checkpoint / name).write_bytes(original)


class Poisoned(RecurrentTrainer):
    """Loss or gradient is NaN in some steps."""

    loss_at: tuple = ()
    gradient_at: tuple = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step in self.loss_at:
            return loss * float("nan")
        if self.state.global_step in self.gradient_at:
            return loss + (model.lm_head.weight * 0).sqrt().sum()
        return loss


class TestNonFinite:
    def test_skips_as_many_as_asked(self, tmp_path):
        digests = {}
        trainer = make_trainer(tmp_path, base=Poisoned, max_skipped_steps=2, logging_steps=7, save_strategy="no")
        trainer.loss_at, trainer.gradient_at = (1,), (3,)

        class Digest(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                digests[state.global_step] = [p.detach().clone() for p in model.parameters()]

        trainer.add_callback(Digest())
        trainer.train()
        for before, after, moved in [(1, 2, False), (3, 4, False), (4, 5, True)]:
            pairs = zip(digests[before], digests[after], strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs) == moved
        (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert log["skipped_steps"] == 2 and 3 < log["loss"] < 5  # the mean of six, near log(60)
        trainer.gradient_at = (3, 4)
        with pytest.raises(NonFiniteLossError, match="gradient norm nan at step 4"):
            trainer.train()

    def test_the_loss_logged_is_that_of_the_other_steps(self, tmp_path):
        kept = make_trainer(tmp_path, base=Poisoned, save_strategy="no", max_skipped_steps=7)
        kept.loss_at = (0, 2)
        assert 3 < kept.train().training_loss < 5
        losses = [entry["loss"] for entry in kept.state.log_history if "loss" in entry]
        assert [math.isnan(x) for x in losses] == [True, False, True, False, False, False, False]
        whole = make_trainer(tmp_path, base=Poisoned, save_strategy="no", max_skipped_steps=7, logging_steps=7)
        whole.loss_at = (0, 2)
        whole.train()
        (loss,) = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        finite = [x for x in losses if not math.isnan(x)]
        assert loss == pytest.approx(sum(finite) / len(finite), abs=1e-3)

    @pytest.mark.parametrize("name", ["zo", "smt", "rate"])
    def test_a_skipped_step_changes_no_weight(self, name, tmp_path):
        settings = dict(quantization_aware=False) if name == "rate" else {}
        settings |= dict(max_skipped_steps=1, max_steps=3, save_strategy="no", weight_decay=0.1)
        trainer = make_trainer(tmp_path, name, **settings)
        training_step, seen = trainer.training_step, []

        def step(model, inputs, *args):
            poisoned = trainer.state.global_step == 1
            seen.append([p.detach().clone() for p in trainer.model.parameters()])
            if poisoned:
                norm = trainer.model.model.norm.weight
                good = norm.detach().clone()
                with torch.no_grad():
                    norm.fill_(float("nan"))
            result = training_step(model, inputs, *args)
            if poisoned:
                with torch.no_grad():
                    norm.copy_(good)
            return result

        trainer.training_step = step
        trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
        if name == "zo":
            replayed = hf_rnn.ZOTrainer.replay(make_trainer(tmp_path / "b", name).model, tmp_path / "zo_replay.jsonl")
            assert all(
                torch.equal(x, y) for x, y in zip(replayed.parameters(), trainer.model.parameters(), strict=True)
            )

    def test_no_such_weights_are_saved(self, tmp_path):
        """A step that a callback spoils is found before its checkpoint is written."""

        def spoil(control):
            with torch.no_grad():
                trainer.model.lm_head.weight[3, 2] = float("inf")

        trainer = make_trainer(tmp_path, callbacks=[At(4, spoil)])
        with pytest.raises(
            NonFiniteLossError, match="lm_head.weight: not finite after step 4, .* not saved.*checkpoint-2"
        ):
            trainer.train()
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
        with pytest.raises(NonFiniteLossError):
            trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()

    def test_bad_limit(self, tmp_path):
        with pytest.raises(ValueError, match="max_skipped_steps: expected at least 0"):
            RecurrentTrainingArguments(str(tmp_path), max_skipped_steps=-1)


class TestSignals:
    def test_saves_and_exits(self, run, tmp_path):
        """In this very process: handlers are put back, and the resumed run is the one without a signal."""
        before = signal.getsignal(signal.SIGTERM)
        for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 5)):
            trainer = make_trainer(tmp_path, callbacks=[At(step, lambda control, n=number: os.kill(os.getpid(), n))])
            trainer.args.save_strategy = "no"
            with pytest.raises(SystemExit) as stopped:
                trainer.train(resume_from_checkpoint=step > 3)
            assert stopped.value.code == 128 + number
            assert newest_whole(tmp_path)[0] == tmp_path / f"checkpoint-{step}"
            assert signal.getsignal(signal.SIGTERM) is before
        resumed = make_trainer(tmp_path, save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert same(resumed, run[1])

    def test_at_the_end_of_an_epoch_its_evaluation_comes_first(self, tmp_path):
        settings = dict(eval_strategy="epoch", save_strategy="epoch")
        trainer = make_trainer(tmp_path, callbacks=[At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))], **settings)
        with pytest.raises(SystemExit):
            trainer.train()
        resumed = make_trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [3, 6, 7]

    def test_while_the_run_is_being_ended(self, tmp_path):
        class Tell(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):
                os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGCHLD)
        with pytest.raises(SystemExit) as stopped:
            make_trainer(tmp_path, callbacks=[Tell()]).train()
        assert stopped.value.code == 143 and newest_whole(tmp_path)[0] == tmp_path / "checkpoint-7"
        assert signal.getsignal(signal.SIGCHLD) is before

    def test_what_a_signal_saves_is_whole(self, tmp_path):
        settings = dict(save_only_model=True, save_strategy="no")
        tell = At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            make_trainer(tmp_path, callbacks=[tell], **settings).train()
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)

    def test_from_the_command_line(self, tmp_path):
        """SIGTERM to `hf-rnn train`, then the same command goes on."""
        (tmp_path / "text.txt").write_text("to be or not to be " * 400)
        command = [sys.executable, "-m", "hf_rnn.cli.main", "train", "--model", "mingru", "--data", "text.txt"]
        command += ["--config", "hidden_size=16,num_hidden_layers=1", "--output_dir", "out", "--max_steps", "100000"]
        command += ["--use_cpu", "--block_size", "32", "--logging_steps", "5", "--save_strategy", "no"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
            while "'loss'" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143, (tmp_path / "log").read_text()[-2000:]
        path, damages = newest_whole(tmp_path / "out")
        assert path is not None and not damages
        text = (tmp_path / "log").read_text()
        assert "SIGTERM: saving a checkpoint" in text and "Traceback" not in text
        assert load_file(path / "model.safetensors")

    @pytest.mark.slow
    def test_the_workers_of_the_loader_get_it_as_well(self, tmp_path):
        """As from a service manager, which tells all processes of a service."""
        (tmp_path / "train.py").write_text(
            "import sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_reliability import make_trainer\n"
            "settings = dict(max_steps=10**6, dataloader_num_workers=2, save_strategy='no', logging_steps=20)\n"
            "make_trainer('out', **settings).train()\n"
        )
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, "train.py"]
            process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
            while "'loss'" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(60) == 143, (tmp_path / "log").read_text()[-2000:]
        path, damages = newest_whole(tmp_path / "out")
        assert path is not None and not damages

    @pytest.mark.slow
    def test_one_of_two_processes_is_told(self, tmp_path):
        """Both save the same step and exit."""
        (tmp_path / "train.py").write_text(
            "import os, signal, sys\n"
            "sys.path.insert(0, os.environ['TESTS'])\n"
            "from test_reliability import At, make_trainer\n"
            "rank = os.environ['RANK']\n"
            "tell = At(3, lambda control: rank == '1' and os.kill(os.getpid(), signal.SIGTERM))\n"
            "try:\n"
            "    make_trainer('out', callbacks=[tell], save_strategy='no', ddp_backend='gloo').train()\n"
            "except SystemExit as stop:\n"
            "    open(f'stopped-{rank}', 'w').write(str(stop.code))\n"
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TESTS": str(Path(__file__).parent)}
        result = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["143", "143"], result.stderr[-2000:]
        path, damages = newest_whole(tmp_path / "out")
        assert path == tmp_path / "out/checkpoint-3" and not damages
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in path.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_injected_faults(tmp_path):
    """All kinds, at random moments, in processes of their own; nothing is lost, nothing goes wrong."""
    output = tmp_path / "faults.json"
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--kills", "10", "--output", str(output)]
    command += ["--trainers", "backpropagation"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    total = json.loads(output.read_text())["total"]
    assert total["faults"] > 70 and total["lost"] == total["wrong"] == 0
