"""The private and undocumented names of other libraries that this project leans on, each with what breaks without it.

After an upgrade that fails somewhere else, read this test first.
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from helpers.versions import has
from models import tiny_model
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from selfgen.context.models import cache_argument
from selfgen.context.ragged import RaggedLayer


def arguments(*names: str):
    """The function takes them by name."""

    def check(function) -> bool:
        return set(names) <= set(inspect.signature(function).parameters)

    return check


def mentions(*texts: str):
    """What can be seen only when it runs: its source has the texts."""

    def check(found) -> bool:
        source = inspect.getsource(found)
        return all(text in source for text in texts)

    return check


def exists(_) -> bool:
    return True


def since(package: str, version: str, check):
    """Older ones go without, and without what it is for."""

    def check_or_skip(found) -> bool:
        if not has(package, version):
            pytest.skip(f"needs {package} {version} or later")
        return check(found)

    return check_or_skip


def can_be_set(found) -> bool:
    return isinstance(found, property) and found.fset is not None


def hooks_of_a_tensor(_) -> bool:
    tensor = torch.zeros(1, requires_grad=True)
    tensor.register_hook(lambda gradient: gradient)
    hooked = bool(tensor._backward_hooks)
    tensor._backward_hooks = None
    return hooked


def has_hooks(_) -> bool:
    module = nn.Linear(1, 1)
    found = module._forward_pre_hooks, module._forward_hooks
    handles = module.register_forward_pre_hook(print), module.register_forward_hook(print)
    return all(handle.id in hooks for handle, hooks in zip(handles, found, strict=True))


def own_forward(_) -> bool:
    module = nn.Linear(1, 1)
    vars(module)["forward"] = lambda states: "own"
    return module(torch.zeros(1)) == "own"


def all_abstract_methods(_) -> bool:
    return not CacheLayerMixin.__abstractmethods__ - set(vars(RaggedLayer))


def forward_of_a_model(_) -> bool:
    model = tiny_model("llama")
    taken = inspect.signature(model.forward).parameters
    return {cache_argument(model), "position_ids", "logits_to_keep", "use_cache"} <= set(taken) and any(
        one.kind is one.VAR_KEYWORD for one in taken.values()
    )


UNSEEN = "the kernels take every call for a traced one, and do not look at values (torch_internals.is_traced)"
UPSTREAM = [
    # Passes over the ragged cache
    ("transformers:PreTrainedModel._supports_attention_backend", exists, "every model is refused by fixed_point"),
    ("transformers:PreTrainedConfig._attn_implementation", can_be_set, "passes would run a model's own attention"),
    ("transformers:AttentionInterface.register", exists, "the ragged attention can't be put into a model"),
    ("transformers.cache_utils:Cache.__init__", arguments("layers"), "RaggedCache can't be built of its layers"),
    ("transformers.cache_utils:CacheLayerMixin", all_abstract_methods, "RaggedLayer can't be built: a new method"),
    ("transformers.cache_utils:CacheLayerMixin.update", exists, "keys and values don't come to the ragged cache"),
    ("transformers:LlamaForCausalLM.forward", forward_of_a_model, "ragged_logits can't hand over a pass"),
    ("transformers:PreTrainedModel.warn_if_padding_and_no_attention_mask", exists, "passes wait for the device again"),
    ("datasets.config:HF_HUB_OFFLINE", exists, "a hub that can't be reached is asked for half a minute"),
    ("transformers:PreTrainedConfig.get_text_config", arguments("decoder"), "sizes of a model can't be read"),
    (
        "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__",
        exists,
        "what depends on the batch is not refused by precision=invariant",
    ),
    ("torch:Tensor._make_wrapper_subclass", exists, "sums can't be computed late"),
    ("torch._ops:OpOverload", exists, "operators of others may change what a sum is computed of"),
    ("torch._ops:OpOverloadPacket", exists, "operators of others may change what a sum is computed of"),
    ("torch._C:_set_throw_on_mutable_data_ptr", exists, "a kernel in C++ may read the address 0 for a late sum"),
    ("transformers.pytorch_utils:Conv1D.forward", arguments("x"), "GPT-2 is refused by precision=invariant"),
    (
        "transformers.activations:GELUTanh.forward",
        arguments("input"),
        "activations have no tables, so precision=invariant refuses gelu",
    ),
    # Reuse of passes
    ("transformers.modeling_layers:GradientCheckpointingLayer.gradient_checkpointing", exists, "no pass is reused"),
    (
        "transformers.modeling_layers:GradientCheckpointingLayer",
        mentions("self._gradient_checkpointing_func(partial("),
        "no pass is reused: a layer calls no checkpointing function, or one of other arguments",
    ),
    ("torch.nn.modules.dropout:_DropoutNd", exists, "a model with dropout would be trained on inference's states"),
    ("torch.nn:Dropout", lambda found: issubclass(found, nn.modules.dropout._DropoutNd), "dropout is not found"),
    ("torch:Tensor._backward_hooks", hooks_of_a_tensor, "DDP's hooks run twice in the backward of a reused layer"),
    ("torch.utils._pytree:tree_leaves", exists, "reuse can't look for a second input with a gradient"),
    # Weights that FSDP2 shards
    ("torch.distributed.fsdp:FSDPModule._get_fsdp_state", exists, "weights can't be gathered before the first forward"),
    ("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init", exists, "the same"),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState.__init__",
        mentions("self._fsdp_param_group"),
        "gathered weights can't be kept for the next micro-batch",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState.init",
        mentions("self._modules", "self._mp_policy"),
        "weights=sharded can't tell layers from the rest, nor weights=auto how large they are",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.unshard",
        mentions("if self._all_gather_result is not None:"),
        "after Ctrl-C in a pass, the next one computes with weights of before the last step",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._reshard_after_forward",
        exists,
        "weights=sharded can't tell what is gathered in every pass",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.__init__",
        mentions("self.post_forward_mesh_info", "self.reshard_after_backward"),
        "gathered weights can't be kept for the next micro-batch",
    ),
    (
        "transformers.modeling_layers:GradientCheckpointingLayer",
        since("transformers", "5.23", mentions("def __init_subclass__")),
        "passes are not reused under FSDP2: its hooks would run inside a checkpointed layer",
    ),
    ("torch.nn:Module", has_hooks, "FSDP2's hooks can't be taken off"),
    # Training
    (
        "transformers:Trainer.get_batch_samples",
        arguments("epoch_iterator", "num_batches", "device"),
        "contexts are not mixed before the step: plain fine-tuning",
    ),
    (
        "transformers:Trainer",
        mentions("self.get_batch_samples(", "self.training_step(", "self._get_num_items_in_batch("),
        "contexts are not mixed before the step: plain fine-tuning",
    ),
    (
        "transformers:Trainer",
        mentions("self.control.should_epoch_stop or self.control.should_training_stop:", "_maybe_log_save_evaluate("),
        "a run that goes on from the checkpoint of its last step trains one step more",
    ),
    (
        "transformers:Trainer",
        mentions("self._globalstep_last_logged = self.state.global_step", "(self.state.global_step - self._glob"),
        "after resuming, the first line of the log has the loss of the steps after the checkpoint only",
    ),
    (
        "transformers:Trainer._get_num_items_in_batch",
        arguments("batch_samples", "device"),
        "loss_on=after_self and RAC can't count what is learned",
    ),
    (
        "transformers:Trainer.training_step",
        arguments("model", "inputs", "num_items_in_batch"),
        "context_micro_batches can't tell when the next ones are due",
    ),
    (
        "transformers:Trainer.compute_loss",
        arguments("model", "inputs", "return_outputs", "num_items_in_batch"),
        "no pass is reused, and the project's losses are passed by",
    ),
    (
        "transformers:Trainer",
        mentions("self.label_smoother", "self.compute_loss_func"),
        "labels are smoothed twice, or a loss of the user's is passed by",
    ),
    (
        "transformers:Trainer",
        mentions("self.is_fsdp_enabled", "self.is_deepspeed_enabled"),
        "sharded weights that check_parallelism does not know of are not refused",
    ),
    ("transformers:Trainer._save", arguments("output_dir", "state_dict"), "checkpoints have no selfgen.json"),
    (
        "transformers:Trainer._load_from_checkpoint",
        arguments("resume_from_checkpoint", "model"),
        "a run is resumed with other settings without an error",
    ),
    ("transformers:Trainer", mentions(".on_pre_optimizer_step("), "a step with infinite gradients is taken"),
    ("transformers:Trainer", mentions("self._save_checkpoint("), "a half-written checkpoint counts as one"),
    ("transformers:Trainer._get_train_sampler", exists, "rows sorted by length have another order in a resumed run"),
    (
        "transformers.trainer_pt_utils:LengthGroupedSampler.__iter__",
        mentions("generator=self.generator"),
        "rows sorted by length have another order in a resumed run",
    ),
    ("transformers:Trainer", mentions("self.prediction_step("), "eval_loss depends on the batch size of evaluations"),
    (
        "transformers:Trainer.evaluation_loop",
        arguments("metric_key_prefix"),
        "eval_loss depends on the batch size of evaluations",
    ),
    (
        "accelerate.state:GradientState",
        lambda found: isinstance(found.remainder, property) and isinstance(found.end_of_dataloader, property),
        "eval_loss counts rows twice that fill up the last batch of several processes",
    ),
    (
        "accelerate:Accelerator.prepare_model",
        since("accelerate", "1.15", mentions("model._is_accelerate_prepared = True")),
        "after an evaluation before training, each of several processes trains alone",
    ),
    (
        "accelerate.hooks:AlignDevicesHook.__init__",
        mentions("self.offload = offload"),
        "offloaded weights are not refused by name",
    ),
    ("transformers:TrainingArguments.length_column_name", exists, "group_by_length counts the wrong column"),
    ("transformers:PreTrainedModel.loss_function", can_be_set, "lean_loss, kl_weight and row weights have no effect"),
    (
        "transformers:PreTrainedModel.loss_function",
        lambda found: mentions("_loss_function")(found.fget),
        "a model's own loss is not put back after a step",
    ),
    (
        "accelerate:Accelerator.prepare_model",
        mentions("_original_forward", "model.forward"),
        "contexts are computed in another precision than training, and graphs replay casts that are out of date",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam",
        mentions("self.unsharded_accumulated_grad", "self._unsharded_param"),
        "after an exception between micro-batches, the next run adds the gradients of those before it",
    ),
    (
        "accelerate:Accelerator.__init__",
        mentions("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"),
        "sharding that accelerate's launcher asks for is not refused by name",
    ),
    (
        "accelerate:dispatch_model",
        mentions("model.hf_device_map ="),
        "layers on several devices are not refused by name",
    ),
    # Weights that FSDP2 shards
    ("torch.distributed.fsdp:FSDPModule.unshard", arguments("async_op"), "weights can't be gathered for a generation"),
    (
        "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
        exists,
        "weights can't be gathered before the first forward, and the log does not tell what that costs",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState",
        mentions("_lazy_init", "_fsdp_param_group", "def _pre_forward", "def _post_forward"),
        "FSDP2's hooks are not found, so that each pass waits for the other processes",
    ),
    (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup",
        mentions("self.fsdp_params", "self.mp_policy"),
        "the log does not tell what gathering costs",
    ),
    ("torch.distributed.fsdp:MixedPrecisionPolicy.reduce_dtype", exists, "gradients are summed in bf16"),
    (
        "accelerate.utils:FullyShardedDataParallelPlugin",
        mentions("fsdp_version", "mixed_precision_policy", "state_dict_type", "cpu_ram_efficient_loading"),
        "FSDP1 is not refused, gradients are summed in bf16, or checkpoints in shards end without a model",
    ),
    ("accelerate:Accelerator", mentions("self._models"), "an evaluation before training fails under FSDP2"),
    (
        "accelerate.utils.fsdp_utils:save_fsdp_model",
        mentions('{FSDP_MODEL_NAME}_{model_index}"', "dist_cp.save"),
        "broken checkpoints in shards are taken",
    ),
    (
        "torch.distributed.checkpoint.api:CheckpointException.failures",
        exists,
        "a full disk ends a run that saves in shards without a word on what to do",
    ),
    # Streams
    (
        "datasets:IterableDataset.__init__",
        mentions("self._ex_iterable", "self._distributed", "self._epoch"),
        "None in rows out of Arrow is taken for a key, a stream is split twice, or workers share an epoch",
    ),
    (
        "datasets.iterable_dataset:ArrowExamplesIterable",
        mentions("def iter_arrow"),
        "None in rows of a stream out of Arrow is taken for a key",
    ),
    ("transformers:Trainer._save_rng_state", arguments("output_dir"), "checkpoints don't tell which rows were read"),
    (
        "transformers:Trainer._issue_warnings_after_load",
        arguments("load_result"),
        "a resumed run says that tied weights are missing",
    ),
    (
        "transformers:Trainer",
        mentions("skip_first_batches(", "self._save_rng_state(output_dir)", "self.get_train_dataloader()"),
        "a run on a stream is resumed at another row",
    ),
    (
        "accelerate.data_loader:prepare_data_loader",
        arguments("device", "num_processes", "process_index", "put_on_device", "dispatch_batches"),
        "batches of streams are on the wrong device, or shared out twice",
    ),
    (
        "accelerate.state:GradientState",
        mentions("active_dataloader", "remainder"),
        "the last batch of an evaluation on a stream weighs as a whole one",
    ),
    # Packed weights and graphs
    (
        "torch.nn:Module.__call__",
        own_forward,
        "packed weights and lean losses, which replace a forward, have no effect",
    ),
    ("torch.nn:Module.compile", mentions("self._compiled_call_impl"), "a compiled module loses its own forward"),
    (
        "transformers.models.llama.modeling_llama:LlamaAttention.forward",
        mentions("apply_rotary_pos_emb(query_states, key_states, cos, sin)"),
        "positions are turned by ten kernels again",
    ),
    ("torch.utils._python_dispatch:is_traceable_wrapper_subclass", exists, "graphs of quantized weights go wrong"),
    ("torch.nn:Module.register_forward_pre_hook", mentions("self._forward_pre_hooks"), "graphs miss a new hook"),
    ("torch.nn:Module.register_forward_hook", mentions("self._forward_hooks"), "graphs miss a new hook"),
    # Kernels
    ("torch._C:DispatchKey.PreDispatch", exists, UNSEEN),
    ("torch._C:_dispatch_tls_is_dispatch_key_included", exists, UNSEEN),
    ("torch._C:_len_torch_dispatch_stack", exists, UNSEEN),
    ("torch._C._functorch:is_functorch_wrapped_tensor", exists, UNSEEN),
    ("torch._C._functorch:is_batchedtensor", exists, "ops under vmap are refused in torch's words, not ours"),
    ("torch.autograd.forward_ad:_current_level", exists, "asking each tensor for its tangent makes calls slower"),
    ("torch:UntypedStorage._cdata", exists, "comparing the storages of tensors makes calls slower"),
    ("torch.distributed.tensor:DTensor.placements", exists, "sharded weights are not refused by name"),
    # Several processes
    ("datasets.table:MemoryMappedTable.__getstate__", mentions("self.path"), "processes get rows and not their file"),
    # Adapters
    ("peft:PeftModel.get_base_model", exists, "the model inside an adapter's is not found"),
    ("peft:PeftModel.disable_adapter", exists, "kl_weight compares an adapted model with itself"),
    ("peft:PeftModel.active_peft_config", exists, "prompt-learning adapters are not refused"),
    ("peft:PeftConfig.is_prompt_learning", exists, "prompt-learning adapters are not refused"),
    (
        "peft.tuners.tuners_utils:BaseTunerLayer.adapter_layer_names",
        exists,
        "an adapter's folder has no adapter that is on",
    ),
    ("peft.tuners.tuners_utils:BaseTunerLayer.active_adapters", exists, "an adapter's folder can't be loaded"),
    # TRL
    (
        "trl:SFTTrainer",
        mentions("self._is_vision_dataset =", "self.completion_only_loss =", "self.aux_loss_enabled ="),
        "images are not refused by name, or whole rows that are learned are not told",
    ),
    (
        "trl:SFTTrainer",
        mentions("self._metrics[mode]", "self._total_train_tokens +="),
        "a trial of reused passes counts tokens and accuracies twice",
    ),
    (
        "trl.trainer.sft_trainer",
        since("trl", "1.16", mentions("    add_fused_lm_head,")),
        "passes are not reused: entropy is taken to be measured where they compute nothing",
    ),
    # Quantized weights
    ("transformers.quantizers.base:HfQuantizer.is_qat_trainable", exists, "weights that can be trained are refused"),
    (
        "transformers:PreTrainedModel.from_pretrained",
        mentions("quantization_config"),
        "checkpoints of quantized weights are not loaded as such",
    ),
    (
        "bitsandbytes.nn:Linear4bit.forward",
        mentions("self.support_avx512bf16_for_cpu", "packing_format_for_cpu", "not self.training"),
        "contexts on some CPUs leave adapters on 4-bit weights without gradients",
    ),
    # The command line
    ("transformers.hf_argparser:string_to_bool", exists, "YAML files can't set switches"),
    ("transformers:HfArgumentParser", mentions("_argument_group_name"), "--help has no groups"),
    (
        "transformers.integrations.integration_utils",
        mentions("INTEGRATION_TO_CALLBACK = {", "def is_wandb_available", "def is_azureml_available"),
        "a reporter without its package is not refused by name",
    ),
    ("argparse:ArgumentParser.add_argument_group", mentions("self._action_groups"), "--help has no groups"),
    ("transformers.utils.hub:cached_file", exists, "provenance.json has no commit of a model"),
    ("transformers.utils.hub:extract_commit_hash", exists, "provenance.json has no commit of a model"),
]


@pytest.mark.parametrize(
    ("path", "check", "breaks"), UPSTREAM, ids=[f"{path}-{breaks}".replace(" ", "_") for path, _, breaks in UPSTREAM]
)
def test_what_we_lean_on(path, check, breaks):
    module, _, name = path.partition(":")
    if module.partition(".")[0] in ("peft", "bitsandbytes", "trl"):
        pytest.importorskip(module.partition(".")[0])
    found = importlib.import_module(module)
    try:
        for part in filter(None, name.split(".")):
            found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
        found = getattr(found, "__func__", found)
    except AttributeError:
        pytest.fail(f"{path} is gone: {breaks}")
    assert check(found), f"{path} has changed: {breaks}"


def test_packed_products_are_those_of_this_torch():
    """Without them the CPU is slower, and nothing else: `packed.can_pack` looks first."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    product = torch.ops.mkldnn._linear_pointwise(
        torch.ones(3, 4), torch.ops.mkldnn._reorder_linear_weight(torch.ones(5, 4), 3), torch.ones(5), "none", [], ""
    )
    assert torch.equal(product, torch.full((3, 5), 5.0))


def test_the_list_is_looked_up_and_not_only_read():
    with pytest.raises(pytest.fail.Exception, match=r"PreTrainedModel\.never is gone: a test"):
        test_what_we_lean_on("transformers:PreTrainedModel.never", exists, "a test")
    with pytest.raises(AssertionError, match="has changed: a test"):
        test_what_we_lean_on("transformers:Trainer.training_step", arguments("never"), "a test")
