"""What the package overrides, calls or sets of the insides of transformers, accelerate, PEFT, numba and torch.

None of it is promised by them. Where a release moves one, its line here says which, before a run does something else
without a word. `name=` is a parameter passed by its name, `...` stands for those that are passed on as they come, ` | `
between what one version or another has.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import transformers

import hf_rnn
import hf_rnn_trainers

RELIED_ON = """
accelerate.Accelerator.prepare_model(model, device_placement, evaluation_mode)
numba.core.caching.NullCache.load_overload(sig, target_context)
numba.core.caching.NullCache.save_overload(sig, cres)
numba.core.compiler.CompileResult._rebuild(target_context, ...)
numba.core.compiler.CompileResult._reduce()
peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
torch._C._are_functorch_transforms_active
torch._assert_async
torch._higher_order_ops.scan(combine_fn, init, xs, ...)
torch._subclasses.fake_tensor.FakeTensor
torch.mkldnn_rnn_layer
transformers.GenerationMixin._assisted_decoding(input_ids, generation_config=, ...)
transformers.GenerationMixin._expand_inputs_for_generation(expand_size, ...)
transformers.GenerationMixin._prepare_cache_for_generation(generation_config, model_kwargs, ...)
transformers.GenerationMixin._supports_default_dynamic_cache()
transformers.GenerationMixin._valid_auto_compile_criteria(model_kwargs, generation_config)
transformers.GenerationMixin.prepare_inputs_for_generation(input_ids, ...)
transformers.PreTrainedModel._can_compile_fullgraph
transformers.PreTrainedModel._can_record_outputs
transformers.PreTrainedModel._init_weights(module)
transformers.PreTrainedModel._initialize_weights(module, is_custom_code)
transformers.PreTrainedModel._no_split_modules
transformers.PreTrainedModel._skip_keys_device_placement
transformers.PreTrainedModel._supports_sdpa
transformers.PreTrainedModel._tied_weights_keys
transformers.PreTrainedModel._tp_plan
transformers.PreTrainedModel._upload_modified_files(working_dir, repo_id, ...)
transformers.Trainer._clip_grad_norm(model)
transformers.Trainer._finalize_training(trial, ...)
transformers.Trainer._finish_current_push()
transformers.Trainer._get_grad_norm(model, grad_norm)
transformers.Trainer._get_output_dir(trial)
transformers.Trainer._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs,
    resume_from_checkpoint, trial)
transformers.Trainer._inner_training_loop(resume_from_checkpoint=, trial=, ...)
transformers.Trainer._load_best_model()
transformers.Trainer._load_from_checkpoint(resume_from_checkpoint, model)
transformers.Trainer._load_rng_state(checkpoint)
transformers.Trainer._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, ...)
transformers.Trainer._prepare_inputs(inputs)
transformers.Trainer._push_from_checkpoint(checkpoint_folder)
transformers.Trainer._run_epoch(epoch=, train_dataloader=, resume_from_checkpoint=, epochs_trained=,
    steps_trained_in_current_epoch=, ...)
transformers.Trainer._save_rng_state(output_dir)
transformers.Trainer._save(output_dir, state_dict)
transformers.Trainer._save_checkpoint(model, trial)
transformers.Trainer.create_accelerator_and_postprocess()
transformers.Trainer.self._total_loss_scalar
transformers.Trainer.self._tr_loss
transformers.Trainer.self.current_flos
transformers.Trainer.self.is_in_train
transformers.Trainer.self._train_batch_size
transformers.Trainer.self.model_accepts_loss_kwargs
transformers.trainer_pt_utils.safe_globals()
transformers.core_model_loading.ConversionOps.convert(input_dict, ...)
transformers.core_model_loading.ConversionOps.reverse_op
transformers.quantizers.HfQuantizer._dequantize(model, ...)
transformers.quantizers.HfQuantizer._process_model_after_weight_loading(model, ...)
transformers.quantizers.HfQuantizer._process_model_before_weight_loading(model, ...)
transformers.quantizers.HfQuantizer.get_state_dict_and_metadata(model)
transformers.quantizers.HfQuantizer.get_weight_conversions()
transformers.quantizers.HfQuantizer.is_compileable
transformers.quantizers.HfQuantizer.is_serializable(...)
transformers.quantizers.HfQuantizer.is_trainable
transformers.quantizers.HfQuantizer.postprocess_model(model, ...)
transformers.quantizers.HfQuantizer.remove_quantization_config(model)
transformers.quantizers.HfQuantizer.update_attn_implementation(config) |
    transformers.quantizers.HfQuantizer.update_tp_plan(config)
