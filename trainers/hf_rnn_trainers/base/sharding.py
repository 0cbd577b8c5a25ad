"""What trainers do with FSDP and DeepSpeed, asked for in the arguments or by `accelerate launch`."""

from transformers import Trainer


def refuse_sharding(trainer: Trainer, reason: str) -> None:
    """For methods that need whole weights on each process.

    Raises:
        ValueError: FSDP or DeepSpeed is on.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(f"DeepSpeed, FSDP: {reason}; use plain processes")


def check_fsdp(trainer: Trainer) -> None:
    """For methods that FSDP 2 serves.

    Raises:
        ValueError: FSDP's first version, or FSDP where accelerate would leave it out without a word.
    """
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp: accelerate shards over GPUs only, and here would train whole copies; leave it out")
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError("fsdp: version 1 flattens tensors into one; set fsdp_config={'version': 2}")
