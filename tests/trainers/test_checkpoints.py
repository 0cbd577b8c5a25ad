"""Checkpoints are whole or not there, and a run goes on from a whole one or says why not."""

import errno
import json
import os
import pickle
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from runs import At, make_trainer, same, stop
from transformers import TrainerCallback

import hf_rnn
from hf_rnn import GRUForCausalLM
from hf_rnn_trainers.reliability import manifest
from hf_rnn_trainers.reliability.checkpoints import CheckpointError, sweep
from hf_rnn_trainers.reliability.manifest import checkpoints, find_damage, newest_whole


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

    def test_weights_alone_can_be_the_best_ones(self, tmp_path):
        settings = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")
        trainer = make_trainer(tmp_path, save_only_model=True, save_total_limit=1, **settings)
        trainer.train()
        assert find_damage(Path(trainer.state.best_model_checkpoint)) is None
        assert len(checkpoints(tmp_path)) <= 2

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


class TestFolders:
    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
    def test_that_cannot_be_flushed(self, tmp_path, monkeypatch, number):
        """As on CIFS, sshfs and FUSE mounts, or Windows; files still have to be, and a broken disk is one."""
        fsync, flushed = os.fsync, []

        def refuse(file):
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(refuse.number, os.strerror(refuse.number))
            fsync(file)
            flushed.append(file)

        monkeypatch.setattr(os, "fsync", refuse)
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner/file").write_text("x")
        refuse.number = number
        manifest.flush(tmp_path)
        assert len(flushed) == 1
        refuse.number = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            manifest.flush(tmp_path)

        def refuse_files(file):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse_files)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            manifest.flush_one(tmp_path / "inner/file")


class TestAccept:
    def test_weights_sharded_otherwise(self, copy, run):
        """Refused as damaged, with the way to accept them; then the run goes on as it would have."""
        checkpoint = copy / "checkpoint-6"
        make_trainer(copy)  # has a model of the kind
        model = GRUForCausalLM.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="6KB")
        with pytest.raises(ValueError, match="model.safetensors is missing.*accept_checkpoint"):
            make_trainer(copy).train(resume_from_checkpoint=str(checkpoint))
        hf_rnn.accept_checkpoint(checkpoint)
        assert find_damage(checkpoint) is None and [p.name for p in checkpoints(copy)][:2] == [
            "checkpoint-7",
            "checkpoint-6",
        ]
        trainer = make_trainer(copy, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert same(trainer, run[1])

    def test_one_without_a_manifest_becomes_the_latest(self, copy):
        (copy / "checkpoint-2/manifest.json").unlink()
        hf_rnn.accept_checkpoint(str(copy / "checkpoint-2"))
        assert newest_whole(copy)[0] == copy / "checkpoint-2"
        make_trainer(copy, max_steps=3, save_strategy="no").train(resume_from_checkpoint=True)

    def test_what_cannot_be_read_is_not_accepted(self, copy):
        weights = copy / "checkpoint-7/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(OSError, match="model.safetensors cannot be read back"):
            hf_rnn.accept_checkpoint(copy / "checkpoint-7")
        with pytest.raises(ValueError, match="folder: expected the folder of a checkpoint"):
            hf_rnn.accept_checkpoint(copy / "nowhere")
        (copy / "checkpoint-6/optimizer.pt").unlink()
        with pytest.raises(ValueError, match="optimizer.pt is missing; a run goes on with it"):
            hf_rnn.accept_checkpoint(copy / "checkpoint-6")
