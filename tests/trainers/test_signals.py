"""A run that is told to end saves first; and all kinds of faults, injected at random moments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import At, make_trainer, same
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_rnn_trainers.reliability.manifest import newest_whole

ROOT = Path(__file__).resolve().parents[2]


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

    def test_the_second_one_is_answered(self, tmp_path, capfd):
        def twice(control):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(SystemExit):
            make_trainer(tmp_path, callbacks=[At(3, twice)], save_strategy="no").train()
        told = capfd.readouterr().err
        assert told.count("SIGINT: saving a checkpoint") == 1
        assert "SIGINT: the checkpoint at the end of this step is still to come; SIGQUIT" in told
        assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-3"

    def test_an_interactive_session_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
        interrupt = At(3, lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="the run is saved"):
            make_trainer(tmp_path, callbacks=[interrupt], save_strategy="no").train()
        assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-3"

    def test_without_a_signal_for_children(self, tmp_path, monkeypatch):
        """Windows has none."""
        monkeypatch.setattr("hf_rnn_trainers.reliability.signals.CHILD_ENDED", None)
        monkeypatch.delattr(signal, "SIGCHLD")
        tell = At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            make_trainer(tmp_path, callbacks=[tell], save_strategy="no").train()
        assert newest_whole(tmp_path)[0] == tmp_path / "checkpoint-3"

    @pytest.mark.slow
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
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from runs import make_trainer\n"
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
            "from runs import At, make_trainer\n"
            "rank = os.environ['RANK']\n"
            "tell = At(3, lambda control: rank == '1' and os.kill(os.getpid(), signal.SIGTERM))\n"
            "try:\n"
            "    make_trainer('out', callbacks=[tell], save_strategy='no', ddp_backend='gloo').train()\n"
            "except SystemExit as stop:\n"
            "    open(f'stopped-{rank}', 'w').write(str(stop.code))\n"
        )
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TESTS": str(Path(__file__).parents[1])}
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