transformers.quantizers.HfQuantizer.update_weight_conversions(weight_conversions, ...)
"""


def lines() -> list[str]:
    return [" ".join(line.split()) for line in RELIED_ON.strip().replace(",\n", ", ").replace("|\n", "| ").split("\n")]


def find(path: str):
    """What a dotted path names; ImportError or AttributeError where there is no such thing."""
    module, *names = path.split(".")
    found = importlib.import_module(module)
    for name in names:
        found = getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{found.__name__}.{name}")
    return found


def moved(line: str) -> str | None:
    """What is other than a line says, or None."""
    if " | " in line:
        problems = [moved(either) for either in line.split(" | ")]
        return None if None in problems else " and ".join(map(str, problems))
    path, _, parameters = line.rstrip(")").partition("(")
    owner, _, name = path.rpartition(".")
    if owner.endswith(".self"):  # an attribute that instances have
        source = inspect.getsource(find(owner.removesuffix(".self")))
        return None if f"self.{name} =" in source or f"self.{name}:" in source else f"{path} is set no longer"
    try:
        member = getattr(find(owner), name)
    except (ImportError, AttributeError) as error:
        return f"{path} is gone ({error})"
    if "(" not in line:
        return None
    wanted = [parameter.strip() for parameter in parameters.split(",") if parameter.strip() not in ("", "...")]
    having = list(inspect.signature(member).parameters)
    having = having[1:] if having[:1] == ["self"] else having
    first = [name for name in wanted if not name.endswith("=")]
    if having[: len(first)] == first and {name.rstrip("=") for name in wanted} <= set(having):
        return None
    return f"{path} takes ({', '.join(having)}), expected ({parameters})"


def test_nothing_has_moved():
    problems = [problem for line in lines() if (problem := moved(line))]
    assert not problems, f"transformers {transformers.__version__}:\n" + "\n".join(problems)


def overridden_or_called() -> set[tuple[type, str]]:
    """Of all our classes: what they define that a base outside the package has, and what they use of it that begins
    with an underscore; with the class that has it."""
    found = set()
    for package in (hf_rnn, hf_rnn_trainers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name == "hf_rnn.remote_code.portable":
                continue
            tree = ast.parse(Path(importlib.util.find_spec(module.name).origin).read_text())
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    ours = getattr(importlib.import_module(module.name), node.name)
                    used = {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute) and x.attr.startswith("_")}
                    for base in ours.__mro__:
                        if base.__module__.split(".")[0] == "transformers":
                            found |= {(base, name) for name in used | vars(ours).keys() if name in vars(base)}
    return found


def test_the_list_is_complete():
    listed = {either.partition("(")[0].split(".")[-1] for line in lines() for either in line.split(" | ")}
    inside = {
        f"{owner.__module__}.{owner.__name__}.{name}"
        for owner, name in overridden_or_called()
        if not name.startswith("__") and (name.startswith("_") or owner.__name__ in ("HfQuantizer", "ConversionOps"))
    }
    unlisted = sorted(name for name in inside if name.split(".")[-1] not in listed | {"_abc_impl"})
    assert not unlisted, f"add to RELIED_ON with the parameters that we rely on: {unlisted}"
