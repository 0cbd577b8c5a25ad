import shutil

import pytest
from runs import make_trainer


@pytest.fixture(scope="session")
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
